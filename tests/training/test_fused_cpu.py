"""The compiled BatchNorm, ReLU and pooling of a CPU against torch's own operations in float64."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from test_fused import SMALL, STATISTICS, Case, error, inputs, last, layer, step, torchs_own
from torch import nn
from torch.nn import functional

from cifar_resnet.recipe import Recipe
from cifar_resnet.training import fused_cpu, ways
from cifar_resnet.training.fused_cpu import BatchNorm, library, norm_relu, usable
from cifar_resnet.training.model import Chain, build_model

needs_a_compiler = pytest.mark.skipif(library(torch.float32) is None, reason="there is no C compiler here that can build our functions")
CASES = {name: case for name, case in SMALL.items() if case.dtype in fused_cpu.TYPES and case.shape[2] % 2 == case.shape[3] % 2 == 0}
CASES |= {
    "bfloat16, equal pixels": Case((5, 64, 8, 8), pool=True, dtype=torch.bfloat16, integers=True),
    "bfloat16, a residual of another order": Case((3, 24, 4, 6), residual=True, dtype=torch.bfloat16, gradient="contiguous"),
    "20 channels": Case((3, 20, 4, 4), pool=True, residual=True),
    "one channel": Case((4, 1, 4, 4)),
    "more rows than parts": Case((9, 7, 12, 12), pool=True, residual=True),
    "as in layer1": Case((32, 128, 32, 32), pool=True, dtype=torch.bfloat16),
    "as in layer3": Case((64, 512, 4, 4), residual=True, dtype=torch.bfloat16),
}


@pytest.fixture
def small(monkeypatch):
    """Activations of a test are worth it, too."""
    monkeypatch.setattr(fused_cpu, "MIN_ELEMENTS", 1)


def compiled(channels):
    norm = BatchNorm(channels)
    norm.compiled = True
    return norm


@needs_a_compiler
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_torchs(name):
    case = CASES[name]
    x, residual, gradient = inputs(case, "cpu")
    norm = layer(case.shape[1], "cpu")
    exact = copy.deepcopy(norm).double()
    results = step(norm_relu, case, norm, x, residual, gradient)
    assert results["output"].is_contiguous(memory_format=torch.channels_last)
    assert results["num_batches_tracked"] == 1
    expected = step(torchs_own, case, exact, x.double(), None if residual is None else residual.double(), gradient.double())
    found = {name: error(result, expected[name]) for name, result in results.items()}
    assert {name: value for name, value in found.items() if value > (1e-5 if name in STATISTICS else case.tolerance)} == {}


@needs_a_compiler
@pytest.mark.parametrize("dtype", fused_cpu.TYPES)
def test_of_equal_pixels_and_nan_the_one_is_taken_that_torch_takes(dtype):
    x = torch.randint(-2, 3, (5, 16, 6, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[x == 2] = float("nan")
    results = []
    for pool in (fused_cpu._MaxPool.apply, lambda x: functional.max_pool2d(x, 2)):
        mine = last(x.clone()).requires_grad_()
        pooled = pool(mine)
        (gradient,) = torch.autograd.grad(pooled, mine, torch.arange(pooled.numel()).view(pooled.shape).to(dtype))
        results.append((pooled.detach().nan_to_num(9), gradient))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@needs_a_compiler
def test_bfloat16_is_rounded_as_torch_rounds():
    """Of numbers of every size, halfway cases among them: with nothing to normalise the residual is what is rounded."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = last(bits[bits.isfinite()][:65024].view(1, 8, 64, 127)[..., :126].abs())
    norm = BatchNorm(8, eps=0.0).eval()
    with torch.no_grad():
        norm.weight.fill_(1.5), norm.bias.fill_(1.0)
        ours = norm_relu(x, norm, residual=x)
        theirs = ((x.float() * 1.5 + 1.0).bfloat16().float() + x.float()).bfloat16()
    assert torch.equal(ours, theirs)


@needs_a_compiler
def test_a_nan_reaches_its_channel_and_no_other():
    x, norm = torch.randn(2, 16, 4, 4), BatchNorm(16)
    x[1, 3, 0, 0] = float("nan")
    y, there = norm_relu(last(x), norm), torch.arange(16) == 3
    for found in (y.isnan().all(0).all(-1).all(-1), y.isnan().any(0).any(-1).any(-1), norm.running_mean.isnan(), norm.running_var.isnan()):
        assert torch.equal(found, there)


@needs_a_compiler
def test_any_number_of_threads_gives_the_same_bits():
    case, threads, results = Case((16, 64, 16, 16), pool=True, residual=True), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(step(norm_relu, case, layer(64, "cpu"), *inputs(case, "cpu")))
    finally:
        torch.set_num_threads(threads)
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first, other[name]), name


def changed(norm, **attributes):
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


@needs_a_compiler
def test_it_stands_for_torchs_own_only_where_it_may(small, monkeypatch):
    x = last(torch.randn(2, 16, 4, 4))
    assert usable(x, compiled(16))
    refused = {
        "not chosen": (x, BatchNorm(16)),
        "layout": (x.contiguous(), compiled(16)),
        "float64": (x.double(), compiled(16)),
        "weights in bfloat16": (x.bfloat16(), compiled(16).bfloat16()),
        "odd size": (last(torch.randn(2, 16, 5, 4)), compiled(16)),
        "gradients in evaluation": (x, compiled(16).eval()),
        "another device": (x.to("meta"), compiled(16)),
        "weights elsewhere": (x, compiled(16).to("meta")),
        "no weights": (x, changed(compiled(16), weight=None)),
        "a bias with gaps": (x, changed(compiled(16), bias=nn.Parameter(torch.zeros(16, 2)[:, 0]))),
        "statistics in float64": (x, changed(compiled(16), running_mean=torch.zeros(16, dtype=torch.float64))),
        "statistics of all batches": (x, changed(compiled(16), momentum=None)),
        "statistics that stay": (x, changed(compiled(16), track_running_stats=False)),
    }
    assert [name for name, (x, norm) in refused.items() if usable(x, norm)] == []
    with torch.no_grad():
        assert usable(x, compiled(16).eval())
    monkeypatch.setattr(fused_cpu, "MIN_ELEMENTS", x.numel() + 1)
    assert not usable(x, compiled(16))


@needs_a_compiler
@pytest.mark.parametrize("variant", [{}, {"pool_position": "after-relu"}, {"prep_order": "relu-bn"}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_model_computes_what_it_computes_with_torchs_own(variant, training, small):
    """Outputs, gradients and statistics; in training, and in evaluation without gradients.

    Of five batches the closest one: where ReLU is before BatchNorm, rounding takes a value to its other side in one batch of four,
    with torch's own in float32 too.
    """
    recipe = Recipe(width=16, **variant)
    assert min(distance(recipe, training, seed) for seed in range(5)) <= 1e-4


def distance(recipe, training, seed):
    """The largest relative one of what both give, for a batch of random images."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    plain, found = build_model(recipe).double(), {}
    for model in (build_model(recipe), plain):
        model.train(training)
        ways.use(model, {} if model is plain else ways.COMPILED)
        with torch.set_grad_enabled(training):
            output = model(last(images.to(model.fc.weight.dtype)))
        found[model] = [output.detach(), *model.buffers()]
        if training:
            functional.cross_entropy(output, torch.arange(8)).backward()
            found[model].append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return max((ours.double() - theirs).norm() / theirs.double().norm().clamp(min=1e-9) for ours, theirs in zip(*found.values(), strict=True))


@needs_a_compiler
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_module_with_a_hook_is_called(index, small):
    chain, seen = Chain(nn.MaxPool2d(2), compiled(16), nn.ReLU()), []
    chain[index].register_forward_hook(lambda *given: seen.append(given))
    chain(last(torch.randn(2, 16, 4, 4)))
    assert len(seen) == 1


@needs_a_compiler
@pytest.mark.parametrize("residual", [torch.ones(2, 16, 4, 4), torch.ones(16, 1, 1, dtype=torch.bfloat16)], ids=["dtype", "shape"])
def test_a_residual_of_another_kind_is_added_as_torch_does(residual, small):
    x, chain = last(torch.randn(2, 16, 4, 4).bfloat16()), Chain(compiled(16), nn.ReLU())
    y = chain(x, residual)
    assert y.dtype == torch.promote_types(x.dtype, residual.dtype)
    assert torch.equal(y, norm_relu(x, BatchNorm(16)) + residual)


@needs_a_compiler
def test_it_computes_where_torch_has_another_default_dtype_and_device(small):
    x, norm = last(torch.randn(2, 16, 4, 4)), compiled(16)
    expected = norm_relu(x, BatchNorm(16), pool=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(norm_relu(x, norm, pool=True), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_a_compiler
def test_a_traced_graph_takes_torchs_own_for_any_number_of_images(small, monkeypatch):
    monkeypatch.setattr(fused_cpu, "MIN_ELEMENTS", 1000)
    chain, x = Chain(compiled(16), nn.ReLU()).eval(), torch.randn(4, 16, 4, 4)
    with torch.no_grad():
        exported = torch.export.export(chain, (x,), dynamic_shapes={"x": {0: torch.export.Dim("N")}}).module()
        for n in (2, 100):
            x = torch.randn(n, 16, 4, 4)
            torch.testing.assert_close(exported(x), chain(x))


@needs_a_compiler
def test_all_of_the_network_is_computed_by_it(small, monkeypatch):
    model, seen = build_model(Recipe(width=16)), []
    ways.use(model, ways.COMPILED)
    monkeypatch.setattr(fused_cpu, "norm_relu", lambda x, *given: (seen.append(given[1:]), norm_relu(x, *given))[1])
    model(last(torch.randn(8, 3, 32, 32)))
    assert [(pool, residual is not None) for pool, residual in seen] == [
        (False, False), (True, False), (False, False), (False, True), (True, False), (True, False), (False, False), (False, True),
    ]  # fmt: skip


@pytest.fixture
def anew():
    """The functions are compiled at the next call, and after the test again."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="there is no gcc here")
@pytest.mark.parametrize("first", ["gcc", "false", "no-such-compiler"])
def test_gcc_builds_it_also_where_another_compiler_fails(first, anew, monkeypatch):
    monkeypatch.setenv("CC", first)
    assert [library(dtype) is not None for dtype in fused_cpu.TYPES] == [True, True]
    assert library(torch.float64) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "sleep"])
def test_without_a_compiler_that_works_torchs_own_are_used(compiler, anew, small, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(fused_cpu.shutil, "which", lambda name: None if name != compiler or "no-such" in name else f"/bin/{name}")
    if compiler == "sleep":

        def late(*given, **named):
            raise subprocess.TimeoutExpired("sleep", 60)

        monkeypatch.setattr(fused_cpu.subprocess, "run", late)
    assert library(torch.float32) is None
    x, norm = last(torch.randn(2, 16, 4, 4)), compiled(16)
    assert not usable(x, norm)
    model = build_model(Recipe(width=4))
    ways.use(model, ways.COMPILED)
    assert model(last(torch.randn(2, 3, 32, 32))).isfinite().all()


def test_a_way_of_batch_norm_that_there_is_not_is_refused():
    model = build_model(Recipe(width=4))
    with pytest.raises(ValueError, match="BatchNorm"):
        ways.use(model, {"BatchNorm": ["magic"]})
    ways.use(model, ways.COMPILED)
    assert ways.used(model) == {"BatchNorm": ["compiled"]}
    ways.use(model, {})
    assert ways.used(model) == {}
