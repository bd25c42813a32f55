"""A finished run as a page of HTML that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from ..arguments import checked
from ..look import analysis, figures
from ..run_dir import LATEST, write_whole
from .common import Prediction, command_line, content_of, finished, grad_cams, logits_of

SHOWN = 8  # of the mistakes


@checked
def report(
    run: Path | str = LATEST,
    path: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    notify: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes a finished run as one HTML file, images inside, and gives its path.

    Args:
        run: a checkpoint file, a run directory, or "latest": the newest run in `runs`.
        path: the file; `report.html` beside the checkpoint if not given.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    checkpoint = finished(run)
    found = logits_of(checkpoint.path, data_dir, device, notify)
    content = content_of(found, "flip" if checkpoint.recipe.flip_probability else "none")
    wrong = analysis.mistakes(found.logits, found.labels, found.data.evaluation, found.data.classes, checkpoint.temperature)
    page = _page(
        run=checkpoint,
        content=content,
        training_images=len(found.data.train),
        command=command_line(checkpoint.recipe),
        pictures={title: _data_url(figure, "svg") for title, figure in _pictures(found, content).items()},
        wrong=len(wrong),
        mistakes=[_data_url(_mistake(found, mistake), "png") for mistake in wrong[:SHOWN]],
    )
    path = Path(path) if path else checkpoint.path.parent / "report.html"
    write_whole(path, page)
    return path


def _pictures(found: Prediction, content: dict[str, Any]) -> dict[str, Figure]:
    checkpoint, recipe = found.checkpoint, found.checkpoint.recipe
    drawn = figures.evaluation(content)
    return {
        "Loss and accuracy by epoch": figures.curves(checkpoint.history, recipe, content["evaluated_on"], stacked=True),
        "Learning rate of every step": figures.learning_rate(recipe, analysis.steps_per_epoch(recipe, len(found.data.train))),
        "Confusion matrix": drawn["confusion_matrix"],
        "Accuracy by class": drawn["class_accuracy"],
        "Calibration": drawn["reliability"],
    }


def _mistake(found: Prediction, mistake: analysis.Mistake) -> Figure:
    images, predicted, true = grad_cams(found, [mistake], "layer2")
    return figures.grad_cam(images, predicted, true, [mistake], "")


def _data_url(figure: Figure, format: str) -> str:
    kind = {"svg": "svg+xml", "png": "png"}[format]
    return f"data:image/{kind};base64,{base64.b64encode(figures.render(figure, format)).decode()}"


def _page(**values: Any) -> str:
    """The page, with what it shows escaped: class names and all else that a checkpoint holds are text, never HTML."""
    loader = PackageLoader("cifar_resnet", "look")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return templates.get_template("report.html").render(**values)
