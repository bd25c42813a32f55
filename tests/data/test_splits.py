"""What tells a data set from another."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cifar_resnet.data.splits import Data, Split, fingerprint, same_images

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
    names, indices = np.array(list("abcdef")), split.indices
    here = Split(split.images, split.labels, indices, names, Path("here"))
    elsewhere = Split(np.asfortranarray(split.images), split.labels.astype(">i8"), indices + 7, names, Path("elsewhere"))
    assert fingerprint(elsewhere, CLASSES) == fingerprint(here, CLASSES)


@pytest.mark.parametrize(
    ("changed", "same"),
    [("pixel", True), ("names", True), ("pixel names", False), ("pixel labels", False), ("labels", False), ("classes", False)],
)
def test_images_are_the_same_by_their_pixels_or_by_the_names_of_their_files(changed, same):
    split, names, classes = made(), np.array(list("abcdef")), CLASSES
    before = fingerprint(Split(split.images.copy(), split.labels.copy(), split.indices, names), classes)
    split.images[3, 5, 7, 1] ^= "pixel" in changed
    split.labels[0] ^= "labels" in changed
    names = np.array(list("abcdeg")) if "names" in changed else names
    classes = ("cat", "dog") if "classes" in changed else classes
    now = fingerprint(Split(split.images, split.labels, split.indices, names), classes)
    assert same_images(before, now) is same_images(now, before) is same


def test_images_without_files_or_of_an_older_version_are_the_same_by_their_pixels_alone():
    split, names = made(), np.array(list("abcdef"))
    plain, with_files = fingerprint(split, CLASSES), fingerprint(Split(split.images, split.labels, split.indices, names), CLASSES)
    assert plain == {key: with_files[key] for key in ("images", "sha256")}
    assert same_images(plain, with_files)
    split.images[3, 5, 7, 1] ^= 1
    now = fingerprint(split, CLASSES)
    assert not any(same_images(now, each) or same_images(each, now) for each in (plain, with_files))


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
