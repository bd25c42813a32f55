"""What the terminal shows: live tables, bars and one-line messages; plain lines where it is no terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..presets import PRESETS
from ..recipe import Recipe

if TYPE_CHECKING:  # torch stays out of what only prints
    from ..data.splits import Data
    from ..run_dir import Checkpoint
    from ..training.engine import Epoch, State, Step
    from ..training.lr_finder import FoundLR, Suggestions
    from .analysis import Mistake

# Under torchrun rank 0 speaks.
console = Console(highlight=False, markup=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0")
if not console.is_terminal:
    console.width = 120


def say(message: str, style: str | None = None) -> None:
    """One line, never wrapped by us: a path in it can be copied."""
    console.print(message, style=style, soft_wrap=True)


def warn(message: str) -> None:
    say(message, style="yellow")


def bar(unit: str) -> Progress:
    """Bars of what takes long, in steps of `unit`; nothing without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar for a job; gives what the job calls with the count done, and with the total where it alone knows that."""
    with bar(unit) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done, total=total: shown.update(task, completed=done, total=total)


def table_of(*columns: str, title: str | None = None, **options: Any) -> Table:
    """An empty table without lines; a column whose name begins with > is aligned right."""
    table = Table(header_style="bold", title=title, title_justify="left", **{"box": None, "pad_edge": False, **options})
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


class TrainingTable:
    """A Watcher that shows one row an epoch and a bar inside it; without a terminal, one plain line an epoch.

    `began` is what `time.perf_counter` said before the imports, whose seconds are then shown with the others of the start.
    """

    def __init__(self, began: float | None = None) -> None:
        self.imports = 0.0 if began is None else time.perf_counter() - began
        self.begun = self.whole = False
        self.stack = ExitStack()
        self.evaluated_on = "test"
        self.progress = bar("steps")

    def __enter__(self) -> TrainingTable:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: Data, state: State) -> None:
        self.begun, self.evaluated_on = True, data.evaluated_on
        where = environment["device_name"]
        if environment["device"] == "cpu":
            where += f", {environment['threads']} threads"
        say(
            f"{recipe.title}: {len(data.train):,} training images, {recipe.epochs} epochs at batch "
            f"{recipe.batch_size}, {recipe.optimizer} to LR {recipe.max_lr:.4g} at epoch {recipe.peak_epoch:.4g}, seed {recipe.seed}"
        )
        say(
            f"{len(data.evaluation):,} {data.evaluated_on} images; {recipe.precision} on {environment['device']} ({where}); "
            f"run directory {run_dir}"
        )
        startup = {"imports": self.imports, **environment["startup_seconds"]}
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in startup.items())
        say(f"ready for the first step after {sum(startup.values()):.1f} s: {parts}")
        if recipe.sam_share:
            say(f"sharpness-aware steps, at half the speed, after epoch {recipe.epochs * (1 - recipe.sam_share):.4g}")
        if state.epoch or state.step:
            say(f"going on after epoch {state.epoch}, step {state.step}")
        if console.is_terminal:
            self.rows = list(state.history)
            self.task = self.progress.add_task("", total=None)
            self.stack.enter_context(Live(console=console, refresh_per_second=4, get_renderable=self.screen))
            self.stack.callback(setattr, self, "whole", True)

    def screen(self) -> Group:
        """The rows that fit above the bar; at the end all of them."""
        judged = (f">{self.evaluated_on} loss", f">{self.evaluated_on} acc")
        table = table_of(">epoch", ">LR", ">train loss", ">train acc", *judged, ">seconds", ">images/s")
        for m in self.rows if self.whole else self.rows[-max(console.height - 5, 1) :]:
            table.add_row(
                f"{m['epoch']}", f"{m['lr']:.5f}", f"{m['train_loss']:.4f}", f"{m['train_accuracy']:.2f} %", f"{m['test_loss']:.4f}",
                Text(f"{m['test_accuracy']:.2f} %", "bold"), f"{m['seconds']:.1f}", f"{m['images_per_second']:,.0f}",
            )  # fmt: skip
        return Group(table) if self.whole else Group(table, self.progress)

    def step(self, step: Step, state: State) -> None:
        if console.is_terminal:
            self.progress.update(
                self.task, description=f"epoch {step.epoch}, LR {step.lr:.4f}", completed=step.step, total=step.steps
            )

    def epoch(self, epoch: Epoch) -> None:
        m = epoch.metrics
        if console.is_terminal:
            self.rows.append(m)
            self.progress.reset(self.task)
            return
        say(
            f"epoch {m['epoch']:2d}  LR {m['lr']:.5f}  train loss {m['train_loss']:.4f} accuracy {m['train_accuracy']:.2f} %  "
            f"{self.evaluated_on} loss {m['test_loss']:.4f} accuracy {m['test_accuracy']:.2f} %  "
            f"{m['seconds']:.1f} s  {m['images_per_second']:,.0f} images/s"
        )

    def warn(self, message: str) -> None:
        warn(message)


def training_result(checkpoint: Checkpoint) -> None:
    """The last figures of a run, and what to do next."""
    last = checkpoint.history[-1]
    folder = checkpoint.path.parent
    say(
        f"last epoch: {last['test_accuracy']:.2f} % {checkpoint.evaluated_on} accuracy, loss {last['test_loss']:.4f}, "
        f"after {sum(row['seconds'] for row in checkpoint.history):,.0f} s of training",
        style="bold",
    )
    say(f"next: cifar-resnet evaluate {folder}")
    say(f"      cifar-resnet misclassified {folder}")


def repetition(content: dict[str, Any]) -> None:
    """What `repeat.json` holds."""
    say(
        f"{content['count']} seeds: {content['mean']:.2f} ± {content['std']:.2f} % {content['evaluated_on']} accuracy at the last epoch "
        f"(mean, standard deviation), 95 % interval of the mean {content['interval'][0]:.2f} to {content['interval'][1]:.2f} %",
        style="bold",
    )


def predictions(found: list[dict[str, Any]]) -> None:
    """One row an image: its most probable classes, the first one first."""
    count = max((len(row["classes"]) for row in found), default=0)
    ranks = (("first", "second", "third")[i] if i < 3 else f"{i + 1}th" for i in range(count))
    table = table_of("image", *chain.from_iterable((rank, ">") for rank in ranks))
    for row in found:
        best = chain.from_iterable((each["class"], f"{100 * each['probability']:.1f} %") for each in row["classes"])
        table.add_row(row["image"].encode(errors="replace").decode(), *best)
    console.print(table)


def evaluation(content: dict[str, Any], written: str) -> None:
    """The report by class, the most confused pairs, and the figures over all images."""
    table = table_of("class", ">precision", ">recall", ">F1", ">count")
    for name, row in content["classes"].items():
        table.add_row(name, f"{row['precision']:.2f} %", f"{row['recall']:.2f} %", f"{row['f1']:.2f} %", f"{row['count']:,}")
    pairs = table_of("most confused", "predicted as", ">images", ">of the class")
    for row in content["most_confused"]:
        pairs.add_row(row["true"], row["predicted"], f"{row['count']:,}", f"{row['share']:.1f} %")
    console.print(table)
    console.print()
    if content["most_confused"]:
        console.print(pairs)
        console.print()
    say(
        f"{content['evaluated_on']} accuracy {content['accuracy']:.2f} % of {content['images']:,} images, loss {content['loss']:.4f}, "
        f"expected calibration error {content['calibration_error']:.2f} %",
        style="bold",
    )
    if kept := content["without_label_errors"]:
        left_out = content["images"] - kept["images"]
        say(f"without the {left_out} images whose label is known to be wrong: accuracy {kept['accuracy']:.2f} %")
    for name, score in (content["tta"] or {}).items():
        say(f"with test-time augmentation ({name}): accuracy {score['accuracy']:.2f} %, loss {score['loss']:.4f}")
    say(written)


def evaluations(contents: list[dict[str, Any]]) -> None:
    """Several runs, a row each."""
    table = table_of(">accuracy", ">loss", "checkpoint")
    for content in contents:
        table.add_row(f"{content['accuracy']:.2f} %", f"{content['loss']:.4f}", content["checkpoint"])
    console.print("", table)


def mistakes(chosen: list[Mistake], written: str) -> None:
    """The first of the mistakes chosen."""
    if not chosen:
        say("there is no such mistake to show")
    else:
        shown = min(len(chosen), 10)
        table = table_of(">image", "true class", "predicted", ">confidence", title=f"{shown} of {len(chosen)} mistakes")
        for mistake in chosen[:shown]:
            name = mistake.name or str(mistake.index)
            table.add_row(name, mistake.true, mistake.predicted, f"{100 * mistake.confidence:.1f} %")
        console.print(table)
        console.print()
    say(written)


def comparison(content: dict[str, Any]) -> None:
    """The groups of runs, the best first."""
    table = table_of("recipe", ">n", f">{content['evaluated_on']} acc", ">seconds", "what differs", show_lines=True)
    for group in sorted(content["groups"], key=lambda group: -group["mean"]):
        spread = f" ± {group['std']:.2f}" if group["std"] is not None else ""
        differs = ", ".join(f"{name} {value}" for name, value in group["differs"].items())
        name = group["label"].split(":")[0]
        table.add_row(
            name,
            str(group["n"]),
            f"{group['mean']:.2f}{spread} %",
            f"{group['seconds']:,.0f}",
            differs or ("only the seed" if group["n"] > 1 else ""),
        )
    console.print(table)
    console.print()


def found_lr(recipe: Recipe) -> None:
    """The learning rates that a run was given by the search before it."""
    say(f"found: LR from {recipe.max_lr / recipe.div_factor:.3g} to {recipe.max_lr:.3g}")


def lr_suggestions(found: FoundLR, then: str, written: str) -> None:
    """What a search for the learning rate found: by rule, by short training, by sweep; and the command `then` to go on with."""
    console.print(_rules(found.suggestions, bool(found.trials)))
    console.print()
    if found.trials:
        ends = (f"{high:g} {f'{loss:.3f}' if isfinite(loss) else 'diverged'}" for high, loss in found.trials)
        say(f"short trainings, maximum LR and last loss: {', '.join(ends)}")
    if found.sweep:
        console.print(_sweep(found.sweep))
        console.print()
    if then:
        say(f"next: {then}", style="bold")
    if found.suggestions.why_not:
        warn(f"no LR is recommended: {found.suggestions.why_not}")
    else:
        say("cifar-resnet train --max-lr find does all this first, and trains from the recommended minimum to the maximum")
    say(written)


def _rules(found: Suggestions, with_trials: bool) -> Table:
    table = table_of("rule", ">LR", "what it is")
    table.add_row("steepest", f"{found.steepest:.3g}", "where the lagging mean falls fastest, as torch-lr-finder suggests")
    table.add_row("valley", f"{found.valley:.3g}", "the middle of the longest fall")
    table.add_row("minimum / 10", f"{found.minimum_tenth:.3g}", "a tenth of the LR of the lowest lagging mean")
    highest = "the highest LR at which the loss is still at its bottom"
    if with_trials:
        highest = "where short trainings end lowest, raised for the length of the whole run"
    lowest = "the lowest LR at which the loss has fallen by half of its drop"
    for name, value, what in (("maximum", found.max_lr, highest), ("minimum", found.min_lr, lowest)):
        if value is not None:
            table.add_row(Text(f"recommended {name}", "bold"), Text(f"{value:.3g}", "bold"), what)
    return table


def _sweep(rows: list[dict[str, Any]]) -> Table:
    columns = (">maximum LR", ">minimum LR", "chosen by", ">accuracy", ">loss")
    table = table_of(*columns, title=f"{rows[0]['epochs']} epochs, held-out images")
    best = max((row["accuracy"] for row in rows if row["accuracy"] is not None), default=None)
    for row in sorted(rows, key=lambda row: row["max_lr"]):
        score = ("diverged", "") if row["accuracy"] is None else (f"{row['accuracy']:.2f} %", f"{row['loss']:.4f}")
        style = "bold" if row["accuracy"] == best else ""
        rule = "recommended at this length" if row["rule"] == "recommended" else row["rule"]
        table.add_row(f"{row['max_lr']:.3g}", f"{row['min_lr']:.3g}", rule, *score, style=style)
    return table


def summary(content: dict[str, Any]) -> None:
    """The layer table, and its totals, of what `analysis.summary` gives."""
    numbers = (">k", ">parameters", ">M madds", ">field", ">jump", ">start")
    table = table_of("layer", "type", ">input", ">output", *numbers, padding=(0, 1, 0, 0))
    for row in content["layers"]:
        shapes = ("x".join(map(str, row[side])) for side in ("input", "output"))
        madds = f"{row['multiply_adds'] / 1e6:,.1f}" if row["multiply_adds"] else ""
        counts = (f"{row[key]:,}" if row[key] else "" for key in ("kernel", "parameters"))
        field = (f"{row[key]:g}" for key in ("receptive_field", "jump", "start"))
        table.add_row(row["layer"], row["type"].removesuffix("2d"), *shapes, *counts, madds, *field)
    console.print(table)
    console.print()
    totals = content["totals"]
    say(
        f"{content['recipe']}: {totals['parameters']:,} parameters, {totals['multiply_adds'] / 1e9:.2f} G multiply-adds "
        f"for a batch of {content['batch_size']}",
        style="bold",
    )
    say("k: kernel; M madds: millions of multiply-adds for the batch; field: receptive field of a unit, in pixels of the image;")
    say("jump: from one unit's field to the next one's; start: centre of the first one's")


def bench(content: dict[str, Any]) -> None:
    """What `cifar-resnet bench` measured."""
    at, recipe, expected, memory = (content[key] for key in ("environment", "recipe", "predicted_seconds", "peak_memory"))
    say(
        f"{recipe['recipe']}: {recipe['optimizer']}, batch {recipe['batch_size']}, {recipe['precision']} on {at['device']} "
        f"({at['device_name']}, {at['threads']} threads, bfloat16 in hardware: {'yes' if at['bfloat16'] else 'no'})"
    )
    say(", ".join(f"{name} {at[name]}" for name in ("python", "torch", "torchvision", "albumentations", "platform")))
    speeds = table_of("", ">median", ">lowest", ">highest", "", title=f"{len(content['rounds']['model'])} rounds")
    for name, values in content["rounds"].items():
        unit, scale = ("GFLOP/s", 1e-9) if name == "matrix product" else ("images/s", 1)
        speeds.add_row(name, *(f"{scale * value:,.0f}" for value in (content["medians"][name], min(values), max(values))), unit)
    ratios = table_of("ratio", ">median", ">95 % interval")
    for name, row in content["ratios"].items():
        ratios.add_row(name, f"{row['median']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}")
    operators = table_of("operator, itself", ">share of the time", ">calls")
    for row in content["profile"] or ():
        operators.add_row(row["operator"], f"{row['share']:.1f} %", str(row["calls"]))
    for table in (speeds, ratios, *([operators] if content["profile"] else [])):
        console.print(table, "")
    say(
        f"{recipe['epochs']} epochs of CIFAR-10: {expected['training'] / 60:,.1f} min of training, "
        f"{expected['evaluation'] / 60:,.1f} min of evaluation",
        style="bold",
    )
    peaks = [f"{memory[of] / 2**30:.1f} GiB of the {of}" for of in ("process", "device") if memory[of]]
    if peaks:
        say(f"peak memory over all of it: {', '.join(peaks)}")


def recipes() -> None:
    """Every preset with where it comes from and what was assumed."""
    table = table_of("recipe", "origin", "assumed where the origin is silent", show_lines=True, box=box.SIMPLE)
    for name, preset in PRESETS.items():
        table.add_row(Text(name, "bold"), preset.origin, preset.assumed)
    console.print(table)
    say("all fields of one: cifar-resnet recipes NAME")
