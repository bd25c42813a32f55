import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from cifar_resnet import Recipe, analysis, build_model, figures
from cifar_resnet.data import Split
from cifar_resnet.errors import UsageError

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def scored():
    """Logits and labels of 300 images, right about half of the time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=generator)
    logits = torch.randn(300, 4, generator=generator)
    logits[torch.arange(300), labels] += 1
    return logits, labels


def test_the_report_is_scikit_learns(scored):
    logits, labels = scored
    report = analysis.report(logits, labels, CLASSES)
    predicted = logits.argmax(1)
    expected = precision_recall_fscore_support(labels, predicted)
    for i, name in enumerate(CLASSES):
        row = report["classes"][name]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([100 * kind[i] for kind in expected[:3]])
        assert row["count"] == expected[3][i]
    assert report["confusion_matrix"] == confusion_matrix(labels, predicted).tolist()
    largest = sorted(
        ((expected, i, j) for (i, j), expected in np.ndenumerate(report["confusion_matrix"]) if i != j), reverse=True
    )
    assert [row["count"] for row in report["most_confused"]] == [count for count, _, _ in largest[:10] if count]
    for row in report["most_confused"]:
        i, j = CLASSES.index(row["true"]), CLASSES.index(row["predicted"])
        assert row["count"] == report["confusion_matrix"][i][j]
        assert row["share"] == pytest.approx(100 * row["count"] / (labels == i).sum().item())
    assert report["accuracy"] == pytest.approx(100 * (predicted == labels).float().mean().item())
    assert report["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_calibration_error_against_the_obvious_way(scored):
    logits, labels = scored
    probabilities = logits.softmax(1).numpy()
    total = 0.0
    for low in np.arange(15) / 15:
        members = [i for i in range(300) if low < probabilities[i].max() <= low + 1 / 15]
        if members:
            confidence = np.mean([probabilities[i].max() for i in members])
            accuracy = np.mean([probabilities[i].argmax() == labels[i].item() for i in members])
            total += len(members) / 300 * abs(accuracy - confidence)
    bins = analysis.reliability(logits, labels)
    assert analysis.calibration_error(bins) == pytest.approx(100 * total, abs=1e-4)
    assert sum(row["count"] for row in bins) == 300
    assert all((row["accuracy"] is None) == (row["count"] == 0) for row in bins)


def test_mistakes_are_all_the_wrong_ones_surest_first(scored):
    logits, labels = scored
    indices = np.arange(300) * 7
    wrong = analysis.mistakes(logits, labels, Split(np.zeros((300, 32, 32, 3), np.uint8), labels.numpy(), indices), CLASSES)
    assert {mistake.position for mistake in wrong} == set(np.flatnonzero(logits.argmax(1) != labels))
    confidences = [mistake.confidence for mistake in wrong]
    assert confidences == sorted(confidences, reverse=True)
    for mistake in wrong:
        assert mistake.index == 7 * mistake.position
        assert mistake.true == CLASSES[labels[mistake.position]]
        assert mistake.predicted == max(mistake.probabilities, key=mistake.probabilities.get)
        assert mistake.confidence == max(mistake.probabilities.values())
        assert sum(mistake.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize(("layer", "side"), [("layer1", 16), ("layer2", 8)])
def test_grad_cam_is_its_formula(layer, side):
    """Weights are the mean gradient of the logit over the positions of the layer, as in the paper."""
    model = build_model(Recipe()).eval()
    generator = torch.Generator().manual_seed(2)
    images, classes = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)
    kept = []
    handle = getattr(model, layer).register_forward_hook(lambda _module, _input, output: kept.append(output))
    logits = model.logits(images)
    handle.remove()
    gradient = torch.autograd.grad(logits[torch.arange(8), classes].sum(), kept[0])[0]
    maps = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu()
    assert maps.shape == (8, side, side)
    assert maps.amax((1, 2)).count_nonzero() >= 2  # where no attribution is positive, the map is 0
    maps = torch.nn.functional.interpolate(maps[:, None], (32, 32), mode="bilinear")[:, 0].detach()
    expected = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
    np.testing.assert_allclose(analysis.grad_cam(model, images, classes, layer), expected, atol=1e-4)


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
    test = figures.curves(history, Recipe(), "test").axes[1]
    assert test.lines[-1].get_ydata()[0] == 91.97  # the figure to beat stands only beside test figures


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


def test_the_reliability_diagram_shows_its_bins(scored):
    bins = analysis.reliability(*scored)
    above, below = figures.reliability(bins, 1.234, 0.5, "title").axes
    assert [bar.get_height() for bar in above.patches] == [row["accuracy"] or 0 for row in bins]
    assert [bar.get_height() for bar in below.patches] == [row["count"] for row in bins]
    points = above.lines[0]
    assert points.get_xdata().tolist() == [row["confidence"] for row in bins if row["count"]]
    assert above.get_title().endswith("\nexpected calibration error 1.23 %, negative log likelihood 0.5000")


def test_the_grids_name_predicted_and_true_class():
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    shown = [analysis.Mistake(i, i, "cat", "dog", 0.9 - i / 100, {"cat": 0.1, "dog": 0.9 - i / 100}) for i in range(7)]
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


def test_mistakes_are_chosen_by_class_and_order():
    pairs = [("cat", "dog", 0.9), ("bee", "dog", 0.8), ("cat", "bee", 0.7), ("ant", "dog", 0.6), ("cat", "dog", 0.5)]
    wrong = [analysis.Mistake(i, i, true, predicted, sure, {}) for i, (true, predicted, sure) in enumerate(pairs)]

    def chosen(**options):
        return [mistake.index for mistake in analysis.choose(wrong, CLASSES, **options)]

    assert chosen() == [0, 1, 2, 3, 4]
    assert chosen(true="cat", predicted="dog") == [0, 4]
    assert chosen(predicted="bee") == [2]
    assert chosen(sort="class") == [3, 1, 2, 0, 4]
    assert sorted(chosen(sort="random")) == [0, 1, 2, 3, 4]
    assert chosen(sort="random") == chosen(sort="random")
    with pytest.raises(UsageError, match="--true cow: no such class; there are ant, bee"):
        chosen(true="cow")


def test_the_views_are_the_image_its_mirror_image_and_shifts():
    images = torch.arange(2 * 3 * 32 * 32.0).reshape(2, 3, 32, 32)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    flipped = np.pad(images.numpy()[..., ::-1], ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    expected = [(0.25, padded[..., 1:33, 1:33]), (0.25, flipped[..., 1:33, 1:33])]
    expected += [(0.125, source[..., start : start + 32, start : start + 32]) for source in (padded, flipped) for start in (0, 2)]
    found = [(weight, view(images).numpy()) for weight, view in analysis.views("flip-shift")]
    for (weight, view), (wanted, array) in zip(found, expected, strict=True):
        assert weight == wanted
        np.testing.assert_array_equal(view, array)
    assert [weight for weight, _ in analysis.views("flip")] == [0.5, 0.5]
