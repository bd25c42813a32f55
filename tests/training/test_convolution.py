"""Winograd's convolution against torch's own, in float64."""

import pytest
import torch
from torch.nn import functional

from cifar_resnet.recipe import Recipe
from cifar_resnet.training import convolution
from cifar_resnet.training.model import build_model

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL torch's own convolutions are used")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result, expected):
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 5, 4, 4, 7), (2, 3, 8, 12, 4), (70, 16, 16, 16, 8)])
def test_it_is_torchs_convolution_and_so_are_its_gradients(shape, layout, monkeypatch):
    monkeypatch.setattr(convolution, "CHUNK", 1024)  # so that the last shape takes 64 images, then 6
    n, inputs, height, width, outputs = shape
    x, weight = random(n, inputs, height, width), random(outputs, inputs, 3, 3, seed=1)
    g = random(n, outputs, height, width, seed=2).contiguous(memory_format=layout)
    x, weight = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight))
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = functional.conv2d(exact_x, exact_weight, padding=1)
    y = convolution._Winograd.apply(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y.detach(), expected.detach()) < 1e-5
    gradients = torch.autograd.grad(y, (x, weight), g)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, (exact_x, exact_weight), g.double()), strict=True):
        assert error(gradient, exact) < 2e-5
    (alone,) = torch.autograd.grad(convolution._Winograd.apply(x.detach(), weight), weight, g)
    assert torch.equal(alone, gradients[1])


@needs_mkl
def test_it_is_used_where_it_is_faster():
    x, weight = random(64, 64, 4, 4), random(128, 64, 3, 3)
    assert convolution.usable(x, weight)
    assert not convolution.usable(x[:63], weight)  # transforming the kernels would not pay
    assert not convolution.usable(random(64, 63, 4, 4), weight)
    assert not convolution.usable(random(64, 64, 6, 6), weight)
    assert not convolution.usable(x.double(), weight.double())
    assert not convolution.usable(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolution.usable(x, weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which goes on being used
def test_what_is_exported_is_torchs_own_convolution():
    layer, x = convolution.Conv3x3(64, 64).eval(), random(64, 64, 4, 4)
    targets = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
    assert [target for target in targets if target.startswith("aten")] == ["aten.conv2d.default"]
    assert "aten::_convolution" in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)


def test_one_image_without_a_batch():
    layer, x = convolution.Conv3x3(64, 64), random(64, 64, 64)
    assert torch.equal(layer(x), functional.conv2d(x, layer.weight, padding=1))


@needs_mkl
def test_a_bias_is_added_after_it():
    layer = convolution.Conv3x3(64, 32, bias=True)
    x, g = random(64, 64, 4, 4), random(64, 32, 4, 4)
    layer(x).backward(g)
    expected = functional.conv2d(x.double(), layer.weight.detach().double(), layer.bias.detach().double(), padding=1)
    assert error(layer(x).detach(), expected) < 1e-5
    assert torch.allclose(layer.bias.grad.double(), g.double().sum((0, 2, 3)), atol=1e-4)


def smoothed(model):
    """Softplus for ReLU and means for maxima: rounding would tip some of these, and move gradients by up to 2 %."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.Softplus())
            if isinstance(child, torch.nn.MaxPool2d):
                setattr(module, name, torch.nn.AvgPool2d(child.kernel_size))
    return model


@needs_mkl
def test_the_network_in_float32_is_that_in_float64(monkeypatch):
    apply, calls = convolution._Winograd.apply, []
    monkeypatch.setattr(convolution._Winograd, "apply", lambda *arguments: (calls.append(1), apply(*arguments))[1])
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 8)  # so that a narrow network uses it
    monkeypatch.setattr(convolution, "MIN_TILES", 16)
    images, labels = random(16, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(16) % 10
    results = []
    for dtype in (torch.float32, torch.float64):
        model = smoothed(build_model(Recipe.build(init="default", width=8))).to(dtype).train()
        logits = model(images.to(dtype))
        functional.cross_entropy(logits, labels).backward()
        results.append((logits.detach(), [parameter.grad for parameter in model.parameters()]))
    assert len(calls) == 7  # all but the first convolution, in float32
    (logits, gradients), (exact_logits, exact_gradients) = results
    assert error(logits, exact_logits) < 1e-4
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert error(gradient, exact) < 2e-4
