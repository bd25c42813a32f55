"""Runs that are stopped or killed, and go on."""

import json
import math
import multiprocessing
import os
import pickle
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from run_helpers import FILES, Listener, StopAfter, assert_same_run, content

from cifar_resnet import Recipe, Watcher, evaluate, misclassified, run_dir, train
from cifar_resnet.errors import UsageError, shell_word
from cifar_resnet.jobs.interrupt import Interrupted, signals
from cifar_resnet.look import progress
from cifar_resnet.signals import ENDING
from cifar_resnet.training import engine

DIGITS = ("--dataset", "digits", "--train-limit", 48, "--test-limit", 20, "--batch-size", 16, "--width", 4)


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


def test_a_signal_before_the_first_step_saves_the_run(tiny_recipe, tiny_run, tmp_path, no_figures, monkeypatch):
    start = engine.start
    monkeypatch.setattr(engine, "start", lambda *given, **named: (signal.raise_signal(signal.SIGINT), start(*given, **named))[1])
    with pytest.raises(Interrupted):
        train(tiny_recipe, tmp_path / "run")
    assert content(tmp_path / "run")["step"] == 1
    monkeypatch.undo()
    train(resume=tmp_path / "run")
    assert_same_run(content(tmp_path / "run"), content(tiny_run))


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


def test_what_says_how_to_go_on_comes_back_from_another_process():
    stopped = Interrupted(signal.SIGTERM, Path("my run"), {"tf32": True})
    again = pickle.loads(pickle.dumps(stopped))
    assert (str(again), again.exit_code, again.options) == (str(stopped), 143, {"tf32": True})


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


@pytest.mark.posix
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


@pytest.mark.posix
@pytest.mark.parametrize("name", ["SIGHUP", "SIGALRM", "SIGUSR1"])
def test_other_signals_than_ctrl_c_save_the_run_too(tiny_recipe, tmp_path, no_figures, name):
    number = getattr(signal, name)
    with pytest.raises(Interrupted, match=f"stopped by {name}; go on with") as stopped:
        train(tiny_recipe, tmp_path / "run", watcher=StopAfter(2, number))
    assert stopped.value.exit_code == 128 + number
    assert content(tmp_path / "run")["step"] == 2


@pytest.mark.posix
def test_a_terminal_that_is_closed_saves_the_run(tmp_path):
    master, terminal = os.openpty()
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from cifar_resnet.cli import main; main()"
    arguments = ("train", *DIGITS, "--epochs", 9999, "--device", "cpu", "--run-dir", tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    try:
        while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None:
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
def test_a_killed_run_goes_on(tiny_recipe, tiny_run, tmp_path, no_figures):
    """SIGKILL in a process of its own, two steps after a save."""
    (tmp_path / "r.json").write_text(tiny_recipe.to_json())
    code = f"""
import signal, torch
from pathlib import Path
from run_helpers import StopAfter
from cifar_resnet import Recipe, train
torch.set_num_threads({torch.get_num_threads()})
torch.backends.mps.is_available = lambda: False
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


class Fails(Watcher):
    def __init__(self, method, step=1):
        def fail(*_):
            self.left -= 1
            if not self.left:
                raise ZeroDivisionError

        self.left = step
        setattr(self, method, fail)


def test_a_run_that_fails_before_its_first_checkpoint_goes_on_with_its_loader(tiny_recipe, tmp_path, no_figures):
    options, listener = dict(loader="albumentations", workers=0), Listener()
    train(tiny_recipe, tmp_path / "whole", **options)
    with pytest.raises(ZeroDivisionError):
        train(tiny_recipe, tmp_path / "run", watcher=Fails("begin"), **options)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert train(resume=tmp_path / "run", watcher=listener).environment["workers"] == 0
    assert listener.warnings == [f"the run in {tmp_path / 'run'} has no checkpoint, and begins anew"]
    assert_same_run(content(tmp_path / "run"), content(tmp_path / "whole"))


@pytest.mark.parametrize("written", ["", "[]", '{"environment": 3}', '{"environment": {"loader": "tensor", "workers": "x"}}'])
def test_metrics_that_say_nothing_of_a_loader_do_no_harm(tiny_run, tmp_path, no_figures, written):
    shutil.copy(tiny_run / "recipe.json", tmp_path)
    (tmp_path / "metrics.json").write_text(written)
    train(resume=tmp_path)
    assert_same_run(content(tmp_path), content(tiny_run))


def test_a_run_whose_checkpoint_is_gone_begins_anew_without_what_was_made_of_it(tiny_run, tmp_path, no_figures):
    folder, listener = tmp_path / "run", Listener()
    shutil.copytree(tiny_run, folder)
    evaluate(folder)
    (folder / "checkpoint.pt").unlink()
    train(resume=folder, watcher=listener)
    assert listener.warnings == [
        f"the run in {folder} has no checkpoint, and begins anew",
        "removed what was made of a checkpoint that is gone: class_accuracy.png, confusion_matrix.png, evaluation.json, reliability.png",
    ]
    assert sorted(os.listdir(folder)) == FILES
    assert_same_run(content(folder), content(tiny_run))


@pytest.mark.parametrize("missing", ["recipe.json", "metrics.json", "metrics.csv", "curves.png", "learning_rate.png"])
def test_what_is_missing_of_a_finished_run_is_written_again(tiny_run, tmp_path, no_figures, missing):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    train(resume=tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == FILES


def test_what_a_run_killed_after_its_last_write_leaves_is_removed(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text("")
    (tmp_path / "run" / ".lock-holder").write_text("process 1 on nowhere")
    (tmp_path / "run" / ".curves.png.1.part").write_text("half")
    assert train(resume=tmp_path / "run").finished
    assert sorted(os.listdir(tmp_path / "run")) == FILES


def test_a_picture_of_the_half_of_a_run_in_another_format_goes(tiny_recipe, tmp_path):
    with pytest.raises(Interrupted):
        train(tiny_recipe, tmp_path, watcher=StopAfter(4), format="svg")
    assert (tmp_path / "curves.svg").exists()
    train(resume=tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES


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
    assert (code, err) == (0, f"cifar-resnet: the newest run is {Path('runs/digits-1')}\n")
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


def test_a_run_is_resumed_by_its_checkpoint_file_too(tiny_run, refused, tmp_path):
    assert train(resume=tiny_run / "checkpoint.pt").path == tiny_run / "checkpoint.pt"
    assert "there is no such folder, so no run to go on with" in refused(2, "train", "--resume", tmp_path / "none")
