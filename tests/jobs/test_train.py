import json
import math
import multiprocessing
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_helpers import FILES, Listener, StopAfter, assert_same_run, content, equal_weights

from cifar_resnet import Recipe, Watcher, evaluate, load_checkpoint, misclassified, run_dir, train
from cifar_resnet.data.images import read_image
from cifar_resnet.errors import CifarResnetError, NonFiniteLossError, RunDirectoryError, UsageError, shell_word
from cifar_resnet.jobs.interrupt import Interrupted, signals
from cifar_resnet.jobs.train import _Run
from cifar_resnet.look import figures, progress
from cifar_resnet.signals import ENDING
from cifar_resnet.training import distributed
from cifar_resnet.training.capture import CapturedEpoch

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these signals nor such terminals")
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


def test_a_watcher_hears_of_every_step_and_epoch_once(tiny_recipe, tmp_path, no_figures):
    heard = []

    class Keeping:  # no Watcher, and without warn
        def begin(self, recipe, run_dir, environment, data, state):
            heard.append(("begin", run_dir, len(data.train), state.epoch))

        def step(self, step, state):
            heard.append(("step", step.epoch, step.step, step.steps))

        def epoch(self, epoch):
            heard.append(("epoch", epoch.metrics["epoch"]))

    checkpoint = train(tiny_recipe, tmp_path / "run", watcher=Keeping())
    steps = [[("step", epoch, step, 3) for step in (1, 2, 3)] + [("epoch", epoch)] for epoch in (1, 2)]
    assert heard == [("begin", tmp_path / "run", 70, 0), *steps[0], *steps[1]]
    assert len(checkpoint.history) == 2


def test_the_metrics_of_every_epoch_are_handed_to_a_function(tiny_recipe, tmp_path, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    told = []
    checkpoints = [train(tiny_recipe, on_epoch=told.append) for _ in range(2)]  # as a cell that is run twice
    assert [str(each.path.parent) for each in checkpoints] == ["runs/digits-1", "runs/digits-2"]
    assert told == checkpoints[0].history + checkpoints[1].history
    assert type(told[0]) is dict


def test_progress_is_shown_where_it_is_asked_for_or_seen(tiny_recipe, tmp_path, monkeypatch, no_figures, capsys):
    for number, (asked, seen, lines) in enumerate([(None, False, 0), (None, True, 2), (False, True, 0), (True, False, 2)]):
        monkeypatch.setattr("cifar_resnet.jobs.train.visible", lambda seen=seen: seen)
        heard = Listener()
        train(tiny_recipe, tmp_path / str(number), progress=asked, watcher=heard)
        assert capsys.readouterr().out.count("train loss") == lines


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


# Stopped and resumed


@pytest.mark.parametrize(
    ("loader", "workers", "stops"),
    [
        ("tensor", None, (1, 2, 3, 5)),
        ("albumentations", 0, (2, 3)),
        ("albumentations", 2, (4,)),
        pytest.param("tensor", None, range(1, 6), marks=pytest.mark.slow),
        pytest.param("albumentations", 0, range(1, 6), marks=pytest.mark.slow),
        pytest.param("albumentations", 2, range(1, 6), marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_anywhere_and_resumed_is_the_same_run(tiny_recipe, tiny_run, tmp_path, no_figures, loader, workers, stops):
    whole = content(tiny_run)
    if loader != "tensor":
        train(tiny_recipe, tmp_path / "whole", loader=loader, workers=0)
        whole = content(tmp_path / "whole")
    for stop in stops:
        folder = tmp_path / str(stop)
        go_on = re.escape(f"stopped by SIGINT; go on with: cifar-resnet train --resume {shell_word(folder)}")
        with pytest.raises(Interrupted, match=go_on) as stopped:
            train(tiny_recipe, folder, loader=loader, workers=workers, watcher=StopAfter(stop))
        assert stopped.value.exit_code == 130
        assert multiprocessing.active_children() == []  # while the exception still holds on to all that there was
        part = content(folder)
        assert 3 * part["epoch"] + part["step"] == stop
        train(resume=folder)  # with the loader that it began with
        assert_same_run(content(folder), whole)
        assert sorted(os.listdir(folder)) == FILES


@pytest.mark.parametrize(
    "fields",
    [dict(optimizer="sgd", base_momentum=0.8), dict(optimizer="adam"), dict(optimizer="adamw", ema_decay=0.9, ema_every=2)],
)
def test_every_optimizer_goes_on_where_it_stood(tmp_path, no_figures, fields):
    """The default's, Muon, is that of the runs above."""
    sizes = dict(dataset="digits", train_limit=60, test_limit=20, batch_size=20, epochs=2, width=4, max_lr=0.01)
    recipe = Recipe.build("default", **sizes, **fields)
    train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", watcher=StopAfter(4))
    train(resume=tmp_path / "run")
    assert_same_run(content(tmp_path / "run"), content(tmp_path / "whole"))


@pytest.mark.posix
def test_the_command_to_go_on_with_names_the_options_that_were_given(tmp_path, cli, monkeypatch, no_figures):
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    monkeypatch.setattr(progress.TrainingTable, "step", lambda self, step, state: signal.raise_signal(signal.SIGINT))
    options = ("--format", "svg", "--target", 90, "--save-every-minutes", 2, "--data-dir", tmp_path / "a folder", "--device", "cpu", "--track", "tensorboard")
    code, _, err = cli("train", *DIGITS, "--run-dir", tmp_path / "run", *options, "--loader", "albumentations", "--workers", 0)
    assert code == 130
    words = shlex.split(err.partition("go on with: cifar-resnet ")[2])
    assert words[:3] == ["train", "--resume", str(tmp_path / "run")]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    expected = {"--format": "svg", "--target": "90.0", "--save-every-minutes": "2.0", "--data-dir": str(tmp_path / "a folder"), "--device": "cpu", "--track": "tensorboard"}
    assert given == {**expected, "--loader": "albumentations", "--workers": "0"}


def test_another_loader_than_a_run_began_with_is_said(tiny_recipe, tmp_path, no_figures):
    with pytest.raises(Interrupted):
        train(tiny_recipe, tmp_path / "run", loader="albumentations", workers=0, watcher=StopAfter(1))
    listener = Listener()
    train(resume=tmp_path / "run", loader="tensor", watcher=listener)
    assert [line for line in listener.warnings if "--loader tensor: the run had albumentations" in line]


def test_a_second_ctrl_c_is_an_interrupt_of_python(tiny_recipe, tmp_path, no_figures):
    """So that a notebook, or a program, lives on."""

    class Impatient(Watcher):
        def step(self, step, state):
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(tiny_recipe, tmp_path / "run", watcher=Impatient())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "run" / ".lock").exists()


def test_sigterm_is_exit_code_143_and_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(progress.TrainingTable, "step", lambda self, step, state: signal.raise_signal(signal.SIGTERM))
    folder = tmp_path / "run"
    code, _, err = cli("train", *DIGITS, "--run-dir", folder)
    assert (code, err) == (143, f"cifar-resnet: stopped by SIGTERM; go on with: cifar-resnet train --resume {shell_word(folder)}\n")
    assert content(folder)["step"] == 1


def test_the_first_signal_is_waited_with_and_the_second_acts_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with signals() as received:
        with signals() as inner:
            assert inner is received  # a run inside a repetition
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert {number: signal.getsignal(number) for number in before} == before
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("name", [name for name in ENDING if hasattr(signal, name)])
def test_every_signal_that_ends_a_process_is_waited_with(name):
    number, impatient = getattr(signal, name), name in ("SIGINT", "SIGTERM", "SIGQUIT", "SIGBREAK")
    before = signal.getsignal(number)
    with signals() as received:
        signal.raise_signal(number)
        assert received == [number]
        assert signal.getsignal(number) == (before if impatient else signal.SIG_IGN)
        if not impatient:  # a closed terminal sends it from the shell and from the kernel
            signal.raise_signal(number)
        assert received == [number]
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(number) is before


@POSIX
def test_what_is_ignored_or_has_a_handler_of_its_own_stays_so(monkeypatch):
    """As SIGHUP is under nohup, and SIGUSR1 in a program that uses the library."""
    heard = []
    kept = {signal.SIGHUP: signal.SIG_IGN, signal.SIGUSR1: lambda *_: heard.append("own"), signal.SIGINT: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in kept.items()}
    try:
        with signals() as received, signals() as inner:
            assert inner is received
            for number in kept:
                signal.raise_signal(number)
            assert (received, heard) == ([], ["own"])
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            assert {number: signal.getsignal(number) for number in kept} == kept
        assert {number: signal.getsignal(number) for number in kept} == kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@POSIX
@pytest.mark.parametrize("name", ["SIGHUP", "SIGALRM", "SIGUSR1"])
def test_other_signals_than_ctrl_c_save_the_run_too(tiny_recipe, tmp_path, no_figures, name):
    number = getattr(signal, name)
    with pytest.raises(Interrupted, match=f"stopped by {name}; go on with") as stopped:
        train(tiny_recipe, tmp_path / "run", watcher=StopAfter(2, number))
    assert stopped.value.exit_code == 128 + number
    assert content(tmp_path / "run")["step"] == 2


@POSIX
def test_a_terminal_that_is_closed_saves_the_run(tmp_path):
    master, terminal = os.openpty()
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from cifar_resnet.cli import main; main()"
    arguments = ("train", *DIGITS, "--epochs", 9999, "--run-dir", tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    try:
        while not (tmp_path / "run" / "metrics.json").exists() and process.poll() is None:
            if select.select([master], [], [], 0.05)[0]:
                os.read(master, 1 << 16)
        os.close(master)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    assert content(tmp_path / "run")["epoch"] >= 1
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_outside_the_main_thread_takes_no_signals(tiny_recipe, tiny_run, tmp_path, no_figures):
    threads = torch.get_num_threads()  # which are each thread's own
    raised = []

    def run():
        torch.set_num_threads(threads)
        try:
            train(tiny_recipe, tmp_path / "run")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == []
    assert_same_run(content(tmp_path / "run"), content(tiny_run))


@pytest.mark.posix
def test_a_killed_run_goes_on(tiny_recipe, tiny_run, tmp_path):
    """SIGKILL in a process of its own, two steps after a save."""
    (tmp_path / "r.json").write_text(tiny_recipe.to_json())
    code = f"""
import signal, torch
from pathlib import Path
from run_helpers import StopAfter
from cifar_resnet import Recipe, train
torch.set_num_threads({torch.get_num_threads()})
try:
    train(Recipe.build(file=Path("r.json")), "run", watcher=StopAfter(2, signal.SIGTERM))
except Exception as stopped:
    print(stopped.exit_code, flush=True)
train(resume="run", watcher=StopAfter(2, signal.SIGKILL))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    killed = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, "143\n", "")
    folder = tmp_path / "run"
    (folder / ".checkpoint.pt.1.part").write_bytes(b"half")  # as a kill inside a write would leave it
    assert content(folder)["step"] == 2
    listener = Listener()
    train(resume=folder, watcher=listener)
    assert_same_run(content(folder), content(tiny_run))
    assert sorted(os.listdir(folder)) == FILES
    assert re.fullmatch(r"took over the lock of process \d+ on .*, which is gone", listener.warnings[0])


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tiny_run, tmp_path, no_figures):
    """Its recipe.json, in which the precision is resolved, is all that there is."""
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "recipe.json", tmp_path / "run")
    train(resume=tmp_path / "run")
    assert_same_run(content(tmp_path / "run"), content(tiny_run))


def test_what_a_run_killed_after_its_last_write_leaves_is_removed(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text("")
    (tmp_path / "run" / ".lock-holder").write_text("process 1 on nowhere")
    (tmp_path / "run" / ".curves.png.1.part").write_text("half")
    assert train(resume=tmp_path / "run").finished
    assert sorted(os.listdir(tmp_path / "run")) == FILES


def test_a_run_whose_pictures_are_missing_draws_them(tiny_run, tmp_path):
    """As a kill between the last checkpoint and the pictures leaves it."""
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "learning_rate.png").unlink()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    train(resume=tmp_path / "run", format="svg")
    assert b"<svg" in (tmp_path / "run" / "learning_rate.svg").read_bytes()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_directory_of_the_version_before_evaluates_and_goes_on_to_its_end(tmp_path, cli, no_figures):
    folder = tmp_path / "run"
    shutil.copytree(Path(__file__).parent.parent / "data" / "run-0.1", folder)
    code, out, err = cli("evaluate", folder)
    assert (code, err) == (0, "")
    assert "the run stands at epoch 1 of 2, step 1: what follows is not its end" in out
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))
    assert (found["epoch"], found["images"]) == (1, 10)
    assert found["loss"] == pytest.approx(math.log(10))  # of weights that are all alike
    before = content(folder)
    code, out, err = cli("train", "--resume", folder, "--dataset", "digits", "--epochs", 2)
    assert (code, err) == (0, "")
    assert "going on after epoch 1, step 1" in out
    after = content(folder)
    assert (after["epoch"], after["step"]) == (2, 0)
    assert after["history"][0] == before["history"][0]
    assert after["recipe"] == {"schema": 3, "width": 64, "split": None, "batches": "fixed", **before["recipe"]}
    assert not torch.equal(after["model"]["fc.weight"], before["model"]["fc.weight"])
    assert json.loads((folder / "recipe.json").read_text("utf-8"))["schema"] == 3


def test_a_step_of_one_image_is_refused_but_a_run_that_has_one_goes_on(tmp_path, refused, no_figures):
    """The run is of schema 2, and was killed before its first checkpoint."""
    fields = dict(dataset="digits", train_limit=33, test_limit=10, batch_size=16, epochs=1, width=4)
    options = ["--dataset", "digits", "--train-limit", 33, "--batch-size", 16, "--batches", "fixed"]
    for command in ("train", "find-lr"):
        line = refused(2, command, *options, "--run-dir", tmp_path / "new")
        assert "--batch-size 16: of 33 training images a step would have only 1" in line
        assert "--batch-size 17 would do" in line
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    written = Recipe.build("digits", **fields).to_dict() | {"schema": 2}
    del written["batches"]
    (tmp_path / "old" / "recipe.json").write_text(json.dumps(written))
    assert train(resume=tmp_path / "old").recipe.batches == "fixed"


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
    with pytest.raises(UsageError, match="give neither"):
        train(Recipe(), resume=tiny_run)


def test_the_newest_run_goes_on(unfinished, tiny_run, tmp_path, cli, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/digits-2")
    shutil.copytree(unfinished, "runs/digits-1", copy_function=shutil.copyfile)  # written now
    code, out, err = cli("train", "--resume", "latest")
    assert (code, err) == (0, "cifar-resnet: the newest run is runs/digits-1\n")
    assert "going on after epoch 1, step 1" in out
    assert_same_run(content("runs/digits-1"), content(tiny_run))


def test_what_was_made_of_an_unfinished_run_says_so_and_goes_when_it_goes_on(unfinished, tmp_path, monkeypatch, no_figures):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, label, **options: titles.append(label))
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, label, **options: titles.append(label))
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    before = set(os.listdir(folder))
    evaluate(folder)
    misclassified(folder, count=1, format="svg")
    for name in ("evaluation.json", "misclassified.json"):
        found = json.loads((folder / name).read_text("utf-8"))
        assert (found["epoch"], found["epochs"]) == (1, 2)
    assert any("after epoch 1 of 2" in title for title in titles)
    (folder / "report.html").write_text("as an older version left it")
    made = sorted(set(os.listdir(folder)) - before)
    assert {"reliability.png", "gradcam.svg", "report.html"} <= set(made)
    own = ["labels.csv", "my_model.onnx", "notes.txt", "report.txt"]
    for name in own:
        (folder / name).write_text("mine")
    listener = Listener()
    train(resume=folder, watcher=listener)
    assert f"removed what was made of the checkpoint that the run goes on from: {', '.join(made)}" in listener.warnings
    assert sorted(os.listdir(folder)) == sorted([*FILES, *own])
    evaluate(folder)
    train(resume=folder)  # which has ended
    assert json.loads((folder / "evaluation.json").read_text("utf-8"))["epoch"] == 2


def test_all_files_that_are_made_of_a_checkpoint_are_known():
    """By the table of the documentation."""
    page = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?) \| `(?:evaluate|misclassified|report|export)\b", page, re.MULTILINE)
    files = [Path(name) for row in rows for name in re.findall(r"`([^`]+\.\w+)`", row)]
    assert len(files) >= 10
    kept = [file for file in files if file.name not in run_dir.MADE_OF_CHECKPOINT]
    of_training = (Path(f"training_labels.{suffix}") for suffix in ("json", "csv", "png"))
    assert kept == [Path("labels.csv"), *of_training, Path("training_folds.pt")]


# Images of one's own


@pytest.fixture
def own_run(own_images, tmp_path, no_figures):
    """The folder of a run on the images of `own_images`, stopped after its first step."""
    recipe, read = Recipe.build(dataset=str(own_images), epochs=2, batch_size=16, max_lr=0.02, width=4), []
    watcher = StopAfter(1)
    watcher.reading = lambda *numbers: read.append(numbers)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", watcher=watcher)
    assert read == [(i, 60) for i in range(1, 61)]
    return tmp_path / "run"


def test_own_images_are_trained_on_with_their_class_names_mean_and_deviation(own_run, own_images):
    checkpoint = train(resume=own_run)
    assert checkpoint.classes == ("bright", "dark")
    assert checkpoint.recipe.dataset == str(own_images)
    images = np.stack([read_image(path) for path in sorted(own_images.glob("train/*/*.png"))]) / 255
    assert checkpoint.recipe.mean == pytest.approx(images.mean((0, 1, 2)), abs=1e-4)
    assert checkpoint.recipe.std == pytest.approx(images.std((0, 1, 2)), abs=1e-4)


@contextmanager
def untouched(run):
    """Checks that all files of a run, and what was made of it, are as they were."""
    (run / "evaluation.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    yield
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("training", lambda folder: [path.unlink() for path in folder.glob("train/*/1*.png")], "there were 48, and there are 26"),
        ("training", lambda folder: (folder / "train/dark/23.png").rename(folder / "train/bright/24.png"), "of the 48, pixels or labels"),
        ("evaluation", lambda folder: (folder / "test/dark/0.png").unlink(), "there were 12, and there are 11"),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_with_other_images(own_run, own_images, part, change, said):
    change(own_images)
    message = f"the {part} images are not those of the run in {own_run}: {said}.* --dataset, or start a new run"
    with untouched(own_run), pytest.raises(CifarResnetError, match=message):
        train(resume=own_run)
    own_images.rename(own_images.with_name("renamed"))
    with untouched(own_run), pytest.raises(CifarResnetError, match=message):
        train(resume=own_run, must_match={"dataset": str(own_images.with_name("renamed"))})


def test_a_run_goes_on_with_other_pixels_in_the_same_files_and_says_so_once(own_run, own_images):
    """As another version of Pillow decodes them."""
    for part in ("train", "test"):
        shutil.copy(own_images / part / "dark/3.png", own_images / part / "dark/4.png")
    first, second = Listener(), Listener()
    first.step = StopAfter(1).step
    with pytest.raises(Interrupted):
        train(resume=own_run, watcher=first)
    assert [re.sub(", pixels.*;", " ...;", line) for line in first.warnings] == [
        f"the {part} images are not those of the run in {own_run}: of the {count} ...; the run goes on with these"
        for part, count in (("training", 48), ("evaluation", 12))
    ]
    assert train(resume=own_run, watcher=second).finished
    assert second.warnings == []


def test_a_run_of_images_without_files_does_not_go_on_with_other_pixels(unfinished, tmp_path):
    shutil.copytree(unfinished, tmp_path / "run")
    changed = content(unfinished)
    changed["data"]["evaluation"]["sha256"] = "another"
    torch.save(changed, tmp_path / "run" / "checkpoint.pt")
    with untouched(tmp_path / "run"), pytest.raises(CifarResnetError, match="of the 40, pixels or labels have changed; put"):
        train(resume=tmp_path / "run")


def test_a_run_without_a_checkpoint_begins_where_its_images_have_moved_to(own_images, own_run, tmp_path, no_figures):
    (own_run / "checkpoint.pt").unlink()
    own_images.rename(tmp_path / "renamed")
    train(resume=own_run, must_match={"dataset": str(tmp_path / "renamed")})
    assert load_checkpoint(own_run).recipe.dataset == str(tmp_path / "renamed")


def test_a_run_goes_on_where_its_images_have_moved_to(own_run, own_images, tmp_path, cli, no_figures):
    """The same to the bit as where they were; and finds them there from then on."""
    shutil.copytree(own_run, tmp_path / "moved")
    train(resume=own_run)
    own_images.rename(tmp_path / "renamed")
    code, _, err = cli("train", "--resume", tmp_path / "moved", "--dataset", tmp_path / "renamed")
    assert (code, err) == (0, "")
    assert_same_run(content(own_run), content(tmp_path / "moved"))
    assert json.loads((tmp_path / "moved" / "recipe.json").read_text("utf-8"))["dataset"] == str(tmp_path / "renamed")
    assert cli("evaluate", tmp_path / "moved")[0] == 0


@pytest.mark.posix
def test_a_run_on_own_images_goes_on_in_any_spelling_of_their_folder(own_run, own_images, cli, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(own_images)
    line = refused(2, "train", "--resume", "run", "--dataset", "digits")
    assert line == f"cifar-resnet: --dataset digits contradicts the run in run, which has {own_images}; leave it out\n"
    for spelling in ("own/", "other/../own", "link"):
        shutil.copytree("run", "again")
        code, out, err = cli("train", "--resume", "again", "--dataset", spelling)
        assert (code, err) == (0, ""), spelling
        assert "going on after epoch 0, step 1" in out
        checkpoint = load_checkpoint("again")
        assert checkpoint.finished
        assert checkpoint.recipe.dataset == str(own_images)
        shutil.rmtree("again")


def test_a_run_does_not_go_on_with_images_of_other_classes(own_run, own_images):
    for part in ("train", "test"):
        (own_images / part / "dark").rename(own_images / part / "cold")
    with untouched(own_run), pytest.raises(CifarResnetError, match="was trained on the classes bright, dark, not bright, cold"):
        train(resume=own_run)


def test_processes_with_other_images_are_refused_on_each(own_images, tmp_path, monkeypatch):
    """Before the run has a folder; as where two machines have each a copy of the images."""
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, {**mine, "train": {"images": 47, "sha256": "another"}}])
    recipe = Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, width=4)
    with pytest.raises(CifarResnetError, match="process 1 has other images than process 0; give each the same"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_another_layout_is_refused(own_images, refused, tmp_path):
    def line(code, folder):
        return refused(code, "train", "--dataset", folder, "--run-dir", tmp_path / "run")

    assert "there is no folder" in line(2, tmp_path / "nowhere")
    (own_images / "train" / "dark" / "0.png").write_text("no image")
    assert "0.png: not an image" in line(1, own_images)
    shutil.rmtree(own_images / "test" / "dark")
    (own_images / "train" / "dark" / "0.png").unlink()
    assert "train has dark, which test has not" in line(1, own_images)
    shutil.rmtree(own_images / "test")
    assert "must hold train/CLASS/* and test/CLASS/*: there is no test" in line(1, own_images)
    assert not (tmp_path / "run").exists()


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
    write, tries, listener = run_dir.write_whole, [], Listener()

    def full_at_first(path, value):
        if path.name == "checkpoint.pt":
            tries.append(path)
            if len(tries) == 1:
                raise RunDirectoryError(f"{path} could not be written: No space left on device")
        write(path, value)

    monkeypatch.setattr(run_dir, "write_whole", full_at_first)
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

    monkeypatch.setattr(run_dir, "write_whole", full)
    with pytest.raises(RunDirectoryError, match="No space left on device$"):
        train(tiny_recipe, tmp_path / "run")


def test_a_table_that_cannot_be_written_does_not_stop_a_run_but_is_missed_at_its_end(tiny_recipe, tmp_path, monkeypatch):
    """In Windows a spreadsheet that shows metrics.csv keeps it from being written."""
    write, listener = run_dir.write_whole, Listener()

    def refused(path, value):
        if path.name == "metrics.csv":
            raise RunDirectoryError(f"{path} could not be written: Access is denied")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "write_whole", refused)
        with pytest.raises(RunDirectoryError, match=r"metrics.csv could not be written: Access is denied$"):
            train(tiny_recipe, tmp_path / "run", watcher=listener)
    said = f"{tmp_path / 'run' / 'metrics.csv'} could not be written: Access is denied; the run goes on"
    assert listener.warnings == [said] * tiny_recipe.epochs
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
    assert os.listdir(tmp_path / "run") == ["recipe.json"]


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


def test_float32_is_float32_unless_tf32_is_asked_for(cli, tf32, tmp_path, monkeypatch, no_figures):
    during = []
    monkeypatch.setattr(progress.TrainingTable, "step", lambda self, step, state: during.append(tf32()))
    for number, (option, expected) in enumerate(((("--tf32",), True), ((), False))):
        assert cli("train", *DIGITS, "--epochs", 1, *option, "--run-dir", tmp_path / str(number))[0] == 0
        assert set(during) == {(expected, expected)}
        during.clear()


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
    assert heard.warnings == [f"{tmp_path}/curves.png could not be written: No space left on device; the run goes on"]


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
def test_a_short_run_on_real_images_learns(cli, tmp_path):
    options = ("--epochs", 2, "--train-limit", 1024, "--test-limit", 300, "--batch-size", 64, "--max-lr", 0.1, "--width", 16)
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
