"""The run directory: failing disks, the lock, checkpoints and whom they trust, and when one is saved."""

import errno
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import CALLS, CODES, Faulty
from filelock import FileLock, Timeout
from run_helpers import FILES, assert_same_run, content

from cifar_resnet import Recipe, load_checkpoint, run_dir, train
from cifar_resnet.data.loaders import Batch
from cifar_resnet.data.splits import Data, Split
from cifar_resnet.errors import CheckpointError, RunDirectoryError, UsageError, shell_command
from cifar_resnet.files import new_folder, writable
from cifar_resnet.run_dir import RunDir, SavePolicy, check_free, default_directory, find_run, find_runs, folder_for
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


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (dict(recipe="page", dataset="/some/where/birds"), "page"),
        (dict(dataset="cifar10"), "default"),
        (dict(dataset="digits"), "digits"),
        (dict(recipe="default", dataset="digits"), "digits"),
        (dict(dataset="/some/where/birds"), "birds"),
        (dict(dataset="/some/$HOME is: mine? *"), "HOME-is-mine"),
        pytest.param(
            dict(dataset="/some/鳥"),
            "鳥",
            marks=pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="there are no such names here"),
        ),
        (dict(dataset="/some/-rf"), "rf"),
        (dict(dataset="/" + 200 * "x"), 60 * "x"),
    ],
)
def test_the_default_folder_is_named_after_the_recipe_or_its_images_and_numbered(tmp_path, monkeypatch, fields, name):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.build(**fields)
    found = [default_directory(recipe), default_directory(recipe, "find-lr-"), default_directory(recipe)]
    assert [each.as_posix() for each in found] == [f"runs/{name}-1", f"runs/find-lr-{name}-1", f"runs/{name}-2"]
    assert all(each.is_dir() for each in found)
    found[0].rmdir()
    (tmp_path / "runs" / f"{name}-10").write_text("a file takes a number too")
    assert default_directory(recipe).as_posix() == f"runs/{name}-11"


def test_processes_that_ask_at_the_same_time_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: default_directory(Recipe()), range(64)))
    assert sorted(int(str(each).rpartition("-")[2]) for each in found) == list(range(1, 65))


def test_a_default_folder_that_nothing_was_written_into_goes_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError), folder_for(None, Recipe(), "find-lr-"):
        raise UsageError
    assert os.listdir(tmp_path) == []
    for path in (None, Path("mine")):
        with folder_for(path, Recipe(), "find-lr-") as folder:
            (folder if path is None else writable(folder)).joinpath("lr_finder.json").write_text("{}")
        assert os.listdir(folder) == ["lr_finder.json"]
    assert sorted(os.listdir(tmp_path)) == ["mine", "runs"]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs that were written one after the other, the newest one last; gives what makes another one."""
    monkeypatch.chdir(tmp_path)
    seconds = itertools.count(1_000_000_000)

    def made(*files):
        for file in map(Path, files):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
            os.utime(file, (now := next(seconds), now))

    made("runs/digits-1/recipe.json", "runs/digits-2/recipe.json", "runs/digits-1/checkpoint.pt", "runs/find-lr-digits-1/lr_finder.json")
    return made


def test_the_newest_run_is_the_one_written_last(runs):
    assert find_run() == find_run("latest") == Path("runs/digits-1")  # the second one has not come to a checkpoint
    assert find_run("runs/digits-2") == Path("runs/digits-2")
    assert find_run("nowhere") == Path("nowhere")  # which whoever reads it refuses
    runs("runs/many/repeat.json", *(f"runs/many/s{seed}/recipe.json" for seed in (9, 10)))
    assert find_run() == Path("runs/many/s10")
    assert find_run(repetition=True) == Path("runs/many")
    assert find_run("runs/many/s9", repetition=True) == Path("runs/many/s9")
    assert find_runs(["runs/many", "runs/digits-2"]) == [Path("runs/many/s9"), Path("runs/many/s10"), Path("runs/digits-2")]
    assert find_runs() == find_runs([]) == find_runs(["latest"]) == [Path("runs/many/s10")]
    runs("runs/digits-2/checkpoint.pt")
    assert find_run(repetition=True) == Path("runs/digits-2")
    Path("latest").mkdir()
    assert find_run("latest") == Path("latest")


def test_a_folder_without_a_checkpoint_says_what_it_holds_instead(runs):
    runs("runs/many/repeat.json", "runs/many/s0/recipe.json")
    for folder, words in (
        ("runs/digits-2", f"go on with: {shell_command('train', '--resume', Path('runs/digits-2'))}"),
        ("runs/many", f"a repetition of several runs; give one of them, {Path('runs/many/s0')} for example"),
        ("runs/find-lr-digits-1", "a search for the learning rate, no run"),
    ):
        with pytest.raises(CheckpointError, match=f"^there is no checkpoint {re.escape(str(Path(folder, 'checkpoint.pt')))}: .*{re.escape(words)}$"):
            load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"^there is no checkpoint {re.escape(str(Path('runs/checkpoint.pt')))}$"):
        load_checkpoint("runs")


def test_without_a_run_there_is_no_newest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (None, "latest"):
        with pytest.raises(UsageError, match=f"there is no run in {re.escape(str(tmp_path / 'runs'))}; give the folder of one, or make one"):
            find_run(given)


# The lock


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
def never_first(tmp_path, monkeypatch):
    """Gives what makes runs/default-1 a folder that cannot be made."""
    make = Path.mkdir
    monkeypatch.chdir(tmp_path)

    def refuse(error):
        def mkdir(path, *given, **options):
            if path.name == "default-1":
                raise error
            make(path, *given, **options)

        monkeypatch.setattr(Path, "mkdir", mkdir)

    return refuse


def test_a_folder_whose_name_the_file_system_takes_for_another_gets_the_next_number(never_first):
    """Of runs/Images-1 and runs/images-1 Windows and macOS see one."""
    never_first(FileExistsError)
    assert default_directory(Recipe()) == Path("runs", "default-2")


def test_a_folder_that_can_never_be_made_is_said(never_first):
    """As Windows has it of a path that is too long."""
    never_first(FileNotFoundError)
    with pytest.raises(RunDirectoryError, match="default-1, -2 ... can be made"):
        default_directory(Recipe())


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
        ("mean", (0.1, 0.2, 0.4), r"--mean \(0.1, 0.2, 0.4\) contradicts"),
        ("precision", "float32", "--precision float32 contradicts .* has bfloat16; leave it out"),
        ("epochs", 9, r"--epochs 9 contradicts the run in .* has 8 \(the schedule would change\)"),
        ("max_lr", 0.2, "--max-lr 0.2 contradicts"),
        ("recipe", "page", "--recipe page contradicts"),
        ("dataset", "cifar10", "--dataset cifar10 contradicts"),
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


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand: `clock.now` in seconds."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    hand_moved = Clock()
    monkeypatch.setattr(run_dir, "time", hand_moved)
    return hand_moved


def test_when_a_checkpoint_is_due(clock):
    policy = SavePolicy(every_minutes=5)
    assert not policy.due(epoch_done=False, run_done=False)
    assert policy.due(epoch_done=True, run_done=True)  # the end of the run, however soon
    clock.now += 19.9
    assert not policy.due(epoch_done=True, run_done=False)
    clock.now += 0.2
    assert policy.due(epoch_done=True, run_done=False)  # 20 s after the start
    assert not policy.due(epoch_done=False, run_done=False)
    clock.now += 279.8
    assert not policy.due(epoch_done=False, run_done=False)
    clock.now += 0.2
    assert policy.due(epoch_done=False, run_done=False)  # 5 minutes after the start
    policy.saved()
    assert not policy.due(epoch_done=True, run_done=False)
    clock.now += 20
    assert policy.due(epoch_done=True, run_done=False)
    assert not policy.due(epoch_done=False, run_done=False)


# Checkpoints, and whom they trust


def test_a_checkpoint_of_schema_1_goes_on_loading():
    checkpoint = load_checkpoint(FIXTURES / "schema1.pt")
    assert checkpoint.temperature == 1
    assert checkpoint.finished
    assert (checkpoint.recipe.epochs, checkpoint.recipe.width) == (1, 64)
    assert (checkpoint.recipe.sam_share, checkpoint.recipe.flip_order) == (0, "random")
    assert checkpoint.model().fc.weight[0, 0].item() == pytest.approx(0.01)
    assert checkpoint.history[-1]["test_accuracy"] == 50


def test_a_run_directory_of_the_version_before_goes_on_loading():
    recipe, checkpoint = RunDir(FIXTURES / "run-0.1").open({"dataset": "digits", "epochs": 2})
    written = json.loads((FIXTURES / "run-0.1" / "recipe.json").read_text("utf-8"))
    assert "schema" not in written
    assert {name: value for name, value in recipe.to_dict().items() if name in written} == written
    assert (recipe.width, checkpoint.content["epoch"], checkpoint.content["step"]) == (64, 1, 1)
    assert checkpoint.history == json.loads((FIXTURES / "run-0.1" / "metrics.json").read_text("utf-8"))["epochs"]


def test_the_optimizers_tensors_are_its_own_and_laid_out_as_the_weights():
    """Fused kernels take that for granted. Those of this file have one element for all places: they would write beside it."""
    checkpoint = load_checkpoint(FIXTURES / "run-0.1")
    read = [slots["momentum_buffer"] for slots in checkpoint.content["optimizer"]["state"].values()]
    assert {each.untyped_storage().nbytes() for each in read} == {4}
    state = checkpoint.state(CPU)
    assert len(state.optimizer.state) == len(read)
    for parameter, slots in state.optimizer.state.items():
        buffer = slots["momentum_buffer"]
        assert (buffer.shape, buffer.stride()) == (parameter.shape, parameter.stride())
        assert buffer.untyped_storage().nbytes() == 4 * parameter.numel()
    slots = state.optimizer.state_dict()["state"].values()
    assert all(torch.equal(mine["momentum_buffer"], theirs) for mine, theirs in zip(slots, read, strict=True))


def test_the_settings_of_the_optimizer_are_the_recipes_whatever_the_file_says(tiny_run, tmp_path):
    good = content(tiny_run)
    groups = [{**group, "weight_decay": 0.9, "fused": "?", "nesterov": False} for group in good["optimizer"]["param_groups"]]
    torch.save({**good, "optimizer": {**good["optimizer"], "param_groups": groups}}, tmp_path / "changed.pt")
    found, expected = (load_checkpoint(path).state(CPU).optimizer.param_groups for path in (tmp_path / "changed.pt", tiny_run))
    for mine, theirs in zip(found, expected, strict=True):
        assert {key: value for key, value in mine.items() if key != "params"} == {
            key: value for key, value in theirs.items() if key != "params"
        }


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_checkpoints_that_cannot_be_trusted_are_refused_in_one_line(tiny_run, tmp_path, refused):
    source, bad, was_here = tiny_run / "checkpoint.pt", tmp_path / "bad.pt", tmp_path.parent / "was-here"
    good = content(tiny_run)

    def refused_with(word):
        line = refused(1, "evaluate", bad)
        assert str(bad) in line
        assert word in line
        assert os.listdir(tmp_path) == (["bad.pt"] if bad.exists() else [])

    def changed(**changes):
        torch.save({**good, **changes}, bad)

    refused_with("no checkpoint")
    for text in (b"", b"not a zip", b"PK\x03\x04"):
        bad.write_bytes(text)
        refused_with("not a checkpoint")
    bad.write_bytes(source.read_bytes()[:-1000])
    refused_with("cut short")
    bad.write_bytes(pickle.dumps(Hostile(was_here)))
    refused_with("not a checkpoint")
    changed(extra=Hostile(was_here))
    refused_with("must not")
    assert not was_here.exists()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in archive.infolist():
            target.writestr(entry.filename, archive.read(entry))
    refused_with("compressed")
    torch.save([1, 2], bad)
    refused_with("not a checkpoint of cifar-resnet")

    def with_slots(index, slots):
        return dict(optimizer={**good["optimizer"], "state": {**good["optimizer"]["state"], index: slots}})

    buffer = good["optimizer"]["state"][0]["momentum_buffer"]
    for changes, word in (
        (dict(kind="something else"), "not a checkpoint of cifar-resnet"),
        (dict(schema=99), "schema 99"),
        (dict(recipe={**good["recipe"], "epochs": -1}), "--epochs -1"),
        (dict(recipe={**good["recipe"], "schema": 4}), "a recipe of schema 4; this version of cifar-resnet reads 1 to 3"),
        (dict(classes=["a", "b"]), "2 classes"),
        (dict(classes=list(range(10))), "class names"),
        (with_slots(0, {"momentum_buffer": torch.tensor(0.0)}), "optimizer state of another model"),
        (with_slots(0, {"momentum_buffer": buffer.long()}), "optimizer state of another model"),
        (with_slots(0, {"exp_avg": buffer}), "optimizer state of another model"),
        (with_slots(0, {"momentum_buffer": {}}), "no attribute 'shape'"),
        (with_slots(99, {"momentum_buffer": buffer}), "not in range"),
        (dict(history=[{}]), "metrics"),
        (dict(history=[{**row, "seconds": torch.tensor(1.0)} for row in good["history"]]), "not JSON serializable"),
        (dict(environment=None), "does not say where it was trained"),
        (dict(environment={"tf32": torch.ones(2)}), "not JSON serializable"),
        (dict(evaluated_on="images"), "on what it was evaluated"),
        (dict(epoch=2.0), "place"),
        (dict(step=None), "place"),
        (dict(seconds="long"), "not supported between"),
        (dict(epoch=7), "place"),
        (dict(averaged=None), "averaged"),
        (dict(temperature=-1.0), "the temperature -1.0"),
        (dict(temperature=float("nan")), "the temperature nan"),
        (dict(temperature="warm"), "the temperature 'warm'"),
        (dict(whites={"uint16": 0}), "the values of white {'uint16': 0}"),
        (dict(whites=[255]), "the values of white [255]"),
        *((dict(data={"evaluation": each}), "which images it was trained on") for each in (
            {"images": "8", "sha256": "a"}, {"images": 8, "sha256": 9}, {"images": 8}, ["images", "sha256"], None,
        )),
    ):
        changed(**changes)
        refused_with(word)
    weights = {name: tensor.clone() for name, tensor in good["averaged"].items()}
    weights["fc.weight"][0, 0] = float("nan")
    changed(averaged=weights)
    refused_with("not finite")
    del weights["fc.weight"]
    changed(averaged=weights)
    refused_with("state_dict")


def test_a_checkpoint_that_claims_a_wide_network_is_refused_before_it_is_built(tiny_run, tmp_path, monkeypatch):
    """At width 1024 the network alone takes 7 GB."""
    good, built = content(tiny_run), []
    monkeypatch.setattr(run_dir, "build_model", lambda recipe, classes: built.append(recipe.width))
    torch.save({**good, "recipe": {**good["recipe"], "width": 1024}}, tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match="has a model of width 4, its recipe 1024"):
        load_checkpoint(tmp_path / "wide.pt")
    assert built == []


def test_one_flipped_bit_in_any_entry_is_found(tiny_run, tmp_path):
    """200 places, each inside an entry's data; the archive's padding and file names are not data."""
    whole, rng = (tiny_run / "checkpoint.pt").read_bytes(), random.Random(0)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        spans = []
        for entry in archive.infolist():
            name, extra = (
                int.from_bytes(whole[entry.header_offset + k : entry.header_offset + k + 2], "little") for k in (26, 28)
            )
            spans.append((entry.header_offset + 30 + name + extra, entry.file_size))
    for _ in range(200):
        first, size = rng.choice([span for span in spans if span[1]])
        flipped = bytearray(whole)
        flipped[first + rng.randrange(size)] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.pt").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="checksum"):
            load_checkpoint(tmp_path / "bad.pt")
