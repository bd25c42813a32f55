import numpy as np
import pytest
from PIL import Image

from cifar_resnet import Recipe, samples


@pytest.mark.parametrize("loader", [("--loader", "tensor"), ("--loader", "albumentations", "--workers", 0)], ids=str)
def test_samples_are_drawn_by_the_loader_itself(loader, cli, tmp_path):
    options = ("--dataset", "digits", "--cutout-size", 12, "--views", 2, "--output", tmp_path / "s.png")
    assert cli("samples", *options, *loader)[0] == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def shown(figure, views):
    return np.array([axis.images[0].get_array() for axis in figure.axes]).reshape(-1, views + 1, 32, 32, 3)


@pytest.mark.parametrize("loader", ["tensor", "albumentations"])
def test_the_views_beside_an_image_are_of_that_image(loader):
    """Without crop, flip and cutout each view is the image itself."""
    recipe = Recipe.build("digits", pad=0, cutout_count=0, flip_probability=0.0)
    figure = samples(recipe, views=3, loader=loader, workers=0 if loader == "albumentations" else None)
    rows = shown(figure, 3)
    for view in (1, 2, 3):
        assert np.array_equal(rows[:, view], rows[:, 0])
    labels = [axis.get_ylabel() for axis in figure.axes[::4]]
    assert labels == [str(digit) for digit in range(10)]
    assert len({rows[i, 0].tobytes() for i in range(10)}) == 10


def test_the_views_are_those_of_training():
    """A mirror image in every second epoch, and a grey hole of the size asked for in each."""
    rows = shown(samples(Recipe.build(dataset="digits", recipe="default", pad=0, cutout_count=0), views=4), 4)
    for row in rows:
        plain = [np.array_equal(view, row[0]) for view in row[1:]]
        mirrored = [np.array_equal(view, row[0][:, ::-1]) for view in row[1:]]
        assert plain == [not each for each in mirrored] or np.array_equal(row[0], row[0][:, ::-1])
        assert plain[:2] == plain[2:] != plain[1:3] or all(plain)
    holes = dict(pad=0, flip_probability=0.0, cutout_size=6, cutout_fill=1.0)
    rows = shown(samples(Recipe.build("digits", **holes), views=2), 2)
    for row in rows:
        for view in row[1:]:
            where = (view != row[0]).any(-1).nonzero()
            assert all(places.max() - places.min() < 6 for places in where)
            assert (view[where] == 255).all()


def test_of_many_classes_the_first_thirty_are_drawn(tmp_path, no_figures):
    """Each class has a grey of its own."""
    for label in range(40):
        (tmp_path / f"{label:04}").mkdir()
        for i in range(2):
            Image.new("RGB", (32, 32), (label, 0, i)).save(tmp_path / f"{label:04}" / f"{i}.png")
    figure = samples(Recipe.build(dataset=str(tmp_path), split=0.5, pad=0, cutout_count=0, flip_probability=0.0), views=2)
    assert max(figure.get_size_inches()) < 30
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == [f"{label:04}" for label in range(30)]
    assert shown(figure, 2)[:, :, 0, 0, 0].tolist() == [[label] * 3 for label in range(30)]
    assert figure.get_suptitle().endswith("the first 30 of 40 classes")


def test_samples_of_a_folder_without_a_part_for_evaluation(own_images, tmp_path, cli, no_figures):
    options = ("--dataset", own_images / "train", "--split", 0.2, "--views", 1, "--output", tmp_path / "s.png")
    assert cli("samples", *options)[0] == 0


def test_wrong_usage_of_samples_is_refused(refused, tmp_path):
    assert "--views 0" in refused(2, "samples", "--dataset", tmp_path / "nowhere", "--views", 0)
    assert "must end in" in refused(2, "samples", "--dataset", "digits", "--output", tmp_path / "s.gif")
    assert list(tmp_path.iterdir()) == []
