"""A trained model as a folder that hosts of Gradio apps publish as it is."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..checkpoint import Checkpoint
from ..files import new_folder, write_json
from ..look.words import plural
from ..recipe import Recipe
from .common import command_line, rendered
from .demo import content_of_page

if TYPE_CHECKING:
    from ..look.page import Content, Mistake

NEEDED = ("gradio", "torch", "safetensors", "numpy", "pillow")
MISTAKES = 200  # at most, the surest


def space(
    checkpoint: Checkpoint, recipe: Recipe, folder: Path, weights: bytes, data_dir: Path | str | None, device: str,
    notify: Callable[[str], None],
) -> None:  # fmt: skip
    """Writes the folder: `app.py`, which needs nothing of this package, and all that it shows; `recipe` in place of the run's own.

    Raises:
        RunDirectoryError: the folder is not empty, or cannot be written.
        ImportError: Gradio is not installed.
        CifarResnetError: the images of the run are not there.
    """
    with new_folder(folder) as part:
        content = content_of_page(checkpoint, data_dir, device, download=notify, recipe=recipe)
        mistakes = content.mistakes(content.orders[0], None, None)
        package = files("cifar_resnet") / "look"
        for name, source in (("app.py", "space_app.py"), ("page.py", "page.py")):
            (part / name).write_text((package / source).read_text(encoding="utf-8"), encoding="utf-8")
        (part / "model.safetensors").write_bytes(weights)
        _write(part / "run.html", content.run())
        (part / "requirements.txt").write_text("".join(f"{name}=={_version(name)}\n" for name in NEEDED), encoding="utf-8")
        _write(part / "README.md", _readme(checkpoint, recipe, content, len(mistakes)) + "\n")
        write_json(part / "model.json", {**_settings(checkpoint, content), "examples": _examples(part, content)})
        write_json(part / "mistakes.json", _mistakes(part, content, mistakes[:MISTAKES]))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _version(name: str) -> str:
    """As an index has it: without what a build of torch adds for its CUDA."""
    return version(name).partition("+")[0]


def _settings(checkpoint: Checkpoint, content: Content) -> dict[str, Any]:
    """What the network of `app.py` is built from, and what its page says."""
    names = ("mean", "std", "width", "prep_order", "pool_position", "conv_bias", "fc_bias", "logit_scale", "precision")
    return {
        "title": content.title,
        "notice": content.notice,
        "mirrored": content.augmented,
        "classes": list(checkpoint.classes),
        "temperature": checkpoint.temperature,
        **{name: checkpoint.recipe.to_dict()[name] for name in names},
    }


def _examples(part: Path, content: Content) -> list[dict[str, str]]:
    (part / "examples").mkdir()
    written = []
    for i, (image, name) in enumerate(content.examples):
        written.append({"file": f"examples/{i}.png", "class": name})
        Image.fromarray(image).save(part / written[-1]["file"])
    return written


def _mistakes(part: Path, content: Content, shown: Sequence[Mistake]) -> list[dict[str, Any]]:
    """Writes the images of these mistakes, and what lies over them; gives what `mistakes.json` holds."""
    (part / "mistakes").mkdir()
    if not shown:
        return []
    predicted, true = content.overlays(shown)
    written = []
    for i, each in enumerate(shown):
        stem = f"mistakes/{i:03}"
        for end, picture in (("", each.image), ("-predicted", predicted[i]), ("-true", true[i])):
            Image.fromarray(np.ascontiguousarray(picture)).save(part / f"{stem}{end}.png")
        fields = {"name": each.name, "true": each.true, "predicted": each.predicted, "confidence": each.confidence}
        written.append({"file": f"{stem}.png", **fields})
    return written


def _readme(checkpoint: Checkpoint, recipe: Recipe, content: Content, mistakes: int) -> str:
    accuracy = content.notice  # that the run has not ended
    if checkpoint.finished:
        last = checkpoint.history[-1]["test_accuracy"]
        accuracy = f"It is right on {last:.2f} % of the {checkpoint.evaluated_on} images (last epoch, single view, one run)."
    return rendered(
        "space.md",
        title=content.title,
        gradio=_version("gradio"),
        python=".".join(platform.python_version_tuple()[:2]),
        classes=f"{len(checkpoint.classes)} classes",
        accuracy=accuracy,
        mistakes=mistakes and plural(min(mistakes, MISTAKES), "surest mistake"),
        command=command_line(recipe),
    )
