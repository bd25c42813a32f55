import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from run_helpers import FILES, Listener, StopAfter, assert_same_run, content, equal_weights

from cifar_resnet import Recipe, Watcher, build_model, files, load_checkpoint, misclassified, run_dir, train
from cifar_resnet.errors import NonFiniteLossError, RunDirectoryError, shell_word
from cifar_resnet.jobs.train import _Run
from cifar_resnet.look import figures, progress
from cifar_resnet.training.capture import CapturedEpoch
from cifar_resnet.training.model import whiten

DIGITS = ("--dataset", "digits", "--train-limit", 48, "--test-limit", 20, "--batch-size", 16, "--width", 4)


def test_a_run_leaves_the_files_that_are_documented(tiny_run, tiny_recipe):
    assert sorted(os.listdir(tiny_run)) == FILES
    metrics = json.loads((tiny_run / "metrics.json").read_text("utf-8"))
    assert set(metrics) == {"schema", "environment", "evaluated_on", "epochs", "final"}
    keys = {"epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "images_per_second"}
    assert [set(row) for row in metrics["epochs"]] == [keys, keys]
    assert metrics["final"]["test_accuracy"] == metrics["epochs"][-1]["test_accuracy"]
    assert metrics["evaluated_on"] == "test"
    assert {"torch", "torchvision", "albumentations", "cuda", "cudnn", "tf32", "device", "loader"} <= set(metrics["environment"])
    recipe = Recipe.build(file=tiny_run / "recipe.json")
    assert recipe.precision != "auto"
    assert recipe.replace(precision="auto", mean=None, std=None) == tiny_recipe
    assert load_checkpoint(tiny_run).recipe == recipe
    for picture in ("curves.png", "learning_rate.png"):
        assert (tiny_run / picture).read_bytes().startswith(b"\x89PNG")


def test_a_whitening_start_is_made_of_the_training_images_and_a_resumed_run_has_its_bits(tiny_recipe, tmp_path, no_figures):
    recipe, kernels = tiny_recipe.replace(init="whiten"), []

    class Keeping:
        def begin(self, recipe, run_dir, environment, data, state):
            model = build_model(recipe)
            whiten(model, recipe, data.train.images)
            kernels.extend([model.prep[0].weight.detach(), state.model.prep[0].weight.detach().clone()])

    train(recipe, tmp_path / "whole", watcher=Keeping())
    assert torch.equal(*kernels)
    with pytest.raises(Exception, match="stopped by SIGINT"):
        train(recipe, tmp_path / "stopped", watcher=StopAfter(2))
    train(resume=tmp_path / "stopped")
    assert equal_weights(content(tmp_path / "stopped"), content(tmp_path / "whole"))


def test_a_short_last_epoch_of_the_schedule_is_the_recipes_own(tiny_run, tiny_recipe):
    """The LR of each epoch's last step, by torch's own OneCycleLR."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, tiny_recipe.max_lr, total_steps=6, pct_start=tiny_recipe.peak_epoch / 2, anneal_strategy="linear",
        div_factor=tiny_recipe.div_factor, final_div_factor=tiny_recipe.final_div_factor, cycle_momentum=False,
    )  # fmt: skip
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step() if len(rates) < 6 else None
    assert [row["lr"] for row in load_checkpoint(tiny_run).history] == pytest.approx([rates[2], rates[5]])


def test_the_averaged_model_is_the_one_evaluated(tiny_run):
    checkpoint = load_checkpoint(tiny_run)
    weights = checkpoint.model().state_dict()
    assert all(torch.equal(weights[name], checkpoint.content["averaged"][name]) for name in weights)
    assert not torch.equal(weights["fc.weight"], checkpoint.content["model"]["fc.weight"])


# What goes wrong


def test_a_folder_that_is_not_empty_is_refused(tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty; choose another\n" in refused(1, "train", *DIGITS, "--run-dir", tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    nowhere = ["--dataset", tmp_path / "nowhere"]  # which is not looked at
    assert "is not empty; choose another\n" in refused(1, "train", *nowhere, "--run-dir", tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    assert f"--resume {shell_word(tmp_path)}" in refused(1, "train", *DIGITS, "--run-dir", tmp_path)


def test_a_run_that_another_process_goes_on_with_is_refused(unfinished, refused):
    with run_dir.RunDir(unfinished).lock():
        assert f"is in use by process {os.getpid()}" in refused(1, "train", "--resume", unfinished)
    assert content(unfinished)["step"] == 1


def test_a_full_disk_inside_a_run_is_said_and_the_run_goes_on(tiny_recipe, tmp_path, monkeypatch, no_figures):
    write, tries, listener = files.write_whole, [], Listener()

    def full_at_first(path, value):
        if path.name == "checkpoint.pt":
            tries.append(path)
            if len(tries) == 1:
                raise RunDirectoryError(f"{path} could not be written: No space left on device")
        write(path, value)

    monkeypatch.setattr("cifar_resnet.checkpoint.write_whole", full_at_first)
    checkpoint = train(tiny_recipe, tmp_path / "run", watcher=listener, save_every_minutes=1e-6)
    assert checkpoint.finished
    assert len(tries) == 7  # after every step, and after the last epoch
    assert listener.warnings == [
        f"{tmp_path / 'run' / 'checkpoint.pt'} could not be written: No space left on device; the run goes on, unsaved"
    ]


def test_a_disk_that_is_full_at_the_end_ends_the_run(tiny_recipe, tmp_path, monkeypatch):
    def full(path, value):
        if path.name == "checkpoint.pt":
            raise RunDirectoryError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr("cifar_resnet.checkpoint.write_whole", full)
    with pytest.raises(RunDirectoryError, match="No space left on device$"):
        train(tiny_recipe, tmp_path / "run")


def test_a_table_that_cannot_be_written_does_not_stop_a_run_but_is_missed_at_its_end(tiny_recipe, tmp_path, monkeypatch, no_figures):
    """In Windows a spreadsheet that shows metrics.csv keeps it from being written."""
    write, listener = files.write_whole, Listener()

    def refused(path, value):
        if path.name == "metrics.csv":
            raise RunDirectoryError(f"{path} could not be written: Access is denied")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "write_whole", refused)
        with pytest.raises(RunDirectoryError, match=r"metrics.csv could not be written: Access is denied$"):
            train(tiny_recipe, tmp_path / "run", watcher=listener)
    said = f"{tmp_path / 'run' / 'metrics.csv'} could not be written: Access is denied; the run goes on"
    assert listener.warnings == [said] * (tiny_recipe.epochs - 1)
    assert (tmp_path / "run" / "curves.png").exists()
    assert load_checkpoint(tmp_path / "run").finished
    train(resume=tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == FILES
    assert len((tmp_path / "run" / "metrics.csv").read_text("utf-8").splitlines()) == 1 + tiny_recipe.epochs


def test_a_non_finite_loss_leaves_the_last_good_checkpoint(tiny_recipe, tmp_path):
    class Poison(Watcher):
        def step(self, step, state):
            if (step.epoch, step.step) == (2, 1):
                state.model.fc.weight.data.fill_(float("inf"))

    with pytest.raises(NonFiniteLossError, match="step 1 of epoch 2"):
        train(tiny_recipe, tmp_path / "run", watcher=Poison(), save_every_minutes=1e-6)
    kept = load_checkpoint(tmp_path / "run").content
    assert (kept["epoch"], kept["step"]) == (0, 3)


def test_weights_that_are_finite_but_give_no_finite_loss_end_the_run(tiny_recipe, tmp_path):
    class Poison(Watcher):
        def step(self, step, state):
            if step.step == step.steps:
                for module in state.tested.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.weight.data.fill_(1e30)

    with pytest.raises(NonFiniteLossError, match="evaluation images is not finite after epoch 1; try a lower --max-lr"):
        train(tiny_recipe, tmp_path / "run", watcher=Poison())
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.json", "recipe.json"]


def test_a_learning_rate_that_diverges_is_said(tmp_path, refused):
    line = refused(
        1, "train", *DIGITS, "--epochs", 2, "--max-lr", 1e30, "--div-factor", 1, "--logit-scale", 1, "--run-dir", tmp_path / "run",
        "--precision", "float32",
    )  # fmt: skip
    assert "not finite since step" in line
    assert "--max-lr" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# Settings that change nothing

IDLE = dict(  # all at once: those of an optimizer, an average, a sharpness-aware step, a crop, a flip, holes that are not there
    base=dict(recipe="default", optimizer="adam", max_lr=0.001, sam_share=0, pad=0, flip_probability=0.3, cutout_count=0),
    changes=dict(
        muon_lr_factor=0.9, muon_momentum=0.1, nesterov=False, sam_radius=0.5, ema_every=1, pad_mode="black", flip_order="random",
        cutout_size=20, cutout_fill=0.9, cutout_probability=0.4,
    ),
)  # fmt: skip
SMALL = dict(dataset="digits", train_limit=60, test_limit=20, batch_size=20, epochs=1, width=4)


@pytest.fixture
def weights_of(tmp_path, no_figures):
    def trained(recipe):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        train(recipe, folder)
        return content(folder)

    return trained


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        IDLE.values(),
        (dict(recipe="default", optimizer="sgd", cutout_probability=0), dict(cutout_count=3, cutout_size=20, muon_momentum=0.1)),
    ],
)
def test_fields_that_are_idle_change_no_weight(weights_of, base, changes):
    one = Recipe.build(**SMALL, **base)
    other = one.replace(**changes)
    assert set(changes) <= set(one.idle())
    assert one.canonical() == other.canonical()
    assert equal_weights(weights_of(one), weights_of(other))


def test_fields_that_are_not_idle_change_the_weights(weights_of):
    """Each of those that can be idle, where it is not: so `idle` names none too many."""
    base = Recipe.build("default", **SMALL, ema_decay=0.5, ema_every=2, sam_share=0.7)
    assert base.idle() == {}
    changes = dict(IDLE["changes"], cutout_count=3)
    before = weights_of(base)
    for name, value in changes.items():
        assert not equal_weights(before, weights_of(base.replace(**{name: value}))), name


def test_settings_that_change_nothing_are_warned_of(cli, tmp_path, no_figures):
    given = (
        "--optimizer",
        "adam",
        "--max-lr",
        0.001,
        "--sam-share",
        0,
        "--pad",
        0,
        "--flip-probability",
        0.3,
        "--cutout-count",
        0,
    )
    idle = dict(
        muon_lr_factor=0.9, sam_radius=0.5, ema_every=7, cutout_size=20, cutout_fill=0.9, pad_mode="black", flip_order="random"
    )
    options = [word for name, value in idle.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, out, _ = cli(
        "train", *DIGITS, "--recipe", "default", "--epochs", 1, *given, *options, "--no-nesterov", "--run-dir", tmp_path / "a"
    )
    assert code == 0
    warned = {line.split(" changes nothing: ")[0]: line for line in out.splitlines() if "changes nothing" in line}
    assert set(warned) == {*(f"--{name.replace('_', '-')} {value}" for name, value in idle.items()), "--no-nesterov"}
    assert warned["--muon-lr-factor 0.9"] == "--muon-lr-factor 0.9 changes nothing: the optimizer is adam"
    assert warned["--sam-radius 0.5"].endswith(": sam_share is 0")
    assert warned["--flip-order random"].endswith(": flip_probability is not 0.5")


@pytest.mark.parametrize(
    "fields", [dict(recipe="digits"), dict(recipe="default"), dict(recipe="page", ema_decay=0.9, ema_every=3)]
)
def test_nothing_is_warned_of_that_a_preset_says_or_that_counts(fields, tmp_path, no_figures):
    listener = Listener()
    train(Recipe.build(**SMALL, **fields), tmp_path / "run", watcher=listener)
    assert listener.warnings == []


# Run options


@pytest.fixture
def tf32():
    """Gives whether products and convolutions may use it; they may as before afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.cuda
def test_float32_is_float32_unless_tf32_is_asked_for(cli, tf32, tmp_path, monkeypatch, no_figures):
    during = []
    monkeypatch.setattr(progress.TrainingTable, "step", lambda self, step, state: during.append(tf32()))
    for number, (option, expected) in enumerate(((("--tf32",), True), ((), False))):
        assert cli("train", *DIGITS, "--epochs", 1, *option, "--run-dir", tmp_path / str(number))[0] == 0
        assert set(during) == {(expected, expected)}
        during.clear()


def test_tf32_changes_nothing_on_a_cpu_and_that_is_said(cli, tf32, tmp_path, no_figures):
    before = tf32()
    code, out, err = cli("train", *DIGITS, "--epochs", 1, "--tf32", "--device", "cpu", "--run-dir", tmp_path / "run")
    assert (code, tf32()) == (0, before)
    assert "--tf32 changes nothing: it is for an NVIDIA GPU, and the run is on cpu" in out + err


def test_curves_are_drawn_on_the_way_where_that_takes_little_of_the_time(tiny_recipe, tmp_path, monkeypatch, no_figures):
    drawn, curves = [], figures.curves
    monkeypatch.setattr(figures, "curves", lambda history, *more: drawn.append(len(history)) or curves(history, *more))
    train(tiny_recipe.replace(epochs=3), tmp_path / "quick")
    assert drawn == [3]
    drawn.clear()
    monkeypatch.setattr("cifar_resnet.jobs.train.DRAWN_EVERY", 0)
    train(tiny_recipe.replace(epochs=3), tmp_path / "slow")
    assert drawn == [1, 2, 3]


def test_a_run_that_is_stopped_leaves_its_curves(unfinished):
    assert (unfinished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (unfinished / "learning_rate.png").exists()


def test_curves_that_cannot_be_written_are_said_and_the_run_goes_on(tiny_recipe, tmp_path, monkeypatch, no_figures):
    written = []

    def full_at_first(path, content):
        written.append(path)
        if len(written) == 1:
            raise RunDirectoryError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr("cifar_resnet.jobs.train.DRAWN_EVERY", 0)
    monkeypatch.setattr("cifar_resnet.jobs.common.write_whole", full_at_first)
    heard = Listener()
    assert train(tiny_recipe, tmp_path, watcher=heard).finished
    assert heard.warnings == [f"{tmp_path / 'curves.png'} could not be written: No space left on device; the run goes on"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_notebook_that_has_switched_gradients_off_can_train(tiny_recipe, tiny_run, tmp_path, around):
    with around():
        train(tiny_recipe, tmp_path / "run")
        shown = misclassified(tmp_path / "run", count=2)
        assert not torch.is_grad_enabled()
    assert_same_run(content(tmp_path / "run"), content(tiny_run))
    assert shown == misclassified(tiny_run, tmp_path, count=2)


def test_the_accuracy_curve_has_a_line_where_a_target_is_given_and_none_otherwise(cli, tmp_path):
    """Matplotlib notes the text of a label beside its outlines."""
    for name, option in (("with", ("--target", "37.5")), ("without", ())):
        options = ("--epochs", 1, "--format", "svg", *option, "--run-dir", tmp_path / name)
        assert cli("train", *DIGITS, *options)[0] == 0
        svg = (tmp_path / name / "curves.svg").read_text("utf-8")
        assert "<!-- Accuracy -->" in svg
        assert ("<!-- target, 37.5 % -->" in svg) == (name == "with")
        assert "91.97" not in svg
        assert sorted(os.listdir(tmp_path / name)) == [
            "checkpoint.pt",
            "curves.svg",
            "learning_rate.svg",
            "metrics.csv",
            "metrics.json",
            "recipe.json",
        ]


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="torch compiles only where paths are UTF-8")
def test_a_compiled_run_gives_what_the_plain_one_gives(tmp_path, monkeypatch, no_figures):
    """With the tracing but without the code generation; each size of batch is a graph of its own."""
    graphs = []

    def count(graph, images):
        graphs.append([tuple(image.shape) for image in images if image.dim() == 4 and image.shape[1:] == (3, 32, 32)])
        return graph.forward

    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **options: plain_compile(forward, backend=count, **options))
    sizes = dict(train_limit=20, test_limit=10, batch_size=8, epochs=2, width=4)
    recipe = Recipe.build("default", dataset="digits", **sizes, ema_decay=0.9, ema_every=2, sam_share=0.4)
    plain = train(recipe, tmp_path / "plain", compile="off", convolution="torch")  # as the graph has them
    assert graphs == []
    traced = train(recipe, tmp_path / "compiled", compile="on")
    assert graphs == [[(7, 3, 32, 32)], [(6, 3, 32, 32)]]
    assert_same_run(content(tmp_path / "plain"), content(tmp_path / "compiled"))
    assert list(plain.content["model"]) == list(traced.content["model"])
    assert [checkpoint.environment["compiled"] for checkpoint in (plain, traced)] == [False, True]


@pytest.mark.cifar10
def test_a_short_run_on_real_images_learns(cli, tmp_path, no_figures):
    options = ("--epochs", 2, "--train-limit", 1024, "--test-limit", 300, "--batch-size", 64, "--max-lr", 0.1, "--width", 8)
    code, out, _ = cli("train", *options, "--run-dir", tmp_path / "run")
    assert code == 0
    history = load_checkpoint(tmp_path / "run").history
    assert history[-1]["train_accuracy"] > 25  # 10 by chance
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert "last epoch:" in out


def test_captured_steps_serve_runs_alike_but_for_the_seed_alone():
    def key(images="of these images", device="cuda:0", compile="off", tf32=False, **fields):
        run = _Run(Recipe.build(**fields), None, None, {}, dict(compile=compile, tf32=tf32), SimpleNamespace())
        run.recipe, run.device = run.asked_recipe, torch.device(device)
        run.data = SimpleNamespace(fingerprints={"train": {"sha256": images}})
        return run._steps_depend_on()

    others = [key(images="of others"), key(device="cuda:1"), key(compile="on"), key(tf32=True), key(width=8)]
    assert key() == key(seed=5)
    assert key() not in others


@pytest.mark.parametrize(("name", "says"), [("eva6-s9", True), ("default", False)])
def test_a_gpu_says_where_a_recipe_cannot_be_captured_for_its_momentum(name, says):
    said, device = [], torch.device("cuda")
    run = _Run(Recipe.build(name), None, None, {}, {"compile": "off", "tf32": False}, SimpleNamespace(warn=said.append))
    run.recipe, run.device, run.loader = run.asked_recipe, device, SimpleNamespace(sizes=[512])
    run.state = SimpleNamespace(device=device, model="the model", forward=None)
    run.data = SimpleNamespace(fingerprints={"train": {"sha256": "of the images"}})
    run.make_steps({})
    assert ["momentum changes" in line for line in said] == [True] * says
    assert run.state.forward == "the model"


def test_a_step_that_cannot_be_captured_is_taken_as_it_is_and_memory_that_is_out_is_said(tmp_path, cli, monkeypatch, no_figures):
    """Ending a capture that failed raises an error of its own, with the first one as its context."""

    def fails(self):
        try:
            raise fails.first
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None

    monkeypatch.setattr("cifar_resnet.jobs.train.capturable", lambda state: True)
    monkeypatch.setattr(CapturedEpoch, "capture", fails)
    fails.first = RuntimeError("operation not permitted when stream is capturing")
    code, out, _ = cli("train", *DIGITS, "--epochs", 1, "--peak-epoch", 0.5, "--device", "cpu", "--run-dir", tmp_path / "without")
    assert code == 0
    assert "the step cannot be captured as a graph" in " ".join(out.split())
    assert load_checkpoint(tmp_path / "without").environment["captured"] is False
    options = ["--epochs", 1, "--peak-epoch", 0.5, "--device", "cpu", "--repeat", 2]
    code, out, _ = cli("train", *DIGITS, *options, "--run-dir", tmp_path / "two")
    assert (code, " ".join(out.split()).count("the step cannot be captured as a graph")) == (0, 1)  # not tried for the second
    fails.first = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    code, _, err = cli("train", *DIGITS, "--device", "cpu", "--run-dir", tmp_path / "full")
    assert (code, err) == (1, "cifar-resnet: out of memory; try a smaller --batch-size\n")


@pytest.mark.parametrize(("share", "words"), [
    (0.05, "no sharpness-aware steps: a share of 0.05 of 3 steps is none"),
    (0.5, "sharpness-aware steps, at half the speed, after epoch 0.6667"),
])
def test_sharpness_aware_steps_are_announced_where_there_are_any(cli, tmp_path, no_figures, share, words):
    """Of three steps the last, as half of them is rounded."""
    options = ("--train-limit", 48, "--test-limit", 20, "--batch-size", 16, "--epochs", 1, "--peak-epoch", 0.5, "--width", 4)
    assert words in cli("train", "--dataset", "digits", *options, "--sam-share", share, "--run-dir", tmp_path / "run")[1]
