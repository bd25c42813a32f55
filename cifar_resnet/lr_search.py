"""The search for a learning rate, whole: the range test, its trials, and the sweep that they can be held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import data as datasets
from . import engine, figures
from .batches import Batches, make_batches
from .device import environment
from .engine import Epoch
from .errors import CifarResnetError, NonFiniteLossError, UsageError
from .experiment import prepare
from .lr_finder import MIN_POINTS, History, Suggestions, Trial, range_test, run_trials, suggest, usual_steps
from .recipe import Recipe
from .run import SCHEMA, check_writable, writable, write_json

SWEPT = 9  # short trainings of a sweep at most


class FoundLR(NamedTuple):
    """What a range test and its trials showed, and a sweep: dicts with `rule`, `max_lr`, `min_lr`, `accuracy`, ..."""

    history: History
    suggestions: Suggestions
    trials: list[Trial]
    sweep: list[dict[str, Any]]


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
        trial_steps: steps of each of the short trainings, three to six, that find the recommended maximum; see `usual_steps` if not
            given; 0 for no such trainings: it is then read off the range test, and lower than what trains best.
        sweep: epochs of short trainings to hold the test against: one from the recommended minimum to the maximum that the rule gives
            for as many epochs, one at the steepest point, and seven at maxima a factor of 2 apart around that one, or the recipe's
            where nothing is recommended. A tenth of the training images, on which none trains, judges them.
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
    run_steps = recipe.epochs * batches.steps
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

        def suggest_for(steps: int) -> Suggestions:
            return suggest(tested, trials, steps / (trial_steps or steps))

        suggestions = suggest_for(run_steps)
        before = num_iter + len(trials) * trial_steps
        progress(before, before + in_sweep)
        if sweep:
            evaluation = make_batches(data.evaluation, recipe, place)
            found = suggest_for(sweep * batches.steps)
            swept = _sweep(recipe, found, sweep, batches, evaluation, len(data.classes), place, progress, before)
    if run_dir is not None:
        folder = writable(Path(run_dir))
        content = {
            "schema": SCHEMA,
            "environment": environment(place),
            "recipe": recipe.model_dump(mode="json"),
            **settings,
            "trial_steps": trial_steps,
            "run_steps": run_steps,
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
    short = recipe.replace(epochs=epochs, peak_epoch=recipe.peak_epoch * epochs / recipe.epochs, sam_share=0.0)
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
