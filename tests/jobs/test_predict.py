import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_resnet import Recipe, load_checkpoint, predict, train
from cifar_resnet.data.datasets import load
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.jobs import predict as job


@pytest.fixture
def digit_images(tiny_run, tmp_path):
    """The tiny run's 40 test images as PNG files, in order, and its model's logits of them."""
    checkpoint = load_checkpoint(tiny_run)
    split = load(checkpoint.recipe).evaluation
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(split.images):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    batch = next(TensorLoader(split, checkpoint.recipe, torch.device("cpu")).plain(40))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, checkpoint.recipe.precision == "bfloat16"):
        return folder, checkpoint.model().logits(batch.images).float()


@pytest.mark.parametrize("chunk", [1000, 7])
def test_predictions_on_files_are_those_on_the_dataset(digit_images, tiny_run, cli, monkeypatch, chunk):
    monkeypatch.setattr(job, "CHUNK", chunk)
    folder, logits = digit_images
    code, out, err = cli("predict", tiny_run, folder, "--json", "--top", 2)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [row["image"] for row in found] == sorted(str(path) for path in folder.iterdir())
    values, classes = (logits.double() / load_checkpoint(tiny_run).temperature).softmax(1).topk(2)
    for row, probabilities, labels in zip(found, values, classes, strict=True):
        assert [int(each["class"]) for each in row["classes"]] == labels.tolist()
        assert [each["probability"] for each in row["classes"]] == pytest.approx(probabilities.tolist(), rel=1e-3)


def test_what_is_no_image_is_named_and_skipped(digit_images, tiny_run, cli, tmp_path, monkeypatch):
    folder, _ = digit_images
    monkeypatch.chdir(folder)
    (folder / "aa.txt").write_text("no image")
    (folder / "bb.png").write_bytes((folder / "00.png").read_bytes()[:60])
    code, out, err = cli("predict", tiny_run, ".", tmp_path / "missing.png")
    assert code == 1
    assert [name in err for name in ("aa.txt", "bb.png", "missing.png: No such file")] == [True] * 3
    assert err.count("cifar-resnet: skipped") == 3
    assert "39.png" in out


def test_own_classes_are_named(own_images, tmp_path, no_figures):
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    done = []
    found = list(
        predict(tmp_path / "run", [own_images / "test"], top=9, tta="flip", progress=lambda *numbers: done.append(numbers))
    )
    assert [row["image"] for row in found] == sorted(map(str, own_images.glob("test/*/*.png")))
    for row in found:
        assert {each["class"] for each in row["classes"]} == {"bright", "dark"}
        assert sum(each["probability"] for each in row["classes"]) == pytest.approx(1)
    assert done == [(i, 12) for i in range(1, 13)]


def test_what_cannot_be_predicted_is_refused(tiny_run, tmp_path, refused):
    assert "--top 0 must be at least 1" in refused(2, "predict", tiny_run, tmp_path, "--top", 0)
    (tmp_path / "empty").mkdir()
    assert "there are no files in" in refused(2, "predict", tiny_run, tmp_path / "empty")


# Which run


def test_predict_takes_the_newest_run_where_none_is_given(tiny_run, tmp_path, cli, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/digits-1")
    Path("photos").mkdir()
    Image.new("RGB", (32, 32)).save("photos/black.png")
    expected = cli("predict", tiny_run, "photos/black.png", "photos", "--json")
    assert (expected[0], expected[2], len(json.loads(expected[1]))) == (0, "", 2)
    said = "cifar-resnet: the newest run is runs/digits-1\n"
    assert cli("predict", "photos/black.png", "photos", "--json") == (0, expected[1], said)
    assert cli("predict", "latest", "photos/black.png", "photos", "--json") == (0, expected[1], said)
    assert "that is a run, and no image is given" in refused(2, "predict", "runs/digits-1")
    assert "there is no checkpoint runs/digit-1" in refused(1, "predict", "runs/digit-1", "photos/black.png")
