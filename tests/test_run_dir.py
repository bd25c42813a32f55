"""The run directory: failing disks, the lock, and when a checkpoint is saved."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import CALLS, CODES, Faulty
from filelock import FileLock, Timeout
from run_helpers import FILES, assert_same_run, content

from cifar_resnet import Recipe, load_checkpoint, train
from cifar_resnet.data.loaders import Batch
from cifar_resnet.data.splits import Data, Split
from cifar_resnet.errors import CheckpointError, RunDirectoryError, UsageError, shell_command
from cifar_resnet.files import new_folder
from cifar_resnet.run_dir import RunDir, check_free, check_match, save_due
from cifar_resnet.training.engine import rates_at, start, train_step

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "data"


@pytest.mark.posix
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["every-second-write", "all"])
def test_a_run_whose_disk_fails_once_goes_on_to_the_same_end(unfinished, tiny_run, tmp_path, no_figures, every):
    """Each time a run goes on from `unfinished` and saves at every step, and one call of one of its writes fails.

    The quick one takes another of the seven calls, and another reason, at every second write; the slow one all of them.
    """

    def attempt(failing, code):
        folder = tmp_path / "attempt"
        shutil.copytree(unfinished, folder)
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, failing, code)
            try:
                train(resume=folder, save_every_minutes=1e-9)
                ended = True
            except RunDirectoryError:  # where it cannot go on
                ended = False
        checkpoint = load_checkpoint(folder)  # the previous one, or the last
        assert (checkpoint.content["epoch"], checkpoint.content["step"]) >= (1, 1)
        assert set(os.listdir(folder)) <= set(FILES)
        train(resume=folder)
        result = content(folder)
        shutil.rmtree(folder)
        return faulty.called, result, ended

    calls, whole, _ = attempt(-1, errno.EIO)
    writes = len(calls) // len(CALLS)
    assert calls == CALLS * writes
    assert writes == 15  # lock holder, recipe, metrics as JSON and CSV; three times checkpoint and both metrics; two pictures
    assert_same_run(whole, content(tiny_run))
    points = range(len(calls)) if every else [len(CALLS) * 2 * n + n % len(CALLS) for n in range((writes + 1) // 2)]
    went_on = 0
    for n, failing in enumerate(points):
        for code in CODES if every else [CODES[n % 3]]:
            _, result, ended = attempt(failing, code)
            assert_same_run(result, whole)
            went_on += ended
    assert went_on >= 2  # a save inside an epoch that fails ends no run


# Folders


def test_a_folder_for_a_new_run_is_empty_or_not_there_yet(tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    for name in (".lock", ".lock-holder", ".recipe.json.7.part"):  # which a killed process leaves before its first file
        (tmp_path / name).write_text("")
    check_free(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is not empty; choose another$"):
        check_free(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=f"go on with the run in it: {re.escape(shell_command('train', '--resume', tmp_path))}$"):
        check_free(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"notes.txt is no folder that can be written"):
        check_free(tmp_path / "notes.txt" / "run")


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    first, second = RunDir(tmp_path), RunDir(str(tmp_path))
    with first.lock() as taken_over:
        assert taken_over == ""
        with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()} on "), second.lock():
            pass
        with pytest.raises(Timeout):  # so that a process of any other kind is kept out too
            FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert os.listdir(tmp_path) == []
    with second.lock() as taken_over:
        assert taken_over == ""
    assert os.listdir(tmp_path) == []


def test_the_lock_is_given_back_where_the_body_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDir(tmp_path).lock():
        raise ZeroDivisionError
    with RunDir(tmp_path).lock() as taken_over:
        assert taken_over == ""


def test_another_process_keeps_the_folder_until_it_is_killed(tmp_path):
    """It holds the lock as `RunDir` does, but without torch, whose import would take seconds."""
    code = f"""
import sys, time
from filelock import FileLock
with FileLock({str(tmp_path / ".lock")!r}):
    open({str(tmp_path / ".lock-holder")!r}, "w").write("process 7 on the moon")
    print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunDirectoryError, match=f"{re.escape(str(tmp_path))} is in use by process 7 on the moon"), RunDir(tmp_path).lock():
            pass
        (tmp_path / ".lock-holder").unlink()  # as if it had not come so far
        with pytest.raises(RunDirectoryError, match="in use by another process"), RunDir(tmp_path).lock():
            pass
        (tmp_path / ".lock-holder").write_text("process 7 on the moon")
    finally:
        process.kill()
        process.communicate()
    assert sorted(os.listdir(tmp_path)) == [".lock", ".lock-holder"]
    with RunDir(tmp_path).lock() as taken_over:
        assert taken_over == "took over the lock of process 7 on the moon, which is gone"
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_locked_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="file cannot be locked: "), RunDir(tmp_path / "file").lock():
        pass


def test_what_was_made_of_a_checkpoint_and_cannot_be_removed_is_named(tmp_path, monkeypatch):
    def unlink(path, missing_ok=False):
        raise PermissionError(13, "Access is denied")

    (tmp_path / "evaluation.json").touch()
    (tmp_path / ".metrics.json.1.part").touch()
    monkeypatch.setattr(Path, "unlink", unlink)
    RunDir(tmp_path).remove_parts()
    with pytest.raises(RunDirectoryError, match=re.escape(str(tmp_path / "evaluation.json")) + ".*cannot be removed: Access is denied"):
        RunDir(tmp_path).remove_made()


# Create, open, resume


@pytest.fixture
def recipe():
    return Recipe.build("digits", width=4, precision="float32")


def test_a_run_may_begin_where_a_file_browser_was(tmp_path):
    (tmp_path / ".DS_Store").touch()
    check_free(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunDirectoryError, match="not empty"):
        check_free(tmp_path)


def test_create_makes_the_folder_and_holds_it(tmp_path, recipe):
    folder = RunDir(tmp_path / "a" / "run")
    with folder.create(recipe) as taken_over:
        assert taken_over == ""
        assert Recipe.load(json.loads((folder.path / "recipe.json").read_text("utf-8"))) == recipe
        with pytest.raises(RunDirectoryError, match="in use by"), RunDir(folder.path).resume():
            pass
    assert os.listdir(folder.path) == ["recipe.json"]
    with pytest.raises(RunDirectoryError, match="not empty"), folder.create(recipe):
        pass
    assert os.listdir(folder.path) == ["recipe.json"]


def test_create_looks_again_once_it_holds_the_lock(tmp_path, recipe, monkeypatch):
    """Another process may have begun a run in the folder, and ended, between the first look and the lock."""
    folder, lock = RunDir(tmp_path), RunDir.lock

    def late(self):
        (tmp_path / "metrics.json").write_text("{}")
        return lock(self)

    monkeypatch.setattr(RunDir, "lock", late)
    with pytest.raises(RunDirectoryError, match="not empty"), folder.create(recipe):
        pass
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_create_removes_what_a_killed_writer_left(tmp_path, recipe):
    (tmp_path / ".recipe.json.1.part").write_text("ha")
    (tmp_path / ".lock-holder").write_text("process 1 on nowhere")
    with RunDir(tmp_path).create(recipe) as taken_over:
        assert taken_over == "took over the lock of process 1 on nowhere, which is gone"
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_a_folder_that_is_being_filled_beside_a_run_does_not_hinder_the_run(tmp_path, recipe):
    (tmp_path / ".left by another program.part").mkdir()
    with new_folder(tmp_path / "space") as part:
        (part / "app.py").write_text("half")
        RunDir(tmp_path).begin(recipe)
        assert (part / "app.py").read_text("utf-8") == "half"
    assert (tmp_path / "space" / "app.py").exists()


def test_open_goes_by_the_checkpoint_and_before_there_is_one_by_the_recipe(tmp_path, recipe, tiny_run):
    with pytest.raises(UsageError, match=f"{re.escape(str(tmp_path))}: holds neither checkpoint.pt nor recipe.json"):
        RunDir(tmp_path).open()
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert RunDir(tmp_path).open() == (recipe, None)
    shutil.copy(tiny_run / "checkpoint.pt", tmp_path)
    found, checkpoint = RunDir(tmp_path).open()
    assert found == checkpoint.recipe == load_checkpoint(tiny_run).recipe != recipe
    (tmp_path / "checkpoint.pt").write_text("rubbish")
    with pytest.raises(CheckpointError):  # never quietly from the start
        RunDir(tmp_path).open()


def test_resume_gives_what_open_gives_and_holds_the_folder(tmp_path, recipe):
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    (tmp_path / ".lock-holder").write_text("process 1 on nowhere")
    with RunDir(tmp_path).resume({"epochs": 8}) as (found, checkpoint, taken_over):
        assert (found, checkpoint) == (recipe, None)
        assert "process 1 on nowhere" in taken_over
        with pytest.raises(RunDirectoryError, match="in use by"), RunDir(tmp_path).lock():
            pass
    with pytest.raises(UsageError, match="--epochs 9 contradicts"), RunDir(tmp_path).resume({"epochs": 9}):
        pass
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_what_contradicts_the_run_is_named_as_its_option(tmp_path, recipe):
    planned = recipe.replace(mean=(0.1, 0.2, 0.3), precision="bfloat16")
    (tmp_path / "recipe.json").write_text(planned.to_json())
    same = dict(
        mean=[0.1, 0.2, 0.3], std=planned.std, max_lr=0.1, recipe="digits", precision="auto", nesterov=True, dataset="digits"
    )
    assert RunDir(tmp_path).open(same)[0] == planned
    for name, value, message in (
        ("mean", (0.1, 0.2, 0.4), "--mean 0.1 0.2 0.4 contradicts the run in .* has 0.1 0.2 0.3; leave it out"),
        ("nesterov", False, "--no-nesterov contradicts the run in .* has --nesterov; leave it out"),
        ("train_limit", 20, "--train-limit 20 contradicts the run in .* has none; leave it out"),
        ("precision", "float32", "--precision float32 contradicts .* has bfloat16; leave it out"),
        ("epochs", 9, r"--epochs 9 contradicts the run in .* has 8 \(the schedule would change\)"),
        ("max_lr", 0.2, "--max-lr 0.2 contradicts"),
        ("recipe", "page", "--recipe page contradicts"),
        ("dataset", "cifar10", "--dataset cifar10 contradicts"),
        ("dataset", None, "--dataset None contradicts"),
        ("dataset", 5, "--dataset 5 contradicts"),
        ("dataset", [5], r"--dataset \[5\] contradicts"),
    ):
        with pytest.raises(UsageError, match=message):
            RunDir(tmp_path).open({name: value})


@pytest.mark.posix
def test_the_same_folder_of_images_in_any_spelling_is_no_contradiction(tmp_path, monkeypatch, recipe):
    own, run = tmp_path / "images" / "own", tmp_path / "run"
    own.mkdir(parents=True)
    (tmp_path / "images" / "other").mkdir()
    (tmp_path / "link").symlink_to(own)
    run.mkdir()
    monkeypatch.chdir(tmp_path / "images")
    (run / "recipe.json").write_text(Recipe.build("page", dataset="own", width=4).to_json())
    for spelling in (
        "own",
        "own/",
        "./own",
        "../images/own",
        "other/../own",
        str(own),
        f"{own}/",
        str(tmp_path / "link"),
        "../link/",
    ):
        assert RunDir(run).open({"dataset": spelling})[0].dataset == str(own), spelling
    for another in ("other", "own/own", "../own", str(tmp_path), "cifar10", "digits"):
        with pytest.raises(UsageError, match=f"--dataset {re.escape(another)} contradicts the run in {re.escape(str(run))}, which has {re.escape(str(own))}"):
            RunDir(run).open({"dataset": another})


# Save, finish


@pytest.fixture
def stepped(tiny_recipe):
    """A state after two steps on noise, in the first epoch of two, and data that fit it."""
    recipe = tiny_recipe.replace(precision="float32", mean=(0.5,) * 3, std=(0.5,) * 3, ema_every=1, sam_share=0.0)
    state, rng = start(recipe, CPU), np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(size=(8, 3, 32, 32)).astype(np.float32)).to(memory_format=torch.channels_last)
    for step in range(2):
        train_step(state, Batch(images, torch.arange(8)), rates_at(recipe, step, 6))
    state.step, state.clock.seconds = 2, 1.5
    split = Split(rng.integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20) % 10, np.arange(20))
    return state, Data(split, split, tuple("0123456789"), "holdout")


def test_what_is_saved_is_what_a_run_goes_on_from(tmp_path, stepped):
    state, data = stepped
    assert RunDir(tmp_path).save(state, data, {"torch": "9"}) == ""
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "metrics.json"]
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.classes, checkpoint.evaluated_on, checkpoint.environment) == (data.classes, "holdout", {"torch": "9"})
    assert not checkpoint.finished
    again = checkpoint.state(CPU)
    for mine, found in ((state.model, again.model), (state.averaged, again.averaged)):
        assert all(map(torch.equal, mine.state_dict().values(), found.state_dict().values()))
    assert not torch.equal(again.model.fc.weight, again.averaged.fc.weight)
    slots = [each.optimizer.state_dict()["state"] for each in (state, again)]
    assert slots[0].keys() == slots[1].keys() != set()
    assert all(torch.equal(slots[0][i]["momentum_buffer"], slots[1][i]["momentum_buffer"]) for i in slots[0])
    assert torch.equal(state.totals, again.totals)
    assert (again.epoch, again.step, again.clock.seconds, again.history) == (0, 2, 1.5, [])
    assert torch.equal(checkpoint.model().fc.weight, state.averaged.fc.weight)
    assert not checkpoint.model().training
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics == {"schema": 1, "environment": {"torch": "9"}, "evaluated_on": "holdout", "epochs": [], "final": None}


def test_a_save_without_a_checkpoint_and_one_that_fails(tmp_path, stepped, monkeypatch):
    state, data = stepped
    folder = RunDir(tmp_path)
    assert folder.save(state, data, {}, checkpoint=False) == ""
    assert sorted(os.listdir(tmp_path)) == ["metrics.json"]
    Faulty(monkeypatch, 0, errno.ENOSPC)
    assert folder.save(state, data, {}) == f"{tmp_path / 'checkpoint.pt'} could not be written: No space left on device"
    assert sorted(os.listdir(tmp_path)) == ["metrics.json"]


def test_metrics_have_a_final_row_after_the_last_epoch_alone(tmp_path, stepped):
    state, data = stepped
    row = dict(epoch=1, lr=0.1, train_loss=2.0, train_accuracy=10.0, test_loss=2.5, test_accuracy=20.0, images_per_second=7.0)
    state.history = [{**row, "seconds": 3.0}]
    RunDir(tmp_path).write_metrics(state, data, {})
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8"))["final"] is None
    state.history.append({**row, "epoch": 2, "seconds": 4.0})
    RunDir(tmp_path).write_metrics(state, data, {})
    written = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert written["epochs"] == state.history
    assert written["final"] == {**row, "epoch": 2, "seconds": 7.0}


def test_what_a_run_must_have_may_be_arrays(tmp_path):
    recipe = Recipe.build("eva6-s9")
    check_match(recipe, {"mean": np.array(recipe.mean), "epochs": np.int64(24)}, tmp_path)
    with pytest.raises(UsageError, match=re.escape("--mean [0.1, 0.2, 0.3] contradicts the run")):
        check_match(recipe, {"mean": np.array([0.1, 0.2, 0.3])}, tmp_path)


@pytest.mark.parametrize(
    ("seconds", "epoch_done", "run_done", "due"),
    [
        (0, True, True, True),  # the end of the run, however soon
        (19.9, True, False, False),
        (20, True, False, True),
        (20, False, False, False),
        (299.9, False, False, False),
        (300, False, False, True),
    ],
)
def test_when_a_checkpoint_is_due(seconds, epoch_done, run_done, due):
    """Every five minutes inside an epoch."""
    assert save_due(seconds, 5, epoch_done, run_done) == due


# Checkpoints, and whom they trust
