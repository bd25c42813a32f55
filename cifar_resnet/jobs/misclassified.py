"""What a checkpoint gets wrong, and where it looked, with the files that show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..look import analysis, figures
from ..run_dir import LATEST, SCHEMA, writable, write_json
from .common import Prediction, grad_cams, logits_of, save_figure


def misclassified(
    checkpoint: Path | str = LATEST,
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
        checkpoint: a checkpoint file, a run directory, or "latest": the newest run in `runs`.
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
    wrong = analysis.mistakes(found.logits, found.labels, found.data.evaluation, found.data.classes)
    chosen = analysis.choose(wrong, found.data.classes, sort, true, predicted)
    folder = writable(Path(run_dir) if run_dir else found.checkpoint.path.parent)
    write_json(folder / "misclassified.json", _content(found, wrong))
    if shown := chosen[:count]:
        title = _title(found, count, len(chosen), sort, true, predicted)
        images, of_predicted, of_true = grad_cams(found, shown, layer)
        looked = figures.grad_cam(images, of_predicted, of_true, shown, f"Grad-CAM at {layer}: {title}")
        save_figure(figures.misclassified(images, shown, title), folder / f"misclassified.{format}")
        save_figure(looked, folder / f"gradcam.{format}")
    return chosen


def _content(found: Prediction, wrong: list[analysis.Mistake]) -> dict[str, Any]:
    """What `misclassified.json` holds."""
    return {
        "schema": SCHEMA,
        "checkpoint": str(found.checkpoint.path),
        "evaluated_on": found.data.evaluated_on,
        "images": len(found.labels),
        "precision": found.checkpoint.recipe.precision,
        "mistakes": [{key: value for key, value in each._asdict().items() if key != "position"} for each in wrong],
    }


def _title(found: Prediction, count: int, chosen: int, sort: str, true: str | None, predicted: str | None) -> str:
    """Which of the mistakes are shown: `count` at most of the `chosen`, in the order `sort`, of these classes."""
    order = {"confidence": "surest of", "class": "first, by class, of", "random": "drawn at random from"}[sort]
    which = f"{count} {order} {chosen} mistakes" if count < chosen else f"All {chosen} mistakes"
    which = "The one mistake" if chosen == 1 else which
    of_classes = "".join(f", {what} {name}" for what, name in (("true class", true), ("predicted", predicted)) if name)
    return f"{which} in {len(found.labels):,} {found.data.evaluated_on} images{of_classes}"
