"""Runs that are stopped or whose disk fails, on a narrow network: every epoch boundary, every write."""

import errno
import os
import shutil
from contextlib import suppress

import pytest
import torch
from test_run import StopAfter, content, same_run

from cifar_resnet import Recipe, load_checkpoint, run, train
from cifar_resnet.errors import RunDirectoryError

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.fixture
def recipe():
    """Two epochs of three steps, the last short, with averaging and Muon."""
    return Recipe.build(
        dataset="digits", epochs=2, train_limit=40, test_limit=20, batch_size=16, ema_decay=0.9, ema_every=2, optimizer="muon"
    )


@pytest.fixture
def half(recipe, tmp_path):
    """The folder of a run that was stopped after its fourth step."""
    with pytest.raises(Exception, match="stopped by SIGINT"):
        train(recipe, tmp_path / "half", watcher=StopAfter(4))
    return tmp_path / "half"


class Faulty:
    """Stands in for what `write_whole` calls of the system; one call of them all, counted from 0, fails."""

    def __init__(self, monkeypatch, failing=-1, code=errno.EIO):
        self.called, self.failing, self.code = [], failing, code
        for name in ("open", "replace", "fsync"):
            monkeypatch.setattr(run.os, name, self.watched(name, getattr(os, name)))
        monkeypatch.setattr(run, "open", self.open, raising=False)

    def check(self, name):
        self.called.append(name)
        if len(self.called) - 1 == self.failing:
            raise OSError(self.code, os.strerror(self.code))

    def watched(self, name, function):
        def call(path, *arguments):
            if name == "open" and not os.path.isdir(path):
                return function(path, *arguments)
            self.check(f"os.{name}")
            return function(path, *arguments)

        return call

    def open(self, path, mode="r", **options):
        if not str(path).endswith(".part"):
            return open(path, mode, **options)
        self.check("open")
        file, check = open(path, mode, **options), self.check  # noqa: SIM115

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, value):
                file.write(value[: len(value) // 2])
                check("write")
                file.write(value[len(value) // 2 :])

            def flush(self):
                check("flush")
                file.flush()

            def fileno(self):
                return file.fileno()

        return File()


CODES = [errno.ENOSPC, errno.EACCES, errno.EIO]


@pytest.mark.parametrize("codes", [1, pytest.param(3, marks=pytest.mark.slow)], ids=["one-code-each", "three-codes-each"])
def test_every_write_flush_and_rename_of_a_run_fails_once(half, tmp_path, codes):
    """Each of them in a run of its own that goes on from `half` and saves at every step."""

    def attempt(failing, code):
        folder = tmp_path / "attempt"
        shutil.copytree(half, folder)
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, failing, code)
            with suppress(RunDirectoryError):  # where it cannot go on
                train(resume=folder, save_every_minutes=1e-9)
        checkpoint = load_checkpoint(folder)  # the previous one, or the last
        assert (checkpoint.content["epoch"], checkpoint.content["step"]) >= (1, 1)
        assert set(os.listdir(folder)) <= {"checkpoint.pt", "metrics.json", "recipe.json", "curves.png", "learning_rate.png"}
        train(resume=folder)
        result = content(folder)
        shutil.rmtree(folder)
        return faulty.called, result

    calls, whole = attempt(-1, errno.EIO)
    assert set(calls) == {"open", "write", "flush", "os.fsync", "os.replace", "os.open"}
    tried = 0
    for failing in range(len(calls)):
        for code in CODES[:codes] if codes == 3 else [CODES[failing % 3]]:
            assert same_run(attempt(failing, code)[1], whole)
            tried += 1
    print(f"{tried} points tried in {len(calls) // 7} writes")
    assert tried == codes * len(calls)
    assert len(calls) % 7 == 0  # open, write, flush, fsync, rename, open and fsync of the folder
    assert len(calls) // 7 >= 8


LOADERS = [("tensor", None), ("albumentations", 0)]


@pytest.mark.parametrize(("loader", "workers"), [*LOADERS, pytest.param("albumentations", 2, marks=pytest.mark.slow)])
def test_resumed_after_any_step_it_is_the_same_run(tmp_path, loader, workers):
    """Three epochs of six steps: every epoch's end, and ten steps inside, chosen by torch's generator."""
    recipe = Recipe.build(dataset="digits", epochs=3, train_limit=90, test_limit=20, batch_size=16, ema_decay=0.9, ema_every=4)
    options = dict(loader=loader, workers=workers)
    train(recipe, tmp_path / "whole", **options)
    whole = content(tmp_path / "whole")
    inside = [step for step in range(1, 18) if step % 6]
    chosen = torch.randperm(len(inside), generator=torch.Generator().manual_seed(0))[:10].tolist()
    for stop in [6, 12, *(inside[k] for k in chosen)]:
        folder = tmp_path / str(stop)
        with pytest.raises(Exception, match="stopped by SIGINT"):
            train(recipe, folder, watcher=StopAfter(stop), **options)
        part = content(folder)
        assert 6 * part["epoch"] + part["step"] == stop
        train(resume=folder, **options)
        assert same_run(content(folder), whole)
