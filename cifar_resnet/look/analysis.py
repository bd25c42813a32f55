"""What a model gets right and wrong: by class, calibration, the mistakes, and where it looked; and the network layer by layer."""

from __future__ import annotations

import difflib
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.folders import class_names, some
from ..data.loaders import TensorLoader
from ..data.splits import Split
from ..errors import CifarResnetError, UsageError, printable
from ..recipe import DATASETS, Recipe
from ..training.engine import predict_logits, scores
from ..training.model import ResNet, build_model

BINS = 15  # of the reliability diagram
MANY, LISTED = 30, 10  # classes above which a mistake has the probabilities of so many alone
SUMMARY_SCHEMA = 1  # of `summary`


class Mistake(NamedTuple):
    """One misclassified image, or one of those least sure. `index` is its place in the published split, `position` in the split given."""

    index: int  # type: ignore[assignment]
    position: int
    true: str
    predicted: str
    confidence: float  # probability of the predicted class
    probabilities: dict[str, float]  # of every class; of more than 30 classes only of the ten most probable and of the true one
    name: str | None = None  # its file, relative to the split's folder; None where images have no files

    @property
    def caption(self) -> str:
        """What the image is called under a picture of it."""
        return printable(self.name or f"image {self.index}")

    @property
    def wrong(self) -> bool:
        return self.true != self.predicted

    @property
    def rival(self) -> str:
        """The class that the predicted one is held against: the true one, or of an image predicted right the next probable one."""
        others = {name: probability for name, probability in self.probabilities.items() if name != self.predicted}
        return self.true if self.wrong else max(others, key=lambda name: others[name])


def views(tta: str) -> list[tuple[float, Callable[[Tensor], Tensor]]]:
    """What test-time augmentation looks at, and the weight of each view's logits: "none", "flip" or "flip-shift".

    The last one is cifar10-airbench's: the image, shifted down and right by 1 and by -1 pixel too, each also mirrored.
    """

    def plain(images: Tensor) -> Tensor:
        return images

    def mirrored(images: Tensor) -> Tensor:
        return images.flip(3)

    def shifted(view: Callable[[Tensor], Tensor], by: int) -> Callable[[Tensor], Tensor]:
        return lambda images: functional.pad(view(images), (1,) * 4, mode="reflect")[..., 1 - by : 33 - by, 1 - by : 33 - by]

    if tta == "none":
        return [(1.0, plain)]
    if tta == "flip":
        return [(1 / 2, plain), (1 / 2, mirrored)]
    moved = [(1 / 8, shifted(view, by)) for view in (plain, mirrored) for by in (1, -1)]
    return [(1 / 4, plain), (1 / 4, mirrored), *moved]


def mean_logits(model: ResNet, images: TensorLoader, tta: str, plain: Tensor | None = None) -> Tensor:
    """Mean of the logits of the views of test-time augmentation, float32 (N, classes).

    `plain` has those of the first view, the image as it is, where they are known.
    """
    (first, _), *others = views(tta)
    if plain is None:
        plain = predict_logits(images.recipe, model, images.plain(), images.device)[0]
    every = [weight * predict_logits(images.recipe, model, images.plain(), images.device, view)[0] for weight, view in others]
    return torch.stack([first * plain, *every]).sum(0)


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Of each class, float64 (N, classes): the softmax of logits (N, classes) over the temperature, see `calibration`."""
    return torch.softmax(logits.double() / temperature, dim=1)


def most_probable(logits: Tensor, classes: Sequence[str], top: int, temperature: float = 1.0) -> list[list[dict[str, Any]]]:
    """For each row of logits (N, classes) its `top` most probable classes: {"class", "probability"}, the first one first."""
    best = probabilities(logits, temperature).topk(min(top, len(classes)))
    return [
        [{"class": classes[i], "probability": probability} for i, probability in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def report(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Loss, accuracy, calibration, scikit-learn's figures by class, the confusion matrix (rows: true classes).

    `most_confused` lists the ten largest entries off its diagonal; `share` is the percent of the true class.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    predicted, true, every = logits.argmax(1).numpy(), labels.numpy(), range(len(classes))
    by_class = precision_recall_fscore_support(true, predicted, labels=every, zero_division=0)
    matrix = confusion_matrix(true, predicted, labels=every)
    off_diagonal = matrix - np.diag(matrix.diagonal())
    largest = [divmod(int(cell), len(classes)) for cell in off_diagonal.argsort(axis=None, kind="stable")[::-1][:10]]
    confused = [(i, j, int(matrix[i, j])) for i, j in largest if off_diagonal[i, j]]
    score, bins = scores(logits, labels), reliability(logits, labels)
    return {
        "images": len(labels),
        "loss": score["test_loss"],
        "accuracy": score["test_accuracy"],
        "calibration_error": calibration_error(bins),
        "reliability": bins,
        "classes": {
            name: {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1, "count": int(count)}
            for name, precision, recall, f1, count in zip(classes, *(each.tolist() for each in by_class), strict=True)
        },
        "confusion_matrix": matrix.tolist(),
        "most_confused": [
            {"true": classes[i], "predicted": classes[j], "count": count, "share": 100 * float(count / matrix[i].sum())}
            for i, j, count in confused
        ],
    }


def reliability(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> list[dict[str, float | None]]:
    """For each of 15 equal bins of confidence: its bounds, mean confidence and accuracy in percent, and count of images."""
    confidence, predicted = probabilities(logits, temperature).max(1)
    bins, right = (confidence * BINS).ceil().clamp(1, BINS) - 1, (predicted == labels).double()
    rows = []
    for each in range(BINS):
        inside = bins == each
        means = (100 * float(values[inside].mean()) if inside.any() else None for values in (confidence, right))
        bounds = {"from": 100 * each / BINS, "to": 100 * (each + 1) / BINS}
        rows.append({**bounds, **dict(zip(("confidence", "accuracy"), means, strict=True)), "count": int(inside.sum())})
    return rows


def calibration_error(bins: list[dict[str, Any]]) -> float:
    """Expected calibration error in percent, from the bins of `reliability` (Guo et al. 2017, arXiv:1706.04599)."""
    gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in bins if row["count"]]
    return sum(gaps) / sum(row["count"] for row in bins)


def mistakes(
    logits: Tensor, labels: Tensor, split: Split, classes: tuple[str, ...], temperature: float = 1.0, right: bool = False
) -> list[Mistake]:
    """Every misclassified image, the surest first; or with `right` those predicted right, the least sure first."""
    believed = probabilities(logits, temperature)
    confidence, predicted = believed.max(1)
    positions = ((predicted == labels) == right).nonzero().flatten()
    order = confidence[positions].argsort(descending=not right, stable=True)
    return [
        Mistake(
            int(split.indices[i]),
            i,
            classes[labels[i]],
            classes[predicted[i]],
            float(confidence[i]),
            _listed(believed[i], classes, int(labels[i])),
            None if split.names is None else str(split.names[i]),
        )
        for i in positions[order].tolist()
    ]


def _listed(believed: Tensor, classes: tuple[str, ...], label: int) -> dict[str, float]:
    """What `Mistake.probabilities` has of the probabilities of an image, (classes,)."""
    if len(classes) <= MANY:
        return dict(zip(classes, believed.tolist(), strict=True))
    return {classes[i]: float(believed[i]) for i in (*believed.topk(LISTED).indices.tolist(), label)}


def ranked_labels(
    logits: Tensor, labels: Tensor, split: Split, classes: tuple[str, ...], temperature: float = 1.0
) -> list[dict[str, Any]]:
    """Every image, the least probable label first: `index`, `name`, `given`, `suggested` and `score`.

    `score` is the probability of the label, which confident learning calls self-confidence (Northcutt, Jiang and Chuang 2021,
    arXiv:1911.00068). What other scores find is in docs/log/confidence.md. `suggested` is the most probable other class.
    """
    scores = probabilities(logits, temperature)[torch.arange(len(labels)), labels]
    given = functional.one_hot(labels, logits.shape[1]).bool()
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


def _class(option: str, name: str | None, classes: Sequence[str]) -> str | None:
    """The class of this name. A letter and its accent may be one character or two: macOS takes both for one name."""
    if name is None or name in classes:
        return name
    for each in classes:
        if unicodedata.normalize("NFC", each) == unicodedata.normalize("NFC", name):
            return each
    near = difflib.get_close_matches(name, classes, n=1)
    meant = f"did you mean {near[0]}? There" if near else "there"
    raise UsageError(f"{option} {name}: no such class; {meant} are {some(classes)}")


def choose(
    wrong: list[Mistake],
    classes: tuple[str, ...],
    sort: str = "confidence",
    true: str | None = None,
    predicted: str | None = None,
) -> list[Mistake]:
    """The mistakes of these two classes, in the order "confidence" (surest first), "class" or "random" (the same each time).

    With "label" the list already has that order.

    Raises:
        UsageError: there is no such class.
    """
    true, predicted = _class("--true", true, classes), _class("--predicted", predicted, classes)
    chosen = [each for each in wrong if true in (None, each.true) and predicted in (None, each.predicted)]
    if sort == "class":
        return sorted(chosen, key=lambda each: (classes.index(each.true), classes.index(each.predicted)))
    if sort == "random":
        return [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]
    return chosen


def grad_cam(model: ResNet, images: Tensor, classes: Tensor, layer: str = "layer2") -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) of the logits of `classes`, by captum.

    Args:
        images: normalised, (N, 3, 32, 32).
        classes: int64 (N,), the class to explain for each image.
        layer: whose output is weighed: prep (32x32), layer1 (16x16), layer2 (8x8) or layer3 (4x4).

    Returns:
        float32 (N, 32, 32): positive attributions, scaled to a maximum of 1 for each image.
    """
    with warnings.catch_warnings(action="ignore"):  # in a notebook its progress bars ask for widgets
        from captum.attr import LayerAttribution, LayerGradCam

    model.eval()
    explain = LayerGradCam(model.logits, getattr(model, layer))
    maps = explain.attribute(images, target=classes, relu_attributions=True)
    maps = LayerAttribution.interpolate(maps.float(), (32, 32), interpolate_mode="bilinear")[:, 0].detach()
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu().numpy()


def pixels(images: Tensor, recipe: Recipe) -> np.ndarray:
    """Normalised images, (N, 3, 32, 32), as uint8 (N, 32, 32, 3)."""
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    return ((images.permute(0, 2, 3, 1) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def summary(recipe: Recipe) -> dict[str, Any]:
    """What `summary --json` prints: the rows of `layers` for a batch of the recipe, and their totals.

    `receptive_field` is the last layer's, in pixels of the image. Classes are those of the recipe's images; 10 where these are not here.
    """
    classes = 100 if recipe.dataset == "cifar100" else 10
    if recipe.dataset not in DATASETS:
        with suppress(CifarResnetError):  # a folder that is not here
            classes = len(class_names(Path(recipe.dataset), recipe.split)) or classes
    rows = layers(recipe, classes)
    multiply_adds = sum(row["multiply_adds"] for row in rows)
    totals = {
        "parameters": sum(row["parameters"] for row in rows),
        "multiply_adds": multiply_adds,
        "multiply_adds_per_image": multiply_adds // recipe.batch_size,
        "receptive_field": rows[-1]["receptive_field"],
    }
    return {"schema": SUMMARY_SCHEMA, "recipe": recipe.recipe, "batch_size": recipe.batch_size, "layers": rows, "totals": totals}


def layers(recipe: Recipe, classes: int = 10) -> list[dict[str, Any]]:
    """The network layer by layer, in the order of the data: shapes of one image, parameters, multiply-adds of the batch.

    Parameters and multiply-adds are torchinfo's. A layer of kernel k, stride s and padding p takes receptive field r, jump
    j and start c (centre of the first unit's field, in pixels) to r + (k - 1) j, j s and c + ((k - 1) / 2 - p) j, along the
    longest path (Araujo, Norris and Sim 2019, https://distill.pub/2019/computing-receptive-fields/).
    """
    import torchinfo

    with torch.device("meta"):
        model = build_model(recipe, classes)
        images = torch.zeros(recipe.batch_size, 3, 32, 32)
        found = torchinfo.summary(model, input_data=images, verbose=0, device="meta").summary_list
    names, modules = {id(module): name for name, module in model.named_modules()}, dict(model.named_modules())
    rows: list[dict[str, Any]] = []
    field, jump, start = 1, 1, 0.5
    for layer in (each for each in found if each.is_leaf_layer):
        module = modules[names[layer.layer_id]]
        kernel = None
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            sides = module.kernel_size, module.stride, module.padding
            kernel, stride, padding = (int(each[0]) if isinstance(each, tuple) else int(each) for each in sides)
            field, start, jump = field + (kernel - 1) * jump, start + ((kernel - 1) / 2 - padding) * jump, jump * stride
        rows.append(
            {
                "layer": names[layer.layer_id],
                "type": layer.class_name,
                "input": list(layer.input_size[1:]),
                "output": list(layer.output_size[1:]),
                "kernel": kernel,
                "parameters": max(layer.num_params, 0),
                "multiply_adds": int(layer.macs),
                "receptive_field": field,
                "jump": jump,
                "start": start,
            }
        )
    return rows
