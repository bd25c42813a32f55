"""The learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186), run by torch-lr-finder, and what it suggests.

At a high learning rate the loss is noisy, and the end of a schedule removes this noise. So training works at a higher maximum
than the test shows. Short trainings, each with a whole schedule, find that maximum.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.loaders import Batch, Loader
from ..errors import CifarResnetError, NonFiniteLossError, check_choice
from ..recipe import Recipe
from .engine import Rates, State, rates_at, train_step

MIN_POINTS = 20
SHARE = 0.05  # of the whole drop of the range test's loss: what counts as still being at the bottom
CLEAR = 3  # times the noise: what counts as a fall
MOST_TRIALS = 6
TRIAL_IMAGES = 25_600
DIVERGED = 5  # times its lowest: where torch-lr-finder stops
OTHER_TRIALS = "try more --trial-steps, or --trial-steps 0, which reads the maximum off the range test"
GROWTH = 0.2  # the best maximum rises about with this power of the number of steps: docs/log/range-test.md, entry 16


class History(NamedTuple):
    """float64 (N,) each: the learning rates of a range test and the training loss at each, unsmoothed."""

    lr: np.ndarray
    loss: np.ndarray

    def __repr__(self) -> str:
        return f"History({len(self.lr)} learning rates from {self.lr[0]:g} to {self.lr[-1]:g})"


class Trial(NamedTuple):
    """A short training with a whole schedule: its highest learning rate, and the mean training loss of its last fifth."""

    max_lr: float
    loss: float  # infinite where it diverged


class Suggestions(NamedTuple):
    """Learning rates read off a range test, and off trials. The recommended two are None where these show no bottom."""

    steepest: float  # where the smoothed loss falls fastest, as the reference systems read it
    valley: float  # the middle of the longest fall, as fastai reads it
    minimum_tenth: float  # a tenth of the LR of the lowest smoothed loss
    max_lr: float | None
    min_lr: float | None
    why_not: str | None = None  # and what to change, where nothing is recommended

    def by(self, rule: str) -> float | None:
        """The learning rate of a rule: "steepest", "valley", "minimum" (a tenth of it) or "recommended"."""
        rules = {"steepest": self.steepest, "valley": self.valley, "minimum": self.minimum_tenth, "recommended": self.max_lr}
        check_choice("suggest", rule, *rules)
        return rules[rule]


class FoundLR(NamedTuple):
    """What a range test and its trials showed, and a sweep: dicts with `rule`, `max_lr`, `min_lr`, `accuracy`, ..."""

    history: History
    suggestions: Suggestions
    trials: list[Trial]
    sweep: list[dict[str, Any]]
    trial_steps: int = 0


def range_test(
    begin: Callable[[Recipe], State],
    recipe: Recipe,
    loader: Loader,
    *,
    start_lr: float = 1e-4,
    end_lr: float = 10.0,
    num_iter: int = 100,
    step_mode: str = "exp",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> History:
    """Trains a run that `begin` starts for `num_iter` steps, while the learning rate rises from `start_lr` to `end_lr`.

    Steps are plain, with the recipe's optimizer, augmentation and precision, and without averaging. The test ends early if the loss
    passes five times its lowest or is not finite.

    Raises:
        CifarResnetError: fewer than 20 points are left.
    """
    with warnings.catch_warnings(action="ignore"):  # of a bar for notebooks, which is not shown
        from torch_lr_finder import LRFinder, TrainDataLoaderIter
        from torch_lr_finder import lr_finder as library

    state, batches, done = begin(recipe), endless(loader), itertools.count()

    silent = {**vars(library), "tqdm": lambda steps: steps, "print": lambda message: None}

    class Finder(LRFinder):
        """torch-lr-finder's, which raises the rate and reads the losses; each step is that of the training loop."""

        range_test = FunctionType(LRFinder.range_test.__code__, silent, argdefs=LRFinder.range_test.__defaults__)

        def _train_batch(self, *_: Any, **__: Any) -> float:
            step = next(done)
            progress(step, num_iter)
            rates = Rates(step, self.optimizer.param_groups[0]["lr"], recipe.momentum)
            loss = float(train_step(state, next(batches), rates))
            if not math.isfinite(loss):  # the library would go on
                raise NonFiniteLossError
            return loss

    finder = Finder(state.model, state.optimizer, None, device=state.device)
    with contextlib.suppress(NonFiniteLossError):
        finder.range_test(
            TrainDataLoaderIter(batches), start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode, smooth_f=0
        )
    progress(num_iter, num_iter)
    lr, loss = (np.array(finder.history[key]) for key in ("lr", "loss"))
    if len(loss) < MIN_POINTS:
        advice = _advice_for_more_points(lr, loss, end_lr, num_iter)
        points = f"{len(loss)} points before the loss diverged, and needs {MIN_POINTS}"
        raise CifarResnetError(f"the range test has only {points}: {advice}")
    return History(lr, loss)


def _advice_for_more_points(lr: np.ndarray, loss: np.ndarray, end_lr: float, num_iter: int) -> str:
    """What to change of a test that diverged early: its start where the first step did it, else how fast the rate rises."""
    if len(loss) < 2 or loss[1] > 1.5 * loss[0]:
        return f"give a lower --start-lr than {lr[0]:g}" if len(lr) else "give a lower --start-lr"
    cause = len(loss) - 2 if loss[-1] > DIVERGED * loss.min() else len(loss) - 1  # the step whose rate was too high
    if cause < 2:
        return f"give a far lower --end-lr than {end_lr:g}"
    more = f"--num-iter {math.ceil(MIN_POINTS * num_iter / (cause - 1))}"
    enough = num_iter * (cause - 1) / cause >= MIN_POINTS  # points below the rate of the cause, if the test ends there
    return f"give --end-lr {lr[cause]:.3g}, or {more}" if enough else f"give {more}"


def endless(loader: Loader) -> Iterator[Batch]:
    """The batches of one epoch after another."""
    return (batch for epoch in itertools.count() for batch in loader.epoch(epoch))


def usual_steps(recipe: Recipe, loader: Loader) -> int:
    """How long a trial is: 25,600 images, but half of the run at most, and 50 steps at least."""
    return max(50, min(TRIAL_IMAGES // recipe.batch_size, recipe.epochs * loader.steps // 2))


def run_trials(
    begin: Callable[[Recipe], State],
    recipe: Recipe,
    loader: Loader,
    history: History,
    *,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Trial]:
    """Trains fresh models of the recipe for `steps` steps each, on its schedule in small, from the `min_lr` of the range test;
    all of them plain steps, and without averaging.

    The first has the power of 2 nearest to the test's bottom as its maximum. Then it is doubled while the highest maximum is
    the best, and halved while the lowest is. Six are the most.

    Returns:
        The trials by rising `max_lr`; none where the range test shows no bottom.
    """
    found = suggest(history)
    if found.max_lr is None or found.min_lr is None:
        return []
    lowest_lr, losses = found.min_lr, dict[int, float]()

    def run(power: int) -> None:
        before, total = len(losses) * steps, max(4, len(losses) + 1) * steps
        losses[power] = _trial(begin, recipe, loader, 2.0**power, lowest_lr, steps, lambda done: progress(before + done, total))

    run(round(math.log2(found.max_lr)))
    while len(losses) < MOST_TRIALS:
        best, highest, lowest = min(losses, key=losses.__getitem__), max(losses), min(losses)
        if best == highest and math.isfinite(losses[best]):
            run(highest + 1)
        elif best == lowest or math.isinf(losses[best]):
            run(lowest - 1)
        else:
            break
    return [Trial(2.0**power, losses[power]) for power in sorted(losses)]


def _trial(
    begin: Callable[[Recipe], State], recipe: Recipe, loader: Loader, max_lr: float, min_lr: float, steps: int,
    progress: Callable[[int], None],
) -> float:  # fmt: skip
    """Mean loss of the last fifth of a short training with a whole schedule; infinite where it is not finite."""
    schedule = dict(max_lr=max_lr, div_factor=max(max_lr / min_lr, 1.0), epochs=1, peak_epoch=recipe.peak_epoch / recipe.epochs)
    trial = recipe.replace(**schedule, ema_decay=0.0, sam_share=0.0)
    state, losses = begin(trial), []
    state.model.train()
    even = recipe.batches == "even"
    batches = (batch for batch in endless(loader) if even or len(batch.labels) == recipe.batch_size)  # none of a remainder
    for step, batch in zip(range(steps), batches, strict=False):
        losses.append(train_step(state, batch, rates_at(trial, step, steps)))
        progress(step + 1)
    loss = float(torch.stack(losses[-max(steps // 5, 1) :]).mean())
    return loss if math.isfinite(loss) else math.inf


def suggest(history: History, trials: Sequence[Trial] = (), longer: float = 1.0) -> Suggestions:
    """The suggestions of a range test, and of its trials if there are any; the maximum of each trial is twice the last one's.

    The bottom ends where the smoothed loss first stands above its lowest value so far by a quarter of its fall to that value, and by
    more than noise. The fall must be clear. `min_lr` is the lowest learning rate at which half of the whole fall is done. With trials, `max_lr` is the lowest
    point of a parabola through the best trial and its two neighbours, in the logarithm of the rate, times the fifth root of
    `longer`: the steps of the run over those of a trial. Without trials, `max_lr` is the highest rate at which the loss is within
    5 % of the whole fall from its lowest. Both are None if the loss never falls, or falls to the end, if no trial gets below the
    first loss, or if the best trial is the first or the last.
    """
    lr, level = history.lr, smooth(history.loss)
    lagging = exponential(history.loss)
    inner = slice(10, -5)  # as LRFinder.plot skips them
    steepest = lr[inner][np.gradient(lagging[inner]).argmin()]
    lowest_yet = np.minimum.accumulate(level)
    at_lowest = np.maximum.accumulate(np.where(level == lowest_yet, np.arange(len(level)), 0))
    rise, fall = level - lowest_yet, np.maximum.accumulate(level)[at_lowest] - lowest_yet
    noise = np.maximum(2 * np.median(np.abs(history.loss - level)), 0.005 * np.abs(lowest_yet))
    left = np.flatnonzero((rise > noise) & (rise > 0.25 * fall) & (fall > CLEAR * noise))
    end = int(left[0]) if len(left) else len(lr)
    lowest = int(level[:end].argmin())
    top = int(level[: lowest + 1].argmax())
    drop = level[top] - level[lowest]
    max_lr = min_lr = why_not = None
    if drop <= CLEAR * noise[lowest]:
        why_not = f"the loss never fell clearly; {_advice_for_a_fall(lr, level, float(noise[-1]))}"
    elif lowest == len(lr) - 1:
        why_not = "the loss fell to the end of the range; try a higher --end-lr"
    elif trials and min(trial.loss for trial in trials) >= level[0]:
        why_not = f"no short training got below the first loss, down to LR {trials[0].max_lr:g}; {OTHER_TRIALS}"
    else:
        half = top + np.flatnonzero(level[top : lowest + 1] <= level[top] - drop / 2)[0]
        past = np.flatnonzero(level[lowest:] > level[lowest] + SHARE * drop)
        max_lr = _best(history, trials, longer) if trials else float(lr[lowest + past[0] - 1 if len(past) else -1])
        min_lr = min(float(lr[half]), max_lr or math.inf)
    if trials and why_not is None and max_lr is None:
        min_lr, tried = None, f"from LR {trials[0].max_lr:g} to {trials[-1].max_lr:g}"
        why_not = f"the best of the short trainings, {tried}, is not between worse ones; {OTHER_TRIALS}"
    return Suggestions(float(steepest), float(lr[valley(lagging)]), float(lr[lagging.argmin()] / 10), max_lr, min_lr, why_not)


def _advice_for_a_fall(lr: np.ndarray, level: np.ndarray, noise: float) -> str:
    """What to change of a test without a clear fall, of this smoothed loss."""
    lowest = int(level.argmin())
    past = np.flatnonzero(level[lowest:] > level[lowest] + 5 * noise)
    if not len(past):
        return "try a higher --end-lr"
    if lr[lowest + past[0]] > 10 * lr[0]:  # it began low enough, and the fall lies between too few points
        return "try a lower --end-lr, or more --num-iter"
    return "try a lower --start-lr"


def _best(history: History, trials: Sequence[Trial], longer: float) -> float | None:
    """The maximum that the trials show for a run `longer` times theirs; None where the best is the first or the last."""
    best = min(range(len(trials)), key=lambda place: trials[place].loss)
    if not 0 < best < len(trials) - 1:
        return None
    worst = float(history.loss.max())  # of one that diverged
    below, lowest, above = (min(trial.loss, worst) for trial in trials[best - 1 : best + 2])
    octaves = (below - above) / (2 * (below - 2 * lowest + above))
    return trials[best].max_lr * 2**octaves * longer**GROWTH


def exponential(loss: np.ndarray) -> np.ndarray:
    """torch-lr-finder's smoothing: each value moves the last one by a twentieth. It lags behind the loss."""
    return np.array(list(itertools.accumulate(loss.tolist(), lambda last, new: 0.05 * new + 0.95 * last)))


def smooth(loss: np.ndarray) -> np.ndarray:
    """A centred Gaussian mean, 2 % of the points wide: it does not lag. Near the ends it takes what there is."""
    places = np.arange(len(loss))
    width = max(1.0, 0.02 * len(loss))
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / width) ** 2)
    return weights @ loss / weights.sum(1)


def valley(loss: np.ndarray) -> int:
    """Index in the middle of the longest fall: fastai's `valley` (https://docs.fast.ai/callback.schedule.html)."""
    length = np.ones(len(loss), int)  # of the longest falling subsequence that ends here
    for i in range(1, len(loss)):
        longer = length[:i][loss[:i] > loss[i]]
        length[i] = 1 + (longer.max() if len(longer) else 0)
    end = int(length.argmax())
    begin = max(end - int(length[end]), 0)
    third = (end - begin) / 3
    return begin + int(third) + int(third / 2)
