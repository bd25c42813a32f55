"""The training loop and the evaluation loop.

`train()` is a generator: it yields a `Step` after every step and an `Epoch` after every epoch, and whoever drives
it saves, draws or stops at any of them. All that it needs to go on later is in `State`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import distributed
from .batches import Batch, Batches
from .device import autocast
from .errors import NonFiniteLossError
from .model import ResNet, build_model
from .optimizer import make_optimizer, rates, set_rates, sharpest
from .recipe import Recipe

EVALUATION_BATCH = 1000


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


@dataclass
class State:
    """Where a run stands. `epoch` and `step` count what is done; `totals` sums loss and hits over the epoch so far."""

    model: ResNet
    optimizer: torch.optim.Optimizer
    averaged: ResNet | None
    totals: Tensor  # float64 (2,): sum over this rank's images of the loss, and of hits
    bad_step: Tensor  # int64 (): first step of the run whose loss was not finite; -1 for none
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0  # of the epoch so far
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def tested(self) -> ResNet:
        """The model that is evaluated: the averaged one where there is averaging."""
        return self.averaged or self.model

    def tensors(self) -> list[Tensor]:
        """Everything that a checkpoint holds and that must be finite numbers."""
        slots = [value for slot in self.optimizer.state.values() for value in slot.values() if torch.is_tensor(value)]
        return [*self.model.state_dict().values(), *self.tested.state_dict().values(), *slots, self.totals]

    def check_finite(self, recipe: Recipe, steps: int) -> None:
        """Reads from the device whether every loss so far, and every weight, is a finite number, on every rank.

        Raises:
            NonFiniteLossError: one is not; says at which step and learning rate.
        """
        bad = int(self.bad_step)
        finite = [tensor.isfinite().all().to(self.totals.device) for tensor in self.tensors()]
        if bad < 0 and not torch.stack(finite).all():  # one read, not one a tensor
            bad = self.epoch * steps + self.step - 1
        bad = min((each for each in distributed.gather(bad) if each >= 0), default=-1)
        if bad >= 0:
            lr, _ = rates(recipe, bad, recipe.epochs * steps)
            raise NonFiniteLossError(
                f"the loss is not finite since step {bad % steps + 1} of epoch {bad // steps + 1} (LR {lr:.4g}); "
                f"try a lower --max-lr than {recipe.max_lr:g}, or --precision float32"
            )


def start(recipe: Recipe, device: torch.device, classes: int = 10) -> State:
    """A run before its first step."""
    model = build_model(recipe, classes).to(device)
    return State(
        model=model,
        optimizer=make_optimizer(recipe, model),
        averaged=copy.deepcopy(model) if recipe.ema_decay else None,
        totals=torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device),
        bad_step=torch.tensor(-1, device=device),
    )


def make_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """The training objective: mean over the batch, in float32, of the model's output."""
    if recipe.loss == "nll":
        return lambda output, labels: functional.nll_loss(output.float(), labels)
    return lambda output, labels: functional.cross_entropy(output.float(), labels, label_smoothing=recipe.label_smoothing)


def train(
    recipe: Recipe,
    state: State,
    batches: Batches,
    evaluation: Callable[[], Iterable[Batch]],
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Step | Epoch]:
    """Trains from where `state` stands to the recipe's last epoch, changing `state` in place.

    Of several ranks each calls it with its share of the images, and gets the same records but for `Step.loss`. `forward` is
    what a step calls in place of `state.model`, whose weights it must share: a compiled forward pass.

    Raises:
        NonFiniteLossError: at the end of an epoch with a loss that was not finite, of a step or of the evaluation.
    """
    loss_of, total_steps = make_loss(recipe), recipe.epochs * batches.steps
    forward = forward or distributed.parallel(state.model)
    while state.epoch < recipe.epochs:
        state.model.train()
        clock = time.perf_counter()
        for images, labels in batches.epoch(state.epoch, state.step):
            done = state.epoch * batches.steps + state.step
            lr, momentum = rates(recipe, done, total_steps)
            set_rates(state.optimizer, lr, momentum)
            # The mean over the ranks of gradients weighted so is that of the whole batch's mean loss.
            whole = min(recipe.batch_size, batches.count - state.step * recipe.batch_size)
            weight = len(labels) * distributed.ranks() / whole
            output, loss = _backward(recipe, forward, loss_of, images, labels, weight)
            if done >= round(total_steps * (1 - recipe.sam_share)):
                with sharpest(state.model, recipe.sam_radius):
                    _backward(recipe, forward, loss_of, images, labels, weight)
            state.optimizer.step()
            state.optimizer.zero_grad()
            if state.averaged is not None and (done + 1) % recipe.ema_every == 0:
                update_average(state.averaged, state.model, recipe.ema_decay)

            state.totals += torch.stack([loss * len(labels), (output.argmax(1) == labels).sum()])
            state.bad_step.masked_fill_((state.bad_step < 0) & ~loss.isfinite(), done)
            state.step += 1
            state.seconds += time.perf_counter() - clock
            yield Step(state.epoch + 1, state.step, batches.steps, lr, loss)
            clock = time.perf_counter()

        state.check_finite(recipe, batches.steps)  # waits for the device, so the clock after it is right
        state.seconds += time.perf_counter() - clock
        yield _finish_epoch(recipe, state, batches, evaluation, device)


def _backward(recipe, forward, loss_of, images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Adds `weight` times the gradient of the batch's mean loss to the weights'; gives the output and that loss, detached."""
    with autocast(recipe, images.device):
        output = forward(images)
    loss = loss_of(output, labels)
    loss.backward(torch.full_like(loss, weight))
    return output.detach(), loss.detach()


def _finish_epoch(recipe, state: State, batches: Batches, evaluation, device) -> Epoch:
    distributed.merge([state.model, state.tested], state.totals)
    predictions = distributed.gather(predict(recipe, state.tested, evaluation(), device))
    logits, labels = (torch.cat(parts) for parts in zip(*predictions, strict=True))
    lr, _ = rates(recipe, (state.epoch + 1) * batches.steps - 1, recipe.epochs * batches.steps)
    loss, hits = (state.totals / batches.count).tolist()
    metrics = {
        "epoch": state.epoch + 1,
        "lr": lr,
        "train_loss": loss,
        "train_accuracy": 100 * hits,
        **scores(logits, labels),
        "seconds": state.seconds,
        "images_per_second": batches.count / state.seconds,
    }
    if not math.isfinite(metrics["test_loss"]):
        raise NonFiniteLossError(
            f"the loss on the evaluation images is not finite after epoch {state.epoch + 1}; try a lower --max-lr than {recipe.max_lr:g}"
        )
    state.history.append(metrics)
    state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
    state.totals.zero_()
    return Epoch(metrics)


@torch.no_grad()
def update_average(averaged: ResNet, model: ResNet, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * model, for parameters and BatchNorm running statistics."""
    pairs = zip(averaged.state_dict().values(), model.state_dict().values(), strict=True)
    old, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(list(old), list(new), 1 - decay)


@torch.inference_mode()
def predict(
    recipe: Recipe, model: ResNet, batches: Iterable[Batch], device: torch.device, view: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Logits of a view of the images, float32 (N, classes), and labels, int64 (N,); on the CPU."""
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with autocast(recipe, device):
            logits.append(model.logits(view(images)).float())
        labels.append(targets)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean negative log likelihood, and accuracy in percent, of logits (N, classes)."""
    loss = functional.cross_entropy(logits.double(), labels)
    hits = (logits.argmax(1) == labels).double().mean()
    return {"test_loss": float(loss), "test_accuracy": 100 * float(hits)}
