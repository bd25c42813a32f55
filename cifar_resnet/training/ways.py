"""In which ways a CPU computes the layers of a model: how a model is given a choice, and which one it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .convolution import CONVOLUTIONS, WEIGHT_GRADIENTS, Conv3x3, Ways
from .fused_cpu import BatchNorm

COMPILED = {"BatchNorm": ["compiled"]}  # in a choice: pooling, BatchNorm and ReLU by `fused_cpu`


def checked(choice: Mapping[str, Sequence[str]]) -> tuple[dict[str, Ways], bool]:
    """The three `Ways` of each convolution, and whether BatchNorm is compiled; from plain values.

    Raises:
        ValueError: one of them is no way that there is.
        TypeError: those of a convolution are not three.
    """
    chosen = {layer: Ways(*each) for layer, each in choice.items() if layer not in COMPILED}
    for layer, (forward, input_gradient, weight_gradient) in chosen.items():
        if not {forward, input_gradient} <= set(CONVOLUTIONS) or weight_gradient not in WEIGHT_GRADIENTS:
            raise ValueError(f"the convolution {layer} has ways that there are not")
    for layer, way in COMPILED.items():
        if choice.get(layer, way) != way:
            raise ValueError(f"{layer} has a way that there is not")
    return chosen, "BatchNorm" in choice


def use(model: nn.Module, choice: Mapping[str, Sequence[str]] | None) -> None:
    """Lets the layers of the model be computed in these ways; None: nothing was chosen. For what it raises see `checked`."""
    ways, compiled = (None, False) if choice is None else checked(choice)
    for module in model.modules():
        if isinstance(module, Conv3x3):
            module.ways = ways
        elif isinstance(module, BatchNorm):
            module.compiled = compiled


def without_compiled(choice: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The choice, with torch's own BatchNorm."""
    return {layer: list(each) for layer, each in choice.items() if layer not in COMPILED}


def used(model: nn.Module) -> dict[str, list[str]] | None:
    """What `use` was given last, as plain values."""
    ways = next(module.ways for module in model.modules() if isinstance(module, Conv3x3))
    compiled = any(module.compiled for module in model.modules() if isinstance(module, BatchNorm))
    return None if ways is None else {layer: list(each) for layer, each in ways.items()} | (COMPILED if compiled else {})
