import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from rich.console import Console

from cifar_resnet import Recipe, console, figures, load_checkpoint, results
from cifar_resnet import train as train_run
from cifar_resnet.data import with_statistics
from cifar_resnet.errors import CifarResnetError, UsageError


@pytest.fixture(scope="module")
def three_runs(tiny_run, tiny_recipe, tmp_path_factory):
    """Two seeds of the tiny recipe, and one run at another learning rate."""
    folder = tmp_path_factory.mktemp("three")
    train_run(tiny_recipe.replace(seed=1), folder / "seed1")
    train_run(tiny_recipe.replace(max_lr=0.01), folder / "slow")
    return [tiny_run, folder / "seed1", folder / "slow"]


def test_runs_that_differ_only_in_the_seed_are_one_group(three_runs, tmp_path, cli):
    content = results.compare(three_runs, tmp_path / "c.svg")
    assert b"<svg" in (tmp_path / "c.svg").read_bytes()
    code, out, _ = cli("compare", *three_runs, "--output", tmp_path / "d.png", "--json")
    assert (code, json.loads(out)) == (0, content)
    last = [load_checkpoint(run).history[-1]["test_accuracy"] for run in three_runs]
    both, alone = content["groups"]
    assert (both["n"], both["mean"]) == (2, pytest.approx(np.mean(last[:2])))
    assert both["std"] == pytest.approx(np.std(last[:2], ddof=1))
    assert (alone["n"], alone["mean"], alone["std"]) == (1, pytest.approx(last[2]), None)
    assert [group["differs"] for group in content["groups"]] == [{"max_lr": 0.1}, {"max_lr": 0.01}]
    axis = figures.comparison(content["groups"], "test").axes[0]
    by_run = [[row["test_accuracy"] for row in load_checkpoint(run).history] for run in three_runs]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx(np.mean(by_run[:2], axis=0))
    assert axis.lines[1].get_ydata().tolist() == by_run[2]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[0].startswith("digits: max_lr 0.1: ")
    assert labels[0].endswith("%, n = 2")


def test_compare_on_the_command_line(three_runs, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "console", Console(width=120, highlight=False))
    code, out, err = cli("compare", *three_runs, "--output", tmp_path / "c.png")
    assert (code, err) == (0, "")
    assert "max_lr 0.01" in out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_refused(tiny_run, tiny_recipe, refused, tmp_path):
    train_run(tiny_recipe.replace(holdout=40, epochs=2), tmp_path / "held")
    assert "cannot be compared" in refused(2, "compare", tiny_run, tmp_path / "held")
    assert "given twice" in refused(2, "compare", tiny_run, tiny_run / "checkpoint.pt")
    shutil.copytree(tiny_run, tmp_path / "copy")
    assert "one recipe and one seed" in refused(2, "compare", tiny_run, tmp_path / "copy")
    assert "there is no checkpoint" in refused(1, "compare", tmp_path)
    assert "must end in" in refused(2, "compare", tiny_run, "--output", tmp_path / "x.jpg")


@pytest.fixture
def unfinished(tiny_recipe, tmp_path):
    """A run stopped in its second epoch, saved at the last step of its first."""

    class Stop(Exception):
        pass

    from cifar_resnet import Watcher

    class Stopping(Watcher):
        def step(self, step, state):
            if step.epoch == 2:
                raise Stop

    with pytest.raises(Stop):
        train_run(tiny_recipe, tmp_path / "run", save_every_minutes=1e-9, watcher=Stopping())
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_run_that_has_not_ended_is_refused(command, unfinished, refused):
    line = refused(1, command, unfinished)
    assert re.search(r"stands at epoch 0 of 2; finish it: cifar-resnet train --resume", line)


def test_the_command_repeats_the_run(cli, tmp_path):
    options = ("--dataset", "digits", "--train-limit", 48, "--test-limit", 20, "--batch-size", 16, "--epochs", 1, "--seed", 3)
    options += ("--no-nesterov", "--mean", 0.1, 0.2, 0.3)
    assert cli("train", *options, "--run-dir", tmp_path / "a")[0] == 0
    recipe = load_checkpoint(tmp_path / "a").recipe
    words = results.command(recipe).split()
    assert words[:2] == ["cifar-resnet", "train"]
    assert cli(*words[1:], "--run-dir", tmp_path / "b")[0] == 0
    assert load_checkpoint(tmp_path / "b").recipe == recipe
    assert results.command(with_statistics(Recipe.build("page"))) == "cifar-resnet train --recipe page"
    assert results.command(Recipe.build("digits", max_lr=0.2)) == "cifar-resnet train --recipe digits --max-lr 0.2"


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    return results.report(tiny_run, tmp_path_factory.mktemp("page") / "report.html")


def test_the_report_holds_the_figures_and_needs_nothing_beside_it(page, tiny_run):
    html = page.read_text()
    assert f"{load_checkpoint(tiny_run).history[-1]['test_accuracy']:.2f} %" in html
    assert "n = 1 run, seed 0" in html
    assert results.command(load_checkpoint(tiny_run).recipe) in html
    assert "<script" not in html
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', html)) == {"data:"}
    for data in re.findall(r"image/png;base64,([^\"]+)", html):
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"\$\w+", html)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_the_screen_in_chromium(page, width, tmp_path):
    chromium = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    probe = """<script>addEventListener("load", () => {
      const frame = document.querySelector("iframe"), inner = frame.contentDocument, images = [...inner.images];
      document.title = [inner.documentElement.scrollWidth, images.length, images.filter(i => i.complete && i.naturalWidth).length];
    });</script>"""
    frame = f'<iframe src="report.html" style="border: 0; width: {width}px; height: 5000px"></iframe>'
    (tmp_path / "probe.html").write_text(f"<body style='margin: 0'>{frame}{probe}")
    shutil.copy(page, tmp_path / "report.html")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=5000")
    command = [chromium, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "probe.html")]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    scroll_width, images, loaded = map(int, re.search(r"<title>(\d+),(\d+),(\d+)</title>", dom).groups())
    assert scroll_width <= width
    assert images == loaded >= 5


def test_a_missing_run_is_one_line(refused, tmp_path):
    assert "there is no checkpoint" in refused(1, "report", tmp_path / "nowhere")
    with pytest.raises(CifarResnetError):
        results.report(tmp_path)
    assert issubclass(UsageError, CifarResnetError)
