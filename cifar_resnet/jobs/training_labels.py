"""Training labels that may be wrong: each is judged by a network that was trained without it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import Format, checked
from ..checkpoint import Checkpoint
from ..data.loaders import TensorLoader
from ..data.splits import Data
from ..errors import CifarResnetError, UsageError
from ..files import check_writable, writable, write_whole
from ..look import analysis, pictures
from ..look.progress import telling
from ..look.words import count_of
from ..recipe import Recipe
from ..runs import LATEST
from ..training import calibration, engine
from .common import Prediction, by_label, images_of, opened, save_figure, with_gradients
from .misclassified import check_count, check_new_folders, remove_pictures, title, write_images, write_labels

FOLDS = "training_folds.pt"  # the logits of the folds that are done, until all are


@checked
@with_gradients
def training_labels(
    run: Path | str = LATEST,
    run_dir: Path | str | None = None,
    *,
    folds: int = 5,
    epochs: int | None = None,
    count: int = 25,
    true: str | None = None,
    predicted: str | None = None,
    copy_to: Path | str | None = None,
    save_images: Path | str | None = None,
    dataset: Path | str | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    format: Format = "png",
    progress: Callable[[int, int], None] | bool | None = None,
    notify: Callable[[str], None] = lambda message: None,
    written: Callable[[Path], None] = lambda path: None,
) -> list[analysis.Mistake]:
    """The training images whose label is less probable than another class, the least probable first.

    The run's recipe is trained once for each fold, on all images but the fold's, and judges the fold's. Writes
    `training_labels.json` and `training_labels.csv`, with every training image, and a picture of the first of those chosen.
    Folds that are done are kept beside them until all are, so that a call that was stopped can be repeated.

    Args:
        run: a checkpoint file, a run directory, or "latest". Its recipe and its images are used, not its network.
        folds: networks to train. Each class is spread evenly over the folds.
        epochs: of each network; the recipe's if not given.
        progress: as `find_lr` takes it; a function is called with the steps done and those planned.

    The other arguments are those of `misclassified`.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    check_count(count)
    loaded, place = opened(run, device, notify)
    analysis.choose([], loaded.classes, "label", true, predicted)  # which raises for a class that is none
    check_new_folders(loaded, copy_to, save_images, dataset, data_dir)
    folder = check_writable(Path(run_dir) if run_dir else loaded.path.parent)
    with telling(progress, "training on folds", "steps") as told:
        loaded, data = images_of(loaded, data_dir, notify, dataset)
        if changed := loaded.difference("train", data.fingerprints["train"]):
            notify(f"the training images are not those of the run: {changed}")
        recipe, parts = _shortened(loaded.recipe, epochs), _parts(data, folds, loaded.recipe.seed)
        folds_file = writable(folder) / FOLDS
        logits = _held_out_logits(recipe, data, parts, place, loaded.convolutions, folds_file, notify, told)
    found = _as_prediction(loaded, recipe, data, logits, place)
    doubted, ranked = by_label(found, logits)
    chosen = analysis.choose(doubted, data.classes, "label", true, predicted)
    write_labels(found, ranked, folder, "training_labels", {"folds": folds}, written)
    _draw(found, chosen, count, title(found, count, len(chosen), "label", true, predicted, 0), folder, format, written)
    write_images(found, chosen, copy_to, save_images, written)
    folds_file.unlink(missing_ok=True)
    return chosen


def _draw(
    found: Prediction, chosen: list[analysis.Mistake], count: int, title: str, folder: Path, format: str,
    written: Callable[[Path], None],
) -> None:  # fmt: skip
    """The first of them. Where there are none, the picture of an earlier choice goes."""
    picture, shown = folder / f"training_labels.{format}", chosen[:count]
    if not shown:
        remove_pictures(picture)
        return
    images = found.data.train.images[[each.position for each in shown]]
    written(save_figure(pictures.misclassified(images, shown, title, "label"), picture))


Parts = list[tuple[np.ndarray, np.ndarray]]  # of each fold: the positions of all other images, and of its own


class _Stopped(CifarResnetError):
    exit_code = 130


def _shortened(recipe: Recipe, epochs: int | None) -> Recipe:
    """The recipe in so many epochs, with its peak in proportion."""
    if epochs is None:
        return recipe
    if epochs < 1:
        raise UsageError(f"--epochs {epochs} must be at least 1")
    return recipe.replace(epochs=epochs, peak_epoch=recipe.peak_epoch * epochs / recipe.epochs)


def _parts(data: Data, folds: int, seed: int) -> Parts:
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    if not 2 <= folds <= counts.min():
        rarest = data.classes[counts.argmin()]
        bounds = f"--folds {folds} must be at least 2, and at most {counts.min()}, the training images of {rarest}"
        raise UsageError(bounds if counts.min() > 1 else f"--folds needs at least two training images of {rarest}, which has one")
    return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(data.train.labels, data.train.labels))


def _held_out_logits(
    recipe: Recipe, data: Data, parts: Parts, device: torch.device, convolutions: dict[str, list[str]] | None, path: Path,
    notify: Callable[[str], None], told: Callable[[int, int], None],
) -> Tensor:  # fmt: skip
    """Logits of the training images, float32 (N, classes), each by the network that was trained without its fold."""
    about = {"recipe": recipe.to_json(), "folds": len(parts), "images": data.fingerprints["train"]["sha256"]}
    done = _kept(path, about)
    if done:
        notify(f"{count_of(len(done), len(parts))} folds were done before")
    for fold, (others, mine) in enumerate(parts[len(done) :], len(done)):
        try:
            train, judged = data.train.take(others), data.train.take(mine)
            state = engine.start(recipe, device, len(data.classes), convolutions, train.images)
            loader, held = TensorLoader(train, recipe, device), TensorLoader(judged, recipe, device)
            for _ in engine.train(state, loader, held.plain):
                steps = recipe.epochs * loader.steps
                told(fold * steps + state.epoch * loader.steps + state.step, len(parts) * steps)
            flips = "flip" if recipe.flip_probability else "none"
            done.append(analysis.mean_logits(state.tested, held, flips))
        except KeyboardInterrupt:
            kept = f"the folds before it are kept in {path}; the same command goes on from there"
            raise _Stopped(f"stopped in fold {fold + 1} of {len(parts)}; {kept if fold else 'nothing was done before'}") from None
        torch.save({**about, "logits": done}, buffer := io.BytesIO())
        write_whole(path, buffer.getvalue())
    logits = torch.empty(len(data.train), len(data.classes))
    for (_, mine), found in zip(parts, done, strict=True):
        logits[mine] = found
    right = 100 * float((logits.argmax(1).numpy() == data.train.labels).mean())
    notify(f"the networks of the folds are right about {right:.2f} % of the images that they were not trained on")
    return logits


def _as_prediction(loaded: Checkpoint, recipe: Recipe, data: Data, logits: Tensor, device: torch.device) -> Prediction:
    """The training images in the place of those of the evaluation, with logits of several networks; the run's own is not asked."""
    labels = torch.from_numpy(data.train.labels)
    fitted, content = calibration.fit_temperature(logits, labels), {**loaded.content, "epoch": recipe.epochs, "step": 0}
    judged = replace(loaded, recipe=recipe, temperature=fitted, content=content)
    data, images = replace(data, evaluation=data.train, evaluated_on="training"), TensorLoader(data.train, recipe, device)
    return Prediction(judged, loaded.model(device), data, images, logits, labels, device, "")


def _kept(path: Path, about: dict[str, Any]) -> list[Tensor]:
    """The logits of the folds that an earlier call finished, of the same images, recipe and folds; none of what cannot be read."""
    try:
        content = torch.load(path, weights_only=True)
        return content["logits"] if all(content[name] == value for name, value in about.items()) else []
    except Exception:  # whatever is in the file
        return []
