"""When a job shows its course."""

import pytest

from cifar_resnet.look import progress


@pytest.fixture
def line(monkeypatch):
    """What the line of a job is told, in place of a terminal."""
    told = []

    class Fake:
        def __init__(self, line):
            self.line = line

        def update(self, *_, **__):
            told.append(self.line().wordings[0])

        def close(self):
            told.append("closed")

    monkeypatch.setattr(progress, "LiveLine", Fake)
    return told


@pytest.mark.parametrize(("asked", "visible", "is_shown"), [(None, True, True), (False, True, False), (True, True, True)])
def test_a_line_is_shown_where_it_is_asked_for_or_seen(asked, visible, is_shown, line, monkeypatch):
    monkeypatch.setattr(progress, "visible", lambda: visible)
    with progress.telling(asked, "measuring", "rounds", 9) as told:
        told(3)
    assert bool(line) == is_shown
    assert not is_shown or (line[0][:2], line[-2]) == (["measuring", "3 of 9 rounds"], "closed")


def test_a_function_is_told_in_place_of_a_line(line):
    heard = []
    with progress.telling(lambda *numbers: heard.append(numbers), "learning rate", "steps") as told:
        told(3, 10)
    assert (heard, line) == ([(3, 10)], [])


@pytest.mark.parametrize(("terminal", "notebook"), [(False, False), (True, False), (False, True)])
def test_terminals_and_notebooks_are_seen(terminal, notebook, monkeypatch):
    monkeypatch.setattr(progress.console, "console", type("", (), {"is_terminal": terminal, "is_jupyter": notebook}))
    assert progress.visible() == (terminal or notebook)
