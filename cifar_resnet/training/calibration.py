"""How far a network's confidence can be believed: the temperature that mends it, and where it is measured."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..data.loaders import TensorLoader
from ..data.splits import Data, stratified
from ..recipe import Recipe
from .engine import predict_logits, scores
from .model import ResNet

IMAGES, SEED = 2000, 20_17  # that a temperature is fitted on, and which ones
# In points. A network that is right so much more often about the images that a temperature is fitted on has learned them by heart.
# These images do not tell how sure it may be of others.
GAP = 5


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the lowest mean negative log likelihood of logits (N, classes); see `analysis.probabilities`.

    From Guo et al. 2017, arXiv:1706.04599. One more image counts, whose label is drawn at random: where the network is right
    about all N, the likelihood alone would ask for the temperature 0 (as Platt 1999 smooths his targets).
    """

    logits = logits.double()

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return float(functional.cross_entropy(scaled, labels, label_smoothing=1 / (len(labels) + 1)))

    low, high = math.log(0.05), math.log(20)
    while (third := (high - low) / 3) > 1e-5:  # The loss is convex in 1 / temperature. It has one minimum.
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return math.exp((low + high) / 2)


def find_temperature(recipe: Recipe, model: ResNet, data: Data, device: torch.device, accuracy: float) -> float | None:
    """Fits the temperature of a trained model on 2,000 images: of the holdout or, without one, of the training images.

    The network was fitted to training images, so each is made as hard as one that it has not seen: a quarter of another one is
    mixed in, and the label stays (as Hu et al. 2023, arXiv:2307.07489, do with images that have no labels). Where the network is
    right about these 5 points more often than `accuracy`, in percent, on the images that it is judged by, they are too easy even
    so, and there is no temperature.
    """
    held_out = data.evaluated_on == "holdout"
    split = data.evaluation if held_out else data.train
    chosen = stratified(split.labels, min(IMAGES, len(split)), SEED)
    loader = TensorLoader(split.take(np.random.default_rng(SEED).permutation(chosen)), recipe, device)
    views = () if held_out else (lambda images: 0.75 * images + 0.25 * images.roll(1, 0),)  # a quarter of the image before
    logits, labels = predict_logits(recipe, model, loader.plain(), device, *views)
    if not held_out and scores(logits, labels)["test_accuracy"] > accuracy + GAP:
        return None
    return fit_temperature(logits, labels)
