"""Batches for the loop: whole-split tensors on the device, or Albumentations behind a DataLoader.

What a batch holds depends on (seed, epoch, step) and nothing else, so a run can be resumed in the middle of an
epoch, and any number of workers gives the same batches. Of several ranks each gets its share of every training batch.
"""

from __future__ import annotations

import atexit
import math
import os
import random
import signal
import weakref
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .data import Split, hole_pixel, pad_pixel, test_transform, train_transform
from .distributed import share
from .errors import UsageError
from .recipe import Recipe

ORDER, AUGMENT, FIRST_FLIP = 0, 1, 2  # purposes of a random stream
Batch = tuple[Tensor, Tensor]  # images, float32 (B, 3, 32, 32) in channels-last layout; labels, int64 (B,)


def stream(recipe: Recipe, epoch: int, step: int, purpose: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((recipe.seed, epoch, step, purpose))


def epoch_order(recipe: Recipe, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch shows its `count` images."""
    return np.random.default_rng(stream(recipe, epoch, 0, ORDER)).permutation(count)


def alternating_flips(recipe: Recipe, epoch: int, count: int) -> np.ndarray:
    """Which of a split's `count` images are shown mirrored: a random half in even epochs, the other half in odd ones.

    Two epochs in a row so show both views of every image (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.6).
    """
    return (np.random.default_rng(stream(recipe, 0, 0, FIRST_FLIP)).random(count) < 0.5) ^ bool(epoch % 2)


class Batches(Protocol):
    """Training batches, epoch by epoch, and evaluation batches of the same images."""

    count: int  # images
    steps: int  # an epoch has
    options: dict[str, object]  # the run options that they came from

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]: ...

    def plain(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order, normalised only."""
        ...

    def close(self) -> None:
        """Ends what loads, inside an epoch too. To be called: what an exception holds on to is not ended with it."""


class Choices(NamedTuple):
    """What augmentation does to each image of a batch of B."""

    offsets: Tensor  # int64 (B, 2): top and left of the crop in the padded image
    flips: Tensor  # bool (B,)
    holes: Tensor  # int64 (B, holes, 2): top and left in the cropped image; -32, -32 for none


def draw(recipe: Recipe, epoch: int, step: int, count: int) -> Choices:
    """The augmentations of a batch of `count` images, each image's independent of the others'."""
    rng = np.random.default_rng(stream(recipe, epoch, step, AUGMENT))
    offsets = rng.integers(0, 2 * recipe.pad + 1, (count, 2))
    flips = rng.random(count) < recipe.flip_probability
    holes = rng.integers(0, 32 - recipe.cutout_size + 1, (count, recipe.cutout_count, 2))
    holes[rng.random(count) >= recipe.cutout_probability] = -32
    return Choices(*(torch.from_numpy(array) for array in (offsets, flips, holes)))


class TensorBatches:
    """The whole split once on the device as uint8, augmented a batch at a time."""

    def __init__(self, split: Split, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.options: dict[str, object] = {"loader": "tensor"}
        self.images = torch.from_numpy(split.images).to(device)  # (N, 32, 32, 3)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.count, self.steps = len(split), math.ceil(len(split) / recipe.batch_size)
        # As albumentations.Normalize does it, so that both loaders give the same bits.
        self.mean = torch.tensor(recipe.mean, device=device) * 255
        self.scale = 1 / (torch.tensor(recipe.std, device=device) * 255)
        self.hole = torch.tensor(hole_pixel(recipe), dtype=torch.uint8, device=device)
        self.fill = torch.tensor(pad_pixel(recipe), dtype=torch.uint8, device=device)
        self.range = torch.arange(32, device=device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order, size = torch.from_numpy(epoch_order(self.recipe, epoch, self.count)), self.recipe.batch_size
        turned = torch.from_numpy(alternating_flips(self.recipe, epoch, self.count)) if self.recipe.alternates else None
        for step in range(first_step, self.steps):
            index = order[step * size : (step + 1) * size]
            choices, mine = draw(self.recipe, epoch, step, len(index)), share(len(index))
            if turned is not None:
                choices = choices._replace(flips=turned[index])
            index, *sent = (self.send(each[mine]) for each in (index, *choices))
            yield self.augment(index, Choices(*sent)), self.labels[index]

    def send(self, tensor: Tensor) -> Tensor:
        """To the device; from pinned memory, as a GPU would otherwise be waited for."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)

    def augment(self, index: Tensor, choices: Choices) -> Tensor:
        """Pad, crop and flip as one gather by rows and columns, then holes, then normalise."""
        rows, columns = (self.range + choices.offsets[:, axis, None] - self.recipe.pad for axis in (0, 1))  # (B, 32)
        columns = torch.where(choices.flips[:, None], columns.flip(1), columns)
        if self.recipe.pad_mode == "reflect":
            images = self.images[index[:, None, None], reflect(rows)[:, :, None], reflect(columns)[:, None, :]]
        else:
            inside = (rows == rows.clamp(0, 31))[:, :, None] & (columns == columns.clamp(0, 31))[:, None, :]
            images = self.images[index[:, None, None], rows.clamp(0, 31)[:, :, None], columns.clamp(0, 31)[:, None, :]]
            images = torch.where(inside[..., None], images, self.fill)
        for top, left in (hole.unbind(1) for hole in choices.holes.unbind(1)):
            in_rows, in_columns = (
                (self.range >= start[:, None]) & (self.range < start[:, None] + self.recipe.cutout_size) for start in (top, left)
            )
            images = torch.where((in_rows[:, :, None] & in_columns[:, None, :])[..., None], self.hole, images)
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32), channels last in memory as they were."""
        return ((images.float() - self.mean) * self.scale).permute(0, 3, 1, 2)

    def plain(self, batch_size: int) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield self.normalise(images), labels

    def close(self) -> None:
        pass


def reflect(position: Tensor) -> Tensor:
    """Positions outside 0 to 31 mirrored at the edge pixels, which are not repeated."""
    position = position.abs()
    return torch.where(position > 31, 62 - position, position)


class AlbumentationsBatches:
    """Albumentations, image by image, in a DataLoader with `workers` processes (0: in this one)."""

    def __init__(self, split: Split, recipe: Recipe, device: torch.device, workers: int) -> None:
        self.recipe, self.device = recipe, device
        self.options: dict[str, object] = {"loader": "albumentations", "workers": workers}
        self.count, self.steps = len(split), math.ceil(len(split) / recipe.batch_size)
        self.order = _Order()
        self.loader = torch.utils.data.DataLoader(
            _Augmented(split, recipe, shared=workers > 0),
            sampler=self.order,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=give_way if device.type == "cpu" else leave_signals,
            pin_memory=device.type == "cuda",
        )
        atexit.register(_close, weakref.ref(self))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order, size = epoch_order(self.recipe, epoch, self.count), self.recipe.batch_size
        rows = np.split(order, range(size, self.count, size))
        return self._batches([(epoch, k, rows[k], share(len(rows[k]))) for k in range(first_step, self.steps)])

    def plain(self, batch_size: int) -> Iterator[Batch]:
        starts = range(0, self.count, batch_size)
        return self._batches([(None, 0, np.arange(self.count)[start : start + batch_size], slice(None)) for start in starts])

    def _batches(self, keys: list) -> Iterator[Batch]:
        self.order.keys = keys
        for images, labels in self.loader:
            images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield images, labels.to(self.device, non_blocking=True)

    def close(self) -> None:
        if stop := getattr(self.loader._iterator, "_shutdown_workers", None):  # torch has no public way
            stop()
        self.loader._iterator = None


def _close(reference: weakref.ref) -> None:
    if batches := reference():
        batches.close()


def leave_signals(_worker: int) -> None:
    """Ctrl-C, or a SIGTERM to the whole group, reaches the workers too: the training process, whose step needs them, ends
    them. Of a SIGTERM they die half a minute later, so that nobody who waits for them waits for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def give_way(worker: int) -> None:
    """Works while the training process leaves a core free: a convolution is as slow as its slowest thread."""
    leave_signals(worker)
    os.nice(19)


class _Order(torch.utils.data.Sampler):
    """Hands the workers (epoch, step, indices, slice of them to load), a batch each."""

    keys: list = []

    def __iter__(self) -> Iterator:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Augmented(torch.utils.data.Dataset):
    def __init__(self, split: Split, recipe: Recipe, shared: bool) -> None:
        self.images = torch.from_numpy(split.images)
        if shared:  # kept once, however many workers there are and however they are started
            self.images = self.images.share_memory_()
        self.labels = torch.from_numpy(split.labels)
        self.recipe, self.train, self.test = recipe, train_transform(recipe), test_transform(recipe)

    def __getitem__(self, key: tuple) -> Batch:
        epoch, step, batch, mine = key
        images, labels = self.images.numpy()[batch[mine]], self.labels[batch[mine]]
        if epoch is None:
            return torch.stack([self.test(image=image)["image"] for image in images]), labels
        if self.recipe.alternates:
            turned = alternating_flips(self.recipe, epoch, len(self.labels))[batch[mine]]
            images[turned] = images[turned, :, ::-1]
        seeds = image_seeds(self.recipe, epoch, step, len(batch))[mine]
        return torch.stack([augmented(self.train, *each)["image"] for each in zip(images, seeds, strict=True)]), labels


def image_seeds(recipe: Recipe, epoch: int, step: int, count: int) -> list[int]:
    """A seed for each image of a batch of `count`."""
    return np.random.default_rng(stream(recipe, epoch, step, AUGMENT)).integers(2**63, size=count).tolist()


def augmented(pipeline, image: np.ndarray, seed: int) -> dict:
    """What an Albumentations pipeline makes of an image, its transforms taking turns at one stream from this seed.

    `Compose.set_random_seed` would start a stream for each at the same place: a flip and a hole of equal probability
    would then always come together.
    """
    pipeline.set_random_state(np.random.Generator(np.random.PCG64(seed)), random.Random(seed))
    return pipeline(image=image)


def make_batches(split: Split, recipe: Recipe, device: torch.device, loader: str = "auto", workers: int | None = None) -> Batches:
    """`loader`: "tensor", "albumentations", or "auto" (tensor). `workers`: None for one on a CPU, four beside a GPU.

    Raises:
        UsageError: there is no such loader, or workers are below 0.
    """
    if loader not in ("auto", "tensor", "albumentations"):
        raise UsageError(f"--loader {loader}: it is auto, tensor or albumentations")
    if workers is not None and workers < 0:
        raise UsageError(f"--workers {workers} must be at least 0")
    if workers is not None and loader != "albumentations":
        raise UsageError(f"--workers {workers} needs --loader albumentations: the tensor loader has no workers")
    if loader == "albumentations":
        workers = (1 if device.type == "cpu" else 4) if workers is None else workers
        return AlbumentationsBatches(split, recipe, device, workers)
    return TensorBatches(split, recipe, device)
