"""The fused kernels against torch's own operations in float64: in Triton's interpreter, a process of its own, and on CUDA."""

from dataclasses import dataclass

import pytest
import torch
from interpreter import check_in_the_interpreter, needs_triton, run_checks
from torch import nn
from torch.nn import functional

from cifar_resnet.training import fused, kernels

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    pool: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32
    mean: float = 0.5
    gradient: str = "channels-last"
    integers: bool = False  # so that many of the pixels pooled are equal
    parts: int = fused.PARTS

    @property
    def tolerance(self):
        if self.mean > 1:
            return 1e-4  # float32 has the mean to 3e-5 deviations
        return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[self.dtype]


SMALL = {
    "plain": Case((3, 16, 4, 4)),
    "64 channels": Case((2, 64, 6, 8)),
    "128 channels, a residual": Case((2, 128, 4, 4), residual=True),
    "48 channels: part of a tile": Case((3, 48, 4, 4), residual=True),
    "several tiles to a part, the last not full": Case((5, 16, 8, 9), parts=2),
    "pooling": Case((3, 64, 6, 8), pool=True),
    "pooling, an odd size, a residual": Case((3, 16, 7, 9), pool=True, residual=True),
    "pooling equal pixels, several tiles to a part": Case((5, 16, 10, 8), pool=True, integers=True, parts=2),
    "mean of a thousand deviations": Case((4, 16, 8, 8), mean=1000.0),
    "mean of a thousand deviations, pooling": Case((4, 16, 8, 8), pool=True, mean=1000.0),
    "gradient in another layout": Case((3, 16, 4, 4), residual=True, gradient="contiguous"),
    "gradient expanded": Case((3, 16, 4, 4), pool=True, residual=True, gradient="expanded"),
    "bfloat16": Case((3, 64, 4, 4), pool=True, residual=True, dtype=torch.bfloat16),
    "float16": Case((3, 64, 4, 4), residual=True, dtype=torch.float16),
}
REAL = {
    f"{channels} channels at {size}, {n} images{', pooling' * pool}{', a residual' * residual}": Case(
        (n, channels, size, size), pool, residual, torch.bfloat16
    )
    for n in (512, 336)
    for channels, size, pool, residual in [
        (64, 32, False, False),
        (128, 32, True, False),
        (128, 16, False, False),
        (128, 16, False, True),
        (256, 16, True, False),
        (512, 8, True, False),
        (512, 4, False, False),
        (512, 4, False, True),
    ]
}


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def error(result, expected):
    """In norm, relative; infinite where something is not a number."""
    value = float((result.double() - expected.double()).norm() / expected.double().norm())
    return value if value == value else float("inf")


def inputs(case, device):
    """x, residual and gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.shape, generator=generator, device=device) + case.mean
    x = last((x.round() if case.integers else x).to(case.dtype))
    shape = functional.max_pool2d(x, 2).shape if case.pool else x.shape
    residual = last(torch.randn(shape, generator=generator, device=device).to(case.dtype)) if case.residual else None
    gradient = torch.randn(shape, generator=generator, device=device).to(case.dtype)
    if case.gradient == "channels-last":
        gradient = last(gradient)
    elif case.gradient == "expanded":
        gradient = gradient[:, :, :1, :1].expand(shape)
    return x, residual, gradient


def layer(channels, device):
    norm = nn.BatchNorm2d(channels, momentum=0.3, device=device)
    with torch.no_grad():
        for i, tensor in enumerate([norm.weight, norm.bias, norm.running_mean]):
            tensor.copy_(torch.linspace(-1, 1 + i, channels, device=device))
    return norm


def torchs_own(x, norm, pool, residual):
    y = functional.relu(norm(functional.max_pool2d(x, 2) if pool else x))
    return y if residual is None else y + residual


def step(function, case, norm, x, residual, gradient):
    """Output, gradients and statistics of one step."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = function(x, norm, case.pool, residual)
    leaves = {"x": x, "weight": norm.weight, "bias": norm.bias} | ({} if residual is None else {"residual": residual})
    gradients = torch.autograd.grad(y, list(leaves.values()), gradient)
    results = {"output": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results | {name: buffer.clone() for name, buffer in norm.named_buffers()}


@kernels.for_a_graph()
def errors(case, device):
    """Of the results that are wrong, against float64."""
    x, residual, gradient = inputs(case, device)
    norm, exact = layer(case.shape[1], device), layer(case.shape[1], device).double()
    assert fused.usable(x, norm)
    results = step(fused.norm_relu, case, norm, x, residual, gradient)
    assert results["output"].is_contiguous(memory_format=torch.channels_last)
    assert results["gradient of x"].is_contiguous(memory_format=torch.channels_last) or case.shape[2] % 2
    assert results["num_batches_tracked"] == 1
    expected = step(torchs_own, case, exact, x.double(), None if residual is None else residual.double(), gradient.double())
    found = {name: error(result, expected[name]) for name, result in results.items()}
    return {name: value for name, value in found.items() if value > (1e-5 if name in STATISTICS else case.tolerance)}


def choices():
    """Whether values and places of the maxima are torch's, with equal pixels and NaN."""
    x = torch.randint(-2, 3, (5, 16, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    x[x == 2] = float("nan")
    y = fused.norm_relu(last(x).requires_grad_(), nn.BatchNorm2d(16), pool=True)
    pooled, codes, *_ = y.grad_fn.saved_tensors
    expected, places = functional.max_pool2d(x, 2, return_indices=True)
    same = torch.equal(pooled.nan_to_num(9), expected.nan_to_num(9))
    return same and torch.equal(codes.long(), places // 6 % 2 * 2 + places % 6 % 2)


def nans():
    """Whether a NaN reaches the outputs and statistics of its channel, and only those."""
    x, norm = torch.randn(2, 16, 4, 4), nn.BatchNorm2d(16)
    x[1, 3, 0, 0] = float("nan")
    y = fused.norm_relu(last(x), norm)
    there = torch.arange(16) == 3
    found = (
        y.isnan().all(0).all(-1).all(-1),
        y.isnan().any(0).any(-1).any(-1),
        norm.running_mean.isnan(),
        norm.running_var.isnan(),
    )
    return all(torch.equal(each, there) for each in found)


def refusals():
    """What `usable` should refuse but does not."""
    x = last(torch.randn(2, 16, 4, 4))
    outside = fused.usable(x, nn.BatchNorm2d(16))
    refused = {
        "evaluation": (x, nn.BatchNorm2d(16).eval()),
        "layout": (x.contiguous(), nn.BatchNorm2d(16)),
        "float64": (x.double(), nn.BatchNorm2d(16).double()),
        "20 channels": (last(torch.randn(2, 20, 4, 4)), nn.BatchNorm2d(20)),
        "one image": (x[:1], nn.BatchNorm2d(16)),
    }
    with kernels.for_a_graph():
        return ["outside of a graph"] * outside + [name for name, (x, norm) in refused.items() if fused.usable(x, norm)]


def check(device):
    """Small cases, ties, what is no number, and what is refused."""
    wrong = {"choices": [] if choices() else ["not torch's"], "nan": [] if nans() else ["lost"], "not refused": refusals()}
    for name, case in SMALL.items():
        fused.PARTS = case.parts
        wrong[name] = errors(case, device)
    assert {name: each for name, each in wrong.items() if each} == {}


@needs_triton
def test_in_the_interpreter_results_and_gradients_are_torchs():
    check_in_the_interpreter(__file__)


def test_it_is_not_used_on_a_cpu():
    with kernels.for_a_graph():
        assert not fused.usable(last(torch.randn(2, 16, 4, 4)), nn.BatchNorm2d(16))


@needs_triton
@pytest.mark.cuda
@pytest.mark.parametrize("name", REAL)
def test_on_cuda_results_are_torchs_and_always_the_same(name):
    case = REAL[name]
    assert errors(case, "cuda") == {}
    x, residual, gradient = inputs(case, "cuda")
    first, second = (step(fused.norm_relu, case, layer(case.shape[1], "cuda"), x, residual, gradient) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_triton
@pytest.mark.cuda
def test_on_cuda_a_graph_can_hold_it():
    case = Case((64, 128, 16, 16), pool=True, residual=True, dtype=torch.bfloat16)
    x, residual, gradient = inputs(case, "cuda")
    expected = step(fused.norm_relu, case, layer(128, "cuda"), x, residual, gradient)
    norm, stream, graph = layer(128, "cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step(fused.norm_relu, case, norm, x, residual, gradient)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


if __name__ == "__main__":
    run_checks(check)
