"""The jobs that train, whole: what a command of the command line does, and a notebook calls."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from . import data as datasets
from . import distributed, engine, figures
from .batches import Batches, epoch_order, make_batches
from .device import compiled, environment, resolve_device, resolve_precision
from .engine import Epoch, State, Step
from .errors import CifarResnetError, NonFiniteLossError, RunDirectoryError, UsageError
from .lr_finder import MIN_POINTS, History, Suggestions, Trial, range_test, run_trials, suggest, usual_steps
from .recipe import ADDED, Recipe, read_json
from .run import (
    CHECKPOINT,
    SCHEMA,
    Checkpoint,
    check_free,
    check_writable,
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
SWEPT = 9  # short trainings of a sweep at most


class FoundLR(NamedTuple):
    """What a range test and its trials showed, and a sweep: dicts with `rule`, `max_lr`, `min_lr`, `accuracy`, ..."""

    history: History
    suggestions: Suggestions
    trials: list[Trial]
    sweep: list[dict[str, Any]]


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
    for seed in range(recipe.seed, recipe.seed + count):
        one = folder / f"s{seed}"
        how = dict(resume=one) if (one / "recipe.json").exists() else dict(recipe=recipe.replace(seed=seed), run_dir=one)
        try:
            with watch() as watcher:
                done.append(train(**how, watcher=watcher, **options))
        except Interrupted as stopped:
            raise Interrupted(stopped.number, folder) from None
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


def find_lr(
    recipe: Recipe | None = None,
    run_dir: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    loader: str = "auto",
    workers: int | None = None,
    start_lr: float = 1e-4,
    end_lr: float = 10.0,
    num_iter: int = 100,
    step_mode: str = "exp",
    trial_steps: int | None = None,
    sweep: int | None = None,
    format: str = "png",
    progress: Callable[[int, int], None] = lambda done, total: None,
    notify: Callable[[str], None] = lambda message: None,
) -> FoundLR:
    """Runs the learning-rate range test and its trials; with `run_dir`, writes `lr_finder.json` and its picture there.

    Args:
        trial_steps: steps of each of the short trainings, three to six, that find the recommended maximum; 2 % of the whole run's
            and at least 50 if not given; 0 for no such trainings: it is then read off the range test, and lower than what trains best.
        sweep: epochs of short trainings to hold the test against: one from the recommended minimum to the recommended maximum,
            one at the steepest point, and seven at maxima a factor of 2 apart around the recommended one, or the recipe's where
            nothing is recommended. A tenth of the training images, on which none trains, judges them.
        progress: called with the steps done and those planned.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if not 0 < start_lr < end_lr:
        raise UsageError(f"--start-lr {start_lr:g} must be above 0 and below --end-lr {end_lr:g}")
    if step_mode not in ("exp", "linear"):
        raise UsageError(f"--step-mode {step_mode}: it is exp or linear")
    figures.check_format(format)
    if num_iter < MIN_POINTS:
        raise UsageError(f"--num-iter {num_iter} must be at least {MIN_POINTS}")
    if trial_steps and trial_steps < MIN_POINTS:
        raise UsageError(f"--trial-steps {trial_steps} must be 0 or at least {MIN_POINTS}")
    if sweep is not None and sweep < 1:
        raise UsageError(f"--sweep {sweep} must be at least 1 epoch")
    if run_dir is not None:
        check_writable(Path(run_dir))
    recipe, place, data = prepare(recipe, device, data_dir, notify)
    if sweep:
        recipe = recipe.replace(holdout=recipe.holdout or max(len(data.train) // 10, len(data.classes)))
        data = datasets.load(recipe, Path(data_dir) if data_dir else None, notify)
    batches, trials, swept = make_batches(data.train, recipe, place, loader, workers), [], []
    settings: dict[str, Any] = dict(start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode)
    trial_steps = usual_steps(recipe, batches) if trial_steps is None else trial_steps
    in_trials, in_sweep = 4 * trial_steps, (sweep or 0) * SWEPT * batches.steps  # steps, about

    with closing(batches):
        tested = range_test(
            recipe, batches, place, len(data.classes), **settings,
            progress=lambda done, total: progress(done, total + in_trials + in_sweep),
        )  # fmt: skip
        if trial_steps:
            trials = run_trials(
                recipe, batches, place, tested, len(data.classes), steps=trial_steps,
                progress=lambda done, total: progress(num_iter + done, num_iter + total + in_sweep),
            )  # fmt: skip
        suggestions, before = suggest(tested, trials), num_iter + len(trials) * trial_steps
        progress(before, before + in_sweep)
        if sweep:
            evaluation = make_batches(data.evaluation, recipe, place)
            swept = _sweep(recipe, suggestions, sweep, batches, evaluation, len(data.classes), place, progress, before)
    if run_dir is not None:
        folder = writable(Path(run_dir))
        content = {
            "schema": SCHEMA,
            "environment": environment(place),
            "recipe": recipe.model_dump(mode="json"),
            **settings,
            "trial_steps": trial_steps,
            "suggestions": suggestions._asdict(),
            "history": {"lr": tested.lr.tolist(), "loss": tested.loss.tolist()},
            "trials": [trial._asdict() | {"loss": trial.loss if math.isfinite(trial.loss) else None} for trial in trials],
            "sweep": swept,
        }
        write_json(folder / "lr_finder.json", content)
        figures.save(figures.lr_finder(tested, suggestions, recipe, step_mode, trials, swept), folder / f"lr_finder.{format}")
    return FoundLR(tested, suggestions, trials, swept)


def _sweep(
    recipe: Recipe, found: Suggestions, epochs: int, batches: Batches, evaluation: Batches, classes: int, place: torch.device,
    progress: Callable[[int, int], None], before: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Short trainings at several learning rates, each with its last accuracy and loss; None for both where it diverged."""
    short = recipe.replace(epochs=epochs, peak_epoch=recipe.peak_epoch * epochs / recipe.epochs)
    middle = found.max_lr or recipe.max_lr
    planned = [("grid", short.replace(max_lr=middle * 2.0**power)) for power in range(-3, 4)]
    planned.append(("steepest", short.replace(max_lr=found.steepest)))
    if found.max_lr is not None:
        planned.append(("recommended", with_found_lr(short, found)))
    rows: list[dict[str, Any]] = []
    for rule, trained in planned:
        state, score = engine.start(trained, place, classes), {}
        with suppress(NonFiniteLossError):
            for record in engine.train(trained, state, batches, lambda: evaluation.plain(engine.EVALUATION_BATCH), place):
                progress(
                    before + (len(rows) * epochs + state.epoch) * batches.steps + state.step,
                    before + len(planned) * epochs * batches.steps,
                )
                score = record.metrics if isinstance(record, Epoch) else {}
        lrs = dict(max_lr=trained.max_lr, min_lr=trained.max_lr / trained.div_factor)
        rows.append(dict(rule=rule, **lrs, epochs=epochs, accuracy=score.get("test_accuracy"), loss=score.get("test_loss")))
    return rows


def with_found_lr(recipe: Recipe, suggestions: Suggestions, rule: str = "recommended") -> Recipe:
    """The recipe at the maximum that a rule gives; the recommended one starts from the recommended minimum.

    Raises:
        CifarResnetError: the range test recommends nothing.
    """
    if rule != "recommended":
        return recipe.replace(max_lr=suggestions.by(rule))
    if suggestions.max_lr is None or suggestions.min_lr is None:
        raise CifarResnetError(f"no LR is recommended: {suggestions.why_not} (of find-lr), or give --max-lr a number")
    return recipe.replace(max_lr=suggestions.max_lr, div_factor=suggestions.max_lr / suggestions.min_lr)


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
