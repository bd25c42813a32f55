"""Where images come from: CIFAR-10 through torchvision, digits through scikit-learn, folders of one's own."""

from __future__ import annotations

import difflib
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ..errors import DataError, UsageError
from ..presets import CIFAR10_MEAN, CIFAR10_STD
from ..recipe import DATASETS, Recipe

DIGITS_MEAN, DIGITS_STD = (0.3054,) * 3, (0.3237,) * 3  # of the 1,437 training images, scaled to 32x32
HOLDOUT_SEED, SUBSET_SEED = 20_09, 20_12  # fixed, so that runs with different seeds hold out the same images


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, 32, 32, 3); labels: int64 (N,); indices: int64 (N,), each image's place in the published split."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def take(self, positions: np.ndarray | slice) -> Split:
        return Split(self.images[positions], self.labels[positions], self.indices[positions])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it is judged by; `evaluated_on` is "test" or "holdout"."""

    train: Split
    evaluation: Split
    classes: tuple[str, ...]
    evaluated_on: str


def load(recipe: Recipe, data_dir: Path | None = None, notify: Callable[[str], None] = print) -> Data:
    """The recipe's images, its holdout and its limits applied.

    Raises:
        DataError: a file is missing and cannot be downloaded, or is damaged.
        UsageError: the holdout, a limit or the batch does not fit the split.
    """
    if recipe.dataset == "digits":
        train, evaluation, classes = _digits()
    elif recipe.dataset == "cifar10":
        train, evaluation, classes = _cifar10(data_directory(data_dir), notify)
    else:
        train, evaluation, classes = _image_folder(Path(recipe.dataset), data_dir)
    if recipe.holdout:
        _check_size("--holdout", recipe.holdout, len(train) - 1, len(classes))
        held = stratified(train.labels, recipe.holdout, HOLDOUT_SEED)
        evaluation, train = train.take(held), train.take(np.setdiff1d(np.arange(len(train)), held))
    if recipe.train_limit:
        _check_size("--train-limit", recipe.train_limit, len(train), len(classes))
        train = train.take(stratified(train.labels, recipe.train_limit, SUBSET_SEED))
    if recipe.test_limit:
        _check_size("--test-limit", recipe.test_limit, len(evaluation), len(classes))
        evaluation = evaluation.take(stratified(evaluation.labels, recipe.test_limit, SUBSET_SEED))
    if recipe.batch_size > len(train):
        raise UsageError(f"--batch-size {recipe.batch_size} is more than the {len(train)} training images")
    return Data(train, evaluation, classes, "holdout" if recipe.holdout else "test")


def with_statistics(recipe: Recipe, train: Split | None = None) -> Recipe:
    """The recipe with the mean and standard deviation that it leaves to the dataset written in: of `train`, where it is a folder."""
    mean: Any
    std: Any
    if recipe.dataset in DATASETS or train is None:
        mean, std = (DIGITS_MEAN, DIGITS_STD) if recipe.dataset == "digits" else (CIFAR10_MEAN, CIFAR10_STD)
    else:
        pixels = train.images.reshape(-1, 3) / 255
        mean, std = (tuple(round(float(value), 4) for value in each) for each in (pixels.mean(0), pixels.std(0).clip(0.01)))
    return recipe.replace(mean=recipe.mean or mean, std=recipe.std or std)


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted positions of `count` images, each class in proportion to its size; a smaller count gives a subset."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # of each image among its class, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
        place[members[0]] = 0  # so that the rarest class has one too
    return np.sort(order[np.argsort(place[order], kind="stable")[:count]])


def _check_size(option: str, size: int, most: int, classes: int) -> None:
    if not classes <= size <= most:
        raise UsageError(f"{option} {size} does not fit: it takes {classes} to {most} images here")


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
    """1,437 and 360 of the 8x8 handwritten digits, scaled bilinearly to 32x32, grey in three channels."""
    import cv2
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = [
        cv2.resize(image.astype(np.float32) * (255 / 16), (32, 32), interpolation=cv2.INTER_LINEAR) for image in digits.images
    ]
    images = np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=3)
    every = Split(images, digits.target.astype(np.int64), np.arange(len(images)))
    train, test = train_test_split(every.indices, test_size=360, random_state=0, stratify=every.labels)
    return every.take(np.sort(train)), every.take(np.sort(test)), tuple(str(name) for name in digits.target_names)


def _image_folder(folder: Path, moved_to: Path | None) -> tuple[Split, Split, tuple[str, ...]]:
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
        splits.append((Split(images, np.array(found.targets, np.int64), np.arange(len(images))), tuple(found.classes)))
    (train, classes), (test, of_test) = splits
    if classes != of_test or len(classes) < 2:
        raise DataError(
            f"{folder}: train has the classes {', '.join(classes)}, test has {', '.join(of_test)}; they must be the same, at least two"
        )
    return train, test, classes


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (32, 32, 3): turned as EXIF says, white where transparent, its centred square scaled to 32x32.

    Raises:
        DataError: it is no image that Pillow can read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # more than 8 bits
                pixels = np.asarray(image, np.float64)
                most = 1 if image.mode[0] == "F" and pixels.max() <= 1 else 65535
                image = Image.fromarray((pixels.clip(0, most) * (255 / most)).astype(np.uint8))
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
            return np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS))
    except Exception as error:  # whatever a damaged file makes its decoder raise
        reason = "is a folder" if path.is_dir() else getattr(error, "strerror", None) or "not an image that can be read"
        raise DataError(f"{path}: {reason}") from None


def data_directory(data_dir: Path | None = None) -> Path:
    """The folder given, else CIFAR_RESNET_DATA_DIR, else `cifar-resnet` in the user's cache folder."""
    if chosen := data_dir or os.environ.get("CIFAR_RESNET_DATA_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar-resnet"


def _cifar10(folder: Path, notify: Callable[[str], None]) -> tuple[Split, Split, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10

    if not (folder / CIFAR10.base_folder).exists():
        _download(folder, notify)
    splits = []
    for train in (True, False):
        try:
            dataset = CIFAR10(folder, train=train)
        except (RuntimeError, OSError):
            raise _damage(folder) from None
        splits.append(Split(dataset.data, np.array(dataset.targets, np.int64), np.arange(len(dataset.targets))))
    return splits[0], splits[1], tuple(dataset.classes)


def _damage(folder: Path) -> DataError:
    """What is wrong in a folder that torchvision's integrity check turned down."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    for name, expected in [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]:
        path = folder / CIFAR10.base_folder / name
        try:
            found = calculate_md5(path)
        except OSError as error:
            return DataError(f"{path} cannot be read ({error.strerror}); expected a file of MD5 {expected}. {_ADVICE}")
        if found != expected:
            return DataError(f"{path} is damaged: expected MD5 {expected}, found {found}. {_ADVICE}")
    return DataError(f"{folder / CIFAR10.base_folder} was changed while it was read; try again")


_ADVICE = "Remove its folder to have it downloaded again, or use --dataset digits, which needs no download"


def _download(folder: Path, notify: Callable[[str], None]) -> None:
    """Into a temporary folder beside it, checked, then renamed; a second process waits for the first."""
    from torchvision.datasets import CIFAR10

    target = folder / CIFAR10.base_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            if target.exists():
                return
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as part:
                notify(f"CIFAR-10 is not in {folder}; downloading {CIFAR10.url}")
                with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # where its bar goes
                    CIFAR10(part, download=True)
                os.replace(Path(part) / CIFAR10.base_folder, target)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"CIFAR-10 is not in {folder} (expected {target / 'data_batch_1'} and the others), and downloading "
            f"{CIFAR10.url} there failed: {(str(error) or type(error).__name__).splitlines()[0]}. Give its folder with --data-dir, "
            "or use --dataset digits, which needs no download"
        ) from None
