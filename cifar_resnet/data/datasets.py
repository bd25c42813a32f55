"""The images of a recipe: CIFAR-10, scikit-learn's digits, or a folder of one's own; its holdout and limits applied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, printable
from ..presets import CIFAR10_MEAN, CIFAR10_STD
from ..recipe import DATASETS, Recipe
from .cifar import cifar
from .folders import image_folder, some
from .splits import Data, Split, stratified

# Mean and standard deviation by channel of the training images: CIFAR's, and the 1,437 digits scaled to 32x32.
STATISTICS = {
    "cifar10": (CIFAR10_MEAN, CIFAR10_STD),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.3054,) * 3, (0.3237,) * 3),
}
HOLDOUT_SEED, SUBSET_SEED = 20_09, 20_12  # fixed, so that runs with different seeds hold out the same images


def load(
    recipe: Recipe,
    data_dir: Path | str | None = None,
    notify: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Data:
    """The recipe's images, its holdout and its limits applied.

    Args:
        data_dir: see `cifar` and `folders.present`.
        notify: called with a line for what the user should know: a download, files that are left out.
        progress: called with how many image files are read, of how many: first for the training images, then for the others.

    Raises:
        DataError: a file is missing and cannot be downloaded, or is damaged.
        UsageError: the holdout or a limit does not fit the split.
    """
    whites: dict[str, int] = {}
    if recipe.dataset == "digits":
        train, evaluation, classes = _digits()
    elif recipe.dataset in DATASETS:
        train, evaluation, classes = cifar(recipe.dataset, data_dir, notify)
    else:
        train, evaluation, classes, whites = image_folder(Path(recipe.dataset), data_dir, recipe.split, notify, progress)
    if recipe.holdout:
        _check_size("--holdout", recipe.holdout, len(train) - len(classes), len(classes))
        single = [classes[label] for label, count in enumerate(np.bincount(train.labels)) if count == 1]
        if single:
            kept = f"training keeps it, and --holdout {recipe.holdout} has none of these"
            notify(f"a single training image in {some(single)}: {kept}")
        held = stratified(train.labels, recipe.holdout, HOLDOUT_SEED, keep_one=True)
        evaluation, train = train.take(held), train.take(np.setdiff1d(np.arange(len(train)), held))
    if recipe.train_limit:
        _check_size("--train-limit", recipe.train_limit, len(train), len(classes))
        train = train.take(stratified(train.labels, recipe.train_limit, SUBSET_SEED))
    if recipe.test_limit:
        _check_size("--test-limit", recipe.test_limit, len(evaluation), len(classes))
        evaluation = evaluation.take(stratified(evaluation.labels, recipe.test_limit, SUBSET_SEED))
    names = tuple(map(printable, classes))
    return Data(train, evaluation, names, "holdout" if recipe.holdout else "test", whites)


def with_statistics(recipe: Recipe, train: Split | None = None) -> Recipe:
    """The recipe with the mean and standard deviation that it leaves to the dataset written in: of `train`, where it is a folder."""
    statistics: Any = STATISTICS.get(recipe.dataset, STATISTICS["cifar10"])
    if recipe.dataset not in DATASETS and train is not None:
        statistics = (tuple(round(float(value), 4) for value in each) for each in _moments(train.images))
    mean, std = statistics
    return recipe.replace(mean=recipe.mean or mean, std=recipe.std or std)


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of images (N, 32, 32, 3), of pixels in 0 to 1; the latter at least 0.01.

    From a count of every value, as pixels in float64 take eight times the memory of the images.
    """
    counts, values = np.zeros((3, 256), np.int64), np.arange(256) / 255
    for part in np.array_split(images, -(-len(images) // 1000)):
        counts += [np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(3)]
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    return mean, np.sqrt((share * (values - mean[:, None]) ** 2).sum(1)).clip(0.01)


def _check_size(option: str, size: int, most: int, classes: int) -> None:
    if not classes <= size <= most:
        none = f"of {classes} classes there are too few images"
        fits = f"it takes {classes} to {most} images here" if classes <= most else none
        raise UsageError(f"{option} {size} does not fit: {fits}")


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
    """1,437 and 360 of the 8x8 handwritten digits, scaled bilinearly to 32x32, grey in three channels."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.from_numpy(digits.images * (255 / 16))[:, None]  # 0 to 255, and exact in binary, so the same on every machine
    grey = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear")
    images = grey.round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    every = Split(images, digits.target.astype(np.int64), np.arange(len(images)))
    train, test = train_test_split(every.indices, test_size=360, random_state=0, stratify=every.labels)
    return every.take(np.sort(train)), every.take(np.sort(test)), tuple(str(name) for name in digits.target_names)
