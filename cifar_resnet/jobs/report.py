"""A run as a page of HTML that needs nothing beside it, or as Markdown with its pictures."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ..arguments import ReportFormat, checked
from ..checkpoint import load_checkpoint
from ..data.loaders import batch_sizes
from ..errors import RunDirectoryError
from ..files import check_file, check_writable, left_by_systems, writable, write_whole
from ..look import analysis, figures, pictures, rendering
from ..look.progress import epoch_line
from ..look.words import count_of, duration, plural
from ..runs import LATEST
from .common import Prediction, by_label, command_words, content_of, data_url, grad_cams, logits_of, rendered, save_figure

SHOWN = 10  # of the mistakes, and of the labels that may be wrong
SIGN = "accuracy, single view"  # stands near the top of each report
CHART = (4.6, 3.8)  # inches, as wide as a telephone's screen


@checked
def report(
    run: Path | str = LATEST,
    path: Path | str | None = None,
    *,
    format: ReportFormat = "html",
    dataset: Path | str | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    notify: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes a run as one HTML file with its images inside, or as Markdown with its pictures beside it; gives the file's path.

    A run that has not ended is reported as it stands.

    Args:
        run: a checkpoint file, a run directory, or "latest": the newest run in `runs`.
        path: the HTML file, or the folder of the Markdown; `report.html` or `report` beside the checkpoint if not given.
        format: "html" or "markdown".
        dataset: the folder that the images are in now, if they have moved.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    checkpoint = load_checkpoint(run)
    path = Path(path) if path else checkpoint.path.parent / ("report.html" if format == "html" else "report")
    if format == "html":
        check_file(path, ".html", ".htm")
    else:
        _check_report(check_writable(path))
    found = logits_of(checkpoint, data_dir, device, notify, dataset)
    content = content_of(found, "flip" if checkpoint.recipe.flip_probability else "none")
    wrong = analysis.mistakes(*found.judged)
    shown = wrong[:SHOWN] or analysis.mistakes(*found.judged, right=True)[:SHOWN]
    doubted, _ = by_label(found)
    values = dict(
        run=checkpoint,
        content=content,
        tiles=_tiles(found, content),
        command=[*command_words(checkpoint.recipe), *_run_options(checkpoint.environment)],
        which=_which(len(shown), len(wrong)),
        doubted=doubted[:SHOWN],
        labels=f"Labels that may be wrong: {count_of(len(doubted[:SHOWN]), len(doubted))}",
        plural=plural,
        duration=duration,
    )
    if format == "markdown":
        return _write_markdown(found, content, shown, values, path)
    with rendering.page_style():
        drawn = dict(charts=_charts(found, content), cards=_cards(found, shown))
    page = rendered("report.html", **values, wrong=len(wrong), image=partial(_image, found), **drawn)
    writable(path.parent)
    write_whole(path, page.encode(errors="backslashreplace"))
    return path


def _check_report(folder: Path) -> None:
    """Whether a folder of Markdown is new, empty, or an earlier report."""
    page = folder / "README.md"
    earlier = page.is_file() and SIGN in page.read_text(encoding="utf-8", errors="replace")[:1000]
    if folder.exists() and not earlier and not all(map(left_by_systems, os.listdir(folder))):
        raise RunDirectoryError(f"folder {folder} is not empty, and holds no report; choose a new one")


def _run_options(environment: dict[str, Any]) -> list[str]:
    """Options that are no fields of the recipe, and with which the run had its numbers."""
    loader = ["--loader", "albumentations"] if environment.get("loader") == "albumentations" else []
    compiled = ["--compile", "on"] if environment.get("compiled") else []
    return [*loader, *compiled, *(["--tf32"] if environment.get("tf32") else [])]


def _which(shown: int, wrong: int) -> str:
    if not wrong:
        return f"No mistake. The {shown} least sure images"
    return "The one mistake" if wrong == 1 else f"The surest mistakes: {count_of(shown, wrong)}"


def _tiles(found: Prediction, content: dict[str, Any]) -> dict[str, str]:
    """The figures of a run beside its accuracy, by what they are called."""
    checkpoint, recipe = found.checkpoint, found.checkpoint.recipe
    flipped = {"accuracy with flips": f"{content['tta']['flip']['accuracy']:.2f} %"} if content["tta"] else {}
    written = datetime.fromtimestamp(checkpoint.path.stat().st_mtime, UTC)
    return {
        **flipped,
        "negative log likelihood": f"{content['loss']:.4f}",
        "calibration error": f"{content['calibration_error']:.2f} %",
        "training images": f"{len(found.data.train):,}",
        "epochs": str(recipe.epochs) if checkpoint.finished else count_of(checkpoint.content["epoch"], recipe.epochs),
        "batch size": f"{recipe.batch_size:,}",
        "time of training": duration(checkpoint.content["seconds"] + sum(row["seconds"] for row in checkpoint.history)),
        "evaluated in": content["precision"],
        "checkpoint of": f"{written:%Y-%m-%d %H:%M} UTC",
    }


def _charts(found: Prediction, content: dict[str, Any]) -> dict[str, str]:
    """Charts of one size as SVG elements, by their captions."""
    checkpoint, recipe, judged = found.checkpoint, found.checkpoint.recipe, content["evaluated_on"]
    steps = len(batch_sizes(recipe, len(found.data.train)))
    drawn = {
        **figures.captioned_curves(checkpoint.history, recipe, judged, CHART),
        "Learning rate of every step": figures.learning_rate(recipe, steps, CHART),
        "Confusion matrix": figures.confusion_matrix(content["confusion_matrix"], list(content["classes"]), "", CHART),
        "Recall by class": figures.class_accuracy(content["classes"], "", CHART),
        "Calibration": figures.reliability(content, "", CHART),
    }
    return {caption: _svg(figure) for caption, figure in drawn.items()}


def _svg(figure: Figure) -> str:
    """The figure as an element of a page, its letters as text of the page."""
    figure.patch.set_alpha(0)
    svg = rendering.render(figure, "svg").decode()
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))


def _cards(found: Prediction, shown: Sequence[analysis.Mistake]) -> list[dict[str, Any]]:
    """Each mistake, and where the network looked, as an address that holds the picture."""
    cards = []
    for mistake, image, *maps in zip(shown, *grad_cams(found, shown, "layer2"), strict=True):
        figure = Figure(figsize=(0.75, 0.75))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.axis("off")
        pictures.draw_difference(axis, image, *maps)
        cards.append({"mistake": mistake, "looked": data_url(rendering.render(figure, "png"), "png")})
    return cards


def _image(found: Prediction, mistake: analysis.Mistake) -> str:
    """The address that holds the image of a mistake."""
    Image.fromarray(found.data.evaluation.images[mistake.position]).save(buffer := io.BytesIO(), "png")
    return data_url(buffer.getvalue(), "png")


def _write_markdown(
    found: Prediction, content: dict[str, Any], shown: list[analysis.Mistake], values: dict[str, Any], folder: Path
) -> Path:  # fmt: skip
    checkpoint, drawn = found.checkpoint, {"confusion_matrix": figures.evaluation(content)["confusion_matrix"]}
    if checkpoint.history:
        drawn["curves"] = figures.curves(checkpoint.history, checkpoint.recipe, content["evaluated_on"])
    drawn["gradcam"] = pictures.grad_cam(*grad_cams(found, shown, "layer2"), shown, f"Grad-CAM at layer2. {values['which']}")
    if doubted := values["doubted"]:
        images = found.data.evaluation.images[[each.position for each in doubted]]
        drawn["labels"] = pictures.misclassified(images, doubted, values["labels"], "label")
    layers = analysis.layers(checkpoint.recipe, len(checkpoint.classes))
    text = rendered("report.md", **values, layers=layers, epoch_line=epoch_line)
    writable(folder)
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png")
    write_whole(folder / "README.md", text.encode(errors="backslashreplace"))
    return folder / "README.md"
