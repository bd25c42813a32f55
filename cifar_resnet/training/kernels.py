"""Triton kernels of our own: how they are built and launched, and where they are left out.

They are for steps in a CUDA graph: launched one by one from Python they take longer than torch's own (docs/log/gpu.md, entry 32).
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it where it can run; else `worth_launching` says no
    triton = tl = None

_in_a_graph = ContextVar("_in_a_graph", default=False)
_left_out = False  # as one of the kernels has failed
_builder: Callable[..., Any] | None = None  # what is called in place of a launch; autograd's threads must see it too
_one_at_a_time = threading.RLock()  # of the threads that launch our kernels, or build them


def jit(function: Callable[..., Any]) -> Any:
    """Part of a Triton kernel, built once for all sizes of batch and image; where there is no Triton, nothing to call."""
    return function if triton is None else triton.jit(function, do_not_specialize=["rows", "width", "parts"])


class Kernel:
    """A Triton kernel, which `kernel[programs,](...)` launches, or builds where `build` calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = jit(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.function[grid] if _builder is None else partial(_builder, self.function, grid)


@contextmanager
def for_a_graph() -> Iterator[None]:
    """Here `usable` may say yes: around steps that are captured, and around those before that warm up for it."""
    with _one_at_a_time:
        token = _in_a_graph.set(True)
        try:
            yield
        finally:
            _in_a_graph.reset(token)


def in_a_graph() -> bool:
    """Whether what runs now is for a CUDA graph."""
    return _in_a_graph.get()


def worth_launching() -> bool:
    """Whether there is Triton, and what runs now is for a CUDA graph."""
    return triton is not None and in_a_graph() and not _left_out


def try_kernels(call: Callable[[], object]) -> None:
    """Calls it; where it fails with our kernels and not without, it warns, and leaves them out from then on."""
    global _left_out
    try:
        call()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: another Triton may not build what ours does
        if not worth_launching():
            raise
        _left_out = True
        try:
            call()
        except Exception:  # then it is not a kernel that fails
            _left_out = False
            raise
        warnings.warn(f"a Triton kernel fails here, so training takes longer: {first_line(error)}", stacklevel=2)


def build(call: Callable[[], object]) -> None:
    """Calls it, and builds our kernels in place of launching them: side by side, as each takes about a second from an empty cache.

    What the kernels would write stays unwritten, so what is computed from that is nonsense. A kernel that cannot be built fails
    when it is launched.
    """
    global _builder
    device, kinds = torch.cuda.current_device() if torch.cuda.is_available() else -1, set()

    def one(kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        with torch.cuda.device(device):  # which each thread has its own of
            kernel.warmup(*given, grid=(1,), **named).run  # noqa: B018 what launches is made when first asked for

    with _without_collecting(), ThreadPoolExecutor() as pool:

        def builder(kernel: Any, _grid: tuple[int, ...], *given: Any, **named: Any) -> None:
            given, named = _without_memory(given), {name: _without_memory(each) for name, each in named.items()}
            kind = (kernel.__name__, *(each for each in given if not isinstance(each, int)), *named.values())
            if kind not in kinds:  # Triton builds one for all whole numbers that it meets here
                kinds.add(kind)
                pool.submit(one, kernel, given, named)

        _builder = builder
        try:
            call()
        finally:
            _builder = None


@contextmanager
def _without_collecting() -> Iterator[None]:
    """No garbage is collected here. In Python 3.11 that may end `ast.parse` in one thread for another: then a kernel is not built.

    From https://github.com/python/cpython/issues/106905.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _without_memory(value: Any) -> Any:
    """The argument of a kernel, with something of the same dtype in place of each tensor."""
    if isinstance(value, tuple):
        return tuple(_without_memory(each) for each in value)
    return _any_tensor(value.dtype) if isinstance(value, Tensor) else value


@functools.cache
def _any_tensor(dtype: torch.dtype) -> Any:
    return triton.runtime.jit.MockTensor(dtype)


@Kernel
def _add_one(x: tl.tensor) -> None:
    tl.store(x, tl.load(x) + 1)


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton builds and runs a kernel here: beside the GPU it needs a C compiler and Python's headers."""
    interpreted = not isinstance(_add_one.function, triton.runtime.JITFunction)
    cuda = device.type == "cuda" and torch.version.cuda is not None
    if not interpreted and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        return False
    try:
        x = torch.zeros(1, device=device)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _add_one.function[1,](x)  # in `build` too
        return bool(x == 1)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds
        warnings.warn(f"Triton does not work here, so training takes longer: {first_line(error)}", stacklevel=2)
        return False
