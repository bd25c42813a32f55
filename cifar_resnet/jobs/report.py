"""A finished run as a page of HTML that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..arguments import checked
from ..look import analysis, figures, pictures
from ..run_dir import LATEST, write_whole
from .common import Prediction, command_line, content_of, data_url, finished, grad_cams, logits_of, rendered

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
    page = rendered(
        "report.html",
        run=checkpoint,
        content=content,
        training_images=len(found.data.train),
        command=command_line(checkpoint.recipe),
        pictures={title: data_url(figure, "svg") for title, figure in _pictures(found, content).items()},
        wrong=len(wrong),
        mistakes=[data_url(_mistake(found, mistake), "png") for mistake in wrong[:SHOWN]],
    )
    path = Path(path) if path else checkpoint.path.parent / "report.html"
    write_whole(path, page)
    return path


def _pictures(found: Prediction, content: dict[str, Any]) -> dict[str, Figure]:
    checkpoint, recipe = found.checkpoint, found.checkpoint.recipe
    drawn = figures.evaluation(content)
    return {
        "Loss and accuracy by epoch": figures.curves(checkpoint.history, recipe, content["evaluated_on"]),
        "Learning rate of every step": figures.learning_rate(recipe, analysis.steps_per_epoch(recipe, len(found.data.train))),
        "Confusion matrix": drawn["confusion_matrix"],
        "Accuracy by class": drawn["class_accuracy"],
        "Calibration": drawn["reliability"],
    }


def _mistake(found: Prediction, mistake: analysis.Mistake) -> Figure:
    images, predicted, true = grad_cams(found, [mistake], "layer2")
    return pictures.grad_cam(images, predicted, true, [mistake], "")
