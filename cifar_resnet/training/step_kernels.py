"""What surrounds the network in a step, as Triton kernels for a GPU: its batch, its loss, and what is counted of it.

In torch's own words these are about seventy launches of next to nothing, each followed by a pause. Here they are three. Like all of our
kernels they are for steps in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.loaders import Batch, TensorLoader
from ..recipe import Recipe
from .kernels import Kernel, jit, tl, triton, triton_works, worth_launching

MOST_CLASSES = 128  # one program takes the loss of all images
TILE = 4096  # logits at a time


@Kernel
def _augment(
    images: tl.tensor, labels: tl.tensor, table: tl.tensor, starts: tl.tensor, step: tl.tensor, source: tl.tensor,
    hole: tl.tensor, fill: tl.tensor, mean: tl.tensor, scale: tl.tensor, out: tl.tensor, out_labels: tl.tensor,
    first: int, pad: tl.constexpr, holes: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """An image a program, as `TensorAugmentation` makes it; there is a `fill` where places beside the image are of one colour."""
    number = tl.program_id(0).to(tl.int64)
    row = table + (tl.load(starts + tl.load(step)) + first + number) * (4 + 2 * holes)
    index = tl.load(row).to(tl.int64)
    tl.store(out_labels + number, tl.load(labels + index))
    pixel = tl.arange(0, 1024)
    y, x = pixel // 32, pixel % 32
    covered = pixel < 0
    for each in tl.static_range(holes):
        top, left = tl.load(row + 4 + 2 * each), tl.load(row + 5 + 2 * each)
        covered |= (y >= top) & (y < top + size) & (x >= left) & (x < left + size)
    padded_y, padded_x = tl.load(row + 1) + y, tl.load(row + 2) + tl.where(tl.load(row + 3) != 0, 31 - x, x)
    source_y, source_x = tl.load(source + padded_y), tl.load(source + padded_x)
    inside = (source_y == padded_y - pad) & (source_x == padded_x - pad)
    for channel in tl.static_range(3):
        value = tl.load(images + (index * 1024 + source_y * 32 + source_x) * 3 + channel)
        if fill is not None:
            value = tl.where(inside, value, tl.load(fill + channel))
        value = tl.where(covered, tl.load(hole + channel), value).to(tl.float32)
        at = (number * 1024 + pixel) * 3 + channel
        tl.store(out + at, (value - tl.load(mean + channel)) * tl.load(scale + channel))


@jit
def _logits(output: tl.tensor, row: tl.tensor, column: tl.tensor, there: tl.tensor, classes: int) -> Any:
    """Of a tile: float32, of a column beyond the last class minus infinity, of a row beyond the last image 0."""
    x = tl.load(output + row * classes + column, mask=there, other=0.0).to(tl.float32)
    return tl.where(column < classes, x, float("-inf"))


@Kernel
def _cross_entropy(
    output: tl.tensor, labels: tl.tensor, loss: tl.tensor, gradient: tl.tensor, rows: int, classes: int,
    weight: float, smoothing: float, ROWS: tl.constexpr, CLASSES: tl.constexpr,
) -> None:  # fmt: skip
    """One program for all rows: their mean loss, and the gradient of `weight` times that."""
    column, total = tl.arange(0, CLASSES)[None, :], 0.0
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (column < classes)
        x = _logits(output, row, column, there, classes)
        x -= tl.max(x, 1, keep_dims=True)
        log_p = x - tl.log(tl.sum(tl.exp(x), 1, keep_dims=True))
        right = column == tl.load(labels + row, mask=row < rows, other=-1)
        wanted = tl.where(right, 1 - smoothing, 0.0) + smoothing / classes
        total -= tl.sum(tl.where(there & (wanted > 0), wanted * log_p, 0.0))
        tl.store(gradient + row * classes + column, (tl.exp(log_p) - wanted) * (weight / rows), mask=there)
    tl.store(loss, total / rows)


@Kernel
def _count(
    output: tl.tensor, labels: tl.tensor, loss: tl.tensor, totals: tl.tensor, bad_step: tl.tensor, step: tl.tensor,
    rows: int, classes: int, ROWS: tl.constexpr, CLASSES: tl.constexpr,
) -> None:  # fmt: skip
    """One program for all rows: adds loss and hits to the totals, and keeps the first step whose loss is not finite."""
    column, hits = tl.arange(0, CLASSES)[None, :], 0
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (column < classes)
        x = _logits(output, row, column, there, classes)
        label = tl.load(labels + row, mask=row < rows, other=-1)
        hits += tl.sum((tl.argmax(x, 1, keep_dims=True) == label).to(tl.int32))
    mean, bad = tl.load(loss), tl.load(bad_step)
    tl.store(totals, tl.load(totals) + mean * rows)
    tl.store(totals + 1, tl.load(totals + 1) + hits)
    tl.store(bad_step, tl.where((bad < 0) & (mean - mean != 0), tl.load(step), bad))


def usable_loader(loader: TensorLoader) -> bool:
    """Whether `batch` can stand for the loader's own."""
    return worth_launching() and triton_works(loader.images.device)


def batch(loader: TensorLoader, table: Tensor, step: Tensor, size: int) -> Batch:
    """`loader.batch`, of a step that is a tensor on the device."""
    recipe, augment, mine = loader.recipe, loader.augment, loader.share.of(size)
    images = torch.empty(mine.stop - mine.start, 32, 32, 3, device=loader.device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=loader.device)  # labels too while kernels are only built
    split = loader.images, loader.labels, table, loader.starts_on_device, step
    fill = None if recipe.pad_mode == "reflect" else augment.fill
    pixels = augment.source, augment.hole, fill, augment.mean, augment.scale
    sizes = dict(pad=recipe.pad, holes=recipe.cutout_count, size=recipe.cutout_size)
    _augment[len(images),](*split, *pixels, images, labels, mine.start, **sizes)
    return Batch(images.permute(0, 3, 1, 2), labels, loader.weight(size))


def usable(recipe: Recipe, output: Tensor) -> bool:
    """Whether `cross_entropy` and `count` can stand for torch's own operations on this output, (B, classes)."""
    fits = output.shape[1] <= MOST_CLASSES and output.is_contiguous()
    return worth_launching() and fits and triton_works(output.device)


def _tile(output: Tensor) -> dict[str, Any]:
    classes = triton.next_power_of_2(output.shape[1])
    return {"ROWS": max(1, TILE // classes), "CLASSES": classes, "num_warps": 8}


def cross_entropy(recipe: Recipe, output: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The recipe's cross entropy of logits (B, classes), float32 (), and the gradient of `weight` times that, as the logits."""
    loss, gradient = torch.empty((), device=output.device), torch.empty_like(output)
    _cross_entropy[1,](output, labels, loss, gradient, *output.shape, weight, recipe.label_smoothing, **_tile(output))
    return loss, gradient


def count(output: Tensor, labels: Tensor, loss: Tensor, totals: Tensor, bad_step: Tensor, step: int | Tensor) -> None:
    """Adds the sum of the losses, and the hits, of a batch to the totals, float64 (2,), and keeps the first step of a bad loss."""
    number = step if isinstance(step, Tensor) else torch.full((), step, device=output.device)
    _count[1,](output, labels, loss, totals, bad_step, number, *output.shape, **_tile(output))
