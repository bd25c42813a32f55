"""Where runs lie, and which one is meant."""

import itertools
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cifar_resnet import Recipe, load_checkpoint
from cifar_resnet.errors import CheckpointError, RunDirectoryError, UsageError, shell_command
from cifar_resnet.files import writable
from cifar_resnet.runs import default_directory, find_run, find_runs, folder_for

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "data"


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
        ("runs/digits-2", f"go on with it: {shell_command('train', '--resume', Path('runs/digits-2'))}"),
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
