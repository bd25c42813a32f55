"""The ResNet: 6.57 million parameters at width 64 for 10 classes, four convolutions, two residual blocks, one fully connected layer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import checked
from ..data.augment import TensorAugmentation
from ..errors import UsageError
from ..recipe import Recipe
from . import fused, fused_cpu
from .convolution import Conv3x3
from .fused_cpu import BatchNorm
from .runtime import check_defaults

SEEDING = threading.Lock()  # of torch's random numbers, which all threads share
WHITENING_IMAGES = 5000  # at most: every k-th training image


class Chain(nn.Sequential):
    """Modules one after another; plus a residual, if one is given. 2x2 max pooling, BatchNorm and ReLU in a row are few passes over
    memory, in a CUDA graph of training, and on a CPU where `ways.use` says so; but not where one of them has hooks."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        modules, at = list(self), 0
        while at < len(modules):
            pool = isinstance(modules[at], nn.MaxPool2d)
            part = modules[at : at + pool + 2]
            if at_once := _norm_relu(x, part):
                at += len(part)
                fits = residual is not None and at == len(modules) and not pool and _alike(x, residual)
                x = at_once(x, part[pool], pool, residual if fits else None)
                residual = None if fits else residual
            else:
                x, at = modules[at](_as_mps_wants(x)), at + 1
        return x if residual is None else residual + x


def _norm_relu(x: Tensor, part: list[nn.Module]) -> Callable[..., Tensor] | None:
    """What computes these modules at once, BatchNorm and ReLU, and what is before them; None where nothing does."""
    *_, norm, relu = [None, None, *part]
    if not isinstance(norm, BatchNorm) or not isinstance(relu, nn.ReLU) or any(map(_hooked, part)):
        return None
    if fused.usable(x, norm):
        return fused.norm_relu
    return fused_cpu.norm_relu if fused_cpu.usable(x, norm) else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _alike(x: Tensor, residual: Tensor) -> bool:
    return (x.shape, x.dtype) == (residual.shape, residual.dtype)


def _as_mps_wants(x: Tensor) -> Tensor:
    """On Apple's GPUs some versions of torch have wrong gradients of BatchNorm where channels are last (pytorch/pytorch issue 175189)."""
    return x.contiguous() if x.device.type == "mps" else x


class ResBlock(nn.Module):
    """y = x + relu(bn(conv(relu(bn(conv(x)))))): the sum comes after the last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [module for _ in range(2) for module in (Conv3x3(channels, channels), BatchNorm(channels), nn.ReLU())]
        self.block = Chain(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, residual=x)


class ResNet(nn.Module):
    """prep 3>64, layer1 64>128 with a residual block, layer2 128>256, layer3 256>512 with a residual block, FC.

    The variants are the `Recipe` fields of the panel Model; the channels are those of the width 64.
    """

    def __init__(self, recipe: Recipe, classes: int = 10) -> None:
        super().__init__()
        bias, width = recipe.conv_bias, recipe.width
        after_prep = [BatchNorm(width), nn.ReLU()]
        self.prep = Chain(Conv3x3(3, width, bias), *(after_prep if recipe.prep_order == "bn-relu" else reversed(after_prep)))

        def layer(inputs: int, outputs: int, *then: nn.Module) -> Chain:
            pool, rest = nn.MaxPool2d(2), [BatchNorm(outputs), nn.ReLU()]
            after_conv = [pool, *rest] if recipe.pool_position == "before-bn" else [*rest, pool]
            return Chain(Conv3x3(inputs, outputs, bias), *after_conv, *then)

        self.layer1 = layer(width, 2 * width, ResBlock(2 * width))
        self.layer2 = layer(2 * width, 4 * width)
        self.layer3 = layer(4 * width, 8 * width, ResBlock(8 * width))
        self.pool = nn.MaxPool2d(4)
        self.fc = nn.Linear(8 * width, classes, bias=recipe.fc_bias)
        self.logit_scale = recipe.logit_scale
        self.output = recipe.output

    def logits(self, x: Tensor) -> Tensor:
        """Scaled logits, (N, classes), of normalised images, (N, 3, 32, 32); in every variant."""
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.fc(self.pool(x).flatten(1)) * self.logit_scale

    def forward(self, x: Tensor) -> Tensor:
        """What the variant puts out: logits, probabilities or log-probabilities, (N, classes)."""
        logits = self.logits(x)
        if self.output == "logits":
            return logits
        function = torch.softmax if self.output == "softmax" else torch.log_softmax
        return function(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


@checked
def build_model(recipe: Recipe, classes: int = 10) -> ResNet:
    """A ResNet in channels-last layout, initialised from the recipe's seed; torch's random state is left as it was.

    Where the recipe's `init` is whiten, the first convolution waits for training images; see `whiten`.

    Raises:
        UsageError: `classes` is below 1, or torch does not make tensors in float32 on the CPU.
    """
    check_defaults()
    if classes < 1:
        raise UsageError(f"classes {classes} must be at least 1")
    with SEEDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = ResNet(recipe, classes)
    if recipe.init != "default":
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module is not model.prep[0]:
                nn.init.dirac_(module.weight[: module.in_channels])
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def whiten(model: ResNet, recipe: Recipe, images: np.ndarray) -> None:
    """Sets the kernels of the first convolution to whitening filters of training images, uint8 (N, 32, 32, 3).

    Each filter is there with both signs, by falling eigenvalue, as far as the convolution has outputs. Outputs beyond the filters
    stay as they are. After cifar10-airbench (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.2), whose filters are 2x2
    and not trained.
    """
    chosen = torch.from_numpy(images[:: -(-len(images) // WHITENING_IMAGES)])
    kernels = whitening_kernels(TensorAugmentation(recipe, torch.device("cpu")).normalise(chosen))
    weight = next(model.prep.parameters())
    pairs = torch.stack([kernels, -kernels], 1).flatten(0, 1)[: len(weight)]
    weight[: len(pairs)] = pairs.to(weight)


def whitening_kernels(images: Tensor) -> Tensor:
    """Kernels (K, 3, 3, 3), by falling eigenvalue, whose outputs on images (N, 3, H, W) have variance 1 and no covariance.

    They are the eigenvectors of the covariance of all 3x3 patches, over the root of its eigenvalues, to which a little is added. K
    is 27, but for images that do not vary in every direction: grey ones have 9.
    """
    count, total, products = 0, torch.zeros(27, dtype=torch.float64), torch.zeros(27, 27, dtype=torch.float64)
    for part in images.split(500):
        patches = functional.unfold(part.double(), 3).transpose(0, 1).flatten(1)  # (27, patches)
        count, total, products = count + patches.shape[1], total + patches.sum(1), products + patches @ patches.T
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    varies = values > 1e-6 * values.max().clamp(min=1e-4)  # or it is rounding
    return (vectors / (values + 5e-4).sqrt()).T[varies].flip(0).reshape(-1, 3, 3, 3)
