"""Times the ways to compute each convolution of a model on this CPU, and chooses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convolution import CONVOLUTIONS, WEIGHT_GRADIENTS, Conv3x3, Ways, input_gradient, layer_name, possible
from .model import SEEDING

MIN_FLOP = 1e9  # of a layer, in one direction and step: with less, choosing takes longer than it saves
MIN_POSITIONS = 4096  # pixels of a timed batch: with fewer, what a call does once would weigh too much
CALL_SECONDS = 0.015  # of torch's own convolution: a part of the batch that takes so long is enough to time
LONG_CALL = 0.025  # seconds: where all calls take so long, the first one of each counts
ROUNDS = 2  # of calls after the first
COLD = 2.5  # times the best: a first call that is slower is not followed by another
HOPELESS = 1.5  # times the best: a way that is slower is not timed again
TIE = 1.05  # times the best: ways within it are equal, and the first in the list is chosen


class Timing(NamedTuple):
    """How long each way takes for one layer in one direction."""

    layer: str  # see `convolution.layer_name`
    direction: str  # a field of `Ways`
    seconds: dict[str, float]  # by way, for the model's batch, from a part of it
    flop: float  # of the direct convolution of that batch
    chosen: str


def layers(model: nn.Module, size: int) -> list[tuple[Conv3x3, torch.Size]]:
    """The convolutions of a model that are worth a choice, one of a kind, with the shape of their input in a batch of `size`."""
    found = dict[tuple[int, torch.Size], tuple[Conv3x3, torch.Size]]()

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, Conv3x3)
        shape = torch.Size([size, *inputs[0].shape[1:]])
        found.setdefault((len(layer.weight), shape), (layer, shape))

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, Conv3x3)]
    training = model.training
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, 32, 32).to(memory_format=torch.channels_last))
    model.train(training)
    for hook in hooks:
        hook.remove()
    least = max(MIN_FLOP, max(flop(*each) for each in found.values()) / 10)
    return [each for each in found.values() if flop(*each) >= least]


def flop(layer: Conv3x3, shape: torch.Size) -> float:
    """Of a direct convolution, in one direction: two a multiply-add."""
    return 2.0 * layer.weight.numel() * shape[0] * shape[2] * shape[3]


def measure(model: nn.Module, size: int, dtype: torch.dtype) -> list[Timing]:
    """Times every way of every layer and direction on a part of a batch of `size`, in turn. torch's random state is left as it was."""
    with SEEDING, torch.random.fork_rng(devices=[]):
        return [timing for layer, shape in layers(model, size) for timing in _measure_layer(layer, shape, dtype)]


def choice(timings: Iterable[Timing]) -> dict[str, list[str]]:
    """The chosen `Ways`, as plain lists, by layer; layers for which all is torch's are left out."""
    chosen = dict[str, list[str]]()
    for timing in timings:
        ways = chosen.setdefault(timing.layer, list(Ways()))
        ways[Ways._fields.index(timing.direction)] = timing.chosen
    return {layer: ways for layer, ways in chosen.items() if Ways(*ways) != Ways()}


def _measure_layer(layer: Conv3x3, shape: torch.Size, dtype: torch.dtype) -> list[Timing]:
    name, work = layer_name(dtype, len(layer.weight), shape), flop(layer, shape)
    kernels = layer.weight.detach().to(dtype).permute(2, 3, 1, 0)
    x = torch.randn(_images(shape, kernels), *shape[2:], shape[1]).to(dtype)
    g = torch.randn(*x.shape[:3], kernels.shape[3]).to(dtype)
    scale = shape[0] / len(x)

    def timing(direction: str, ways: Iterable[str], call: Callable[[str], Any]) -> Timing:
        seconds = _seconds([way for way in ways if possible(way, dtype, shape)], call)
        seconds = {way: scale * each for way, each in seconds.items()}
        return Timing(name, direction, seconds, work, fastest(seconds))

    return [
        timing("forward", CONVOLUTIONS, lambda way: CONVOLUTIONS[way](x, kernels)),
        timing("input_gradient", CONVOLUTIONS, lambda way: input_gradient(way, x, g, kernels)),
        timing("weight_gradient", WEIGHT_GRADIENTS, lambda way: WEIGHT_GRADIENTS[way](x, g)),
    ]


def _images(shape: torch.Size, kernels: Tensor) -> int:
    """How many images are enough to time: as many as torch's own convolution takes about `CALL_SECONDS` for."""
    size, inputs, height, width = shape
    few = min(size, -(-MIN_POSITIONS // (height * width)))
    x = torch.randn(-(-few // 4), height, width, inputs).to(kernels.dtype)
    _once(lambda: CONVOLUTIONS["torch"](x, kernels))
    once = _once(lambda: CONVOLUTIONS["torch"](x, kernels))
    return min(size, max(few, round(len(x) * CALL_SECONDS / once)))


def _once(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _seconds(ways: Iterable[str], call: Callable[[str], Any]) -> dict[str, float]:
    """Seconds of each way's quickest call, as other programs only add to them; the ways take turns.

    The first call of a way allocates and prepares. So it counts only where it is `COLD` times as slow as the best, or where all
    calls are long; then each way that may be the quickest is called once more.
    """
    cold = {way: _once(partial(call, way)) for way in ways}
    long = min(cold.values()) >= LONG_CALL
    first = cold if long else {way: _once(partial(call, way)) for way in _close(cold, COLD)}
    promising = _close(first, HOPELESS)
    measured = {way: [first.get(way, seconds)] for way, seconds in cold.items()}
    for way in promising * (1 if long else ROUNDS) if len(promising) > 1 else ():
        measured[way].append(_once(partial(call, way)))
    return {way: min(each) for way, each in measured.items()}


def _close(seconds: Mapping[str, float], times: float) -> list[str]:
    """The ways that take at most so many times as long as the fastest one."""
    limit = times * min(seconds.values())
    return [way for way, each in seconds.items() if each <= limit]


def fastest(seconds: Mapping[str, float]) -> str:
    """The first way that takes at most `TIE` times as long as the fastest one: torch's own comes first."""
    return _close(seconds, TIE)[0]
