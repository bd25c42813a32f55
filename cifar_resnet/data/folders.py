"""Folders of one's own images."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from ..errors import DataError, UsageError
from ..recipe import DATASETS
from .images import read_image
from .splits import Split


def image_folder(folder: Path, moved_to: Path | None) -> tuple[Split, Split, tuple[str, ...]]:
    """Images of one's own, in the layout of torchvision's ImageFolder: train/CLASS/* and test/CLASS/*."""
    from torchvision.datasets import ImageFolder

    if moved_to and not folder.is_dir():
        folder = Path(moved_to) / folder.name
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, DATASETS, n=1)
        advice = f"did you mean {near[0]}?" if near else "if it has moved, give the folder that holds it with --data-dir"
        raise UsageError(f"--dataset {folder.name}: it is cifar10, digits or a folder, and there is no folder {folder}; {advice}")
    splits = []
    for part in ("train", "test"):
        try:
            found = ImageFolder(folder / part)
        except (OSError, ValueError):
            raise DataError(f"{folder} must hold {part}/CLASS/*, at least one PNG, JPEG or WebP image in each class") from None
        images = np.stack([read_image(Path(path)) for path, _ in found.samples])
        names = np.array([Path(path).relative_to(folder / part).as_posix() for path, _ in found.samples])
        labels = np.array(found.targets, np.int64)
        splits.append((Split(images, labels, np.arange(len(images)), names, folder / part), tuple(found.classes)))
    (train, classes), (test, of_test) = splits
    if classes != of_test or len(classes) < 2:
        raise DataError(
            f"{folder}: train has the classes {', '.join(classes)}, test has {', '.join(of_test)}; they must be the same, at least two"
        )
    return train, test, classes
