"""Labels that may be wrong: every image by how little a network believes the label that it was given."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from ..data.datasets import Split
from .analysis import probabilities


def label_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """How far each label can be believed, float64 (N,), from 0 to 1; below 1/2 another class is more probable.

    The normalized margin of confident learning (Northcutt, Jiang and Chuang 2021, arXiv:1911.00068): the probability of the given
    class, less the highest one of another class, scaled to 0 to 1.
    """
    believed, given = probabilities(logits), functional.one_hot(labels, logits.shape[1]).bool()
    return (1 + believed[given] - believed.masked_fill(given, 0).amax(1)) / 2


def ranked(logits: Tensor, labels: Tensor, split: Split, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every image, the least believed label first: `index`, `name`, `given`, `suggested` and `score`.

    `suggested` is the most probable class but for the given one.
    """
    scores, given = label_scores(logits, labels), functional.one_hot(labels, logits.shape[1]).bool()
    suggested = logits.masked_fill(given, -float("inf")).argmax(1)
    return [
        {
            "index": int(split.indices[i]),
            "name": None if split.names is None else str(split.names[i]),
            "given": classes[labels[i]],
            "suggested": classes[suggested[i]],
            "score": float(scores[i]),
        }
        for i in scores.argsort(stable=True).tolist()
    ]
