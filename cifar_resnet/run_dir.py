"""The run directory: its files, its lock, and when its checkpoint is saved."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoint import ROW, SCHEMA, Checkpoint, load_checkpoint, save_checkpoint
from .data.splits import Data
from .errors import RunDirectoryError, UsageError, shell_command
from .files import check_writable, csv_of, left_by_systems, read_json, remove, same_place, writable, write_json, write_whole
from .recipe import DATASETS, Recipe, option_words
from .runs import CHECKPOINT, RECIPE, REPEAT
from .training.engine import State

LOCK, HOLDER, METRICS = ".lock", ".lock-holder", "metrics.json"
PICTURES = (".png", ".svg", ".pdf")
DRAWN = ("class_accuracy", "confusion_matrix", "reliability", "gradcam", "misclassified")
# Files that commands make of a checkpoint, and write beside it. labels.csv is not among them: a user may have corrected it.
MADE_OF_CHECKPOINT = {
    *("evaluation.json", "labels.json", "misclassified.json", "model.onnx", "model.safetensors", "report.html"),
    *(f"{name}{suffix}" for name in DRAWN for suffix in PICTURES),
}


def check_free(path: Path) -> None:
    """Whether a folder can take a new run.

    Raises:
        RunDirectoryError: it is not empty, or cannot be made or written.
    """
    check_writable(path)
    if path.exists() and not all(
        name in (LOCK, HOLDER) or name.endswith(".part") or left_by_systems(name) for name in os.listdir(path)
    ):
        advice = "choose another"
        if (path / RECIPE).exists() or (path / REPEAT).exists():
            advice += f", leave it out for a new one, or go on with the run in it: {shell_command('train', '--resume', path)}"
        raise RunDirectoryError(f"run directory {path} is not empty; {advice}")


def save_due(seconds: float, every_minutes: float, epoch_done: bool, run_done: bool) -> bool:
    """Whether a checkpoint is due so many seconds after the last one: at the end of the run, at that of an epoch after 20 s, and
    inside an epoch after `every_minutes`."""
    return run_done or seconds >= (20 if epoch_done else 60 * every_minutes)


class RunDir:
    """The folder of one run, whose writer holds its lock."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @contextmanager
    def create(self, recipe: Recipe) -> Iterator[str]:
        """Makes the folder for a new run, and holds it locked; gives what `lock` gives.

        Raises:
            RunDirectoryError: it is not empty, cannot be written, or another process holds it.
        """
        check_free(self.path)
        writable(self.path)
        with self.lock() as taken_over:
            check_free(self.path)
            self.begin(recipe)
            yield taken_over

    def open(self, must_match: dict[str, Any] | None = None) -> tuple[Recipe, Checkpoint | None]:
        """The recipe of the run, and its checkpoint, or None where it has none yet.

        Args:
            must_match: values that fields of the recipe must have. Another `dataset` is taken as the new folder of the images where the
                checkpoint has fingerprints, by which the caller checks them; before the first checkpoint, where the old folder is gone.

        Raises:
            UsageError: there is no run in the folder, or its recipe has another value.
            CheckpointError: the checkpoint cannot be trusted.
        """
        if (self.path / CHECKPOINT).exists():
            checkpoint = load_checkpoint(self.path)
            recipe = checkpoint.recipe
        elif (self.path / RECIPE).exists():
            checkpoint, recipe = None, Recipe.load(read_json(self.path / RECIPE, "recipe file"))
        else:
            if (self.path / REPEAT).exists():
                raise UsageError(f"{self.path} is a repetition of several runs; in Python repeat(resume=...) goes on with it")
            holds = f"holds neither {CHECKPOINT} nor recipe.json" if self.path.exists() else "there is no such folder"
            raise UsageError(f"--resume {self.path}: {holds}, so no run to go on with")
        must_match = dict(must_match or {})
        if moved(recipe, must_match) and (checkpoint.fingerprints if checkpoint else not os.path.exists(recipe.dataset)):
            recipe = recipe.replace(dataset=str(must_match.pop("dataset")))
            checkpoint = checkpoint and replace(checkpoint, recipe=recipe)
        check_match(recipe, must_match, self.path)
        return recipe, checkpoint

    @contextmanager
    def resume(self, must_match: dict[str, Any] | None = None) -> Iterator[tuple[Recipe, Checkpoint | None, str]]:
        """Holds the folder locked, and gives what `open` gives, and a line to show where a dead process had held the lock, or ""."""
        check_writable(self.path)
        with self.lock() as taken_over:
            yield *self.open(must_match), taken_over

    @contextmanager
    def lock(self) -> Iterator[str]:
        """Holds the folder against other writers; gives a line to show where a dead process had held it, or "".

        Raises:
            RunDirectoryError: another process holds it, or it cannot be locked.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(f"run directory {self.path} is in use by {self._holder() or 'another process'}") from None
        except OSError as error:
            raise RunDirectoryError(f"run directory {self.path} cannot be locked: {error.strerror}") from None
        try:
            gone = self._holder()
            write_whole(self.path / HOLDER, f"process {os.getpid()} on {socket.gethostname()}")
            yield f"took over the lock of {gone}, which is gone" if gone else ""
        finally:
            for name in (HOLDER, LOCK):
                with suppress(OSError):
                    (self.path / name).unlink()
            lock.release()

    def _holder(self) -> str:
        """What `.lock-holder` says: which process holds the lock, or died with it; "" if there is no such file."""
        with suppress(OSError):
            return (self.path / HOLDER).read_text(encoding="utf-8", errors="replace")
        return ""

    def begin(self, recipe: Recipe) -> None:
        """Writes `recipe.json`, and removes what a killed writer left; with the lock held."""
        self.remove_parts()
        write_whole(self.path / RECIPE, recipe.to_json())

    def remove_parts(self) -> None:
        """Removes what a killed writer left under temporary names; with the lock held."""
        for part in self.path.glob(".*.part"):
            if not part.is_dir():  # which no writer of the run made
                with suppress(OSError):  # of Windows, while a virus scanner reads the file
                    part.unlink()

    def remove_made(self) -> list[str]:
        """Removes what commands made of the checkpoint, which is about to change, and gives the names of the files.

        Raises:
            RunDirectoryError: one cannot be removed.
        """
        made = sorted(name for name in MADE_OF_CHECKPOINT if (self.path / name).is_file())
        for name in made:
            remove(self.path / name)
        return made

    def save(
        self, state: State, data: Data, environment: dict[str, Any], checkpoint: bool = True, temperature: float | None = None
    ) -> str:
        """Writes `checkpoint.pt`, if asked, and `metrics.json`; gives what kept them from being written, or ""."""
        try:
            if checkpoint:
                writable(self.path)  # somebody may have moved the folder
                save_checkpoint(self.path / CHECKPOINT, state, data, environment, temperature)
            self.write_metrics(state, data, environment)
        except RunDirectoryError as error:
            return str(error)
        return ""

    def write_metrics(self, state: State, data: Data, environment: dict[str, Any]) -> None:
        """`metrics.json`, at the start and after every epoch; `final` is null until the last one."""
        history, final = state.history, None
        if len(history) == state.recipe.epochs:
            final = {**history[-1], "seconds": sum(epoch["seconds"] for epoch in history)}
        content = {"evaluated_on": data.evaluated_on, "epochs": history, "final": final}
        write_json(self.path / METRICS, {"schema": SCHEMA, "environment": environment, **content})

    def environment(self) -> dict[str, Any]:
        """What `metrics.json` keeps as `environment`; nothing where it cannot be read."""
        with suppress(UsageError):
            kept = read_json(self.path / METRICS, "metrics").get("environment")
            return kept if isinstance(kept, dict) else {}
        return {}

    def write_table(self, history: Sequence[dict[str, Any]]) -> None:
        """The epochs of `metrics.json` as `metrics.csv`."""
        write_whole(self.path / "metrics.csv", csv_of(history, ROW))

    def is_whole(self) -> bool:
        """Whether every file of a run that has ended is there; the picture of the learning rate is written last."""
        files = (RECIPE, METRICS, "metrics.csv")
        return all((self.path / name).exists() for name in files) and all(
            any((self.path / f"{name}{suffix}").exists() for suffix in PICTURES) for name in ("curves", "learning_rate")
        )


def moved(recipe: Recipe, must_match: Mapping[str, Any]) -> bool:
    """Whether `must_match` has another folder for the images of a recipe on a folder."""
    now = must_match.get("dataset", recipe.dataset)
    of_folders = isinstance(now, str | Path) and not {recipe.dataset, now} & set(DATASETS)
    return of_folders and not same_place(now, recipe.dataset)


def check_match(recipe: Recipe, must_match: dict[str, Any], folder: Path) -> None:
    """Whether the recipe of a run has these values; a path is the same in every spelling.

    Raises:
        UsageError: names the first field that has another one.
    """
    for name, value in must_match.items():
        if name not in Recipe.model_fields:
            raise UsageError(f"{name} is no field of a recipe")
        planned = getattr(recipe, name)
        value = value.tolist() if hasattr(value, "tolist") else value  # an array of NumPy's
        same = (tuple(value) if isinstance(value, list) else value) == planned or (name, value) == ("precision", "auto")
        if name == "dataset":
            same = isinstance(value, str | Path) and same_place(value, planned)
        if not same:
            reason = " (the schedule would change)" if name == "epochs" else ""
            given, (flag, *words) = " ".join(option_words(name, value)), option_words(name, planned)
            has = "none" if planned is None else " ".join(words or [flag])
            raise UsageError(f"{given} contradicts the run in {folder}, which has {has}{reason}; leave it out")
