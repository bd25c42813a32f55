import json
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_resnet import Recipe, load_checkpoint, predict, train
from cifar_resnet.data.datasets import load
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.errors import CheckpointError, UsageError
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


def test_where_no_image_can_be_read_there_is_no_table(cli, tiny_run, tmp_path):
    code, out, err = cli("predict", tiny_run, tmp_path / "missing.png")
    assert (code, out) == (1, "")
    assert "missing.png: No such file" in err



def test_what_is_no_image_is_named_and_skipped(digit_images, tiny_run, cli, tmp_path, monkeypatch):
    folder, _ = digit_images
    monkeypatch.chdir(folder)
    (folder / "aa.txt").write_text("no image")
    (folder / "bb.png").write_bytes((folder / "00.png").read_bytes()[:60])
    code, out, err = cli("predict", tiny_run, ".", tmp_path / "missing.png")
    assert (code, err.count("\n")) == (1, 2)
    assert f"cifar-resnet: skipped {tmp_path / 'missing.png'}: No such file" in err
    assert "cifar-resnet: 2 of the files in folders could not be read as images: aa.txt, bb.png\n" in err
    assert "39.png" in out
    code, out, err = cli("predict", tiny_run, "aa.txt", "bb.png", "00.png")
    assert (code, err.count("cifar-resnet: skipped")) == (1, 2)


def test_what_lies_in_a_folder_and_is_no_image_is_skipped_and_counted_once(digit_images, tiny_run, cli, monkeypatch):
    folder, _ = digit_images
    monkeypatch.chdir(folder.parent)
    for name in (".DS_Store", "._00.png", "Thumbs.db", ".venv/logo.png", "notes.txt", "more/readme.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no image")
    (folder / ".venv" / "logo.png").write_bytes((folder / "00.png").read_bytes())
    code, out, err = cli("predict", tiny_run, "images", "--json")
    assert (code, len(json.loads(out))) == (0, 40)
    skipped = f"{Path('images/notes.txt')}, {Path('images/more/readme.md')}"
    assert err == f"cifar-resnet: 2 of the files in folders could not be read as images: {skipped}\n"


# What predict takes from Python


def test_every_kind_of_image_gives_what_its_file_does(digit_images, tiny_run):
    folder, _ = digit_images
    files = sorted(folder.iterdir())[:3]
    pictures = [Image.open(file) for file in files]
    arrays = [np.asarray(Image.open(file)) for file in files]
    assert [arrays[0].shape, arrays[0].dtype] == [(32, 32, 3), np.uint8]

    def found(images):
        """The name of each, and its classes; a batch of another size changes the last digits."""
        rows = predict(tiny_run, images)
        return [(row["image"], [(each["class"], round(each["probability"], 4)) for each in row["classes"]]) for row in rows]

    expected = [classes for _, classes in found(files)]
    assert found(files[0]) == found(str(files[0])) == found([files[0]]) == [(str(files[0]), expected[0])]
    assert found(pictures[0]) == found(arrays[0]) == [(0, expected[0])]
    assert found(pictures) == found(arrays) == found(tuple(arrays)) == found(np.stack(arrays)) == list(enumerate(expected))
    assert found(arrays[0][..., 0]) == [(0, expected[0])]  # grey, as the digits are
    assert found([files[1], np.stack(arrays[:2]), pictures[2]]) == [
        (str(files[1]), expected[1]), (1, expected[0]), (2, expected[1]), (3, expected[2])
    ]  # fmt: skip
    deep = Image.fromarray(arrays[0][..., 0].astype(np.uint16) * 257)
    assert found(deep) == [(0, expected[0])]
    large = pictures[0].resize((64, 64), Image.Resampling.NEAREST).convert("RGBA")
    large.save(folder / "large.png")
    assert found(large) == [(0, found(folder / "large.png")[0][1])]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((32, 32, 3), np.float32), "must be of uint8, not float32; for values of 0 to 1"),
        (np.zeros((32, 32, 3), np.int64), "must be of uint8, not int64"),
        ([np.zeros((3, 32, 32), np.uint8)], r"not \(3, 32, 32\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"not \(0, 32, 32, 3\)"),
        (np.zeros(9, np.uint8), r"not \(9,\)"),
        (torch.zeros(3, 32, 32), "images tensor.* is of the type Tensor"),
        ([[1, 2]], "is of the type list"),
        (5, "images 5 is of the type int"),
        ([], "there are no images in"),
    ],
)
def test_what_is_no_image_in_memory_is_refused(images, words, tiny_run):
    with pytest.raises(UsageError, match=words) as refused:
        predict(tiny_run, images)
    assert "\n" not in str(refused.value)


def test_what_no_image_can_be_loses_no_other(digit_images, tiny_run):
    file, skipped = sorted(digit_images[0].glob("*.png"))[0], []
    wrong = ["l" * 300 + ".png", "a\0b.png", Image.new("RGB", (0, 5)), Image.new("L", (5, 0)), Image.new("La", (40, 40))]
    found = list(predict(tiny_run, [*wrong, file], skipped=skipped.append))
    assert found == list(predict(tiny_run, file))
    assert len(skipped) == len(wrong)
    for line, reason in zip(skipped, ("lll", "null", "image 2: has no pixels", "image 3: has no pixels", "image 4: "), strict=True):
        assert reason in line


def test_what_is_wrong_is_said_when_predict_is_called(tmp_path, tiny_run):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        predict(tmp_path / "none.pt", "photo.jpg")
    with pytest.raises(UsageError, match="--tta crop"):
        predict(tiny_run, "photo.jpg", tta="crop")
    with pytest.warns(UserWarning, match="nowhere.jpg: No such file"):
        assert list(predict(tiny_run, "nowhere.jpg")) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"there are no images in {re.escape(str(tmp_path / 'empty'))}$"):
        predict(tiny_run, str(tmp_path / "empty"))



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
    assert "there are no images in" in refused(2, "predict", tiny_run, tmp_path / "empty")


def test_a_dark_image_of_12_bits_is_read_as_in_training(tmp_path, no_figures):
    """White is 4,095 in the training images; the image alone would say 255."""
    rng, folder = np.random.default_rng(0), tmp_path / "cells"
    for part, name in product(("train", "test"), ("few", "many")):
        (folder / part / name).mkdir(parents=True)
        for i in range(4):
            values = rng.integers(0, 4096 if part == "train" else 250, (32, 32), dtype=np.uint16)
            Image.fromarray(values).save(folder / part / name / f"{i}.png")
    recipe = Recipe.build(dataset=str(folder), epochs=1, peak_epoch=0.5, batch_size=8, width=4, sam_share=0.0)
    checkpoint = train(recipe, tmp_path / "run")
    assert checkpoint.whites == {"uint16": 4095}
    split = load(checkpoint.recipe).evaluation
    batch = next(TensorLoader(split, checkpoint.recipe, torch.device("cpu")).plain(8))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, checkpoint.recipe.precision == "bfloat16"):
        expected = (checkpoint.model().logits(batch.images).double() / checkpoint.temperature).softmax(1)
    found = list(predict(tmp_path / "run", [folder / "test" / name for name in split.names], top=2))
    for row, probabilities in zip(found, expected.tolist(), strict=True):
        given = {each["class"]: each["probability"] for each in row["classes"]}
        assert [given["few"], given["many"]] == pytest.approx(probabilities, rel=1e-2)


def test_predictions_of_an_unfinished_run_say_so(unfinished, tmp_path, cli):
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    code, out, err = cli("predict", unfinished, tmp_path / "black.png", "--json")
    assert (code, len(json.loads(out))) == (0, 1)
    assert err == "cifar-resnet: the run stands at epoch 1 of 2, step 1: what follows is not its end\n"


# Which run


def test_predict_takes_the_newest_run_where_none_is_given(tiny_run, tmp_path, cli, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/digits-1")
    Path("photos").mkdir()
    Image.new("RGB", (32, 32)).save("photos/black.png")
    expected = cli("predict", tiny_run, "photos/black.png", "photos", "--json")
    assert (expected[0], expected[2], len(json.loads(expected[1]))) == (0, "", 2)
    said = f"cifar-resnet: the newest run is {Path('runs/digits-1')}\n"
    assert cli("predict", "photos/black.png", "photos", "--json") == (0, expected[1], said)
    assert cli("predict", "latest", "photos/black.png", "photos", "--json") == (0, expected[1], said)
    assert "that is a run, and no image is given" in refused(2, "predict", "runs/digits-1")
    assert f"there is no checkpoint {Path('runs/digit-1')}" in refused(1, "predict", "runs/digit-1", "photos/black.png")


def test_a_run_among_the_images_is_refused(digit_images, tiny_run, refused, cli, tmp_path):
    folder, _ = digit_images
    line = refused(2, "predict", folder / "00.png", tiny_run)
    assert f"predict {tiny_run}: that is a run, which stands before the images" in line
    shutil.make_archive(tmp_path / "archive", "zip", folder)
    code, _, err = cli("predict", tiny_run, folder / "00.png", tmp_path / "archive.zip")
    assert (code, "skipped" in err) == (1, True)  # it is no image, and no run
