"""Training on a folder of one's own images, which may change, move or be renamed between two parts of a run."""

import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from run_helpers import Listener, StopAfter, assert_same_run, content

from cifar_resnet import Recipe, load_checkpoint, train
from cifar_resnet.data.images import read_image
from cifar_resnet.errors import CifarResnetError
from cifar_resnet.jobs.interrupt import Interrupted
from cifar_resnet.training import distributed


@pytest.fixture
def own_run(own_images, tmp_path, no_figures):
    """The folder of a run on the images of `own_images`, stopped after its first step."""
    recipe, read = Recipe.build(dataset=str(own_images), epochs=2, batch_size=16, max_lr=0.02, width=4), []
    watcher = StopAfter(1)
    watcher.reading = lambda *numbers: read.append(numbers)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", watcher=watcher)
    assert read == [(i, count) for count in (48, 12) for i in range(1, count + 1)]
    return tmp_path / "run"


def test_own_images_are_trained_on_with_their_class_names_mean_and_deviation(own_run, own_images):
    checkpoint = train(resume=own_run)
    assert checkpoint.classes == ("bright", "dark")
    assert checkpoint.recipe.dataset == str(own_images)
    images = np.stack([read_image(path) for path in sorted(own_images.glob("train/*/*.png"))]) / 255
    assert checkpoint.recipe.mean == pytest.approx(images.mean((0, 1, 2)), abs=1e-4)
    assert checkpoint.recipe.std == pytest.approx(images.std((0, 1, 2)), abs=1e-4)


@contextmanager
def untouched(run):
    """Checks that all files of a run, and what was made of it, are as they were."""
    (run / "evaluation.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    yield
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("training", lambda folder: [path.unlink() for path in folder.glob("train/*/1*.png")], "there were 48, and there are 26"),
        ("training", lambda folder: (folder / "train/dark/23.png").rename(folder / "train/bright/24.png"), "of the 48, pixels or labels"),
        ("evaluation", lambda folder: (folder / "test/dark/0.png").unlink(), "there were 12, and there are 11"),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_with_other_images(own_run, own_images, part, change, said):
    change(own_images)
    message = f"the {part} images are not those of the run in {re.escape(str(own_run))}: {said}.* --dataset, or start a new run"
    with untouched(own_run), pytest.raises(CifarResnetError, match=message):
        train(resume=own_run)
    own_images.rename(own_images.with_name("renamed"))
    with untouched(own_run), pytest.raises(CifarResnetError, match=message):
        train(resume=own_run, must_match={"dataset": str(own_images.with_name("renamed"))})


def test_a_run_goes_on_with_other_pixels_in_the_same_files_and_says_so_once(own_run, own_images):
    """As another version of Pillow decodes them."""
    for part in ("train", "test"):
        shutil.copy(own_images / part / "dark/3.png", own_images / part / "dark/4.png")
    first, second = Listener(), Listener()
    first.step = StopAfter(1).step
    with pytest.raises(Interrupted):
        train(resume=own_run, watcher=first)
    assert [re.sub(", pixels.*;", " ...;", line) for line in first.warnings] == [
        f"the {part} images are not those of the run in {own_run}: of the {count} ...; the run goes on with these"
        for part, count in (("training", 48), ("evaluation", 12))
    ]
    assert train(resume=own_run, watcher=second).finished
    assert second.warnings == []


def test_a_run_of_images_without_files_does_not_go_on_with_other_pixels(unfinished, tmp_path):
    shutil.copytree(unfinished, tmp_path / "run")
    changed = content(unfinished)
    changed["data"]["evaluation"]["sha256"] = "another"
    torch.save(changed, tmp_path / "run" / "checkpoint.pt")
    with untouched(tmp_path / "run"), pytest.raises(CifarResnetError, match="of the 40, pixels or labels have changed; put"):
        train(resume=tmp_path / "run")


def test_a_run_without_a_checkpoint_begins_where_its_images_have_moved_to(own_images, own_run, tmp_path, no_figures):
    (own_run / "checkpoint.pt").unlink()
    own_images.rename(tmp_path / "renamed")
    train(resume=own_run, must_match={"dataset": str(tmp_path / "renamed")})
    assert load_checkpoint(own_run).recipe.dataset == str(tmp_path / "renamed")


def test_a_run_goes_on_where_its_images_have_moved_to(own_run, own_images, tmp_path, cli, no_figures):
    """The same to the bit as where they were; and finds them there from then on."""
    shutil.copytree(own_run, tmp_path / "moved")
    train(resume=own_run)
    own_images.rename(tmp_path / "renamed")
    code, _, err = cli("train", "--resume", tmp_path / "moved", "--dataset", tmp_path / "renamed")
    assert (code, err) == (0, "")
    assert_same_run(content(own_run), content(tmp_path / "moved"))
    assert json.loads((tmp_path / "moved" / "recipe.json").read_text("utf-8"))["dataset"] == str(tmp_path / "renamed")
    assert cli("evaluate", tmp_path / "moved")[0] == 0


@pytest.mark.posix
def test_a_run_on_own_images_goes_on_in_any_spelling_of_their_folder(own_run, own_images, cli, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(own_images)
    line = refused(2, "train", "--resume", "run", "--dataset", "digits")
    assert line == f"cifar-resnet: --dataset digits contradicts the run in run, which has {own_images}; leave it out\n"
    for spelling in ("own/", "other/../own", "link"):
        shutil.copytree("run", "again")
        code, out, err = cli("train", "--resume", "again", "--dataset", spelling)
        assert (code, err) == (0, ""), spelling
        assert "going on after epoch 0, step 1" in out
        checkpoint = load_checkpoint("again")
        assert checkpoint.finished
        assert checkpoint.recipe.dataset == str(own_images)
        shutil.rmtree("again")


def test_a_run_does_not_go_on_with_images_of_other_classes(own_run, own_images):
    for part in ("train", "test"):
        (own_images / part / "dark").rename(own_images / part / "cold")
    with untouched(own_run), pytest.raises(CifarResnetError, match="was trained on the classes bright, dark, not bright, cold"):
        train(resume=own_run)


def test_processes_with_other_images_are_refused_on_each(own_images, tmp_path, monkeypatch):
    """Before the run has a folder; as where two machines have each a copy of the images."""
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, {**mine, "train": {"images": 47, "sha256": "another"}}])
    recipe = Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, width=4)
    with pytest.raises(CifarResnetError, match="process 1 has other images than process 0; give each the same"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_another_layout_is_refused(own_images, refused, tmp_path):
    def line(code, folder):
        return refused(code, "train", "--dataset", folder, "--run-dir", tmp_path / "run")

    assert "there is no folder" in line(2, tmp_path / "nowhere")
    (own_images / "train" / "dark" / "0.png").write_text("no image")
    assert "0.png: not an image" in line(1, own_images)
    shutil.rmtree(own_images / "test" / "dark")
    (own_images / "train" / "dark" / "0.png").unlink()
    assert "train has dark, which test has not" in line(1, own_images)
    shutil.rmtree(own_images / "test")
    assert "must hold train/CLASS/* and test/CLASS/*: there is no test" in line(1, own_images)
    assert not (tmp_path / "run").exists()
