"""What commands print: prose, paths, and a table for each result."""

from __future__ import annotations

import codecs
import io
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .. import errors
from ..errors import is_other_rank, shell_command
from ..presets import MEASURED, PRESETS
from ..recipe import Recipe
from .words import count_of, duration, ordinal, plural

if TYPE_CHECKING:  # torch stays out of what only prints
    from ..checkpoint import Checkpoint
    from ..training.lr_finder import FoundLR, Suggestions
    from .analysis import Mistake


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Who read the output has gone, such as `head`: the work goes on, and says no more."""
        with suppress(SystemExit):
            super().on_broken_pipe()


# Under torchrun rank 0 speaks.
console = _Console(highlight=False, markup=False, emoji=False, quiet=is_other_rank())
UNBOUNDED = 100_000  # columns
if not console.is_terminal and not console.is_jupyter:
    console.width = UNBOUNDED  # nothing is cut or folded on its way into a file


PLAIN = {"±": "+/-", "·": "|", "…": "...", "━": "=", "─": "-"}  # our own signs, where a terminal has no such letters


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler that never fails."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error("cifar_resnet.plain", _replaced)


def replace_unencodable() -> None:
    """Lets nothing that is printed fail for the encoding of the terminal: what has no letter there is replaced."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") in ("strict", "surrogateescape") and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="cifar_resnet.plain")


def say(message: str, style: str | None = None) -> None:
    """Prose: a terminal wraps it between words, and a path or a command in it stays whole; elsewhere it is one line."""
    print_lines(wrapped(message, console.width) if console.is_terminal else message, style)


def wrapped(message: str, width: int) -> str:
    """Lines of this width. Lines that are indented, and a command that a line may end with, stay whole."""
    lines: list[str] = []
    for line in message.splitlines():
        prose, before, typed = ("", "", "") if line.startswith("  ") else line.partition(": cifar-resnet ")
        kept = (prose + before[:1]).replace(" %", "\xa0%")  # a number and its percent stay together
        lines += textwrap.wrap(kept, width, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {before[2:]}{typed}"] if before else [line] if not prose else []
    return "\n".join(lines).replace("\xa0%", " %")


def print_lines(lines: str, style: str | None = None) -> None:
    """Lines as they are: rich does not wrap them."""
    console.print("\n".join(map(errors.printable, lines.split("\n"))), style=style, soft_wrap=True)


def warn(message: str) -> None:
    say(message, style="yellow")


Cell = str | Text


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell]], spare: Sequence[int | tuple[int, ...]] = (), title: str | None = None, gap: bool = True,
    **options: Any,
) -> int:  # fmt: skip
    """A table without lines; with a gap, an empty line below it. A column whose name begins with > is aligned right.

    Gives the number of columns shown.

    Where the terminal is too narrow the columns `spare` are left out, the first one first, as far as needed; then text is folded.
    """
    rows, left = list(rows), list(range(len(columns)))
    for without in ((), *spare):
        left = [each for each in left if each not in (without if isinstance(without, tuple) else (without,))]
        table = Table(header_style="bold", title=title, title_justify="left", **{"box": None, "pad_edge": False, **options})
        for each in left:
            right = columns[each].startswith(">")
            name = columns[each].removeprefix(">")
            table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
        for row in rows:
            cells = (row[each] for each in left)
            table.add_row(*(errors.printable(cell) if isinstance(cell, str) else cell for cell in cells))
        if Measurement.get(console, console.options.update(width=UNBOUNDED), table).maximum <= console.width:
            break
    console.print(table)
    if gap:
        console.print()
    return len(left)


def training_result(checkpoint: Checkpoint, data_dir: object | None) -> None:
    """The last figures of a run, and what to do next; with the folder of the data sets, if one was given."""
    last = checkpoint.history[-1]
    folder = checkpoint.path.parent
    say(
        f"last epoch: {last['test_accuracy']:.2f} % {checkpoint.evaluated_on} accuracy, loss {last['test_loss']:.4f}, "
        f"after {duration(sum(row['seconds'] for row in checkpoint.history))} of training",
        style="bold",
    )
    where = ["--data-dir", data_dir] if data_dir else []
    then = [shell_command(command, folder, *where) for command in ("evaluate", "misclassified")]
    say("\n  ".join(["next:", *then, f"{shell_command('predict', folder)} IMAGE"]))


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
    ranks = [("first", "second", "third")[i] if i < 3 else ordinal(i + 1) for i in range(count)]
    rows = [
        [row["image"], *chain.from_iterable((each["class"], f"{100 * each['probability']:.1f} %") for each in row["classes"])]
        for row in found
    ]
    pairs = [(2 * each + 1, 2 * each + 2) for each in range(count)]
    if rows:
        columns = ["image", *chain.from_iterable((rank, ">") for rank in ranks)]
        if (shown := print_table(columns, rows, spare=pairs[:0:-1], gap=False) // 2) < count:
            say(f"the terminal has room for {count_of(shown, count)} classes; --json prints all")


def evaluation(content: dict[str, Any]) -> None:
    """The report by class, the most confused pairs, and the figures over all images."""
    by_class = [
        [name, f"{row['precision']:.2f} %", f"{row['recall']:.2f} %", f"{row['f1']:.2f} %", f"{row['count']:,}"]
        for name, row in content["classes"].items()
    ]
    print_table(["class", ">precision", ">recall", ">F1", ">count"], by_class, spare=[4, 1])
    pairs = [[row["true"], row["predicted"], f"{row['count']:,}", f"{row['share']:.1f} %"] for row in content["most_confused"]]
    if pairs:
        print_table(["most confused", "predicted as", ">images", ">of the class"], pairs, spare=[2])
    say(
        f"{content['evaluated_on']} accuracy {content['accuracy']:.2f} % of {plural(content['images'], 'image')}, loss {content['loss']:.4f}, "
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
        say(f"without the {plural(left_out, 'image')} whose label is known to be wrong: accuracy {kept['accuracy']:.2f} %")
    for name, score in (content["tta"] or {}).items():
        say(f"with test-time augmentation ({name}): accuracy {score['accuracy']:.2f} %, loss {score['loss']:.4f}")


def evaluations(contents: list[dict[str, Any]]) -> None:
    """Several runs, a row each."""
    rows = [[f"{each['accuracy']:.2f} %", f"{each['loss']:.4f}", each["checkpoint"]] for each in contents]
    console.print()
    print_table([">accuracy", ">loss", "checkpoint"], rows, spare=[1], gap=False)


def mistakes(chosen: list[Mistake]) -> None:
    """The first of the mistakes chosen."""
    if not chosen:
        say("there is no such mistake to show")
        return
    shown = chosen[:10]
    rows = [[each.name or str(each.index), each.true, each.predicted, f"{100 * each.confidence:.1f} %"] for each in shown]
    title = plural(len(chosen), "mistake") if len(shown) == len(chosen) else f"{count_of(len(shown), len(chosen))} mistakes"
    print_table([">image", "true class", "predicted", ">confidence"], rows, title=title)


def doubtful_labels(chosen: list[Mistake]) -> None:
    """The first of the labels that may be wrong."""
    for mistake in chosen[:10]:
        say(f"{mistake.caption}, labelled {mistake.true}: perhaps mislabelled: {mistake.predicted}?")
    say(f"{plural(len(chosen), 'label is', 'labels are')} less probable than another class")


def comparison(content: dict[str, Any]) -> None:
    """A column for each group of runs, the best one first, with their folders; a row for each field that differs."""
    groups = sorted(content["groups"], key=lambda group: -group["mean"])
    columns = [_compared(group, content["evaluated_on"]) for group in groups]
    names = list(columns[0])
    widest = [max(map(cell_len, chain(*(str(cell).splitlines() for cell in column.values())))) for column in columns]
    room = max((console.width - max(map(len, names))) // (max(widest) + 1), 1)  # columns of groups in one table
    for first in range(0, len(columns), room):
        shown = columns[first : first + room]
        rows = [[Text(name, "bold"), *(column[name] for column in shown)] for name in names]
        print_table(["", *([">"] * len(shown))], rows, show_header=False)


def _compared(group: dict[str, Any], evaluated_on: str) -> dict[str, Cell]:
    """What `comparison` shows of a group, by row."""
    spread = f" ± {group['std']:.2f}" if group["std"] is not None else ""
    return {
        "runs": Text("\n".join(map(errors.printable, group["folders"]))),
        "recipe": group["label"].split(":")[0],
        "seeds": ", ".join(str(run["seed"]) for run in group["runs"]),
        f"{evaluated_on} accuracy": Text(f"{group['mean']:.2f}{spread} %", "bold"),
        f"{evaluated_on} loss": f"{group['test_loss']:.4f}",
        "train loss": f"{group['train_loss']:.4f}",
        "training": duration(group["seconds"]),
        **{name: str(value) for name, value in group["differs"].items()},
    }


def lr_suggestions(found: FoundLR, rule: str, then: str, at_once: str) -> None:
    """What a search for the learning rate found: what to take, and the command `then` to go on with; the trials; other rules.

    The command `at_once` searches and trains.
    """
    suggested = found.suggestions
    if suggested.max_lr is None or suggested.min_lr is None:
        warn(f"no LR is recommended: {suggested.why_not}")
    else:
        say(f"recommended: LR {suggested.max_lr:.3g} at the peak, {suggested.min_lr:.3g} at the start", style="bold")
    if then:
        say((f"to train by the rule {rule}" if rule != "recommended" else "to train so") + f":\n  {then}")
    if suggested.max_lr is not None:
        say(f"to search and train at once:\n  {at_once}")
    console.print()
    if found.trials:
        lowest = min(loss for _, loss in found.trials)
        rows = [
            [f"{high:.3g}", f"{loss:.3f}" if isfinite(loss) else "diverged", "lowest" if loss == lowest else ""]
            for high, loss in found.trials
        ]
        print_table([">maximum LR", ">last loss", ""], rows, title=f"short trainings of {plural(found.trial_steps, 'step')}")
    print_table(["rule", ">LR", "what it is"], _rules(suggested, bool(found.trials)))
    if found.sweep:
        columns = [">maximum LR", ">minimum LR", "chosen by", ">accuracy", ">loss"]
        title = f"{plural(found.sweep[0]['epochs'], 'epoch')} at each, held-out images"
        print_table(columns, _sweep(found.sweep), spare=[1, 4], title=title)


def _rules(found: Suggestions, with_trials: bool) -> list[list[Cell]]:
    highest = "the highest LR at which the loss is still at its bottom"
    if with_trials:
        highest = "where short trainings end lowest, scaled to the length of the whole run"
    lowest = "the lowest LR at which the loss has fallen by half of its drop"
    rows: list[list[Cell]] = [
        [Text(f"recommended {name}", "bold"), Text(f"{value:.3g}", "bold"), what]
        for name, value, what in (("maximum", found.max_lr, highest), ("minimum", found.min_lr, lowest))
        if value is not None
    ]
    return [
        *rows,
        ["steepest", f"{found.steepest:.3g}", "where the lagging mean falls fastest, as torch-lr-finder suggests"],
        ["valley", f"{found.valley:.3g}", "the middle of the longest fall"],
        ["minimum / 10", f"{found.minimum_tenth:.3g}", "a tenth of the LR of the lowest lagging mean"],
    ]


def _sweep(swept: list[dict[str, Any]]) -> list[list[Cell]]:
    best = max((row["accuracy"] for row in swept if row["accuracy"] is not None), default=None)
    rows: list[list[Cell]] = []
    for row in sorted(swept, key=lambda row: row["max_lr"]):
        score = ("diverged", "") if row["accuracy"] is None else (f"{row['accuracy']:.2f} %", f"{row['loss']:.4f}")
        rule = "recommended at this length" if row["rule"] == "recommended" else row["rule"]
        style = "bold" if row["accuracy"] == best else ""
        rows.append([Text(cell, style) for cell in (f"{row['max_lr']:.3g}", f"{row['min_lr']:.3g}", rule, *score)])
    return rows


def summary(content: dict[str, Any]) -> None:
    """The layer table, and its totals, of what `analysis.summary` gives."""

    def millions(multiply_adds: int) -> str:
        """Of one image."""
        return f"{multiply_adds / content['batch_size'] / 1e6:,.2f}" if multiply_adds else ""

    rows, totals = list[list[Cell]](), content["totals"]
    for row in content["layers"]:
        shapes = ("x".join(map(str, row[side])) for side in ("input", "output"))
        kernel, parameters = (f"{row[key]:,}" if row[key] else "" for key in ("kernel", "parameters"))
        field = (f"{row[key]:g}" for key in ("receptive_field", "jump", "start"))
        kind = row["type"].removesuffix("2d")
        rows.append([row["layer"], kind, *shapes, kernel, parameters, millions(row["multiply_adds"]), *field])
    last = ["total", "", "", "", "", f"{totals['parameters']:,}", millions(totals["multiply_adds"]), "", "", ""]
    rows.append([Text(cell, "bold") for cell in last])
    numbers = (">k", ">parameters", ">M madds", ">field", ">jump", ">start")
    columns = ["layer", "type", ">input", ">output", *numbers]
    shown = print_table(columns, rows, spare=[9, 8, 4, 2, 7, 1, 3], title=f"recipe {content['recipe']}", padding=(0, 1, 0, 0))
    legend = (
        "M madds: millions of multiply-adds for an image; field: receptive field of a unit, in pixels of the image",
        "k: kernel",
        "jump: from one unit's field to the next one's",
        "start: centre of the first one's",
    )
    say("; ".join(legend[: max(1, len(legend) - len(columns) + shown)]))


def bench(content: dict[str, Any]) -> None:
    """What `cifar-resnet bench` measured."""
    at, recipe, expected, memory = (content[key] for key in ("environment", "recipe", "predicted_seconds", "peak_memory"))
    say(
        f"{recipe['recipe']}: {recipe['optimizer']}, batch {recipe['batch_size']}, {recipe['precision']} on {at['device']} "
        f"({at['device_name']}, {plural(at['threads'], 'thread')}, bfloat16 in hardware: {'yes' if at['bfloat16'] else 'no'})"
    )
    say(", ".join(f"{name} {at[name]}" for name in ("python", "torch", "torchvision", "albumentations", "platform")))
    speeds, rounds = list[list[Cell]](), len(content["rounds"]["model"])
    for name, values in content["rounds"].items():
        unit, scale = ("GFLOP/s", 1e-9) if name == "matrix product" else ("images/s", 1)
        figures = (content["medians"][name], min(values), max(values))
        speeds.append([name, *(f"{scale * value:,.0f}" for value in figures), unit])
    print_table(["", ">median", ">lowest", ">highest", ""], speeds, spare=[2, 3], title=plural(rounds, "round"))
    ratios = [[name, f"{row['median']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"] for name, row in content["ratios"].items()]
    print_table(["ratio", ">median", ">95 % interval"], ratios)
    if content["convolutions"]:
        print_table(*_convolutions(content), title=f"convolutions: ms for {recipe['batch_size']} images")
    operators = [[row["operator"], f"{row['share']:.1f} %", f"{row['calls']:,}"] for row in content["profile"] or ()]
    if operators:
        print_table(["operator, itself", ">share of the time", ">calls"], operators, spare=[2])
    say(
        f"{plural(recipe['epochs'], 'epoch')} of CIFAR-10: {duration(expected['training'])} of training, "
        f"{duration(expected['evaluation'])} of evaluation",
        style="bold",
    )
    peaks = [f"{memory[of] / 2**30:.1f} GiB of the {of}" for of in ("process", "device") if memory[of]]
    if peaks:
        say(f"peak memory over all of it: {', '.join(peaks)}")


def _convolutions(content: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows: how each layer is computed in each direction, and how long that takes."""
    peak, rows = content["medians"]["matrix product"], list[list[Cell]]()
    for each in content["convolutions"]:
        seconds, chosen = each["seconds"], each["chosen"]
        times = [f"{1000 * seconds[way]:.1f}" for way in (chosen, "torch")]
        share = f"{each['flop'] / seconds[chosen] / peak:.2f}"
        rows.append([each["layer"], each["direction"].replace("_", " "), chosen, *times, share])
    return ["layer", "direction", "way", ">ms", ">ms, torch", ">of the peak"], rows


def recipes() -> None:
    """Every preset: its length, what was measured of it, and where it comes from."""
    rows: list[list[Cell]] = []
    for name in PRESETS:
        recipe, found = Recipe.build(name), MEASURED.get(name)
        accuracy = runs = seconds = ""
        if found:
            spread = f" ± {found.std:.2f}" if found.std is not None else ""
            accuracy, runs = f"{found.accuracy:.2f}{spread} %", str(found.runs)
            seconds = f"{duration(found.seconds)}, {found.hardware}" if found.seconds else ""
        rows.append([Text(name, "bold"), str(recipe.epochs), recipe.optimizer, accuracy, runs, seconds])
    columns = ["recipe", ">epochs", "optimizer", ">test accuracy", ">runs", "training takes"]
    print_table(columns, rows, spare=[5, 4, 2, 1])
    print_table(["recipe", "origin"], [[Text(name, "bold"), preset.origin] for name, preset in PRESETS.items()])
    say("one recipe, with what was assumed where its origin does not say:\n  cifar-resnet recipes NAME")


def assumed(name: str) -> None:
    """Of a preset, on standard error: standard output has its fields, for a file."""
    for what in ("origin", "assumed"):
        print(f"{what}: {getattr(PRESETS[name], what)}", file=sys.stderr)
