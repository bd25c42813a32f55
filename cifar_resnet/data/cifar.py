"""CIFAR-10 and CIFAR-100 as torchvision reads them: from files that lie there, from the published archive, or downloaded once."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ..errors import DataError, first_line
from .splits import Split

_ADVICE = "or use --dataset digits, which needs no download"


def user_cache() -> Path:
    """`cifar-resnet` in the user's cache folder.

    Raises:
        DataError: the user has no home.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "cifar-resnet"
    try:
        return Path.home() / ".cache" / "cifar-resnet"
    except RuntimeError:
        raise DataError("this user has no home folder for images; give a folder for them with --data-dir") from None


def given_directory(data_dir: Path | str | None = None) -> Path | None:
    """The folder given, else CIFAR_RESNET_DATA_DIR, where there is one."""
    chosen = data_dir or os.environ.get("CIFAR_RESNET_DATA_DIR")
    return Path(chosen) if chosen else None


def data_directory(data_dir: Path | str | None = None) -> Path:
    """`given_directory`, else `user_cache`."""
    return given_directory(data_dir) or user_cache()


def cifar(name: str, data_dir: Path | str | None, notify: Callable[[str], None]) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test images of "cifar10" or "cifar100", checked against the published checksums, and the classes.

    They are looked for in `data_directory(data_dir)`: the folder of the published archive, also where that is the folder given
    or lies in one of the same name; else the archive itself; else they are downloaded.

    Raises:
        DataError: a file is damaged, or they are not there and cannot be downloaded.
    """
    published = _published(name)
    with _unpacked(published, data_directory(data_dir), notify) as folder:
        # torchvision looks in a folder of one name; this one may have another.
        dataset_class = type(published.__name__, (published,), {"base_folder": folder.name})
        splits = []
        for train in (True, False):
            try:
                dataset = dataset_class(folder.parent, train=train)
            except (RuntimeError, OSError):
                raise _damage(published, folder) from None
            splits.append(Split(dataset.data, np.array(dataset.targets, np.int64), np.arange(len(dataset.targets))))
    return splits[0], splits[1], tuple(dataset.classes)


def check_at_hand(name: str, data_dir: Path | str | None) -> None:
    """Whether `cifar` finds what it needs on this machine.

    Raises:
        DataError: it would download it.
    """
    published, folder = _published(name), data_directory(data_dir)
    if not _holding(published, folder) and not (folder / published.filename).exists():
        raise DataError(f"{published.__name__} is not in {folder}; give its folder with --data-dir")


def _published(name: str) -> Any:
    from torchvision.datasets import CIFAR10, CIFAR100

    return {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]


def _files(published: Any) -> list[tuple[str, str]]:
    """Names and MD5 checksums."""
    return [*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])]


@contextmanager
def _unpacked(published: Any, folder: Path, notify: Callable[[str], None]) -> Iterator[Path]:
    """The folder with the files themselves, for as long as they are read."""
    target = folder / published.base_folder
    if held := _holding(published, folder):
        yield held
    elif (folder / published.filename).exists():
        with _from_archive(published, folder, notify) as unpacked:
            yield unpacked
    else:
        _download(published, folder, notify)
        yield target


def _holding(published: Any, folder: Path) -> Path | None:
    """Where files of the archive lie: in its folder, in one of that name in it, or in `folder` itself."""
    target = folder / published.base_folder
    for place in (target, folder, target / published.base_folder):
        found = [os.path.isfile(place / name) for name, _ in _files(published)]
        if all(found) or (any(found) and place.name == target.name):
            return place
    return target if target.exists() else None


@contextmanager
def _from_archive(published: Any, folder: Path, notify: Callable[[str], None]) -> Iterator[Path]:
    """Unpacks the published archive that lies in the folder: into it, or for this once where nothing can be written."""
    from torchvision.datasets.utils import calculate_md5, extract_archive

    archive, target = folder / published.filename, folder / published.base_folder
    try:
        if (found := calculate_md5(archive)) != published.tgz_md5:
            raise DataError(
                f"{archive} is damaged or another: expected MD5 {published.tgz_md5}, found {found}. Remove it to have it "
                f"downloaded, {_ADVICE}"
            )
        notify(f"unpacking {archive}")
        writable = os.access(folder, os.W_OK)
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder if writable else None) as part:
            extract_archive(str(archive), part)
            unpacked = Path(part) / published.base_folder
            yield _put(unpacked, target) if writable else unpacked
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be unpacked: {first_line(error)}") from None


def _damage(published: Any, folder: Path) -> DataError:
    """What is wrong in a folder that torchvision's integrity check turned down."""
    from torchvision.datasets.utils import calculate_md5

    advice = f"Remove its folder to have it downloaded again, {_ADVICE}"
    for name, expected in _files(published):
        path = folder / name
        try:
            found = calculate_md5(path)
        except OSError as error:
            return DataError(f"{path} cannot be read ({error.strerror}); expected a file of MD5 {expected}. {advice}")
        if found != expected:
            return DataError(f"{path} is damaged: expected MD5 {expected}, found {found}. {advice}")
    return DataError(f"{folder} was changed while it was read; try again")


def _download(published: Any, folder: Path, notify: Callable[[str], None]) -> None:
    """Into a temporary folder beside it, checked, then renamed; a second process waits for the first."""
    target, name = folder / published.base_folder, published.__name__.replace("CIFAR", "CIFAR-")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if target.exists():
                return
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as part:
                notify(f"{name} is not in {folder}; downloading {published.url}")
                with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # where its bar goes
                    published(part, download=True)
                _put(Path(part) / published.base_folder, target)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"{name} is not in {folder} (expected {target / published.train_list[0][0]} and the others), and downloading "
            f"{published.url} there failed: {first_line(error)}. Give its folder with --data-dir, {_ADVICE}"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock that other users can take too. One that another user made for himself alone is done without."""
    lock = FileLock(folder / ".download.lock", mode=0o666)
    with suppress(PermissionError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _put(unpacked: Path, target: Path) -> Path:
    """Renames it, unless another process was sooner."""
    try:
        os.replace(unpacked, target)
    except OSError:
        if not target.exists():
            raise
    return target
