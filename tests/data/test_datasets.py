"""Where images come from: the digits, CIFAR-10 and its download, folders of one's own; and which of them are kept back."""

import re
import shutil

import numpy as np
import pytest

from cifar_resnet import Recipe, samples
from cifar_resnet.data.datasets import STATISTICS, load, with_statistics
from cifar_resnet.data.splits import Split, stratified
from cifar_resnet.errors import UsageError


def silent(message):
    pass


def test_digits_are_split_1437_to_360_and_stratified():
    loaded = load(Recipe.build("digits"))
    assert (len(loaded.train), len(loaded.evaluation)) == (1437, 360)
    assert loaded.train.images.shape == (1437, 32, 32, 3)
    assert set(loaded.train.indices).isdisjoint(loaded.evaluation.indices)
    shares = [np.bincount(split.labels) / len(split) for split in (loaded.train, loaded.evaluation)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005
    pixels = loaded.train.images / 255
    assert pixels.mean((0, 1, 2)) == pytest.approx(STATISTICS["digits"][0], abs=1e-4)
    assert pixels.std((0, 1, 2)) == pytest.approx(STATISTICS["digits"][1], abs=1e-4)


def test_digits_are_scikit_learns_enlarged():
    """To the bit as Pillow enlarges them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    loaded, source = load(Recipe.build("digits")), load_digits()
    for split in (loaded.train, loaded.evaluation):
        assert np.array_equal(split.labels, source.target[split.indices])
        grey = [Image.fromarray(np.float32(image * 255 / 16)) for image in source.images[split.indices]]
        large = np.rint([np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)) for image in grey])
        assert np.array_equal(split.images, np.repeat(large[..., None], 3, axis=3))


@pytest.mark.parametrize("count", [10, 95, 300, 999, 1000])
def test_stratified_takes_each_class_in_proportion(count):
    labels = np.random.default_rng(1).choice(5, 1000, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    taken = stratified(labels, count, seed=3)
    assert len(set(taken)) == count
    shares = np.bincount(labels) * count / 1000
    assert np.abs(np.bincount(labels[taken], minlength=5) - shares).max() <= 1
    assert set(stratified(labels, count // 2, seed=3)) < set(taken)


def test_stratified_leaves_no_class_out():
    labels = np.repeat([0, 1, 2], [900, 98, 2])
    assert set(labels[stratified(labels, 100, seed=0)]) == {0, 1, 2}


def test_the_holdout_is_disjoint_and_the_same_for_every_seed():
    a, b = (load(Recipe.build("digits", holdout=200, seed=seed)) for seed in (0, 1))
    assert a.evaluated_on == "holdout"
    assert (len(a.train), len(a.evaluation)) == (1237, 200)
    assert set(a.train.indices).isdisjoint(a.evaluation.indices)
    assert np.array_equal(a.evaluation.indices, b.evaluation.indices)
    assert set(a.train.indices) | set(a.evaluation.indices) == set(load(Recipe.build("digits")).train.indices)


def test_a_holdout_leaves_every_class_an_image_to_train_on(own_images, tmp_path):
    (own_images / "train" / "birds").mkdir()
    shutil.copy(own_images / "train" / "cats" / "0.png", own_images / "train" / "birds")
    shutil.copytree(own_images / "train" / "birds", own_images / "test" / "birds")
    said = []
    for holdout in (3, 6, 10):
        loaded = load(Recipe.build(dataset=str(own_images), batch_size=1, holdout=holdout), notify=said.append)
        assert np.bincount(loaded.train.labels).tolist()[0] == 1
        assert np.bincount(loaded.train.labels).min() >= 1
        assert len(loaded.evaluation) == holdout
    assert said == [
        f"a single training image in birds: training keeps it, and --holdout {each} has none of these" for each in (3, 6, 10)
    ]
    with pytest.raises(UsageError, match="--holdout 11 does not fit: it takes 3 to 10 images here"):
        load(Recipe.build(dataset=str(own_images), batch_size=1, holdout=11), notify=silent)
    for image in [*own_images.glob("train/*/[1-9].png")]:
        image.unlink()
    with pytest.raises(UsageError, match="--holdout 3 does not fit: of 3 classes there are too few images"):
        load(Recipe.build(dataset=str(own_images), batch_size=1, holdout=3), notify=silent)


def test_samples_of_a_holdout_that_leaves_a_class_one_image_are_drawn(own_images):
    figure = samples(Recipe.build(dataset=str(own_images), holdout=10), views=1)
    assert len(figure.axes) >= 3


@pytest.mark.parametrize("count", [10, 300, 900])
def test_keeping_one_image_of_each_class_changes_no_selection_that_kept_one_anyway(count):
    labels = np.random.default_rng(1).choice(5, 1000, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    assert np.array_equal(stratified(labels, count, seed=3), stratified(labels, count, seed=3, keep_one=True))


@pytest.mark.parametrize(
    "fields",
    [
        dict(holdout=1437),
        dict(holdout=3),
        dict(train_limit=5),
        dict(train_limit=2000),
        dict(test_limit=361),
    ],
    ids=str,
)
def test_what_does_not_fit_the_split_is_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}"):
        load(Recipe.build("digits", **fields))


@pytest.fixture
def own_images(tmp_path):
    """A folder of one's own: 12 training images and 4 for the test, of two classes, 32x32 PNGs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name in ("cats", "dogs"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pets"


def test_a_folder_of_ones_own_gives_its_images_classes_and_statistics(own_images, tmp_path):
    from PIL import Image

    recipe = Recipe.build(dataset=str(own_images), batch_size=4)
    loaded = load(recipe)
    assert loaded.classes == ("cats", "dogs")
    assert loaded.train.labels.tolist() == [0] * 6 + [1] * 6
    assert loaded.evaluation.labels.tolist() == [0, 0, 1, 1]
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(own_images.glob("train/*/*.png"))])
    assert np.array_equal(loaded.train.images, pixels)
    names = [path.relative_to(own_images / "train").as_posix() for path in sorted(own_images.glob("train/*/*.png"))]
    assert loaded.train.names.tolist() == names
    assert loaded.train.take(np.array([7, 2])).names.tolist() == ["dogs/1.png", "cats/2.png"]
    assert loaded.train.take(np.array([7, 2])).folder == own_images / "train"
    filled = with_statistics(recipe, loaded.train)
    assert filled.mean == pytest.approx(pixels.mean((0, 1, 2)) / 255, abs=1e-4)
    assert filled.std == pytest.approx(pixels.std((0, 1, 2)) / 255, abs=1e-4)
    assert with_statistics(filled.replace(mean=(0.5, 0.5, 0.5)), loaded.train).mean == (0.5, 0.5, 0.5)

    shutil.move(own_images, tmp_path / "elsewhere" / "pets")
    with pytest.raises(UsageError, match="the folder that holds it with --data-dir"):
        load(recipe)
    with pytest.raises(UsageError, match=re.escape(f"no folder {own_images} or {tmp_path / own_images.name};")):
        load(recipe, tmp_path)
    assert np.array_equal(load(recipe, tmp_path / "elsewhere").train.images, pixels)


def test_statistics_of_a_folder_are_those_of_all_its_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2500, 32, 32, 3), dtype=np.uint8)
    images[..., 1] //= 2
    images[..., 2] = 7
    recipe = with_statistics(Recipe.model_construct(**{**dict(Recipe()), "dataset": "/a/folder"}), Split(images, np.zeros(2500, int), np.arange(2500)))
    pixels = images.reshape(-1, 3) / 255
    assert recipe.mean == pytest.approx(pixels.mean(0), abs=1e-4)
    assert recipe.std == pytest.approx([*pixels.std(0)[:2], 0.01], abs=1e-4)
