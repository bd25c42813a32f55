"""What tells a data set from another."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cifar_resnet.data.splits import Data, Split, fingerprint

CLASSES = ("cat", "dög")


def made():
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (6, 32, 32, 3), np.uint8), np.arange(6) % 2, np.arange(6))


def test_a_fingerprint_is_the_count_and_the_digest_of_pixels_labels_and_class_names():
    split, expected = made(), hashlib.sha256()
    for value in split.images.ravel().tolist():
        expected.update(bytes([value]))
    for label in split.labels.tolist():
        expected.update(label.to_bytes(8, "little"))
    expected.update(b'["cat", "d\\u00f6g"]')
    assert fingerprint(split, CLASSES) == {"images": 6, "sha256": expected.hexdigest()}
    data = Data(split, split.take(slice(4)), CLASSES, "test")
    assert data.fingerprints == {"train": fingerprint(split, CLASSES), "evaluation": fingerprint(split.take(slice(4)), CLASSES)}


def test_where_images_lie_does_not_change_a_fingerprint():
    split = made()
    elsewhere = Split(
        np.asfortranarray(split.images), split.labels.astype(">i8"), split.indices + 7, np.array(list("abcdef")), Path("elsewhere")
    )
    assert fingerprint(elsewhere, CLASSES) == fingerprint(split, CLASSES)


@pytest.mark.parametrize("change", ["pixel", "label", "name", "order"])
def test_what_training_sees_changes_a_fingerprint(change):
    split, classes = made(), CLASSES
    before = fingerprint(split, classes)
    if change == "pixel":
        split.images[3, 5, 7, 1] ^= 1
    if change == "label":
        split.labels[0] = 1
    if change == "name":
        classes = ("cat", "dog")
    if change == "order":
        split = split.take(np.array([1, 0, 2, 3, 4, 5]))
    assert fingerprint(split, classes) != before
