"""Muon's Triton kernels against their formulas in float64: in Triton's interpreter, a process of its own, and on CUDA."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.training import engine, muon_kernels
from cifar_resnet.training.fused import for_a_graph, triton_works
from cifar_resnet.training.optim import set_rates

SHAPES = [(16, 8, 3, 3), (64, 32, 3, 3), (7, 5, 3, 3)]  # the last is no multiple of a block


def check(device):
    """Two steps of momentum and move; everything in channels-last memory, as the kernels go through it."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for shape in SHAPES:
            torch.manual_seed(0)
            gradient, buffer, kernel = (torch.randn(shape, device=device).to(memory_format=torch.channels_last) for _ in range(3))
            expected = 0.6 * buffer.double() + gradient.double()
            move = torch.full((shape[0], shape[1] * 9), torch.nan, dtype=dtype, device=device)
            muon_kernels.add_momentum(gradient, buffer, 0.6, move)
            rows = (gradient.double() + 0.6 * expected).permute(0, 2, 3, 1).flatten(1)
            torch.testing.assert_close(buffer.double(), expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(move.double(), rows, rtol=tolerance, atol=tolerance)
            for lr in (0.3, torch.tensor(0.3, device=device)):
                before, scale = kernel.double(), torch.tensor(1.5, device=device)
                muon_kernels.move_kernel(kernel, move, scale, lr, 0.2)
                there = move.double().unflatten(1, (3, 3, shape[1])).permute(0, 3, 1, 2)
                torch.testing.assert_close(kernel.double(), 1.5 * before - 0.3 * 0.2 * there, rtol=1e-5, atol=1e-5)


def interpret():
    """Checks in the interpreter, or prints why not."""
    if triton_works(torch.device("cpu"), torch.float32):
        check("cpu")
    else:
        print("Triton's interpreter does not work here: that of Triton 3.6 needs a NumPy before 2.4")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
def test_in_the_interpreter_the_kernels_are_their_formulas():
    code = "import test_muon_kernels; test_muon_kernels.interpret()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    if done.stdout:
        pytest.skip(done.stdout)


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
