"""What commands print: prose, paths, and a table for each result."""

from __future__ import annotations

import codecs
import io
import os
import sys
import textwrap
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import shell_command
from ..presets import PRESETS
from ..recipe import Recipe

if TYPE_CHECKING:  # torch stays out of what only prints
    from ..run_dir import Checkpoint
    from ..training.lr_finder import FoundLR, Suggestions
    from .analysis import Mistake

# Under torchrun rank 0 speaks.
console = Console(highlight=False, markup=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0")
if not console.is_terminal:
    console.width = 120


PLAIN = {"±": "+/-", "·": "|", "…": "...", "━": "=", "─": "-"}  # our own signs, where a terminal has no such letters


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler that never fails."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error("cifar_resnet.plain", _replaced)


def printable() -> None:
    """Lets nothing that is printed fail for the encoding of the terminal: what has no letter there is replaced."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") in ("strict", "surrogateescape") and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="cifar_resnet.plain")


def say(message: str, style: str | None = None) -> None:
    """Prose: a terminal wraps it between words, and a path or a command in it stays whole; elsewhere it is one line."""
    command(wrapped(message, console.width) if console.is_terminal else message, style)


def wrapped(message: str, width: int) -> str:
    """Lines of this width. A command to type, which a message may end with, has a line of its own."""
    prose, before, typed = message.partition(": cifar-resnet ")
    lines = textwrap.wrap(prose + before[:1], width, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, *([f"  {before[2:]}{typed}"] if before else [])])


def command(line: str, style: str | None = None) -> None:
    """A line to copy: never wrapped by us."""
    console.print(line, style=style, soft_wrap=True)


def show_path(path: Path) -> None:
    """A path, on a line of its own."""
    command(f"  {path}")


def written(folder: Path, *names: str) -> None:
    """The files that a command wrote, a line each."""
    say("written:")
    for name in names:
        show_path(folder / name)


def warn(message: str) -> None:
    say(message, style="yellow")


def table_of(*columns: str, title: str | None = None, **options: Any) -> Table:
    """An empty table without lines; a column whose name begins with > is aligned right."""
    table = Table(header_style="bold", title=title, title_justify="left", **{"box": None, "pad_edge": False, **options})
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def training_result(checkpoint: Checkpoint) -> None:
    """The last figures of a run, and what to do next."""
    last = checkpoint.history[-1]
    folder = checkpoint.path.parent
    say(
        f"last epoch: {last['test_accuracy']:.2f} % {checkpoint.evaluated_on} accuracy, loss {last['test_loss']:.4f}, "
        f"after {sum(row['seconds'] for row in checkpoint.history):,.0f} s of training",
        style="bold",
    )
    say(f"next: {shell_command('evaluate', folder)}")
    say(f"      {shell_command('misclassified', folder)}")


def repetition(content: dict[str, Any]) -> None:
    """What `repeat.json` holds."""
    interval = ", 95 % interval of the mean {:.2f} to {:.2f} %".format(*content["interval"]) if content["interval"] else ""
    say(
        f"{content['count']} seeds: {content['mean']:.2f} ± {content['std']:.2f} % {content['evaluated_on']} accuracy at the last epoch "
        f"(mean, standard deviation){interval}",
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
    if calibrated := content["calibrated"]:
        say(
            f"at the temperature {calibrated['temperature']:.3f}, as predict gives probabilities: "
            f"expected calibration error {calibrated['calibration_error']:.2f} %, loss {calibrated['loss']:.4f}"
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


def doubtful_labels(chosen: list[Mistake], written: str) -> None:
    """The first of the labels that may be wrong."""
    for mistake in chosen[:10]:
        say(f"{mistake.caption}, labelled {mistake.true}: perhaps mislabelled: {mistake.predicted}?")
    say(f"{len(chosen)} labels are less probable than another class")
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
