"""Muon's two element-wise passes over all kernels, as Triton kernels for a GPU: everything else that it does are products.

Momentum and move are one pass that leaves the move in the dtype of the products; scaling a kernel and moving it is another. In
torch's own words each takes several passes over all weights, which is most of Muon's time on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import tl, triton, triton_works, worth_launching

BLOCK = 2048

if triton is not None:

    @triton.jit
    def _momentum_kernel(gradient, buffer, move, momentum, count, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * block + tl.arange(0, block)
        inside = at < count
        g = tl.load(gradient + at, mask=inside)
        b = momentum * tl.load(buffer + at, mask=inside) + g
        tl.store(buffer + at, b, mask=inside)
        tl.store(move + at, (g + momentum * b).to(move.dtype.element_ty), mask=inside)

    @triton.jit
    def _move_kernel(weight, direction, scale, lr, factor, count, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * block + tl.arange(0, block)
        inside = at < count
        d = tl.load(direction + at, mask=inside).to(tl.float32)
        w = tl.load(weight + at, mask=inside) * tl.load(scale) - tl.load(lr) * factor * d
        tl.store(weight + at, w, mask=inside)


def usable(dtype: torch.dtype, *groups: list[Tensor]) -> bool:
    """Whether these are kernels in float32, in channels-last memory, on a GPU for which Triton builds in this dtype; for a graph."""
    return (
        worth_launching()
        and all(
            each.is_cuda and each.dtype == torch.float32 and each.is_contiguous(memory_format=torch.channels_last)
            for group in groups
            for each in group
        )
        and triton_works(groups[0][0].device, dtype)
    )


def add_momentum(gradient: Tensor, buffer: Tensor, momentum: float, move: Tensor) -> None:
    """buffer = momentum * buffer + gradient; move = gradient + momentum * buffer: Nesterov's. All in the same order in memory."""
    count = gradient.numel()
    _momentum_kernel[(triton.cdiv(count, BLOCK),)](gradient, buffer, move, momentum, count, block=BLOCK)


def move_kernel(kernel: Tensor, direction: Tensor, scale: Tensor, lr: float | Tensor, factor: float) -> None:
    """kernel = scale * kernel - lr * factor * direction; `scale` is a tensor () on the device."""
    count = kernel.numel()
    rate: Any = lr if isinstance(lr, Tensor) else torch.full((), lr, device=kernel.device)
    _move_kernel[(triton.cdiv(count, BLOCK),)](kernel, direction, scale, rate, factor, count, block=BLOCK)
