"""What a checkpoint gets right and wrong, with its files: the jobs `evaluate` and `misclassified`, whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import analysis, engine, figures
from . import data as datasets
from .batches import Batches, make_batches
from .device import environment, resolve_device, without_emulation
from .errors import CifarResnetError, UsageError
from .model import ResNet
from .run import SCHEMA, Checkpoint, load_checkpoint, writable, write_json


class Prediction(NamedTuple):
    """A checkpoint's logits, float32 (N, classes), on the images that it is judged by."""

    checkpoint: Checkpoint
    model: ResNet
    data: datasets.Data
    images: Batches
    logits: Tensor
    labels: Tensor
    device: torch.device


def logits_of(checkpoint: Path | str, data_dir: Path | str | None, device: str, notify: Callable[[str], None]) -> Prediction:
    """Dataset, recipe and precision are the checkpoint's, so that the figures are those that `train` reported.

    But a CPU that only emulates bfloat16 evaluates in float32, and says so.
    """
    place = resolve_device(device)
    loaded = load_checkpoint(checkpoint)
    recipe = without_emulation(loaded.recipe, place)
    if recipe != loaded.recipe:
        notify("this run was in bfloat16, which this CPU only emulates: evaluated in float32, so the last digits may differ")
        loaded = replace(loaded, recipe=recipe)
    data = datasets.load(loaded.recipe, Path(data_dir) if data_dir else None, notify)
    if data.classes != loaded.classes:
        raise CifarResnetError(f"{loaded.path} knows {', '.join(loaded.classes)}; the images are of {', '.join(data.classes)}")
    if not loaded.finished:
        notify(f"the run stands at epoch {loaded.content['epoch']} of {loaded.recipe.epochs}: what follows is not its end")
    model, images = loaded.model(place), make_batches(data.evaluation, loaded.recipe, place)
    logits, labels = engine.predict(loaded.recipe, model, images.plain(engine.EVALUATION_BATCH), place)
    return Prediction(loaded, model, data, images, logits, labels, place)


def evaluate(
    checkpoint: Path | str,
    run_dir: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    tta: str = "none",
    format: str = "png",
    notify: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """What `evaluation.json` holds: loss, accuracy, calibration and the report by class, of the single view.

    Args:
        checkpoint: a checkpoint file, or a run directory.
        run_dir: where `evaluation.json` and the pictures go; beside the checkpoint if not given.
        tta: "flip" or "flip-shift" add loss and accuracy of the mean logits of several views; see `analysis.views`.
        format: of the pictures: "png", "svg" or "pdf".

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    figures.check_format(format)
    analysis.views(tta)
    found = logits_of(checkpoint, data_dir, device, notify)
    content = content_of(found, tta)
    folder = writable(Path(run_dir) if run_dir else found.checkpoint.path.parent)
    write_json(folder / "evaluation.json", content)
    for name, figure in evaluation_figures(content).items():
        figures.save(figure, folder / f"{name}.{format}")
    return content


def content_of(found: Prediction, tta: str = "none") -> dict[str, Any]:
    """What `evaluation.json` holds."""
    loaded = found.checkpoint
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "checkpoint": str(loaded.path),
        "recipe": loaded.recipe.recipe,
        "epoch": loaded.content["epoch"],
        "evaluated_on": found.data.evaluated_on,
        "precision": loaded.recipe.precision,
        "environment": environment(found.device),
        **analysis.report(found.logits, found.labels, found.data.classes),
        "tta": None,
    }
    if tta != "none":
        logits = analysis.mean_logits(loaded.recipe, found.model, found.images, found.device, tta)
        score = engine.scores(logits, found.labels)
        content["tta"] = {tta: {"loss": score["test_loss"], "accuracy": score["test_accuracy"]}}
    return content


def evaluation_figures(content: dict[str, Any]) -> dict[str, Figure]:
    """The pictures of an evaluation, by the name of their file."""
    what = f"{content['recipe']}, {content['images']:,} {content['evaluated_on']} images"
    right = f"{what}: {content['accuracy']:.2f} % right"
    bins, error, loss = (content[key] for key in ("reliability", "calibration_error", "loss"))
    return {
        "confusion_matrix": figures.confusion_matrix(content["confusion_matrix"], list(content["classes"]), right),
        "class_accuracy": figures.class_accuracy(content["classes"], right),
        "reliability": figures.reliability(bins, error, loss, f"How far confidence can be believed: {what}"),
    }


def misclassified(
    checkpoint: Path | str,
    run_dir: Path | str | None = None,
    *,
    count: int = 25,
    layer: str = "layer2",
    sort: str = "confidence",
    true: str | None = None,
    predicted: str | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    format: str = "png",
    notify: Callable[[str], None] = lambda message: None,
) -> list[analysis.Mistake]:
    """The mistakes chosen, in order; writes `misclassified.json` (every mistake), and pictures of the first of those chosen.

    Args:
        checkpoint: a checkpoint file, or a run directory.
        run_dir: where the files go; beside the checkpoint if not given.
        count: how many of the mistakes the two pictures show.
        layer: whose output Grad-CAM weighs; see `analysis.grad_cam`.
        sort: "confidence" (surest first), "class" or "random".
        true: only mistakes on images of this class.
        predicted: only images that were taken for this class.
        format: of the pictures: "png", "svg" or "pdf".

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if not 1 <= count <= 100:
        raise UsageError(f"--count {count} must be 1 to 100")
    if layer not in analysis.LAYERS:
        raise UsageError(f"--layer {layer}: it is {', '.join(analysis.LAYERS)}")
    figures.check_format(format)
    found = logits_of(checkpoint, data_dir, device, notify)
    split, classes = found.data.evaluation, found.data.classes
    wrong = analysis.mistakes(found.logits, found.labels, split, classes)
    chosen = analysis.choose(wrong, classes, sort, true, predicted)
    path = found.checkpoint.path
    folder = writable(Path(run_dir) if run_dir else path.parent)
    listed = [{key: value for key, value in mistake._asdict().items() if key != "position"} for mistake in wrong]
    content = {"schema": SCHEMA, "checkpoint": str(path), "evaluated_on": found.data.evaluated_on, "images": len(split)}
    content["precision"] = found.checkpoint.recipe.precision
    write_json(folder / "misclassified.json", {**content, "mistakes": listed})
    order = {"confidence": "surest of", "class": "first, by class, of", "random": "drawn at random from"}[sort]
    of_classes = "".join(f", {what} {name}" for what, name in (("true class", true), ("predicted", predicted)) if name)
    which = f"{count} {order} {len(chosen)}" if count < len(chosen) else f"all {len(chosen)}"
    which = "the one mistake" if len(chosen) == 1 else f"{which} mistakes"
    title = f"{which[0].upper()}{which[1:]} in {len(split):,} {found.data.evaluated_on} images{of_classes}"
    if chosen:
        for name, figure in mistake_figures(found, chosen[:count], layer, title).items():
            figures.save(figure, folder / f"{name}.{format}")
    return chosen


def mistake_figures(found: Prediction, shown: list[analysis.Mistake], layer: str, title: str) -> dict[str, Figure]:
    """The pictures of these mistakes, by the name of their file."""
    chosen, classes = found.data.evaluation.take(np.array([mistake.position for mistake in shown])), found.data.classes
    images = next(make_batches(chosen, found.checkpoint.recipe, found.device).plain(len(chosen)))[0]
    maps = []
    for names in ([mistake.predicted for mistake in shown], [mistake.true for mistake in shown]):
        of = torch.tensor([classes.index(name) for name in names], device=found.device)
        maps.append(analysis.grad_cam(found.model, images, of, layer))
    return {
        "misclassified": figures.misclassified(chosen.images, shown, title),
        "gradcam": figures.grad_cam(chosen.images, maps[0], maps[1], shown, title and f"Grad-CAM at {layer}: {title}"),
    }
