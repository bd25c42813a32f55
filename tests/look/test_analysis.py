import json
import unicodedata

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from cifar_resnet import Recipe, build_model
from cifar_resnet.data.splits import Split
from cifar_resnet.errors import UsageError
from cifar_resnet.look import analysis

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
    model = build_model(Recipe(width=8)).eval()
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
    with pytest.raises(UsageError, match=r"--predicted cats: no such class; did you mean cat\? There are ant, bee"):
        chosen(predicted="cats")


def test_a_class_is_found_in_both_spellings_of_an_accent():
    """A folder that the Finder made has the letter and its accent apart; what is typed has them in one."""
    apart = unicodedata.normalize("NFD", "Bär")
    wrong = [analysis.Mistake(0, 0, apart, "ant", 0.9, {})]
    assert analysis.choose(wrong, ("ant", apart), true="Bär") == wrong
    assert analysis.choose(wrong, ("ant", apart, "Bär"), true="Bär") == []  # which is a class of its own


def test_of_many_classes_the_first_are_named():
    with pytest.raises(UsageError, match="there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 90 more$"):
        analysis.choose([], [str(i) for i in range(100)], true="cow")


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


def test_the_most_probable_classes_come_first():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 3.5]])
    expected = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    first, second = analysis.most_probable(logits, CLASSES, 2)
    assert [each["class"] for each in first] == ["bee", "cat"]
    assert [each["probability"] for each in second] == pytest.approx([expected[1, 3], expected[1, 0]], rel=1e-6)
    assert [each["class"] for each in analysis.most_probable(logits, CLASSES, 99)[0]] == ["bee", "cat", "ant", "dog"]


def test_pixels_undo_the_normalisation():
    recipe = Recipe(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    normalised = torch.from_numpy(((images / 255 - recipe.mean) / recipe.std).astype(np.float32)).permute(0, 3, 1, 2)
    assert np.array_equal(analysis.pixels(normalised, recipe), images)


# What `summary` shows


def test_the_summary_has_the_layers_and_their_totals(cli):
    """The default's size is known: 6,573,130 parameters, 0.379 G multiply-adds an image."""
    code, out, _ = cli("summary", "--json")
    assert code == 0
    content = json.loads(out)
    assert (content["recipe"], content["batch_size"]) == ("default", 512)
    layers, totals = content["layers"], content["totals"]
    assert totals["parameters"] == sum(layer["parameters"] for layer in layers) == 6_573_130
    assert totals["multiply_adds"] == sum(layer["multiply_adds"] for layer in layers)
    assert totals["multiply_adds"] == 512 * totals["multiply_adds_per_image"]
    assert round(totals["multiply_adds_per_image"] / 1e9, 3) == 0.379
    assert totals["receptive_field"] == layers[-1]["receptive_field"]
    assert [layer["layer"] for layer in layers][:2] == ["prep.0", "prep.1"]
    assert layers[-1]["layer"] == "fc"


def test_the_summary_of_a_run_on_ones_own_images_counts_their_classes(tmp_path, cli):
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
    (tmp_path / "recipe.json").write_text(Recipe.build(dataset=str(tmp_path / "images"), split=0.5, width=4, batch_size=16).to_json())
    code, out, _ = cli("summary", "--recipe-file", tmp_path / "recipe.json", "--json")
    assert code == 0
    assert json.loads(out)["layers"][-1]["output"] == [3]
    for name in ("a", "b", "c", ""):  # until the folder is empty, and then gone
        (tmp_path / "images" / name).rmdir()
        if name in ("c", ""):
            code, out, _ = cli("summary", "--recipe-file", tmp_path / "recipe.json", "--json")
            assert (code, json.loads(out)["layers"][-1]["output"]) == (0, [10])


@pytest.mark.parametrize(
    "options", [dict(recipe="eva6-s9", batch_size=3), dict(width=4, batch_size=7), dict(recipe="page", batch_size=1)]
)
def test_the_totals_are_torchinfos(options):
    import torchinfo

    recipe = Recipe.build(**options)
    totals = analysis.summary(recipe)["totals"]
    images = torch.zeros(recipe.batch_size, 3, 32, 32)
    found = torchinfo.summary(build_model(recipe), input_data=images, verbose=0)
    assert (totals["parameters"], totals["multiply_adds"]) == (found.total_params, found.total_mult_adds)
    assert totals["multiply_adds_per_image"] * recipe.batch_size == totals["multiply_adds"]


def test_of_many_classes_a_mistake_has_the_most_probable_and_the_true_one():
    classes = tuple(f"c{i}" for i in range(1000))
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    labels = logits.argmin(1)
    for found in analysis.mistakes(logits, labels, Split(None, None, np.arange(3)), classes):
        every = logits[found.position].double().softmax(0).numpy()
        largest = [*np.argsort(-every)[:10], labels[found.position]]
        assert found.probabilities == pytest.approx({classes[i]: every[i] for i in largest})
        assert found.probabilities[found.predicted] == found.confidence


def test_images_are_counted_in_whole_numbers_where_none_is_right():
    """scikit-learn then counts in floating-point numbers."""
    found = analysis.report(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]), ("a", "b"))
    assert [repr(row["count"]) for row in found["classes"].values()] == ["1", "1"]


def test_the_report_of_a_thousand_classes():
    """Five thousand images, a class without any, against counting them one by one."""
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 999, (2, 5000))
    guesses[:3000] = labels[:3000]
    logits = torch.nn.functional.one_hot(torch.from_numpy(guesses), 1000).float()
    found = analysis.report(logits, torch.from_numpy(labels), tuple(f"class {i}" for i in range(1000)))
    counted = np.zeros((1000, 1000), int)
    for label, guess in zip(labels, guesses, strict=True):
        counted[label, guess] += 1
    assert found["confusion_matrix"] == counted.tolist()
    assert found["accuracy"] == pytest.approx(100 * counted.trace() / 5000)
    assert (found["classes"]["class 999"]["count"], len(found["most_confused"])) == (0, 10)
    np.fill_diagonal(counted, 0)
    assert [row["count"] for row in found["most_confused"]] == sorted(counted.ravel().tolist(), reverse=True)[:10]


def test_labels_are_ranked_by_how_little_they_are_believed():
    generator = torch.Generator().manual_seed(0)
    logits, given = 2 * torch.randn(60, 4, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    expected = {}
    for i, (row, label) in enumerate(zip((logits.double() / 0.7).softmax(1).tolist(), given.tolist(), strict=True)):
        others = [(probability, c) for c, probability in enumerate(row) if c != label]
        expected[100 + i] = (row[label], CLASSES[label], CLASSES[max(others)[1]])
    names = np.array([f"{CLASSES[label]}/{i}.png" for i, label in enumerate(given)])
    split = Split(np.zeros((60, 32, 32, 3), np.uint8), given.numpy(), np.arange(100, 160), names)
    rows = analysis.ranked_labels(logits, given, split, CLASSES, temperature=0.7)
    assert [row["index"] for row in rows] == sorted(expected, key=lambda index: expected[index][0])
    for row in rows:
        assert (row["score"], row["given"], row["suggested"]) == (pytest.approx(expected[row["index"]][0]), *expected[row["index"]][1:])
        assert row["name"] == names[row["index"] - 100]


def test_the_score_is_cleanlabs():
    rank = pytest.importorskip("cleanlab.rank", reason="cleanlab is not installed")
    generator = torch.Generator().manual_seed(1)
    logits, given = torch.randn(200, 5, generator=generator), torch.randint(0, 5, (200,), generator=generator)
    expected = rank.get_self_confidence_for_each_label(given.numpy(), logits.double().softmax(1).numpy())
    split = Split(np.zeros((200, 32, 32, 3), np.uint8), given.numpy(), np.arange(200))
    rows = analysis.ranked_labels(logits, given, split, tuple("abcde"))
    assert [row["score"] for row in sorted(rows, key=lambda row: row["index"])] == pytest.approx(expected.tolist())
