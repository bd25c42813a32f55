"""The batches of the loop, from either loader, whole or a rank's share of them."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from cifar_resnet import Recipe
from cifar_resnet.data.augment import Choices, draw
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import AlbumentationsLoader, Share, TensorLoader, batch_sizes, check_batches, make_loader
from cifar_resnet.data.splits import Split
from cifar_resnet.errors import UsageError

CPU = torch.device("cpu")
LOADERS = pytest.mark.parametrize(("kind", "workers"), [("tensor", None), ("albumentations", 0)])


def random_split(count):
    """The label tells which image it is."""
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count), np.arange(count))


def of_recipe(**fields):
    return with_statistics(Recipe.build(**fields))


@pytest.mark.parametrize("recipe", ["default", "eva6-s9"])
def test_evaluation_batches_hold_every_image_normalised_only(recipe):
    split, recipe = random_split(70), of_recipe(recipe=recipe)
    batches = list(TensorLoader(split, recipe, CPU).plain(32))
    assert [len(batch.labels) for batch in batches] == [32, 32, 6]
    assert all(batch.weight == 1 and batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.from_numpy(split.labels))
    expected = (split.images / 255 - recipe.mean) / recipe.std
    found = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@LOADERS
def test_an_epoch_shows_every_image_once_in_a_new_order(kind, workers):
    def shown(epoch, **fields):
        return [batch.labels.tolist() for batch in loader(**fields).epoch(epoch)]

    def loader(**fields):
        return make_loader(random_split(70), of_recipe(batch_size=32, **fields), CPU, kind, workers)

    assert loader().steps == 3
    epochs = [shown(epoch) for epoch in (0, 1)]
    assert [len(labels) for labels in epochs[0]] == [24, 23, 23]
    assert [len(labels) for labels in shown(0, batches="fixed")] == [32, 32, 6]
    assert list(itertools.chain(*shown(0, batches="fixed"))) == list(itertools.chain(*epochs[0]))  # the same order
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(70))
    assert epochs[0] != epochs[1]
    assert shown(0, seed=1) != epochs[0]


@pytest.mark.parametrize(("count", "size"), [(49, 16), (48, 16), (193, 64), (50_000, 512), (45_000, 98), (7, 3), (5, 7), (3, 1)])
def test_an_epoch_takes_every_image_in_as_few_steps_as_it_can(count, size):
    fixed, even = (batch_sizes(Recipe(batch_size=size, batches=batches), count) for batches in ("fixed", "even"))
    assert fixed == [len(part) for part in torch.arange(count).split(size)]
    assert even == [len(part) for part in np.array_split(np.arange(count), len(fixed))]


@LOADERS
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_image_of_an_epoch_of_even_batches_weighs_the_same(kind, workers, ranks):
    """In the sum over the steps of the ranks' mean gradient."""
    split, recipe = random_split(25), of_recipe(batch_size=11, batches="even")
    weighed = np.zeros(25)
    for rank in range(ranks):
        for batch in make_loader(split, recipe, CPU, kind, workers, Share(rank, ranks)).epoch(1):
            weighed[batch.labels] += batch.weight / len(batch.labels) / ranks
    np.testing.assert_allclose(weighed, 3 / 25)


@pytest.mark.parametrize("batches", ["even", "fixed"])
def test_both_loaders_show_the_same_images_in_the_same_steps(batches):
    recipe = of_recipe(batch_size=16, batches=batches, pad=0, cutout_count=0, flip_probability=0)
    tensor, slow = (make_loader(random_split(73), recipe, CPU, *kind).epoch(1, 1) for kind in (("tensor",), ("albumentations", 0)))
    for one, other in zip(tensor, slow, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.weight == other.weight


@pytest.mark.parametrize(
    ("fields", "count", "ranks", "least", "advice"),
    [
        (dict(batch_size=16, batches="fixed"), 49, 1, 2, "of 49 training images a step would have only 1,.* --batch-size 17 would do"),
        (dict(batch_size=16, batches="even"), 49, 1, 2, None),
        (dict(batch_size=16, batches="fixed"), 50, 1, 2, None),
        (dict(batch_size=16, batches="fixed"), 49, 1, 1, None),
        (dict(batch_size=1), 40, 1, 2, "--batch-size 1: .* --batch-size 2 would do"),
        (dict(batch_size=2), 5, 1, 2, "--batch-size 3 would do"),
        (dict(batch_size=1438), 1437, 1, 2, "--batch-size 1438 is more than the 1437 training images"),
        (dict(batch_size=15, batches="fixed"), 33, 2, 2, "only 1 for each of 2 processes, .* --batch-size 17 would do"),
        (dict(batch_size=3), 3, 2, 2, "train on more images"),
        (dict(batch_size=3), 3, 2, 1, None),
        (dict(batch_size=3), 3, 4, 1, "only 0 for each of 4 processes"),
    ],
)  # fmt: skip
def test_a_step_of_one_image_is_refused_with_a_size_that_would_do(fields, count, ranks, least, advice):
    recipe = Recipe(**fields)
    if advice is None:
        check_batches(recipe, count, ranks, least)
        return
    with pytest.raises(UsageError, match=advice) as refusal:
        check_batches(recipe, count, ranks, least)
    if advised := re.search(r"--batch-size (\d+) would do", str(refusal.value)):
        check_batches(recipe.replace(batch_size=int(advised[1])), count, ranks, least)


@LOADERS
def test_alternating_flips_turn_every_image_from_epoch_to_epoch(kind, workers):
    recipe, split = of_recipe(pad=0, cutout_count=0, batch_size=64, flip_order="alternating"), random_split(200)
    loader = make_loader(split, recipe, CPU, kind, workers)
    ((plain, _, _),), turned = TensorLoader(split, recipe, CPU).plain(), []
    for epoch in range(3):
        shown = {int(label): image for batch in loader.epoch(epoch) for image, label in zip(*batch[:2], strict=True)}
        turned.append([torch.equal(shown[i], plain[i].flip(2)) for i in range(200)])
        assert [torch.equal(shown[i], plain[i]) for i in range(200)] == [not each for each in turned[-1]]
    assert 65 < sum(turned[0]) < 135  # 100, with a standard deviation of 7
    assert turned[1] == [not each for each in turned[0]]
    assert turned[2] == turned[0]


@LOADERS
def test_an_epoch_can_begin_at_any_step(kind, workers):
    loader = make_loader(random_split(73), of_recipe(batch_size=16), CPU, kind, workers)
    whole = list(loader.epoch(2))
    for first in range(1, loader.steps + 1):
        rest = list(loader.epoch(2, first))
        assert len(rest) == loader.steps - first
        for batch, same in zip(rest, whole[first:], strict=True):
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.labels, same.labels)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
def test_0_1_and_3_workers_give_the_same_batches():
    split, recipe = random_split(70), of_recipe(batch_size=16, flip_order="random")
    loaders = [AlbumentationsLoader(split, recipe, CPU, workers) for workers in (0, 1, 3)]
    for epoch in (0, 1):
        for one, *others in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            for other in others:
                assert torch.equal(one.images, other.images)
                assert torch.equal(one.labels, other.labels)
    for loader in loaders:
        loader.close()


def test_a_worker_that_starts_afresh_gives_the_same_batches():
    """As every worker does on Windows and macOS."""
    split, recipe = random_split(20), of_recipe(batch_size=16)
    alone, spawned = (AlbumentationsLoader(split, recipe, CPU, workers) for workers in (0, 1))
    spawned.loader.multiprocessing_context = "spawn"
    for one, other in zip(alone.epoch(1), spawned.epoch(1), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    spawned.close()


@pytest.mark.parametrize("fields", [dict(), dict(cutout_count=2, cutout_probability=0.5, flip_order="random"), dict(cutout_count=0, batches="fixed")], ids=str)  # fmt: skip
def test_a_step_on_the_device_chooses_the_same_batch_as_a_number(fields):
    loader = TensorLoader(random_split(73), of_recipe(batch_size=16, **fields), CPU)
    table = loader.draw(1)
    assert table.dtype == torch.int32
    for step, of_epoch in zip(range(loader.steps), loader.epoch(1), strict=True):
        for given in (step, torch.tensor(step)):
            batch = loader.batch(table, given, loader.sizes[step])
            assert torch.equal(batch.images, of_epoch.images)
            assert torch.equal(batch.labels, of_epoch.labels)
            assert batch.weight == of_epoch.weight


def test_a_row_of_the_table_is_what_happens_to_an_image():
    """Each image of an epoch, made of its row alone; and the rows are what the augmentation draws for every step."""
    split, recipe = random_split(40), of_recipe(batch_size=16, cutout_count=2, cutout_probability=0.5, flip_order="random")
    loader = TensorLoader(split, recipe, CPU)
    table, shown = loader.draw(3).long(), torch.cat([batch.images for batch in loader.epoch(3)])
    for image, row in zip(shown, table, strict=True):
        index, top, left, flipped, *holes = row.tolist()
        choices = Choices(torch.tensor([[top, left]]), torch.tensor([bool(flipped)]), torch.tensor(holes).view(1, 2, 2))
        assert torch.equal(loader.augment(loader.images, torch.tensor([index]), choices)[0], image)
    for rows, step in zip(table.split(loader.sizes), range(3), strict=True):
        offsets, flips, holes = draw(recipe, 3, step, len(rows))
        assert torch.equal(rows[:, 1:], torch.cat([offsets, flips[:, None], holes.flatten(1)], 1))


@pytest.mark.parametrize("count", [1, 7, 40, 336, 512])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_are_every_image_once_and_their_weights_give_the_mean(count, ranks):
    images = np.random.default_rng(0).random(count)
    shares = [Share(rank, ranks) for rank in range(ranks)]
    parts = [images[share.of(count)] for share in shares]
    assert np.concatenate(parts).tolist() == images.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    weighted = [share.weight(count) * part.mean() for share, part in zip(shares, parts, strict=True) if len(part)]
    assert sum(weighted) / ranks == pytest.approx(images.mean())


@LOADERS
def test_a_share_of_a_batch_is_that_part_of_it_with_the_weight_of_its_size(kind, workers):
    split, recipe = random_split(25), of_recipe(batch_size=11, batches="fixed")
    whole, *parts = (make_loader(split, recipe, CPU, kind, workers, Share(*share)) for share in ((0, 1), (0, 3), (1, 3), (2, 3)))
    for batch, *shares in zip(*(loader.epoch(0) for loader in (whole, *parts)), strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)
        assert [share.weight for share in shares] == [3 * len(share.labels) / len(batch.labels) for share in shares]


@pytest.mark.parametrize(
    ("kind", "workers", "message"),
    [
        ("fast", None, "--loader fast"),
        ("tensor", 2, "--workers 2"),
        ("auto", 0, "--workers 0"),
        ("albumentations", -1, "--workers -1"),
    ],
)
def test_a_loader_that_is_none_is_refused(kind, workers, message):
    with pytest.raises(UsageError, match=message):
        make_loader(random_split(4), of_recipe(), CPU, kind, workers)


@pytest.mark.posix
def test_a_worker_gives_way_and_ends_when_the_loader_is_closed():
    loader = AlbumentationsLoader(random_split(64), of_recipe(batch_size=16), CPU, 1)
    kept = loader.epoch(0)
    next(kept)
    (worker,) = loader.loader._iterator._workers
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 19, 19)
    loader.close()
    assert not worker.is_alive()
    assert len(next(loader.epoch(1)).labels) == 16  # with a new one
    loader.close()


def test_a_process_that_ends_inside_an_epoch_ends_its_workers():
    code = """
import numpy as np, torch
from cifar_resnet import Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.splits import Split
from cifar_resnet.data.loaders import AlbumentationsLoader
split = Split(np.zeros((64, 32, 32, 3), np.uint8), np.zeros(64, np.int64), np.arange(64))
loader = AlbumentationsLoader(split, with_statistics(Recipe.build(batch_size=16)), torch.device("cpu"), 1)
kept = [loader.epoch(0)]
next(kept[0])
kept.append(kept)  # a cycle, which the interpreter does not collect at its end
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_numbers_of_torch_stay_the_users(workers):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    loader = AlbumentationsLoader(random_split(8), of_recipe(batch_size=4), torch.device("cpu"), workers)
    next(loader.epoch(0))
    loader.close()
    assert torch.equal(torch.rand(3), expected)
