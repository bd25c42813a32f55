"""Augmentation, twice: a batch at a time on the device, and image by image in Albumentations.

What happens to an image depends on (seed, epoch, step) and its place in the batch, and on nothing else.
"""

from __future__ import annotations

import os
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..recipe import Recipe

AUGMENT, FIRST_FLIP = 1, 2  # purposes of a random stream
CONSTANT, REFLECT_101 = 0, 4  # OpenCV's numbers of what padding shows, which Albumentations takes


def stream(recipe: Recipe, epoch: int, step: int, purpose: int) -> np.random.Generator:
    """The random numbers for one purpose at one step of a run."""
    return np.random.default_rng(np.random.SeedSequence((recipe.seed, epoch, step, purpose)))


class Choices(NamedTuple):
    """What augmentation does to each image of a batch of B."""

    offsets: Tensor  # int64 (B, 2): top and left of the crop in the padded image
    flips: Tensor  # bool (B,)
    holes: Tensor  # int64 (B, holes, 2): top and left in the cropped image; -32, -32 for none


def draw(recipe: Recipe, epoch: int, step: int, count: int) -> Choices:
    """The augmentations of a batch of `count` images, each image's independent of the others'."""
    rng = stream(recipe, epoch, step, AUGMENT)
    offsets = rng.integers(0, 2 * recipe.pad + 1, (count, 2))
    flips = rng.random(count) < recipe.flip_probability
    holes = rng.integers(0, 32 - recipe.cutout_size + 1, (count, recipe.cutout_count, 2))
    holes[rng.random(count) >= recipe.cutout_probability] = -32
    return Choices(*(torch.from_numpy(array) for array in (offsets, flips, holes)))


def alternating_flips(recipe: Recipe, epoch: int, count: int) -> np.ndarray:
    """Which of a split's `count` images are shown mirrored: a random half in even epochs, the other half in odd ones.

    Two epochs in a row so show both views of every image (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.6).
    """
    return (stream(recipe, 0, 0, FIRST_FLIP).random(count) < 0.5) ^ bool(epoch % 2)


def hole_pixel(recipe: Recipe) -> tuple[int, ...]:
    """The uint8 value by channel that fills the cutout."""
    level = recipe.mean if recipe.cutout_fill is None else (recipe.cutout_fill,) * 3
    return tuple(round(255 * value) for value in level or ())


def pad_pixel(recipe: Recipe) -> tuple[int, ...]:
    """The uint8 value by channel of padding, for the pad modes that are one colour."""
    return tuple(round(255 * value) for value in recipe.mean or ()) if recipe.pad_mode == "mean" else (0, 0, 0)


class TensorAugmentation:
    """Pad, crop, flip, cutout and normalise for a whole batch of uint8 images on the device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        # As albumentations.Normalize does it, so that both loaders give the same bits.
        self.mean = torch.tensor(recipe.mean, device=device) * 255
        self.scale = 1 / (torch.tensor(recipe.std, device=device) * 255)
        self.hole = torch.tensor(hole_pixel(recipe), dtype=torch.uint8, device=device)
        self.fill = torch.tensor(pad_pixel(recipe), dtype=torch.uint8, device=device)
        self.range = torch.arange(32, device=device)
        # Which pixel of the image each place of the padded one shows, and whether the place is one of the image's own.
        places = torch.arange(-recipe.pad, 32 + recipe.pad, device=device)
        mirrored = 31 - (places.abs() - 31).abs()  # at the edge pixels, which are not repeated
        self.source = mirrored if recipe.pad_mode == "reflect" else places.clamp(0, 31)
        self.inside = places == self.source
        # Which places a hole covers that starts at 0 to 31 or, as a negative index, at -32 to -1: (64, 32).
        starts = torch.cat([self.range, self.range - 32])[:, None]
        self.covered = (self.range >= starts) & (self.range < starts + recipe.cutout_size)

    def __call__(self, images: Tensor, index: Tensor, choices: Choices) -> Tensor:
        """Augmented and normalised, float32 (B, 3, 32, 32): those of the `images`, uint8 (N, 32, 32, 3), at `index`, int64 (B,).

        Pad, crop and flip are one gather by rows and columns.
        """
        rows, columns = (self.range + choices.offsets[:, :, None]).unbind(1)  # (B, 32), of the padded image
        columns = torch.where(choices.flips[:, None], columns.flip(1), columns)
        images = images[index[:, None, None], self.source[rows][:, :, None], self.source[columns][:, None, :]]
        if self.recipe.pad_mode != "reflect":
            inside = self.inside[rows][:, :, None] & self.inside[columns][:, None, :]
            images = torch.where(inside[..., None], images, self.fill)
        for hole in choices.holes.unbind(1):
            in_rows, in_columns = self.covered[hole].unbind(1)  # (B, 32)
            images = torch.where((in_rows[:, :, None] & in_columns[:, None, :])[..., None], self.hole, images)
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 32, 32, 3) to float32 (B, 3, 32, 32), channels last in memory as they were."""
        return ((images.float() - self.mean) * self.scale).permute(0, 3, 1, 2)


def train_transform(recipe: Recipe) -> Any:
    """Pad, random crop 32, flip, cutout, normalise, to tensor. Takes image=uint8 (32, 32, 3), gives float32 (3, 32, 32)."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for a newer version
    import albumentations as A

    steps = []
    if recipe.pad:
        side = 32 + 2 * recipe.pad
        border = REFLECT_101 if recipe.pad_mode == "reflect" else CONSTANT
        steps += [A.PadIfNeeded(side, side, border_mode=border, fill=pad_pixel(recipe)), A.RandomCrop(32, 32)]
    if recipe.flip_probability and not recipe.alternates:  # else the loader does it
        steps.append(A.HorizontalFlip(p=recipe.flip_probability))
    if recipe.cutout_count and recipe.cutout_probability:
        count, size = (recipe.cutout_count,) * 2, (recipe.cutout_size,) * 2
        steps.append(A.CoarseDropout(count, size, size, fill=hole_pixel(recipe), p=recipe.cutout_probability))
    return A.Compose([*steps, A.Normalize(recipe.mean, recipe.std), A.ToTensorV2()])


def image_seeds(recipe: Recipe, epoch: int, step: int, count: int) -> list[int]:
    """A seed for each image of a batch of `count`."""
    return stream(recipe, epoch, step, AUGMENT).integers(2**63, size=count).tolist()


def augmented(pipeline: Any, image: np.ndarray, seed: int) -> dict[str, Any]:
    """What an Albumentations pipeline makes of an image, its transforms taking turns at one stream from this seed.

    `Compose.set_random_seed` would start a stream for each at the same place: a flip and a hole of equal probability
    would then always come together.
    """
    pipeline.set_random_state(np.random.Generator(np.random.PCG64(seed)), random.Random(seed))
    return pipeline(image=image)
