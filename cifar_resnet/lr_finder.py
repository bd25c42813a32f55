"""The learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186), run by torch-lr-finder, and what it suggests."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .batches import Batch, Batches
from .device import autocast
from .engine import make_loss, start
from .errors import CifarResnetError, UsageError
from .recipe import Recipe

MIN_POINTS = 20
SHARE = 0.05  # of the whole drop of the loss: what counts as having begun to fall, and as still being at the bottom


class History(NamedTuple):
    """float64 (N,) each: the learning rates of a range test and the training loss at each, unsmoothed."""

    lr: np.ndarray
    loss: np.ndarray


class Suggestions(NamedTuple):
    """Learning rates read off a range test. The recommended two are None where it shows no bottom."""

    steepest: float  # where the smoothed loss falls fastest, as the reference systems read it
    valley: float  # the middle of the longest fall, as fastai reads it
    minimum_tenth: float  # a tenth of the LR of the lowest smoothed loss
    max_lr: float | None
    min_lr: float | None
    why_not: str | None = None  # and what to change, where nothing is recommended

    def by(self, rule: str) -> float | None:
        """The learning rate of a rule: "steepest", "valley", "minimum" (a tenth of it) or "recommended"."""
        rules = {"steepest": self.steepest, "valley": self.valley, "minimum": self.minimum_tenth, "recommended": self.max_lr}
        if rule not in rules:
            raise UsageError(f"--suggest {rule}: it is {', '.join(rules)}")
        return rules[rule]


def range_test(
    recipe: Recipe,
    batches: Batches,
    device: torch.device,
    classes: int = 10,
    *,
    start_lr: float = 1e-4,
    end_lr: float = 10.0,
    num_iter: int = 200,
    step_mode: str = "exp",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> History:
    """Trains a fresh model of the recipe for `num_iter` steps while the learning rate rises from `start_lr` to `end_lr`.

    The recipe's optimizer, augmentation and precision are used; torch's random state is left as it was. The test
    ends early where the loss passes five times its lowest, or is not finite.

    Raises:
        CifarResnetError: fewer than 20 points are left.
    """
    from torch_lr_finder import LRFinder, TrainDataLoaderIter
    from torch_lr_finder import lr_finder as library

    state, loss_of = start(recipe, device, classes), make_loss(recipe)

    def finite_loss(output: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(output, labels)
        if not torch.isfinite(loss):  # the library would go on
            raise _NotFinite
        return loss

    def stream() -> Iterator[Batch]:
        steps = (batch for epoch in itertools.count() for batch in batches.epoch(epoch))
        for done, batch in enumerate(steps):
            progress(done, num_iter)
            yield batch

    state.model.forward = autocast(recipe, device)(state.model.forward)  # type: ignore[method-assign]
    finder = LRFinder(state.model, state.optimizer, finite_loss, device=device)
    quiet = mock.patch.object(library, "tqdm", lambda steps: steps), contextlib.redirect_stdout(io.StringIO())
    with torch.random.fork_rng(devices=[]), quiet[0], quiet[1], contextlib.suppress(_NotFinite):
        finder.range_test(
            TrainDataLoaderIter(stream()), start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode, smooth_f=0
        )
    progress(num_iter, num_iter)
    lr, loss = (np.array(finder.history[key]) for key in ("lr", "loss"))
    if len(loss) < MIN_POINTS:
        raise CifarResnetError(
            f"the range test has only {len(loss)} points before the loss diverged, and needs {MIN_POINTS}: "
            f"give more --num-iter than {num_iter}, or a lower --start-lr than {start_lr:g}"
        )
    return History(lr, loss)


class _NotFinite(Exception):
    pass


def suggest(history: History) -> Suggestions:
    """Reads the suggestions off a range test.

    The loss counts as leaving its bottom where the smoothed loss first stands above its lowest value so far by a quarter of
    its fall so far, and by more than noise; where it falls again after that does not count. `max_lr` is the
    highest learning rate before at which it is within 5 % of its whole fall from the lowest; `min_lr` is the lowest at
    which it has fallen by 5 % of it. Neither is recommended where the loss never falls, or falls to the end of the range.
    """
    lr, level = history.lr, smooth(history.loss)
    lagging = exponential(history.loss)
    inner = slice(10, -5)  # as LRFinder.plot skips them
    steepest = lr[inner][np.gradient(lagging[inner]).argmin()]
    lowest_yet, highest_yet = np.minimum.accumulate(level), np.maximum.accumulate(level)
    rise, fall = level - lowest_yet, highest_yet - lowest_yet
    noise = np.maximum(2 * np.median(np.abs(history.loss - level)), 0.005 * np.abs(lowest_yet))
    left = np.flatnonzero((rise > noise) & (rise > 0.25 * fall))
    end = int(left[0]) if len(left) else len(lr)
    lowest = int(level[:end].argmin())
    top = int(level[: lowest + 1].argmax())
    drop = level[top] - level[lowest]
    max_lr = min_lr = why_not = None
    if drop <= 3 * noise[lowest]:
        why_not = "the loss never fell clearly; try a lower --start-lr, or more --num-iter"
    elif lowest == len(lr) - 1:
        why_not = "the loss fell to the end of the range; try a higher --end-lr"
    else:
        begun = top + np.flatnonzero(level[top : lowest + 1] <= level[top] - SHARE * drop)[0]
        past = np.flatnonzero(level[lowest:] > level[lowest] + SHARE * drop)
        max_lr, min_lr = float(lr[lowest + past[0] - 1 if len(past) else -1]), float(lr[begun])
    return Suggestions(float(steepest), float(lr[valley(lagging)]), float(lr[lagging.argmin()] / 10), max_lr, min_lr, why_not)


def exponential(loss: np.ndarray, weight: float = 0.05) -> np.ndarray:
    """torch-lr-finder's smoothing: each value moves the last one by `weight`. It lags behind the loss."""
    smoothed = loss.astype(float).copy()
    for i in range(1, len(smoothed)):
        smoothed[i] = weight * smoothed[i] + (1 - weight) * smoothed[i - 1]
    return smoothed


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
