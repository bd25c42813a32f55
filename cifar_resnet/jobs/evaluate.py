"""What a checkpoint gets right, with the files that say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import Format, Tta, checked
from ..checkpoint import load_checkpoint
from ..files import check_writable, writable, write_json
from ..look import figures
from ..runs import LATEST
from .common import content_of, logits_of, save_figure


@checked
def evaluate(
    checkpoint: Path | str = LATEST,
    run_dir: Path | str | None = None,
    *,
    dataset: Path | str | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    tta: Tta = "none",
    format: Format = "png",
    notify: Callable[[str], None] = lambda message: None,
    found: Callable[[dict[str, Any]], object] = lambda content: None,
) -> dict[str, Any]:
    """What `evaluation.json` holds: loss, accuracy, calibration and the report by class, of the single view.

    Args:
        checkpoint: a checkpoint file, a run directory, or "latest": the newest run in `runs`.
        run_dir: where `evaluation.json` and the pictures go; beside the checkpoint if not given.
        tta: "flip" or "flip-shift" add loss and accuracy of the mean logits of several views; see `analysis.views`.
        format: of the pictures: "png", "svg" or "pdf".
        found: called with what is returned, before the pictures are drawn.
        dataset: the folder that the images are in now, if they have moved.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    loaded = load_checkpoint(checkpoint)
    folder = check_writable(Path(run_dir) if run_dir else loaded.path.parent)
    content = content_of(logits_of(loaded, data_dir, device, notify, dataset), tta)
    write_json(writable(folder) / "evaluation.json", content)
    found(content)
    for name, figure in figures.evaluation(content).items():
        save_figure(figure, folder / f"{name}.{format}")
    return content
