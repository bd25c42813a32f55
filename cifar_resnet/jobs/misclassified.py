"""What a checkpoint gets wrong, and where it looked, with the files that show it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..arguments import Format, GradCamLayer, Sort, checked
from ..checkpoint import SCHEMA, Checkpoint, load_checkpoint
from ..data.folders import present
from ..errors import CifarResnetError, UsageError
from ..files import check_new_folder, check_writable, csv_of, new_folder, remove, same_place, writable, write_json, write_whole
from ..look import analysis, figures, pictures
from ..recipe import DATASETS
from ..run_dir import PICTURES
from ..runs import LATEST
from .common import Prediction, by_label, dataset_of, grad_cams, logits_of, save_figure, standing


@checked
def misclassified(
    checkpoint: Path | str = LATEST,
    run_dir: Path | str | None = None,
    *,
    count: int = 25,
    layer: GradCamLayer = "layer2",
    sort: Sort = "confidence",
    true: str | None = None,
    predicted: str | None = None,
    copy_to: Path | str | None = None,
    save_images: Path | str | None = None,
    dataset: Path | str | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    format: Format = "png",
    notify: Callable[[str], None] = lambda message: None,
    written: Callable[[Path], None] = lambda path: None,
) -> list[analysis.Mistake]:
    """The mistakes chosen, in order; writes `misclassified.json` (every mistake), and pictures of the first of those chosen.

    Where there is no such mistake, the pictures show the images predicted right that the network was least sure of.

    Args:
        checkpoint: a checkpoint file, a run directory, or "latest": the newest run in `runs`.
        run_dir: where the files go; beside the checkpoint if not given.
        count: how many of the mistakes the two pictures show.
        layer: whose output Grad-CAM weighs; see `analysis.grad_cam`.
        sort: "confidence" (surest first), "class", "random", or "label": the least probable label first, in the mean of the image
            and, where training flips, its mirror image. "label" also writes every image into `labels.json` and `labels.csv`.
        true, predicted: only mistakes on images of this class; only images that were taken for this class.
        copy_to, save_images: new folders for all mistakes chosen: their files, or PNG files of 32x32 pixels, as `true/predicted/file`.
        format: of the pictures: "png", "svg" or "pdf".
        dataset: the folder that the images are in now, if they have moved.
        written: called with each file and each new folder, when it is written.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    check_count(count)
    loaded = load_checkpoint(checkpoint)
    analysis.choose([], loaded.classes, sort, true, predicted)  # which raises for what there is not
    check_new_folders(loaded, copy_to, save_images, dataset, data_dir)
    folder = check_writable(Path(run_dir) if run_dir else loaded.path.parent)
    found = logits_of(loaded, data_dir, device, notify, dataset)
    wrong = analysis.mistakes(*found.judged)
    listed, ranked = by_label(found) if sort == "label" else (wrong, [])
    chosen = analysis.choose(listed, found.data.classes, sort, true, predicted)
    right = [] if chosen or sort == "label" else analysis.mistakes(*found.judged, right=True)
    unsure = analysis.choose(right, found.data.classes, "confidence", true, predicted)[:count]
    write_json(writable(folder) / "misclassified.json", _content(found, wrong, unsure))
    written(folder / "misclassified.json")
    if ranked:
        write_labels(found, ranked, folder, "labels", {}, written)
    said = title(found, count, len(chosen), sort, true, predicted, len(unsure))
    if unsure:
        notify(said)
    shown = chosen[:count] or unsure
    _draw(found, shown, layer, said, folder, format, written, "label" if sort == "label" else "true")
    write_images(found, chosen, copy_to, save_images, written)
    return chosen


def remove_pictures(*paths: Path) -> None:
    """Those of an earlier choice, whatever their format."""
    for path in (each.with_suffix(suffix) for each in paths for suffix in PICTURES):
        remove(path)


def _draw(
    found: Prediction, shown: list[analysis.Mistake], layer: str, title: str, folder: Path, format: str,
    written: Callable[[Path], None], given: str,
) -> None:  # fmt: skip
    """The two pictures. Where there is nothing to show, those of an earlier choice go."""
    photos, looked = folder / f"misclassified.{format}", folder / f"gradcam.{format}"
    if not shown:
        remove_pictures(photos, looked)
        return
    images, of_predicted, of_rival = grad_cams(found, shown, layer)
    written(save_figure(pictures.misclassified(images, shown, title, given), photos))
    figure = pictures.grad_cam(images, of_predicted, of_rival, shown, f"Grad-CAM at {layer}: {title}", given)
    written(save_figure(figure, looked))


def write_labels(
    found: Prediction,
    ranked: list[dict[str, Any]],
    folder: Path,
    stem: str,
    about: dict[str, Any],
    written: Callable[[Path], None],
) -> None:
    """Labels that are `ranked` as JSON, which says what they are `about`, and as CSV.

    A CSV file that is there and has other lines stays, as a user may have corrected it; the new file's name then has a number.
    """
    write_json(folder / f"{stem}.json", {**_origin(found), **about, "labels": ranked})
    written(folder / f"{stem}.json")
    as_text = [{**row, "name": (row["name"] or "").encode(errors="backslashreplace").decode()} for row in ranked]
    content = csv_of(as_text).encode()
    names = (folder / f"{stem}{'' if number == 1 else f'-{number}'}.csv" for number in itertools.count(1))
    path = next(each for each in names if not each.exists() or _holds(each, content))
    if not path.exists():  # the same file may be open in a spreadsheet, and Windows then does not let it be written
        write_whole(path, content)
    written(path)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:  # of a folder, or a file that cannot be read
        return False


def write_images(
    found: Prediction, chosen: list[analysis.Mistake], copy_to: Path | str | None, save_images: Path | str | None,
    written: Callable[[Path], None],
) -> None:  # fmt: skip
    """Fills the new folders that were asked for with the images of these mistakes."""
    for place, fill in ((copy_to, _copy_files), (save_images, _save_images)):
        if chosen and place:
            fill(found, chosen, Path(place))
            written(Path(place))


def check_count(count: int) -> None:
    if not 1 <= count <= 100:
        raise UsageError(f"--count {count} must be 1 to 100")


def check_new_folders(
    loaded: Checkpoint, copy_to: Path | str | None, save_images: Path | str | None, moved: Path | str | None,
    data_dir: Path | str | None,
) -> None:  # fmt: skip
    """Whether they are new, none is in the other, and none is among the images, which are in `moved` if they have moved.

    Raises:
        UsageError: names the option and the folder.
        RunDirectoryError: one is there and not empty, or cannot be made.
    """
    given = {option: Path(folder) for option, folder in (("--copy-to", copy_to), ("--save-images", save_images)) if folder}
    if not given:
        return
    source = dataset_of(moved or loaded.recipe.dataset)
    if copy_to and source in DATASETS:
        raise UsageError(f"--copy-to {copy_to}: the images of {source} have no files to copy; use --save-images {copy_to}")
    images = [] if source in DATASETS else [present(Path(source), data_dir)]
    for option, folder in given.items():
        check_new_folder(folder)
        for other in [*images, *(each for each in given.values() if each is not folder)]:
            inside = Path(os.path.realpath(folder))
            if any(same_place(each, other) for each in (inside, *inside.parents)):
                raise UsageError(f"{option} {folder} lies in {other}; choose a folder outside")


def _copy_files(found: Prediction, chosen: list[analysis.Mistake], folder: Path) -> None:
    source, files = found.data.evaluation.folder or Path(), [Path(mistake.name or "") for mistake in chosen]
    with new_folder(folder) as part:
        for file, path in zip(files, _places(part, found, chosen, [file.name for file in files]), strict=True):
            try:
                content = (source / file).read_bytes()
            except OSError as error:
                raise CifarResnetError(f"{source / file} cannot be copied: {error.strerror}") from None
            path.write_bytes(content)


def _save_images(found: Prediction, chosen: list[analysis.Mistake], folder: Path) -> None:
    names = [f"{Path(mistake.name or str(mistake.index)).stem}.png" for mistake in chosen]
    with new_folder(folder) as part:
        for mistake, path in zip(chosen, _places(part, found, chosen, names), strict=True):
            Image.fromarray(found.data.evaluation.images[mistake.position]).save(path)


def _places(folder: Path, found: Prediction, chosen: list[analysis.Mistake], names: list[str]) -> Iterator[Path]:
    """For each mistake `folder/true/predicted/name`, no two the same; makes the folders."""
    taken: set[str] = set()
    class_folders = {name: _free(name, taken) for name in found.data.classes}
    for mistake, name in zip(chosen, names, strict=True):
        inside = Path(class_folders[mistake.true], class_folders[mistake.predicted])
        (folder / inside).mkdir(parents=True, exist_ok=True)
        yield folder / inside / _free(name, taken, str(inside))


def _free(name: str, taken: set[str], inside: str = "") -> str:
    """The name without characters that Windows or Unix refuse, numbered where it is taken in the folder `inside`; then it is taken."""
    path = Path(re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", name).rstrip(". ") or "_")
    numbered = (path.name if number == 1 else f"{path.stem}-{number}{path.suffix}" for number in itertools.count(1))
    free = next(each for each in numbered if f"{inside}/{each.casefold()}" not in taken)
    taken.add(f"{inside}/{free.casefold()}")
    return free


def _origin(found: Prediction) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "checkpoint": str(found.checkpoint.path),
        **standing(found.checkpoint),
        "evaluated_on": found.data.evaluated_on,
        "images": len(found.labels),
        "precision": found.checkpoint.recipe.precision,
        "temperature": found.checkpoint.temperature,
    }


def _content(found: Prediction, wrong: list[analysis.Mistake], unsure: list[analysis.Mistake]) -> dict[str, Any]:
    """What `misclassified.json` holds."""

    def plain(images: list[analysis.Mistake]) -> list[dict[str, Any]]:
        return [{key: value for key, value in each._asdict().items() if key != "position"} for each in images]

    return {**_origin(found), "mistakes": plain(wrong), "least_sure": plain(unsure)}


def title(found: Prediction, count: int, chosen: int, sort: str, true: str | None, predicted: str | None, unsure: int) -> str:
    """Which of the mistakes are shown: `count` at most of the `chosen`, in the order `sort`, of these classes; or those `unsure`."""
    order = {
        "confidence": "surest of",
        "class": "first, by class, of",
        "random": "drawn at random from",
        "label": "least probable of",
    }
    what = "labels that may be wrong" if sort == "label" else "mistakes"
    which = f"{count} {order[sort]} {chosen} {what}" if count < chosen else f"All {chosen} {what}"
    which = f"The one {what.replace('mistakes', 'mistake').replace('labels', 'label')}" if chosen == 1 else which
    given = ("label" if sort == "label" else "true class", true), ("predicted", predicted)
    of_classes = "".join(f", {kind} {name}" for kind, name in given if name)
    images = f"{len(found.labels):,} {found.data.evaluated_on} images{of_classes}{figures.unfinished(standing(found.checkpoint))}"
    if not chosen:
        return f"No mistake in {images}. The {unsure} least sure, all right"
    return f"{which} in {images}"
