"""The network against its specification, written out in functions; its size; its first weights."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional

from cifar_resnet import Recipe, build_model
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.jobs.bench import _random_split
from cifar_resnet.look.analysis import layers
from cifar_resnet.training import engine
from cifar_resnet.training.model import Chain, ResNet, whiten, whitening_kernels

PARAMETERS = {
    "eva6-s9": 6_574_090, "eva4-s11": 6_574_090, "eva8-s8": 6_573_130, "week5-s10": 6_573_130, "era-s10": 6_573_120,
    "default": 6_573_130, "page": 6_573_120,
}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = ResNet(Recipe.build(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("name", "giga"), [("eva8-s8", 194.18), ("era-s10", 194.18), ("eva6-s9", 194.34)])
def test_multiply_adds_at_batch_512(name, giga):
    import torchinfo

    with torch.device("meta"):
        model = ResNet(Recipe.build(name))
        statistics = torchinfo.summary(model, input_data=torch.zeros(512, 3, 32, 32), verbose=0, device="meta")
    assert round(statistics.total_mult_adds / 1e9, 2) == giga


@pytest.mark.parametrize("width", [1, 5, 64])
def test_the_width_is_that_of_the_first_convolution_and_doubles_from_layer_to_layer(width):
    model = build_model(Recipe.build(width=width), classes=7)
    convolutions = [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    one, two, four, eight = (width * times for times in (1, 2, 4, 8))
    assert convolutions == [
        (one, 3),
        (two, one),
        (two, two),
        (two, two),
        (four, two),
        (eight, four),
        (eight, eight),
        (eight, eight),
    ]
    assert tuple(model.fc.weight.shape) == (7, eight)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    "layer", ["prep.0", "layer1.0", "layer1.1", "layer1.4.block.0", "layer1.4.block.3", "layer2.0", "layer2.1"]
)
def test_receptive_field_jump_and_start_are_the_gradients_footprint(layer):
    """Pixels that move a unit, over random images and channels: a box of the field's size, centred where start and jump say."""
    model = build_model(Recipe.build(init="default", width=8)).double().eval()  # Dirac's kernels are narrow
    row = next(row for row in layers(Recipe()) if row["layer"] == layer)
    kept = []
    model.get_submodule(layer).register_forward_hook(lambda _module, _input, output: kept.append(output))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    model.logits(images)
    unit = kept[0].shape[2] // 2
    (gradient,) = torch.autograd.grad(kept[0][:, :, unit, unit].square().sum(), images)
    touched = gradient.abs().sum((0, 1)) > 0
    for axis in (0, 1):
        places = touched.any(axis).nonzero().flatten()
        first, last = int(places[0]), int(places[-1])
        assert last - first + 1 == row["receptive_field"]
        assert (first + last + 1) / 2 == row["start"] + unit * row["jump"]


def by_hand(model, recipe, x):
    """The specification, written out with functions, on the model's parameters in the order that they were made."""
    weights = dict(model.named_parameters())
    kernels = iter(
        [(weight, weights.get(name.removesuffix("weight") + "bias")) for name, weight in weights.items() if weight.dim() == 4]
    )
    norms = iter([module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)])

    def conv(x):
        weight, bias = next(kernels)
        return functional.conv2d(x, weight, bias, stride=1, padding=1)

    def norm(x):
        bn = next(norms)
        mean, var, weight, bias = (each[:, None, None] for each in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        return (x - mean) / (var + bn.eps).sqrt() * weight + bias

    def layer(x):
        x = conv(x)
        if recipe.pool_position == "after-relu":
            return functional.max_pool2d(functional.relu(norm(x)), 2)
        return functional.relu(norm(functional.max_pool2d(x, 2)))

    def residual(x):
        inner = functional.relu(norm(conv(x)))
        return x + functional.relu(norm(conv(inner)))

    x = conv(x)
    x = functional.relu(norm(x)) if recipe.prep_order == "bn-relu" else norm(functional.relu(x))
    x = residual(layer(x))
    x = layer(x)
    x = residual(layer(x))
    x = functional.max_pool2d(x, 4).reshape(len(x), 8 * recipe.width)
    x = x @ weights["fc.weight"].T + weights.get("fc.bias", 0)
    return x * recipe.logit_scale


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_network_is_the_specified_one_to_the_layer(name):
    recipe = Recipe.build(name, width=4)
    model = build_model(recipe).double().eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # so that a wrong order shows
            for tensor in (module.running_mean, module.bias.data, module.weight.data):
                tensor.normal_(0.3, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    x = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = by_hand(model, recipe, x)
        torch.testing.assert_close(model.logits(x), logits, rtol=1e-9, atol=1e-9)
        after = {"logits": lambda x: x, "softmax": lambda x: x.softmax(1), "log-softmax": lambda x: x.log_softmax(1)}
        torch.testing.assert_close(model(x), after[recipe.output](logits))


def test_the_seed_decides_the_weights_and_the_random_state_stays():
    before = torch.random.get_rng_state()
    one, same, other = (build_model(Recipe.build(seed=seed, width=4)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = zip(one.parameters(), same.parameters(), other.parameters(), strict=True)
    drawn = [(torch.equal(a, b), torch.equal(a, c)) for a, b, c in weights if np.unique(a.detach()).size > 2]
    assert drawn == [(True, False)] * len(drawn)
    assert len(drawn) > 5


def test_dirac_kernels_pass_their_inputs_on():
    model = build_model(Recipe.build(init="dirac", width=8))
    x = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(model.layer1[0](x)[:, :8], x)
    y = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(model.layer1[-1].block[0](y), y)
    plain = build_model(Recipe.build(init="default", width=8))
    assert torch.equal(plain.prep[0].weight, model.prep[0].weight)
    assert torch.equal(plain.layer1[0].weight[8:], model.layer1[0].weight[8:])  # outputs beyond the inputs are drawn
    assert not torch.equal(plain.layer1[0].weight[:8], model.layer1[0].weight[:8])


def blurred(count):
    """Images (N, 3, 32, 32) of neighbours that are alike, as real ones are."""
    noise = torch.randn(count, 3, 34, 34, generator=torch.Generator().manual_seed(0))
    return functional.avg_pool2d(noise, 3, 1)


def test_whitening_kernels_whiten_what_they_were_made_of():
    images = blurred(700)  # of which 500 are looked at together
    kernels = whitening_kernels(images)
    outputs = functional.conv2d(images.double(), kernels).transpose(0, 1).flatten(1)
    assert torch.allclose(outputs.cov(), torch.eye(27, dtype=torch.float64), atol=0.15)
    strongest = kernels.flatten(1).norm(dim=1)
    assert (strongest.diff() > 0).all()  # a direction that varies more is multiplied by less


@pytest.mark.parametrize("width", [4, 16, 64])
def test_a_whitening_start_has_each_filter_with_both_signs(width):
    recipe = with_statistics(Recipe.build(init="whiten", width=width))
    images = (blurred(300).clamp(-1, 1) * 127 + 128).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    kernel = engine.start(recipe, torch.device("cpu"), images=images).model.prep[0].weight.detach()
    pairs = min(width, 54) // 2
    assert torch.equal(kernel[0 : 2 * pairs : 2], -kernel[1 : 2 * pairs : 2])
    normal = (torch.from_numpy(images) / 255 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
    outputs = functional.conv2d(normal.permute(0, 3, 1, 2), kernel[0 : 2 * pairs : 2]).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.corrcoef(outputs), torch.eye(pairs), atol=0.02)
    without = engine.start(recipe.replace(init="dirac"), torch.device("cpu")).model.state_dict()
    for name, value in engine.start(recipe, torch.device("cpu"), images=images).model.state_dict().items():
        beyond = slice(54, None) if name == "prep.0.weight" else ...  # where there are more outputs than filters
        assert torch.equal(value[beyond], without[name][beyond])


def test_whitening_looks_at_images_from_all_parts_of_a_split():
    """The images of a folder come class by class."""
    recipe = with_statistics(Recipe.build(init="whiten", width=4))
    images = np.concatenate([np.full((6000, 32, 32, 3), 99, np.uint8), _random_split(6000).images])
    models = [engine.start(recipe, torch.device("cpu"), images=each).model for each in (images, images[::-1].copy())]
    norms = [float(model.prep[0].weight.detach()[0].norm()) for model in models]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_grey_images_have_nine_filters_and_images_of_one_colour_none():
    """The other outputs stay as torch made them: nothing would come out of them but rounding."""
    grey = (blurred(300)[:, :1].clamp(-1, 1) * 127 + 128).to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    before = build_model(Recipe.build(width=64)).prep[0].weight.detach()
    for images, filters in ((grey.numpy(), 9), (np.full((10, 32, 32, 3), 7, np.uint8), 0)):
        model = build_model(Recipe.build(width=64))
        whiten(model, with_statistics(Recipe()), images)
        unchanged = (model.prep[0].weight == before).flatten(1).all(1)
        assert unchanged.tolist() == [False] * 2 * filters + [True] * (64 - 2 * filters)
        assert model.prep[0].weight.isfinite().all()


def test_a_norm_on_an_apple_gpu_gets_channels_first():
    class Pretended(torch.Tensor):
        device = torch.device("mps")

    class Norm(torch.nn.Module):
        def forward(self, x):
            seen.append(x.is_contiguous())
            return x

    seen, x = [], torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    chain = Chain(Norm(), Norm())
    assert torch.equal(chain(x.as_subclass(Pretended)).as_subclass(torch.Tensor), x)
    chain(x)
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("output", ["softmax", "log-softmax"])
def test_probabilities_are_float32_in_bfloat16_arithmetic(output):
    """bfloat16 would round a probability near 1 by up to 0.002."""
    loss = "nll" if output == "log-softmax" else "cross-entropy"
    model = build_model(Recipe.build(output=output, loss=loss, label_smoothing=0.0, width=4))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given = model(torch.randn(8, 3, 32, 32))
    sums = (given if output == "softmax" else given.exp()).double().sum(1)
    torch.testing.assert_close(sums, torch.ones(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_models_of_several_threads_are_those_of_their_seeds():
    recipes = [Recipe(width=4, seed=seed) for seed in range(8)]
    alone = [build_model(recipe) for recipe in recipes]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(build_model, recipes))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
