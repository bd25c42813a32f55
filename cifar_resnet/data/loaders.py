"""Batches for the loop: whole-split tensors on the device, or Albumentations behind a DataLoader.

What a batch holds depends on (seed, epoch, step) and nothing else, so a run can be resumed in the middle of an
epoch, and any number of workers gives the same batches. Of several ranks each gets its share of every training batch.
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..arguments import LoaderKind
from ..errors import UsageError, check_choice
from ..recipe import Recipe
from ..signals import ENDING
from .augment import Choices, TensorAugmentation, alternating_flips, augmented, draw, image_seeds, stream, train_transform
from .splits import Split

ORDER = 0  # purpose of a random stream
EVALUATION_BATCH = 1000
MOST_WORKERS = 256


class Batch(NamedTuple):
    """A rank's share of a training batch, or evaluation images."""

    images: Tensor  # float32 (B, 3, 32, 32) in channels-last layout
    labels: Tensor  # int64 (B,)
    weight: float = 1.0  # of this share's mean loss; over the ranks, and the steps of an epoch, the weights have the mean 1

    def __repr__(self) -> str:
        return f"Batch({len(self.labels)} images on {self.images.device})"


class Share(NamedTuple):
    """Which part of every batch this process trains on: part `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1

    def of(self, count: int) -> slice:
        """This rank's of `count` images: consecutive ones, as many as any other rank's or one more."""
        return slice(count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks)

    def weight(self, count: int) -> float:
        """Of the mean loss over this rank's of `count` images: with it the ranks' mean gradient is the whole batch's."""
        mine = self.of(count)
        return (mine.stop - mine.start) * self.ranks / count


WHOLE = Share()


def batch_sizes(recipe: Recipe, count: int) -> list[int]:
    """Images in each step of an epoch of `count` images, over all ranks; the larger steps come first."""
    steps = math.ceil(count / recipe.batch_size)
    if recipe.batches == "even":
        return [count // steps + (step < count % steps) for step in range(steps)]
    return [min(recipe.batch_size, count - step * recipe.batch_size) for step in range(steps)]


def check_batches(recipe: Recipe, count: int, ranks: int = 1, least: int = 2) -> None:
    """Whether each rank gets `least` images at every step. The statistics of one image alone are no statistics of the data.

    Raises:
        UsageError: says so, or that a batch has more than all images; names a batch size that would do, where there is one.
    """
    if recipe.batch_size > count:
        raise UsageError(f"--batch-size {recipe.batch_size} is more than the {count} training images; give a smaller one")

    def fewest(size: int) -> int:
        return min(batch_sizes(recipe.replace(batch_size=size), count)) // ranks

    if (found := fewest(recipe.batch_size)) < least:
        size = next((size for size in range(recipe.batch_size + 1, count + 1) if fewest(size) >= least), None)
        process = f" for each of {ranks} processes" if ranks > 1 else ""
        step = f"of {count} training images a step would have only {found}{process}, and each step needs at least {least}"
        advice = f"--batch-size {size} would do" if size else "train on more images"
        raise UsageError(f"--batch-size {recipe.batch_size}: {step}; {advice}")


def epoch_order(recipe: Recipe, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch shows its `count` images."""
    return stream(recipe, epoch, 0, ORDER).permutation(count)


class Loader:
    """Training batches, epoch by epoch."""

    options: dict[str, Any]  # the run options that it came from

    def __init__(self, recipe: Recipe, count: int, device: torch.device, share: Share) -> None:
        self.recipe, self.count, self.device, self.share = recipe, count, device, share
        self.sizes = batch_sizes(recipe, count)
        self.steps = len(self.sizes)  # an epoch has
        self.starts = [0, *itertools.accumulate(self.sizes[:-1])]  # of each step in the epoch's order

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from 0, that are left from this step on."""
        raise NotImplementedError

    def weight(self, size: int) -> float:
        """Of this rank's share of a step of `size` images."""
        of_step = size * self.steps / self.count if self.recipe.batches == "even" else 1.0
        return of_step * self.share.weight(size)

    def close(self) -> None:
        """Ends the workers, inside an epoch too. To be called: what an exception holds on to is not ended with it."""


class TensorLoader(Loader):
    """The whole split once on the device as uint8, augmented a batch at a time. It also gives the batches of evaluations."""

    def __init__(self, split: Split, recipe: Recipe, device: torch.device, share: Share = WHOLE) -> None:
        super().__init__(recipe, len(split), device, share)
        self.options = {"loader": "tensor"}
        self.images = torch.from_numpy(split.images).to(device).contiguous()  # (N, 32, 32, 3)
        self.labels = torch.from_numpy(split.labels).to(device).contiguous()
        self.starts_on_device = torch.tensor(self.starts, device=device)
        self.augment = TensorAugmentation(recipe, device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        table = self.send(self.draw(epoch))
        return (self.batch(table, step, self.sizes[step]) for step in range(first_step, self.steps))

    def draw(self, epoch: int) -> Tensor:
        """All that an epoch chooses at random, int32 (N, 4 + 2 * holes) on the CPU, a row an image in the epoch's order.

        A row holds the image's index, top and left of its crop, whether it is flipped, and top and left of each hole.
        """
        recipe, order = self.recipe, torch.from_numpy(epoch_order(self.recipe, epoch, self.count))
        drawn = [draw(recipe, epoch, step, size) for step, size in enumerate(self.sizes)]
        offsets, flips, holes = (torch.cat(each) for each in zip(*drawn, strict=True))
        if recipe.alternates:
            flips = torch.from_numpy(alternating_flips(recipe, epoch, self.count))[order]
        return torch.cat([order[:, None], offsets, flips[:, None], holes.flatten(1)], dim=1).int()

    def send(self, table: Tensor) -> Tensor:
        """To the device; from pinned memory, as a GPU would otherwise be waited for."""
        return table.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else table.to(self.device)

    def batch(self, table: Tensor, step: int | Tensor, size: int) -> Batch:
        """This rank's share of the batch of a step, of `size` images; `table` is `draw`'s, on the device.

        The step may be an int64 tensor () on the device: then nothing here depends on its value but what is computed there.
        """
        mine = self.share.of(size)
        start = torch.take(self.starts_on_device, step) if isinstance(step, Tensor) else self.starts[step]
        rows = torch.arange(mine.start, mine.stop, device=self.device) + start
        row = table[rows].long()
        choices = Choices(row[:, 1:3], row[:, 3].bool(), row[:, 4:].unflatten(1, (self.recipe.cutout_count, 2)))
        return Batch(self.augment(self.images, row[:, 0], choices), self.labels[row[:, 0]], self.weight(size))

    def plain(self, batch_size: int = EVALUATION_BATCH) -> Iterator[Batch]:
        """Every image once, in order, normalised only."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield Batch(self.augment.normalise(images), labels)


class AlbumentationsLoader(Loader):
    """Albumentations, image by image, in a DataLoader with `workers` processes (0: in this one)."""

    def __init__(self, split: Split, recipe: Recipe, device: torch.device, workers: int, share: Share = WHOLE) -> None:
        super().__init__(recipe, len(split), device, share)
        self.options = {"loader": "albumentations", "workers": workers}
        self.order = list[tuple]()  # (epoch, step, indices, slice of them to load) of each batch
        self.loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
            _Augmented(split, recipe, shared=workers > 0),
            sampler=self.order,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=give_way if device.type == "cpu" else leave_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from torch's own
        )
        atexit.register(_close, weakref.ref(self))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        pinned = self.device.type == "cuda"
        rows = np.split(epoch_order(self.recipe, epoch, self.count), self.starts[1:])
        self.order[:] = [(epoch, k, rows[k], self.share.of(self.sizes[k])) for k in range(first_step, self.steps)]
        for (images, labels), size in zip(self.loader, self.sizes[first_step:], strict=True):
            images = images.to(self.device, non_blocking=pinned, memory_format=torch.channels_last)
            yield Batch(images, labels.to(self.device, non_blocking=pinned), self.weight(size))

    def close(self) -> None:
        if stop := getattr(self.loader._iterator, "_shutdown_workers", None):  # torch has no public way
            stop()
        self.loader._iterator = None


def _close(reference: weakref.ref) -> None:
    if loader := reference():
        loader.close()


def leave_signals(_worker: int) -> None:
    """Workers ignore Ctrl-C and other signals that reach the whole group: the training process still needs them for its step, and
    then ends them. After SIGTERM they end 30 seconds later, in case it never does."""
    for name in ENDING:
        if hasattr(signal, name) and name != "SIGTERM":  # a forked worker has the handlers of the training process
            signal.signal(getattr(signal, name), signal.SIG_DFL if name == "SIGALRM" else signal.SIG_IGN)
    if sys.platform != "win32":  # where a SIGTERM ends a process at once
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def give_way(worker: int) -> None:
    """Works while the training process leaves a core free: a convolution is as slow as its slowest thread."""
    leave_signals(worker)
    if sys.platform != "win32":
        os.nice(19)


class _Augmented(torch.utils.data.Dataset):
    def __init__(self, split: Split, recipe: Recipe, shared: bool) -> None:
        self.images = torch.from_numpy(split.images)
        if shared:  # kept once, however many workers there are and however they are started
            self.images = self.images.share_memory_()
        self.labels = torch.from_numpy(split.labels)
        self.recipe, self.transform = recipe, train_transform(recipe)

    def __getitem__(self, key: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        epoch, step, batch, mine = key
        images, labels = self.images.numpy()[batch[mine]], self.labels[batch[mine]]
        if self.recipe.alternates:
            turned = alternating_flips(self.recipe, epoch, len(self.labels))[batch[mine]]
            images[turned] = images[turned, :, ::-1]
        seeds = image_seeds(self.recipe, epoch, step, len(batch))[mine]
        return torch.stack([augmented(self.transform, *each)["image"] for each in zip(images, seeds, strict=True)]), labels


def make_loader(
    split: Split, recipe: Recipe, device: torch.device, loader: str = "auto", workers: int | None = None, share: Share = WHOLE
) -> Loader:
    """`loader`: "tensor", "albumentations", or "auto" (tensor). `workers`: None for one on a CPU, four beside a GPU.

    Raises:
        UsageError: as from `check_loader`.
    """
    check_loader(loader, workers)
    if loader == "albumentations":
        workers = (1 if device.type == "cpu" else 4) if workers is None else workers
        return AlbumentationsLoader(split, recipe, device, workers, share)
    return TensorLoader(split, recipe, device, share)


def check_loader(loader: str, workers: int | None) -> None:
    """Whether these options go together.

    Raises:
        UsageError: there is no such loader, it takes no workers, or their number is not 0 to 256.
    """
    check_choice("loader", loader, *get_args(LoaderKind))
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        raise UsageError(f"--workers {workers} must be 0 to {MOST_WORKERS}")
    if workers is not None and loader != "albumentations":
        raise UsageError(f"--workers {workers} needs --loader albumentations: the tensor loader has no workers")
