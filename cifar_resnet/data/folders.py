"""Folders of one's own images: which files are images, of which class, and for training or for evaluation."""

from __future__ import annotations

import difflib
import os
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from ..errors import DataError, UsageError, printable
from ..files import left_by_systems
from ..recipe import DATASETS, folder_name
from . import cache
from .cifar import given_directory
from .images import SUFFIXES, decode, read_image, scaled, white_of
from .splits import Split, stratified

SPLIT_SEED = 20_15  # fixed, so that runs with different seeds set the same images apart
EVALUATION = ("test", "val", "valid", "validation", "eval")  # what the folder beside train may be called
FOLDERS_OF_SYSTEMS = {"__macosx", "@eadir", "$recycle.bin", "__pycache__"}
PATIENCE = 1.0  # seconds of reading until that is said
Progress = Callable[[int, int], None]


class Listing(NamedTuple):
    """The image files under a folder with a folder for each class."""

    folder: Path
    classes: tuple[str, ...]
    files: list[Path]
    labels: np.ndarray  # int64 (N,)
    skipped: list[Path]  # files that are no images


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files under a folder, however deep, and the files that are none; in the order of torchvision's ImageFolder.

    Names that begin with a dot, and what systems leave, are in neither list. Links are followed, to each folder once. A file is
    an image by its suffix, else by its content.

    Raises:
        DataError: a folder cannot be listed.
    """
    images: list[Path] = []
    others: list[Path] = []
    for where, names in sorted(_walk(folder), key=lambda found: Path(found[0]).as_posix()):
        for path in (Path(where, name) for name in sorted(names)):
            (images if _is_image(path) else others).append(path)
    return images, others


def image_folder(
    folder: Path, moved_to: Path | str | None, split: float | None, notify: Callable[[str], None], progress: Progress
) -> tuple[Split, Split, tuple[str, ...], dict[str, int]]:
    """Training images, evaluation images, classes, and the values of white that the training images decided.

    The folder holds train/CLASS/* and test/CLASS/* (or val, valid, validation, eval). With `split` that share of the images of
    train/CLASS/*, or of CLASS/*, is set apart for evaluation.

    Raises:
        DataError: a class is missing or empty, or an image cannot be read.
        UsageError: there is no such folder, or `split` does not fit what it holds.
    """
    folder = present(folder, moved_to)
    listings = [_listed(part) for part in _parts(folder, split, notify)]
    _check_classes(folder, listings)
    _say_skipped([path.relative_to(folder) for listing in listings for path in listing.skipped], folder, notify)
    _say_loose([listing.folder for listing in listings], notify)
    train, whites = _read(listings[0], {}, progress, notify)
    if split is None:
        test, _ = _read(listings[1], whites, progress, notify)
    else:
        train, test = _set_apart(train, split, listings[0].classes, folder)
    for name, part in (("training", train), ("evaluation", test)):
        low, high = int(part.images.min()), int(part.images.max())
        if high - low <= 16:
            notify(f"the {name} images in {folder} have hardly any contrast: all their values are within {low} to {high} of 255")
    return train, test, listings[0].classes, whites


def class_names(folder: Path, split: float | None) -> tuple[str, ...]:
    """The classes of such a folder, whose images are not looked at."""
    parts = _parts(present(folder, None), split, lambda message: None)
    return tuple(path.name for path in _folders(parts[0]))


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders below, and their files' names, without hidden ones. A folder that links lead to twice comes once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}")

    seen = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_is_data, folders))
        yield where, list(filter(_is_data, names))


def _is_data(name: str) -> bool:
    return not name.startswith(".") and not left_by_systems(name) and name.lower() not in FOLDERS_OF_SYSTEMS


def _is_image(path: Path) -> bool:
    if os.path.exists(path) and not os.path.isfile(path):
        return False  # a pipe, which would never end
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return not isinstance(image, ImageFile.StubImageFile)  # of a kind that Pillow knows, and cannot read
    except Image.DecompressionBombError:  # too large; whoever reads it says so
        return True
    except Exception:  # of whatever kind: it is no image
        return False


def present(folder: Path, moved_to: Path | str | None) -> Path:
    """The folder of images; or that of its name in `given_directory(moved_to)`, where it is not there.

    Raises:
        UsageError: it is in neither place.
    """
    moved_to = given_directory(moved_to)
    name = folder_name(folder)
    places = [folder, *([moved_to / name] if moved_to and name else [])]
    for place in places:
        if os.path.isdir(place):  # False for a text that cannot be a path, where Path.is_dir raises
            return place
    near = difflib.get_close_matches(folder.name, DATASETS, n=1)
    advice = (
        "if it was moved, give the folder that holds it with --data-dir; or, to other commands than demo and export, its new place "
        "with --dataset"
    )
    if near:
        advice = f"did you mean {near[0]}?"
    kinds = f"{', '.join(DATASETS)} or a folder of images"
    raise UsageError(f"--dataset is {kinds}, and there is no folder {' or '.join(map(str, places))}; {advice}")


def _parts(folder: Path, split: float | None, notify: Callable[[str], None]) -> list[Path]:
    """The folders that hold one for each class: of training and of evaluation images, or of both together."""
    folders = _folders(folder)
    found = {path.name.lower(): path for path in folders}
    for path in folders:
        if (other := found[path.name.lower()]) != path and path.name.lower() in ("train", *EVALUATION):
            raise UsageError(f"{folder} has {path.name} and {other.name}, which mean the same; rename one of them")
    evaluation = [found[name] for name in EVALUATION if name in found]
    if "train" in found and evaluation and split is None:
        for unused in evaluation[1:]:
            notify(f"{unused} is not used: the run is judged on {evaluation[0]}")
        return [found["train"], evaluation[0]]
    if evaluation and split is not None:
        raise UsageError(f"--split {split:g}: {folder} has its own images for evaluation, in {evaluation[0].name}; leave it out")
    if split is not None:
        if "train" not in found or not _folders(found["train"]):  # then it is a class of this name
            return [folder]
        if others := [path.name for name, path in found.items() if name != "train"]:
            notify(f"the classes are the folders of {found['train']}; not used: {some(others)}")
        return [found["train"]]
    missing = [*(["train"] if "train" not in found else []), *(["test"] if not evaluation else [])]
    apart = "; train --split 0.2 sets a fifth of the images of train/CLASS/* or CLASS/* apart for evaluation"
    advice = "" if evaluation else apart
    raise DataError(f"{folder} must hold train/CLASS/* and test/CLASS/*: there is no {' and no '.join(missing)}{advice}")


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted((path for path in folder.iterdir() if path.is_dir() and _is_data(path.name)), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from None


def _listed(folder: Path) -> Listing:
    classes = _folders(folder)
    found = [image_files(path) for path in classes]
    labels = np.repeat(np.arange(len(classes)), [len(images) for images, _ in found]).astype(np.int64)
    files, skipped = ([path for each in lists for path in each] for lists in zip(*found, strict=True)) if found else ([], [])
    return Listing(folder, tuple(path.name for path in classes), files, labels, skipped)


def _check_classes(folder: Path, listings: Sequence[Listing]) -> None:
    """Whether every part has images of every class, and the same classes, whose names can be told apart."""
    for part in listings:
        filled = set(part.labels.tolist())
        if empty := [name for label, name in enumerate(part.classes) if label not in filled]:
            advice = "each class needs at least one, so remove the folder or fill it"
            raise DataError(f"{part.folder}: no image in {some(empty)}; {advice}")
    names = sorted({name for part in listings for name in part.classes})
    spellings = Counter(map(_composed, names))
    if twice := [name for name in names if spellings[_composed(name)] > 1]:
        raise DataError(f"{folder}: {printable(twice[0])} is spelt in two ways, an accent being one character or two; rename one")
    problems = [
        f"{there.folder.name} has {some(more)}, which {other.folder.name} has not"
        for there, other in ((listings[0], listings[-1]), (listings[-1], listings[0]))
        if (more := sorted(set(there.classes) - set(other.classes)))
    ]
    if problems:
        raise DataError(f"{folder}: {'; '.join(problems)}; both need the same classes")
    if len(listings[0].classes) < 2:
        raise DataError(f"{listings[0].folder} holds {some(listings[0].classes) or 'no folder'}; at least two classes are needed")
    shown = list(map(printable, listings[0].classes))
    if alike := [name for name in shown if shown.count(name) > 1]:
        raise DataError(f"{listings[0].folder}: two classes would both be shown as {alike[0]}; rename one")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def some(names: Sequence[object]) -> str:
    """The first ten, and how many more there are."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(map(str, names[:10])) + more


def _say_skipped(skipped: Sequence[Path], folder: Path, notify: Callable[[str], None]) -> None:
    if skipped:
        heic = any(path.suffix.lower() in (".heic", ".heif") for path in skipped)
        advice = "; HEIC is read with the package pillow-heif: pip install pillow-heif" if heic else ""
        which = "1 file is no image and is" if len(skipped) == 1 else f"{len(skipped):,} files are no images and are"
        notify(f"in {folder} {which} left out: {some(skipped)}{advice}")


def _say_loose(folders: Sequence[Path], notify: Callable[[str], None]) -> None:
    for folder in folders:
        loose = [path.name for path in sorted(folder.iterdir()) if _is_data(path.name) and path.is_file() and _is_image(path)]
        if loose:
            which, are = ("1 image lies", "is") if len(loose) == 1 else (f"{len(loose):,} images lie", "are")
            notify(f"{which} in {folder}, in no folder of a class, and {are} not used: {some(loose)}")


def _telling(progress: Progress, notify: Callable[[str], None], listing: Listing) -> Callable[[int], None]:
    """What is called with how many images of a listing are read. It says once that reading takes long, and how long."""
    began, said, total = time.monotonic(), False, len(listing.files)

    def tell(done: int) -> None:
        nonlocal said
        progress(done, total)
        passed = time.monotonic() - began
        if passed > PATIENCE and done < total and not said:
            said = True
            left = f"about {passed * (total - done) / done:,.0f} s"
            notify(f"reading {total:,} images in {listing.folder}: {left}; they are kept for the next time")

    return tell


def _read(
    listing: Listing, whites: dict[str, int], progress: Progress, notify: Callable[[str], None]
) -> tuple[Split, dict[str, int]]:
    """A listing's images, from where they are kept or from their files, and the values of white.

    Files of a type of more than 8 bits that `whites` lacks decide its white together.
    """
    state = cache.state_of(listing.folder, listing.files, whites)
    images, found = cache.find(listing.folder, state, len(listing.files)) or (None, {})
    if images is None:
        images, found = _decoded(listing, whites, _telling(progress, notify, listing))
        cache.keep(listing.folder, state, images, found)
    names = np.array([path.relative_to(listing.folder).as_posix() for path in listing.files])
    return Split(images, listing.labels, np.arange(len(images)), names, listing.folder), found


def _decoded(listing: Listing, whites: dict[str, int], tell: Callable[[int], None]) -> tuple[np.ndarray, dict[str, int]]:
    """As `_read`, from the files. Those of a type that `whites` lacks are read twice: first for the type's highest value."""
    images = np.empty((len(listing.files), 32, 32, 3), np.uint8)
    tops: dict[str, float] = {}
    again, bad = list[int](), list[str]()
    for position, path in enumerate(listing.files):
        try:
            found = decode(path)
            if found.kind is None or found.kind in whites:
                images[position] = scaled(found, whites, path)
            else:
                tops[found.kind] = max(found.top, tops.get(found.kind, 0))
                again.append(position)
        except DataError as error:
            bad.append(str(error).removeprefix(f"{listing.folder}{os.sep}"))
        tell(position + 1)
    if bad:
        raise DataError(f"{listing.folder}: {len(bad):,} of {len(images):,} images cannot be used: {some(bad)}")
    whites = {**whites, **{kind: white_of(top) for kind, top in tops.items()}}
    for position in again:
        images[position] = read_image(listing.files[position], whites)
    return images, whites


def _set_apart(every: Split, share: float, classes: Sequence[str], folder: Path) -> tuple[Split, Split]:
    """A share of the images for evaluation, each class in proportion, and one at least of each."""
    single = [classes[label] for label, count in enumerate(np.bincount(every.labels)) if count < 2]
    if single:
        raise DataError(f"{folder}: a single image in {some(single)}; --split {share:g} needs two in each class")
    count = min(max(round(share * len(every)), len(classes)), len(every) - len(classes))
    apart = stratified(every.labels, count, SPLIT_SEED, keep_one=True)
    return every.take(np.setdiff1d(np.arange(len(every)), apart)), every.take(apart)
