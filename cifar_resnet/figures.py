"""Every picture: each a function from data to a Matplotlib Figure, which a notebook shows and a command saves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from . import schedule
from .analysis import Mistake
from .lr_finder import History, Suggestions, smooth
from .optimizer import rates
from .recipe import Recipe
from .run import write_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
BEST_REFERENCE = ("best of the five documented systems, 91.97 %", 91.97)


def save(figure: Figure, path: Path) -> None:
    """Writes the figure whole, in the format of its suffix."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=110)
    write_whole(path, buffer.getvalue())


def _figure(columns: int = 1, size: tuple[float, float] = (7, 4.2)) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def curves(history: Sequence[dict], recipe: Recipe, evaluated_on: str = "test") -> Figure:
    """Loss and accuracy by epoch, on the training images and on those evaluated on."""
    figure, (left, right) = _figure(2, (11, 4.2))
    epochs = [row["epoch"] for row in history]
    objective = "train (augmented, label smoothing)" if recipe.label_smoothing else "train (augmented)"
    for axis, quantity, trained in ((left, "loss", objective), (right, "accuracy", "train (augmented)")):
        axis.plot(epochs, [row[f"train_{quantity}"] for row in history], color=BLUE, label=trained, marker=".")
        axis.plot(epochs, [row[f"test_{quantity}"] for row in history], color=RED, label=evaluated_on, marker=".")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    if recipe.dataset == "cifar10" and evaluated_on == "test":
        right.axhline(BEST_REFERENCE[1], color=GREY, linewidth=1, linestyle=":", label=BEST_REFERENCE[0])
    last = history[-1]
    left.set(title="Loss", ylabel="mean an image")
    right.set(title="Accuracy", ylabel="percent")
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.suptitle(
        f"{recipe.recipe} on {recipe.dataset}, seed {recipe.seed}: {last['test_accuracy']:.2f} % {evaluated_on} accuracy"
    )
    return figure


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> Figure:
    """The learning rate at every step of a run, from the function that training uses."""
    figure, (axis,) = _figure()
    total = recipe.epochs * steps_per_epoch
    lr = [rates(recipe, step, total)[0] for step in range(total)]
    epochs = (np.arange(total) + 1) / steps_per_epoch
    axis.plot(epochs, lr, color=BLUE)
    peak = int(np.argmax(lr))
    axis.plot(epochs[peak], lr[peak], "o", color=RED)
    axis.annotate(f"{lr[peak]:.4g} at epoch {epochs[peak]:.3g}", (epochs[peak], lr[peak]), (8, -2), textcoords="offset points")
    axis.annotate(f"{lr[-1]:.2g}", (epochs[-1], lr[-1]), (3, 5), textcoords="offset points")
    axis.set(
        xlabel="epoch", ylabel="learning rate", title=f"One-cycle learning rate of {recipe.recipe}, step by step", ylim=(0, None)
    )
    return figure


def triangular(min_lr: float, max_lr: float, step_size: int, cycles: int) -> Figure:
    """The triangular cyclical learning rate between its two bounds, from the function that computes it."""
    figure, (axis,) = _figure()
    steps = range(2 * step_size * cycles + 1)
    axis.plot(steps, [schedule.triangular(step, step_size, min_lr, max_lr) for step in steps], color=BLUE)
    for value, name, up in ((min_lr, "min LR", -14), (max_lr, "max LR", 5)):
        axis.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axis.annotate(f"{name} {value:g}", (0, value), (4, up), textcoords="offset points")
    axis.set(xlabel="step", ylabel="learning rate", title=f"Triangular cyclical learning rate, step size {step_size}")
    axis.margins(y=0.12)
    return figure


def lr_finder(history: History, suggestions: Suggestions, recipe: Recipe, step_mode: str = "exp") -> Figure:
    """The range test's loss against the learning rate, the suggestions marked and the recommended band shaded."""
    figure, (axis,) = _figure(size=(8, 4.8))
    level = smooth(history.loss)
    axis.plot(history.lr, history.loss, color=GREY, alpha=0.5, linewidth=0.8, label="loss of each step")
    axis.plot(history.lr, level, color=BLUE, linewidth=2, label="smoothed, without lag")
    if suggestions.max_lr is not None:
        axis.axvspan(suggestions.min_lr, suggestions.max_lr, color=GREEN, alpha=0.12)
        axis.axvline(suggestions.max_lr, color=GREEN, label=f"recommended: {suggestions.min_lr:.3g} to {suggestions.max_lr:.3g}")
    for value, colour, dash, label in (
        (suggestions.steepest, RED, "--", "steepest"),
        (suggestions.valley, ORANGE, "-.", "valley"),
        (suggestions.minimum_tenth, PURPLE, ":", "a tenth of the minimum"),
    ):
        axis.axvline(value, color=colour, linestyle=dash, label=f"{label}: {value:.3g}")
    if step_mode == "exp":
        axis.set_xscale("log")
    low, high = level.min(), max(level[: max(len(level) // 2, 1)].max(), level[0])
    axis.set_ylim(low - 0.15 * (high - low), high + 0.35 * (high - low))
    axis.set(
        xlabel="learning rate", ylabel="training loss", title=f"Learning-rate range test of {recipe.recipe} on {recipe.dataset}"
    )
    axis.legend(frameon=False, fontsize=9)
    return figure


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Figure:
    """Counts, true classes down and predicted across; the colour shows the mistakes, the diagonal is left white."""
    counts = np.asarray(matrix)
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    figure, (axis,) = _figure(size=(7.5, 6.6))
    axis.grid(visible=False)
    image = axis.imshow(np.ma.masked_equal(wrong, 0), cmap="Oranges", vmin=0)
    for (row, column), count in np.ndenumerate(counts):
        shown = dict(color="white" if row != column and count > 0.6 * wrong.max() else "black")
        axis.text(column, row, count or "", ha="center", va="center", weight="bold" if row == column else "normal", **shown)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(image, label="mistakes", shrink=0.8)
    return figure


def _grid(images: np.ndarray, shown: Sequence[Mistake], title: str) -> tuple[Figure, list]:
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.05 * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, image, mistake in zip(axes, images, shown, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"{mistake.predicted}, {100 * mistake.confidence:.0f} %\ntrue: {mistake.true}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure, axes


def misclassified(images: np.ndarray, shown: Sequence[Mistake], title: str) -> Figure:
    """A grid of mistakes, uint8 images (N, 32, 32, 3): the class predicted with its confidence, and the true one."""
    return _grid(images, shown, title)[0]


def grad_cam(images: np.ndarray, maps: np.ndarray, shown: Sequence[Mistake], title: str) -> Figure:
    """The same grid under Grad-CAM maps, float (N, 32, 32) in 0 to 1: bright where the predicted class was seen."""
    figure, axes = _grid(images, shown, title)
    for axis, heat in zip(axes, maps, strict=False):
        axis.imshow(heat, cmap="inferno", alpha=0.25 + 0.4 * heat, vmin=0, vmax=1, interpolation="bilinear")
    return figure
