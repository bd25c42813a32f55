import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from cifar_resnet import Recipe, batches, data
from cifar_resnet.batches import AlbumentationsBatches, Choices, TensorBatches, augmented, draw, image_seeds
from cifar_resnet.data import Split, with_statistics

CPU = torch.device("cpu")
WORKERS = {"tensor": None, "albumentations": 0}
VARIANTS = [
    dict(flip_order="random"),
    dict(pad_mode="black", cutout_count=2, cutout_probability=0.5, flip_order="random"),
    dict(pad_mode="mean", pad=2, cutout_fill=0.473363, flip_probability=0.1),  # random for being 0.1
    dict(pad=0, cutout_count=0, flip_probability=0.0),
]


def random_split(count, seed=0):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count), np.arange(count))


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


@pytest.fixture(params=VARIANTS, ids=str)
def recipe(request):
    return with_statistics(Recipe.build(batch_size=64, **request.param))


def test_the_same_choices_give_the_same_batch(recipe):
    split = random_split(64)
    pipeline = data.train_transform(recipe, save_applied_params=True)
    slow, drawn = [], []
    for image, seed in zip(split.images, image_seeds(recipe, 0, 0, 64), strict=True):
        result = augmented(pipeline, image, seed)
        slow.append(result["image"])
        drawn.append(choices_of(result["applied_transforms"], recipe))
    choices = Choices(*(torch.from_numpy(np.array(kind)) for kind in zip(*drawn, strict=True)))
    fast = TensorBatches(split, recipe, CPU).augment(torch.arange(64), choices)
    torch.testing.assert_close(fast, torch.stack(slow), rtol=1e-6, atol=1e-6)


def test_augmentation_is_pad_crop_flip_cut_normalise_in_numpy(recipe):
    """The tensor loader against the obvious way, image by image."""
    split = random_split(50)
    choices = draw(recipe, 3, 1, 50)
    fast = TensorBatches(split, recipe, CPU).augment(torch.arange(50), choices)
    p = recipe.pad
    for i, image in enumerate(split.images):
        if recipe.pad_mode == "reflect":
            padded = np.pad(image, ((p, p), (p, p), (0, 0)), mode="reflect")
        else:
            padded = np.zeros((32 + 2 * p, 32 + 2 * p, 3)) + (
                np.rint(np.array(recipe.mean) * 255) if recipe.pad_mode == "mean" else 0
            )
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


def test_evaluation_batches_are_the_same_bits_from_either_loader(recipe):
    split = random_split(70)
    fast = list(TensorBatches(split, recipe, CPU).plain(32))
    slow = list(AlbumentationsBatches(split, recipe, CPU, 0).plain(32))
    for (a, labels), (b, same) in zip(fast, slow, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels, same)
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert b.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.cat([labels for _, labels in fast]), torch.from_numpy(split.labels))


@pytest.mark.parametrize("loader", ["tensor", "albumentations"])
def test_an_epoch_shows_every_image_once_in_a_new_order(loader):
    split = random_split(70)
    split = Split(split.images, np.arange(70), split.indices)  # the label tells which image it is
    recipe = with_statistics(Recipe.build(batch_size=32))
    made = batches.make_batches(split, recipe, CPU, loader, WORKERS[loader])
    assert made.steps == 3
    epochs = [[labels.tolist() for _, labels in made.epoch(epoch)] for epoch in (0, 1)]
    assert [len(labels) for labels in epochs[0]] == [32, 32, 6]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(70))
    assert epochs[0] != epochs[1]
    other = batches.make_batches(split, recipe.replace(seed=1), CPU, loader, WORKERS[loader])
    assert [labels.tolist() for _, labels in other.epoch(0)] != epochs[0]


@pytest.mark.parametrize("loader", ["tensor", "albumentations"])
def test_alternating_flips_turn_every_image_from_epoch_to_epoch(loader):
    split = random_split(400)
    split = Split(split.images, np.arange(400), split.indices)  # the label tells which image it is
    recipe = with_statistics(Recipe.build(pad=0, cutout_count=0, batch_size=64, flip_order="alternating"))
    made = batches.make_batches(split, recipe, CPU, loader, WORKERS[loader])
    plain, turned = torch.cat([images for images, _ in made.plain(400)]), []
    for epoch in range(3):
        shown = {int(label): image for images, labels in made.epoch(epoch) for image, label in zip(images, labels, strict=True)}
        turned.append([torch.equal(shown[i], plain[i].flip(2)) for i in range(400)])
        assert [torch.equal(shown[i], plain[i]) for i in range(400)] == [not each for each in turned[-1]]
    assert 160 < sum(turned[0]) < 240  # 200, with a standard deviation of 10
    assert turned[1] == [not each for each in turned[0]]
    assert turned[2] == turned[0]


@pytest.mark.parametrize("loader", ["tensor", "albumentations"])
def test_an_epoch_can_begin_at_any_step(loader):
    made = batches.make_batches(random_split(70), with_statistics(Recipe.build(batch_size=16)), CPU, loader, WORKERS[loader])
    whole = list(made.epoch(2))
    for first in range(1, made.steps + 1):
        for (a, x), (b, y) in zip(made.epoch(2, first), whole[first:], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
def test_0_1_and_3_workers_give_the_same_batches():
    split, recipe = random_split(70), with_statistics(Recipe.build(batch_size=16, flip_order="random"))
    made = [AlbumentationsBatches(split, recipe, CPU, workers) for workers in (0, 1, 3)]
    for epoch in (0, 1):
        for one, *others in zip(*(each.epoch(epoch) for each in made), strict=True):
            for other in others:
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])


def seen_by_albumentations(recipe, epoch, count):
    pipeline = data.train_transform(recipe, save_applied_params=True)
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
    offsets, flips, holes = seen_by(recipe, 0, 6000)
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
    again = seen_by(recipe, 1, 6000)
    agreement = np.mean((again[0] == offsets).all(1))
    assert agreement < 0.05  # 1 in 81 by chance


def test_probabilities_are_those_of_the_recipe():
    recipe = with_statistics(Recipe.build("eva6-s9"))
    for seen_by in (seen_by_tensors, seen_by_albumentations):
        _, flips, holes = seen_by(recipe, 0, 6000)
        for share in (flips.mean(), (holes[:, 0, 0] >= 0).mean()):
            assert share == pytest.approx(0.1, abs=0.02)


def test_a_worker_gives_way_and_ends_when_the_batches_are_closed():
    split = Split(np.zeros((64, 32, 32, 3), np.uint8), np.zeros(64, np.int64), np.arange(64))
    loaded = AlbumentationsBatches(split, with_statistics(Recipe.build(batch_size=16)), CPU, 1)
    kept = loaded.epoch(0)
    next(kept)
    (worker,) = loaded.loader._iterator._workers
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 19, 19)
    loaded.close()
    assert not worker.is_alive()
    assert len(next(loaded.epoch(1))[1]) == 16  # with a new one
    loaded.close()


def test_a_process_that_ends_inside_an_epoch_ends_its_workers():
    code = """
import numpy as np, torch
from cifar_resnet import Recipe
from cifar_resnet.batches import AlbumentationsBatches
from cifar_resnet.data import Split, with_statistics
split = Split(np.zeros((64, 32, 32, 3), np.uint8), np.zeros(64, np.int64), np.arange(64))
batches = AlbumentationsBatches(split, with_statistics(Recipe.build(batch_size=16)), torch.device("cpu"), 1)
kept = [batches.epoch(0)]
next(kept[0])
kept.append(kept)  # a cycle, which the interpreter does not collect at its end
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
