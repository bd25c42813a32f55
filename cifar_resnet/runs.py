"""Where runs lie, and which one is meant: the names of their folders and files."""

from __future__ import annotations

import itertools
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RunDirectoryError, UsageError
from .files import writable
from .recipe import Recipe

CHECKPOINT, RECIPE, REPEAT = "checkpoint.pt", "recipe.json", "repeat.json"
RUNS, LATEST, TRIES = Path("runs"), "latest", 100


def default_directory(recipe: Recipe, prefix: str = "") -> Path:
    """Makes the folder `runs/<name>-<n>`, with n one above the highest that is there.

    The name is the recipe's; where that is `default`, and the images are not CIFAR-10, the data set's. Of several processes that
    ask at the same time each gets a folder of its own.

    Raises:
        RunDirectoryError: it cannot be made.
    """
    name = recipe.dataset_name if recipe.recipe == "default" and recipe.dataset != "cifar10" else recipe.recipe
    name = prefix + (re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or "images")
    for _ in range(TRIES):
        with suppress(FileNotFoundError):  # another process removed `runs`, which was empty
            taken = (re.fullmatch(rf"{re.escape(name)}-(\d+)", each) for each in os.listdir(writable(RUNS)))
            for number in itertools.count(1 + max((int(match[1]) for match in taken if match), default=0)):
                with suppress(FileExistsError):  # another process was sooner, or a folder has this name in another spelling
                    folder = RUNS / f"{name}-{number}"
                    folder.mkdir()
                    return folder
    raise RunDirectoryError(f"no folder of the name {name}-1, -2 ... can be made in {RUNS.absolute()}; give one with --run-dir")


@contextmanager
def folder_for(path: Path | None, recipe: Recipe, prefix: str) -> Iterator[Path]:
    """The folder given, else a default one, which goes again if nothing was written into it."""
    folder = path or default_directory(recipe, prefix)
    try:
        yield folder
    finally:
        if path is None:
            with suppress(OSError):  # one that is not empty stays
                folder.rmdir()
                RUNS.rmdir()


def find_run(path: Path | str | None = None, *, repetition: bool = False) -> Path:
    """The run directory or checkpoint file that was given; for `latest`, or None, the newest run in `runs`.

    The newest run is the one whose recipe.json or checkpoint.pt was written last, whether it has ended or not. Those of a repetition
    count. A file or folder of the name `latest` goes before.

    Args:
        repetition: gives the folder of the repetition, where the newest run is one of it.

    Raises:
        UsageError: there is no run in `runs`.
    """
    if path is not None and (str(path) != LATEST or Path(path).exists()):
        return Path(path)
    written = [file for folder in ("*", "*/s*") for name in (RECIPE, CHECKPOINT) for file in RUNS.glob(f"{folder}/{name}")]
    if not written:
        raise UsageError(f"there is no run in {RUNS.absolute()}; give the folder of one, or make one: cifar-resnet train")
    newest = max(written, key=lambda file: file.stat().st_mtime_ns).parent
    return newest.parent if repetition and (newest.parent / REPEAT).exists() else newest


def find_runs(paths: Sequence[Path | str] | None = None) -> list[Path]:
    """The run that each path names; a repetition's folder names all its runs. Without paths: the newest run."""
    return [run for path in paths or [LATEST] for run in (seeds_of(Path(path)) or [find_run(path)])]


def seeds_of(folder: Path) -> list[Path]:
    """The folders of the runs of a repetition, by seed; none if the folder is no repetition."""
    there = folder.glob("s*") if os.path.exists(folder / REPEAT) else ()
    seeds = sorted(int(each.name[1:]) for each in there if each.name[1:].isdecimal() and (each / RECIPE).exists())
    return [folder / f"s{seed}" for seed in seeds]


def is_run(path: Path) -> bool:
    """Whether a path is meant as a run: a folder with a file of one, or a file that is an archive, as a checkpoint is."""
    in_folder = any(os.path.exists(path / name) for name in (CHECKPOINT, RECIPE, REPEAT))
    return in_folder or path.suffix == ".pt" or str(path) == LATEST or (os.path.isfile(path) and zipfile.is_zipfile(path))
