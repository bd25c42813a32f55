"""The job: its files, its sweep, and what the command says. What is read off a range test is in training/test_lr_finder.py."""

import json
import re

import numpy as np
import pytest

from cifar_resnet import Recipe, find_lr, load_checkpoint, train
from cifar_resnet.data.datasets import load, with_statistics
from cifar_resnet.errors import CifarResnetError, UsageError
from cifar_resnet.jobs import find_lr as job
from cifar_resnet.jobs.find_lr import with_found_lr
from cifar_resnet.training.lr_finder import History, Suggestions, Trial, suggest

SMALL = ("--dataset", "digits", "--train-limit", 48, "--batch-size", 16, "--width", 4)


@pytest.fixture
def found_at_once(monkeypatch):
    """A range test and trials that need no training; gives the list of calls of the trials."""
    lr, tried = np.geomspace(1e-4, 10, 200), []
    loss = np.interp(np.log10(lr), [-4, -3, -1, 0, 1], [2, 2, 1, 1, 5])
    trials = [Trial(0.03, 1.0), Trial(0.06, 0.9), Trial(0.12, 1.0)]
    monkeypatch.setattr("cifar_resnet.jobs.find_lr.range_test", lambda *arguments, **options: History(lr, loss))
    monkeypatch.setattr("cifar_resnet.jobs.find_lr.run_trials", lambda *arguments, **options: tried.append(options) or trials)
    return tried


def test_the_files_hold_what_was_found(tmp_path):
    recipe = Recipe.build("digits", train_limit=64, batch_size=16, precision="float32", width=4)
    options, steps = dict(start_lr=1e-3, end_lr=0.1, num_iter=24, trial_steps=0), []
    history, found, trials, sweep, _ = find_lr(recipe, tmp_path, **options, progress=lambda *numbers: steps.append(numbers))
    assert (steps[-1], trials, sweep) == ((24, 24), [], [])
    assert len(history.lr) == 24
    content = json.loads((tmp_path / "lr_finder.json").read_text("utf-8"))
    assert content["history"] == {"lr": history.lr.tolist(), "loss": history.loss.tolist()}
    assert content["suggestions"] == found._asdict() == suggest(history)._asdict()
    assert content["recipe"] == with_statistics(recipe).to_dict()
    assert {name: content[name] for name in options} == options
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_printed_meanwhile_is_seen_and_the_library_prints_nothing(capsys):
    recipe = Recipe.build("digits", train_limit=32, batch_size=16, width=4)
    options = dict(start_lr=1e-3, end_lr=0.1, num_iter=20, trial_steps=0)
    find_lr(recipe, **options, progress=lambda done, total: print(done, "of", total))
    shown = capsys.readouterr().out.splitlines()
    assert {f"{done} of 20" for done in range(21)} == set(shown)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.build("digits", train_limit=32, batch_size=16, width=4)
    assert len(find_lr(recipe, start_lr=1e-3, end_lr=0.1, num_iter=20, trial_steps=0).history.lr) == 20
    assert list(tmp_path.iterdir()) == []


def test_every_training_starts_by_the_training_images_where_the_recipe_whitens(monkeypatch):
    looked, recipe = [], Recipe.build("digits", train_limit=64, batch_size=16, width=4, init="whiten", epochs=2)
    monkeypatch.setattr("cifar_resnet.training.engine.whiten", lambda model, recipe, images: looked.append(images))
    for module in ("training.lr_finder", "jobs.find_lr"):
        monkeypatch.setattr(f"cifar_resnet.{module}.suggest", lambda *_: Suggestions(0.1, 0.1, 0.1, 0.1, 0.05))
    found = find_lr(recipe, start_lr=1e-3, end_lr=0.1, num_iter=20, trial_steps=20, sweep=1)
    assert len(looked) == 1 + len(found.trials) + len(found.sweep) > 8
    holdout = 10  # of the sweep: one image a class
    trained = load(recipe.replace(holdout=holdout)).train.images
    assert all(np.array_equal(images, trained) for images in looked)


def test_what_two_readings_of_the_images_say_is_said_once(own_images, found_at_once, monkeypatch):
    for path in list(own_images.glob("train/dark/*"))[1:]:
        path.unlink()
    (own_images / "train" / "bright" / "notes.txt").write_text("no image")
    monkeypatch.setattr("cifar_resnet.jobs.find_lr.engine.train", lambda *arguments: iter(()))
    said, recipe = [], Recipe.build(dataset=str(own_images), batch_size=8, max_lr=0.02, width=4)
    find_lr(recipe, sweep=1, notify=said.append)
    assert len([line for line in said if "1 file is no image" in line]) == 1
    assert len([line for line in said if "a single training image in dark" in line]) == 1


def test_find_lr_with_trials_from_the_command_line(cli, tmp_path, no_figures):
    fast = ("--width", 4, "--logit-scale", 1, "--init", "dirac")  # so that a bottom shows within 100 steps
    options = ("--train-limit", 300, "--batch-size", 16, "--precision", "float32", "--trial-steps", 20, "--workers", 0)
    code, out, err = cli("find-lr", "--dataset", "digits", *fast, *options, "--loader", "albumentations", "--run-dir", tmp_path)
    assert (code, err) == (0, "")
    content = json.loads((tmp_path / "lr_finder.json").read_text("utf-8"))
    history = History(*(np.array(content["history"][key]) for key in ("lr", "loss")))
    trials = [Trial(row["max_lr"], np.inf if row["loss"] is None else row["loss"]) for row in content["trials"]]
    assert content["trial_steps"] == 20
    assert 3 <= len(trials) <= 6
    assert content["run_steps"] == 8 * 19
    assert suggest(history, trials, 8 * 19 / 20)._asdict() == content["suggestions"]
    assert "short trainings of 20 steps" in out
    for trial in trials:
        assert re.search(rf"^ *{re.escape(f'{trial.max_lr:.3g}')} +{trial.loss:.3f}", out, re.MULTILINE)
    found = content["suggestions"]
    if found["max_lr"] is None:
        assert f"no LR is recommended: {found['why_not']}" in out
    else:
        assert f"--max-lr {found['max_lr']:.3g} --batch-size 16 --div-factor {found['max_lr'] / found['min_lr']:.3g}" in out


def test_a_sweep_gives_what_train_gives(cli, tmp_path, found_at_once, no_figures):
    fields = dict(train_limit=32, batch_size=16, precision="float32", width=4)
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", value)]
    options += ["--dataset", "digits", "--num-iter", 24, "--trial-steps", 20, "--sweep", 1, "--run-dir", tmp_path / "find"]
    code, out, err = cli("find-lr", *options)
    assert (code, err) == (0, "")
    assert found_at_once[0]["steps"] == 20
    content = json.loads((tmp_path / "find" / "lr_finder.json").read_text("utf-8"))
    grid = [row["max_lr"] for row in content["sweep"] if row["rule"] == "grid"]
    of_its_length = 0.06 * (2 / 20) ** 0.2  # one epoch of 32 - 10 images
    np.testing.assert_allclose(grid, of_its_length * 2.0 ** np.arange(-3, 4))
    assert content["suggestions"]["max_lr"] == pytest.approx(0.06 * (16 / 20) ** 0.2)
    assert content["sweep"][-1]["max_lr"] == pytest.approx(of_its_length)
    assert "recommended at this length" in out
    for row in (content["sweep"][2], content["sweep"][-1]):
        recipe = Recipe.build(
            "digits", **fields, holdout=10, epochs=1, max_lr=row["max_lr"], div_factor=row["max_lr"] / row["min_lr"]
        )
        last = train(recipe, tmp_path / str(row["max_lr"]), compile="off").history[-1]
        assert (row["accuracy"], row["loss"]) == (last["test_accuracy"], pytest.approx(last["test_loss"]))
        assert f"{row['accuracy']:.2f} %" in out


def test_a_recommendation_is_for_the_whole_run_whose_images_a_sweep_does_not_hold_out(tmp_path, found_at_once, monkeypatch, no_figures):
    """1,437 images in batches of 16 are 90 steps."""
    monkeypatch.setattr("cifar_resnet.jobs.find_lr.engine.train", lambda *arguments: iter(()))
    recipe = Recipe.build("digits", batch_size=16, width=4)
    recommended = [find_lr(recipe, tmp_path, trial_steps=20, sweep=sweep).suggestions.max_lr for sweep in (None, 1)]
    assert recommended == [pytest.approx(0.06 * (8 * 90 / 20) ** 0.2)] * 2
    assert json.loads((tmp_path / "lr_finder.json").read_text("utf-8"))["run_steps"] == 8 * 90


def test_the_recipe_at_what_was_found():
    found = Suggestions(steepest=3.0, valley=0.2, minimum_tenth=0.05, max_lr=0.06, min_lr=0.002)
    best = with_found_lr(Recipe(), found)
    assert (best.max_lr, best.div_factor) == (0.06, pytest.approx(30))
    for rule, lr in (("steepest", 3.0), ("valley", 0.2), ("minimum", 0.05)):
        assert with_found_lr(Recipe(), found, rule) == Recipe(max_lr=lr)
    nothing = found._replace(max_lr=None, min_lr=None, why_not="it never fell")
    with pytest.raises(CifarResnetError, match=r"no LR is recommended: it never fell \(of find-lr\), or give --max-lr a number"):
        with_found_lr(Recipe(), nothing)
    assert with_found_lr(Recipe(), nothing, "steepest").max_lr == 3.0
    with pytest.raises(UsageError, match="--suggest best"):
        with_found_lr(Recipe(), found, "best")


def test_train_with_max_lr_find_uses_both_ends(cli, tmp_path, found_at_once, no_figures):
    longer = (3 / 50) ** 0.2  # a run of three steps, trials of 50
    code, out, _ = cli("train", *SMALL, "--epochs", 1, "--max-lr", "find", "--run-dir", tmp_path / "run")
    assert code == 0
    recipe = load_checkpoint(tmp_path / "run").recipe
    assert recipe.max_lr == pytest.approx(0.06 * longer)
    assert recipe.max_lr / recipe.div_factor == pytest.approx(0.01, rel=0.1)  # where half of the fall is done
    assert f"found: LR from {recipe.max_lr / recipe.div_factor:.3g} to {recipe.max_lr:.3g}" in out
    options = ("--epochs", 1, "--max-lr", "find", "--suggest", "minimum", "--run-dir", tmp_path / "other")
    assert cli("train", *SMALL, *options)[0] == 0
    recipe = load_checkpoint(tmp_path / "other").recipe
    assert 0.01 < recipe.max_lr < 0.2
    assert recipe.div_factor == Recipe().div_factor
    assert len(found_at_once) == 1  # another rule needs no trials


def test_a_folder_that_is_in_use_is_refused_before_the_search(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(job, "range_test", pytest.fail)
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty" in refused(1, "train", *SMALL, "--max-lr", "find", "--run-dir", tmp_path)
    assert "cannot be made" in refused(1, "find-lr", *SMALL, "--run-dir", tmp_path / "notes.txt" / "find")


def test_a_test_that_diverges_at_once_is_a_clear_error(refused, tmp_path):
    line = refused(
        1, "find-lr", *SMALL, "--start-lr", 1e6, "--end-lr", 1e30, "--num-iter", 25, "--run-dir", tmp_path / "find",
        "--precision", "float32",
    )  # fmt: skip
    assert "points" in line
    assert "--start-lr" in line
    assert not (tmp_path / "find").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--start-lr", 1, "--end-lr", 0.1), ("--start-lr", -1), ("--num-iter", 5), ("--step-mode", "cos"), ("--trial-steps", 3),
        ("--sweep", 0), ("--format", "gif"),
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(refused, options):
    assert options[0] in refused(2, "find-lr", "--dataset", "digits", *options)
