"""What a data set is once it is read: images, labels, and where each image comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 (N, 32, 32, 3); labels: int64 (N,); indices: int64 (N,), each image's place in the published split.

    names: str (N,), each image's file relative to `folder`, with slashes; both are None where images have no files.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    names: np.ndarray | None = None
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"Split({len(self):,} images of {len(np.unique(self.labels))} classes)"

    def take(self, positions: np.ndarray | slice) -> Split:
        names = None if self.names is None else self.names[positions]
        return Split(self.images[positions], self.labels[positions], self.indices[positions], names, self.folder)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Data:
    """What a run trains on and what it is judged by; `evaluated_on` is "test" or "holdout"."""

    train: Split
    evaluation: Split
    classes: tuple[str, ...]
    evaluated_on: str
    whites: Mapping[str, int] = field(default_factory=dict)  # of images of more than 8 bits; see `images.read_image`

    def __repr__(self) -> str:
        judged = f"{len(self.evaluation):,} {self.evaluated_on} images"
        return f"Data({len(self.train):,} training images, {judged}, {len(self.classes)} classes)"

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of "train" and "evaluation"; see `fingerprint`."""
        return {"train": fingerprint(self.train, self.classes), "evaluation": fingerprint(self.evaluation, self.classes)}


def fingerprint(split: Split, classes: tuple[str, ...]) -> dict[str, Any]:
    """What tells a split from another, wherever its folder lies.

    `images` is their count, `sha256` the SHA-256 of pixels, labels and class names. `files`, where images have some, is that of
    their names, labels and class names, which another decoder of images does not change.
    """
    labels = split.labels.astype("<i8").tobytes() + json.dumps(classes).encode()
    pixels = hashlib.sha256(np.ascontiguousarray(split.images).data)
    pixels.update(labels)
    found = {"images": len(split), "sha256": pixels.hexdigest()}
    if split.names is not None:
        found["files"] = hashlib.sha256(json.dumps(split.names.tolist()).encode() + labels).hexdigest()
    return found


def same_images(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same pixels or, with other pixels, of files of the same names and classes."""
    return a["sha256"] == b["sha256"] or ("files" in a and a["files"] == b.get("files"))


def stratified(labels: np.ndarray, count: int, seed: int, keep_one: bool = False) -> np.ndarray:
    """Sorted positions of `count` images, each class in proportion to its size; a smaller count gives a subset.

    With `keep_one` an image of each class is taken only after all others.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # of each image among its class, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
        place[members[0]] = 0  # so that the rarest class has one too
        if keep_one:
            place[members[-1]] = 1
    return np.sort(order[np.argsort(place[order], kind="stable")[:count]])
