"""What a model gets right and wrong: by class, calibration, the mistakes, and where it looked."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .data import Split
from .engine import scores
from .model import ResNet, build_model
from .recipe import Recipe

LAYERS = ("prep", "layer1", "layer2", "layer3")
BINS = 15  # of the reliability diagram


class Mistake(NamedTuple):
    """One misclassified image. `index` is its place in the published split, `position` in the split given."""

    index: int
    position: int
    true: str
    predicted: str
    confidence: float  # probability of the predicted class
    probabilities: dict[str, float]  # of every class


def report(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Loss, accuracy, calibration, scikit-learn's figures by class, and the confusion matrix (rows: true classes)."""
    from sklearn.metrics import classification_report, confusion_matrix

    predicted, true, every = logits.argmax(1).numpy(), labels.numpy(), range(len(classes))
    by_class = classification_report(true, predicted, labels=every, target_names=classes, output_dict=True, zero_division=0)
    score = scores(logits, labels)
    return {
        "images": len(labels),
        "loss": score["test_loss"],
        "accuracy": score["test_accuracy"],
        "calibration_error": calibration_error(logits, labels),
        "classes": {
            name: {
                "precision": 100 * by_class[name]["precision"],
                "recall": 100 * by_class[name]["recall"],
                "f1": 100 * by_class[name]["f1-score"],
                "count": int(by_class[name]["support"]),
            }
            for name in classes
        },
        "confusion_matrix": confusion_matrix(true, predicted, labels=every).tolist(),
    }


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in percent, over 15 equal bins of confidence (Guo et al. 2017, arXiv:1706.04599)."""
    confidence, predicted = torch.softmax(logits.double(), dim=1).max(1)
    bins = (confidence * BINS).ceil().clamp(1, BINS) - 1
    gaps = [((predicted == labels).double() - confidence)[bins == each].sum().abs() for each in range(BINS)]
    return 100 * float(sum(gaps)) / len(labels)


def mistakes(logits: Tensor, labels: Tensor, split: Split, classes: tuple[str, ...]) -> list[Mistake]:
    """Every misclassified image, the surest first."""
    probabilities = torch.softmax(logits.double(), dim=1)
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)].tolist()
    return [
        Mistake(
            int(split.indices[i]),
            i,
            classes[labels[i]],
            classes[predicted[i]],
            float(confidence[i]),
            dict(zip(classes, probabilities[i].tolist(), strict=True)),
        )
        for i in wrong
    ]


def grad_cam(model: ResNet, images: Tensor, classes: Tensor, layer: str = "layer2") -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) of the logits of `classes`, by captum.

    Args:
        images: normalised, (N, 3, 32, 32).
        classes: int64 (N,), the class to explain for each image.
        layer: whose output is weighed: prep (32x32), layer1 (16x16), layer2 (8x8) or layer3 (4x4).

    Returns:
        float32 (N, 32, 32): positive attributions, scaled to a maximum of 1 for each image.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    model.eval()
    explain = LayerGradCam(model.logits, getattr(model, layer))
    maps = explain.attribute(images, target=classes, relu_attributions=True)
    maps = LayerAttribution.interpolate(maps.float(), (32, 32), interpolate_mode="bilinear")[:, 0].detach()
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu().numpy()


def layers(recipe: Recipe, batch_size: int = 512, classes: int = 10) -> list[dict[str, Any]]:
    """The network layer by layer, in the order of the data: shapes of one image, parameters, multiply-adds of the batch.

    Parameters and multiply-adds are torchinfo's. A layer of kernel k, stride s and padding p takes receptive field r, jump
    j and start c (centre of the first unit's field, in pixels) to r + (k - 1) j, j s and c + ((k - 1) / 2 - p) j, along the
    longest path (Araujo, Norris and Sim 2019, https://distill.pub/2019/computing-receptive-fields/).
    """
    import torchinfo

    with torch.device("meta"):
        model = build_model(recipe, classes)
        images = torch.zeros(batch_size, 3, 32, 32)
        found = torchinfo.summary(model, input_data=images, verbose=0, device="meta").summary_list
    names, modules = {id(module): name for name, module in model.named_modules()}, dict(model.named_modules())
    rows, field, jump, start = [], 1, 1, 0.5
    for layer in (each for each in found if each.is_leaf_layer):
        module = modules[names[layer.layer_id]]
        kernel = None
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            kernel, stride, padding = (
                each[0] if isinstance(each, tuple) else each for each in (module.kernel_size, module.stride, module.padding)
            )
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
