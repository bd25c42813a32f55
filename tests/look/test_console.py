"""What is printed: on a terminal, without one, and nothing at all."""

import io
import re

import pytest
from rich.console import Console

from cifar_resnet import Recipe
from cifar_resnet.look import analysis, console


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 120 columns; gives what it shows so far, without colours and movements of the cursor."""
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=120, height=12, highlight=False))
    return lambda: re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())


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


def test_prose_is_wrapped_between_words_and_a_path_stays_whole(monkeypatch):
    path, shown = "/a" * 40, io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=40, highlight=False))
    console.say(f"one two three four five six seven eight nine {path} is not empty; go on: cifar-resnet train --resume {path}")
    lines = shown.getvalue().splitlines()
    assert lines[0] == "one two three four five six seven eight"
    assert f"{path}" in lines
    assert lines[-1] == f"  cifar-resnet train --resume {path}"
    assert all(len(line) <= 40 or path in line for line in lines)
