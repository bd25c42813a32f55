import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cifar_resnet import Recipe, compare, load_checkpoint, train
from cifar_resnet.errors import shell_command
from cifar_resnet.look import console, figures, rendering


@pytest.fixture(scope="module")
def three_runs(tiny_run, tiny_recipe, tmp_path_factory):
    """Two seeds of the tiny recipe, and one run at another learning rate."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "render", lambda figure, format="png": b".")  # as `no_figures`
        train(tiny_recipe.replace(seed=1), folder / "seed1")
        train(tiny_recipe.replace(max_lr=0.01), folder / "slow")
    return [tiny_run, folder / "seed1", folder / "slow"]


def test_runs_that_differ_only_in_the_seed_are_one_group(three_runs, tmp_path, cli):
    content = compare(three_runs, tmp_path / "c.svg")
    assert b"<svg" in (tmp_path / "c.svg").read_bytes()
    code, out, _ = cli("compare", *three_runs, "--output", tmp_path / "d.png", "--json")
    assert (code, json.loads(out)) == (0, content)
    last = [load_checkpoint(run).history[-1]["test_accuracy"] for run in three_runs]
    both, alone = content["groups"]
    assert (both["n"], both["mean"]) == (2, pytest.approx(np.mean(last[:2])))
    assert both["std"] == pytest.approx(np.std(last[:2], ddof=1))
    assert (alone["n"], alone["mean"], alone["std"]) == (1, pytest.approx(last[2]), None)
    assert [group["differs"] for group in content["groups"]] == [{"max_lr": 0.4}, {"max_lr": 0.01}]
    seconds = [sum(row["seconds"] for row in load_checkpoint(run).history) for run in three_runs]
    assert [group["seconds"] for group in content["groups"]] == pytest.approx([np.mean(seconds[:2]), seconds[2]])
    axis = figures.comparison(content["groups"], "test").axes[0]
    by_run = [[row["test_accuracy"] for row in load_checkpoint(run).history] for run in three_runs]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx(np.mean(by_run[:2], axis=0))
    assert axis.lines[1].get_ydata().tolist() == by_run[2]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[0].startswith("default: max_lr 0.4: ")
    assert labels[0].endswith("%, n = 2")


def test_compare_on_the_command_line(three_runs, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "console", Console(width=400, highlight=False))
    code, out, err = cli("compare", *three_runs, "--output", tmp_path / "c.png")
    assert (code, err) == (0, "")
    assert re.search(r"^max_lr +0\.01 +0\.4\b|^max_lr +0\.4 +0\.01\b", out, re.MULTILINE)
    assert str(three_runs[1]) in out
    history = load_checkpoint(three_runs[2]).history[-1]
    assert f"{history['test_loss']:.4f}" in out
    assert f"{history['train_loss']:.4f}" in out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_in_what_changes_nothing_are_one_group(tmp_path, no_figures):
    """Else each would be a recipe of its own, with n = 1, of equal accuracies."""
    sizes = dict(dataset="digits", train_limit=40, test_limit=20, batch_size=20, epochs=1, width=4)
    recipe = Recipe.build("default", **sizes, optimizer="adam", max_lr=0.001, sam_share=0, cutout_count=0, flip_probability=0.3)
    changes = dict(muon_lr_factor=0.9, sam_radius=0.5, ema_every=7, cutout_size=20, flip_order="random", nesterov=False)
    train(recipe, tmp_path / "a")
    train(recipe.replace(seed=1, **changes), tmp_path / "b")
    train(recipe.replace(seed=1, pad=2), tmp_path / "c")
    content = compare([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert [(group["n"], group["differs"]) for group in content["groups"]] == [(2, {"pad": 4}), (1, {"pad": 2})]


def test_what_tells_runs_apart_is_told_as_they_had_it(tiny_recipe, tmp_path, no_figures):
    """With flips by chance of 0.3 the order of flips changes nothing, and with SGD the rate of Muon."""
    half = tiny_recipe.replace(epochs=1, flip_order="random", flip_probability=0.5, muon_lr_factor=0.3)
    others = half.replace(flip_probability=0.3), half.replace(optimizer="sgd")
    for number, recipe in enumerate((half, *others)):
        train(recipe, tmp_path / str(number))
    told = {
        frozenset(each["differs"].items()) for each in compare([tmp_path / str(number) for number in range(3)])["groups"]
    }
    assert told == {
        frozenset({"optimizer": optimizer, "flip_probability": probability}.items())
        for optimizer, probability in (("muon", 0.5), ("muon", 0.3), ("sgd", 0.5))
    }


def test_runs_are_of_one_group_by_their_images_and_not_by_the_name_of_a_folder(own_images, tmp_path, no_figures, cli):
    """The folder is moved after the first run, and has other images in its place before the third."""
    recipe = Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, width=4, mean=(0.5,) * 3, std=(0.3,) * 3)
    runs = [tmp_path / name for name in "abc"]
    train(recipe, runs[0])
    own_images.rename(tmp_path / "now")
    train(recipe.replace(dataset=str(tmp_path / "now"), seed=1), runs[1])
    shutil.copytree(tmp_path / "now", own_images)
    next((own_images / "train").glob("*/*.png")).unlink()
    train(recipe.replace(seed=2), runs[2])
    train(recipe.replace(pad=2), tmp_path / "d")
    code, out, _ = cli("compare", *runs, tmp_path / "d", "--output", tmp_path / "c.png")
    assert code == 0
    assert "images" in out
    groups = compare(runs)["groups"]
    assert [[Path(run["path"]).parent.name for run in group["runs"]] for group in groups] == [["a", "b"], ["c"]]
    assert groups[0]["differs"]["images"] != groups[1]["differs"]["images"]


def test_what_cannot_be_compared_is_refused(tiny_run, tiny_recipe, refused, tmp_path, no_figures):
    train(tiny_recipe.replace(holdout=40), tmp_path / "held")
    assert "cannot be compared" in refused(2, "compare", tiny_run, tmp_path / "held")
    assert "given twice" in refused(2, "compare", tiny_run, tiny_run / "checkpoint.pt")
    shutil.copytree(tiny_run, tmp_path / "copy")
    assert "one recipe and one seed" in refused(2, "compare", tiny_run, tmp_path / "copy")
    assert "there is no checkpoint" in refused(1, "compare", tmp_path)
    assert "must end in" in refused(2, "compare", tiny_run, "--output", tmp_path / "x.jpg")


def test_a_repetition_that_lacks_seeds_is_refused(tiny_run, unfinished, refused, tmp_path):
    folder = tmp_path / "many"
    shutil.copytree(tiny_run, folder / "s0")
    (folder / "repeat.json").write_text('{"count": 3}')
    said = f"{folder} has 1 of its 3 runs; finish it: {shell_command('train', '--resume', folder)}; or name the runs"
    assert said in refused(1, "compare", folder)
    shutil.copytree(unfinished, folder / "s1")
    assert said in refused(1, "compare", folder)
    assert compare([folder / "s0"])["groups"][0]["n"] == 1
    (folder / "repeat.json").write_text("damaged")
    assert "1 of its 2 runs" in refused(1, "compare", folder)
    shutil.rmtree(folder / "s1")
    assert compare([folder])["groups"][0]["n"] == 1


def test_a_run_that_has_not_ended_is_refused(unfinished, refused):
    line = refused(1, "compare", unfinished)
    assert re.search(r"stands at epoch 1 of 2, step 1; finish it: cifar-resnet train --resume", line)


def test_folders_with_other_images_are_told_apart(own_images, tmp_path, no_figures):
    """By their names; by the images, where files of the same names hold other pixels at the same place. They are no seeds of one run."""
    fields = dict(epochs=1, peak_epoch=0.5, width=4, batch_size=24, precision="float32", mean=(0.5,) * 3, std=(0.2,) * 3)
    recipe = Recipe(dataset=str(own_images), **fields)
    train(recipe, tmp_path / "first")
    other = shutil.copytree(own_images, tmp_path / "other")
    Image.new("RGB", (40, 40)).save(other / "train" / "dark" / "0.png")
    train(recipe.replace(dataset=str(other), seed=1), tmp_path / "second")
    groups = compare([tmp_path / "first", tmp_path / "second"])["groups"]
    assert [group["differs"] for group in groups] == [{"dataset": str(own_images)}, {"dataset": str(other)}]
    shutil.rmtree(own_images)
    shutil.move(other, own_images)
    train(recipe.replace(seed=2), tmp_path / "third")
    groups = compare([tmp_path / "first", tmp_path / "third"])["groups"]
    assert [list(group["differs"]) for group in groups] == [["images"], ["images"]]


def test_a_run_given_twice_is_named(tiny_run, refused):
    assert f"{tiny_run} is given twice" in refused(2, "compare", tiny_run, tiny_run / "checkpoint.pt")
