import numpy as np
import pytest
from matplotlib.colors import to_rgb

from cifar_resnet.look import pictures, rendering
from cifar_resnet.look.analysis import Mistake


def mistakes(count, true="cat", predicted="dog"):
    return [Mistake(i, i, true, predicted, 0.9 - i / 100, {"cat": 0.1, "dog": 0.9 - i / 100, "emu": 0.05}) for i in range(count)]


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_the_grid_names_predicted_and_true_class_in_two_colours():
    figure = pictures.misclassified(images(7), [*mistakes(3), mistakes(1)[0]._replace(name="dir/3\udce9.png"), *mistakes(3)], "t")
    assert len(figure.axes) == 7
    axis = figure.axes[3]
    assert texts(axis) == ["dog, 90.0 %", "true: cat"]
    assert [text.get_color() for text in axis.texts] == [pictures.PREDICTED, pictures.TRUE]
    assert axis.get_xlabel() == r"dir/3\udce9.png"
    assert figure.axes[1].get_xlabel() == "image 1"
    assert np.array_equal(axis.images[0].get_array(), images(7)[3])


def test_grad_cam_shows_what_tells_the_classes_apart():
    """Left the image; right the colour of the class whose map is higher there, stronger the more it is."""
    predicted, true = np.zeros((3, 32, 32)), np.zeros((3, 32, 32))
    predicted[:, :16], true[:, 16:] = 1.0, 0.5
    figure = pictures.grad_cam(images(3), predicted, true, mistakes(3), "t")
    assert len(figure.axes) == 6
    plain, looked = figure.axes[2:4]
    assert texts(plain) == ["dog, 89.0 %", "true: cat"]
    assert np.array_equal(plain.images[0].get_array(), images(3)[1])
    tint = looked.images[1].get_array()
    assert np.allclose(tint[0, 0, :3], to_rgb(pictures.PREDICTED))
    assert np.allclose(tint[31, 0, :3], to_rgb(pictures.TRUE))
    assert tint[0, 0, 3] == 2 * tint[31, 0, 3] > 0
    same = pictures.grad_cam(images(1), predicted[:1], predicted[:1], mistakes(1), "t")
    assert (same.axes[1].images[1].get_array()[..., 3] == 0).all()
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert key[:2] == ["seen more for the class predicted", "more for the true class"]


def test_an_image_predicted_right_is_held_against_the_next_probable_class():
    (right,) = mistakes(1, "dog", "dog")
    assert (right.wrong, right.rival) == (False, "cat")
    assert texts(pictures.misclassified(images(1), [right], "t").axes[0]) == ["dog, 90.0 %", "right"]
    figure = pictures.grad_cam(images(1), np.zeros((1, 32, 32)), np.ones((1, 32, 32)), [right], "t")
    assert "second most probable" in figure.legends[0].get_texts()[1].get_text()


def test_a_doubted_label_is_not_called_true():
    """Neither above the image, nor in the key of Grad-CAM."""
    shown = mistakes(1)
    assert texts(pictures.misclassified(images(1), shown, "t", "label").axes[0]) == ["dog, 90.0 %", "label: cat"]
    figure = pictures.grad_cam(images(1), np.zeros((1, 32, 32)), np.ones((1, 32, 32)), shown, "t", "label")
    assert texts(figure.axes[0]) == ["dog, 90.0 %", "label: cat"]
    assert figure.legends[0].get_texts()[1].get_text() == "more for the label"


@pytest.mark.parametrize("count", [1, 25])
def test_the_grids_are_compact(count):
    """No more than a third of them is bare, and no two pictures overlap."""
    heat = np.zeros((count, 32, 32))
    many = (
        pictures.misclassified(images(count), mistakes(count), ""),
        pictures.grad_cam(images(count), heat, heat, mistakes(count), ""),
    )
    for figure in many:
        boxes = [axis.get_position() for axis in figure.axes]
        assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
        assert len({(round(box.x0, 4), round(box.y0, 4)) for box in boxes}) == len(boxes)
        assert sum(box.width * box.height for box in boxes) > (0.35 if count == 1 else 0.5)


def test_samples_are_framed():
    rows = images(6).reshape(2, 3, 32, 32, 3)
    figure = pictures.samples(rows[:, 0], rows[:, 1:], ["$a$", "x" * 80], "t")
    assert all(spine.get_visible() for axis in figure.axes for spine in axis.spines.values())
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == [r"\$a\$", "x" * 12 + "…" + "x" * 11]
    assert rendering.render(figure).startswith(b"\x89PNG")
