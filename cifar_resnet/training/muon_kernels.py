"""Muon's three element-wise passes over all kernels, as Triton kernels for a GPU: everything else that it does are products.

In torch's own words each takes many passes over all weights, which is most of Muon's time on a GPU. Here one launch goes through all
kernels: a program has a block of one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import jit, tl, triton, triton_works, worth_launching

BLOCK = 4096


@jit
def _momentum_kernel(
    gradients: tl.tuple, buffers: tl.tuple, kernels: tl.tuple, moves: tl.tuple, squares: tl.tensor, counts: tl.tuple, rows: int, momentum: float,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Leaves the sums of the squares of move and kernel in `squares`, (2, kernels, rows), one for each block."""
    i = tl.program_id(1)
    gradient, buffer, kernel, move, count = gradients[0], buffers[0], kernels[0], moves[0], counts[0]
    for j in tl.static_range(1, len(counts)):
        if i == j:
            gradient, buffer, kernel, move, count = gradients[j], buffers[j], kernels[j], moves[j], counts[j]
    if tl.program_id(0) * BLOCK < count:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(gradient + at, mask=inside, other=0.0)
        b = momentum * tl.load(buffer + at, mask=inside, other=0.0) + g
        m = (g + momentum * b).to(move.dtype.element_ty)
        w = tl.load(kernel + at, mask=inside, other=0.0)
        tl.store(buffer + at, b, mask=inside)
        tl.store(move + at, m, mask=inside)
        place = squares + i * rows + tl.program_id(0)
        tl.store(place, tl.sum(m.to(tl.float32) * m.to(tl.float32), 0))
        tl.store(place + len(counts) * rows, tl.sum(w * w, 0))


@jit
def _norm(squares: tl.tensor, count: int, BLOCK: tl.constexpr, MOST: tl.constexpr) -> Any:
    """The square root of the sum over the blocks of a matrix."""
    block = tl.arange(0, MOST)
    return tl.sqrt(tl.sum(tl.load(squares + block, mask=block < tl.cdiv(count, BLOCK), other=0.0), 0))


@jit
def _scale_kernel(
    moves: tl.tuple, squares: tl.tensor, counts: tl.tuple, rows: int, BLOCK: tl.constexpr, MOST: tl.constexpr
) -> None:
    """Scales the moves to the norm 1."""
    i = tl.program_id(1)
    move, count = moves[0], counts[0]
    for j in tl.static_range(1, len(counts)):
        if i == j:
            move, count = moves[j], counts[j]
    if tl.program_id(0) * BLOCK < count:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        norm = _norm(squares + i * rows, count, BLOCK, MOST)
        m = tl.load(move + at, mask=at < count).to(tl.float32)
        tl.store(move + at, m / (norm + 1e-7), mask=at < count)


@jit
def _move_kernel(
    kernels: tl.tuple, directions: tl.tuple, squares: tl.tensor, lr: tl.tensor, factor: float, counts: tl.tuple, outputs: tl.tuple, rows: int,
    BLOCK: tl.constexpr, MOST: tl.constexpr,
) -> None:  # fmt: skip
    """Scales the kernels to the norm sqrt(outputs), and moves them."""
    i = tl.program_id(1)
    kernel, direction, count, output = kernels[0], directions[0], counts[0], outputs[0]
    for j in tl.static_range(1, len(counts)):
        if i == j:
            kernel, direction, count, output = kernels[j], directions[j], counts[j], outputs[j]
    if tl.program_id(0) * BLOCK < count:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        norm = _norm(squares + (len(counts) + i) * rows, count, BLOCK, MOST)
        d = tl.load(direction + at, mask=at < count).to(tl.float32)
        w = tl.load(kernel + at, mask=at < count) * (tl.sqrt(output.to(tl.float32)) / norm) - tl.load(lr) * factor * d
        tl.store(kernel + at, w, mask=at < count)


def usable(dtype: torch.dtype, *groups: list[Tensor]) -> bool:
    """Whether these are kernels in float32, in channels-last memory, on a GPU for which Triton builds in this dtype; for a graph."""
    return (
        worth_launching()
        and all(
            each.dtype == torch.float32 and each.is_contiguous(memory_format=torch.channels_last)
            for group in groups
            for each in group
        )
        and triton_works(groups[0][0].device, dtype)
    )


def add_momentum(
    gradients: list[Tensor], buffers: list[Tensor], kernels: list[Tensor], moves: list[Tensor], momentum: float
) -> Tensor:
    """buffer = momentum * buffer + gradient; move = gradient + momentum * buffer, Nesterov's, scaled to the norm 1.

    Each of the four has its numbers in the same order in memory.

    Returns:
        What `move_kernels` needs to know of the kernels.
    """
    counts = tuple(each.numel() for each in kernels)
    rows = triton.cdiv(max(counts), BLOCK)
    squares, grid = torch.empty(2, len(counts), rows, device=kernels[0].device), (rows, len(counts))
    lists = tuple(gradients), tuple(buffers), tuple(kernels), tuple(moves)
    _momentum_kernel[grid](*lists, squares, counts, rows, momentum, BLOCK=BLOCK)
    _scale_kernel[grid](tuple(moves), squares, counts, rows, BLOCK=BLOCK, MOST=triton.next_power_of_2(rows))
    return squares


def move_kernels(kernels: list[Tensor], directions: list[Tensor], squares: Tensor, lr: float | Tensor, factor: float) -> None:
    """kernel = sqrt(outputs) / norm(kernel) * kernel - lr * factor * direction; `squares` are from `add_momentum`."""
    counts, outputs = tuple(each.numel() for each in kernels), tuple(len(each) for each in kernels)
    rows, lists = squares.shape[2], (tuple(kernels), tuple(directions))
    rate: Any = lr if isinstance(lr, Tensor) else torch.full((), lr, device=squares.device)
    sizes = {"BLOCK": BLOCK, "MOST": triton.next_power_of_2(rows)}
    _move_kernel[rows, len(counts)](*lists, squares, rate, factor, counts, outputs, rows, **sizes)
