"""What moves: rows printed for good above a line that lives, in a real pseudo-terminal; and when a run will end."""

import io
import os
import sys
import time

import pytest
import torch
from rich.console import Console
from rich.errors import LiveError

from cifar_resnet import Recipe, load_checkpoint, train
from cifar_resnet.data.datasets import load
from cifar_resnet.look import console, progress
from cifar_resnet.look.progress import Pace, TrainingTable
from cifar_resnet.training.engine import Epoch, Step

pyte = pytest.importorskip("pyte", reason="pyte is not installed")


class Terminal:
    """A pseudo-terminal, whose kernel echoes what is typed, and a screen that shows what is written to it."""

    def __init__(self, columns):
        import pty

        self.keyboard, self.tty = pty.openpty()
        os.set_blocking(self.keyboard, False)
        self.screen = pyte.Screen(columns, 24)
        self.stream, self.written = pyte.ByteStream(self.screen), b""
        file = open(self.tty, "w", encoding="utf-8")  # noqa: SIM115
        self.console = Console(file=file, width=columns, height=24, force_terminal=True, highlight=False, markup=False)

    def type(self, keys):
        os.write(self.keyboard, keys)
        time.sleep(0.3)  # longer than the line takes to be shown anew

    def lines(self):
        try:
            while more := os.read(self.keyboard, 65536):
                self.written += more
                self.stream.feed(more)
        except BlockingIOError:
            pass
        return [line.rstrip() for line in self.screen.display if line.strip()]


@pytest.fixture(params=[80])
def terminal(request, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("there are no pseudo-terminals here that hold enough of what nobody reads")
    shown = Terminal(request.param)
    monkeypatch.setattr(console, "console", shown.console)
    return shown


@pytest.fixture
def begun(tiny_run):
    """A table at the beginning of the tiny run's epochs; gives table, state and their metrics."""
    checkpoint = load_checkpoint(tiny_run)
    state = checkpoint.state(torch.device("cpu"))
    rows, state.history, state.epoch = state.history, [], 0
    table = TrainingTable()
    table.begin(checkpoint.recipe, tiny_run, checkpoint.environment, load(checkpoint.recipe), state)
    yield table, state, rows
    table.close()


def step(table, state, epoch, number):
    table.step(Step(epoch, number, 3, 0.1, torch.tensor(1.0)), state)


@pytest.mark.parametrize("keys", [b"x", b"\x03", b"q" * 20, b"\r"], ids=["key", "ctrl-c", "many", "enter"])
def test_what_is_typed_leaves_each_row_there_once(terminal, begun, keys):
    table, state, rows = begun
    for row in rows:
        for number in (1, 2, 3):
            step(table, state, row["epoch"], number)
        terminal.lines()
        terminal.type(keys)
        table.epoch(Epoch(row))
    table.close()
    lines = terminal.lines()
    assert len([line for line in lines if "train loss" in line]) == 1
    for row in rows:
        (line,) = [line for line in lines if line.startswith(f"{row['epoch']:5}  ")]
        assert f"{row['test_accuracy']:.2f} %" in line
    if keys in (b"x", b"\x03"):  # others leave the line as it was, and begin another
        assert not [line for line in lines if "evaluating" in line]


@pytest.mark.parametrize("terminal", [40, 80, 100, 140], indirect=True)
def test_the_table_and_its_line_fit_and_the_line_is_narrower(terminal, begun):
    table, state, rows = begun
    for number in (1, 2):
        step(table, state, 1, number)
    table.epochs_done = 0
    table.epoch(Epoch(rows[0]))
    step(table, state, 2, 1)
    columns = terminal.console.width
    live = Console(file=io.StringIO(), width=columns)
    live.print(table.live.render())
    assert len(live.file.getvalue().rstrip("\n").rstrip()) <= columns - 4
    head = next(line for line in terminal.lines() if "test acc" in line)
    assert head.endswith("images/s" if columns >= 80 else "acc")
    assert len(head) <= columns


def test_where_rich_shows_one_line_at_a_time_a_second_run_goes_without(monkeypatch):
    """As Rich before 14.1."""

    def refuse(self, refresh):
        raise LiveError("Only one live display may be active at once")

    monkeypatch.setattr(progress.Live, "start", refuse)
    monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_terminal=True))
    line = progress.LiveLine(lambda: progress.Line(0.5, [["half"]]))
    line.update()
    line.close()
    assert console.console.file.getvalue() == ""


def test_the_line_tells_of_the_epoch_under_way(begun, monkeypatch):
    table, state, rows = begun
    shown = lambda: table.line().fitted(76)  # noqa: E731
    table.live = progress.LiveLine(table.line)  # as on a terminal
    assert shown() == "epoch 1/2"
    state.totals.copy_(torch.tensor([47.0, 35.0]))
    now = [100.0, 101.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    step(table, state, 1, 1)
    now[0] += 1.0
    step(table, state, 1, 2)
    # 70 images in three steps: 24 in the first, which is not timed, and 23 in the second
    assert shown().startswith("epoch 1/2 · loss 1.00 · acc 74.5 % · 23 images/s · ends in ")
    step(table, state, 1, 3)
    assert shown().startswith("epoch 1/2 · evaluating · ends in ")
    monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_jupyter=False))
    table.columns = progress._columns("test", 80)
    table.epoch(Epoch(rows[0]))
    assert shown().startswith("epoch 2/2 · ends in ")
    assert table.line().share == 0


def test_loss_and_accuracy_so_far_are_those_of_the_epoch(tiny_recipe, tmp_path, terminal, no_figures):
    """At its last step they are what the epoch reports."""
    seen = []

    class Watched(TrainingTable):
        def step(self, step, state):
            self.glance.every = 0.0
            super().step(step, state)
            if step.step == step.steps:
                (_, _), (loss, hits) = self.glance.arrived
                seen.append((loss / 70, 100 * hits / 70))

    with Watched() as table:
        history = train(tiny_recipe, tmp_path, watcher=table).history
    assert seen == [pytest.approx((row["train_loss"], row["train_accuracy"])) for row in history]


@pytest.mark.parametrize("sam_share", [0.0, 0.3, 1.0])
def test_the_end_is_foretold_with_evaluations_and_steps_of_double_cost(sam_share):
    """Of a run whose steps take 2 s, or 4 s, and whose evaluations take 7 s."""
    recipe, images = Recipe(epochs=5, peak_epoch=2, batch_size=10, sam_share=sam_share), [10] * 9 + [4]
    sharp = [number >= round(50 * (1 - sam_share)) for number in range(50)]
    total = sum(4 if each else 2 for each in sharp) + 5 * 7
    pace, now, seconds = Pace(recipe, images, evaluated=20), 0.0, []
    for epoch in range(1, 6):
        for number in range(1, 11):
            now += 4 if sharp[(epoch - 1) * 10 + number - 1] else 2
            pace.step(epoch, number, now)
            seconds.append(pace.left(epoch - 1, now))
            assert pace.left(epoch - 1, now + 1) in (None, pytest.approx(max((seconds[-1] or 0) - 1, 0)))
            if epoch > 1:
                assert seconds[-1] == pytest.approx(total - now)
        if epoch > 1:
            assert pace.speed(10) == pytest.approx(94 / sum(4 if each else 2 for each in sharp[epoch * 10 - 10 : epoch * 10]))
        now += 7
        pace.evaluated(now)
    assert seconds[0] is None  # the first step warms up
    assert pace.left(5, now) == 0


def test_a_closed_terminal_does_not_end_a_run(tiny_recipe, tmp_path, monkeypatch, no_figures):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(console, "console", Console(file=Closed(), force_terminal=True, width=80))
    with TrainingTable() as table:
        assert train(tiny_recipe, tmp_path, watcher=table).finished


def test_a_bar_is_gone_when_its_job_is_done(terminal):
    with progress.telling(True, "measuring", "rounds", 6) as tell:
        tell(5)
        time.sleep(0.3)
        assert "measuring · 5 of 6 rounds" in terminal.lines()[-1]
        tell(6)
    assert terminal.lines() == []


def test_a_bar_tells_of_images_whose_reading_takes_longer_than_a_second(terminal, monkeypatch):
    clock, table = iter((10.0, 10.0, 11.0)), TrainingTable()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 12.0))
    for done in (1, 2):  # at 10 and 11 seconds
        table.reading(done, 40)
        assert terminal.lines() == []
    table.reading(10, 40)
    assert "reading · 10 of 40 images · 6.0 s left" in terminal.lines()[-1]
    table.reading(40, 40)
    assert terminal.lines() == []
    table.reading(1, 8)  # the evaluation images, from now on
    assert terminal.lines() == []


def test_neither_a_terminal_nor_quiet_wants_lines_of_a_long_job(terminal, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for shown in (terminal.console, Console(file=io.StringIO(), quiet=True)):
        monkeypatch.setattr(console, "console", shown)
        with progress.telling(None, "measuring", "rounds", 6) as tell:
            clock[0] += 121
            tell(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("asked", [None, True, False])
def test_without_a_terminal_a_long_job_is_told_of_every_two_minutes_on_standard_error(asked, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress.telling(asked, "measuring", "rounds", 6) as tell:
        for done, seconds in ((1, 60), (2, 60), (3, 60), (4, 60)):  # 60, 120, 180 and 240 seconds after the beginning
            clock[0] += seconds
            tell(done)
    expected = "".join(f"cifar-resnet: measuring · {done} of 6 rounds · {left} min left\n" for done, left in ((2, 4), (4, 2)))
    assert capsys.readouterr() == ("", "" if asked is False else expected)


def test_without_a_terminal_a_long_epoch_is_told_of_every_two_minutes(begun, capsys, monkeypatch):
    table, state, rows = begun
    state.totals.copy_(torch.tensor([47.0, 35.0]))
    clock = [table.printed]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    said = []
    for number, seconds in ((1, 60), (2, 61), (3, 100)):  # 60, 121 and 221 seconds after the beginning
        clock[0] += seconds
        capsys.readouterr()
        step(table, state, 1, number)
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] == ""
    assert said[1].startswith("epoch 1/2 · loss 1.00 · acc 74.5 % · 0 images/s · ends in ")
    clock[0] += 30
    table.epoch(Epoch(rows[0]))
    assert capsys.readouterr().out.startswith("epoch  1  LR")
    clock[0] += 110  # since the line of the epoch
    step(table, state, 2, 1)
    assert capsys.readouterr().out == ""


def test_in_a_notebook_the_table_is_one_output_that_changes(tiny_recipe, tmp_path, monkeypatch, no_figures):
    pytest.importorskip("IPython", reason="IPython is not installed")
    shown = []

    class Handle:
        def update(self, content):
            shown[-1].append(content.data)

    def display(content, display_id):
        assert display_id
        shown.append([content.data])
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_jupyter=True, width=100))
    monkeypatch.setattr("rich.jupyter.display", lambda *text: None)
    with TrainingTable() as table:
        history = train(tiny_recipe, tmp_path, watcher=table, progress=False).history
    (states,) = shown
    assert "epoch 1/2" in states[0]
    assert "epoch 2/2" not in states[-1]  # what moved is gone
    for row in history:
        assert states[-1].count(f"{row['test_accuracy']:.2f} %") >= 1
