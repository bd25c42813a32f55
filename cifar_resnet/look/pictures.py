"""Pictures of images: the mistakes, where the network looked, and what training sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from . import lettering
from .analysis import Mistake
from .rendering import BLUE, GREEN, GREY, RED

PREDICTED, TRUE = RED, BLUE  # the two classes of a mistake, in every picture


def misclassified(images: np.ndarray, shown: Sequence[Mistake], title: str, given: str = "true") -> Figure:
    """A grid of images, uint8 (N, 32, 32, 3): above each the class predicted with its confidence, and the true one; below, its name.

    `given` is what the true class is called: "label" where it is in doubt.
    """
    figure, tiles = _tiles(len(shown), 5, title, above=0.4, below=0.2)
    for (axis,), image, mistake in zip(tiles, images, shown, strict=False):
        axis.imshow(image, interpolation="nearest")
        _two_lines(axis, *_names(mistake, given))
        axis.set_xlabel(lettering.name(mistake.caption, 22), fontsize=7, color=GREY, labelpad=2)
    return figure


def grad_cam(
    images: np.ndarray, predicted: np.ndarray, rival: np.ndarray, shown: Sequence[Mistake], title: str, given: str = "true"
) -> Figure:
    """Each image beside what told its predicted class from the true one; see `draw_difference`, and for `given` `misclassified`.

    Maps are float (N, 32, 32) in 0 to 1, the Grad-CAM of the predicted class and of `Mistake.rival`. Images are uint8 (N, 32, 32, 3).
    """
    figure, tiles = _tiles(len(shown), 4, title, pictures=2, side=1.1, above=0.4, key=0.3 if len(shown) > 2 else 0.7)
    for (plain, looked), image, first, second, mistake in zip(tiles, images, predicted, rival, shown, strict=False):
        plain.imshow(image, interpolation="nearest")
        draw_difference(looked, image, first, second)
        _two_lines(plain, *_names(mistake, given))
    true = "the true class" if given == "true" else f"the {given}"
    other = true if any(mistake.wrong for mistake in shown) else "the second most probable class"
    handles = [
        Patch(color=PREDICTED, label="seen more for the class predicted"),
        Patch(color=TRUE, label=f"more for {other}"),
        Line2D([], [], color=GREY, label="lines: half of the strongest, of each class"),
    ]
    figure.legend(handles=handles, frameon=False, loc="lower center", ncols=3 if len(shown) > 2 else 1, fontsize=8)
    return figure


def draw_difference(axis: Axes, image: np.ndarray, predicted: np.ndarray, rival: np.ndarray) -> None:
    """The image in grey, tinted where one Grad-CAM map exceeds the other, with a contour at half of the strongest of each."""
    extent = (-0.5, 31.5, 31.5, -0.5)
    grey = image @ np.array([0.299, 0.587, 0.114]) / 255
    axis.imshow(0.25 + 0.6 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    tint = np.empty((*predicted.shape, 4))
    more = predicted - rival
    tint[..., :3] = np.where((more > 0)[..., None], to_rgb(PREDICTED), to_rgb(TRUE))
    tint[..., 3] = 0.8 * np.abs(more).clip(0, 1)
    axis.imshow(tint, interpolation="bilinear", extent=extent)
    for heat, colour in ((predicted, PREDICTED), (rival, TRUE)):
        if heat.min() < 0.5 < heat.max():
            axis.contour(heat, levels=[0.5], colors=["white"], linewidths=2.2, alpha=0.7)
            axis.contour(heat, levels=[0.5], colors=[colour], linewidths=1.2)


def samples(images: np.ndarray, views: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """One row a class: its image, uint8 (C, 32, 32, 3), and the augmented views of it, uint8 (C, V, 32, 32, 3)."""
    names = [lettering.name(each) for each in classes]
    left = 0.25 + 0.09 * max(map(len, names))
    figure, rows = _tiles(len(images), 1, title, pictures=views.shape[1] + 1, side=0.85, left=left, head=0.25)
    for row, image, seen, name in zip(rows, images, views, names, strict=True):
        for axis, picture in zip(row, [image, *seen], strict=True):
            axis.imshow(picture, interpolation="nearest")
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    rows[0][0].set_title("image", fontsize=10)
    rows[0][1].set_title("as training sees it", fontsize=10, loc="left")
    return figure


def _tiles(
    count: int, columns: int, title: str, *, pictures: int = 1, side: float = 1.25, above: float = 0.0, below: float = 0.0,
    left: float = 0.15, head: float = 0.0, key: float = 0.0,
) -> tuple[Figure, list[list[Axes]]]:  # fmt: skip
    """A figure of `count` tiles in rows, each with the framed axes of its pictures side by side.

    In inches: a picture's `side`, the room `above` and `below` each, the figure's margin `left`, its `head` below the title,
    and the room for a `key` at its foot.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    tile, gap = pictures * (side + 0.05), 0.15 if columns > 1 else 0.0
    row = above + side + below + (0.1 if above else 0.05)
    width, height = max(left + columns * (tile + gap) + 0.05, 4.6 if title else 0.0), rows * row + key + 0.05
    lines = -(-len(title) // int(13 * width)) if title else 0
    height += head + 0.1 + 0.2 * lines if title else 0.0
    figure = Figure(figsize=(width, height))
    if title:
        figure.suptitle(lettering.title(title), fontsize=11, wrap=True, y=1 - 0.08 / height, va="top")
    tiles = []
    for i in range(count):
        x, y = left + i % columns * (tile + gap), key + 0.05 + (rows - 1 - i // columns) * row + below
        places = [((x + j * (side + 0.05)) / width, y / height, side / width, side / height) for j in range(pictures)]
        tiles.append([_framed(figure.add_axes(place)) for place in places])
    return figure, tiles


def _framed(axis: Axes) -> Axes:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color=GREY, linewidth=0.6)
    return axis


def _names(mistake: Mistake, given: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """What stands above an image: text and colour of the class predicted, and of the true one."""
    if not mistake.wrong:
        return (f"{lettering.name(mistake.predicted)}, {100 * mistake.confidence:.1f} %", GREEN), ("right", GREEN)
    predicted = f"{lettering.name(mistake.predicted, 16)}, {100 * mistake.confidence:.1f} %"
    return (predicted, PREDICTED), (f"{given}: {lettering.name(mistake.true, 18)}", TRUE)


def _two_lines(axis: Axes, *lines: tuple[str, str]) -> None:
    for place, (text, colour) in zip((14, 3), lines, strict=True):
        axis.annotate(text, (0, 1), (0, place), "axes fraction", "offset points", color=colour, fontsize=8, va="bottom")
