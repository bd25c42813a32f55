"""Max pooling, batch normalisation and ReLU on a CPU, in few passes over memory: C functions that are compiled where they run.

torch's own go through memory once for each operation, and do little in each pass: on a processor that convolves fast they take a third
of a step. Without a C compiler torch's own are used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-trapping-math", "-fopenmp", "-fPIC")
X86_FLAG = "-mprefer-vector-width=512"  # where there is AVX-512, gcc takes half of its width by itself
COMPILE_SECONDS = 60  # at most; it takes a third of a second
PARTS = 256  # of a sum
MIN_ELEMENTS = 2**20  # of an activation: with fewer, torch's own take no longer
SAMPLE = 16  # rows, whose mean is so near that of all that no digits are lost in a sum of squares
TYPES = (torch.float32, torch.bfloat16)


class BatchNorm(nn.BatchNorm2d):
    """torch's own; `compiled` lets C functions compute it with the ReLU behind it, and the pooling before it, on a CPU."""

    compiled: bool = False
    momentum: float | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The C functions for activations of this type, which are compiled at the first call; None where they cannot be."""
    if sys.platform == "linux" and dtype in TYPES:
        for name in (os.environ.get("CC"), "gcc", "cc"):
            if compiler := name and shutil.which(name):
                with suppress(OSError, subprocess.SubprocessError):
                    return _build(compiler, [f"-DBFLOAT16={int(dtype == torch.bfloat16)}"])
    return None


def _build(compiler: str, definitions: list[str]) -> ctypes.CDLL:
    flags = [*FLAGS, *[X86_FLAG] * (platform.machine() == "x86_64"), *definitions]
    with tempfile.TemporaryDirectory() as folder:
        built, linked = os.path.join(folder, "fused_cpu.o"), os.path.join(folder, "fused_cpu.so")
        run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=COMPILE_SECONDS)
        run([compiler, *flags, "-c", str(SOURCE), "-o", built])
        # without OpenMP's library: torch's is there, and two would each have threads of their own
        run([compiler, "-shared", "-nostdlib", built, "-o", linked])
        return ctypes.CDLL(linked)


def usable(x: Tensor, norm: BatchNorm) -> bool:
    """Whether `norm_relu` can stand for torch's own on x: where a choice of ways says so, in training, and without gradients elsewhere."""
    return (
        norm.compiled
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # before anything that depends on sizes
        and (norm.training or not torch.is_grad_enabled())
        and x.device.type == "cpu"
        and x.numel() >= MIN_ELEMENTS
        and x.shape[2] % 2 == x.shape[3] % 2 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and norm.momentum is not None
        and norm.track_running_stats
        and all(_is_vector(each) for each in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
        and library(x.dtype) is not None
    )


def _is_vector(tensor: Tensor | None) -> bool:
    """Whether it is what the C functions read from an address."""
    return tensor is not None and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def norm_relu(x: Tensor, norm: BatchNorm, pool: bool = False, residual: Tensor | None = None) -> Tensor:
    """relu(norm(max_pool2d(x, 2) if pool else x)) + residual, for where `usable` says so.

    It has first derivatives only. The residual is of the output's shape and dtype.
    """
    if pool:
        x = _MaxPool.apply(x)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y: Tensor = _NormReLU.apply(x, norm.weight, norm.bias, residual, norm)
    return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        pooled, codes = _empty(x, height, width), _empty(x, height, width, torch.uint8)
        _call("max_pool", pooled, x, pooled, codes)
        ctx.save_for_backward(codes)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        g = gradient.contiguous(memory_format=torch.channels_last)
        dx = _empty(g, 2 * g.shape[2], 2 * g.shape[3])
        _call("max_unpool", g, g, *ctx.saved_tensors, dx)
        return dx


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: BatchNorm) -> Tensor:
        mean, variance = _statistics(x, norm) if norm.training else (norm.running_mean, norm.running_var)
        invstd = (variance + norm.eps).rsqrt()
        scale, out = weight * invstd, torch.empty_like(x)
        _call("normalise", x, x, residual, mean, scale, bias, out)
        ctx.save_for_backward(x, mean, scale, bias, invstd)
        ctx.adds = residual is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *affine, invstd = ctx.saved_tensors
        g, dx, rows = gradient.contiguous(memory_format=torch.channels_last), torch.empty_like(x), x.numel() // x.shape[1]
        dbias, products = _sums("sum_gradients", x, g, *affine)
        dweight = products * invstd
        _call("input_gradient", x, x, g, *affine, dbias / rows, dweight * invstd / rows, dx)
        return dx, dweight, dbias, gradient if ctx.adds else None, None


def _statistics(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, (C,). It moves the running ones."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    about = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE].float().mean(0)
    first, second = _sums("sum_activations", x, about) / len(rows)
    mean, variance = about + first, (second - first * first).clamp(min=0)
    assert norm.momentum is not None
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (len(rows) / (len(rows) - 1)), norm.momentum)
    return mean, variance


def _sums(name: str, x: Tensor, *given: Tensor) -> Tensor:
    """The two sums over the rows of x, (2, C), that one of the C functions gives in parts."""
    sums = torch.empty(2, _parts(x), x.shape[1], dtype=torch.float32, device="cpu")
    _call(name, x, x, *given, sums)
    return sums.sum(1)


def _call(name: str, like: Tensor, *given: Tensor | None) -> None:
    """One of the C functions, with the addresses of the tensors; `like` has the rows and channels that it goes through."""
    _, channels, _, width = like.shape
    sizes = like.numel() // channels, width, channels, _parts(like)
    addresses = [None if each is None else each.data_ptr() for each in given]
    getattr(library(like.dtype), name)(*map(ctypes.c_void_p, addresses), *map(ctypes.c_long, sizes))


def _parts(x: Tensor) -> int:
    return min(PARTS, x.numel() // x.shape[1])


def _empty(x: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """As many images and channels as of x, of this size."""
    shape = (*x.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype or x.dtype, device="cpu", memory_format=torch.channels_last)
