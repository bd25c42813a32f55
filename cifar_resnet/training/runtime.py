"""Where a run happens: device, precision, memory allocator; and what of it a run's files record."""

from __future__ import annotations

import copy
import ctypes
import functools
import math
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import __version__
from ..errors import CifarResnetError, UsageError, first_line
from ..recipe import Recipe
from .distributed import rank, ranks, started


def check_defaults() -> None:
    """Whether torch makes tensors in float32 on the CPU, as it does before a notebook has chosen otherwise.

    Raises:
        UsageError: it does not; says what to call.
    """
    dtype, chosen = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        raise UsageError(f"torch.set_default_dtype has chosen {dtype}; first call torch.set_default_dtype(torch.float32)")
    if chosen.type not in ("cpu", "meta"):  # on which shapes are computed
        raise UsageError(f'torch.set_default_device has chosen {chosen}; first call torch.set_default_device("cpu")')


def resolve_device(name: str = "auto", tf32: bool = False) -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU; of several processes each takes a CUDA device of its own, or the CPU.

    From now on `tf32` says whether float32 products and convolutions may round their factors to TF32, 10 bits, on an NVIDIA GPU.

    Raises:
        UsageError: the device is not there; there are several processes, and they do not train; or as from `check_defaults`.
    """
    check_defaults()
    several = ranks() > 1
    if started() > 1 and not several:
        raise UsageError("torchrun is for training alone; search for a learning rate, and evaluate, without torchrun")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and not several, "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if several and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', rank() % max(1, torch.cuda.device_count()))}"
    try:
        device = torch.device(name)
        if not there.get(device.type) or (device.index or 0) >= (torch.cuda.device_count() if device.type == "cuda" else 1):
            raise RuntimeError
    except RuntimeError:
        have = ", ".join(kind for kind, available in there.items() if available)
        raise UsageError(f"--device {name}: not there; this machine and this torch have {have}") from None
    if device.type == "cpu":
        keep_large_blocks()
    elif device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams, and so a captured graph, are of the current one
        # torch allows TF32 in convolutions by default
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True  # a run has few batch sizes: the fastest algorithm is looked for once for each
    return device


def resolve_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with precision "auto" made float32 or bfloat16: bfloat16 where the device multiplies in it."""
    if recipe.precision != "auto":
        return recipe
    return recipe.replace(precision="bfloat16" if _multiplies_bfloat16(device) else "float32")


def without_emulation(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe in float32 where its bfloat16 would be emulated, on a CPU: that takes eleven times as long to evaluate."""
    emulated = recipe.precision == "bfloat16" and device.type == "cpu" and _multiplies_bfloat16(device) is False
    return recipe.replace(precision="float32") if emulated else recipe


def _multiplies_bfloat16(device: torch.device) -> bool | None:
    """None where torch does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # whether that of a Mac is fast in it was not measured
        return sys.platform != "darwin" and any(_cpu().get(key) for key in BFLOAT16_FEATURES)
    return None


def dtype(recipe: Recipe) -> torch.dtype:
    """Of the recipe's arithmetic."""
    return torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The recipe's arithmetic. Without a cache of cast weights: a pass uses each weight once, and a captured graph must not keep one."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype(recipe) == torch.bfloat16, cache_enabled=False)


class _Cast(torch.autograd.Function):
    """Tensors of one dtype as tensors of another, and their gradients back: a launch each on a GPU."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _cast(dtype, tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast(ctx.dtype, gradients)


def _cast(dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(found, list(tensors))
    return tuple(found)


def cast_at_once(model: nn.Module, images: Tensor) -> Tensor:
    """model(images) in bfloat16, to be called in autocast, which would cast weights of convolutions and linear layer one by one."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    weights = {f"{name}.{own}": weight for name, layer in layers.items() for own, weight in layer.named_parameters()}
    named = {name: weight for name, weight in weights.items() if weight.requires_grad}
    cast = _Cast.apply(torch.bfloat16, *named.values())
    output: Tensor = functional_call(model, dict(zip(named, cast, strict=True)), (images,))
    return output


def wait_for(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compiled(
    mode: str, recipe: Recipe, model: nn.Module, device: torch.device, sizes: Iterable[int]
) -> Callable[[Tensor], Tensor]:
    """The forward pass of `model` through torch.compile, compiled here for batches of each size; or `model` itself.

    It shares the weights of `model`, which is left as it was. The mode "auto" does not compile: on an H100 a step is sooner
    done by our own kernels in a captured graph (docs/log/gpu.md, entry 32).

    Raises:
        CifarResnetError: the mode is "on", and torch cannot compile here.
    """
    if mode != "on":
        return model
    before = copy.deepcopy(model.state_dict())
    try:
        forward = torch.compile(model.forward, dynamic=False)  # a graph for each size; one for all would be slower
        with torch._dynamo.config.patch(recompile_limit=10**6):  # after 8 graphs in a process torch would go on without
            for size in sizes:
                images = torch.zeros(size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
                with autocast(recipe, device):
                    output = forward(images)
                output.float().sum().backward()
    except Exception as error:  # without a C compiler, or Triton: whatever torch makes of it
        raise CifarResnetError(f"the model cannot be compiled here: {first_line(error)}; use --compile off") from None
    finally:
        model.load_state_dict(before)
        model.zero_grad()
    return forward


HEAP = 4 * 2**30  # bytes: more than a run of the default takes


@functools.cache
def keep_large_blocks() -> None:
    """Tells glibc to reuse freed blocks of any size instead of unmapping them; nothing elsewhere.

    Every training step allocates and frees gigabytes of activations. By default glibc maps and unmaps each, and the
    page faults cost a quarter of the time. It must be called before the blocks are allocated to have an effect.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        if _cpu().get("amx_bf16"):
            _take_huge_pages(libc)


def _take_huge_pages(libc: Any) -> None:
    """Asks Linux for pages of 2 MB for the blocks to come, up to `HEAP` bytes. A default run is 6 % quicker with them on AMX."""
    MADV_HUGEPAGE = 14  # mman.h
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.madvise.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], [ctypes.c_void_p]
    if block := libc.malloc(HEAP):
        page = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(page, HEAP - mmap.PAGESIZE, MADV_HUGEPAGE)
        libc.free(block)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads, on which the speed and the last bits of a run depend; for the files of a run."""
    on_cuda = device.type == "cuda"
    return {
        "cifar_resnet": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "albumentations": version("albumentations"),
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "tf32": torch.backends.cudnn.allow_tf32 if on_cuda else None,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


BFLOAT16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's


def _cpu() -> Mapping[str, Any]:
    """What torch says of the processor; older ones say less."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}


def _cpu_name() -> str:
    return str(_cpu().get("cpu_name") or platform.processor() or platform.machine())


def processor() -> dict[str, str]:
    """The CPU, what it can do, and how many threads compute: what the speed of a way to compute depends on."""
    features = sorted(name for name, there in _cpu().items() if there is True)
    limits_of_onednn = [os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ]
    return {
        "cpu": _cpu_name(),
        "features": " ".join([torch.backends.cpu.get_cpu_capability(), *features, *limits_of_onednn]),
        "threads": str(torch.get_num_threads()),
    }


class Glance:
    """Reads a small tensor while training goes on, and lets no step wait.

    On CUDA the copy takes its place behind the steps that were launched, and an event tells when it has arrived. Other devices but
    the CPU would be waited for, and so are read seldom.
    """

    def __init__(self, like: Tensor) -> None:
        cuda = like.device.type == "cuda"
        self.every = 0.25 if cuda or like.device.type == "cpu" else 10.0  # seconds
        self.buffer = torch.empty_like(like, device="cpu", pin_memory=cuda)
        self.copied = torch.cuda.Event() if cuda else None
        self.began = -math.inf
        self.under_way: Any = None
        self.arrived: tuple[Any, list[float]] | None = None

    def take(self, tensor: Tensor, label: Any) -> None:
        """Begins to read what the steps so far leave in `tensor`, where the last reading has arrived and is not too recent."""
        now = time.monotonic()
        self.read()
        if self.under_way is not None or now - self.began < self.every:
            return
        self.buffer.copy_(tensor, non_blocking=self.copied is not None)
        if self.copied:
            self.copied.record(torch.cuda.current_stream(tensor.device))
        self.began, self.under_way = now, label
        self.read()

    def read(self) -> tuple[Any, list[float]] | None:
        """The last reading that has arrived, with its label."""
        label = self.under_way
        if label is not None and (self.copied is None or self.copied.query()):
            self.arrived, self.under_way = (label, self.buffer.tolist()), None
        return self.arrived
