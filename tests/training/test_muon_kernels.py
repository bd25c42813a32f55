"""Muon's Triton kernels against their formulas in float64: in Triton's interpreter, a process of its own, and on CUDA."""

import pytest
import torch
from interpreter import check_in_the_interpreter, needs_triton, run_checks

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.training import engine, muon_kernels
from cifar_resnet.training.kernels import for_a_graph
from cifar_resnet.training.optim import set_rates

SHAPES = [(16, 8, 3, 3), (64, 32, 3, 3), (7, 5, 3, 3)]  # the second has five blocks, none is full to the end


def check(device):
    """Momentum and move of three kernels; everything in channels-last memory, as they go through it."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for lr in (0.3, torch.tensor(0.3, device=device)):
            torch.manual_seed(0)
            gradients, buffers, kernels = (
                [torch.randn(shape, device=device).to(memory_format=torch.channels_last) for shape in SHAPES] for _ in range(3)
            )
            moves = [torch.full((shape[0], shape[1] * 9), torch.nan, dtype=dtype, device=device) for shape in SHAPES]
            expected = [0.6 * buffer.double() + gradient.double() for buffer, gradient in zip(buffers, gradients, strict=True)]
            before = [kernel.double() for kernel in kernels]
            squares = muon_kernels.add_momentum(gradients, buffers, kernels, moves, 0.6)
            muon_kernels.move_kernels(kernels, moves, squares, lr, 0.2)
            for i, (outputs, inputs, *_) in enumerate(SHAPES):
                torch.testing.assert_close(buffers[i].double(), expected[i], rtol=1e-6, atol=1e-6)
                rows = (gradients[i].double() + 0.6 * expected[i]).permute(0, 2, 3, 1).flatten(1)
                torch.testing.assert_close(moves[i].double(), rows / rows.norm(), rtol=tolerance, atol=tolerance / 100)
                there = moves[i].double().unflatten(1, (3, 3, inputs)).permute(0, 3, 1, 2)
                moved = outputs**0.5 / before[i].norm() * before[i] - 0.3 * 0.2 * there
                torch.testing.assert_close(kernels[i].double(), moved, rtol=1e-5, atol=1e-5)


@needs_triton
def test_in_the_interpreter_the_kernels_are_their_formulas():
    check_in_the_interpreter(__file__)


@pytest.mark.cuda
def test_on_a_gpu_the_kernels_are_their_formulas():
    check("cuda")


@pytest.mark.cuda
@for_a_graph()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_steps_alike_with_and_without_the_kernels(precision, monkeypatch):
    recipe, device, found = with_statistics(Recipe(width=16, precision=precision)), torch.device("cuda"), []
    for works in (True, False):
        if not works:
            monkeypatch.setattr(muon_kernels, "usable", lambda *_: False)
        state = engine.start(recipe, device)
        for step in range(3):
            for number, parameter in enumerate(state.model.parameters()):
                torch.manual_seed(100 * step + number)
                parameter.grad = torch.randn_like(parameter)
            set_rates(state.optimizer, 0.3, 0.9)
            state.optimizer.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < (1e-4 if precision == "float32" else 2e-2)


if __name__ == "__main__":
    run_checks(check)
