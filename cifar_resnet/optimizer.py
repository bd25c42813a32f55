"""What moves the weights: SGD, Adam, AdamW, or Muon, sharpness-aware or not; and the learning rate and momentum of every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .model import ResNet
from .recipe import Recipe
from .schedule import one_cycle


class Muon(torch.optim.SGD):
    """SGD, but for groups with a `muon_momentum`: each kernel there moves by its orthogonalised Nesterov momentum.

    It moves by `lr_factor` times the learning rate, which is the same in all groups, as the range test sets it.

    Such a kernel, (outputs, inputs, 3, 3), is scaled to the norm sqrt(outputs) before it moves, as BatchNorm behind it
    makes its own norm irrelevant. Muon is Jordan's (2024, https://kellerjordan.github.io/posts/muon/); momentum, scaling
    and number of iterations are as cifar10-airbench has them. `torch.optim.Muon` takes no kernels of four dimensions.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if "muon_momentum" in group:
                self._orthogonalise(**group)
        return super().step(closure)

    def _orthogonalise(self, params: list[Tensor], muon_momentum: float, lr_factor: float, **_: Any) -> None:
        """Scales the kernels, and leaves for SGD, as their gradients, where they go; all at once, as launches cost a GPU more."""
        gradients = [cast(Tensor, kernel.grad) for kernel in params]  # every step has gradients for all
        for kernel in params:
            if "momentum_buffer" not in self.state[kernel]:
                self.state[kernel]["momentum_buffer"] = torch.zeros_like(kernel)
        buffers = [self.state[kernel]["momentum_buffer"] for kernel in params]
        torch._foreach_mul_(buffers, muon_momentum)
        torch._foreach_add_(buffers, gradients)
        directions = torch._foreach_add(gradients, buffers, alpha=muon_momentum)
        scales = torch._foreach_mul(torch._foreach_reciprocal(torch._foreach_norm(params)), [len(each) ** 0.5 for each in params])
        torch._foreach_mul_(params, scales)
        rows = [each.to(self.dtype, memory_format=torch.contiguous_format).flatten(1) for each in directions]
        for gradient, direction in zip(gradients, orthogonalise(rows), strict=True):
            gradient.copy_(direction.view_as(gradient))
        torch._foreach_mul_(gradients, lr_factor)


def orthogonalise(matrices: list[Tensor], iterations: int = 3) -> list[Tensor]:
    """Matrices with the singular vectors of these, each (M, N), and singular values near 1 (between about 0.5 and 1.3).

    The quintic Newton-Schulz iteration with Jordan's coefficients, on the side that is shorter.
    """
    flat = [each.T if len(each) > each.shape[1] else each for each in matrices]
    x = torch._foreach_div(flat, torch._foreach_add(torch._foreach_norm(flat), 1e-7))
    for _ in range(iterations):
        grams = [each @ each.T for each in x]
        squares = [each @ gram for each, gram in zip(torch._foreach_mul(grams, 2.0315), grams, strict=True)]
        factors = torch._foreach_add(torch._foreach_mul(grams, -4.7750), squares)
        x = torch._foreach_add(torch._foreach_mul(x, 3.4445), [factor @ each for factor, each in zip(factors, x, strict=True)])
    return [each.T if len(matrix) > matrix.shape[1] else each for each, matrix in zip(x, matrices, strict=True)]


def make_optimizer(recipe: Recipe, model: ResNet) -> torch.optim.Optimizer:
    """The recipe's optimizer for all weights of the model; it cuts large gradients as the recipe says, in its step."""
    optimizer = _optimizer(recipe, model)
    if recipe.grad_clip:
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(model.parameters(), recipe.grad_clip))
    return optimizer


def _optimizer(recipe: Recipe, model: ResNet) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    common: dict[str, Any] = dict(lr=recipe.max_lr, weight_decay=recipe.weight_decay, fused=parameters[0].device.type != "mps")
    if recipe.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, betas=(recipe.momentum, 0.999), **common)
    common |= dict(momentum=recipe.momentum, nesterov=recipe.nesterov)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, **common)
    first = model.prep[0].weight
    kernels = [p for p in parameters if p.dim() == 4 and p is not first]
    of_kernels = dict(
        muon_momentum=recipe.muon_momentum, lr_factor=recipe.muon_lr_factor, momentum=0.0, nesterov=False, weight_decay=0.0
    )
    rest = [p for p in parameters if p.dim() != 4 or p is first]
    return Muon(
        [{"params": rest}, {"params": kernels, **of_kernels}],
        torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32,
        **common,
    )


@contextmanager
def sharpest(model: nn.Module, radius: float) -> Iterator[None]:
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv:2010.01412): takes the gradients, and lends the weights where
    the loss is about highest within the radius; gradients found there are those for the step from where they were.

    The radius is the Euclidean norm over kernels and FC weight, each measured in its own norm: BatchNorm makes that of a kernel
    irrelevant. BatchNorm's running statistics are left as they were.
    """
    weights = [(weight, weight.grad) for weight in model.parameters() if weight.dim() > 1 and weight.grad is not None]
    lent = [*(weight for weight, _ in weights), *model.buffers()]
    kept = [tensor.detach().clone() for tensor in lent]
    try:
        with torch.no_grad():
            climb = [weight.square().sum() * gradient for weight, gradient in weights]
            length = torch.stack([weight.norm() * gradient.norm() for weight, gradient in weights]).norm()
            for (weight, _), move in zip(weights, climb, strict=True):
                weight.add_(move * (radius / length.clamp(min=1e-12)))
        model.zero_grad()
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(lent, kept, strict=True):
                tensor.copy_(before)


def rates(recipe: Recipe, step: int, total_steps: int) -> tuple[float, float]:
    """Learning rate and momentum at a step of the run."""
    fraction, first = recipe.peak_epoch / recipe.epochs, recipe.max_lr / recipe.div_factor
    lr = one_cycle(step, total_steps, fraction, first, recipe.max_lr, first / recipe.final_div_factor)
    if recipe.base_momentum is None:
        return lr, recipe.momentum
    return lr, one_cycle(step, total_steps, fraction, recipe.momentum, recipe.base_momentum, recipe.momentum)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif "muon_momentum" not in group:
            group["momentum"] = momentum
