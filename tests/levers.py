"""Changes of training to try before one becomes a field of `Recipe`; `trial.py` takes them by name, as the "levers" of an arm.

Each is a context manager: runs that train while it is open train with the change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cifar_resnet.data import loaders
from cifar_resnet.data.datasets import load
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.training import capture, engine, optim

SIDES = ((0.15, 20), (0.5, 24), (1.0, 32))  # of the images, in pixels, until this share of the epochs is done


@contextmanager
def first_convolution_not_trained(recipe) -> Iterator[None]:
    """The kernels of the first convolution stay as they start."""
    build = engine.build_model

    def built(*arguments):
        model = build(*arguments)
        model.prep[0].weight.requires_grad_(False)
        return model

    with patch.object(engine, "build_model", built):
        yield


@contextmanager
def resize(recipe) -> Iterator[None]:
    """Smaller images in the first half of the epochs. The steps are not captured: a graph has images of one size."""
    build, epoch = engine.build_model, TensorLoader.epoch

    def built(*arguments):
        model = build(*arguments)
        model.pool = nn.AdaptiveMaxPool2d(1)
        return model

    def smaller(self, number, first=0):
        side = next(side for until, side in SIDES if number < until * recipe.epochs)
        for batch in epoch(self, number, first):
            small = functional.interpolate(batch.images, size=(side, side), mode="bilinear", antialias=True)
            yield batch._replace(images=small if side < 32 else batch.images)

    with (
        patch.object(engine, "build_model", built),
        patch.object(TensorLoader, "epoch", smaller),
        patch("cifar_resnet.jobs.train.capturable", lambda state: False),
    ):
        yield


def cost_of_resizing(recipe):
    before, cost = 0.0, 0.0
    for until, side in SIDES:
        cost += (until - before) * (side / 32) ** 2
        before = until
    return cost


@contextmanager
def in_step(name, changed) -> Iterator[None]:
    """`changed` in place of a function of the engine, captured or not."""
    with patch.object(engine, name, changed), patch.object(capture, name, changed):
        yield


@contextmanager
def sam_every_other_step(recipe) -> Iterator[None]:
    """Of the sharpness-aware steps every second one is plain."""
    rates_at = engine.rates_at

    def every_other(recipe, step, total_steps):
        rates = rates_at(recipe, step, total_steps)
        return rates._replace(sam=rates.sam and step % 2 == 0)

    with in_step("rates_at", every_other):
        yield


@contextmanager
def sam_along_momentum(recipe, before=False) -> Iterator[None]:
    """Sharpness-aware steps take their gradient further on along the momentum of the steps before, and so need no first pass.

    As in Momentum-SAM (Becker, Altrock and Risse 2024, arXiv:2401.12033), but for the radius, which is relative to the weights.
    With `before` the plain steps do so instead, and the sharpness-aware ones stay as they are.
    """
    plain_step, backward = engine.train_step, engine._backward

    def ahead(state, batch):
        weights = [weight for weight in state.model.parameters() if weight.dim() > 1]
        kept = [weight.detach().clone() for weight in weights]
        slots = [state.optimizer.state[weight] for weight in weights]
        optim._climb(weights, [slot.get("momentum_buffer", torch.zeros(())) for slot in slots], -recipe.sam_radius)
        result = backward(state, batch)
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
        return result

    def step(state, batch, rates):
        with patch.object(engine, "_backward", ahead if rates.sam != before else backward):
            return plain_step(state, batch, rates._replace(sam=rates.sam and before))

    with in_step("train_step", step):
        yield


@contextmanager
def floor(recipe) -> Iterator[None]:
    """The schedule ends after nine tenths of the steps; the others have its lowest learning rate."""
    rates_at = engine.rates_at

    def sooner(recipe, step, total_steps):
        end = round(0.9 * total_steps)
        return rates_at(recipe, step, total_steps)._replace(lr=rates_at(recipe, min(step, end - 1), end).lr)

    with in_step("rates_at", sooner):
        yield


@contextmanager
def no_holes_at_the_end(recipe) -> Iterator[None]:
    """The images of the last eighth of the epochs have no holes; of fewer than eight epochs none is changed."""
    drawn = loaders.draw

    def draw(recipe, epoch, *where):
        choices = drawn(recipe, epoch, *where)
        return choices._replace(holes=torch.full_like(choices.holes, -32)) if 8 * epoch >= 7 * recipe.epochs else choices

    with patch.object(loaders, "draw", draw):
        yield


@contextmanager
def bias_rate(recipe, factor) -> Iterator[None]:
    """The biases of BatchNorm train at this factor times the learning rate of the rest; their weight decay is as much less."""
    build = engine.build_model

    def built(*arguments):
        model = build(*arguments)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.register_hook(lambda gradient: factor * gradient)
        return model

    with patch.object(engine, "build_model", built):
        yield


@contextmanager
def balanced_batches(recipe) -> Iterator[None]:
    """Every batch has as many images of each class, or nearly."""
    order, labels = loaders.epoch_order, load(recipe, None, lambda message: None).train.labels

    def balanced(recipe, epoch, count):
        shuffled = order(recipe, epoch, count)
        turn = np.empty(count, dtype=np.int64)
        for label in np.unique(labels):
            turn[labels[shuffled] == label] = np.arange((labels == label).sum())
        return shuffled[np.argsort(turn, kind="stable")]

    with patch.object(loaders, "epoch_order", balanced):
        yield


@contextmanager
def lookahead(recipe) -> Iterator[None]:
    """Every five steps the weights become their average, of more and more steps; at the end too. BatchNorm's momentum is 0.4.

    As in cifar10-airbench, but for the last step, which there moves the average once more.
    """
    build, slow = engine.build_model, []

    def built(*arguments):
        model = build(*arguments)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.4
        return model

    def looking(run_epoch):
        def epoch(*arguments):
            state, loader = arguments[-2:]
            total, done = recipe.epochs * loader.steps, state.epoch * loader.steps + state.step
            fast = [tensor for tensor in state.model.state_dict().values() if tensor.is_floating_point()]
            if done == 0 or not slow:
                slow[:] = [tensor.clone() for tensor in fast]
            for now, loss in enumerate(run_epoch(*arguments), done + 1):
                if now % 5 == 0 or now == total:
                    decay = 1.0 if now == total else 0.95**5 * (now / total) ** 3
                    for average, weights in zip(slow, fast, strict=True):
                        average.lerp_(weights, 1 - decay)
                        weights.copy_(average)
                yield loss

        return epoch

    with (
        patch.object(engine, "build_model", built),
        patch.object(engine, "plain_epoch", looking(engine.plain_epoch)),
        patch.object(capture.CapturedEpoch, "__call__", looking(capture.CapturedEpoch.__call__)),
    ):
        yield


LEVERS = {  # name: the change, and by how much it multiplies a run's arithmetic
    "first convolution not trained": (first_convolution_not_trained, lambda recipe: 1.0),
    "resize": (resize, cost_of_resizing),
    "lookahead": (lookahead, lambda recipe: 1.0),
    "sam every other step": (sam_every_other_step, lambda recipe: (1 + recipe.sam_share / 2) / (1 + recipe.sam_share)),
    "sam along momentum": (sam_along_momentum, lambda recipe: 1 / (1 + recipe.sam_share)),
    "sam along momentum before": (partial(sam_along_momentum, before=True), lambda recipe: 1.0),
    "no holes at the end": (no_holes_at_the_end, lambda recipe: 1.0),
    "floor": (floor, lambda recipe: 1.0),
    "bias rate 4": (partial(bias_rate, factor=4.0), lambda recipe: 1.0),
    "bias rate 1/4": (partial(bias_rate, factor=0.25), lambda recipe: 1.0),
    "balanced batches": (balanced_batches, lambda recipe: 1.0),
}
