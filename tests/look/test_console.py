"""What is printed: on a terminal, without one, and nothing at all."""

import io
import re

import pytest
import torch
from rich.console import Console

from cifar_resnet import Recipe, load_checkpoint
from cifar_resnet.data.datasets import load
from cifar_resnet.look import analysis, console
from cifar_resnet.training.engine import Epoch, Step


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 120 columns; gives what it shows so far, without colours and movements of the cursor."""
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=120, height=12, highlight=False))
    return lambda: re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())


def test_on_a_terminal_there_is_a_table_with_a_row_an_epoch(tiny_run, screen):
    checkpoint = load_checkpoint(tiny_run)
    state = checkpoint.state(torch.device("cpu"))
    rows, state.history = state.history, []
    with console.TrainingTable() as table:
        table.begin(checkpoint.recipe, tiny_run, checkpoint.environment, load(checkpoint.recipe), state)
        for row in rows:
            table.step(Step(row["epoch"], 1, 3, 0.1, torch.tensor(1.0)), state)
            table.epoch(Epoch(row))
    for row in rows:
        assert f"{row['test_accuracy']:.2f} %" in screen()
    assert "images/s" in screen()
    assert "sharpness-aware steps, at half the speed, after epoch 1.2" in screen()
    assert "going on after epoch 2, step 0" in screen()


def test_a_long_run_shows_its_last_rows_above_the_bar_and_all_of_them_at_the_end(tiny_run, screen):
    checkpoint = load_checkpoint(tiny_run)
    state = checkpoint.state(torch.device("cpu"))
    row = state.history[-1]
    state.history = []
    table = console.TrainingTable()
    table.begin(checkpoint.recipe, tiny_run, checkpoint.environment, load(checkpoint.recipe), state)
    for epoch in range(1, 21):
        table.epoch(Epoch({**row, "epoch": epoch, "lr": epoch / 1000}))
    during = io.StringIO()
    Console(file=during, width=120).print(table.screen())
    assert re.findall(r"0\.0\d\d00", during.getvalue()) == [f"{epoch / 1000:.5f}" for epoch in range(14, 21)]  # 12 lines high
    table.__exit__()
    after = io.StringIO()
    Console(file=after, width=120).print(table.screen())
    assert re.findall(r"0\.0\d\d00", after.getvalue()) == [f"{epoch / 1000:.5f}" for epoch in range(1, 21)]


def test_the_summary_ends_with_its_totals(screen):
    console.summary(analysis.summary(Recipe.build(width=4), 2))
    assert re.search(r"default: 26,\d{3} parameters, 0\.00 G multiply-adds for a batch of 2", screen())
    assert "prep.0" in screen()


def test_quiet_prints_nothing(tiny_run, tmp_path, cli, monkeypatch, no_figures):
    monkeypatch.setattr(console.console, "quiet", False)  # as it is again afterwards
    assert cli("--quiet", "evaluate", tiny_run, "--run-dir", tmp_path) == (0, "", "")
    assert (tmp_path / "evaluation.json").exists()


def test_brackets_in_a_message_are_no_markup():
    with console.console.capture() as captured:
        console.say("written in [bold]here[/bold] :smile:")
    assert captured.get() == "written in [bold]here[/bold] :smile:\n"
