"""What happens to an image: the device's way, Albumentations' way, and the obvious way in numpy."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from cifar_resnet import Recipe
from cifar_resnet.data.augment import (
    Choices,
    TensorAugmentation,
    alternating_flips,
    augmented,
    draw,
    image_seeds,
    train_transform,
)
from cifar_resnet.data.datasets import with_statistics

CPU = torch.device("cpu")
VARIANTS = [
    dict(flip_order="random"),
    dict(pad_mode="black", cutout_count=2, cutout_probability=0.5, flip_order="random"),
    dict(pad_mode="mean", pad=2, cutout_fill=0.473363, flip_probability=0.1),  # random for being 0.1
    dict(pad=0, cutout_count=0, flip_probability=0.0),
]


@pytest.fixture(params=VARIANTS, ids=str)
def recipe(request):
    return with_statistics(Recipe.build(batch_size=64, **request.param))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)


def choices_of(applied, recipe):
    """The draws of one Albumentations call, as it reports them: offset, flip, holes."""
    by_name = dict(applied)
    top, left = 0, 0
    if "RandomCrop" in by_name:
        left, top = by_name["RandomCrop"]["crop_coords"][:2]
    holes = np.full((recipe.cutout_count, 2), -32)
    if "CoarseDropout" in by_name:
        for i, (x, y, x_end, y_end) in enumerate(by_name["CoarseDropout"]["holes"]):
            assert x_end - x == y_end - y == recipe.cutout_size
            holes[i] = (y, x)
    return (top, left), "HorizontalFlip" in by_name, holes


def test_the_same_choices_give_the_same_images(recipe, images):
    pipeline = train_transform(recipe)
    pipeline.save_applied_params = True
    slow, drawn = [], []
    for image, seed in zip(images, image_seeds(recipe, 0, 0, 64), strict=True):
        result = augmented(pipeline, image, seed)
        slow.append(result["image"])
        drawn.append(choices_of(result["applied_transforms"], recipe))
    choices = Choices(*(torch.from_numpy(np.array(kind)) for kind in zip(*drawn, strict=True)))
    fast = TensorAugmentation(recipe, CPU)(torch.from_numpy(images), torch.arange(64), choices)
    torch.testing.assert_close(fast, torch.stack(slow), rtol=1e-6, atol=1e-6)


def test_augmentation_is_pad_crop_flip_cut_normalise_in_numpy(recipe, images):
    """Image by image, of images that are asked for in another order than they lie."""
    index = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:50]
    choices = draw(recipe, 3, 1, 50)
    fast = TensorAugmentation(recipe, CPU)(torch.from_numpy(images), index, choices)
    assert fast.is_contiguous(memory_format=torch.channels_last)
    p = recipe.pad
    for i, image in enumerate(images[index.numpy()]):
        if recipe.pad_mode == "reflect":
            padded = np.pad(image, ((p, p), (p, p), (0, 0)), mode="reflect")
        else:
            border = np.rint(np.array(recipe.mean) * 255) if recipe.pad_mode == "mean" else 0
            padded = np.zeros((32 + 2 * p, 32 + 2 * p, 3)) + border
            padded[p : p + 32, p : p + 32] = image
        top, left = choices.offsets[i].tolist()
        out = padded[top : top + 32, left : left + 32].astype(float)
        if choices.flips[i]:
            out = out[:, ::-1].copy()
        for y, x in choices.holes[i].tolist():
            if y >= 0:
                fill = np.array(recipe.mean) if recipe.cutout_fill is None else np.full(3, recipe.cutout_fill)
                out[y : y + 8, x : x + 8] = np.rint(fill * 255)
        expected = (out / 255 - recipe.mean) / recipe.std
        np.testing.assert_allclose(fast[i].permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-5)


def seen_by_albumentations(recipe, epoch, count):
    pipeline = train_transform(recipe)
    pipeline.save_applied_params = True
    image, seen = np.zeros((32, 32, 3), np.uint8), []
    for step in range(count // 500):
        results = [augmented(pipeline, image, seed) for seed in image_seeds(recipe, epoch, step, 500)]
        seen += [choices_of(result["applied_transforms"], recipe) for result in results]
    return [np.array(kind) for kind in zip(*seen, strict=True)]


def seen_by_tensors(recipe, epoch, count):
    drawn = [draw(recipe, epoch, step, 500) for step in range(count // 500)]
    return [torch.cat(kind).numpy() for kind in zip(*drawn, strict=True)]


@pytest.mark.parametrize("seen_by", [seen_by_tensors, seen_by_albumentations])
def test_draws_are_uniform_and_jointly_independent(seen_by):
    """Chi-squared on each draw and on each pair: with a shared random stream, pairs would be far from independent."""
    recipe = with_statistics(Recipe.build(cutout_probability=0.5, flip_order="random"))
    offsets, flips, holes = seen_by(recipe, 0, 3000)
    cut = holes[:, 0, 0] >= 0
    assert offsets.min() == 0
    assert offsets.max() == 8
    draws = {"top": offsets[:, 0], "left": offsets[:, 1], "flip": flips.astype(int), "cut": cut.astype(int)}
    kinds = {"top": 9, "left": 9, "flip": 2, "cut": 2}
    for name, values in draws.items():
        assert stats.chisquare(np.bincount(values, minlength=kinds[name])).pvalue > 1e-4, name
    for axis in (0, 1):
        where = holes[cut, 0, axis]
        assert (where.min(), where.max()) == (0, 24)
        assert stats.chisquare(np.bincount(where, minlength=25)).pvalue > 1e-4
        for name, values in draws.items():
            if name != "cut":
                table = stats.contingency.crosstab(values[cut], where // 5).count
                assert stats.chi2_contingency(table).pvalue > 1e-4, name
    for a, b in itertools.combinations(draws, 2):
        table = stats.contingency.crosstab(draws[a], draws[b]).count
        assert stats.chi2_contingency(table).pvalue > 1e-4, (a, b)
    again, _, _ = seen_by(recipe, 1, 500)
    assert np.mean((again == offsets[:500]).all(1)) < 0.05  # 1 in 81 by chance


@pytest.mark.parametrize("seen_by", [seen_by_tensors, seen_by_albumentations])
def test_probabilities_are_those_of_the_recipe(seen_by):
    _, flips, holes = seen_by(with_statistics(Recipe.build("eva6-s9")), 0, 3000)
    for share in (flips.mean(), (holes[:, 0, 0] >= 0).mean()):
        assert share == pytest.approx(0.1, abs=0.025)  # four and a half standard deviations


def test_alternating_flips_mirror_a_random_half_then_the_other():
    recipe = Recipe()
    flips = [alternating_flips(recipe, epoch, 1000) for epoch in range(3)]
    assert 420 < flips[0].sum() < 580  # 500, with a standard deviation of 16
    assert (flips[1] == ~flips[0]).all()
    assert (flips[2] == flips[0]).all()
    assert (alternating_flips(recipe.replace(seed=1), 0, 1000) != flips[0]).sum() > 400


@pytest.mark.parametrize("changes", [dict(seed=1), dict(epoch=1), dict(step=1)], ids=str)
def test_what_happens_to_a_batch_depends_on_seed_epoch_and_step_alone(changes):
    def drawn(seed=0, epoch=0, step=0):
        return draw(Recipe.build(seed=seed), epoch, step, 20), image_seeds(Recipe.build(seed=seed), epoch, step, 20)

    torch.manual_seed(1)
    (choices, seeds), (same, same_seeds), (others, other_seeds) = drawn(), drawn(), drawn(**changes)
    assert all(torch.equal(a, b) for a, b in zip(choices, same, strict=True))
    assert not torch.equal(choices.offsets, others.offsets)
    assert seeds == same_seeds
    assert set(seeds).isdisjoint(other_seeds)
