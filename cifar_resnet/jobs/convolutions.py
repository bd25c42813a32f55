"""The choice of a way for each layer. It is measured once, and kept in the user's cache folder: so two runs do not differ."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..errors import CifarResnetError
from ..files import user_cache, write_json
from ..recipe import Recipe
from ..training import autotune, distributed, ways
from ..training.autotune import Timing
from ..training.fused_cpu import library
from ..training.runtime import dtype, processor, without_emulation

Choice = dict[str, list[str]]  # see `ways.use`


def choose(mode: str, model: nn.Module, recipe: Recipe, device: torch.device) -> Choice | None:
    """In which way to compute each layer of batches of the recipe's size; for `ways.use`.

    Args:
        mode: "auto" for the quickest way of each convolution on this machine, as it was measured at the first time, and for
            BatchNorm as a C compiler builds it; "torch" for torch's own.
        recipe: with its precision resolved.

    Returns:
        None where nothing is chosen: on a device other than a CPU, or in emulated bfloat16.
    """
    if not chosen_here(recipe, device):
        return None
    if mode == "torch":
        return {}
    return distributed.on_first(lambda: _kept_or_measured(model, recipe) | compiled_here(recipe))


def chosen_here(recipe: Recipe, device: torch.device) -> bool:
    return device.type == "cpu" and without_emulation(recipe, device) == recipe


def compiled_here(recipe: Recipe) -> Choice:
    """What a C compiler gives, where there is one: BatchNorm with what surrounds it."""
    return ways.COMPILED if library(dtype(recipe)) else {}


def _kept_or_measured(model: nn.Module, recipe: Recipe) -> Choice:
    if (kept := _read(recipe)) is not None:
        return kept
    timings = autotune.measure(model, *_size(recipe))
    kept = _read(recipe)  # by a run that began at the same time: both take one choice
    return keep(recipe, timings) if kept is None else kept


def measure_anew(model: nn.Module, recipe: Recipe) -> tuple[list[Timing], Choice]:
    """Times all ways anew, and chooses. Later runs on this machine go by this choice."""
    timings = autotune.measure(model, *_size(recipe))
    return timings, keep(recipe, timings)


def keep(recipe: Recipe, timings: list[Timing]) -> Choice:
    """Keeps what the timings say, where there is a folder for it; gives it."""
    choice = autotune.choice(timings)
    if timings:
        with suppress(CifarResnetError, OSError):
            path = _path(recipe)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"machine": _machine(recipe), "convolutions": choice})
    return choice


def _read(recipe: Recipe) -> Choice | None:
    """What is kept; None where nothing is, or nothing that this version understands."""
    with suppress(CifarResnetError, OSError, ValueError, KeyError, TypeError, AttributeError):
        choice = json.loads(_path(recipe).read_text(encoding="utf-8"))["convolutions"]
        ways.checked(choice)
        return choice
    return None


def _size(recipe: Recipe) -> tuple[int, torch.dtype]:
    """Images of one process in a step, and their type."""
    return recipe.batch_size // distributed.ranks(), getattr(torch, recipe.precision)


def _machine(recipe: Recipe) -> dict[str, str]:
    """All that a choice depends on."""
    images, dtype = _size(recipe)
    what = f"width {recipe.width}, {images} images, {dtype}"
    return {**processor(), "torch": torch.__version__, "cifar_resnet": __version__, "model": what}


def _path(recipe: Recipe) -> Path:
    return user_cache() / "convolutions" / f"{hashlib.sha256(json.dumps(_machine(recipe)).encode()).hexdigest()[:32]}.json"
