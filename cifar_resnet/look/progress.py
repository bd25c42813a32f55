"""What moves while something runs: the table of a training, and one line below it, in a terminal or in a notebook."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.errors import LiveError
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..recipe import Recipe
from . import console
from .console import print_lines, replace_unencodable, say, warn
from .words import count_of, duration, plural, time_left

if TYPE_CHECKING:  # torch stays out of what only prints
    from ..data.splits import Data
    from ..training.engine import Epoch, State, Step
    from ..training.runtime import Glance

Told = Callable[..., None]
MARGIN = 4  # columns that the line leaves free: a key pressed there is wiped with the line
SILENCE = 120.0  # seconds between two lines of what is under way, where nothing moves


class Line(NamedTuple):
    """What a line shows: a share done, in 0 to 1, and wordings of it, of which the first one that fits is taken."""

    share: float
    wordings: Sequence[Sequence[str]]

    def fitted(self, width: int) -> str:
        texts = [" · ".join(filter(None, parts)) for parts in self.wordings]
        return next((text for text in texts if len(text) <= width), texts[-1][:width])


class LiveLine:
    """One line below all that is printed, shown four times a second until it is closed, and then wiped.

    In a notebook it is shown by `update`, below the lines that it is given; elsewhere not at all.
    """

    def __init__(self, line: Callable[[], Line]) -> None:
        self.line, self.updated = line, 0.0
        self.live: Live | None = None
        self.cell: Any = None  # of a notebook, with what it shows
        if console.console.is_terminal and not console.console.is_jupyter:
            self.live = _Live(console=console.console, get_renderable=self.render, refresh_per_second=4, transient=True)
            with suppress(OSError, LiveError):  # before Rich 14.1 only one line at a time is shown
                self.live.start(refresh=True)

    def render(self) -> Table:
        line, width = self.line(), console.console.width - MARGIN
        text = line.fitted(width)
        shown, room = Table.grid(padding=(0, 1)), min(width - len(text) - 1, 30)
        bar = [ProgressBar(total=1.0, completed=line.share, width=room)] if room >= 8 else []
        shown.add_row(*bar, Text(text, no_wrap=True))
        return shown

    def update(self, above: Sequence[str] = (), last: bool = False) -> None:
        """Shows a notebook the lines above and this one, or the lines alone where they are the last."""
        if not console.console.is_jupyter or (time.monotonic() - self.updated < 0.5 and not last):
            return
        from IPython.display import HTML, display

        self.updated = time.monotonic()
        lines = [*above, *([] if last else [self.line().fitted(120)])]
        shown = HTML(f'<pre style="line-height: 1.3">{html.escape(chr(10).join(lines))}</pre>')
        if self.cell is None:
            self.cell = display(shown, display_id=True)
        else:
            self.cell.update(shown)

    def close(self) -> None:
        if self.live:
            with suppress(OSError):
                self.live.stop()


class _Live(Live):
    def refresh(self) -> None:
        with suppress(OSError):
            super().refresh()


@contextmanager
def telling(asked: Told | bool | None, what: str, unit: str, total: int | None = None) -> Iterator[Told]:
    """What a job calls with the count done, and with the total where it alone knows that.

    A function that is given is called. Without one a bar is shown in a terminal and in a notebook, and elsewhere standard error
    gets a line every two minutes. If asked is False, nothing is shown.
    """
    if asked is False or callable(asked):
        yield asked if callable(asked) else (lambda *_: None)
        return
    replace_unencodable()
    began, state = time.monotonic(), [0, total]
    printed = began

    def line() -> Line:
        done, of = state[0] or 0, state[1]
        if not of or not done:
            return Line(0.0, [[what, duration(time.monotonic() - began)], [what]])
        return _counted(what, unit, began, done, of)

    def tell(done: int, total: int | None = total) -> None:
        nonlocal printed
        state[:] = done, total
        shown.update()
        if not visible() and not console.console.quiet and time.monotonic() - printed >= SILENCE:
            printed = time.monotonic()
            with suppress(OSError):
                print(f"cifar-resnet: {line().fitted(120)}", file=sys.stderr, flush=True)

    shown = LiveLine(line)
    try:
        yield tell
    finally:
        shown.close()
        shown.update(last=True)


def _counted(what: str, unit: str, began: float, done: int, total: int) -> Line:
    """How far a job is, and when at this pace it ends."""
    counted, left = f"{count_of(done, total)} {unit}", (time.monotonic() - began) * (total - done) / done
    return Line(done / total, [[what, counted, f"{time_left(left)} left" if done < total else ""], [what, counted], [what]])


def visible() -> bool:
    """Whether somebody sees what moves: in a terminal, and in a notebook."""
    return console.console.is_terminal or console.console.is_jupyter


class Pace:
    """How fast a run goes, and how long it will take. A sharpness-aware step takes the time of two.

    Args:
        images: of the steps of an epoch, in their order.
        evaluated: images that an epoch is judged by.
    """

    def __init__(self, recipe: Recipe, images: Sequence[int], evaluated: int) -> None:
        self.steps, self.epochs = len(images), recipe.epochs
        self.total = self.epochs * self.steps
        self.sharp_from = recipe.first_sharp_step(self.total)
        self.images = [0, *accumulate(images)]  # after so many steps of an epoch
        # In plain steps, until one was timed: to evaluate an image takes a third of the time of training on it.
        self.evaluation = evaluated / self.images[-1] * self.steps / 3
        self.units, self.seconds = 0.0, 0.0  # steps timed, a sharp one as two, and their time
        self.timed: float | None = None  # seconds of the last evaluation
        self.mark: tuple[int, float] | None = None  # step of the run last done, and when
        self.epoch_from = (0, 0.0)  # step of this epoch from which its speed counts, and when that was done

    def cost(self, first: int, last: int) -> int:
        """Of the steps of a run from `first` to before `last`, in plain steps."""
        return last - first + max(0, last - max(first, self.sharp_from))

    def step(self, epoch: int, step: int, now: float) -> None:
        """A step was done; both numbers from 1."""
        done = (epoch - 1) * self.steps + step
        if self.mark:
            self.units += self.cost(self.mark[0], done)
            self.seconds += now - self.mark[1]
        else:  # the first one, which warms up
            self.epoch_from = (step, now)
        self.mark = (done, now)

    def evaluated(self, now: float) -> None:
        """An epoch has ended."""
        if self.mark:
            self.timed, self.mark, self.epoch_from = now - self.mark[1], (self.mark[0], now), (0, now)

    def speed(self, step: int) -> float | None:
        """Images a second so far in the epoch, whose last step done is this one."""
        (first, began), last = self.epoch_from, self.mark[1] if self.mark else 0.0
        return (self.images[step] - self.images[first]) / (last - began) if step > first and last > began else None

    def left(self, epochs_done: int, now: float) -> float | None:
        """Seconds to the end of the run, with its evaluations; None before a second step."""
        if not self.mark or not self.units:
            return None
        each = self.seconds / self.units
        evaluation = self.evaluation * each if self.timed is None else self.timed
        planned = self.cost(self.mark[0], self.total) * each + (self.epochs - epochs_done) * evaluation
        return max(planned - (now - self.mark[1]), 0.0)


def epoch_line(m: dict[str, float], evaluated_on: str) -> str:
    """An epoch of a history as one line of text."""
    return (
        f"epoch {m['epoch']:2d}  LR {m['lr']:.5f}  train loss {m['train_loss']:.4f} accuracy {m['train_accuracy']:.2f} %  "
        f"{evaluated_on} loss {m['test_loss']:.4f} accuracy {m['test_accuracy']:.2f} %  "
        f"{m['seconds']:.1f} s  {m['images_per_second']:,.0f} images/s"
    )


class TrainingTable(AbstractContextManager):
    """A Watcher that prints a row an epoch, above a line that tells of the epoch under way.

    Without a terminal it prints a line an epoch, and one every two minutes of an epoch that takes longer.
    In a notebook the table is one output, which changes. The run goes on where terminal or pipe are closed.

    `began` is what `time.perf_counter` said before the imports, whose seconds are then shown with the others of the start.
    """

    def __init__(self, began: float | None = None) -> None:
        self.imports = 0.0 if began is None else time.perf_counter() - began
        self.begun = False
        self.read, self.reading_since = (0, 0), 0.0  # how many images are read, of how many, and since when
        self.live: LiveLine | None = None
        self.lines: list[str] = []  # of a notebook
        self.now: Step | None = None

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.live:
            self.live.close()
            self.live.update(self.lines, last=True)
            self.live = None

    def reading(self, done: int, total: int) -> None:
        """A bar, where reading takes longer than a second."""
        self.read, self.reading_since = (done, total), self.reading_since or time.monotonic()
        if self.live is None and time.monotonic() - self.reading_since > 1 and visible():
            self.live = LiveLine(lambda: _counted("reading", "images", self.reading_since, *self.read))
        if self.live and done < total:
            self.live.update()
        elif done == total:
            self.reading_since = 0.0  # another part may follow
            self.close()

    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: Data, state: State) -> None:
        from ..data.loaders import batch_sizes
        from ..training.runtime import Glance

        replace_unencodable()
        self.begun, self.recipe, self.evaluated_on = True, recipe, data.evaluated_on
        self.pace = Pace(recipe, batch_sizes(recipe, len(data.train)), len(data.evaluation))
        # Of several processes each sums up its own images.
        self.glance: Glance | None = Glance(state.totals) if environment.get("processes", 1) == 1 else None
        self.epochs_done, self.printed = state.epoch, time.monotonic()
        with suppress(OSError):
            self._head(recipe, run_dir, environment, data, state)
        if visible():
            self.columns = _columns(data.evaluated_on, console.console.width)
            self._print(Text("  ".join(f"{each.head:>{each.width}}" for each in self.columns), "bold"))
            for row in state.history:
                self._print(self._row(row))
            self.live = LiveLine(self.line)

    def _head(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: Data, state: State) -> None:
        where = environment["device_name"]
        if environment["device"] == "cpu":
            where += f", {plural(environment['threads'], 'thread')}"
        say(
            f"{recipe.title}: {plural(len(data.train), 'training image')}, {plural(recipe.epochs, 'epoch')} at batch "
            f"{recipe.batch_size}, {recipe.optimizer} to LR {recipe.max_lr:.4g} at epoch {recipe.peak_epoch:.4g}, seed {recipe.seed}"
        )
        images = plural(len(data.evaluation), f"{data.evaluated_on} image")
        say(f"{images}; {recipe.precision} on {environment['device']} ({where}); the run's folder:\n  {run_dir}")
        startup = {"imports": self.imports, **environment["startup_seconds"]}
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in startup.items())
        say(f"ready for the first step after {sum(startup.values()):.1f} s: {parts}")
        if self.pace.sharp_from < self.pace.total:
            say(f"sharpness-aware steps, at half the speed, after epoch {self.pace.sharp_from / self.pace.steps:.4g}")
        elif recipe.sam_share:
            say(f"no sharpness-aware steps: a share of {recipe.sam_share:g} of {plural(self.pace.total, 'step')} is none")
        if state.epoch or state.step:
            say(f"going on after epoch {state.epoch}, step {state.step}")

    def _print(self, line: Text) -> None:
        """A line of the table, for good."""
        self.lines.append(line.plain)
        if not console.console.is_jupyter:
            with suppress(OSError):
                console.console.print(line, soft_wrap=True)

    def _row(self, metrics: dict[str, float]) -> Text:
        cells = (Text(f"{each.format.format(**metrics):>{each.width}}", each.style) for each in self.columns)
        return Text("  ").join(cells)

    def line(self) -> Line:
        """What the line below the table shows."""
        now, step = time.monotonic(), self.now
        epoch = f"epoch {min(self.epochs_done + 1, self.recipe.epochs)}/{self.recipe.epochs}"
        if step is None or step.epoch <= self.epochs_done:  # nothing yet of this epoch
            return Line(0.0, [[epoch, end] for end in (*self._end(now), "")])
        share, left = step.step / step.steps, self._end(now)
        if step.step == step.steps:
            return Line(share, [*([epoch, "evaluating", end] for end in (*left, "")), [epoch]])
        loss = accuracy = ""
        if self.glance and (seen := self.glance.arrived) and seen[0][0] == step.epoch:
            (_, after), (summed, hits) = seen
            loss, accuracy = f"loss {summed / self.pace.images[after]:.2f}", f"acc {100 * hits / self.pace.images[after]:.1f} %"
        speed = self.pace.speed(step.step)
        rate = f"{speed:,.0f} images/s" if speed else ""
        long, short = left or ("", "")
        return Line(
            share,
            [
                [epoch, loss, accuracy, rate, long], [epoch, loss, accuracy, rate, short], [epoch, loss, accuracy, short],
                [epoch, accuracy, short], [epoch, short], [epoch],
            ],
        )  # fmt: skip

    def _end(self, now: float) -> tuple[str, ...]:
        """When the run ends, with the time of day and without it; nothing where that is not known."""
        left = self.pace.left(self.epochs_done, now)
        if left is None:
            return ()
        at = datetime.now() + timedelta(seconds=left)
        short = f"ends in {time_left(left)}"
        return f"{short}, {at:{'%H:%M' if left < 20 * 3600 else '%a %H:%M'}}", short

    def step(self, step: Step, state: State) -> None:
        self.now, now = step, time.monotonic()
        self.pace.step(step.epoch, step.step, now)
        due = self.live is None and now - self.printed >= SILENCE
        if self.glance:
            self.glance.take(state.totals, (step.epoch, step.step))
        if self.live:
            self.live.update(self.lines)
        elif due:
            self._tell(self.line().fitted(120))

    def _tell(self, line: str) -> None:
        """Where nothing moves."""
        self.printed = time.monotonic()
        with suppress(OSError):
            print_lines(line)

    def epoch(self, epoch: Epoch) -> None:
        m = epoch.metrics
        self.epochs_done = int(m["epoch"])
        self.pace.evaluated(time.monotonic())
        if self.live is None:
            self._tell(epoch_line(m, self.evaluated_on))
            return
        self._print(self._row(m))
        if m["epoch"] == self.recipe.epochs:
            self.close()

    def warn(self, message: str) -> None:
        with suppress(OSError):
            warn(message)


class _Column(NamedTuple):
    head: str
    format: str
    kept: int  # the higher, the longer it stays in a narrow terminal
    style: str = ""

    @property
    def width(self) -> int:
        return max(len(self.head), 7 if self.head != "epoch" else 0)


def _columns(evaluated_on: str, width: int) -> list[_Column]:
    """The columns of the table that fit, with two spaces between them."""
    columns = [
        _Column("epoch", "{epoch:.0f}", 8),
        _Column("LR", "{lr:.5f}", 1),
        _Column("train loss", "{train_loss:.4f}", 2),
        _Column("train acc", "{train_accuracy:.2f} %", 5),
        _Column(f"{evaluated_on} loss", "{test_loss:.4f}", 4),
        _Column(f"{evaluated_on} acc", "{test_accuracy:.2f} %", 7, "bold"),
        _Column("seconds", "{seconds:.1f}", 3),
        _Column("images/s", "{images_per_second:,.0f}", 0),
    ]
    while len(columns) > 1 and sum(each.width + 2 for each in columns) - 2 > width:
        columns.remove(min(columns, key=lambda each: each.kept))
    return columns
