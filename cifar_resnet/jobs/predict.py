"""A trained model at work on image files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..arguments import Tta, checked
from ..data.folders import image_files, some
from ..data.images import pictures_in, read_image
from ..data.loaders import TensorLoader
from ..data.splits import Split
from ..errors import DataError, UsageError
from ..look import analysis
from .common import check_finite, opened, say_unfinished

CHUNK = 1000  # images in memory at a time

Picture = Path | str | Image.Image | np.ndarray


class _Asked(NamedTuple):
    """One image to predict: a file, or a picture in memory that `path` names."""

    path: Path
    picture: Image.Image | None = None
    named: bool = True  # by the user; False where it only lies in a folder


@checked
def predict(
    checkpoint: Path | str,
    images: Picture | Sequence[Picture],
    *,
    top: int = 3,
    tta: Tta = "none",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    skipped: Callable[[str], object] = warnings.warn,
    notify: Callable[[str], object] = warnings.warn,
) -> Iterator[dict[str, Any]]:
    """For each image its most probable classes: {"image": path, "classes": [{"class", "probability"}, ...]}.

    For a PIL image or an array, "image" is its index among all images, from 0; images in folders count.

    Args:
        images: a file, a folder, a PIL image or an array, or several of them. Of a folder all image files are taken, see
            `folders.image_files`. An array is uint8 (H, W), (H, W, 3) or (N, H, W, 3). All are read as `images.read_image` says.
        top: how many classes.
        tta: "none", "flip" or "flip-shift"; see `analysis.views`.
        progress: called with how many images are done, of how many.
        skipped: called with a line for each image given that cannot be read.
        notify: called with a line where the run has not ended, and with one that counts the files in folders that are no images.

    Raises:
        CifarResnetError: one line that says what was wrong, when called. What cannot be read as an image raises nothing.
    """
    if top < 1:
        raise UsageError(f"--top {top} must be at least 1")
    loaded, resolved = opened(checkpoint, device)
    say_unfinished(loaded, notify)
    asked, others = list[_Asked](), list[Path]()
    images = [images] if isinstance(images, Picture) else images
    for each in images:
        _add(each, asked, others)
    if not asked:
        raise UsageError(f"there are no images in {', '.join(map(str, images)) or 'an empty list'}")
    model = loaded.model(resolved)

    def probable(pixels: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        split = Split(np.stack(pixels), np.zeros(len(pixels), np.int64), np.arange(len(pixels)))
        logits = analysis.mean_logits(model, TensorLoader(split, loaded.recipe, resolved), tta)
        check_finite(loaded, logits)
        return analysis.most_probable(logits, loaded.classes, top, loaded.temperature)

    return _predictions(probable, loaded.whites, asked, others, progress, skipped, notify)


def _add(given: Picture, asked: list[_Asked], others: list[Path]) -> None:
    """Adds what was given to the images, and the files of a folder that are none to the others."""
    if isinstance(given, np.ndarray):
        for picture in pictures_in(given):
            _add(picture, asked, others)
    elif isinstance(given, Image.Image):
        asked.append(_Asked(Path(f"image {len(asked)}"), given))
    elif os.path.isdir(given):  # False for a text that cannot be a path, where Path.is_dir raises
        found, rest = image_files(Path(given))
        asked += [_Asked(path, named=False) for path in found]
        others += rest
    else:
        asked.append(_Asked(Path(given)))


def _predictions(
    probable: Callable[[list[np.ndarray]], list[list[dict[str, Any]]]], whites: dict[str, int], asked: list[_Asked],
    others: list[Path], progress: Callable[[int, int], None], skipped: Callable[[str], object], notify: Callable[[str], object],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    for start in range(0, len(asked), CHUNK):
        read, pixels = list[str | int](), list[np.ndarray]()
        for place, each in enumerate(asked[start : start + CHUNK], start):
            try:
                pixels.append(read_image(each.path, whites, each.picture))
                read.append(str(each.path) if each.picture is None else place)
            except DataError as error:
                skipped(str(error)) if each.named else others.append(each.path)
            progress(place + 1, len(asked))
        if read:
            yield from ({"image": image, "classes": found} for image, found in zip(read, probable(pixels), strict=True))
    if others:
        notify(f"{len(others):,} of the files in folders could not be read as images: {some(others)}")
