"""A trained model at work on image files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..arguments import checked
from ..data.images import read_image
from ..data.loaders import make_loader
from ..data.splits import Split
from ..errors import DataError, UsageError
from ..look import analysis
from ..run_dir import Checkpoint
from .common import opened

CHUNK = 1000  # images in memory at a time


@checked
def predict(
    checkpoint: Path | str,
    images: Path | str | Sequence[Path | str],
    *,
    top: int = 3,
    tta: str = "none",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    skipped: Callable[[str], object] = warnings.warn,
) -> Iterator[dict[str, Any]]:
    """For each image file its most probable classes: {"image": path, "classes": [{"class", "probability"}, ...]}.

    Args:
        images: a file or a folder, or several. A folder's files are taken in the order of their names. Files are read as
            `images.read_image` says.
        top: how many classes.
        tta: "none", "flip" or "flip-shift"; see `analysis.views`.
        progress: called with how many files are done, of how many.
        skipped: called with a line for each file that is no image.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if top < 1:
        raise UsageError(f"--top {top} must be at least 1")
    analysis.views(tta)
    opened_run = opened(checkpoint, device)
    given = [images] if isinstance(images, str | Path) else images
    files = [file for path in map(Path, given) for file in _files(path)]
    if not files:
        raise UsageError(f"there are no files in {', '.join(map(str, given))}")
    return _predictions(*opened_run, files, top, tta, progress, skipped)


def _predictions(
    loaded: Checkpoint, resolved: torch.device, files: list[Path], top: int, tta: str, progress: Callable[[int, int], None],
    skipped: Callable[[str], object],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    model = loaded.model(resolved)
    for start in range(0, len(files), CHUNK):
        read, pixels = [], []
        for done, file in enumerate(files[start : start + CHUNK], start=start + 1):
            try:
                pixels.append(read_image(file))
                read.append(file)
            except DataError as error:
                skipped(str(error))
            progress(done, len(files))
        if read:
            split = Split(np.stack(pixels), np.zeros(len(read), np.int64), np.arange(len(read)))
            loader = make_loader(split, loaded.recipe, resolved)
            logits = analysis.mean_logits(loaded.recipe, model, loader, resolved, tta)
            for file, classes in zip(read, analysis.most_probable(logits, loaded.classes, top, loaded.temperature), strict=True):
                yield {"image": str(file), "classes": classes}


def _files(path: Path) -> list[Path]:
    return sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]
