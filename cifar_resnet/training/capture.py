"""Training steps that wait for nothing but the GPU: each kind of step of a run is captured once as a CUDA graph, then replayed.

All that a step reads lies on the device before the epoch starts: the images, what the epoch chooses at random, and the rates of
the run, which the step finds by a counter there. So a step is one launch, whatever it computes. Without a GPU the same buffers
serve uncaptured, with the bits of the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.loaders import Loader, TensorLoader
from . import step_kernels
from .engine import Rates, State, rates_at, train_step
from .kernels import build, for_a_graph, try_kernels
from .optim import set_rates

WARM_UP = 3  # calls before a capture: libraries choose their algorithms, and the optimizer makes its buffers


class Kind(NamedTuple):
    """Steps of one kind are one graph."""

    size: int  # images
    sam: bool
    averages: bool


def capturable(state: State) -> bool:
    """Whether a graph can hold the steps of this run: on CUDA, at one momentum."""
    return state.device.type == "cuda" and state.recipe.base_momentum is None


@for_a_graph()
def graph_of(
    call: Callable[[], object], optimizer: torch.optim.Optimizer, before: Callable[[], object] = lambda: None,
    pool: Any = None, stream: torch.cuda.Stream | None = None,
) -> torch.cuda.CUDAGraph:  # fmt: skip
    """A CUDA graph of what `call`, which may step the optimizer, does on the current device, after a few warm-up calls.

    `before` is called before each of these. Graphs that never run at once save memory by a common pool, if they are captured on one stream.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    stream, graph, around = stream or torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream.wait_stream(around)
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                before()
                try_kernels(call)
    finally:
        around.wait_stream(stream)  # what follows a failure, too, comes after what it had begun
    try:
        for group in groups:
            group["capturable"] = True  # Adam asks for it inside a capture alone, and a checkpoint would keep it
        # Where a capture fails, the first of these comes back from its stream, and the second does not.
        with torch.cuda.stream(around), torch.cuda.graph(graph, pool=pool, stream=stream):
            call()
    finally:
        for group in groups:
            group["capturable"] = False
    return graph


class CapturedEpoch:
    """Takes the steps of an epoch, as `engine.plain_epoch` does, from buffers that stay where they are.

    Args:
        state: of the run; later calls must pass it again, or what `adopt` gave.
        loader: of the run.
    """

    def __init__(self, state: State, loader: TensorLoader) -> None:
        self.state, self.loader, self.device = state, loader, state.device
        recipe, self.total_steps = state.recipe, state.recipe.epochs * loader.steps
        self.rates = [rates_at(recipe, step, self.total_steps) for step in range(self.total_steps)]
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32  # as torch's optimizers take a rate there
        self.lr = torch.tensor([each.lr for each in self.rates], dtype=dtype, device=self.device)
        self.average = torch.tensor([each.average or 0.0 for each in self.rates], device=self.device)
        self.drawn = state.epoch, loader.draw(state.epoch)
        self.table = loader.send(self.drawn[1])
        self.done = torch.zeros((), dtype=torch.int64, device=self.device)  # steps of the run
        self.losses = torch.zeros(self.total_steps, device=self.device)
        self.graphs: dict[Kind, torch.cuda.CUDAGraph] = {}
        cuda = self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if cuda else None  # the graphs never run at once
        self.stream = torch.cuda.Stream(self.device) if cuda else None

    def kind(self, step: int) -> Kind:
        """Of a step of the run."""
        return Kind(self.loader.sizes[step % self.loader.steps], self.rates[step].sam, self.rates[step].average is not None)

    def __call__(self, state: State, loader: Loader) -> Iterator[Tensor]:
        """Takes the steps that are left of the epoch in which `state` stands; yields the loss of each."""
        assert state is self.state
        first = state.epoch * self.loader.steps
        epoch, drawn = self.drawn
        self.table.copy_(self.loader.send(drawn if epoch == state.epoch else self.loader.draw(state.epoch)))
        self.done.fill_(first + state.step)
        for step in range(first + state.step, first + self.loader.steps):
            kind = self.kind(step)
            if kind in self.graphs:
                self.graphs[kind].replay()
            else:
                self._step(kind, self.rates[step].momentum)
            set_rates(state.optimizer, self.rates[step].lr, self.rates[step].momentum)  # numbers again, for who saves
            yield self.losses[step]
        if state.epoch + 1 < state.recipe.epochs:
            self.drawn = state.epoch + 1, self.loader.draw(state.epoch + 1)  # while the GPU has steps to do

    def _step(self, kind: Kind, momentum: float) -> None:
        """The next step, which must be of this kind. Nothing here depends on a value of the device but what is computed there."""
        batch_of = partial(step_kernels.batch, self.loader) if step_kernels.usable_loader(self.loader) else self.loader.batch
        batch = batch_of(self.table, self.done % self.loader.steps, kind.size)
        average = torch.take(self.average, self.done) if kind.averages else None
        rates = Rates(self.done, torch.take(self.lr, self.done), momentum, kind.sam, average)
        loss = train_step(self.state, batch, rates)
        self.losses.index_copy_(0, self.done.view(1), loss.view(1))
        self.done += 1

    @for_a_graph()
    def _build(self, kind: Kind) -> None:
        """Builds our kernels, of a step of two images: they are the same for any number."""
        step = partial(self._step, kind._replace(size=2), self.state.recipe.momentum)
        torch.backends.cudnn.benchmark, before = False, torch.backends.cudnn.benchmark  # nothing is to be fast here
        try:
            try_kernels(partial(build, step))
        finally:
            torch.backends.cudnn.benchmark = before

    def capture(self) -> None:
        """Captures every kind of step that is left of the run, and leaves weights, optimizer and totals as they were."""
        first = self.state.epoch * self.loader.steps + self.state.step
        kinds = dict.fromkeys(self.kind(step) for step in range(first, self.total_steps))
        self.state.model.train()
        restore = snapshot(self.state)
        try:
            if kinds and not self.graphs:
                self._build(next(iter(kinds)))
            for kind in (each for each in kinds if each not in self.graphs):
                step = partial(self._step, kind, self.state.recipe.momentum)
                self.graphs[kind] = graph_of(step, self.state.optimizer, self.done.zero_, self.pool, self.stream)
        finally:
            restore()
            if first < self.total_steps:
                set_rates(self.state.optimizer, self.rates[first].lr, self.rates[first].momentum)  # not a tensor of the graph

    def adopt(self, state: State, loader: TensorLoader) -> State:
        """Goes on with another run of the same recipe but for its seed: its values move into the buffers of this one's.

        Returns:
            The state to go on with, in place of `state`.
        """
        with torch.no_grad():
            for mine, its in zip(_tensors(self.state), _tensors(state), strict=True):
                mine.copy_(its)
            for slot in self.state.slots():
                slot.zero_()
            for mine, its in zip(self.state.model.parameters(), state.model.parameters(), strict=True):
                for name, value in state.optimizer.state.get(its, {}).items():
                    self.state.optimizer.state[mine][name].copy_(value)
        where = ("recipe", "clock", "epoch", "step", "history")
        self.state = replace(self.state, **{name: getattr(state, name) for name in where})
        self.loader.recipe = loader.recipe
        self.drawn = state.epoch, loader.draw(state.epoch)
        return self.state


def _tensors(state: State) -> list[Tensor]:
    """What a step changes, the optimizer's buffers aside."""
    models = [state.model, *([state.averaged] if state.averaged is not None else [])]
    weights = [tensor for model in models for tensor in model.state_dict().values()]
    return [*weights, state.totals, state.bad_step]


def snapshot(state: State) -> Callable[[], None]:
    """Keeps all that a step changes; gives what puts it back. Buffers that the optimizer makes in between become zero."""
    kept, slots = [tensor.clone() for tensor in _tensors(state)], [(slot, slot.clone()) for slot in state.slots()]

    @torch.no_grad()
    def restore() -> None:
        for tensor, before in zip(_tensors(state), kept, strict=True):
            tensor.copy_(before)
        for slot in state.slots():
            slot.zero_()
        for slot, before in slots:
            slot.copy_(before)
        state.optimizer.zero_grad()  # a capture that failed leaves gradients that were never computed

    return restore
