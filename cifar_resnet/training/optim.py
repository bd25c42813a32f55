"""What moves the weights: SGD, Adam, AdamW or Muon, sharpness-aware minimisation, averaging; and the schedule of their rates."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ..recipe import Recipe
from . import muon_kernels
from .model import ResNet
from .runtime import dtype

ITERATIONS = 3  # of Newton-Schulz


class Muon(torch.optim.Optimizer):
    """Groups with a `muon_momentum` hold kernels, each moved by its orthogonalised Nesterov momentum; the others move by SGD.

    A kernel moves by `lr_factor` times the learning rate, which is the same in all groups, as the range test sets it. Before
    that the kernel, (outputs, inputs, 3, 3), is scaled to the norm sqrt(outputs), as BatchNorm behind it makes its own norm
    irrelevant. Muon is Jordan's (2024, https://kellerjordan.github.io/posts/muon/); momentum, scaling and number of iterations
    are as cifar10-airbench has them. `torch.optim.Muon` takes no kernels of four dimensions.

    Args:
        groups: `params`, and options that differ from the common ones.
        dtype: of the arithmetic of the orthogonalisation.
        fused: whether torch's fused SGD moves the weights.
        lr, momentum, nesterov, weight_decay: SGD's; the learning rate may be a float32 tensor () on the device.
    """

    def __init__(
        self, groups: list[dict[str, Any]], dtype: torch.dtype, *, lr: float, momentum: float, nesterov: bool, weight_decay: float, fused: bool
    ) -> None:  # fmt: skip
        super().__init__(groups, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            gradients, buffers = [parameter.grad for parameter in params], self._buffers(params, group)
            if "muon_momentum" in group:
                self._move_kernels(params, gradients, buffers, group)
            else:
                _sgd(params, gradients, buffers, group)

    def _buffers(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The momentum of each parameter, at first zero."""
        if not (group["momentum"] or "muon_momentum" in group):
            return []
        for parameter in params:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [self.state[parameter]["momentum_buffer"] for parameter in params]

    def _move_kernels(self, kernels: list[Tensor], gradients: list[Any], buffers: list[Tensor], group: dict[str, Any]) -> None:
        """All at once, as launches cost a GPU more than the arithmetic."""
        momentum, factor = group["muon_momentum"], group["lr_factor"]
        shapes = [(len(each), each[0].numel()) for each in kernels]
        device = kernels[0].device
        stacks = [torch.empty(count, *shape, dtype=self.dtype, device=device) for shape, count in Counter(shapes).items()]
        moves = _unstack(stacks, shapes)
        if muon_kernels.usable(kernels, gradients, buffers):
            squares = muon_kernels.add_momentum(gradients, buffers, kernels, moves, momentum)
            directions = _unstack(newton_schulz(stacks), shapes)
            muon_kernels.move_kernels(kernels, directions, squares, group["lr"], factor)
            return
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        wanted = torch._foreach_add(gradients, buffers, alpha=momentum)
        for move, each in zip(moves, wanted, strict=True):
            _as_kernel(move, each).copy_(each)
        for each, direction in zip(wanted, _unstack(orthogonalise(stacks), shapes), strict=True):
            each.copy_(_as_kernel(direction, each))
        torch._foreach_mul_(wanted, factor)
        scales = torch._foreach_reciprocal(torch._foreach_norm(kernels))
        torch._foreach_mul_(kernels, torch._foreach_mul(scales, [len(each) ** 0.5 for each in kernels]))
        _sgd(kernels, list(wanted), [], group)


def _sgd(params: list[Tensor], gradients: list[Any], buffers: list[Any], group: dict[str, Any]) -> None:
    """torch's own, of a group's options."""
    rates = {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay", "fused")}
    sgd(params, gradients, buffers, dampening=0.0, maximize=False, **rates)


def _unstack(stacks: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The matrices of stacks (K, M, N), in the order of their shapes (M, N); each stack has a shape of its own."""
    rest = {tuple(stack.shape[1:]): iter(stack.unbind()) for stack in stacks}
    return [next(rest[shape]) for shape in shapes]


def _as_kernel(matrix: Tensor, kernel: Tensor) -> Tensor:
    """A matrix (outputs, 9 * inputs), a row being a kernel in channels-last memory, as (outputs, inputs, 3, 3); a view."""
    return matrix.unflatten(1, (*kernel.shape[2:], -1)).permute(0, 3, 1, 2)


def orthogonalise(stacks: list[Tensor]) -> list[Tensor]:
    """Matrices with the singular vectors of these, and singular values near 1 (between about 0.5 and 1.3); in stacks (K, M, N)."""
    return newton_schulz([each / (torch.linalg.vector_norm(each, dim=(1, 2), keepdim=True) + 1e-7) for each in stacks])


def newton_schulz(stacks: list[Tensor]) -> list[Tensor]:
    """The quintic Newton-Schulz iteration with Jordan's coefficients, of matrices of norm 1, on the side that is shorter."""
    x = [each.mT if each.shape[1] > each.shape[2] else each for each in stacks]
    for _ in range(ITERATIONS):
        gram = [each @ each.mT for each in x]
        factor = _baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = _baddbmm(x, factor, x, beta=3.4445)
    return [each.mT if stack.shape[1] > stack.shape[2] else each for each, stack in zip(x, stacks, strict=True)]


def _baddbmm(inputs: list[Tensor], left: list[Tensor], right: list[Tensor], **factors: float) -> list[Tensor]:
    """torch.baddbmm of each; the inputs, which it would copy one by one, are copied at once."""
    found = [each.new_empty(each.shape) for each in inputs]
    torch._foreach_copy_(found, inputs)
    return [each.baddbmm_(a, b, **factors) for each, a, b in zip(found, left, right, strict=True)]


def make_optimizer(recipe: Recipe, model: ResNet) -> torch.optim.Optimizer:
    """The recipe's optimizer for all weights of the model."""
    parameters = list(model.parameters())
    common: dict[str, Any] = dict(lr=recipe.max_lr, weight_decay=recipe.weight_decay, fused=parameters[0].device.type != "mps")
    if recipe.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
        return _without_dynamo(kind)(parameters, betas=(recipe.momentum, 0.999), **common)
    common |= dict(momentum=recipe.momentum, nesterov=recipe.nesterov)
    if recipe.optimizer == "sgd":
        return _without_dynamo(torch.optim.SGD)(parameters, **common)
    first = model.prep[0].weight
    kernels = [parameter for parameter in parameters if parameter.dim() == 4 and parameter is not first]
    rest = [parameter for parameter in parameters if parameter.dim() != 4 or parameter is first]
    of_kernels = dict(
        muon_momentum=recipe.muon_momentum, lr_factor=recipe.muon_lr_factor, momentum=0.0, nesterov=False, weight_decay=0.0
    )
    return _without_dynamo(Muon)([{"params": rest}, {"params": kernels, **of_kernels}], dtype(recipe), **common)


@functools.cache
def _without_dynamo(kind: type[torch.optim.Optimizer]) -> Any:
    """The class of optimizers, with the bodies of torch's methods alone.

    torch wraps these for torch.compile, and the wrappers import torch._dynamo, a third of the time until the first step. No step of
    an optimizer is compiled here. Where torch does not say what it wraps, its own methods stay.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**bare, "step": torch.no_grad()(inspect.unwrap(kind.step))})


@contextmanager
def sam(model: nn.Module, radius: float) -> Iterator[None]:
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv:2010.01412): takes the gradients, and lends the weights where
    the loss is about highest within the radius; gradients found there are those for the step from where they were.

    The radius is the Euclidean norm over kernels and FC weight, each measured in its own norm: BatchNorm makes that of a kernel
    irrelevant. BatchNorm's running statistics are left as they were.
    """
    weights: list[Tensor] = [weight for weight in model.parameters() if weight.dim() > 1 and weight.grad is not None]
    lent = [*(weight.detach() for weight in weights), *model.buffers()]
    lists = [[each for each in lent if each.is_floating_point() == floating] for floating in (True, False)]
    kept = [[torch.empty_like(each) for each in each_list] for each_list in lists]
    _copy(kept, lists)
    try:
        _climb(weights, [weight.grad for weight in weights], radius)
        model.zero_grad()
        yield
    finally:
        _copy(lists, kept)


@torch.no_grad()
def _climb(weights: list[Tensor], gradients: list[Any], radius: float) -> None:
    """Moves the weights, in place, to where the loss is about highest."""
    norms, slopes = torch._foreach_norm(weights), torch._foreach_norm(gradients)
    length = torch.stack(torch._foreach_mul(norms, slopes)).norm()
    moves = list(torch._foreach_mul(gradients, torch._foreach_mul(norms, norms)))
    torch._foreach_mul_(moves, radius / length.clamp(min=1e-12))
    torch._foreach_add_(weights, moves)


@torch.no_grad()
def _copy(to: list[list[Tensor]], values: list[list[Tensor]]) -> None:
    """Copies lists of tensors, each of one kind of number: together that is one launch or two on a GPU."""
    for targets, sources in zip(to, values, strict=True):
        if targets:
            torch._foreach_copy_(targets, sources)


@torch.no_grad()
def update_average(averaged: ResNet, model: ResNet, weight: float | Tensor) -> None:
    """averaged = (1 - weight) * averaged + weight * model, for parameters and BatchNorm running statistics."""
    pairs = zip(averaged.state_dict().values(), model.state_dict().values(), strict=True)
    old, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    if isinstance(weight, Tensor):
        torch._foreach_lerp_(list(old), list(new), [weight.to(each.dtype).expand_as(each) for each in old])
    else:
        torch._foreach_lerp_(list(old), list(new), weight)


def average_weight(recipe: Recipe, step: int) -> float | None:
    """What the weights after a step of the run, from 0, weigh in the average then; None where it is not updated.

    Until its first update the average is the weights themselves.

    The n-th update weighs (1 - d) / (1 - d^n), with the decay d: the average is then that of Adam's bias correction (Kingma and
    Ba 2014, arXiv:1412.6980, section 3), the weights after each update in proportion to d^(updates since), and the random start
    not at all.
    """
    updates, between = divmod(step + 1, recipe.ema_every)
    if not recipe.ema_decay or (updates and between):
        return None
    return 1.0 if not updates else (1 - recipe.ema_decay) / (1 - recipe.ema_decay**updates)


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> tuple[float, float]:
    """Learning rate and momentum at a step of the run, from 0."""
    fraction, first = recipe.peak_epoch / recipe.epochs, recipe.max_lr / recipe.div_factor
    lr = one_cycle(step, total_steps, fraction, first, recipe.max_lr, first / recipe.final_div_factor)
    if recipe.base_momentum is None:
        return lr, recipe.momentum
    return lr, one_cycle(step, total_steps, fraction, recipe.momentum, recipe.base_momentum, recipe.momentum)


def set_rates(optimizer: torch.optim.Optimizer, lr: float | Tensor, momentum: float) -> None:
    """Sets learning rate and momentum, or beta1, of every group; the momentum of Muon's kernels is the recipe's own."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif "muon_momentum" not in group:
            group["momentum"] = momentum


def one_cycle(step: int, total_steps: int, peak_fraction: float, first: float, peak: float, last: float) -> float:
    """One-cycle value at `step` of `total_steps`: linear from `first` to `peak`, then linear to `last`.

    The two-phase policy of Smith and Topin (2018, https://arxiv.org/abs/1708.07120) with the phase ends of
    `torch.optim.lr_scheduler.OneCycleLR`: the peak stands at step `peak_fraction * total_steps - 1`, which need
    not be a whole number, and the last value at step `total_steps - 1`.
    """
    peak_step, last_step = peak_fraction * total_steps - 1, total_steps - 1
    if step <= peak_step and peak_step > 0:
        return first + (peak - first) * step / peak_step
    peak_step = min(peak_step, last_step - 1e-9)  # a run of one step has no way down: it stands at its end
    return peak + (last - peak) * (step - peak_step) / (last_step - peak_step)


def triangular(step: int, step_size: int, min_lr: float, max_lr: float) -> float:
    """Cyclical learning rate: linear from `min_lr` to `max_lr` in `step_size` steps and back in as many, again and again.

    The triangular policy of Smith (2017, https://arxiv.org/abs/1506.01186), equal to `torch.optim.lr_scheduler.CyclicLR`.
    """
    away_from_peak = abs(step / step_size % 2 - 1)
    return max_lr - (max_lr - min_lr) * away_from_peak
