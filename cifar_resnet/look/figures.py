"""Every picture: each a function from data to a Matplotlib Figure, which a notebook shows and a command saves."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import UsageError
from ..recipe import Recipe
from ..training import optim
from ..training.lr_finder import History, Suggestions, Trial, smooth
from .analysis import Mistake

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
FORMATS = ("png", "svg", "pdf")


def render(figure: Figure, format: str = "png") -> bytes:
    """The figure as a file of this format: png, svg or pdf."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=110)
    return buffer.getvalue()


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise UsageError(f"--format {format}: it is {', '.join(FORMATS)}")


def _plain(name: str) -> str:
    """A name that Matplotlib does not take for mathematics."""
    return name.replace("$", r"\$")


def _figure(columns: int = 1, size: tuple[float, float] = (7, 4.2), **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(columns, squeeze=False, **options)[:, 0] if options else figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def curves(
    history: Sequence[dict], recipe: Recipe, evaluated_on: str = "test", target: float | None = None, *, stacked: bool = False
) -> Figure:
    """Loss and accuracy by epoch, on the training images and on those evaluated on; side by side, or stacked.

    `target` is an accuracy in percent, drawn as a line.
    """
    figure, (left, right) = _figure(2, (7, 7.6), sharex=True) if stacked else _figure(2, (11, 4.2))
    epochs = [row["epoch"] for row in history]
    objective = "train (augmented, label smoothing)" if recipe.label_smoothing else "train (augmented)"
    for axis, quantity, trained in ((left, "loss", objective), (right, "accuracy", "train (augmented)")):
        axis.plot(epochs, [row[f"train_{quantity}"] for row in history], color=BLUE, label=trained, marker=".")
        axis.plot(epochs, [row[f"test_{quantity}"] for row in history], color=RED, label=evaluated_on, marker=".")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    if target is not None:
        right.axhline(target, color=GREY, linewidth=1, linestyle=":", label=f"target, {target:g} %")
    last = history[-1]
    left.set(title="Loss", ylabel="mean over the images")
    right.set(title="Accuracy", ylabel="percent")
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.suptitle(f"{_plain(recipe.title)}, seed {recipe.seed}: {last['test_accuracy']:.2f} % {evaluated_on} accuracy")
    return figure


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> Figure:
    """The learning rate at every step of a run, from the function that training uses."""
    figure, (axis,) = _figure()
    total = recipe.epochs * steps_per_epoch
    lr = [optim.learning_rate(recipe, step, total)[0] for step in range(total)]
    epochs = (np.arange(total) + 1) / steps_per_epoch
    axis.plot(epochs, lr, color=BLUE)
    peak = int(np.argmax(lr))
    axis.plot(epochs[peak], lr[peak], "o", color=RED)
    axis.annotate(f"{lr[peak]:.4g} at epoch {epochs[peak]:.3g}", (epochs[peak], lr[peak]), (8, -2), textcoords="offset points")
    axis.annotate(f"{lr[-1]:.2g}", (epochs[-1], lr[-1]), (-28, 4), textcoords="offset points", ha="right")
    axis.set(
        xlabel="epoch", ylabel="learning rate", title=f"One-cycle learning rate of {recipe.recipe}, step by step", ylim=(0, None)
    )
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
    figure, (axis, *below) = _figure(2, (8, 8.4), sharex=True, height_ratios=(5, 4)) if sweep else _figure(size=(8, 5.2))
    _draw_range_test(axis, history, suggestions, trials)
    if step_mode == "exp":
        axis.set_xscale("log")
    axis.set(xlabel="learning rate", ylabel="training loss", title=f"Learning-rate range test of {_plain(recipe.title)}")
    axis.legend(frameon=False, fontsize=9)
    for under in below:
        axis.set_xlabel("")
        _draw_sweep(under, sweep, suggestions)
    return figure


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
        ("grid", "o-", BLUE, "factors of 2 around the recommended one"),
        ("steepest", "s", RED, "steepest"),
        ("recommended", "D", GREEN, "recommended at this length"),
    ):
        rows = [row for row in ended if row["rule"] == rule]
        axis.plot([row["max_lr"] for row in rows], [row["accuracy"] for row in rows], style, color=colour, label=label)
    _shade_recommended(axis, suggestions)
    if ended:  # what collapsed may leave the picture
        axis.set_ylim(max(axis.get_ylim()[0], max(row["accuracy"] for row in ended) - 20), None)
    title = f"Holdout accuracy after {sweep[0]['epochs']} epochs with this maximum"
    axis.set(xlabel="learning rate", ylabel="percent", title=title)
    axis.legend(frameon=False, fontsize=9)


def evaluation(content: dict[str, Any]) -> dict[str, Figure]:
    """The pictures of what `evaluation.json` holds, by the name of their file."""
    what = f"{content['recipe']}, {content['images']:,} {content['evaluated_on']} images"
    right = f"{what}: {content['accuracy']:.2f} % right"
    bins, error, loss = (content[key] for key in ("reliability", "calibration_error", "loss"))
    return {
        "confusion_matrix": confusion_matrix(content["confusion_matrix"], list(content["classes"]), right),
        "class_accuracy": class_accuracy(content["classes"], right),
        "reliability": reliability(bins, error, loss, f"How far confidence can be believed: {what}"),
    }


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Figure:
    """Counts, true classes down and predicted across; the colour shows the mistakes, the diagonal is left white."""
    counts = np.asarray(matrix)
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    side = max(6.6, 1 + 0.5 * len(counts))
    figure, (axis,) = _figure(size=(side + 0.9, side))
    axis.grid(visible=False)
    image = axis.imshow(np.ma.masked_equal(wrong, 0), cmap="Oranges", vmin=0, vmax=max(1, wrong.max()))
    for (row, column), count in np.ndenumerate(counts):
        shown = dict(color="white" if row != column and count > 0.6 * wrong.max() else "black")
        axis.text(column, row, count or "", ha="center", va="center", weight="bold" if row == column else "normal", **shown)
    names = [_plain(name) for name in classes]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(image, label="mistakes", shrink=0.8, ticks=MaxNLocator(integer=True))
    return figure


def class_accuracy(classes: dict[str, dict[str, float]], title: str) -> Figure:
    """The share of each true class that is predicted right, as bars, the worst on top; `classes` as in `evaluation.json`."""
    figure, (axis,) = _figure(size=(7, 0.9 + 0.32 * len(classes)))
    names = sorted(reversed(classes), key=lambda name: -classes[name]["recall"])
    recall = [classes[name]["recall"] for name in names]
    bars = axis.barh([_plain(name) for name in names], recall, color=BLUE)
    axis.bar_label(bars, [f"{value:.1f} %" for value in recall], padding=3)
    axis.set(xlim=(0, 112), xticks=range(0, 101, 20), xlabel="percent of the class predicted right", title=title)
    axis.grid(visible=False, axis="y")
    return figure


def reliability(bins: Sequence[dict[str, Any]], calibration_error: float, loss: float, title: str) -> Figure:
    """Accuracy by confidence with the diagonal of perfect calibration, over the count of images in each bin."""
    figure, (axis, below) = _figure(2, (6.4, 6.2), sharex=True, height_ratios=(3, 1))
    centres, width = [(row["from"] + row["to"]) / 2 for row in bins], bins[0]["to"] - bins[0]["from"]
    axis.bar(centres, [row["accuracy"] or 0 for row in bins], 0.92 * width, color=BLUE, label="accuracy of the bin")
    filled = [row for row in bins if row["count"]]
    axis.plot([r["confidence"] for r in filled], [r["accuracy"] for r in filled], "o", color=RED, label="at its mean confidence")
    axis.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="perfectly calibrated")
    numbers = f"expected calibration error {calibration_error:.2f} %, negative log likelihood {loss:.4f}"
    axis.set(ylabel="accuracy, percent", title=f"{title}\n{numbers}", ylim=(0, 103), xlim=(0, 100))
    below.bar(centres, [row["count"] for row in bins], 0.92 * width, color=GREY)
    below.set(xlabel="confidence: probability of the predicted class, percent", ylabel="images")
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _cells(count: int, columns: int, width: float, title: str) -> tuple[Figure, list[Axes]]:
    """Axes without frames in rows, for `count` images of that width in inches, each with up to three lines of text above."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.1 if title else 0), 2.2 * rows + (0.4 if title else 0)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    if title:
        figure.suptitle(title, fontsize=11, wrap=True)
    return figure, axes


def misclassified(images: np.ndarray, shown: Sequence[Mistake], title: str) -> Figure:
    """A grid of mistakes, uint8 images (N, 32, 32, 3): the class predicted with its confidence, the true one, and the image's name."""
    figure, axes = _cells(len(shown), 5, 1.7, title)
    for axis, image, mistake in zip(axes, images, shown, strict=False):
        axis.imshow(image, interpolation="nearest")
        lines = f"{mistake.predicted}, {100 * mistake.confidence:.0f} %", f"true: {mistake.true}", mistake.caption
        axis.set_title(_plain("\n".join(lines)), fontsize=9)
    return figure


def grad_cam(images: np.ndarray, predicted: np.ndarray, true: np.ndarray, shown: Sequence[Mistake], title: str) -> Figure:
    """Each mistake three times: plain, and under the Grad-CAM maps of the class predicted and of the true one.

    Maps are float (N, 32, 32) in 0 to 1; bright is where the class was seen. Images are uint8 (N, 32, 32, 3).
    """
    figure, axes = _cells(len(shown), 2, 4.6, title)
    for axis, image, mistake, *maps in zip(axes, images, shown, predicted, true, strict=False):
        for column, heat in enumerate([None, *maps]):
            extent = (34 * column, 34 * column + 32, 32, 0)
            axis.imshow(image, interpolation="nearest", extent=extent)
            if heat is not None:
                options = dict(alpha=0.25 + 0.4 * heat, vmin=0, vmax=1, interpolation="bilinear")
                axis.imshow(heat, cmap="inferno", extent=extent, **options)
        axis.set(xlim=(-5, 105), ylim=(32, 0))
        for left, kind, name in ((34, "predicted", mistake.predicted), (68, "true", mistake.true)):
            text = f"{kind}: {_plain(name)}\n{100 * mistake.probabilities[name]:.1f} %"
            axis.text(left + 16, -1, text, ha="center", va="bottom", fontsize=9)
    return figure


def samples(images: np.ndarray, views: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """One row a class: its image, uint8 (C, 32, 32, 3), and the augmented views of it, uint8 (C, V, 32, 32, 3)."""
    count = views.shape[1] + 1
    figure = Figure(figsize=(0.95 * count + 1.1, 0.98 * len(images) + 0.5), layout="constrained")
    grid = figure.subplots(len(images), count, squeeze=False)
    for row, image, seen, name in zip(grid, images, views, classes, strict=True):
        for axis, picture in zip(row, [image, *seen], strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(_plain(name), rotation=0, ha="right", va="center")
    grid[0, 0].set_title("image", fontsize=10)
    grid[0, 1].set_title("as training sees it", fontsize=10, loc="left")
    figure.suptitle(title, fontsize=11)
    return figure


def comparison(groups: Sequence[dict[str, Any]], evaluated_on: str) -> Figure:
    """Accuracy by epoch of several groups of runs: the mean of each, and the range of its seeds; `groups` as `compare` has them."""
    figure, (axis,) = _figure(size=(8, 4.8))
    styles = [(colour, line) for line in ("-", "--", ":") for colour in (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)]
    for group, (colour, line) in zip(groups, itertools.cycle(styles)):
        by_run = np.array([run["test_accuracy"] for run in group["runs"]])
        epochs = np.arange(by_run.shape[1]) + 1
        spread = f" ± {group['std']:.2f}" if group["std"] is not None else ""
        label = f"{_plain(group['label'])}: {group['mean']:.2f}{spread} %, n = {group['n']}"
        axis.plot(epochs, by_run.mean(0), color=colour, linestyle=line, label=label, marker=".")
        axis.fill_between(epochs, by_run.min(0), by_run.max(0), color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel="epoch", ylabel="percent", title=f"{evaluated_on.capitalize()} accuracy by epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=9)
    return figure
