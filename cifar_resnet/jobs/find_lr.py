"""The search for a learning rate: the range test, its trials, and the sweep that they can be held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..arguments import Convolution, Format, LoaderKind, StepMode, checked
from ..checkpoint import SCHEMA
from ..data.datasets import load
from ..data.loaders import Loader, TensorLoader, batch_sizes, check_batches, make_loader
from ..data.splits import Data
from ..errors import CifarResnetError, NonFiniteLossError, UsageError
from ..files import check_writable, writable, write_json
from ..look import figures
from ..look.progress import telling
from ..recipe import Recipe
from ..training import engine
from ..training.engine import Epoch, State
from ..training.lr_finder import MIN_POINTS, FoundLR, Suggestions, range_test, run_trials, suggest, usual_steps
from ..training.model import build_model
from ..training.runtime import environment
from .common import prepare, save_figure, with_gradients
from .convolutions import Choice, choose

SWEPT = 9  # short trainings of a sweep at most

Progress = Callable[[int, int], None]


@checked
@with_gradients
def find_lr(
    recipe: Recipe | None = None,
    run_dir: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    loader: LoaderKind = "auto",
    workers: int | None = None,
    convolution: Convolution = "auto",
    start_lr: float = 1e-4,
    end_lr: float = 10.0,
    num_iter: int = 100,
    step_mode: StepMode = "exp",
    trial_steps: int | None = None,
    sweep: int | None = None,
    format: Format = "png",
    progress: Progress | bool | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> FoundLR:
    """Runs the learning-rate range test and its trials; with `run_dir`, writes `lr_finder.json` and its picture there.

    Args:
        convolution: as `train` takes it.
        trial_steps: steps of each of the three to six short trainings that find the recommended maximum; see `usual_steps` if not
            given. 0: no such trainings. The maximum is then read off the range test, which is lower than the best one.
        sweep: also trains this many epochs at each of up to nine maxima: seven a factor of 2 apart around the recommended one, or
            the recipe's if none is recommended; the steepest point; and the recommended one. The recipe's holdout judges these
            trainings, or else a tenth of the training images, on which they do not train.
        progress: None or True: a bar in a terminal and in a notebook, elsewhere a line on standard error every two minutes.
            False: nothing. A function is called with the steps done and those planned.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    settings: dict[str, Any] = dict(start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode)
    _check(start_lr, end_lr, num_iter, trial_steps, sweep)
    if run_dir is not None:
        check_writable(Path(run_dir))
    with ExitStack() as held:
        told = held.enter_context(telling(progress, "learning rate", "steps"))
        notify = cache(notify)  # what is said of the images is said once, though they may be loaded twice
        recipe, place, data = prepare(recipe, device, data_dir, notify)
        run_steps = recipe.epochs * len(batch_sizes(recipe, len(data.train)))
        if sweep and not recipe.holdout:
            recipe = recipe.replace(holdout=max(len(data.train) // 10, len(data.classes)), test_limit=None)
            data = load(recipe, data_dir, notify)
        check_batches(recipe, len(data.train))
        batches = held.enter_context(closing(make_loader(data.train, recipe, place, loader, workers)))
        ways = choose(convolution, build_model(recipe), recipe, place)
        search = _Search(recipe, data, batches, place, run_steps, sweep or 0, told, ways)
        found = search.run(usual_steps(recipe, batches) if trial_steps is None else trial_steps, settings)
    if run_dir is not None:
        folder = writable(Path(run_dir))
        write_json(folder / "lr_finder.json", search.content(found, settings))
        figure = figures.lr_finder(found.history, found.suggestions, recipe, step_mode, found.trials, found.sweep)
        save_figure(figure, folder / f"lr_finder.{format}")
    return found


def _check(start_lr: float, end_lr: float, num_iter: int, trial_steps: int | None, sweep: int | None) -> None:
    if not 0 < start_lr < end_lr < math.inf:
        raise UsageError(f"--start-lr {start_lr:g} must be above 0 and below --end-lr {end_lr:g}, which is finite")
    if num_iter < MIN_POINTS:
        raise UsageError(f"--num-iter {num_iter} must be at least {MIN_POINTS}")
    if trial_steps and trial_steps < MIN_POINTS:
        raise UsageError(f"--trial-steps {trial_steps} must be 0 or at least {MIN_POINTS}")
    if sweep is not None and sweep < 1:
        raise UsageError(f"--sweep {sweep} must be at least 1 epoch")


class _Search(NamedTuple):
    recipe: Recipe
    data: Data
    loader: Loader
    device: torch.device
    run_steps: int  # of the whole training, which has the images too that a sweep holds out
    sweep: int  # epochs; 0 for none
    progress: Progress
    convolutions: Choice | None

    def begin(self, recipe: Recipe) -> State:
        return engine.start(recipe, self.device, len(self.data.classes), self.convolutions, self.data.train.images)

    def run(self, trial_steps: int, settings: dict[str, Any]) -> FoundLR:
        """Range test, trials and sweep."""
        recipe, loader, trials, swept = self.recipe, self.loader, [], []
        planned, num_iter = self.sweep * SWEPT * loader.steps, settings["num_iter"]
        tested = range_test(
            self.begin, recipe, loader, **settings,
            progress=lambda done, total: self.progress(done, total + 4 * trial_steps + planned),
        )  # fmt: skip
        if trial_steps:
            trials = run_trials(
                self.begin, recipe, loader, tested, steps=trial_steps,
                progress=lambda done, total: self.progress(num_iter + done, num_iter + total + planned),
            )  # fmt: skip

        def suggest_for(steps: int) -> Suggestions:
            return suggest(tested, trials, steps / (trial_steps or steps))

        before = num_iter + len(trials) * trial_steps
        self.progress(before, before + planned)
        if self.sweep:
            swept = self._sweep(suggest_for(self.sweep * loader.steps), before)
        return FoundLR(tested, suggest_for(self.run_steps), trials, swept, trial_steps)

    def _sweep(self, found: Suggestions, before: int) -> list[dict[str, Any]]:
        """Short trainings at several learning rates, each with its last accuracy and loss; None for both where it diverged."""
        recipe, epochs, steps = self.recipe, self.sweep, self.loader.steps
        short = recipe.replace(epochs=epochs, peak_epoch=recipe.peak_epoch * epochs / recipe.epochs, sam_share=0.0)
        middle = found.max_lr or recipe.max_lr
        planned = [("grid", short.replace(max_lr=middle * 2.0**power)) for power in range(-3, 4)]
        planned.append(("steepest", short.replace(max_lr=found.steepest)))
        if found.max_lr is not None:
            planned.append(("recommended", with_found_lr(short, found)))
        evaluation, rows = TensorLoader(self.data.evaluation, recipe, self.device), list[dict[str, Any]]()
        for rule, trained in planned:
            state, score = self.begin(trained), {}
            with suppress(NonFiniteLossError):
                for record in engine.train(state, self.loader, evaluation.plain):
                    done = (len(rows) * epochs + state.epoch) * steps + state.step
                    self.progress(before + done, before + len(planned) * epochs * steps)
                    score = record.metrics if isinstance(record, Epoch) else {}
            lrs = dict(max_lr=trained.max_lr, min_lr=trained.max_lr / trained.div_factor)
            rows.append(dict(rule=rule, **lrs, epochs=epochs, accuracy=score.get("test_accuracy"), loss=score.get("test_loss")))
        return rows

    def content(self, found: FoundLR, settings: dict[str, Any]) -> dict[str, Any]:
        """What `lr_finder.json` holds."""
        trials = [trial._asdict() | {"loss": trial.loss if math.isfinite(trial.loss) else None} for trial in found.trials]
        return {
            "schema": SCHEMA,
            "environment": {**environment(self.device), "convolutions": self.convolutions},
            "recipe": self.recipe.to_dict(),
            **settings,
            "trial_steps": found.trial_steps,
            "run_steps": self.run_steps,
            "suggestions": found.suggestions._asdict(),
            "history": {"lr": found.history.lr.tolist(), "loss": found.history.loss.tolist()},
            "trials": trials,
            "sweep": found.sweep,
        }


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
