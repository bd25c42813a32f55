"""One training step, the loop around it, and the evaluation.

`train_step` is a plain function of state, batch and rates. `train` is a generator: it yields a `Step` after every step
and an `Epoch` after every epoch, and whoever drives it saves, draws or stops at any of them. All that it needs to go on
later is in `State`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.loaders import Batch, Loader
from ..errors import NonFiniteLossError
from ..recipe import Recipe
from . import distributed, step_kernels, ways
from .kernels import in_a_graph
from .model import ResNet, build_model, whiten
from .optim import average_weight, learning_rate, make_optimizer, sam, set_rates, update_average
from .runtime import autocast, cast_at_once, dtype, wait_for


class Step(NamedTuple):
    """After one step. `loss`, of this rank's images, is a tensor on the device: reading it waits for the step."""

    epoch: int  # from 1
    step: int  # in its epoch, from 1
    steps: int  # an epoch has
    lr: float
    loss: Tensor


class Epoch(NamedTuple):
    """After one epoch: what `metrics.json` says of it."""

    metrics: dict[str, float]


class Rates(NamedTuple):
    """What a step does with its batch. Numbers may be tensors () on the device, so that a graph of the step can hold them."""

    step: int | Tensor  # of the run, from 0
    lr: float | Tensor
    momentum: float
    sam: bool = False  # a second pass, where the loss is about highest nearby
    average: float | Tensor | None = None  # weight of the new weights in the average; None: it is not updated


def rates_at(recipe: Recipe, step: int, total_steps: int) -> Rates:
    """The rates of a step of a run, from 0."""
    sharp = step >= recipe.first_sharp_step(total_steps)
    return Rates(step, *learning_rate(recipe, step, total_steps), sharp, average_weight(recipe, step))


@dataclass
class Clock:
    """Seconds of training: wall time, the device waited for at both ends, without what runs in `paused`."""

    device: torch.device
    seconds: float = 0.0
    began: float | None = None

    def start(self) -> None:
        wait_for(self.device)
        self.began = time.perf_counter()

    def stop(self) -> None:
        if self.began is not None:
            wait_for(self.device)
            self.seconds, self.began = self.seconds + time.perf_counter() - self.began, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is no training, saving for example; what the device still had to do counts."""
        running = self.began is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()


@dataclass
class State:
    """Where a run stands. `epoch` and `step` count what is done; `totals` sums loss and hits over the epoch so far."""

    recipe: Recipe
    model: ResNet
    forward: Callable[[Tensor], Tensor]  # what a step calls: the model, or another form of it that shares its weights
    optimizer: torch.optim.Optimizer
    averaged: ResNet | None
    totals: Tensor  # float64 (2,): sum over this rank's images of the loss, and of hits
    bad_step: Tensor  # int64 (): first step of the run whose loss was not finite; -1 for none
    clock: Clock  # of the epoch so far
    epoch: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"State({self.recipe.title} on {self.device}: {self.epoch} epochs and {self.step} steps done)"

    @property
    def device(self) -> torch.device:
        return self.totals.device

    @property
    def tested(self) -> ResNet:
        """The model that is evaluated: the averaged one where there is averaging."""
        return self.averaged or self.model

    def tensors(self) -> list[Tensor]:
        """Everything that a checkpoint holds and that must be finite numbers."""
        return [*self.model.state_dict().values(), *self.tested.state_dict().values(), *self.slots(), self.totals]

    def slots(self) -> list[Tensor]:
        """What the optimizer keeps for each weight, as far as it has been made."""
        return [value for slots in self.optimizer.state.values() for value in slots.values() if torch.is_tensor(value)]

    def check_finite(self, steps: int) -> None:
        """Reads from the device whether every loss so far, and every weight, is a finite number, on every rank.

        Raises:
            NonFiniteLossError: one is not; says at which step and learning rate.
        """
        bad = int(self.bad_step)
        if bad < 0 and not finite(self.tensors()):
            bad = self.epoch * steps + self.step - 1
        bad = min((each for each in distributed.gather(bad) if each >= 0), default=-1)
        if bad >= 0:
            lr, _ = learning_rate(self.recipe, bad, self.recipe.epochs * steps)
            coarse = ", or --precision float32" if self.recipe.precision == "bfloat16" else ""
            since = f"step {bad % steps + 1} of epoch {bad // steps + 1} (LR {lr:.4g})"
            advice = f"try a lower --max-lr than {self.recipe.max_lr:g}{coarse}"
            raise NonFiniteLossError(f"the loss is not finite since {since}; {advice}")


def finite(tensors: list[Tensor]) -> bool:
    """Whether every element is a finite number, by one read from each device."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    highest = [torch.stack(torch._foreach_norm(group, torch.inf)).isfinite().all() for group in groups.values()]
    return all(bool(each) for each in highest)


def start(
    recipe: Recipe,
    device: torch.device,
    classes: int = 10,
    convolutions: Mapping[str, Sequence[str]] | None = None,
    images: np.ndarray | None = None,
) -> State:
    """A run before its first step, with convolutions computed in these ways; see `ways.use`.

    `images` are the training images, uint8 (N, 32, 32, 3), for an `init` of whiten. Without them the first convolution starts as
    with dirac; that is of use where other weights are loaded.
    """
    model = build_model(recipe, classes)
    if recipe.init == "whiten" and images is not None:
        whiten(model, recipe, images)
    model.to(device)
    ways.use(model, convolutions)
    return State(
        recipe=recipe,
        model=model,
        forward=model,
        optimizer=make_optimizer(recipe, model),
        averaged=copy.deepcopy(model) if recipe.ema_decay else None,
        totals=torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device),
        bad_step=torch.tensor(-1, device=device),
        clock=Clock(device),
    )


def train_step(state: State, batch: Batch, rates: Rates) -> Tensor:
    """Forward, loss, backward, the second pass of a sharpness-aware step, optimizer, averaging and totals.

    Changes weights, optimizer, average, totals and `bad_step` in place, and nothing else of the state. It reads nothing from the device.

    Returns:
        The mean loss over the batch at the weights before the step, float32 (), on the device.
    """
    recipe, model = state.recipe, state.model
    set_rates(state.optimizer, rates.lr, rates.momentum)
    output, loss = _backward(state, batch)
    if rates.sam:
        with sam(model, recipe.sam_radius):
            _backward(state, batch)
    if recipe.grad_clip:
        nn.utils.clip_grad_value_(model.parameters(), recipe.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.averaged is not None and rates.average is not None:
        update_average(state.averaged, model, rates.average)
    _count(state, batch, output, loss, rates.step)
    return loss


def _backward(state: State, batch: Batch) -> tuple[Tensor, Tensor]:
    """Adds the batch's weight times the gradient of its mean loss to the weights'; gives the output and that loss, detached."""
    recipe = state.recipe
    with autocast(recipe, batch.images.device):
        output = cast_at_once(state.model, batch.images) if _casts_at_once(state) else state.forward(batch.images)
    if recipe.loss == "cross-entropy" and step_kernels.usable(recipe, output):
        loss, gradient = step_kernels.cross_entropy(recipe, output.detach(), batch.labels, batch.weight)
        output.backward(gradient)
    else:
        loss = training_loss(recipe, output, batch.labels)
        (batch.weight * loss).backward()
    return output.detach(), loss.detach()


def _casts_at_once(state: State) -> bool:
    """Whether one launch for all weights is worth it: in a graph."""
    return dtype(state.recipe) == torch.bfloat16 and state.forward is state.model and in_a_graph()


def _count(state: State, batch: Batch, output: Tensor, loss: Tensor, step: int | Tensor) -> None:
    """Adds the batch's losses and hits to the totals, and keeps the first step whose loss is not finite."""
    if step_kernels.usable(state.recipe, output):
        step_kernels.count(output, batch.labels, loss, state.totals, state.bad_step, step)
        return
    state.totals += torch.stack([loss * len(batch.labels), (output.argmax(1) == batch.labels).sum()])
    first_bad = (state.bad_step < 0) & ~loss.isfinite()
    state.bad_step.copy_(torch.where(first_bad, step, state.bad_step))


def training_loss(recipe: Recipe, output: Tensor, labels: Tensor) -> Tensor:
    """The training objective: mean over the batch, in float32, of the model's output (B, classes)."""
    if recipe.loss == "nll":
        return functional.nll_loss(output.float(), labels)
    return functional.cross_entropy(output.float(), labels, label_smoothing=recipe.label_smoothing)


def plain_epoch(state: State, loader: Loader) -> Iterator[Tensor]:
    """Takes the steps that are left of the epoch in which `state` stands; yields the loss of each."""
    total_steps, first = state.recipe.epochs * loader.steps, state.epoch * loader.steps
    for step, batch in enumerate(loader.epoch(state.epoch, state.step), start=first + state.step):
        yield train_step(state, batch, rates_at(state.recipe, step, total_steps))


def train(
    state: State,
    loader: Loader,
    evaluation: Callable[[], Iterable[Batch]],
    run_epoch: Callable[[State, Loader], Iterator[Tensor]] = plain_epoch,
) -> Iterator[Step | Epoch]:
    """Trains from where `state` stands to the recipe's last epoch, changing `state` in place.

    Of several ranks each calls it with its share of the images, and gets the same records but for `Step.loss`.

    Args:
        state: where the run stands; its clock runs inside an epoch, and whoever saves then does so in `clock.paused()`.
        loader: the training images.
        evaluation: gives the images that every epoch is judged by.
        run_epoch: takes an epoch's steps; see `plain_epoch`.

    Raises:
        NonFiniteLossError: at the end of an epoch with a loss that was not finite, of a step or of the evaluation.
    """
    recipe, total_steps = state.recipe, state.recipe.epochs * loader.steps
    if state.forward is state.model:
        state.forward = distributed.parallel(state.model)
    while state.epoch < recipe.epochs:
        state.model.train()
        state.clock.start()
        for loss in run_epoch(state, loader):
            lr, _ = learning_rate(recipe, state.epoch * loader.steps + state.step, total_steps)
            state.step += 1
            yield Step(state.epoch + 1, state.step, loader.steps, lr, loss)
        state.check_finite(loader.steps)
        state.clock.stop()
        yield _finish_epoch(state, loader, evaluation)


def _finish_epoch(state: State, loader: Loader, evaluation: Callable[[], Iterable[Batch]]) -> Epoch:
    distributed.merge([state.model, state.tested], state.totals)
    predictions = distributed.gather(predict_logits(state.recipe, state.tested, evaluation(), state.device))
    logits, labels = (torch.cat(parts) for parts in zip(*predictions, strict=True))
    lr, _ = learning_rate(state.recipe, (state.epoch + 1) * loader.steps - 1, state.recipe.epochs * loader.steps)
    loss, hits = (state.totals / loader.count).tolist()
    metrics = {
        "epoch": state.epoch + 1,
        "lr": lr,
        "train_loss": loss,
        "train_accuracy": 100 * hits,
        **scores(logits, labels),
        "seconds": state.clock.seconds,
        "images_per_second": loader.count / state.clock.seconds,
    }
    if not math.isfinite(metrics["test_loss"]):
        advice = f"try a lower --max-lr than {state.recipe.max_lr:g}"
        raise NonFiniteLossError(f"the loss on the evaluation images is not finite after epoch {state.epoch + 1}; {advice}")
    state.history.append(dict(metrics))  # who watches may write into theirs
    state.epoch, state.step, state.clock.seconds = state.epoch + 1, 0, 0.0
    state.totals.zero_()
    return Epoch(metrics)


@torch.inference_mode()
def predict_logits(
    recipe: Recipe, model: ResNet, batches: Iterable[Batch], device: torch.device, view: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Logits of a view of the images, float32 (N, classes), and labels, int64 (N,); on the CPU."""
    model.eval()
    logits, labels = [], []
    for batch in batches:
        with autocast(recipe, device):
            logits.append(model.logits(view(batch.images)).float())
        labels.append(batch.labels)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean negative log likelihood, and accuracy in percent, of logits (N, classes)."""
    loss = functional.cross_entropy(logits.double(), labels)
    hits = (logits.argmax(1) == labels).double().mean()
    return {"test_loss": float(loss), "test_accuracy": 100 * float(hits)}
