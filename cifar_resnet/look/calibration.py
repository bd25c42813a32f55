"""How far a network's confidence can be believed: the temperature that mends it, and where it is measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..data.datasets import Data, stratified
from ..data.loaders import TensorLoader
from ..recipe import Recipe
from ..training.engine import EVALUATION_BATCH, predict_logits
from ..training.model import ResNet

IMAGES, SEED = 2000, 20_17  # that a temperature is fitted on, and which ones


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the lowest mean negative log likelihood of logits (N, classes); see `analysis.probabilities`.

    From Guo et al. 2017, arXiv:1706.04599. One more image counts, whose label is drawn at random: where the network is right
    about all N, the likelihood alone would ask for the temperature 0 (as Platt 1999 smooths his targets).
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        scaled = logits.double() / math.exp(log_temperature)
        return float(functional.cross_entropy(scaled, labels, label_smoothing=1 / (len(labels) + 1)))

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def find_temperature(recipe: Recipe, model: ResNet, data: Data, device: torch.device) -> float:
    """Fits the temperature of a trained model on 2,000 images: of the holdout or, without one, of the training images.

    Training images are seen through the recipe's augmentation, as in an epoch after the last one: plain they are too easy,
    as the network was fitted to them.
    """
    held_out = data.evaluated_on == "holdout"
    split = data.evaluation if held_out else data.train
    chosen = split.take(stratified(split.labels, min(IMAGES, len(split)), SEED))
    loader = TensorLoader(chosen, recipe, device)
    batches = loader.plain(EVALUATION_BATCH) if held_out else loader.epoch(recipe.epochs)
    return fit_temperature(*predict_logits(recipe, model, batches, device))
