import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_resnet import CifarResnetError, Recipe, load_checkpoint, misclassified, train
from cifar_resnet.data.datasets import load
from cifar_resnet.errors import UsageError
from cifar_resnet.look import pictures


def test_every_mistake_is_listed(tiny_run, tmp_path, cli):
    code, out, _ = cli("misclassified", tiny_run, "--count", 4, "--run-dir", tmp_path)
    assert code == 0
    found = json.loads((tmp_path / "misclassified.json").read_text("utf-8"))
    checkpoint = load_checkpoint(tiny_run)
    wrong = round(40 * (1 - checkpoint.history[-1]["test_accuracy"] / 100))
    assert (len(found["mistakes"]), found["images"], found["evaluated_on"]) == (wrong, 40, "test")
    assert f"of {wrong} mistakes" in out
    images = load(checkpoint.recipe).evaluation
    label_of = dict(zip(images.indices.tolist(), images.labels.tolist(), strict=True))
    assert len({mistake["index"] for mistake in found["mistakes"]}) == wrong
    for mistake in found["mistakes"]:
        assert mistake["true"] == str(label_of[mistake["index"]]) != mistake["predicted"]
        assert max(mistake["probabilities"], key=mistake["probabilities"].get) == mistake["predicted"]
    assert sorted(os.listdir(tmp_path)) == ["gradcam.png", "misclassified.json", "misclassified.png"]
    assert (tmp_path / "gradcam.png").read_bytes().startswith(b"\x89PNG")


def test_the_pictures_show_those_chosen(tiny_run, tmp_path, monkeypatch, no_figures):
    """The images shown are those of the mistakes beside them, in the same order; every title says which they are."""
    drawn = {}
    for name in ("misclassified", "grad_cam"):
        draw = getattr(pictures, name)
        monkeypatch.setattr(pictures, name, lambda *given, name=name, draw=draw: drawn.update({name: given}) or draw(*given))
    every = misclassified(tiny_run, tmp_path)
    counts = {}
    for each in every:
        counts[each.true] = counts.get(each.true, 0) + 1
    true, most = max(counts.items(), key=lambda pair: pair[1])
    assert most >= 3
    chosen = misclassified(tiny_run, tmp_path, count=2, true=true, layer="layer3", format="pdf")
    assert chosen == [each for each in every if each.true == true]
    images = load(load_checkpoint(tiny_run).recipe).evaluation
    place = {index: position for position, index in enumerate(images.indices.tolist())}
    for name, (photos, *_, shown, title, _) in drawn.items():
        assert shown == chosen[:2]
        assert [picture.tobytes() for picture in photos] == [images.images[place[each.index]].tobytes() for each in shown]
        assert title.endswith(f"2 surest of {most} mistakes in 40 test images, true class {true}"), name
    assert drawn["grad_cam"][-2].startswith("Grad-CAM at layer3: ")
    assert {path.name for path in tmp_path.glob("*.pdf")} == {"misclassified.pdf", "gradcam.pdf"}
    assert len(json.loads((tmp_path / "misclassified.json").read_text("utf-8"))["mistakes"]) == len(every)


def test_no_such_mistake_draws_no_picture(tiny_run, tmp_path, cli, no_figures):
    every = misclassified(tiny_run, tmp_path / "all", count=1)
    pairs = {(each.true, each.predicted) for each in every}
    true, predicted = next((str(i), str(j)) for i in range(10) for j in range(10) if i != j and (str(i), str(j)) not in pairs)
    code, out, _ = cli("misclassified", tiny_run, "--true", true, "--predicted", predicted, "--run-dir", tmp_path / "none")
    assert code == 0
    assert "there is no such mistake to show" in out
    assert ".png" not in out
    assert os.listdir(tmp_path / "none") == ["misclassified.json"]
    assert (tmp_path / "all" / "gradcam.png").exists()
    misclassified(tiny_run, tmp_path / "all", true=true, predicted=predicted)  # of another choice, whose pictures go
    assert os.listdir(tmp_path / "all") == ["misclassified.json"]


def test_the_files_named_are_those_written(tiny_run, tmp_path, cli, no_figures, monkeypatch):
    """Of a network that knows one class alone: never 3, and right on every 7."""
    from cifar_resnet.jobs import common

    labels_of = common.predict_logits

    def always_7(*given):
        _, labels = labels_of(*given)
        return torch.eye(10)[torch.full_like(labels, 7)], labels

    monkeypatch.setattr(common, "predict_logits", always_7)
    for place, options in enumerate((["--predicted", 3], ["--true", 7, "--predicted", 7], ["--true", 2, "--sort", "label"], [])):
        folder = tmp_path / str(place)
        code, out, _ = cli("misclassified", tiny_run, *options, "--run-dir", folder)
        assert code == 0
        assert sorted(re.findall(rf"^  ({re.escape(tmp_path.anchor)}.*)", out, re.MULTILINE)) == sorted(map(str, folder.iterdir()))
    assert [len(list((tmp_path / place).iterdir())) for place in "013"] == [1, 3, 3]


def test_labels_that_may_be_wrong_come_first(own_images, tmp_path, cli, no_figures, monkeypatch):
    """A dark image among the bright ones, of a network that tells them apart."""
    draw, drawn = pictures.misclassified, []
    monkeypatch.setattr(pictures, "misclassified", lambda *given: drawn.append(given[2:]) or draw(*given))
    shutil.move(own_images / "test" / "dark" / "0.png", own_images / "test" / "bright" / "=odd, one.png")
    train(Recipe.build(dataset=str(own_images), epochs=6, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    code, out, _ = cli("misclassified", tmp_path / "run", "--sort", "label", "--copy-to", tmp_path / "odd")
    assert code == 0
    assert "bright/=odd, one.png, labelled bright: perhaps mislabelled: dark?" in out
    assert drawn == [("The one label that may be wrong in 12 test images", "label")]
    content = json.loads((tmp_path / "run" / "labels.json").read_text("utf-8"))
    rows = content["labels"]
    assert (rows[0]["name"], rows[0]["given"], rows[0]["suggested"]) == ("bright/=odd, one.png", "bright", "dark")
    assert (len(rows), content["images"]) == (12, 12)
    with open(tmp_path / "run" / "labels.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{**row, "index": int(row["index"]), "score": float(row["score"])} for row in table] == rows
    assert files_in(tmp_path / "odd") == ["bright/dark/=odd, one.png"]


def test_labels_that_a_user_corrected_stay(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_resnet.jobs.misclassified._draw", lambda *given: None)

    def rank():
        written = []
        misclassified(tiny_run, tmp_path, sort="label", written=written.append)
        return {path.name for path in written if path.suffix == ".csv"}

    assert rank() == rank() == {"labels.csv"}
    made = (tmp_path / "labels.csv").read_bytes()
    corrected = made.replace(made.split()[1], b"0,,1,2,0.5", 1)
    (tmp_path / "labels.csv").write_bytes(corrected)
    assert rank() == rank() == {"labels-2.csv"}
    assert (tmp_path / "labels.csv").read_bytes() == corrected != made == (tmp_path / "labels-2.csv").read_bytes()
    assert not (tmp_path / "labels-3.csv").exists()
    (tmp_path / "labels-2.csv").unlink()
    (tmp_path / "labels-2.csv").mkdir()
    assert rank() == {"labels-3.csv"}


def test_where_there_is_no_mistake_the_least_sure_images_are_shown(tiny_run, tmp_path, cli, no_figures, monkeypatch):
    """A run without any, made by taking the predictions for the labels."""
    from cifar_resnet.jobs import misclassified as job

    logits_of, drawn = job.logits_of, {}

    def all_right(*given):
        found = logits_of(*given)
        return found._replace(labels=found.logits.argmax(1))

    monkeypatch.setattr(job, "logits_of", all_right)
    for name in ("misclassified", "grad_cam"):
        monkeypatch.setattr(pictures, name, lambda *given, name=name: drawn.update({name: given}))
    code, out, _ = cli("misclassified", tiny_run, "--count", 3, "--run-dir", tmp_path)
    assert code == 0
    title = "No mistake in 40 test images. The 3 least sure, all right"
    assert title in out
    found = json.loads((tmp_path / "misclassified.json").read_text("utf-8"))
    assert found["mistakes"] == []
    judged = logits_of(tiny_run, None, "cpu", print)
    confidences = (judged.logits.double() / judged.checkpoint.temperature).softmax(1).max(1).values.sort().values
    assert [each["confidence"] for each in found["least_sure"]] == pytest.approx(confidences[:3].tolist())
    assert all(each["true"] == each["predicted"] for each in found["least_sure"])
    for *_, shown, drawn_title, _ in drawn.values():
        assert [each.index for each in shown] == [each["index"] for each in found["least_sure"]]
        assert drawn_title.endswith(title)
    assert (tmp_path / "gradcam.png").exists()
    assert misclassified(tiny_run, tmp_path) == []


def test_what_cannot_be_chosen_is_refused(refused, tiny_run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifar_resnet.jobs.misclassified.logits_of", None)  # it is known before the network looks at the images
        line = refused(2, "misclassified", tiny_run, "--true", "cow", "--run-dir", tmp_path / "none")
        assert "--true cow: no such class; there are 0, 1, 2" in line
        with pytest.raises(UsageError, match="--sort size"):
            misclassified(tiny_run, tmp_path / "none", sort="size")
    for options, word in (
        (dict(count=0), "--count 0"),
        (dict(layer="layer9"), "--layer layer9"),
        (dict(format="gif"), "--format gif"),
    ):
        with pytest.raises(UsageError, match=word):
            misclassified(tiny_run, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


# Mistakes by name


@pytest.fixture
def own_run(own_images, tmp_path, no_figures):
    """A run on a folder whose bright test images are also in a folder inside, under the same names, and a file with a hostile one."""
    bright = own_images / "test" / "bright"
    shutil.copytree(bright, bright / "more")
    shutil.copy(bright / "0.png", bright / ('a"b<c>|.png' if os.name != "nt" else "a_b_c__.png"))
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    return tmp_path / "run"


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def all_wrong(monkeypatch, then=lambda: None):
    """Makes every prediction the class after the true one, and does `then` when the images have been read."""
    from cifar_resnet.jobs import common

    found = common.predict_logits

    def turned(*given):
        logits, labels = found(*given)
        then()
        return torch.nn.functional.one_hot((labels + 1) % logits.shape[1], logits.shape[1]).float(), labels

    monkeypatch.setattr(common, "predict_logits", turned)


def test_the_files_of_mistakes_are_copied_by_class(own_images, own_run, tmp_path, monkeypatch, cli):
    all_wrong(monkeypatch)
    code, out, _ = cli("misclassified", own_run, "--copy-to", tmp_path / "new" / "copies", "--save-images", tmp_path / "small")
    assert code == 0
    assert f"19 images written in\n  {tmp_path / 'new' / 'copies'}" in out
    listed = json.loads((own_run / "misclassified.json").read_text("utf-8"))["mistakes"]
    originals = {path.relative_to(own_images / "test").as_posix(): path for path in own_images.glob("test/**/*.png")}
    assert sorted(each["name"] for each in listed) == sorted(originals)
    bright = [*(f"{i}{which}.png" for i in range(6) for which in ("", "-2")), "a_b_c__.png"]
    expected = sorted([f"bright/dark/{name}" for name in bright] + [f"dark/bright/{i}.png" for i in range(6)])
    for folder in (tmp_path / "new" / "copies", tmp_path / "small"):
        assert files_in(folder) == expected
    copied = sorted(path.read_bytes() for path in (tmp_path / "new" / "copies").rglob("*.png"))
    assert copied == sorted(path.read_bytes() for path in originals.values())
    split = load(load_checkpoint(own_run).recipe).evaluation
    shown = sorted(np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "small").rglob("*.png"))
    assert shown == sorted(image.tobytes() for image in split.images)
    assert not list(tmp_path.rglob(".*.new"))


def test_images_without_files_are_written_by_their_index(tiny_run, tmp_path, refused, no_figures):
    chosen = misclassified(tiny_run, tmp_path, save_images=tmp_path / "images")
    expected = sorted(f"{each.true}/{each.predicted}/{each.index}.png" for each in chosen)
    assert files_in(tmp_path / "images") == expected
    images = load(load_checkpoint(tiny_run).recipe).evaluation
    first = tmp_path / "images" / chosen[0].true / chosen[0].predicted / f"{chosen[0].index}.png"
    assert np.array_equal(np.asarray(Image.open(first)), images.images[chosen[0].position])
    line = refused(2, "misclassified", tiny_run, "--copy-to", tmp_path / "copies")
    assert "the images of digits have no files to copy" in line
    assert not (tmp_path / "copies").exists()


@pytest.mark.posix
def test_images_go_into_a_new_folder_alone(own_images, own_run, tmp_path, monkeypatch, refused):
    all_wrong(monkeypatch)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for folder in (tmp_path / "full", tmp_path / "file"):
        for option in ("--copy-to", "--save-images"):
            assert str(folder) in refused(1, "misclassified", own_run, option, folder)
    assert files_in(tmp_path / "full") == ["mine.txt"]
    with monkeypatch.context() as patch:
        patch.setattr("cifar_resnet.jobs.misclassified.logits_of", lambda *_: pytest.fail("evaluated first"))
        for inside in (own_images / "train" / "copies", own_images / "valid"):
            for option in ("--copy-to", "--save-images"):
                assert "choose a folder outside" in refused(2, "misclassified", own_run, option, inside)
            assert not inside.exists()
        for other in (tmp_path / "link", tmp_path / "link" / "small"):
            line = refused(2, "misclassified", own_run, "--copy-to", tmp_path / "empty", "--save-images", other)
            assert "choose a folder outside" in line
    misclassified(own_run, copy_to=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(files_in(tmp_path / "empty")) == 19


def test_a_file_that_is_gone_leaves_no_half_of_a_folder(own_images, own_run, tmp_path, monkeypatch):
    all_wrong(monkeypatch, then=(own_images / "test" / "bright" / "3.png").unlink)
    with pytest.raises(CifarResnetError, match=r"3\.png cannot be copied: No such file"):
        misclassified(own_run, copy_to=tmp_path / "copies")
    assert not (tmp_path / "copies").exists()
    assert not list(tmp_path.glob(".*.new"))


def test_pictures_go_where_nothing_is_chosen_whatever_their_format(tiny_run, tmp_path, no_figures):
    for format in ("png", "svg"):
        misclassified(tiny_run, tmp_path, format=format)
    drawn = {f"{name}.{format}" for name in ("gradcam", "misclassified") for format in ("png", "svg")}
    assert drawn <= set(os.listdir(tmp_path))
    assert misclassified(tiny_run, tmp_path, sort="label", true="3", predicted="3") == []
    assert not drawn & set(os.listdir(tmp_path))
