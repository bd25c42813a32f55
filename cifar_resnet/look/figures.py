"""Charts: each function makes a Matplotlib Figure of data, which a notebook shows and a command saves. `pictures` shows images."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ..recipe import Recipe
from ..training import optim
from ..training.lr_finder import History, Suggestions, Trial, smooth
from . import lettering
from .rendering import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, hover
from .words import plural

MOST_CLASSES, ROOMY = 30, 14  # that a picture tells apart; that leave room for two lines in a cell
FEW = 30  # images of a calibration bin, below which it is marked
FAINT: dict[str, Any] = dict(facecolor="#cfe3f1", edgecolor=BLUE, hatch="////", linewidth=0)  # bars of such bins
Size = tuple[float, float]  # in inches


def _figure(size: Size = (7, 4.2), rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def curves(history: Sequence[dict], recipe: Recipe, evaluated_on: str = "test", target: float | None = None) -> Figure:
    """Loss and accuracy by epoch, side by side, on the training images and on those evaluated on.

    `target` is an accuracy in percent, drawn as a line.
    """
    figure, (left, right) = _figure((11, 4.2), columns=2)
    _draw_curve(left, "loss", history, recipe, evaluated_on)
    _draw_curve(right, "accuracy", history, recipe, evaluated_on, target)
    left.set_title("Loss")
    right.set_title("Accuracy")
    last = f"{history[-1]['test_accuracy']:.2f} % {evaluated_on} accuracy"
    stopped = unfinished({"epoch": len(history), "epochs": recipe.epochs})
    figure.suptitle(f"{lettering.title(recipe.title)}, seed {recipe.seed}{stopped}: {last}")
    return figure


def curve(quantity: str, history: Sequence[dict], recipe: Recipe, evaluated_on: str, size: Size) -> Figure:
    """One of the two curves, "loss" or "accuracy", with its values on hover."""
    figure, (axis,) = _figure(size)
    _draw_curve(axis, quantity, history, recipe, evaluated_on)
    form = "{:.4f}" if quantity == "loss" else "{:.2f} %"
    for row in history:
        for kind, name in (("train", "train"), ("test", evaluated_on)):
            value = row[f"{kind}_{quantity}"]
            point = axis.scatter(row["epoch"], value, s=150, alpha=0)
            hover(point, f"epoch {row['epoch']}: {name} {quantity} {form.format(value)}")
    return figure


def captioned_curves(history: Sequence[dict], recipe: Recipe, evaluated_on: str, size: Size) -> dict[str, Figure]:
    """Both curves by their captions; none before the first epoch has ended."""
    shown = ("loss", "accuracy") if history else ()
    return {f"{each.capitalize()} by epoch": curve(each, history, recipe, evaluated_on, size) for each in shown}


def _draw_curve(
    axis: Axes, quantity: str, history: Sequence[dict], recipe: Recipe, evaluated_on: str, target: float | None = None
) -> None:
    smoothed = quantity == "loss" and recipe.label_smoothing
    objective = "train (augmented, label smoothing)" if smoothed else "train (augmented)"
    epochs = [row["epoch"] for row in history]
    for key, colour, label in (("train", BLUE, objective), ("test", RED, evaluated_on)):
        axis.plot(epochs, [row[f"{key}_{quantity}"] for row in history], color=colour, label=label, marker=".")
    if target is not None:
        axis.axhline(target, color=GREY, linewidth=1, linestyle=":", label=f"target, {target:g} %")
    axis.set(xlabel="epoch", ylabel="mean over the images" if quantity == "loss" else "percent")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.legend(frameon=False)
    _leave_out_the_first(axis, history, quantity)


def _leave_out_the_first(axis: Axes, history: Sequence[dict], quantity: str) -> None:
    """Where the first epoch would take half of the axis from all later ones, it is a note at the axis' edge."""
    first, *later = ([row[f"{key}_{quantity}"] for key in ("train", "test")] for row in history)
    if len(later) < 3:
        return
    low, high = np.min(later), np.max(later)
    if max(max(first) - high, low - min(first)) <= 0.5 * (high - low):
        return
    room, above = 0.15 * (high - low), quantity == "loss"
    low, high = (low - room / 3, high + room) if above else (low - room, high + room / 3)
    axis.set_ylim(low, high)
    note = f" epoch 1: {', '.join(f'{value:.3g}' for value in first)}"
    place = (history[1]["epoch"], high if above else low)
    axis.text(*place, note, va="top" if above else "bottom", fontsize=8, color=GREY)


def learning_rate(recipe: Recipe, steps_per_epoch: int, size: Size = (7, 4.2)) -> Figure:
    """The learning rate at every step of a run, or at a thousand steps, from the function that training uses."""
    figure, (axis,) = _figure(size)
    total, peak_step = recipe.epochs * steps_per_epoch, int(recipe.peak_epoch * steps_per_epoch) - 1
    steps = np.r_[np.linspace(0, total - 1, min(total, 1000)).astype(int), peak_step, peak_step + 1]
    steps = np.unique(steps.clip(0, total - 1))
    lr = [optim.learning_rate(recipe, step, total)[0] for step in steps.tolist()]
    epochs = (steps + 1) / steps_per_epoch
    axis.plot(epochs, lr, color=BLUE)
    peak = int(np.argmax(lr))
    (point,) = axis.plot(epochs[peak], lr[peak], "o", color=RED)
    text = f"{lr[peak]:.4g} at epoch {epochs[peak]:.3g}"
    hover(point, text)
    axis.annotate(text, (epochs[peak], lr[peak]), (8, -2), textcoords="offset points")
    axis.annotate(f"{lr[-1]:.2g}", (epochs[-1], lr[-1]), (-28, 4), textcoords="offset points", ha="right")
    axis.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    axis.set_title(f"One-cycle learning rate of {lettering.name(recipe.recipe, 40)}, step by step" if size[0] > 5 else "")
    return figure


def triangular(min_lr: float, max_lr: float, step_size: int, cycles: int) -> Figure:
    """The triangular cyclical learning rate between its two bounds, from the function that computes it."""
    figure, (axis,) = _figure()
    steps = range(2 * step_size * cycles + 1)
    axis.plot(steps, [optim.triangular(step, step_size, min_lr, max_lr) for step in steps], color=BLUE)
    for value, name, up in ((min_lr, "min LR", -14), (max_lr, "max LR", 5)):
        axis.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axis.annotate(f"{name} {value:g}", (0, value), (4, up), textcoords="offset points")
    axis.set(xlabel="step", ylabel="learning rate", title=f"Triangular cyclical learning rate, step size {step_size}")
    axis.margins(y=0.12)
    return figure


def lr_finder(
    history: History,
    suggestions: Suggestions,
    recipe: Recipe,
    step_mode: str = "exp",
    trials: Sequence[Trial] = (),
    sweep: Sequence[dict[str, Any]] = (),
) -> Figure:
    """The range test's loss against the learning rate, the suggestions marked, the recommended band shaded, and the trials.

    Below it, where there was a sweep, the accuracies that its trainings reached.
    """
    figure, (axis, *below) = _figure((8, 10), rows=2, height_ratios=(5, 4)) if sweep else _figure((8, 6))
    _draw_range_test(axis, history, suggestions, trials)
    for each in (axis, *below):
        each.set_xscale("log" if step_mode == "exp" else "linear")
    axis.set(xlabel="learning rate", ylabel="training loss", title=_answer(suggestions, recipe))
    _legend_below(axis)
    for under in below:
        _draw_sweep(under, sweep, suggestions)
    return figure


def _answer(suggestions: Suggestions, recipe: Recipe) -> str:
    of = f"learning-rate range test of {lettering.title(recipe.title)}"
    if suggestions.max_lr is None or suggestions.min_lr is None:
        return f"No rate is recommended: {of}"
    return f"Train from {suggestions.min_lr:.3g} to {suggestions.max_lr:.3g}: {of}"


def _legend_below(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _draw_range_test(axis: Axes, history: History, suggestions: Suggestions, trials: Sequence[Trial]) -> None:
    level = smooth(history.loss)
    axis.plot(history.lr, history.loss, color=GREY, alpha=0.5, linewidth=0.8, label="loss of each step")
    axis.plot(history.lr, level, color=BLUE, linewidth=2, label="smoothed, without lag")
    points = [(trial.max_lr, trial.loss) for trial in trials if np.isfinite(trial.loss)]
    if points:
        axis.plot(*zip(*points, strict=True), "o-", color=GREEN, label="where short trainings with this maximum ended")
    _shade_recommended(axis, suggestions)
    if suggestions.max_lr is not None:
        axis.axvline(suggestions.max_lr, color=GREEN, label=f"recommended: {suggestions.min_lr:.3g} to {suggestions.max_lr:.3g}")
    for value, colour, dash, label in (
        (suggestions.steepest, RED, "--", "steepest"),
        (suggestions.valley, ORANGE, "-.", "valley"),
        (suggestions.minimum_tenth, PURPLE, ":", "a tenth of the minimum"),
    ):
        axis.axvline(value, color=colour, linestyle=dash, label=f"{label}: {value:.3g}")
    low, high = min([level.min(), *(loss for _, loss in points)]), max(level[: max(len(level) // 2, 1)].max(), level[0])
    axis.set_ylim(low - 0.15 * (high - low), high + 0.35 * (high - low))


def _shade_recommended(axis: Axes, suggestions: Suggestions) -> None:
    if suggestions.max_lr is not None and suggestions.min_lr is not None:
        axis.axvspan(suggestions.min_lr, suggestions.max_lr, color=GREEN, alpha=0.12)


def _draw_sweep(axis: Axes, sweep: Sequence[dict[str, Any]], suggestions: Suggestions) -> None:
    """The accuracies of the short trainings, by the rule that chose their maximum."""
    ended = [row for row in sweep if row["accuracy"] is not None]
    for rule, style, colour, label in (
        ("grid", "o-", BLUE, f"factors of 2 around {'the recommended one' if suggestions.max_lr else 'that of the recipe'}"),
        ("steepest", "s", RED, "steepest"),
        ("recommended", "D", GREEN, "recommended at this length"),
    ):
        if rows := [row for row in ended if row["rule"] == rule]:
            axis.plot([row["max_lr"] for row in rows], [row["accuracy"] for row in rows], style, color=colour, label=label)
    _shade_recommended(axis, suggestions)
    if ended:  # what collapsed may leave the picture
        axis.set_ylim(max(axis.get_ylim()[0], max(row["accuracy"] for row in ended) - 20), None)
        _legend_below(axis)
    trained = plural(sweep[0]["epochs"], "epoch")
    title = f"Holdout accuracy after {trained} with this maximum" if ended else f"Every training of {trained} diverged"
    axis.set(xlabel="learning rate", ylabel="percent", title=title)


def unfinished(content: dict[str, Any]) -> str:
    """For a title: where a run stood that had not ended, by its `epoch`, `epochs` and, if it has one, `step`; nothing of one that had."""
    step = f", step {content['step']}" if content.get("step") else ""
    return "" if content["epoch"] == content["epochs"] else f" after epoch {content['epoch']} of {content['epochs']}{step}"


def evaluation(content: dict[str, Any]) -> dict[str, Figure]:
    """The pictures of what `evaluation.json` holds, by the name of their file."""
    what = f"{content['recipe']}{unfinished(content)}, {content['images']:,} {content['evaluated_on']} images"
    right = f"{what}: {content['accuracy']:.2f} % right"
    return {
        "confusion_matrix": confusion_matrix(content["confusion_matrix"], list(content["classes"]), f"Confusion matrix. {right}"),
        "class_accuracy": class_accuracy(content["classes"], right),
        "reliability": reliability(content, f"How far confidence can be believed: {what}"),
    }


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str, size: Size | None = None) -> Figure:
    """True classes down, predicted across; in a cell the images and their percent of the row. Without the numbers above 30 classes.

    Blue is right and orange wrong, each darker the larger its share of the true class is.
    """
    counts = np.asarray(matrix)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    right, many = np.eye(len(counts), dtype=bool), len(counts) > MOST_CLASSES
    side = 8 if many else max(6.6, 1.2 + (0.62 if len(counts) <= ROOMY else 0.4) * len(counts))
    figure, (axis,) = _figure(size or (side + 1.2, side))
    axis.grid(visible=False)
    most = max(1.0, np.where(right, 0, shares).max())
    wrong = ScalarMappable(Normalize(0, most), "Oranges")
    cells = np.where(right[..., None], colormaps["Blues"](shares / 250), wrong.to_rgba(shares))
    cells[counts == 0] = 1
    axis.imshow(cells, interpolation="nearest")
    if not many:
        _write_cells(axis, counts, shares, classes, size is not None)
    every = -(-len(classes) // _most_names(size))
    names = [lettering.name(name) for name in classes[::every]]
    axis.set_xticks(range(0, len(classes), every), names, rotation=45, ha="right")
    axis.set_yticks(range(0, len(classes), every), names)
    axis.set(xlabel="predicted class", ylabel="true class", title=lettering.title(title))
    if size is None:
        ticks = MaxNLocator(steps=(1, 2, 5, 10))
        figure.colorbar(wrong, ax=axis, label="mistakes, percent of the true class", shrink=0.8, ticks=ticks)
    return figure


def _most_names(size: Size | None) -> int:
    """Of classes, one below the other, in a chart of this size or one that grows with them."""
    return MOST_CLASSES if size is None else min(MOST_CLASSES, int(4 * size[1]))


def _write_cells(axis: Axes, counts: np.ndarray, shares: np.ndarray, classes: Sequence[str], small: bool) -> None:
    """The number of images in each cell that has any, and what percent of its row they are; where there is little room, on hover."""
    darkest = np.where(np.eye(len(counts), dtype=bool), 0, shares).max()
    for (row, column), count in np.ndenumerate(counts):
        if not count:
            continue
        text, right = f"{count:,}", row == column
        if small:
            cell = axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, alpha=0))
            hover(cell, f"{count:,} of {classes[row]} predicted as {classes[column]}: {shares[row, column]:.1f} %")
        elif len(counts) <= ROOMY:
            text += f"\n{shares[row, column]:.1f} %"
        colour = "white" if not right and shares[row, column] > 0.6 * darkest else "black"
        if not small or len(counts) <= ROOMY:
            weight = "bold" if right else "normal"
            written = axis.text(column, row, text, ha="center", va="center", weight=weight, color=colour, fontsize=8)
            written.set_in_layout(False)  # it lies inside of its cell


def class_accuracy(classes: dict[str, dict[str, float]], title: str, size: Size | None = None) -> Figure:
    """The share of each true class that is predicted right, as bars, the worst on top; `classes` as in `evaluation.json`.

    Of more than 30 classes the 30 worst, or as many as the size has room for.
    """
    judged = [name for name in classes if classes[name]["count"]]
    names = sorted(reversed(judged), key=lambda name: -classes[name]["recall"])[-_most_names(size) :]
    if len(names) < len(judged):
        title += f"\nthe {len(names)} worst of {len(judged):,} classes"
    figure, (axis,) = _figure(size or (7, 0.9 + 0.32 * len(names)))
    recall = [classes[name]["recall"] for name in names]
    bars = axis.barh(range(len(names)), recall, color=BLUE)
    for bar, name in zip(bars, names, strict=True):
        hover(bar, f"{name}: {classes[name]['recall']:.2f} % right")
    axis.bar_label(bars, [f"{value:.1f} %" for value in recall], padding=3)
    axis.set_yticks(range(len(names)), [lettering.name(name) for name in names])
    axis.set(xlim=(0, 116), xticks=range(0, 101, 20), xlabel="percent of the class predicted right", title=lettering.title(title))
    axis.grid(visible=False, axis="y")
    return figure


def reliability(content: dict[str, Any], title: str, size: Size = (6.4, 6.2)) -> Figure:
    """Of what `evaluate` returns: accuracy by confidence with the diagonal of perfect calibration, over the count of images in each bin.

    Bins of fewer than 30 images are hatched.
    """
    figure, (axis, below) = _figure(size, rows=2, sharex=True, height_ratios=(3, 1))
    bins = content["reliability"]
    centres, width = [(row["from"] + row["to"]) / 2 for row in bins], bins[0]["to"] - bins[0]["from"]
    bars = axis.bar(centres, [row["accuracy"] or 0 for row in bins], 0.92 * width, color=BLUE)
    filled = [row for row in bins if row["count"]]
    axis.plot([r["confidence"] for r in filled], [r["accuracy"] for r in filled], "o", color=RED, label="at its mean confidence")
    axis.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="perfectly calibrated")
    numbers = f"expected calibration error {content['calibration_error']:.2f} %, negative log likelihood {content['loss']:.4f}"
    axis.set(ylabel="accuracy, percent", ylim=(0, 103), xlim=(0, 100))
    axis.set_title(f"{textwrap.fill(lettering.title(title), 66)}\n{numbers}" if title else "")
    counts = below.bar(centres, [row["count"] for row in bins], 0.92 * width, color=GREY)
    below.set(xlabel="confidence: probability of the predicted class, percent\n(without the temperature)", ylabel="images")
    handles = [Patch(color=BLUE, label="accuracy of the bin"), *axis.get_legend_handles_labels()[0]]
    for row, *pair in zip(bins, bars, counts, strict=True):
        if row["count"]:
            text = f"{row['from']:.0f} to {row['to']:.0f} %: {row['count']:,} images, {row['accuracy']:.1f} % right"
            hover(pair[0], text)
            hover(pair[1], text)
        if row["count"] < FEW:
            pair[0].set(**FAINT)
    if any(0 < row["count"] < FEW for row in bins):
        handles.append(Patch(**FAINT, label=f"fewer than {FEW} images"))
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def comparison(groups: Sequence[dict[str, Any]], evaluated_on: str) -> Figure:
    """Accuracy by epoch of several groups of runs: the mean of each, and the range of its seeds; `groups` as `compare` has them."""
    labels = [textwrap.fill(lettering.title(group["label"]), 90) for group in groups]
    figure, (axis,) = _figure((8, 4.8 + 0.2 * sum(1 + label.count("\n") for label in labels)))
    styles = [(colour, line) for line in ("-", "--", ":") for colour in (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)]
    for group, name, (colour, line) in zip(groups, labels, itertools.cycle(styles)):
        by_run = np.array([run["test_accuracy"] for run in group["runs"]])
        epochs = np.arange(by_run.shape[1]) + 1
        spread = f" ± {group['std']:.2f}" if group["std"] is not None else ""
        label = f"{name}: {group['mean']:.2f}{spread} %, n = {group['n']}"
        axis.plot(epochs, by_run.mean(0), color=colour, linestyle=line, label=label, marker=".")
        range_of = dict(color=colour, alpha=0.15)
        if len(epochs) == 1:
            axis.vlines(epochs, by_run.min(0), by_run.max(0), linewidth=6, **range_of)
        axis.fill_between(epochs, by_run.min(0), by_run.max(0), linewidth=0, **range_of)
    axis.set(xlabel="epoch", ylabel="percent", title=f"{evaluated_on.capitalize()} accuracy by epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure
