"""The jobs, whole: what a command of the command line does, and a notebook calls."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import data as datasets
from . import engine
from .batches import make_batches
from .device import environment, resolve_device, resolve_precision
from .engine import Epoch, State, Step
from .errors import CifarResnetError, RunDirectoryError, UsageError
from .recipe import Recipe
from .run import (
    CHECKPOINT,
    Checkpoint,
    create_directory,
    default_directory,
    load_checkpoint,
    locked,
    read_recipe,
    remove_parts,
    save_checkpoint,
    write_metrics,
    write_whole,
)


class Watcher:
    """What `train` tells of its course; each method may be overridden. This one is silent."""

    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: datasets.Data, state: State) -> None: ...
    def step(self, step: Step, state: State) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def warn(self, message: str) -> None: ...


class Interrupted(CifarResnetError):
    """Stopped by a signal, with a checkpoint written."""

    def __init__(self, number: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with: cifar-resnet train --resume {run_dir}")
        self.exit_code = 128 + number


def prepare(recipe: Recipe, device: str = "auto") -> tuple[Recipe, Any]:
    """The recipe with what depends on dataset and device resolved, and the device."""
    place = resolve_device(device)
    return resolve_precision(datasets.with_statistics(recipe), place), place


def train(
    recipe: Recipe | None = None,
    run_dir: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    loader: str = "auto",
    workers: int | None = None,
    save_every_minutes: float = 5.0,
    watcher: Watcher | None = None,
) -> Checkpoint:
    """Trains a recipe to its end, or a run on from its checkpoint, and keeps it in a run directory.

    Args:
        recipe: what to train; `Recipe()` if not given. Left out where `resume` is given.
        run_dir: an empty or new folder; `runs/<recipe>-<dataset>-s<seed>-<UTC time>` if not given.
        resume: the folder of a run to go on with.
        save_every_minutes: how long inside an epoch until a checkpoint is saved.

    Returns:
        The final checkpoint, whose history holds the metrics of every epoch.

    Raises:
        CifarResnetError: one line that says what was wrong. A run that had begun can be resumed.
    """
    watcher = watcher or Watcher()
    folder, checkpoint = (Path(run_dir) if run_dir else None), None
    if resume is not None:
        folder = Path(resume)
        if not folder.is_dir():
            raise UsageError(f"--resume {folder}: there is no such run directory")
        if (folder / CHECKPOINT).exists():
            checkpoint = load_checkpoint(folder)
            recipe = checkpoint.recipe
        elif (folder / "recipe.json").exists():
            recipe = read_recipe(folder)  # stopped before its first checkpoint
        else:
            raise UsageError(f"--resume {folder}: holds neither {CHECKPOINT} nor recipe.json, so no run")
        if checkpoint and checkpoint.finished:
            return checkpoint
    recipe, place = prepare(recipe or Recipe(), device)
    data = datasets.load(recipe, Path(data_dir) if data_dir else None)
    folder = folder or default_directory(recipe)
    if resume is None:
        create_directory(folder)
    with locked(folder) as taken_over:
        if taken_over:
            watcher.warn(taken_over)
        remove_parts(folder)
        write_whole(folder / "recipe.json", recipe.to_json())
        batches = make_batches(data.train, recipe, place, loader, workers)
        evaluation = make_batches(data.evaluation, recipe, place)
        state = checkpoint.state(place) if checkpoint else engine.start(recipe, place, len(data.classes))
        described = {**environment(place), "loader": type(batches).__name__.removesuffix("Batches").lower()}
        watcher.begin(recipe, folder, described, data, state)

        def save() -> bool:
            state.check_finite(recipe, batches.steps)
            try:
                save_checkpoint(folder / CHECKPOINT, recipe, state, data.classes, data.evaluated_on, described)
                write_metrics(folder, recipe, state.history, data.evaluated_on, described)
            except RunDirectoryError as error:
                watcher.warn(f"{error}; the run goes on unsaved")
                return False
            return True

        saved = time.monotonic()
        with signals() as received:
            for record in engine.train(recipe, state, batches, lambda: evaluation.plain(engine.EVALUATION_BATCH), place):
                since = time.monotonic() - saved
                if isinstance(record, Epoch):
                    due = since >= 20 or state.epoch == recipe.epochs
                    watcher.epoch(record)
                    with suppress(RunDirectoryError):
                        write_metrics(folder, recipe, state.history, data.evaluated_on, described)
                else:
                    due = since >= 60 * save_every_minutes
                    watcher.step(record, state)
                if received and state.epoch < recipe.epochs:
                    if not save():
                        raise RunDirectoryError(f"stopped, and {folder / CHECKPOINT} could not be written")
                    raise Interrupted(received[0], folder)
                if due:
                    whole, saved = save(), time.monotonic()
    if not whole:
        raise RunDirectoryError(f"the run ended, but {folder / CHECKPOINT} could not be written")
    return load_checkpoint(folder)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, so that the step in flight can end; the second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
