import html
import io
import re
import threading
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from cifar_resnet import Recipe
from cifar_resnet.look import figures, rendering
from cifar_resnet.look.analysis import reliability
from cifar_resnet.training.engine import rates_at
from cifar_resnet.training.lr_finder import History, Trial, suggest

CLASSES = ("ant", "bee", "cat", "dog")


def test_the_confusion_matrix_shows_its_counts():
    matrix = [[5, 1, 0, 0], [0, 4, 2, 0], [0, 0, 7, 0], [3, 0, 0, 3]]
    axis = figures.confusion_matrix(matrix, CLASSES, "title").axes[0]
    shown = {tuple(map(int, text.get_position())): text.get_text() for text in axis.texts}
    for row, counts in enumerate(matrix):
        for column, count in enumerate(counts):
            text = f"{count}\n{100 * count / sum(counts):.1f} %"
            assert shown.get((column, row)) == (text if count else None)
    assert [label.get_text() for label in axis.get_xticklabels()] == list(CLASSES)
    colours = axis.images[0].get_array()[..., :3]
    assert all(blue > red for red, _, blue in colours[range(4), range(4)])
    assert all(red > blue for red, _, blue in colours[[0, 1, 3], [1, 2, 0]])
    assert (colours[0, 2] == 1).all()


@pytest.mark.parametrize("count", [60, 400])
def test_pictures_of_many_classes_stay_small(count):
    classes = {f"class {i}": {"recall": i / 5, "count": 9} for i in range(count)}
    matrix = figures.confusion_matrix(np.eye(count, dtype=int), list(classes), "title")
    accuracy = figures.class_accuracy(classes, "title")
    for figure in (matrix, accuracy):
        axis = figure.axes[0]
        assert max(figure.get_size_inches()) <= 12
        assert len(axis.get_yticklabels()) <= 30
        assert len(axis.texts) <= 30
    labels = [label.get_text() for label in matrix.axes[0].get_yticklabels()]
    assert labels == list(classes)[:: count // 30 + (count % 30 > 0)]
    assert [label.get_text() for label in accuracy.axes[0].get_yticklabels()] == [f"class {i}" for i in range(29, -1, -1)]
    assert f"the 30 worst of {count} classes" in accuracy.axes[0].get_title()


@pytest.mark.parametrize("count", [2, 15, 16, 20, 30, 31, 200])
def test_names_in_a_chart_of_a_page_lie_beside_each_other(count):
    classes = {f"class {i}": {"recall": i / 5, "count": 9} for i in range(count)}
    size = (4.6, 3.8)
    for figure in (
        figures.confusion_matrix(np.eye(count, dtype=int), list(classes), "", size),
        figures.class_accuracy(classes, "", size),
    ):
        figure.draw_without_rendering()
        heights = sorted(label.get_window_extent().y0 for label in figure.axes[0].get_yticklabels())
        letters = figure.axes[0].get_yticklabels()[0].get_fontsize() * figure.dpi / 72
        assert min(np.diff(heights), default=letters) >= letters


def test_curves_show_the_history():
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    history = [{"epoch": epoch, **{key: float(10 * i + epoch) for i, key in enumerate(keys)}} for epoch in (1, 2, 3)]
    figure = figures.curves(history, Recipe(), "holdout")
    assert figure.get_suptitle() == "default on cifar10, seed 0 after epoch 3 of 24: 33.00 % holdout accuracy"
    left, right = figure.axes
    lines = [line.get_ydata().tolist() for axis in (left, right) for line in axis.lines]
    assert lines == [[row[key] for row in history] for key in keys]
    assert "holdout" in left.get_legend().get_texts()[1].get_text()


@pytest.mark.parametrize("epochs", [1, 2, 24])
def test_epochs_are_whole_numbers(epochs):
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    history = [{"epoch": epoch + 1, **dict.fromkeys(keys, 50.0)} for epoch in range(epochs)]
    group = dict(label="a", mean=50.0, std=None, n=1, runs=[{"test_accuracy": [50.0] * epochs}])
    for figure in (figures.curves(history, Recipe(), "test"), figures.comparison([group], "test")):
        figure.canvas.draw()
        for axis in figure.axes:
            ticks = [tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
            assert ticks
            assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("first", [2.4, 40.0])
def test_the_first_epoch_does_not_rule_the_axis(first):
    """One that lies far from all others is a note; one that does not stays."""
    losses = [first, 2.0, 1.5, 1.2, 1.0]
    history = [
        {"epoch": i + 1, "train_loss": loss, "test_loss": loss, "train_accuracy": 100 - loss, "test_accuracy": 100 - loss}
        for i, loss in enumerate(losses)
    ]
    for axis, inside in zip(figures.curves(history, Recipe()).axes, ([1.0, 2.0], [98.0, 99.0]), strict=True):
        low, high = axis.get_ylim()
        assert low < inside[0] < inside[1] < high
        assert (high - low < 2) or first < 3
        notes = [text.get_text().strip() for text in axis.texts]
        value = first if axis.get_title() == "Loss" else 100 - first
        assert notes == ([] if first < 3 else [f"epoch 1: {value:.3g}, {value:.3g}"])


def test_the_accuracy_curve_has_a_line_only_where_a_target_is_given():
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    history = [{"epoch": epoch, **dict.fromkeys(keys, 10.0 * epoch)} for epoch in (1, 2)]
    for evaluated_on in ("test", "holdout"):
        for axis in figures.curves(history, Recipe(), evaluated_on).axes:
            assert len(axis.lines) == 2
            assert [text.get_text().split(" ")[0] for text in axis.get_legend().get_texts()] == ["train", evaluated_on]
    left, right = figures.curves(history, Recipe(), "test", 93.5).axes
    assert len(left.lines) == 2
    assert list(right.lines[2].get_ydata()) == [93.5, 93.5]
    assert right.get_legend().get_texts()[2].get_text() == "target, 93.5 %"


@pytest.mark.parametrize(("fields", "steps"), [({}, 98), ({"peak_epoch": 4.987}, 98), ({"epochs": 1, "peak_epoch": 0.5}, 1)])
def test_the_learning_rate_is_drawn_as_trained(fields, steps):
    """Of a long run not every step is drawn, but the first, the last and the highest one are."""
    recipe = Recipe(**fields)
    line, total = figures.learning_rate(recipe, steps).axes[0].lines[0], recipe.epochs * steps
    trained = [rates_at(recipe, step, total).lr for step in range(total)]
    drawn = dict(zip(np.round(line.get_xdata() * steps).astype(int) - 1, line.get_ydata(), strict=True))
    assert drawn == {step: trained[step] for step in drawn}
    assert {0, total - 1, int(np.argmax(trained))} <= set(drawn)


def test_the_learning_rate_of_the_longest_run_is_drawn_at_once():
    line = figures.learning_rate(Recipe(epochs=1_000_000, peak_epoch=250_000), 50_000).axes[0].lines[0]
    assert len(line.get_xdata()) < 2000
    assert line.get_xdata()[np.argmax(line.get_ydata())] == pytest.approx(250_000)


def test_accuracy_by_class_is_drawn_as_reported():
    """Classes of which no image was judged are left out."""
    classes = {name: {"recall": recall, "count": 9} for name, recall in (("ant", 75.0), ("bee", 50.5), ("cat", 100.0))}
    axis = figures.class_accuracy({**classes, "dog": {"recall": 0.0, "count": 0}}, "title").axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert dict(zip(names, [bar.get_width() for bar in axis.patches], strict=True)) == {
        name: row["recall"] for name, row in classes.items()
    }
    assert names[-1] == "bee"  # the last bar is the topmost


def test_the_reliability_diagram_shows_its_bins():
    generator = torch.Generator().manual_seed(0)
    bins = reliability(torch.randn(300, 4, generator=generator), torch.randint(0, 4, (300,), generator=generator))
    above, below = figures.reliability(dict(reliability=bins, calibration_error=1.234, loss=0.5), "title").axes
    assert [bar.get_height() for bar in above.patches] == [row["accuracy"] or 0 for row in bins]
    assert [bar.get_height() for bar in below.patches] == [row["count"] for row in bins]
    points = above.lines[0]
    assert points.get_xdata().tolist() == [row["confidence"] for row in bins if row["count"]]
    assert above.get_title().endswith("\nexpected calibration error 1.23 %, negative log likelihood 0.5000")
    assert [bool(bar.get_hatch()) for bar in above.patches] == [row["count"] < 30 for row in bins]
    assert any(0 < row["count"] < 30 for row in bins)
    assert any(row["count"] >= 30 for row in bins)


def range_test():
    lr = np.geomspace(1e-4, 10, 200)
    history = History(lr, np.interp(np.log10(lr), [-4, -3, -1, 0, 1], [2, 2, 1, 1, 5]))
    trials = [Trial(0.1, 1.0), Trial(0.2, 0.9), Trial(0.4, np.inf)]
    return history, trials, suggest(history, trials)


def test_the_range_test_is_drawn_with_its_trials_and_suggestions():
    history, trials, found = range_test()
    (axis,) = figures.lr_finder(history, found, Recipe(), trials=trials).axes
    assert axis.get_xscale() == "log"
    lines = {line.get_label().split(":")[0]: line for line in axis.lines}
    assert lines["loss of each step"].get_ydata().tolist() == history.loss.tolist()
    ended = lines["where short trainings with this maximum ended"]  # not the one that diverged
    assert (ended.get_xdata().tolist(), ended.get_ydata().tolist()) == ([0.1, 0.2], [1.0, 0.9])
    for label, value in {"recommended": found.max_lr, "steepest": found.steepest, "valley": found.valley}.items():
        assert lines[label].get_xdata()[0] == value
    (band,) = axis.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((found.min_lr, found.max_lr))
    nothing = found._replace(max_lr=None, min_lr=None, why_not="never fell")
    (axis,) = figures.lr_finder(history, nothing, Recipe(), "linear").axes
    assert axis.get_xscale() == "linear"
    assert not axis.patches
    assert not any("recommended" in line.get_label() for line in axis.lines)


@pytest.mark.filterwarnings("error")
def test_a_sweep_whose_trainings_all_diverged_says_so():
    history = History(np.geomspace(1e-4, 1, 30), np.linspace(2, 2.1, 30))
    sweep = [dict(rule="grid", max_lr=lr, accuracy=None, epochs=1) for lr in (0.1, 0.2)]
    _, below = figures.lr_finder(history, suggest(history), Recipe(), sweep=sweep).axes
    assert below.get_title() == "Every training of 1 epoch diverged"
    assert below.get_legend() is None


def test_a_sweep_is_drawn_below_the_range_test():
    history, trials, found = range_test()
    rows = [("grid", 0.1, 80.0), ("grid", 0.2, 90.0), ("grid", 0.4, None), ("steepest", 0.05, 70.0), ("recommended", 0.15, 91.0)]
    sweep = [dict(rule=rule, max_lr=lr, accuracy=accuracy, epochs=2) for rule, lr, accuracy in rows]
    above, below = figures.lr_finder(history, found, Recipe(), trials=trials, sweep=sweep).axes
    points = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in below.lines]
    assert points == [[(0.1, 80.0), (0.2, 90.0)], [(0.05, 70.0)], [(0.15, 91.0)]]
    assert below.get_title() == "Holdout accuracy after 2 epochs with this maximum"


def test_the_triangular_policy_goes_up_and_down_as_often_as_asked():
    line = figures.triangular(0.1, 0.5, 10, 2).axes[0].lines[0]
    assert line.get_ydata()[::10] == pytest.approx([0.1, 0.5, 0.1, 0.5, 0.1])
    assert len(line.get_xdata()) == 41


def test_groups_can_be_told_apart_in_the_legend():
    """They differ where a shortened name would lose its middle."""
    fields = ", ".join(f"a_field_of_the_recipe_{number} 0.5" for number in range(8))
    labels = [f"default: batch_size {size}, {fields}" for size in (50, 200)]
    groups = [dict(label=label, mean=1.0, std=None, n=1, runs=[{"test_accuracy": [1.0]}]) for label in labels]
    texts = [" ".join(text.get_text().split()) for text in figures.comparison(groups, "test").axes[0].get_legend().get_texts()]
    assert texts == [f"{label}: 1.00 %, n = 1" for label in labels]


NASTY = ["$\\frac$_$5_", "x" * 80]


def drawn_with(name):
    """Every picture that names a class or a recipe, with this name in all places."""
    classes = {name: {"recall": 50.0, "count": 9}, "plain": {"recall": 60.0, "count": 9}}
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    recipe, group = Recipe(recipe=name, dataset=f"/data/{name}"), {"label": name, "mean": 1.0, "std": None, "n": 1}
    history, trials, found = range_test()
    yield figures.confusion_matrix([[1, 2], [3, 4]], list(classes), name)
    yield figures.class_accuracy(classes, name)
    yield figures.curves([{"epoch": 1, **dict.fromkeys(keys, 1.0)}], recipe)
    yield figures.learning_rate(recipe, 2)
    yield figures.lr_finder(history, found, recipe, trials=trials)
    yield figures.comparison([{**group, "runs": [{"test_accuracy": [1.0]}]}], "test")


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_text_in_every_picture(name):
    """Matplotlib would read a formula in the first one, and fail when it draws."""
    for figure in drawn_with(name):
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            svg = rendering.render(figure, "svg").decode()
        assert name in svg or f"{name[:12]}…{name[:7]}" in svg
        shown = re.sub("<title>.*?</title>", "", svg)
        assert name not in shown or len(name) < 80


def test_values_show_on_hover():
    history = [{"epoch": i, "train_loss": 1.0, "test_loss": 0.5 / i} for i in (1, 2)]
    svg = rendering.render(figures.curve("loss", history, Recipe(), "holdout", (4, 3)), "svg").decode()
    assert re.findall("<title>(.*?)</title>", svg)[:4] == [
        "epoch 1: train loss 1.0000", "epoch 1: holdout loss 0.5000", "epoch 2: train loss 1.0000", "epoch 2: holdout loss 0.2500",
    ]  # fmt: skip
    small = figures.confusion_matrix([[5, 1], [0, 4]], ["<ant>", "bee"], "", (4, 3))
    titles = [html.unescape(title) for title in re.findall("<title>(.*?)</title>", rendering.render(small, "svg").decode())]
    assert "1 of <ant> predicted as bee: 16.7 %" in titles
    ElementTree.fromstring(rendering.render(small, "svg"))


def test_a_png_keeps_the_colours_of_its_lines():
    image = Image.open(io.BytesIO(rendering.render(figures.learning_rate(Recipe(), 2))))
    assert image.size == (7 * 220, 924)
    colours = {colour for _, colour in image.convert("RGB").getcolors()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (255, 255, 255)} <= colours


def test_the_style_of_a_page_is_its_own_and_goes_no_further():
    """A notebook's style does not show in it, and an svg that another thread draws meanwhile has no letters of the page."""
    drawn, history = [], [dict(epoch=1, train_loss=1.0, test_loss=2.0, train_accuracy=50.0, test_accuracy=40.0)]

    def picture():
        return rendering.render(figures.curves(history, Recipe()), "svg")

    with matplotlib.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        with rendering.page_style():
            other = threading.Thread(target=lambda: drawn.append(picture()))
            other.start()
            of_page = picture()
        other.join()
        assert dict(matplotlib.rcParams) == before
    assert b"<text" in of_page
    assert not re.search(rb"<text [^>]*fill: #ffffff", of_page)
    assert b"<text" not in drawn[0]


@pytest.mark.parametrize(("format", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_rendered_in_the_format_asked_for(format, begins):
    assert rendering.render(figures.learning_rate(Recipe(), 2), format).startswith(begins)
