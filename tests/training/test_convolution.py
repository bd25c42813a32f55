"""Every way to compute a convolution against torch's own, in float64."""

import pytest
import torch
from torch.nn import functional

from cifar_resnet.recipe import Recipe
from cifar_resnet.training import convolution
from cifar_resnet.training.convolution import CONVOLUTIONS, TORCH, WEIGHT_GRADIENTS, WINOGRAD, Conv3x3, Ways, possible
from cifar_resnet.training.model import build_model
from cifar_resnet.training.runtime import _multiplies_bfloat16
from cifar_resnet.training.ways import use, used

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL torch's own convolutions are used")
NETWORK = [(64, 128, 32), (128, 128, 16), (128, 256, 16), (256, 512, 8), (512, 512, 4)]
SHAPES = [(1, inputs, side, side, outputs) for inputs, outputs, side in NETWORK]  # images, inputs, height, width, outputs
SHAPES += [(2, 3, 32, 32, 64), (3, 5, 4, 4, 7), (2, 3, 8, 12, 4), (70, 16, 16, 16, 8), (5, 3, 7, 5, 4), (3, 2, 1, 1, 2)]
EXACT = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
BFLOAT16 = _multiplies_bfloat16(torch.device("cpu"))  # where the processor has none, torch also adds up gradients of weights in it
# In bfloat16, which is slow where it is emulated, without the layers between the first and the last.
CASES = [(shape, dtype) for dtype in EXACT for shape in SHAPES if dtype == torch.float32 or shape not in SHAPES[1:4]]


@pytest.fixture
def few(monkeypatch):
    """A few pixels are worth a choice."""
    monkeypatch.setattr(convolution, "MIN_POSITIONS", 1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result, expected):
    return float((result.detach().double() - expected.detach()).norm() / expected.detach().norm())


def computable(table, dtype, shape):
    """In float32, which shows small mistakes, the ways for bfloat16 too."""
    return [way for way in table if possible(way, dtype, torch.Size(shape[:4])) or (dtype == torch.float32 and way != "winograd")]


def names(table, dtype, shape):
    return [way for way in table if possible(way, dtype, torch.Size(shape[:4]))]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_each_way_is_torchs_convolution_and_so_are_its_gradients(shape, dtype, monkeypatch):
    n, inputs, height, width, outputs = shape
    if several := n > 1:  # 70 images are taken a few at a time, and at last fewer; so are seven outputs
        monkeypatch.setattr(convolution, "TRIPLES", 2**20)
        monkeypatch.setattr(convolution, "PART", 3)
        monkeypatch.setattr(convolution, "TILES", 48)
    layout = torch.channels_last if several else torch.contiguous_format
    x, weight = random(n, inputs, height, width).to(dtype), random(outputs, inputs, 3, 3, seed=1).to(dtype)
    g = random(n, outputs, height, width, seed=2).to(dtype).contiguous(memory_format=layout)
    x, weight = (each.contiguous(memory_format=layout).requires_grad_() for each in (x, weight))
    exact_x, exact_weight = (each.detach().double().requires_grad_() for each in (x, weight))
    expected = functional.conv2d(exact_x, exact_weight, padding=1)
    exact = torch.autograd.grad(expected, (exact_x, exact_weight), g.double())
    for way in computable(CONVOLUTIONS, dtype, shape):
        y = convolution._Convolution.apply(x, weight, Ways(way, way, "torch"))
        (dx,) = torch.autograd.grad(y, x, g)
        assert (y.dtype, dx.dtype) == (dtype, dtype)
        assert way == "torch" or y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, expected) < EXACT[dtype], way
        assert error(dx, exact[0]) < EXACT[dtype], way
    for way in computable(WEIGHT_GRADIENTS, dtype, shape):
        both = torch.autograd.grad(convolution._Convolution.apply(x, weight, Ways("torch", "torch", way)), (x, weight), g)
        if dtype == torch.float32 or BFLOAT16:
            assert error(both[1], exact[1]) < EXACT[dtype], way
        (alone,) = torch.autograd.grad(convolution._Convolution.apply(x.detach(), weight, Ways("torch", "torch", way)), weight, g)
        assert torch.equal(alone, both[1])


def test_a_way_suits_images_of_its_kind():
    assert not possible("winograd", torch.bfloat16, torch.Size([2, 3, 8, 8]))
    assert not possible("winograd", torch.float32, torch.Size([2, 3, 8, 6]))
    assert names(CONVOLUTIONS, torch.float32, (2, 3, 8, 8)) == ["torch", "winograd"]
    assert names(CONVOLUTIONS, torch.bfloat16, (2, 3, 8, 8)) == ["torch", "parts", "rows"]
    assert names(WEIGHT_GRADIENTS, torch.bfloat16, (2, 3, 8, 8)) == ["torch", "side by side"]


@needs_mkl
def test_where_nothing_was_measured_winograd_is_used_where_it_is_usually_faster():
    layer, x = Conv3x3(64, 128), random(64, 64, 4, 4)
    assert layer._ways(x) == WINOGRAD
    assert layer._ways(x[:63]) == TORCH  # transforming the kernels would not pay
    assert layer._ways(random(64, 63, 4, 4)) == TORCH
    assert layer._ways(random(64, 64, 6, 6)) == TORCH
    assert layer._ways(x.double()) == TORCH
    assert layer._ways(x.to("meta")) == TORCH
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._ways(x) == TORCH


def test_what_is_chosen_holds_for_its_layer_and_type(few, monkeypatch):
    apply, seen = convolution._Convolution.apply, []
    monkeypatch.setattr(convolution._Convolution, "apply", lambda *given: (seen.append(given[2]), apply(*given))[1])
    layer, ways = Conv3x3(8, 16), Ways("rows", "torch", "side by side")
    use(layer, {"bfloat16 8>16 4x4": list(ways)})
    assert used(layer) == {"bfloat16 8>16 4x4": ["rows", "torch", "side by side"]}
    layer(random(2, 8, 4, 4))  # float32
    with torch.autocast("cpu", torch.bfloat16):
        layer(random(2, 8, 8, 8))
        assert seen == []
        layer(random(2, 8, 4, 4))
    assert seen == [ways]
    use(layer, None)
    assert used(layer) is None


@pytest.mark.parametrize("wrong", [["winograd", "torch", "row"], ["side by side", "torch", "torch"], ["torch", "torch", "torch", "torch"]])
def test_a_way_that_there_is_not_is_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        use(Conv3x3(4, 4), {"float32 4>4 4x4": wrong})


def test_single_images_are_computed_by_torch_whatever_was_chosen_for_batches():
    layer, x = Conv3x3(8, 16), random(64, 8, 4, 4)
    use(layer, {"float32 8>16 4x4": list(WINOGRAD)})
    assert (layer._ways(x), layer._ways(x[:63])) == (WINOGRAD, TORCH)


def test_under_autocast_the_weights_get_gradients_of_their_own_type(few):
    layer, x, g = Conv3x3(8, 16, bias=True), random(5, 8, 8, 8), random(5, 16, 8, 8)
    use(layer, {"bfloat16 8>16 8x8": ["rows", "parts", "side by side"]})
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(g.bfloat16())
    exact_x, exact = x.detach().double().requires_grad_(), [p.detach().double().requires_grad_() for p in layer.parameters()]
    expected = functional.conv2d(exact_x, *exact, padding=1)
    gradients = torch.autograd.grad(expected, [exact_x, *exact], g.double())
    assert error(y, expected) < 1e-2
    for found, exact in zip([x.grad, layer.weight.grad, layer.bias.grad], gradients, strict=True):
        assert found.dtype == torch.float32
        assert error(found, exact) < (1e-2 if BFLOAT16 else 0.2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which goes on being used
def test_what_is_exported_is_torchs_own_convolution():
    layer, x = Conv3x3(64, 64).eval(), random(64, 64, 4, 4)
    use(layer, {"float32 64>64 4x4": list(WINOGRAD)})
    targets = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
    assert [target for target in targets if target.startswith("aten")] == ["aten.conv2d.default"]
    assert "aten::_convolution" in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)


def test_one_image_without_a_batch():
    layer, x = Conv3x3(64, 64), random(64, 64, 64)
    assert torch.equal(layer(x), functional.conv2d(x, layer.weight, padding=1))


@needs_mkl
def test_a_bias_is_added_after_it():
    layer = Conv3x3(64, 32, bias=True)
    x, g = random(64, 64, 4, 4), random(64, 32, 4, 4)
    layer(x).backward(g)
    expected = functional.conv2d(x.double(), layer.weight.detach().double(), layer.bias.detach().double(), padding=1)
    assert error(layer(x), expected) < 1e-5
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


class Everywhere(dict):
    """The same three ways for every layer."""

    def __init__(self, ways):
        super().__init__(any=ways)

    def get(self, layer, default=None):
        return self["any"]


@pytest.mark.parametrize("ways", [WINOGRAD, Ways("rows", "parts", "side by side"), Ways("parts", "rows", "torch")])
def test_the_network_in_float32_is_that_in_float64(ways, few, monkeypatch):
    apply, calls = convolution._Convolution.apply, []
    monkeypatch.setattr(convolution._Convolution, "apply", lambda *arguments: (calls.append(1), apply(*arguments))[1])
    images, labels = random(16, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(16) % 10
    results = []
    for dtype in (torch.float32, torch.float64):
        model = smoothed(build_model(Recipe.build(init="default", width=8))).to(dtype).train()
        for layer in model.modules():
            if isinstance(layer, Conv3x3):
                layer.ways = Everywhere(ways) if dtype == torch.float32 else {}
        logits = model(images.to(dtype))
        functional.cross_entropy(logits, labels).backward()
        results.append((logits.detach(), [parameter.grad for parameter in model.parameters()]))
    assert len(calls) == 8  # of the network in float32
    (logits, gradients), (exact_logits, exact_gradients) = results
    assert error(logits, exact_logits) < 1e-4
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert error(gradient, exact) < 2e-4
