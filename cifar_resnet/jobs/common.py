"""What several jobs share: reading a run, its images and its logits; writing pictures and pages."""

from __future__ import annotations

import base64
import html
import math
import os
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from ..checkpoint import SCHEMA, Checkpoint, load_checkpoint
from ..data import datasets, label_errors
from ..data.loaders import Batch, TensorLoader
from ..data.splits import Data, Split, fingerprint, same_images
from ..errors import CifarResnetError, UsageError, printable, shell_word
from ..files import writable, write_whole
from ..look import analysis
from ..presets import PRESETS
from ..recipe import DATASETS, Recipe, option_words
from ..training.engine import predict_logits, scores
from ..training.model import ResNet
from ..training.runtime import environment, resolve_device, resolve_precision, without_emulation

if TYPE_CHECKING:  # Matplotlib comes with the first picture
    from matplotlib.figure import Figure


with_gradients = torch.inference_mode(False)  # decorates what needs them, whatever a notebook has switched off


class Prediction(NamedTuple):
    """A checkpoint's logits, float32 (N, classes), on the images that it is judged by."""

    checkpoint: Checkpoint
    model: ResNet
    data: Data
    images: TensorLoader
    logits: Tensor
    labels: Tensor
    device: torch.device
    changed: str  # how the images differ from the run's. "": they do not, or the checkpoint is too old to tell

    @property
    def judged(self) -> tuple[Tensor, Tensor, Split, tuple[str, ...], float]:
        """What `analysis.mistakes` takes."""
        return self.logits, self.labels, self.data.evaluation, self.data.classes, self.checkpoint.temperature


def prepare(
    recipe: Recipe | None, device: str, data_dir: Path | str | None, notify: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Recipe, torch.device, Data]:  # fmt: skip
    """The recipe with what depends on device and images resolved, the device, and the images; see `datasets.load`."""
    resolved = resolve_device(device)
    recipe = resolve_precision(recipe or Recipe(), resolved)
    data = datasets.load(recipe, data_dir, notify, progress)
    return datasets.with_statistics(recipe, data.train), resolved, data


def check_images(checkpoint: Checkpoint, data: Data, warn: Callable[[str], None]) -> None:
    """Whether a run can go on with these images; warns where they are other pixels in files of the same names.

    Raises:
        CifarResnetError: classes or images are not those of the run.
    """
    folder = checkpoint.path.parent
    if checkpoint.classes != data.classes:
        trained, found = (", ".join(classes) for classes in (checkpoint.classes, data.classes))
        raise CifarResnetError(f"{folder} was trained on the classes {trained}, not {found}")
    for part, what in (("train", "training"), ("evaluation", "evaluation")):
        now = data.fingerprints[part]
        changed = checkpoint.difference(part, now)
        said = f"the {what} images are not those of the run in {folder}: {changed}"
        if changed and not same_images(checkpoint.fingerprints[part], now):
            raise CifarResnetError(f"{said}; put them back, give their folder with --dataset, or start a new run")
        if changed:
            warn(f"{said}; the run goes on with these")


def spread(accuracies: Sequence[float]) -> dict[str, Any]:
    """Of accuracies in percent, one a seed: `mean`, `std` over n - 1, and `interval`, the 95 % interval of the mean.

    The interval is Student's, cut at 0 and 100. `std` is None of one seed, and `interval` of less than three: of two, it would be
    13 times as wide as they are apart.
    """
    from scipy import stats

    mean, count = statistics.fmean(accuracies), len(accuracies)
    std, interval = statistics.stdev(accuracies) if count > 1 else None, None
    if std is not None and count > 2:
        half = float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)
        interval = [max(mean - half, 0.0), min(mean + half, 100.0)]
    return {"mean": mean, "std": std, "interval": interval}


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes the figure whole, in the format of its suffix, one of `PICTURES`; makes its folder, and gives the path."""
    from ..look import rendering

    writable(path.parent)
    write_whole(path, rendering.render(figure, path.suffix[1:]))
    return path


def data_url(picture: bytes, format: str) -> str:
    """A picture's file as an address that holds all of it; format: "png" or "svg"."""
    kind = {"svg": "svg+xml", "png": "png"}[format]
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def rendered(template: str, **values: Any) -> str:
    """A page of `look/`. What an HTML page shows is escaped: class names and all else that a checkpoint holds are text, never HTML."""
    loader, escaped = PackageLoader("cifar_resnet", "look"), template.endswith(".html")
    templates = Environment(loader=loader, autoescape=escaped, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return templates.get_template(template).render(cell=cell, **values)


def cell(text: str) -> str:
    """Text as Markdown shows it, in a cell of a table too: no Markdown, and no HTML."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(printable(text), quote=False))


def opened(
    checkpoint: Checkpoint | Path | str, device: str, notify: Callable[[str], None] = lambda message: None
) -> tuple[Checkpoint, torch.device]:
    """A checkpoint to evaluate in the arithmetic of its run, and the device.

    A run in bfloat16 is evaluated in float32 on a CPU that is slow in bfloat16, and that is said.
    """
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    resolved = resolve_device(device, bool(loaded.environment.get("tf32")))
    recipe = without_emulation(loaded.recipe, resolved)
    if recipe != loaded.recipe:
        notify("this run was in bfloat16, and is evaluated in float32 on this CPU: the last digits may differ")
    return replace(loaded, recipe=recipe), resolved


def say_unfinished(loaded: Checkpoint, notify: Callable[[str], object]) -> None:
    if not loaded.finished:
        notify(f"the run stands at {loaded.stands_at}: what follows is not its end")


def images_of(
    loaded: Checkpoint, data_dir: Path | str | None, notify: Callable[[str], None], dataset: Path | str | None = None
) -> tuple[Checkpoint, Data]:
    """The images of a run, which are in `dataset` now if they have moved, and its checkpoint with that place.

    Raises:
        CifarResnetError: they are of other classes, or cannot be had.
    """
    if dataset is not None:
        before, now = loaded.recipe.dataset, dataset_of(dataset)
        if {before, now} <= set(DATASETS) and now != before:
            raise UsageError(f"--dataset {now}: {loaded.path} was trained on {before}, which has other classes")
        loaded = replace(loaded, recipe=loaded.recipe.replace(dataset=now))
    try:
        data = datasets.load(loaded.recipe, data_dir, notify)
    except UsageError as error:
        if dataset is None or str(error).startswith("--dataset"):
            raise
        raise UsageError(f"the recipe of {loaded.path} does not fit these images: {error}") from None
    if data.classes != loaded.classes:
        raise CifarResnetError(f"{loaded.path} knows {', '.join(loaded.classes)}; the images are of {', '.join(data.classes)}")
    return loaded, data


def dataset_of(given: Path | str) -> str:
    """What a recipe calls these images: a `Path` is a folder, whatever its name."""
    return os.path.abspath(given) if isinstance(given, Path) else given


@with_gradients
def logits_of(
    checkpoint: Checkpoint | Path | str,
    data_dir: Path | str | None,
    device: str,
    notify: Callable[[str], None],
    dataset: Path | str | None = None,
    data: Data | None = None,
    batches: Callable[[TensorLoader], Iterable[Batch]] = TensorLoader.plain,
) -> Prediction:
    """The logits of a checkpoint on its evaluation images, by its own recipe and precision: the figures are those of `train`.

    `dataset` is the folder of the images, if they have moved. `data` is the images, if they are already read. `notify` is called
    if the images are not those of the run. `batches` gives every image once, in order.
    """
    loaded, resolved = opened(checkpoint, device, notify)
    loaded, data = images_of(loaded, data_dir, notify, dataset) if data is None else (loaded, data)
    say_unfinished(loaded, notify)
    changed = loaded.difference("evaluation", fingerprint(data.evaluation, data.classes))
    if changed:
        notify(f"the evaluation images are not those of the run: {changed}")
    model, images = loaded.model(resolved), TensorLoader(data.evaluation, loaded.recipe, resolved)
    logits, labels = predict_logits(loaded.recipe, model, batches(images), resolved)
    check_finite(loaded, logits)
    return Prediction(loaded, model, data, images, logits, labels, resolved, changed)


def check_finite(loaded: Checkpoint, logits: Tensor) -> None:
    """Refuses logits that are not finite, of which nothing can be said: the weights are, but they have grown too large."""
    if not logits.isfinite().all():
        advice = f"train again with a lower --max-lr than {loaded.recipe.max_lr:g}"
        raise CifarResnetError(f"{loaded.path}: the network's logits are not finite, so it has diverged; {advice}")


def standing(loaded: Checkpoint) -> dict[str, int]:
    """Of which state of a run something was made: `epoch`, those done, of `epochs`, and `step`, those done of the next one."""
    return {"epoch": loaded.content["epoch"], "epochs": loaded.recipe.epochs, "step": loaded.content["step"]}


def content_of(found: Prediction, tta: str = "none") -> dict[str, Any]:
    """What `evaluation.json` holds."""
    loaded = found.checkpoint
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "checkpoint": str(loaded.path),
        "recipe": loaded.recipe.recipe,
        **standing(loaded),
        "evaluated_on": found.data.evaluated_on,
        "images_changed": bool(found.changed) if loaded.fingerprints else None,
        "precision": loaded.recipe.precision,
        "environment": environment(found.device),
        **analysis.report(found.logits, found.labels, found.data.classes),
        "calibrated": _calibrated(found),
        "without_label_errors": _without_label_errors(found),
        "tta": None,
    }
    if tta != "none":
        score = scores(analysis.mean_logits(found.model, found.images, tta, found.logits), found.labels)
        content["tta"] = {tta: {"loss": score["test_loss"], "accuracy": score["test_accuracy"]}}
    return content


def _calibrated(found: Prediction) -> dict[str, float] | None:
    """Loss and calibration error at the temperature of the checkpoint; None where it has none."""
    temperature = found.checkpoint.temperature
    if temperature == 1:
        return None
    bins = analysis.reliability(found.logits, found.labels, temperature)
    loss = scores(found.logits / temperature, found.labels)["test_loss"]
    return {"temperature": temperature, "loss": loss, "calibration_error": analysis.calibration_error(bins)}


def _without_label_errors(found: Prediction) -> dict[str, Any] | None:
    """Accuracy without the images of CIFAR-10's test split whose label is known to be wrong; None for other images."""
    if found.checkpoint.recipe.dataset != "cifar10" or found.data.evaluated_on != "test":
        return None
    right = torch.tensor([index not in label_errors.CIFAR10_TEST for index in found.data.evaluation.indices.tolist()])
    return {"images": int(right.sum()), "accuracy": scores(found.logits[right], found.labels[right])["test_accuracy"]}


def by_label(found: Prediction, logits: Tensor | None = None) -> tuple[list[analysis.Mistake], list[dict[str, Any]]]:
    """The images whose label is less probable than another class, the least probable first; and the rows of `analysis.ranked_labels`.

    By these logits, float32 (N, classes), or those of the network of `found`.
    """
    if logits is None:
        tta = "flip" if found.checkpoint.recipe.flip_probability else "none"
        logits = analysis.mean_logits(found.model, found.images, tta, found.logits)
    judged = logits, *found.judged[1:]
    wrong = sorted(analysis.mistakes(*judged), key=lambda mistake: mistake.probabilities[mistake.true])
    return wrong, analysis.ranked_labels(*judged)


@with_gradients
def grad_cams(found: Prediction, shown: Sequence[analysis.Mistake], layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images of these mistakes, uint8 (N, 32, 32, 3), and the Grad-CAM maps of the class predicted and of its rival.

    Maps are float32 (N, 32, 32); see `analysis.grad_cam`.
    """
    chosen, classes = found.data.evaluation.take(np.array([mistake.position for mistake in shown])), found.data.classes
    images = next(TensorLoader(chosen, found.checkpoint.recipe, found.device).plain(len(chosen))).images
    predicted, rival = (
        analysis.grad_cam(found.model, images, torch.tensor([classes.index(name) for name in names], device=found.device), layer)
        for names in ([mistake.predicted for mistake in shown], [mistake.rival for mistake in shown])
    )
    return chosen.images, predicted, rival


def command_line(recipe: Recipe, rounded: Collection[str] = ()) -> str:
    """The words of `command_words`, to paste."""
    return " ".join(command_words(recipe, rounded))


def command_words(recipe: Recipe, rounded: Collection[str] = ()) -> list[str]:
    """The command that repeats a run: its preset, and every option that differs from it; each word quoted for the shell.

    The fields `rounded` are given in three digits.
    """
    recipe = recipe.model_copy(update={name: float(f"{getattr(recipe, name):.3g}") for name in rounded})
    before = Recipe.build(recipe.recipe if recipe.recipe in PRESETS else "default")
    if any(value is None and getattr(before, name) is not None for name, value in recipe):
        before = Recipe()  # of a field that is none in it, as no option can say that
    if recipe.dataset in DATASETS:  # which fill in what the preset leaves to them
        recipe, filled = datasets.with_statistics(recipe), datasets.with_statistics(before.replace(dataset=recipe.dataset))
        before = before.replace(mean=filled.mean, std=filled.std)
    words = ["cifar-resnet", "train", "--recipe", before.recipe]
    for name, value in recipe:
        moved = name == "peak_epoch" and recipe.epochs != before.epochs  # it would move in proportion
        if name == "recipe" or (value == getattr(before, name) and not moved):
            continue
        words += option_words(name, value)
    return [shell_word(word) for word in words]
