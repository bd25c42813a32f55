import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

import cifar_resnet
from cifar_resnet import Recipe, evaluate, load_checkpoint, train
from cifar_resnet.errors import CheckpointError, DataError, UsageError
from cifar_resnet.jobs import convolutions
from cifar_resnet.jobs.train import _Run
from cifar_resnet.training import autotune, convolution, engine, fused_cpu, runtime, ways
from cifar_resnet.training.model import build_model

CPU = torch.device("cpu")
SMALL = dict(dataset="digits", train_limit=96, test_limit=32, batch_size=32, epochs=2, width=4, precision="float32")
CHOICE = {f"float32 {layer}": ["rows", "winograd", "side by side"] for layer in ("4>8 32x32", "8>8 16x16", "32>32 4x4")}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """What these tests choose does not depend on the machine."""
    monkeypatch.setattr(convolutions, "library", lambda dtype: None)


@pytest.fixture
def compiler(no_compiler, monkeypatch):
    if fused_cpu.library(torch.float32) is None:
        pytest.skip("there is no C compiler here that can build our functions")
    monkeypatch.setattr(convolutions, "library", fused_cpu.library)
    monkeypatch.setattr(fused_cpu, "MIN_ELEMENTS", 1)


@pytest.fixture
def recipe():
    return Recipe.build("digits", **{name: value for name, value in SMALL.items() if name != "dataset"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(convolutions, "user_cache", lambda: tmp_path)
    return tmp_path / "convolutions"


@pytest.fixture
def timed(monkeypatch):
    """What the machine measures; gives how often it was asked."""
    asked = []
    timings = [
        autotune.Timing(layer, direction, {way: 1.0}, 1.0, way)
        for layer, ways in CHOICE.items()
        for direction, way in zip(convolution.Ways._fields, ways, strict=True)
    ]
    monkeypatch.setattr(autotune, "measure", lambda *given: (asked.append(given[1:]), timings)[1])
    return asked


def test_a_machine_is_measured_once(recipe, folder, timed):
    model = build_model(recipe)
    for _ in range(2):
        assert convolutions.choose("auto", model, recipe, CPU) == CHOICE
    assert timed == [(32, torch.float32)]
    assert convolutions.choose("auto", model, recipe.replace(batch_size=16), CPU) == CHOICE
    assert timed[1:] == [(16, torch.float32)]
    convolutions.measure_anew(model, recipe)
    assert len(timed) == 3


def test_a_machine_where_torch_is_quickest_is_measured_once_too(recipe, folder, monkeypatch):
    asked, timing = [], autotune.Timing("float32 4>8 32x32", "forward", {"torch": 1.0}, 1.0, "torch")
    monkeypatch.setattr(autotune, "measure", lambda *given: (asked.append(given), [timing])[1])
    assert [convolutions.choose("auto", build_model(recipe), recipe, CPU) for _ in range(2)] == [{}, {}]
    assert len(asked) == 1


def test_of_two_runs_that_measure_at_once_both_take_the_choice_that_was_kept_first(recipe, folder, timed, monkeypatch):
    measure, first = autotune.measure, []

    def while_another_run_ends(*given):
        if not first:
            first.append(True)
            assert convolutions.choose("auto", build_model(recipe), recipe, CPU) == CHOICE
        measure(*given)
        return [autotune.Timing("float32 4>8 32x32", "forward", {"torch": 1.0}, 1.0, "torch")]

    monkeypatch.setattr(autotune, "measure", lambda *given: while_another_run_ends(*given) if not first else measure(*given))
    assert convolutions.choose("auto", build_model(recipe), recipe, CPU) == CHOICE
    assert len(timed) == 2


def test_a_choice_holds_for_one_processor_and_number_of_threads(recipe, folder, timed, monkeypatch):
    model = build_model(recipe)
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        convolutions.choose("auto", model, recipe, CPU)
    assert len(timed) == len(list(folder.iterdir())) == 2
    monkeypatch.setattr(runtime, "_cpu", lambda: {"cpu_name": "another", "amx_bf16": True})
    convolutions.choose("auto", model, recipe, CPU)
    machines = [json.loads(file.read_text("utf-8"))["machine"] for file in folder.iterdir()]
    assert sorted(machine["threads"] for machine in machines) == ["1", "1", "2"]
    assert sum(machine["cpu"] == "another" and machine["features"].endswith(" amx_bf16") for machine in machines) == 1


@pytest.mark.parametrize("damaged", ["", "[]", '{"convolutions": {"float32 4>8 32x32": ["magic", "torch", "torch"]}}'])
def test_a_kept_choice_that_cannot_be_used_is_measured_anew(damaged, recipe, folder, timed):
    model = build_model(recipe)
    convolutions.choose("auto", model, recipe, CPU)
    (file,) = folder.iterdir()
    file.write_text(damaged)
    assert convolutions.choose("auto", model, recipe, CPU) == CHOICE
    assert len(timed) == 2
    assert json.loads(file.read_text("utf-8"))["convolutions"] == CHOICE


def test_without_a_folder_to_keep_it_in_a_choice_is_made_each_time(recipe, timed, monkeypatch, tmp_path):
    def homeless():
        raise DataError("this user has no home folder")

    (tmp_path / "file").write_text("")
    for nowhere in (homeless, lambda: tmp_path / "file"):
        monkeypatch.setattr(convolutions, "user_cache", nowhere)
        assert convolutions.choose("auto", build_model(recipe), recipe, CPU) == CHOICE
    assert len(timed) == 2


def test_nothing_is_chosen_where_torch_is_asked_for_or_on_another_device_or_for_emulated_arithmetic(recipe, timed, monkeypatch):
    model = build_model(recipe)
    assert convolutions.choose("torch", model, recipe, CPU) == {}
    assert convolutions.choose("auto", model, recipe, torch.device("cuda")) is None
    monkeypatch.setattr(runtime, "_multiplies_bfloat16", lambda device: False)
    assert convolutions.choose("auto", model, recipe.replace(precision="bfloat16"), CPU) is None
    assert timed == []


def test_with_a_compiler_batch_norm_is_built_unless_torch_is_asked_for(recipe, folder, timed, compiler):
    model = build_model(recipe)
    assert convolutions.choose("auto", model, recipe, CPU) == CHOICE | ways.COMPILED
    assert convolutions.choose("torch", model, recipe, CPU) == {}
    assert convolutions.choose("auto", model, recipe, torch.device("cuda")) is None
    assert [json.loads(file.read_text("utf-8"))["convolutions"] for file in folder.iterdir()] == [CHOICE]


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_onednn_may_not_use_has_a_choice_of_its_own(name, recipe, folder, timed, monkeypatch):
    for limit in ("AVX512_CORE", "AVX2", "AVX512_CORE"):
        monkeypatch.setenv(name, limit)
        convolutions.choose("auto", build_model(recipe), recipe, CPU)
    assert len(timed) == 2


class Stopped(cifar_resnet.Watcher):
    """Sends SIGINT in the second epoch."""

    def step(self, step, state):
        if (step.epoch, step.step) == (2, 1):
            signal.raise_signal(signal.SIGINT)


class Warned(cifar_resnet.Watcher):
    def __init__(self):
        self.messages = []

    def warn(self, message):
        self.messages.append(message)


@pytest.mark.parametrize("built", [{}, ways.COMPILED], ids=["convolutions", "with BatchNorm"])
def test_a_run_keeps_its_choice_and_goes_on_with_it_to_the_bit(
    built, recipe, folder, timed, tmp_path, no_figures, monkeypatch, request
):
    if built:
        request.getfixturevalue("compiler")
    apply, seen, choice, norms, norm_relu = convolution._Convolution.apply, set(), CHOICE | built, [], fused_cpu.norm_relu
    monkeypatch.setattr(fused_cpu, "norm_relu", lambda *given: (norms.append(given), norm_relu(*given))[1])
    monkeypatch.setattr(convolution._Convolution, "apply", lambda *given: (seen.add(given[2]), apply(*given))[1])
    whole = train(recipe, tmp_path / "whole")
    assert seen == {convolution.Ways("rows", "winograd", "side by side")}
    assert bool(norms) == bool(built)
    assert whole.convolutions == whole.environment["convolutions"] == choice
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text("utf-8"))["environment"]["convolutions"] == choice
    assert evaluate(whole.path)["accuracy"] == whole.history[-1]["test_accuracy"]

    with pytest.raises(cifar_resnet.CifarResnetError):
        train(recipe, tmp_path / "stopped", watcher=Stopped())
    shutil.copytree(tmp_path / "stopped", tmp_path / "copy")
    monkeypatch.setattr("cifar_resnet.jobs.train.choose", lambda *given: pytest.fail("a resumed run chose anew"))
    resumed, warned = train(resume=tmp_path / "stopped"), Warned()
    assert resumed.convolutions == choice
    for name, value in whole.model().state_dict().items():
        assert torch.equal(value, resumed.model().state_dict()[name]), name

    monkeypatch.setattr(convolutions, "library", lambda dtype: None)  # as on a machine without a compiler
    assert train(resume=tmp_path / "copy", watcher=warned).convolutions == CHOICE
    assert ["no C compiler" in message for message in warned.messages] == [True] * len(built)


def test_torchs_own_convolutions_can_be_asked_for(recipe, folder, timed, tmp_path, cli, no_figures):
    assert train(recipe, tmp_path / "run", convolution="torch").convolutions == {}
    assert timed == []
    with pytest.raises(UsageError, match="--convolution fast: it is auto or torch"):
        train(recipe, convolution="fast")
    code, _, err = cli("train", "--convolution", "fast")
    assert code == 2
    assert "fast" in err


@pytest.mark.parametrize(("mode", "warned"), [("auto", 0), ("torch", 1)])
def test_on_a_gpu_the_choice_of_a_cpu_is_kept_and_asking_for_torch_is_said_to_change_nothing(recipe, mode, warned):
    state, said = engine.start(recipe, CPU, convolutions=CHOICE), []
    run = SimpleNamespace(
        asked={"convolution": mode, "compile": "auto"},
        device=torch.device("cuda"),
        state=state,
        recipe=recipe,
        watcher=SimpleNamespace(warn=said.append),
    )
    _Run._choose_ways(run)
    assert ways.used(state.model) == CHOICE
    assert len(said) == warned


def test_a_checkpoint_that_names_another_way_is_refused(recipe, folder, timed, tmp_path, no_figures):
    checkpoint = train(recipe, tmp_path / "run")
    content = torch.load(checkpoint.path)
    for wrong in ({"float32 4>8 32x32": ["magic", "torch", "torch"]}, {"float32 4>8 32x32": ["torch"] * 4}, ["torch"], {"BatchNorm": ["magic"]}):
        torch.save({**content, "convolutions": wrong}, checkpoint.path)
        with pytest.raises(CheckpointError, match="cannot use|can use"):
            load_checkpoint(checkpoint.path)
    del content["convolutions"]  # of an earlier version
    torch.save(content, checkpoint.path)
    assert load_checkpoint(checkpoint.path).convolutions is None
