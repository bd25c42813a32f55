"""The images of a recipe: CIFAR-10, scikit-learn's digits, or a folder of one's own; its holdout and limits applied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..presets import CIFAR10_MEAN, CIFAR10_STD
from ..recipe import DATASETS, Recipe
from .cifar import cifar10, data_directory
from .folders import image_folder
from .splits import Data, Split, stratified

DIGITS_MEAN, DIGITS_STD = (0.3054,) * 3, (0.3237,) * 3  # of the 1,437 training images, scaled to 32x32
HOLDOUT_SEED, SUBSET_SEED = 20_09, 20_12  # fixed, so that runs with different seeds hold out the same images


def load(recipe: Recipe, data_dir: Path | None = None, notify: Callable[[str], None] = print) -> Data:
    """The recipe's images, its holdout and its limits applied.

    Raises:
        DataError: a file is missing and cannot be downloaded, or is damaged.
        UsageError: the holdout, a limit or the batch does not fit the split.
    """
    if recipe.dataset == "digits":
        train, evaluation, classes = _digits()
    elif recipe.dataset == "cifar10":
        train, evaluation, classes = cifar10(data_directory(data_dir), notify)
    else:
        train, evaluation, classes = image_folder(Path(recipe.dataset), data_dir)
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


def _check_size(option: str, size: int, most: int, classes: int) -> None:
    if not classes <= size <= most:
        raise UsageError(f"{option} {size} does not fit: it takes {classes} to {most} images here")


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
