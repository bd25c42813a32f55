"""Muon's three element-wise passes over all kernels, as Triton kernels for a GPU: everything else that it does are products.

In torch's own words each takes many passes over all weights, which is most of Muon's time on a GPU. Here one launch goes through all
kernels: a program has a block of one of them.
"""

from __future__ import annotations

from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from .kernels import Kernel, jit, tl, triton, triton_works, worth_launching

BLOCK = 4096


@jit
def _mine(each: tl.tuple, starts: tl.tuple, BLOCK: tl.constexpr) -> Any:
    """What belongs to the kernel that this program has a block of."""
    found = each[0]
    for i in tl.static_range(1, len(each)):
        if tl.program_id(0) >= starts[i] // BLOCK:
            found = each[i]
    return found


@jit
def _block(starts: tl.tuple, counts: tl.tuple, BLOCK: tl.constexpr) -> Any:
    """The offsets of this program's block in its kernel, and which exist."""
    number = tl.program_id(0) - _mine(starts, starts, BLOCK) // BLOCK
    at = number * BLOCK + tl.arange(0, BLOCK)  # a multiple, as the compiler sees: it then moves four numbers at once
    return at, at < _mine(counts, starts, BLOCK)


@jit
def _norm(squares: tl.tensor, starts: tl.tuple, counts: tl.tuple, BLOCK: tl.constexpr) -> Any:
    """Of this program's kernel: the square root of the sum of what its blocks left in `squares`."""
    squares += _mine(starts, starts, BLOCK) // BLOCK
    blocks, total = tl.cdiv(_mine(counts, starts, BLOCK), BLOCK), 0.0
    for start in range(0, blocks, 1024):
        block = start + tl.arange(0, 1024)
        total += tl.sum(tl.load(squares + block, mask=block < blocks, other=0.0), 0)
    return tl.sqrt(total)


@Kernel
def _momentum_kernel(
    gradients: tl.tuple, buffers: tl.tuple, kernels: tl.tuple, moves: tl.tuple, starts: tl.tuple, counts: tl.tuple,
    of_moves: tl.tensor, of_kernels: tl.tensor, momentum: float, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Leaves the sums of the squares of a block of the moves, and of the kernels."""
    buffer, move = _mine(buffers, starts, BLOCK), _mine(moves, starts, BLOCK)
    at, inside = _block(starts, counts, BLOCK)
    g = tl.load(_mine(gradients, starts, BLOCK) + at, mask=inside, other=0.0)
    b = momentum * tl.load(buffer + at, mask=inside, other=0.0) + g
    m = (g + momentum * b).to(move.dtype.element_ty)
    w = tl.load(_mine(kernels, starts, BLOCK) + at, mask=inside, other=0.0)
    tl.store(buffer + at, b, mask=inside)
    tl.store(move + at, m, mask=inside)
    tl.store(of_moves + tl.program_id(0), tl.sum(m.to(tl.float32) * m.to(tl.float32), 0))
    tl.store(of_kernels + tl.program_id(0), tl.sum(w * w, 0))


@Kernel
def _scale_kernel(moves: tl.tuple, starts: tl.tuple, counts: tl.tuple, of_moves: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Scales the moves to the norm 1."""
    move = _mine(moves, starts, BLOCK)
    at, inside = _block(starts, counts, BLOCK)
    norm = _norm(of_moves, starts, counts, BLOCK)
    tl.store(move + at, tl.load(move + at, mask=inside).to(tl.float32) / (norm + 1e-7), mask=inside)


@Kernel
def _move_kernel(
    kernels: tl.tuple, directions: tl.tuple, outputs: tl.tuple, starts: tl.tuple, counts: tl.tuple, of_kernels: tl.tensor,
    lr: tl.tensor, factor: float, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Scales the kernels to the norm sqrt(outputs), and moves them."""
    kernel = _mine(kernels, starts, BLOCK)
    at, inside = _block(starts, counts, BLOCK)
    scale = tl.sqrt(_mine(outputs, starts, BLOCK).to(tl.float32)) / _norm(of_kernels, starts, counts, BLOCK)
    d = tl.load(_mine(directions, starts, BLOCK) + at, mask=inside).to(tl.float32)
    w = tl.load(kernel + at, mask=inside) * scale - tl.load(lr) * factor * d
    tl.store(kernel + at, w, mask=inside)


def usable(*groups: list[Tensor]) -> bool:
    """Whether these are kernels in float32, in channels-last memory, on a GPU for which Triton builds; for a graph."""
    if not worth_launching():
        return False
    fits = (each.dtype == torch.float32 and each.is_contiguous(memory_format=torch.channels_last) for each in chain(*groups))
    return all(fits) and triton_works(groups[0][0].device)


def _blocks(kernels: list[Tensor]) -> tuple[int, dict[str, Any]]:
    """How many programs there are, and how each finds its block."""
    counts = tuple(each.numel() for each in kernels)
    *starts, end = accumulate((BLOCK * triton.cdiv(count, BLOCK) for count in counts), initial=0)
    return end // BLOCK, dict(starts=tuple(starts), counts=counts, BLOCK=BLOCK)


def add_momentum(
    gradients: list[Tensor], buffers: list[Tensor], kernels: list[Tensor], moves: list[Tensor], momentum: float
) -> Tensor:
    """buffer = momentum * buffer + gradient; move = gradient + momentum * buffer, Nesterov's, scaled to the norm 1.

    Each of the four has its numbers in the same order in memory.

    Returns:
        What `move_kernels` needs to know of the kernels.
    """
    programs, blocks = _blocks(kernels)
    of_moves, of_kernels = (torch.empty(programs, device=kernels[0].device) for _ in range(2))
    lists = (tuple(each) for each in (gradients, buffers, kernels, moves))
    _momentum_kernel[programs,](*lists, of_moves=of_moves, of_kernels=of_kernels, momentum=momentum, **blocks)
    _scale_kernel[programs,](tuple(moves), of_moves=of_moves, **blocks)
    return of_kernels


def move_kernels(kernels: list[Tensor], directions: list[Tensor], of_kernels: Tensor, lr: float | Tensor, factor: float) -> None:
    """kernel = sqrt(outputs) / norm(kernel) * kernel - lr * factor * direction; `of_kernels` is from `add_momentum`."""
    programs, blocks = _blocks(kernels)
    lists = tuple(kernels), tuple(directions), tuple(len(each) for each in kernels)
    rate: Any = lr if isinstance(lr, Tensor) else torch.full((), lr, device=of_kernels.device)
    _move_kernel[programs,](*lists, of_kernels=of_kernels, lr=rate, factor=factor, **blocks)
