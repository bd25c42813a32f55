import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from PIL import Image

from cifar_resnet import Recipe, load_checkpoint, predict, run, train
from cifar_resnet.batches import make_batches
from cifar_resnet.data import load
from cifar_resnet.device import compiled
from cifar_resnet.engine import Step
from cifar_resnet.errors import CheckpointError, CifarResnetError, NonFiniteLossError, RunDirectoryError, UsageError
from cifar_resnet.experiment import Watcher
from cifar_resnet.model import build_model

FILES = ["checkpoint.pt", "curves.png", "learning_rate.png", "metrics.json", "recipe.json"]


def content(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same_run(a, b):
    """Weights, averaged weights, optimizer to the bit, and the metrics, times aside."""
    for name in ("model", "averaged"):
        assert all(torch.equal(x, y) for x, y in zip(a[name].values(), b[name].values(), strict=True)), name
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(x[key]), torch.as_tensor(y[key])) for key in x)
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in each["history"]] for each in (a, b)]
    assert timeless[0] == timeless[1]
    return True


def test_a_run_leaves_the_files_that_are_documented(tiny_run, tiny_recipe):
    assert sorted(os.listdir(tiny_run)) == FILES
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert set(metrics) == {"schema", "environment", "evaluated_on", "epochs", "final"}
    keys = {"epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "images_per_second"}
    assert [set(row) for row in metrics["epochs"]] == [keys, keys]
    assert metrics["final"]["test_accuracy"] == metrics["epochs"][-1]["test_accuracy"]
    assert metrics["evaluated_on"] == "test"
    recipe = Recipe.build(file=tiny_run / "recipe.json")
    assert recipe.precision != "auto"
    assert recipe.replace(precision="auto", mean=None, std=None) == tiny_recipe
    assert load_checkpoint(tiny_run).recipe == recipe
    for picture in ("curves.png", "learning_rate.png"):
        assert (tiny_run / picture).read_bytes().startswith(b"\x89PNG")


def test_a_compiled_run_gives_what_the_plain_one_gives(tmp_path, monkeypatch):
    """With the tracing but without the code generation, which takes minutes; the last batch is a graph of its own."""
    graphs = []

    def count(graph, images):
        graphs.append([tuple(image.shape) for image in images if image.dim() == 4 and image.shape[1:] == (3, 32, 32)])
        return graph.forward

    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **options: plain_compile(forward, backend=count, **options))
    monkeypatch.setattr("cifar_resnet.winograd.MIN_TILES", 10**9)  # as the compiled graph has torch's own convolutions
    recipe = Recipe.build(
        dataset="digits", epochs=2, train_limit=20, test_limit=10, batch_size=8, ema_decay=0.9, ema_every=2, sam_share=0.4
    )
    plain = train(recipe, tmp_path / "plain", compile="off")
    assert graphs == []
    traced = train(recipe, tmp_path / "compiled", compile="on")
    assert graphs == [[(8, 3, 32, 32)], [(4, 3, 32, 32)]]
    assert same_run(content(tmp_path / "plain"), content(tmp_path / "compiled"))
    assert list(plain.content["model"]) == list(traced.content["model"])
    assert [checkpoint.environment["compiled"] for checkpoint in (plain, traced)] == [False, True]
    assert traced.environment["startup_seconds"]["compile"] > plain.environment["startup_seconds"]["compile"]


def test_a_model_that_cannot_be_compiled_trains_without_unless_told_to(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    recipe, warnings = Recipe.build("digits", precision="float32"), []
    model = build_model(recipe)
    with pytest.raises(CifarResnetError, match="Failed to find C compiler; use --compile off$"):
        compiled("on", recipe, model, torch.device("cpu"), [8], warnings.append)
    assert compiled("auto", recipe, model, torch.device("cpu"), [8], warnings.append) is model
    assert warnings == []
    assert compiled("auto", recipe, model, torch.device("cuda"), [8], warnings.append) is model
    assert warnings == ["the model cannot be compiled here: Failed to find C compiler; it trains without"]
    with pytest.raises(UsageError, match="--compile maybe"):
        compiled("maybe", recipe, model, torch.device("cpu"), [8], warnings.append)


def test_one_process_compiles_as_many_models_as_it_trains(monkeypatch):
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    recipe, device = Recipe.build("digits", precision="float32"), torch.device("cpu")
    for sizes in ([2, 3, 4, 5, 6], [7, 8, 9, 10, 11]):  # torch's own limit is 8 graphs of one function
        forward = compiled("on", recipe, build_model(recipe), device, sizes, pytest.fail)
    assert counter.frame_count == 10
    forward(torch.zeros(11, 3, 32, 32).to(memory_format=torch.channels_last))
    assert counter.frame_count == 10


class StopAfter(Watcher):
    """Sends itself a signal after so many steps of the run."""

    def __init__(self, steps, number=signal.SIGINT):
        self.left, self.number = steps, number

    def step(self, step: Step, state) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("loader", "workers", "stop"), [("tensor", None, 2), ("tensor", None, 3), ("albumentations", 2, 4)])
def test_a_run_stopped_anywhere_and_resumed_is_the_same_run(tiny_recipe, tiny_run, tmp_path, loader, workers, stop):
    whole = content(tiny_run)
    if loader != "tensor":
        train(tiny_recipe, tmp_path / "whole", loader=loader, workers=0)
        whole = content(tmp_path / "whole")
    with pytest.raises(Exception, match=r"stopped by SIGINT; go on with: cifar-resnet train --resume") as stopped:
        train(tiny_recipe, tmp_path / "run", loader=loader, workers=workers, watcher=StopAfter(stop))
    assert stopped.value.exit_code == 130
    assert multiprocessing.active_children() == []  # while the exception still holds on to all that there was
    part = content(tmp_path / "run")
    assert 3 * part["epoch"] + part["step"] == stop
    train(resume=tmp_path / "run", loader=loader, workers=workers)
    assert same_run(content(tmp_path / "run"), whole)
    assert sorted(os.listdir(tmp_path / "run")) == FILES


def test_sigterm_says_143_and_a_killed_run_goes_on(tiny_recipe, tiny_run, tmp_path):
    """In a process of its own: SIGTERM, then SIGKILL before the next save, then to the end."""
    recipe = tmp_path / "r.json"
    recipe.write_text(tiny_recipe.to_json())
    folder = tmp_path / "run"
    code = "import os, sys, signal; from test_run import StopAfter; from cifar_resnet import Recipe, train\n"
    code += "{}\ntry: train(**arguments)\nexcept Exception as e: print(e); sys.exit(e.exit_code)"

    def python(arguments):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        return subprocess.run(
            [sys.executable, "-c", code.format(arguments)], env=environment, capture_output=True, text=True, timeout=200
        )

    first = f"arguments = dict(recipe=Recipe.build(file={str(recipe)!r}), run_dir={str(folder)!r}, watcher=StopAfter(2, signal.SIGTERM))"
    stopped = python(first)
    assert (stopped.returncode, stopped.stderr) == (143, "")
    assert f"--resume {folder}" in stopped.stdout
    killed = python(f"arguments = dict(resume={str(folder)!r}, watcher=StopAfter(2, signal.SIGKILL))")
    assert killed.returncode == -signal.SIGKILL
    (folder / ".checkpoint.pt.1.part").write_bytes(b"half")  # as a kill inside a write would leave it
    assert content(folder)["step"] == 2
    said = []
    watcher = Watcher()
    watcher.warn = said.append
    train(resume=folder, watcher=watcher)
    assert same_run(content(folder), content(tiny_run))
    assert sorted(os.listdir(folder)) == FILES
    assert "took over the lock of process" in said[0]


def test_a_folder_that_is_not_empty_is_refused(tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty; choose another\n" in refused(1, "train", "--dataset", "digits", "--run-dir", tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "recipe.json").write_text("{}")
    assert f"--resume {tmp_path}" in refused(1, "train", "--dataset", "digits", "--run-dir", tmp_path)


def test_a_folder_in_use_names_its_holder(tiny_run):
    with (
        run.locked(tiny_run),
        pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()} on "),
        run.locked(tiny_run),
    ):
        pass
    assert ".lock" not in os.listdir(tiny_run)


@pytest.mark.parametrize("failing", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    run.write_whole(path, "old")

    def fail(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open" if failing == "open" else f"os.{failing}", fail)
    with pytest.raises(RunDirectoryError, match="No space left"):
        run.write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_inside_a_run_is_said_and_the_run_goes_on(tiny_recipe, tmp_path, monkeypatch):
    write, said, tries = run.write_whole, [], []

    def full_at_first(path, value):
        if path.name == "checkpoint.pt":
            tries.append(path)
            if len(tries) == 1:
                raise RunDirectoryError(f"{path} could not be written: No space left on device")
        write(path, value)

    monkeypatch.setattr(run, "write_whole", full_at_first)
    watcher = Watcher()
    watcher.warn = said.append
    checkpoint = train(tiny_recipe, tmp_path / "run", watcher=watcher, save_every_minutes=1e-6)
    assert checkpoint.finished
    assert len(said) == 1
    assert said[0].endswith("the run goes on, unsaved")


def test_resuming(tiny_run, tmp_path, refused, cli):
    before = (tiny_run / "checkpoint.pt").read_bytes()
    code, out, _ = cli("train", "--resume", tiny_run)
    assert code == 0
    assert "is finished" in out
    line = refused(2, "train", "--resume", tiny_run, "--epochs", 5)
    assert "--epochs 5" in line
    assert "the schedule would change" in line
    assert "--max-lr 3.0 contradicts" in refused(2, "train", "--resume", tiny_run, "--max-lr", 3)
    assert "--run-dir" in refused(2, "train", "--resume", tiny_run, "--run-dir", tmp_path)
    assert "neither" in refused(2, "train", "--resume", tmp_path)
    assert str(tmp_path) in refused(2, "train", "--resume", tmp_path)
    assert (tiny_run / "checkpoint.pt").read_bytes() == before
    assert sorted(os.listdir(tiny_run)) == FILES


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
    assert os.listdir(tmp_path / "run") == ["recipe.json"]


def test_what_a_run_killed_after_its_last_write_leaves_is_removed(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text("process 1 on nowhere")
    assert train(resume=tmp_path / "run").finished
    assert sorted(os.listdir(tmp_path / "run")) == FILES


def test_a_learning_rate_that_diverges_is_said(tmp_path, refused):
    line = refused(
        1, "train", "--dataset", "digits", "--train-limit", 64, "--test-limit", 10, "--batch-size", 16, "--epochs", 2,
        "--max-lr", 1e30, "--div-factor", 1, "--logit-scale", 1, "--run-dir", tmp_path / "run", "--precision", "float32",
    )  # fmt: skip
    assert "not finite since step" in line
    assert "--max-lr" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_what_train_reports_is_what_evaluate_prints(tiny_run, tmp_path, cli):
    last = load_checkpoint(tiny_run).history[-1]
    code, out, _ = cli("evaluate", tiny_run / "checkpoint.pt", "--run-dir", tmp_path, "--tta", "flip")
    assert code == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["accuracy"], found["loss"]) == (last["test_accuracy"], last["test_loss"])
    assert f"test accuracy {last['test_accuracy']:.2f} % of 40 images" in out
    assert sum(row["count"] for row in found["classes"].values()) == found["images"] == 40
    assert sum(found["confusion_matrix"][i][i] for i in range(10)) == round(0.4 * found["accuracy"])
    assert set(found["tta"]) == {"flip"}
    assert sorted(os.listdir(tmp_path)) == ["class_accuracy.png", "confusion_matrix.png", "evaluation.json", "reliability.png"]


@pytest.mark.parametrize("native", [True, False])
def test_where_bfloat16_is_only_emulated_evaluation_is_in_float32(native, narrow, no_figures, tmp_path, cli, monkeypatch):
    recipe = Recipe.build("digits", epochs=1, train_limit=70, test_limit=40, precision="bfloat16")
    checkpoint = train(recipe, tmp_path / "run")
    monkeypatch.setattr("cifar_resnet.device._multiplies_bfloat16", lambda device: native)
    images, labels = next(make_batches(load(recipe).evaluation, checkpoint.recipe, torch.device("cpu")).plain(40))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=native):
        logits = checkpoint.model().logits(images).double()
    code, out, err = cli("evaluate", tmp_path / "run")
    assert code == 0
    assert ("only emulates" in out + err) is not native
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["precision"] == ("bfloat16" if native else "float32")
    loss = found["loss"]
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert (loss == checkpoint.history[-1]["test_loss"]) is native
    Image.fromarray(load(recipe).evaluation.images[0]).save(tmp_path / "x.png")
    (one,) = predict(tmp_path / "run", [tmp_path / "x.png"], top=1)
    probability = one["classes"][0]["probability"]
    assert probability == pytest.approx(float(logits[0].softmax(0).max()), rel=1e-2)
    with torch.inference_mode():
        exact = checkpoint.model().logits(images[:1]).double().softmax(1).max()
    assert (probability == pytest.approx(float(exact), rel=1e-6)) is not native


def test_the_averaged_model_is_the_one_evaluated(tiny_run):
    checkpoint = load_checkpoint(tiny_run)
    weights = checkpoint.model().state_dict()
    assert all(torch.equal(weights[name], checkpoint.content["averaged"][name]) for name in weights)
    assert not torch.equal(weights["fc.weight"], checkpoint.content["model"]["fc.weight"])


def test_misclassified_lists_every_mistake(tiny_run, tmp_path, cli):
    code, out, _ = cli("misclassified", tiny_run, "--count", 4, "--run-dir", tmp_path)
    assert code == 0
    found = json.loads((tmp_path / "misclassified.json").read_text())
    checkpoint = load_checkpoint(tiny_run)
    wrong = round(40 * (1 - checkpoint.history[-1]["test_accuracy"] / 100))
    assert len(found["mistakes"]) == wrong
    assert f"of {wrong} mistakes" in out
    images = load(checkpoint.recipe).evaluation
    label_of = dict(zip(images.indices.tolist(), images.labels.tolist(), strict=True))
    batches = make_batches(images, checkpoint.recipe, torch.device("cpu"))
    assert batches.count == 40
    for mistake in found["mistakes"]:
        assert mistake["true"] == str(label_of[mistake["index"]]) != mistake["predicted"]
        assert max(mistake["probabilities"], key=mistake["probabilities"].get) == mistake["predicted"]
    assert sorted(os.listdir(tmp_path)) == ["gradcam.png", "misclassified.json", "misclassified.png"]


def test_a_checkpoint_of_schema_1_goes_on_loading():
    checkpoint = load_checkpoint(Path(__file__).parent / "data" / "schema1.pt")
    assert checkpoint.finished
    assert checkpoint.recipe.epochs == 1
    assert (checkpoint.recipe.sam_share, checkpoint.recipe.flip_order) == (0, "random")
    assert checkpoint.model().fc.weight[0, 0].item() == pytest.approx(0.01)
    assert checkpoint.history[-1]["test_accuracy"] == 50


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/cifar-resnet-was-here",)


def changed(source, path, **changes):
    """A copy of a checkpoint with some of its entries replaced."""
    torch.save({**torch.load(source, weights_only=True), **changes}, path)
    return path


@pytest.fixture(scope="session")
def old_checkpoint():
    return Path(__file__).parent / "data" / "schema1.pt"


def test_checkpoints_that_cannot_be_trusted_are_refused_in_one_line(old_checkpoint, tmp_path, refused):
    good = torch.load(old_checkpoint, weights_only=True)
    bad = tmp_path / "bad.pt"

    def evaluate(word):
        line = refused(1, "evaluate", bad)
        assert str(bad) in line
        assert word in line
        assert os.listdir(tmp_path) == (["bad.pt"] if bad.exists() else [])

    evaluate("no checkpoint")
    for text in (b"", b"not a zip", b"PK\x03\x04"):
        bad.write_bytes(text)
        evaluate("not a checkpoint")
    bad.write_bytes(old_checkpoint.read_bytes()[:-1000])
    evaluate("cut short")
    bad.write_bytes(pickle.dumps(Hostile()))
    evaluate("not a checkpoint")
    torch.save({**good, "extra": Hostile()}, bad)
    evaluate("must not")
    assert not Path("/tmp/cifar-resnet-was-here").exists()
    with zipfile.ZipFile(old_checkpoint) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    evaluate("compressed")
    torch.save([1, 2], bad)
    evaluate("not a checkpoint of cifar-resnet")
    changed(old_checkpoint, bad, kind="something else")
    evaluate("not a checkpoint of cifar-resnet")
    changed(old_checkpoint, bad, schema=99)
    evaluate("schema 99")
    changed(old_checkpoint, bad, recipe={**good["recipe"], "epochs": -1})
    evaluate("--epochs -1")
    changed(old_checkpoint, bad, classes=["a", "b"])
    evaluate("2 classes")
    slots = {**good["optimizer"], "state": {**good["optimizer"]["state"], 0: {"momentum_buffer": torch.tensor(0.0)}}}
    changed(old_checkpoint, bad, optimizer=slots)
    evaluate("optimizer state of another model")
    changed(old_checkpoint, bad, history=[{}])
    evaluate("metrics")
    changed(old_checkpoint, bad, epoch=7)
    evaluate("place")
    changed(old_checkpoint, bad, averaged=None)
    evaluate("averaged")
    weights = {name: tensor.clone() for name, tensor in good["averaged"].items()}
    weights["fc.weight"][0, 0] = float("nan")
    changed(old_checkpoint, bad, averaged=weights)
    evaluate("not finite")
    del weights["fc.weight"]
    changed(old_checkpoint, bad, averaged=weights)
    evaluate("bad.pt")


def test_one_flipped_bit_in_any_entry_is_found(old_checkpoint, tmp_path):
    """200 places, each inside an entry's data; the archive's padding and file names are not data."""
    whole, rng = old_checkpoint.read_bytes(), random.Random(0)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        spans = []
        for entry in archive.infolist():
            name, extra = (
                int.from_bytes(whole[entry.header_offset + k : entry.header_offset + k + 2], "little") for k in (26, 28)
            )
            spans.append((entry.header_offset + 30 + name + extra, entry.file_size))
    for _ in range(200):
        start, size = rng.choice([span for span in spans if span[1]])
        flipped = bytearray(whole)
        flipped[start + rng.randrange(size)] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.pt").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="checksum"):
            load_checkpoint(tmp_path / "bad.pt")
