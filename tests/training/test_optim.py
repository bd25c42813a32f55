"""What moves the weights, against slow versions of it; and the rates of every step, against torch's own schedules."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import muon
from torch import nn

from cifar_resnet import PRESETS, Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.data.splits import Split
from cifar_resnet.training import engine
from cifar_resnet.training.model import build_model
from cifar_resnet.training.optim import (
    Muon,
    average_weight,
    learning_rate,
    make_optimizer,
    orthogonalise,
    sam,
    set_rates,
    triangular,
    update_average,
)

OF_KERNELS = dict(muon_momentum=0.6, lr_factor=0.5, momentum=0.0, nesterov=False, weight_decay=0.0)
COMMON = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 8), (16, 72), (72, 16))]
    for matrix, orthogonal in zip(matrices, orthogonalise([torch.stack([-each, each]) for each in matrices]), strict=True):
        u, values, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
        torch.testing.assert_close(orthogonal[0], -orthogonal[1])
        found = u.T @ orthogonal[1].numpy() @ v.T
        values /= np.linalg.norm(values)
        for _ in range(3):  # the iteration acts on the singular values alone
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        np.testing.assert_allclose(found, np.diag(values), atol=1e-6)


class Moved:
    """A kernel and a bias under Muon, and the gradients of three steps."""

    def __init__(self, layout=torch.contiguous_format, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        kernels = torch.randn(4, 6, 4, 3, 3, generator=generator).to(dtype)
        biases = torch.randn(4, 6, generator=generator).to(dtype)
        self.kernel = nn.Parameter(kernels[0].clone(memory_format=layout))
        self.bias = nn.Parameter(biases[0].clone())
        self.gradients = [
            (of_kernel.clone(memory_format=layout), of_bias) for of_kernel, of_bias in zip(kernels[1:], biases[1:], strict=True)
        ]
        self.optimizer = Muon([{"params": [self.bias]}, {"params": [self.kernel], **OF_KERNELS}], dtype, fused=True, **COMMON)

    def step(self, number):
        self.kernel.grad, self.bias.grad = (each.clone() for each in self.gradients[number])
        self.optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_kernels_as_written_plainly_and_the_rest_as_sgd(layout):
    moved = Moved(layout, torch.float64)
    kernel, plain = moved.kernel.detach().clone(), nn.Parameter(moved.bias.detach().clone())
    buffer, sgd = torch.zeros_like(kernel), torch.optim.SGD([plain], **COMMON)
    for number, (of_kernel, of_bias) in enumerate(moved.gradients):
        moved.step(number)
        muon(kernel, buffer, of_kernel, lr=0.05, momentum=0.6)
        plain.grad = of_bias.clone()
        sgd.step()
        torch.testing.assert_close(moved.kernel.detach(), kernel, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moved.optimizer.state[moved.kernel]["momentum_buffer"], buffer)
        torch.testing.assert_close(moved.bias, plain)


def test_muons_step_leaves_the_gradients_as_they_were():
    moved = Moved()
    for number, gradients in enumerate(moved.gradients):
        moved.step(number)
        assert torch.equal(moved.kernel.grad, gradients[0])
        assert torch.equal(moved.bias.grad, gradients[1])


def test_muon_goes_on_from_its_saved_state_with_the_same_bits():
    whole, first, second = Moved(), Moved(), Moved()
    for number in range(3):
        whole.step(number)
    for number in range(2):
        first.step(number)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert [set(slot) for slot in second.optimizer.state_dict()["state"].values()] == [{"momentum_buffer"}] * 2
    with torch.no_grad():
        second.kernel.copy_(first.kernel)
        second.bias.copy_(first.bias)
    second.step(2)
    assert torch.equal(second.kernel, whole.kernel)
    assert torch.equal(second.bias, whole.bias)


def test_muon_leaves_what_has_no_gradient():
    moved = Moved()
    before = moved.kernel.detach().clone()
    moved.bias.grad = torch.ones(6)
    moved.optimizer.step()
    assert torch.equal(moved.kernel, before)
    assert moved.kernel not in moved.optimizer.state


def test_muon_takes_every_kernel_but_the_first():
    recipe = Recipe.build(optimizer="muon", precision="float32", muon_lr_factor=0.25, width=4)
    model = build_model(recipe)
    optimizer = make_optimizer(recipe, model)
    rest, kernels = optimizer.param_groups
    shapes = [(8, 4, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3)]
    assert sorted(tuple(parameter.shape) for parameter in kernels["params"]) == sorted(shapes)
    assert {id(p) for group in (rest, kernels) for p in group["params"]} == {id(p) for p in model.parameters()}
    set_rates(optimizer, 0.4, 0.8)
    assert [group["lr"] for group in (rest, kernels)] == [0.4, 0.4]
    assert kernels["lr_factor"] == 0.25
    assert [group["momentum"] for group in (rest, kernels)] == [0.8, 0.0]


def weights_after(optimizer):
    """The sha256 of the weights after three steps with gradients cut at 0.01."""
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 24), np.arange(24))
    fields = dict(width=4, batch_size=8, epochs=2, peak_epoch=1.0, max_lr=0.02, sam_share=0.0, precision="float32")
    recipe = with_statistics(Recipe.build(optimizer=optimizer, grad_clip=0.01, **fields))
    loader, state = TensorLoader(split, recipe, torch.device("cpu")), engine.start(recipe, torch.device("cpu"))
    for _, record in zip(range(3), engine.train(state, loader, lambda: ()), strict=False):
        assert torch.isfinite(record.loss)
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.model.state_dict().values())).hexdigest()


def test_the_weights_do_not_depend_on_what_the_process_trained_before():
    """A process that begins with Muon, then trains with others in turn; and this one, which has done whatever it has."""
    order = ("muon", "sgd", "muon", "adam", "sgd", "muon")
    code = "import sys, test_optim; print(*map(test_optim.weights_after, sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code, *order], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    here = {optimizer: weights_after(optimizer) for optimizer in ("sgd", "adam", "muon")}
    assert done.stdout.split() == [here[optimizer] for optimizer in order]
    assert len(set(here.values())) == 3


def test_sam_lends_the_weights_where_the_loss_is_highest_nearby_and_takes_them_back():
    """To first order the loss rises by the radius times the gradient's length, each kernel in units of its norm."""
    model = build_model(Recipe.build(width=4)).double()
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32, generator=generator, dtype=torch.float64), torch.arange(16) % 10
    radius = 1e-6

    def loss():
        return nn.functional.cross_entropy(model(images), labels)

    before = loss()
    before.backward()
    kernels = [weight for weight in model.parameters() if weight.dim() > 1]
    length = torch.cat([(weight.norm() * weight.grad).flatten() for weight in kernels]).norm()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), sam(model, radius):  # noqa: PT012
        moves = [(tensor - kept[name]) / kept[name].norm() for name, tensor in model.state_dict().items() if "weight" in name]
        assert float(torch.cat([move.flatten() for move in moves]).norm()) == pytest.approx(radius, rel=1e-6)
        assert (loss() - before).item() == pytest.approx(radius * length.item(), rel=1e-2)
        assert all(weight.grad is None for weight in model.parameters())
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weight", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_the_average_moves_by_its_weight_in_every_tensor_but_the_counters(weight):
    averaged, model = (build_model(Recipe.build(seed=seed, width=4)) for seed in (0, 1))
    model(torch.randn(4, 3, 32, 32))  # its running statistics and counters move
    before = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    update_average(averaged, model, weight)
    for name, tensor in averaged.state_dict().items():
        new = model.state_dict()[name]
        expected = 0.75 * before[name] + 0.25 * new if tensor.is_floating_point() else before[name]
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("every", [1, 5])
def test_averaging_is_adams_bias_correction_of_a_sum_that_begins_at_zero(every):
    """And before its first update the average is the value itself."""
    recipe, values = Recipe(ema_decay=0.99, ema_every=every), np.random.default_rng(0).normal(size=60)
    total, updates, average = 0.0, 0, 1e9
    for step, value in enumerate(values):
        weight, due = average_weight(recipe, step), (step + 1) % every == 0
        assert (weight is None) == (step + 1 > every and not due)
        average = average if weight is None else average + weight * (value - average) if weight < 1 else value
        if due:
            total, updates = 0.99 * total + 0.01 * value, updates + 1
        assert average == pytest.approx(total / (1 - 0.99**updates) if updates else value)
    assert average_weight(recipe.replace(ema_decay=0.0), every - 1) is None


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"epochs": 7, "peak_epoch": 2.3}], ids=str)
def test_every_step_is_that_of_torchs_one_cycle(name, changes):
    recipe = Recipe.build(name, **changes)
    total = recipe.epochs * 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.5)
    cycled = recipe.base_momentum is not None
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.max_lr,
        total_steps=total,
        pct_start=recipe.peak_epoch / recipe.epochs,
        anneal_strategy="linear",
        cycle_momentum=cycled,
        base_momentum=recipe.base_momentum or 0.85,
        max_momentum=recipe.momentum,
        div_factor=recipe.div_factor,
        final_div_factor=recipe.final_div_factor,
    )
    for step in range(total):
        lr, momentum = learning_rate(recipe, step, total)
        group = optimizer.param_groups[0]
        assert lr == pytest.approx(group["lr"], abs=1e-9)
        assert momentum == pytest.approx(group["momentum"] if cycled else recipe.momentum, abs=1e-9)
        assert lr > 0
        optimizer.step()
        if step + 1 < total:
            schedule.step()


def test_the_default_peaks_at_epoch_5_and_ends_small():
    recipe = Recipe()
    lrs = [learning_rate(recipe, step, 24 * 98)[0] for step in range(24 * 98)]
    assert lrs.index(max(lrs)) + 1 == 5 * 98
    assert max(lrs) == recipe.max_lr
    assert 0 < lrs[-1] < recipe.max_lr / 1000


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_run_of_few_steps_has_a_rate_for_each(total):
    recipe = Recipe.build(epochs=1)
    lrs = [learning_rate(recipe, step, total)[0] for step in range(total)]
    assert all(0 < lr <= recipe.max_lr for lr in lrs)
    assert lrs[-1] == pytest.approx(recipe.max_lr / recipe.div_factor / recipe.final_div_factor)


def test_triangular_is_torchs_cyclic_lr():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.4, step_size_up=7, cycle_momentum=False)
    for step in range(50):
        assert triangular(step, 7, 0.01, 0.4) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()
