"""In which ways a CPU computes the layers of a model: how a model is given a choice, and which one it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .convolution import CONVOLUTIONS, WEIGHT_GRADIENTS, Conv3x3, Ways


def checked(ways: Mapping[str, Sequence[str]]) -> dict[str, Ways]:
    """The three `Ways` of each layer, from plain values.

    Raises:
        ValueError: one of them is no way that there is.
        TypeError: they are not three.
    """
    chosen = {layer: Ways(*each) for layer, each in ways.items()}
    for layer, (forward, input_gradient, weight_gradient) in chosen.items():
        if not {forward, input_gradient} <= set(CONVOLUTIONS) or weight_gradient not in WEIGHT_GRADIENTS:
            raise ValueError(f"the convolution {layer} has ways that there are not")
    return chosen


def use(model: nn.Module, ways: Mapping[str, Sequence[str]] | None) -> None:
    """Lets every convolution of the model be computed in these ways; see `Conv3x3.ways` and, for what it raises, `checked`."""
    chosen = None if ways is None else checked(ways)
    for module in model.modules():
        if isinstance(module, Conv3x3):
            module.ways = chosen


def used(model: nn.Module) -> dict[str, list[str]] | None:
    """What `use` was given last, as plain values."""
    ways = next(module.ways for module in model.modules() if isinstance(module, Conv3x3))
    return None if ways is None else {layer: list(each) for layer, each in ways.items()}
