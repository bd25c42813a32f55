import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cifar_resnet import CifarResnetError, Recipe, load_checkpoint, train, training_labels
from cifar_resnet.data.datasets import load
from cifar_resnet.errors import UsageError
from cifar_resnet.jobs import training_labels as training_labels_file
from cifar_resnet.training import engine

# What a slip of the hand did: dark images among the bright ones, and a bright one among the dark.
WRONG = ["bright/dark-1.png", "bright/dark-2.png", "bright/dark-3.png", "dark/bright-1.png"]


@pytest.fixture
def run(own_images, tmp_path, no_figures):
    """A run of one epoch on 48 training images, four of which are in the wrong folder."""
    for name in WRONG:
        kind, number = name.split("/")[1].removesuffix(".png").split("-")
        shutil.move(own_images / "train" / kind / f"{number}.png", own_images / "train" / name)
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    return tmp_path / "run"


def rank(run, **options):
    training_labels(run, folds=3, epochs=6, progress=False, **options)
    return json.loads((run / "training_labels.json").read_text("utf-8"))


def test_networks_of_a_run_that_was_stopped_are_trained_to_their_end(unfinished, tmp_path, no_figures):
    training_labels(unfinished, folds=2, epochs=6, run_dir=tmp_path, progress=False)
    content = json.loads((tmp_path / "training_labels.json").read_text("utf-8"))
    assert [content[name] for name in ("epoch", "epochs", "step")] == [6, 6, 0]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_labels_that_were_made_wrong_come_first(run, own_images, tmp_path, cli):
    before = files(run)
    options = ("--sort", "label", "--folds", 3, "--epochs", 6, "--copy-to", tmp_path / "odd")
    code, out, _ = cli("misclassified", run, *options)
    assert code == 0
    content = json.loads((run / "training_labels.json").read_text("utf-8"))
    assert sorted(row["name"] for row in content["labels"][:4]) == WRONG
    for row in content["labels"][:4]:
        brightness = np.asarray(Image.open(own_images / "train" / row["name"])).mean()
        assert row["suggested"] == ("bright" if brightness > 128 else "dark") != row["given"]
        assert f"{row['name']}, labelled {row['given']}: perhaps mislabelled: {row['suggested']}?" in out
    every = sorted(path.relative_to(own_images / "train").as_posix() for path in own_images.glob("train/*/*.png"))
    assert sorted(row["name"] for row in content["labels"]) == every
    assert (content["images"], content["folds"], content["epochs"], content["evaluated_on"]) == (48, 3, 6, "training")
    with open(run / "training_labels.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in content["labels"]]
    assert files(run) == sorted([*before, "training_labels.csv", "training_labels.json", "training_labels.png"])
    assert {f"{path.parent.parent.name}/{path.name}" for path in (tmp_path / "odd").rglob("*.png")} >= set(WRONG)
    assert training_labels(run, folds=2, epochs=1, true="dark", predicted="dark", progress=False) == []
    assert files(run) == sorted([*before, "training_labels.csv", "training_labels-2.csv", "training_labels.json"])  # the picture was of another choice


@pytest.fixture
def trainings(monkeypatch):
    """For each network that is trained, the pixels of the images that it sees, and of those that it judges."""
    seen, original = [], engine.train

    def listened(state, loader, evaluation, *more):
        judged = next(iter(evaluation())).images
        seen.append(({image.numpy().tobytes() for image in loader.images}, len(judged)))
        return original(state, loader, evaluation, *more)

    monkeypatch.setattr(engine, "train", listened)
    return seen


def test_no_network_has_seen_what_it_judges(run, own_images, trainings, monkeypatch):
    looked, start = [], engine.start
    monkeypatch.setattr(engine, "start", lambda *given: (looked.append({each.tobytes() for each in given[4]}), start(*given))[1])
    rank(run)
    assert looked == [seen for seen, _ in trainings]  # where a recipe whitens, it looks at these
    every = {image.tobytes() for image in load(Recipe.build(dataset=str(own_images), batch_size=16)).train.images}
    assert len(every) == 48
    judged = [every - seen for seen, _ in trainings]
    assert [len(each) for each in judged] == [count for _, count in trainings] == [16, 16, 16]
    assert set.union(*judged) == every


@pytest.fixture
def stopped_in_fold(monkeypatch, trainings):
    """Makes Ctrl-C come at the first step of a fold, from 1."""

    def stop(fold):
        original = engine.train

        def train(*given):
            count = len(trainings)
            for record in original(*given):
                if count == fold - 1:
                    monkeypatch.setattr(engine, "train", original)
                    raise KeyboardInterrupt
                yield record

        monkeypatch.setattr(engine, "train", train)

    return stop


def test_a_class_that_is_none_is_refused_before_a_fold_is_trained(run, monkeypatch):
    monkeypatch.setattr(training_labels_file, "images_of", None)
    with pytest.raises(UsageError, match="--true cat: no such class"):
        rank(run, true="cat")


def test_scores_go_by_the_temperature_of_the_folds_and_not_by_the_run_s(run, monkeypatch):
    seen = []
    fit = training_labels_file.calibration.fit_temperature
    monkeypatch.setattr(
        training_labels_file.calibration, "fit_temperature", lambda *judged: seen.append((*judged, fit(*judged))) or seen[0][2]
    )
    said = list[str]()
    content = rank(run, notify=said.append)
    ((logits, labels, fitted),) = seen
    right = 100 * sum(int(row.argmax()) == label for row, label in zip(logits, labels.tolist(), strict=True)) / 48
    assert said == [f"the networks of the folds are right about {right:.2f} % of the images that they were not trained on"]
    assert fitted != pytest.approx(load_checkpoint(run).temperature, rel=0.01)
    assert content["temperature"] == fitted
    expected = (logits.double() / fitted).softmax(1)[range(48), labels]
    scores = {row["index"]: row["score"] for row in content["labels"]}
    assert [scores[index] for index in range(48)] == pytest.approx(expected.tolist())


def test_a_ranking_that_was_stopped_goes_on_with_its_folds(run, trainings, stopped_in_fold, refused):
    expected = rank(run)
    del trainings[:]
    stopped_in_fold(2)
    line = refused(130, "misclassified", run, "--sort", "label", "--folds", 3, "--epochs", 6)
    assert f"stopped in fold 2 of 3; the folds before it are kept in {run / 'training_folds.pt'}; the same command" in line
    said = list[str]()
    assert rank(run, notify=said.append) == expected
    assert len(trainings) == 2 + 2
    assert said[0] == "1 of 3 folds were done before"
    assert len(said) == 2
    assert not (run / "training_folds.pt").exists()


def test_folds_of_another_number_or_damaged_ones_are_not_taken(run, trainings, stopped_in_fold):
    (run / "training_folds.pt").write_bytes(b"no archive")
    stopped_in_fold(2)
    with pytest.raises(CifarResnetError, match="stopped in fold 2 of 3"):
        rank(run)
    training_labels(run, folds=2, epochs=6, progress=False)
    assert len(trainings) == 2 + 2


def test_what_does_not_go_together_is_refused(run, tiny_run, refused):
    assert "--folds 3 goes with --sort label" in refused(2, "misclassified", run, "--folds", 3)
    assert "--epochs 3 goes with --folds" in refused(2, "misclassified", run, "--sort", "label", "--epochs", 3)
    for folds in (1, 25):
        line = refused(2, "misclassified", run, "--sort", "label", "--folds", folds)
        assert f"--folds {folds} must be at least 2, and at most" in line
    assert "--true cow: no such class" in refused(2, "misclassified", run, "--sort", "label", "--folds", 2, "--true", "cow")
    with pytest.raises(UsageError, match="--epochs 0 must be at least 1"):
        training_labels(run, epochs=0)
