"""Batch normalisation, ReLU and what surrounds them, in few passes over memory: Triton kernels for training on CUDA.

They replace torch's own `relu(norm(max_pool2d(x, 2))) + residual`, whose many kernels, forward and backward, take longer on a fast
GPU than the convolutions between them. What torch.compile makes of it is about as fast, but takes half a minute to make. They are for
steps in a CUDA graph.

An activation is a matrix here: a row for each pixel of each image, as channels-last memory has it, and a column for each channel.
A sum over rows takes two kernels, so that its order is always the same: each program of the first sums some rows, and the second
adds up these parts. Kernels that sum go through the rows from the last to the first, the others from the first to the last: each
starts with what the one before it left in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kernels import Kernel, jit, tl, triton, triton_works, worth_launching

CHANNELS, ROWS = 64, 64  # of a tile
SUM_ROWS, POOL_ROWS = 64, 32  # of a tile of what is summed; when pooling each row is made of four; multiples of 16
STAGES = 3  # of loading what is summed: so many tiles are under way at once
PARTS = 512  # of a sum, at most: near the number of programs that an H100 runs at once; a power of two
FINISH = 8  # columns of which a program adds up the parts


@jit
def _place(channels: int, CHANNELS: tl.constexpr) -> Any:
    """This program's number among those of the same columns, how many they are; the columns, (1, CHANNELS), and which exist."""
    groups = tl.cdiv(channels, CHANNELS)
    columns = tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return tl.program_id(0) // groups, tl.num_programs(0) // groups, columns, columns < channels


@jit
def _tile(number: tl.tensor, rows: int, columns: tl.tensor, channels: int, ROWS: tl.constexpr) -> Any:
    """The rows of a tile, (ROWS, 1); its elements' offsets in the matrix, and which exist, (ROWS, CHANNELS)."""
    row = number * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row * channels + columns, (row < rows) & (columns < channels)


@jit
def _pixel(row: tl.tensor, number: tl.constexpr, width: int) -> Any:
    """The row, before pooling, of one of the four pixels of this row of a pooled image of this width."""
    return 4 * row - 2 * (row % width) + number // 2 * 2 * width + number % 2


@jit
def _pool(x: tl.tensor, row: tl.tensor, columns: tl.tensor, there: tl.tensor, width: int, channels: int) -> Any:
    """Maxima of the four pixels of each row, and which it was, 0 to 3: the first of equal ones or the last NaN, as torch chooses."""
    best = tl.load(x + _pixel(row, 0, width) * channels + columns, mask=there, other=0.0).to(tl.float32)
    code = tl.zeros(best.shape, tl.int32)
    for number in tl.static_range(1, 4):
        value = tl.load(x + _pixel(row, number, width) * channels + columns, mask=there, other=0.0).to(tl.float32)
        higher = (value > best) | (value != value)
        best, code = tl.where(higher, value, best), tl.where(higher, number, code)
    return best, code


@jit
def _fold(values: tl.tensor, ROWS: tl.constexpr, CHANNELS: tl.constexpr) -> Any:
    """Sums of every 16th row, (16, CHANNELS): each thread adds up what it holds."""
    return tl.sum(tl.reshape(values, (ROWS // 16, 16, CHANNELS)), 0)


@jit
def _store_part(
    sums: tl.tensor, first: tl.tensor, second: tl.tensor, part: int, parts: int, columns: tl.tensor, there: tl.tensor, channels: int
) -> None:  # fmt: skip
    """Writes this program's two sums, folded, to the planes (parts, channels) of `sums`."""
    at = sums + part * channels + columns
    tl.store(at, tl.sum(first, 0)[None, :], mask=there)
    tl.store(at + parts * channels, tl.sum(second, 0)[None, :], mask=there)


@jit
def _add_parts(sums: tl.tensor, parts: int, columns: tl.tensor, channels: int, PARTS: tl.constexpr) -> Any:
    """What `_store_part` wrote, added up: two sums for each column."""
    part = tl.arange(0, PARTS)[:, None]
    at, there = sums + part * channels + columns[None, :], (part < parts) & (columns[None, :] < channels)
    first, second = tl.load(at, mask=there, other=0.0), tl.load(at + parts * channels, mask=there, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@jit
def _affine(mean: tl.tensor, invstd: tl.tensor, weight: tl.tensor, bias: tl.tensor, columns: tl.tensor, there: tl.tensor) -> Any:
    """Normalising is (x - centre) * scale + shift."""
    scale = tl.load(weight + columns, mask=there) * tl.load(invstd + columns, mask=there)
    return tl.load(mean + columns, mask=there), scale, tl.load(bias + columns, mask=there)


@jit
def _relu(x: tl.tensor, centre: tl.tensor, scale: tl.tensor, shift: tl.tensor) -> Any:
    """ReLU of x normalised, float32 but rounded as torch rounds it; NaN stays NaN."""
    y = (x.to(tl.float32) - centre) * scale + shift
    return tl.where(y <= 0, 0.0, y).to(x.dtype).to(tl.float32)


@Kernel
def _sum_activations(
    x: tl.tensor, pooled: tl.tensor, codes: tl.tensor, mean: tl.tensor, sums: tl.tensor, rows: int, width: int, channels: int,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Sums of x - s and of its square; where there is `pooled`, of x after pooling, which is written too.

    s, the mean of 16 rows from all over the batch, is so near the mean that no digits are lost. It is left in `mean`.
    """
    part, parts, columns, there = _place(channels, CHANNELS)
    sample = tl.arange(0, 16)[:, None] * (rows // 16)
    if pooled is not None:
        sample = _pixel(sample, 0, width)
    s = tl.sum(tl.load(x + sample * channels + columns, mask=there, other=0.0).to(tl.float32), 0)[None, :] / 16
    if part == 0:
        tl.store(mean + columns, s, mask=there)
    first, second = tl.zeros((16, CHANNELS), tl.float32), tl.zeros((16, CHANNELS), tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for number in tl.range(part, tiles, parts, num_stages=STAGES):
        row, at, inside = _tile(tiles - 1 - number, rows, columns, channels, ROWS)
        if pooled is None:
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        else:
            value, code = _pool(x, row, columns, inside, width, channels)
            tl.store(pooled + at, value, mask=inside)
            tl.store(tl.multiple_of(codes + at, [1, 8]), code, mask=inside)  # 8 to a thread, as of x
        value = tl.where(inside, value - s, 0.0)
        first += _fold(value, ROWS, CHANNELS)
        second += _fold(value * value, ROWS, CHANNELS)
    _store_part(sums, first, second, part, parts, columns, there, channels)


@Kernel
def _finish_statistics(
    sums: tl.tensor, mean: tl.tensor, invstd: tl.tensor, running_mean: tl.tensor, running_var: tl.tensor, batches: tl.tensor,
    rows: int, parts: int, channels: int, momentum: float, eps: float, PARTS: tl.constexpr, FINISH: tl.constexpr,
) -> None:  # fmt: skip
    """Mean, inverse deviation and running statistics."""
    columns = tl.program_id(0) * FINISH + tl.arange(0, FINISH)
    there = columns < channels
    first, second = _add_parts(sums, parts, columns, channels, PARTS)
    centre, variance = tl.load(mean + columns, mask=there) + first / rows, second / rows - (first / rows) * (first / rows)
    variance = tl.where(variance < 0, 0.0, variance)
    tl.store(mean + columns, centre, mask=there)
    tl.store(invstd + columns, 1 / tl.sqrt(variance + eps), mask=there)
    old_mean, old_var = tl.load(running_mean + columns, mask=there), tl.load(running_var + columns, mask=there)
    tl.store(running_mean + columns, (1 - momentum) * old_mean + momentum * centre, mask=there)
    tl.store(running_var + columns, (1 - momentum) * old_var + momentum * (variance * (rows / (rows - 1.0))), mask=there)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@Kernel
def _normalise(
    x: tl.tensor, residual: tl.tensor, out: tl.tensor, mean: tl.tensor, invstd: tl.tensor, weight: tl.tensor, bias: tl.tensor,
    rows: int, channels: int, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The output, of x after pooling."""
    number, _, columns, there = _place(channels, CHANNELS)
    _, at, inside = _tile(number, rows, columns, channels, ROWS)
    centre, scale, shift = _affine(mean, invstd, weight, bias, columns, there)
    y = _relu(tl.load(x + at, mask=inside), centre, scale, shift)
    if residual is not None:
        y += tl.load(residual + at, mask=inside).to(tl.float32)
    tl.store(out + at, y, mask=inside)


@Kernel
def _sum_gradients(
    x: tl.tensor, gradient: tl.tensor, sums: tl.tensor, mean: tl.tensor, invstd: tl.tensor, weight: tl.tensor, bias: tl.tensor,
    rows: int, channels: int, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Sums of the gradient of what the ReLU was given, and of that times x less its mean; x after pooling."""
    part, parts, columns, there = _place(channels, CHANNELS)
    centre, scale, shift = _affine(mean, invstd, weight, bias, columns, there)
    first, second = tl.zeros((16, CHANNELS), tl.float32), tl.zeros((16, CHANNELS), tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for number in tl.range(part, tiles, parts, num_stages=STAGES):
        _, at, inside = _tile(tiles - 1 - number, rows, columns, channels, ROWS)
        value = tl.load(x + at, mask=inside, other=0.0)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(_relu(value, centre, scale, shift) == 0, 0.0, g)
        first += _fold(g, ROWS, CHANNELS)
        second += _fold(g * (value.to(tl.float32) - centre), ROWS, CHANNELS)
    _store_part(sums, first, second, part, parts, columns, there, channels)


@Kernel
def _finish_gradients(
    sums: tl.tensor, invstd: tl.tensor, dweight: tl.tensor, dbias: tl.tensor, parts: int, channels: int,
    PARTS: tl.constexpr, FINISH: tl.constexpr,
) -> None:  # fmt: skip
    """The gradients of weight and bias."""
    columns = tl.program_id(0) * FINISH + tl.arange(0, FINISH)
    first, second = _add_parts(sums, parts, columns, channels, PARTS)
    tl.store(dbias + columns, first, mask=columns < channels)
    tl.store(dweight + columns, second * tl.load(invstd + columns, mask=columns < channels), mask=columns < channels)


@Kernel
def _input_gradient(
    x: tl.tensor, gradient: tl.tensor, codes: tl.tensor, dx: tl.tensor, mean: tl.tensor, invstd: tl.tensor, weight: tl.tensor,
    bias: tl.tensor, dweight: tl.tensor, dbias: tl.tensor, rows: int, width: int, channels: int,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of the input; where there are `codes`, of all four pixels that each row of x was pooled from."""
    number, _, columns, there = _place(channels, CHANNELS)
    row, at, inside = _tile(number, rows, columns, channels, ROWS)
    value, g = tl.load(x + at, mask=inside), tl.load(gradient + at, mask=inside).to(tl.float32)
    if codes is not None:
        code = tl.load(tl.multiple_of(codes + at, [1, 8]), mask=inside)
    centre, scale, shift = _affine(mean, invstd, weight, bias, columns, there)
    constant = tl.load(dbias + columns, mask=there) / rows
    slope = tl.load(dweight + columns, mask=there) * tl.load(invstd + columns, mask=there) / rows
    g = tl.where(_relu(value, centre, scale, shift) == 0, 0.0, g)
    g = (g - constant - (value.to(tl.float32) - centre) * slope) * scale
    if codes is None:
        tl.store(dx + at, g, mask=inside)
    else:
        for pixel in tl.static_range(4):
            place = _pixel(row, pixel, width) * channels + columns
            tl.store(dx + place, tl.where(code == pixel, g, 0.0), mask=inside)


def _split(rows: int, channels: int, size: int) -> tuple[int, int]:
    """Into how many groups of columns, and parts of the rows, tiles of this many rows are summed."""
    groups = triton.cdiv(channels, CHANNELS)
    return groups, max(1, min(PARTS // groups, triton.cdiv(rows, size)))


def _empty(x: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """As many images and channels as of x, of this size."""
    shape = (*x.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d, pool: bool
    ) -> Tensor:
        n, channels, height, width = x.shape
        pooled = codes = None
        if pool:
            height, width = height // 2, width // 2
            pooled, codes = _empty(x, height, width), _empty(x, height, width, torch.uint8)
        rows, size = n * height * width, POOL_ROWS if pool else SUM_ROWS
        groups, parts = _split(rows, channels, size)
        sums, (mean, invstd) = weight.new_empty(2, parts, channels), weight.new_empty(2, channels)
        tile = {"ROWS": size, "CHANNELS": CHANNELS, "STAGES": STAGES}
        _sum_activations[groups * parts,](x, pooled, codes, mean, sums, rows, width, channels, **tile)
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        _finish_statistics[triton.cdiv(channels, FINISH),](
            sums, mean, invstd, *running, rows, parts, channels, norm.momentum, norm.eps, PARTS=PARTS, FINISH=FINISH
        )
        x = x if pooled is None else pooled
        out = torch.empty_like(x)
        grid = (groups * triton.cdiv(rows, ROWS),)
        _normalise[grid](x, residual, out, mean, invstd, weight, bias, rows, channels, ROWS=ROWS, CHANNELS=CHANNELS)
        ctx.save_for_backward(x, codes, mean, invstd, weight, bias)
        ctx.adds = residual is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, *affine = ctx.saved_tensors
        _, invstd, weight, _ = affine
        n, channels, height, width = x.shape
        rows, g = n * height * width, gradient.contiguous(memory_format=torch.channels_last)
        groups, parts = _split(rows, channels, SUM_ROWS)
        sums, dweight, dbias = weight.new_empty(2, parts, channels), torch.empty_like(weight), torch.empty_like(weight)
        tile = {"ROWS": SUM_ROWS, "CHANNELS": CHANNELS, "STAGES": STAGES}
        _sum_gradients[groups * parts,](x, g, sums, *affine, rows, channels, **tile)
        _finish_gradients[triton.cdiv(channels, FINISH),](
            sums, invstd, dweight, dbias, parts, channels, PARTS=PARTS, FINISH=FINISH
        )
        dx = torch.empty_like(x) if codes is None else _empty(x, 2 * height, 2 * width)
        grid = (groups * triton.cdiv(rows, ROWS),)
        _input_gradient[grid](x, g, codes, dx, *affine, dweight, dbias, rows, width, channels, ROWS=ROWS, CHANNELS=CHANNELS)
        return dx, dweight, dbias, gradient if ctx.adds else None, None, None


def norm_relu(x: Tensor, norm: nn.BatchNorm2d, pool: bool = False, residual: Tensor | None = None) -> Tensor:
    """relu(norm(max_pool2d(x, 2) if pool else x)) + residual, `norm` in training; for where `usable` says so.

    It has first derivatives only, and calls no hooks of `norm`. The residual is of the output's shape and dtype.
    """
    if pool and (x.shape[2] % 2 or x.shape[3] % 2):  # a cut, even of nothing, takes the gradient's layout in older torch
        x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y: Tensor = _NormReLU.apply(x, norm.weight, norm.bias, residual, norm, pool)
    return y


def usable(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether `norm_relu` can stand for torch's own operations on x: in training, for a graph, executed rather than traced."""
    return (
        not torch.compiler.is_compiling()
        and worth_launching()
        and norm.training
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.shape[1] % 16 == 0
        and min(x.shape[0], x.shape[2], x.shape[3]) > 1
        and x.numel() < 2**31
        and x.is_contiguous(memory_format=torch.channels_last)
        and triton_works(x.device)
    )
