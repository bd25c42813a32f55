import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_resnet import Recipe, load_checkpoint, predict, train
from cifar_resnet.data.datasets import load
from cifar_resnet.data.images import read_image
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
    values, classes = logits.double().softmax(1).topk(2)
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


# How a file becomes 32x32 pixels


@pytest.mark.parametrize("kind", ["L", "LA", "P", "RGBA", "I;16", "CMYK", "1"])
def test_images_of_every_mode_are_read(kind, tmp_path):
    grey = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(grey).convert(kind)
    path = tmp_path / ("x.jpg" if kind == "CMYK" else "x.png")
    image.save(path)
    found = read_image(path)
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    if kind != "1":  # the centred 48x48, from grey 32 to 223
        assert found[0].mean() == pytest.approx(34, abs=4)
        assert found[-1].mean() == pytest.approx(221, abs=4)


def test_images_are_turned_cut_and_laid_on_white(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64, 0] = 200  # the centred square is red
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png") == [200, 0, 0]).all()
    small = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(small).save(tmp_path / "turned.webp", exif=exif, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.webp"), np.rot90(small, -1))
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "float.tiff")
    assert (read_image(tmp_path / "float.tiff") == 127).all()


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
