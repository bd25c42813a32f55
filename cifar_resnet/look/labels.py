"""Labels that may be wrong: every image by how little a network believes the label that it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.splits import Split
from .analysis import probabilities


def label_scores(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """How far each label can be believed, float64 (N,): its probability.

    Confident learning calls that self-confidence (Northcutt, Jiang and Chuang 2021, arXiv:1911.00068). What other
    scores find is in docs/log/confidence.md.
    """
    return probabilities(logits, temperature)[torch.arange(len(labels)), labels]


def ranked(
    logits: Tensor, labels: Tensor, split: Split, classes: tuple[str, ...], temperature: float = 1.0
) -> list[dict[str, Any]]:
    """Every image, the least probable label first: `index`, `name`, `given`, `suggested` and `score`.

    `suggested` is the most probable class but for the given one.
    """
    scores, given = label_scores(logits, labels, temperature), functional.one_hot(labels, logits.shape[1]).bool()
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
