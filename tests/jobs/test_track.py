import csv
import re
from pathlib import Path

import pytest
from run_helpers import StopAfter

from cifar_resnet import CifarResnetError, Recipe, Watchers, load_checkpoint, track, train
from cifar_resnet.errors import UsageError
from cifar_resnet.jobs.interrupt import Interrupted

TINY = ("--dataset", "digits", "--train-limit", 48, "--test-limit", 20, "--batch-size", 16, "--width", 4, "--epochs", 1)


def read(run):
    """What TensorBoard itself reads: (step, value) of every scalar by tag; tags of images."""
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, sorted(events.Tags()["images"]), events


def test_tensorboard_shows_steps_epochs_recipe_and_pictures(tiny_recipe, tmp_path, no_figures):
    """A run that was stopped in its second epoch and resumed shows every step once."""
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    heard = []

    class Hearing(StopAfter):
        def step(self, step, state):
            heard.append((3 * (step.epoch - 1) + step.step, step.lr, float(step.loss)))
            super().step(step, state)

    with pytest.raises(Exception, match="stopped by SIGINT"), Watchers(Hearing(4), track("tensorboard")) as watcher:
        train(tiny_recipe, tmp_path / "run", watcher=watcher)
    with Watchers(track("tensorboard"), Hearing(99)) as watcher:
        history = train(resume=tmp_path / "run", watcher=watcher).history
    scalars, pictures, events = read(tmp_path / "run")
    assert scalars["step/loss"] == [(step, pytest.approx(loss)) for step, _, loss in heard]
    assert scalars["step/LR"] == [(step, pytest.approx(lr)) for step, lr, _ in heard]
    assert [step for step, _, _ in heard] == [1, 2, 3, 4, 5, 6]
    for tag in ("train/loss", "train/accuracy", "test/loss", "test/accuracy"):
        assert scalars[tag] == [(3 * row["epoch"], pytest.approx(row[tag.replace("/", "_")])) for row in history]
    assert pictures == ["curves", "learning rate"]
    fields = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"sam_radius" in fields


def test_one_tracker_keeps_two_runs_apart(tiny_recipe, tmp_path, no_figures):
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    with track("tensorboard") as watcher:
        with pytest.raises(Interrupted):
            train(tiny_recipe, tmp_path / "a", watcher=Watchers(watcher, StopAfter(2)))
        train(tiny_recipe.replace(seed=1), tmp_path / "b", watcher=watcher)
    steps = [[step for step, _ in read(tmp_path / name)[0]["step/loss"]] for name in "ab"]
    assert steps == [[1, 2], [1, 2, 3, 4, 5, 6]]


def test_what_shall_track_is_asked_for_before_training(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    line = refused(1, "train", *TINY, "--track", "tensorboard", "--run-dir", tmp_path / "run")
    assert 'pip install "cifar-resnet[track]"' in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(CifarResnetError, match="needs the package tensorboard"):
        track("tensorboard")
    with pytest.raises(UsageError, match="--track mlflow: it is tensorboard"):
        track("mlflow")


def test_the_command_tracks_a_run_and_every_run_of_a_repetition(tmp_path, cli, no_figures, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra track is not installed")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", lambda *_: None)
    code, _, err = cli("train", *TINY, "--track", "tensorboard", "--repeat", 2, "--run-dir", tmp_path / "two")
    assert (code, err) == (0, "")
    for seed in ("s0", "s1"):
        scalars, *_ = read(tmp_path / "two" / seed)
        assert [step for step, _ in scalars["step/loss"]] == [1, 2, 3]
        assert len(scalars["test/accuracy"]) == 1


def test_the_table_of_the_epochs_is_that_of_the_metrics(tiny_run):
    with open(tiny_run / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == load_checkpoint(tiny_run).history


def test_the_tracker_shown_in_the_documentation_works(tmp_path, no_figures):
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text("utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "(Watcher)" in block]
    names = {}
    exec(code.split("\nwith ")[0], names)
    (shown,) = [each for name, each in names.items() if isinstance(each, type) and name not in ("Watcher", "Recipe")]
    recipe = Recipe.build(dataset="digits", width=4, epochs=1, batch_size=16, train_limit=48, test_limit=20)
    with shown(tmp_path / "log.jsonl") as watcher:
        train(recipe, tmp_path / "run", watcher=watcher)
    lines = (tmp_path / "log.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 3 + 1
    assert len(code.split("\nwith ")[0].strip().splitlines()) <= 30
