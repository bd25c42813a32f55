"""Training shared by the processes that `torchrun` started; in a run of one process nothing here communicates.

Rank 0 alone reads and writes the run directory, and speaks; the others are handed what it read.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import CifarResnetError, DataError, UsageError, first_line

_ADVICE = "start with torchrun, or unset WORLD_SIZE"


class Left(CifarResnetError):
    """Ends a rank without a word: rank 0 fails, and says why."""

    exit_code = 0


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes for as long as the body runs: gloo for tensors on a CPU, NCCL for those on a GPU.

    Raises:
        CifarResnetError: another process is gone, or the body raised. Of what all ranks raise, only rank 0 tells. A DataError, and
            a UsageError of one other rank alone, are told by that rank, too.
    """
    if started() == 1:
        yield
        return
    try:
        _join()
        yield
    except CifarResnetError as error:
        if rank() and isinstance(error, UsageError):  # rank 0 has said what is wrong everywhere; this is wrong here alone
            raise CifarResnetError(str(error)) from None
        raise error if rank() == 0 or isinstance(error, DataError) else Left from None
    except (RuntimeError, ValueError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise Left if rank() else CifarResnetError(f"a process of the run is gone, or cannot be reached: {error}") from None
    finally:
        if together():
            dist.destroy_process_group()


def _join() -> None:
    given = os.environ.get("RANK", "0")
    if re.fullmatch(r"-?\d{1,9}", given) and not 0 <= int(given) < started():
        raise UsageError(f"the environment variable RANK is {given}, and WORLD_SIZE is {started()}; {_ADVICE}")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")
    except ValueError as error:  # of the variables
        raise UsageError(f"torchrun's environment variables do not fit together: {first_line(error)}; {_ADVICE}") from None


def together() -> bool:
    """Whether this process has joined others; never where torch was built without `distributed`."""
    return dist.is_available() and dist.is_initialized()


def started() -> int:
    """How many processes torchrun started, joined or not."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", given):
        raise UsageError(f"the environment variable WORLD_SIZE is {given[:40]!r}, and no number of processes; {_ADVICE}")
    return int(given)


def rank() -> int:
    return dist.get_rank() if together() else 0


def ranks() -> int:
    return dist.get_world_size() if together() else 1


def parallel(model: nn.Module) -> nn.Module:
    """The model, with gradients that are the mean over the ranks, and BatchNorm statistics of each rank's own."""
    if not together():
        return model
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.15 has another name for half of it
        return DistributedDataParallel(model, broadcast_buffers=False)


@torch.no_grad()
def merge(models: Iterable[nn.Module], totals: Tensor) -> None:
    """Sets BatchNorm running statistics to their mean over the ranks, and totals to their sum."""
    if together():
        for buffer in (buffer for model in dict.fromkeys(models) for buffer in model.buffers() if buffer.is_floating_point()):
            dist.all_reduce(buffer)
            buffer /= ranks()
        dist.all_reduce(totals)


def max_over_ranks(*numbers: int) -> list[int]:
    """The highest of each over the ranks; waits for the ranks, but for no device."""
    every = torch.tensor(numbers)
    if together():
        dist.all_reduce(every, dist.ReduceOp.MAX)
    return every.tolist()


def gather(value: Any) -> list:
    """Every rank's value, in the order of the ranks."""
    every = [value] * ranks()
    if together():
        dist.all_gather_object(every, value)
    return every


def on_first(function: Callable[[], Any]) -> Any:
    """What the function gives on rank 0, handed to every rank; where it raises there, the others leave."""
    if not together():
        return function()
    result: list = [Left()]
    try:
        if rank() == 0:
            result = [function()]
    finally:
        dist.broadcast_object_list(result)
    if isinstance(result[0], Left):
        raise result[0]
    return result[0]
