"""What the augmentation of a recipe makes of the images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..arguments import LoaderKind, checked
from ..data.loaders import epoch_order, make_loader
from ..errors import UsageError
from ..files import check_file
from ..look import analysis, figures, pictures
from ..recipe import Recipe
from ..run_dir import PICTURES
from .common import prepare, save_figure


@checked
def samples(
    recipe: Recipe | None = None,
    path: Path | str | None = None,
    *,
    views: int = 8,
    data_dir: Path | str | None = None,
    loader: LoaderKind = "auto",
    workers: int | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Figure:
    """One training image of each class, drawn by the seed, beside the views that the recipe's own loader makes of it.

    Of more than 30 classes, the first 30.

    Args:
        path: where the picture goes (.png, .svg or .pdf), if anywhere.
        views: how many, each from an epoch of its own.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if not 1 <= views <= 20:
        raise UsageError(f"--views {views} must be 1 to 20")
    if path is not None:
        check_file(Path(path), *PICTURES)
    recipe, device, data = prepare(recipe, "cpu", data_dir, notify)
    rng = np.random.default_rng(recipe.seed)
    classes = data.classes[: figures.MOST_CLASSES]
    positions = [rng.choice(np.flatnonzero(data.train.labels == label)) for label in range(len(classes))]
    chosen = data.train.take(np.array(positions))
    batches = make_loader(chosen, recipe.replace(batch_size=len(chosen)), device, loader, workers)
    seen = np.empty((len(chosen), views, 32, 32, 3), np.uint8)
    for view in range(views):
        images = next(iter(batches.epoch(view))).images
        seen[epoch_order(recipe, view, len(chosen)), view] = analysis.pixels(images, recipe)
    title = f"Training images under the augmentation of {recipe.recipe}"
    if len(classes) < len(data.classes):
        title += f", the first {len(classes)} of {len(data.classes):,} classes"
    figure = pictures.samples(chosen.images, seen, classes, title)
    if path is not None:
        save_figure(figure, Path(path))
    return figure
