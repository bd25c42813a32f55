import numpy as np
import pytest
import torch

from cifar_resnet import Recipe
from cifar_resnet.errors import UsageError
from cifar_resnet.look import figures
from cifar_resnet.look.analysis import Mistake, reliability
from cifar_resnet.training.lr_finder import History, Trial, suggest

CLASSES = ("ant", "bee", "cat", "dog")


def test_the_confusion_matrix_shows_its_counts():
    matrix = [[5, 1, 0, 0], [0, 4, 2, 0], [0, 0, 7, 0], [3, 0, 0, 3]]
    axis = figures.confusion_matrix(matrix, CLASSES, "title").axes[0]
    shown = {tuple(map(int, text.get_position())): text.get_text() for text in axis.texts}
    for row in range(4):
        for column in range(4):
            assert shown[column, row] == (str(matrix[row][column]) if matrix[row][column] else "")
    assert [label.get_text() for label in axis.get_xticklabels()] == list(CLASSES)


def test_curves_show_the_history():
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    history = [{"epoch": epoch, **{key: float(10 * i + epoch) for i, key in enumerate(keys)}} for epoch in (1, 2, 3)]
    left, right = figures.curves(history, Recipe(), "holdout").axes
    lines = [line.get_ydata().tolist() for axis in (left, right) for line in axis.lines]
    assert lines == [[row[key] for row in history] for key in keys]
    assert "holdout" in left.get_legend().get_texts()[1].get_text()


@pytest.mark.parametrize("stacked", [False, True])
def test_the_accuracy_curve_has_a_line_only_where_a_target_is_given(stacked):
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    history = [{"epoch": epoch, **dict.fromkeys(keys, 10.0 * epoch)} for epoch in (1, 2)]
    for evaluated_on in ("test", "holdout"):
        for axis in figures.curves(history, Recipe(), evaluated_on, stacked=stacked).axes:
            assert len(axis.lines) == 2
            assert [text.get_text().split(" ")[0] for text in axis.get_legend().get_texts()] == ["train", evaluated_on]
    left, right = figures.curves(history, Recipe(), "test", 93.5, stacked=stacked).axes
    assert len(left.lines) == 2
    assert list(right.lines[2].get_ydata()) == [93.5, 93.5]
    assert right.get_legend().get_texts()[2].get_text() == "target, 93.5 %"


def test_the_learning_rate_is_drawn_as_trained():
    line = figures.learning_rate(Recipe(), 98).axes[0].lines[0]
    assert len(line.get_ydata()) == 24 * 98
    assert max(line.get_ydata()) == Recipe().max_lr
    assert line.get_xdata()[np.argmax(line.get_ydata())] == 5


def test_accuracy_by_class_is_drawn_as_reported():
    classes = {"ant": {"recall": 75.0}, "bee": {"recall": 50.5}, "cat": {"recall": 100.0}}
    axis = figures.class_accuracy(classes, "title").axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert dict(zip(names, [bar.get_width() for bar in axis.patches], strict=True)) == {
        name: row["recall"] for name, row in classes.items()
    }
    assert names[-1] == "bee"  # the last bar is the topmost


def test_the_reliability_diagram_shows_its_bins():
    generator = torch.Generator().manual_seed(0)
    bins = reliability(torch.randn(300, 4, generator=generator), torch.randint(0, 4, (300,), generator=generator))
    above, below = figures.reliability(bins, 1.234, 0.5, "title").axes
    assert [bar.get_height() for bar in above.patches] == [row["accuracy"] or 0 for row in bins]
    assert [bar.get_height() for bar in below.patches] == [row["count"] for row in bins]
    points = above.lines[0]
    assert points.get_xdata().tolist() == [row["confidence"] for row in bins if row["count"]]
    assert above.get_title().endswith("\nexpected calibration error 1.23 %, negative log likelihood 0.5000")


def test_the_grids_name_predicted_and_true_class():
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    shown = [Mistake(i, i, "cat", "dog", 0.9 - i / 100, {"cat": 0.1, "dog": 0.9 - i / 100}) for i in range(7)]
    used = [axis for axis in figures.misclassified(images, shown, "t").axes if axis.images]
    assert len(used) == 7
    assert used[3].get_title() == "dog, 87 %\ntrue: cat"
    assert np.array_equal(used[3].images[0].get_array(), images[3])
    of_predicted, of_true = np.full((7, 32, 32), 0.25), np.full((7, 32, 32), 0.75)
    used = [axis for axis in figures.grad_cam(images, of_predicted, of_true, shown, "t").axes if axis.images]
    assert len(used) == 7
    assert [text.get_text() for text in used[3].texts] == ["predicted: dog\n87.0 %", "true: cat\n10.0 %"]
    pictures = [picture.get_array() for picture in used[3].images]
    assert [np.array_equal(pictures[i], images[3]) for i in (0, 1, 3)] == [True] * 3
    assert (pictures[2].max(), pictures[4].max()) == (0.25, 0.75)


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


def test_a_name_with_dollars_is_no_mathematics():
    """Class names are folders' names; Matplotlib would fail on this one when it draws."""
    names = ["$\\frac$", "plain"]
    drawn = figures.confusion_matrix([[1, 2], [3, 4]], names, "title")
    figures.render(drawn)
    mistake = Mistake(0, 0, names[0], names[0], 0.9, {names[0]: 0.9})
    image = np.zeros((1, 32, 32, 3), np.uint8)
    figures.render(figures.misclassified(image, [mistake], "title"))
    figures.render(figures.grad_cam(image, np.zeros((1, 32, 32)), np.zeros((1, 32, 32)), [mistake], "title"))
    figures.render(figures.class_accuracy({names[0]: {"recall": 50.0}}, "title"))


@pytest.mark.parametrize(("format", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_rendered_in_the_format_asked_for(format, begins):
    assert figures.render(figures.learning_rate(Recipe(), 2), format).startswith(begins)
    figures.check_format(format)
    with pytest.raises(UsageError, match="--format gif: it is png, svg, pdf"):
        figures.check_format("gif")
