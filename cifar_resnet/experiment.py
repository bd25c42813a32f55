"""The jobs that train, whole: what a command of the command line does, and a notebook calls."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from . import data as datasets
from . import distributed, engine, figures
from .batches import epoch_order, make_batches
from .device import compiled, environment, resolve_device, resolve_precision
from .engine import Epoch, State, Step
from .errors import CifarResnetError, RunDirectoryError, UsageError
from .recipe import ADDED, Recipe, read_json
from .run import (
    CHECKPOINT,
    SCHEMA,
    Checkpoint,
    check_free,
    default_directory,
    load_checkpoint,
    locked,
    read_recipe,
    remove_parts,
    save_checkpoint,
    writable,
    write_json,
    write_metrics,
    write_whole,
)

REPEAT = "repeat.json"


class Watcher:
    """What `train` tells of its course, on rank 0; each method may be overridden. This one is silent."""

    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: datasets.Data, state: State) -> None: ...
    def step(self, step: Step, state: State) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def warn(self, message: str) -> None: ...


class Interrupted(CifarResnetError):
    """Stopped by a signal, with a checkpoint written."""

    def __init__(self, number: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with: cifar-resnet train --resume {run_dir}")
        self.number = number
        self.exit_code = 128 + number


def prepare(
    recipe: Recipe | None, device: str, data_dir: Path | str | None, notify: Callable[[str], None]
) -> tuple[Recipe, torch.device, datasets.Data]:
    """The recipe with what depends on device and images resolved, the device, and the images."""
    place = resolve_device(device)
    recipe = resolve_precision(recipe or Recipe(), place)
    data = datasets.load(recipe, Path(data_dir) if data_dir else None, notify)
    return datasets.with_statistics(recipe, data.train), place, data


def train(
    recipe: Recipe | None = None,
    run_dir: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    must_match: dict[str, Any] | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    loader: str = "auto",
    workers: int | None = None,
    save_every_minutes: float = 5.0,
    compile: str = "auto",
    format: str = "png",
    watcher: Watcher | None = None,
) -> Checkpoint:
    """Trains a recipe to its end, or a run on from its checkpoint, and keeps it in a run directory.

    The processes that `torchrun` started share every batch; rank 0 alone reads and writes the run directory.

    Args:
        recipe: what to train; `Recipe()` if not given. Left out where `resume` is given.
        run_dir: an empty or new folder; `runs/<recipe>-<dataset>-s<seed>-<UTC time>` if not given.
        resume: the folder of a run to go on with; a run that is finished is returned as it is.
        must_match: recipe fields that the resumed run must have.
        loader: "auto", "tensor" or "albumentations".
        workers: processes of the albumentations loader.
        save_every_minutes: how long inside an epoch until a checkpoint is saved.
        compile: "auto", "on" or "off"; see `device.compiled`. Several processes train without.
        format: of the pictures: "png", "svg" or "pdf".

    Returns:
        The final checkpoint, whose history holds the metrics of every epoch.

    Raises:
        CifarResnetError: one line that says what was wrong. A run that had begun can be resumed.
    """
    if not save_every_minutes > 0:
        raise UsageError(f"--save-every-minutes {save_every_minutes:g} must be above 0")
    if resume is not None and (recipe is not None or run_dir is not None):
        raise UsageError("a resumed run takes recipe and folder from itself; give neither")
    figures.check_format(format)
    clock = [time.perf_counter()]
    with distributed.joined(), ExitStack() as held:
        watcher = watcher if watcher and distributed.rank() == 0 else Watcher()
        images_in, data = Path(data_dir) if data_dir else None, None

        def read() -> tuple[Recipe, Checkpoint | None, bool]:
            """The run as it stands, and whether it is finished; if not, rank 0 has the images."""
            nonlocal data
            planned, checkpoint = recipe, None
            if resume is not None:
                planned, checkpoint = _standing(Path(resume), must_match or {})
                if checkpoint and checkpoint.finished and any(Path(resume).glob("learning_rate.*")):  # a run's last file
                    with suppress(RunDirectoryError), locked(Path(resume)):  # it may have been killed right after it
                        remove_parts(Path(resume))
                    return planned, checkpoint, True
            planned, _, data = prepare(planned, device, data_dir, watcher.warn)
            fewest, ranks = (len(data.train) - 1) % planned.batch_size + 1, distributed.ranks()
            if fewest < ranks:
                raise UsageError(f"--batch-size {planned.batch_size}: a step of {fewest} images is too few for {ranks} processes")
            return planned, checkpoint, False

        recipe, checkpoint, finished = distributed.on_first(read)
        if finished:
            return checkpoint
        data, place = data or datasets.load(recipe, images_in, watcher.warn), resolve_device(device)
        batches = make_batches(data.train, recipe, place, loader, workers)
        held.callback(batches.close)
        evaluation = make_batches(data.evaluation.take(distributed.share(len(data.evaluation))), recipe, place)
        clock.append(time.perf_counter())
        folder = Path(resume or run_dir or default_directory(recipe))

        def claim() -> tuple[Recipe, Checkpoint | None]:
            """What the run directory says once nobody else can write it."""
            if resume is None:
                check_free(folder)
            if taken_over := held.enter_context(locked(writable(folder))):
                watcher.warn(taken_over)
            assert recipe is not None  # `read` gave one
            planned, checkpoint = recipe, None
            if resume is None:
                check_free(folder)
            else:
                planned, checkpoint = _standing(folder, must_match or {})
                planned = datasets.with_statistics(resolve_precision(planned, place), data.train)
            remove_parts(folder)
            write_whole(folder / "recipe.json", planned.to_json())
            return planned, checkpoint

        recipe, checkpoint = distributed.on_first(claim)
        if checkpoint and checkpoint.classes != data.classes:
            raise CifarResnetError(
                f"{folder} was trained on the classes {', '.join(checkpoint.classes)}, not {', '.join(data.classes)}"
            )
        state = checkpoint.state(place) if checkpoint else engine.start(recipe, place, len(data.classes))
        state.totals *= distributed.rank() == 0  # each rank adds its own
        clock.append(time.perf_counter())
        forward = None
        if distributed.ranks() > 1 and compile == "on":
            raise UsageError("--compile on: several processes train without compiling; leave it out")
        if distributed.ranks() == 1:
            sizes = sorted({recipe.batch_size, batches.count % recipe.batch_size or recipe.batch_size}, reverse=True)
            forward = compiled(compile, recipe, state.model, place, sizes, watcher.warn)
        clock.append(time.perf_counter())
        seconds = dict(zip(("data", "model", "compile"), (end - begin for begin, end in pairwise(clock)), strict=True))
        described = {
            **environment(place), "processes": distributed.ranks(), **batches.options,
            "compiled": forward not in (None, state.model), "startup_seconds": seconds,
        }  # fmt: skip
        watcher.begin(recipe, folder, described, data, state)

        def save(metrics_only: bool = False) -> str:
            """Gives what kept the run from being saved, or ""."""
            try:
                if not metrics_only:
                    save_checkpoint(folder / CHECKPOINT, recipe, state, data.classes, data.evaluated_on, described)
                write_metrics(folder, recipe, state.history, data.evaluated_on, described)
            except RunDirectoryError as error:
                return str(error)
            return ""

        if checkpoint:  # the truth: metrics.json may be an epoch ahead of it
            distributed.on_first(partial(write_metrics, folder, recipe, state.history, data.evaluated_on, described))
        saved = checked = time.monotonic()
        with signals() as received:
            for record in engine.train(recipe, state, batches, lambda: evaluation.plain(engine.EVALUATION_BATCH), place, forward):
                now, done = time.monotonic(), state.epoch == recipe.epochs
                if isinstance(record, Epoch):
                    watcher.epoch(record)
                    due = done or now - saved >= 20
                else:
                    watcher.step(record, state)
                    due = now - saved >= 60 * save_every_minutes
                due, check, stop = distributed.highest(due, now - checked >= 10, received[0] if received else 0)
                if due or stop or check or isinstance(record, Epoch):
                    state.check_finite(recipe, batches.steps)
                    checked = now
                if due or stop or isinstance(record, Epoch):
                    distributed.merge([state.model, state.tested], state.totals)
                    trouble = distributed.on_first(partial(save, metrics_only=not (due or stop)))
                    state.totals *= distributed.rank() == 0
                    saved = time.monotonic() if due else saved
                    if trouble and (done or stop):
                        raise RunDirectoryError(trouble)
                    if trouble:
                        watcher.warn(f"{trouble}; the run goes on, unsaved")
                if stop and not done:
                    raise Interrupted(stop, folder)

        def finish() -> Checkpoint:
            figures.save(figures.curves(state.history, recipe, data.evaluated_on), folder / f"curves.{format}")
            figures.save(figures.learning_rate(recipe, batches.steps), folder / f"learning_rate.{format}")
            return load_checkpoint(folder)

        return distributed.on_first(finish)


def repeat(
    recipe: Recipe | None = None,
    count: int | None = None,
    run_dir: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    must_match: dict[str, Any] | None = None,
    watch: Callable[[], AbstractContextManager[Watcher]] = lambda: nullcontext(Watcher()),
    **options: Any,
) -> dict[str, Any]:
    """Trains `count` seeds in a row, from the recipe's own upward, each into `s<seed>` of one folder, and sums them up.

    Args:
        recipe, run_dir, must_match, options: as `train` takes them.
        resume: the folder of a repetition to go on with, which knows recipe and count.
        watch: gives a context with a watcher for each run.

    Returns:
        What `repeat.json` holds: `recipe`, `count`, `evaluated_on`, and of the last accuracies, in percent: `accuracies`,
        `mean`, `std` (over n - 1) and `interval`, the 95 % interval of the mean by Student's t.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if distributed.started() > 1:
        raise UsageError("--repeat does not go with torchrun: train one seed after the other")
    folder = Path(resume or run_dir or default_directory(recipe or Recipe(), "repeat-"))
    if resume is None:
        recipe, count = recipe or Recipe(), count or 1
        if count < 2:
            raise UsageError(f"--repeat {count} must be at least 2")
        check_free(folder)
        write_json(writable(folder) / REPEAT, {"schema": SCHEMA, "recipe": recipe.model_dump(mode="json"), "count": count})
    else:
        written = read_json(folder / REPEAT, "repetition")
        stored, count = written.get("recipe"), written.get("count")
        recipe = Recipe.parse({**ADDED, **stored} if isinstance(stored, dict) else stored, f"{folder / REPEAT}: ")
        if not isinstance(count, int) or count < 2:
            raise UsageError(f"{folder / REPEAT} has the count {count!r}, not a number of runs")
        _check_match(recipe, must_match or {}, folder)
    done = []
    with signals() as received:
        for seed in range(recipe.seed, recipe.seed + count):
            one = folder / f"s{seed}"
            how = dict(resume=one) if (one / "recipe.json").exists() else dict(recipe=recipe.replace(seed=seed), run_dir=one)
            with suppress(Interrupted), watch() as watcher:
                done.append(train(**how, watcher=watcher, **options))
            if received and len(done) < count:
                raise Interrupted(received[0], folder)
    accuracies = [checkpoint.history[-1]["test_accuracy"] for checkpoint in done]
    mean, std = statistics.fmean(accuracies), statistics.stdev(accuracies)
    half = float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    content = {
        "schema": SCHEMA, "recipe": recipe.model_dump(mode="json"), "count": count, "evaluated_on": done[0].evaluated_on,
        "accuracies": accuracies, "mean": mean, "std": std, "interval": [mean - half, mean + half],
    }  # fmt: skip
    write_json(folder / REPEAT, content)
    return content


def _standing(folder: Path, must_match: dict[str, Any]) -> tuple[Recipe, Checkpoint | None]:
    """The recipe of the run in a folder, and its checkpoint where it lived to write one."""
    if (folder / CHECKPOINT).exists():
        checkpoint = load_checkpoint(folder)
        recipe = checkpoint.recipe
    elif (folder / "recipe.json").exists():
        checkpoint, recipe = None, read_recipe(folder)
    else:
        raise UsageError(f"--resume {folder}: holds neither {CHECKPOINT} nor recipe.json, so no run to go on with")
    _check_match(recipe, must_match, folder)
    return recipe, checkpoint


def _check_match(recipe: Recipe, must_match: dict[str, Any], folder: Path) -> None:
    for name, value in must_match.items():
        planned = getattr(recipe, name)
        if value != planned and (name, value) != ("precision", "auto"):
            reason = " (the schedule would change)" if name == "epochs" else ""
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value} contradicts the run in {folder}, which has {planned}{reason}; leave it out")


class _Received(list):
    """Signals received, and their handler: after the first one, the next acts at once."""

    def __call__(self, number: int, _frame: Any) -> None:
        self.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, so that the step in flight can end; the second one acts at once.

    Inside another of these it gives that one's.
    """
    outer = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield []  # only the main thread may set handlers
    elif isinstance(outer, _Received):
        yield outer
    else:
        received = _Received()
        before = {number: signal.signal(number, received) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def samples(
    recipe: Recipe | None = None,
    path: Path | str | None = None,
    *,
    views: int = 8,
    data_dir: Path | str | None = None,
    loader: str = "auto",
    workers: int | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Figure:
    """One training image of each class, drawn by the seed, beside the views that the recipe's own loader makes of it.

    Args:
        path: where the picture goes (.png, .svg or .pdf), if anywhere.
        views: how many, each from an epoch of its own.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if not 1 <= views <= 20:
        raise UsageError(f"--views {views} must be 1 to 20")
    recipe, place, data = prepare((recipe or Recipe()).replace(batch_size=1), "cpu", data_dir, notify)
    rng = np.random.default_rng(recipe.seed)
    positions = [rng.choice(np.flatnonzero(data.train.labels == label)) for label in range(len(data.classes))]
    chosen = data.train.take(np.array(positions))
    batches = make_batches(chosen, recipe.replace(batch_size=len(chosen)), place, loader, workers)
    seen = np.empty((len(chosen), views, 32, 32, 3), np.uint8)
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    for view in range(views):
        images, _ = next(iter(batches.epoch(view)))
        pixels = ((images.permute(0, 2, 3, 1) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        seen[epoch_order(recipe, view, len(chosen)), view] = pixels.numpy()
    figure = figures.samples(chosen.images, seen, data.classes, f"Training images under the augmentation of {recipe.recipe}")
    if path is not None:
        figures.save(figure, Path(path))
    return figure
