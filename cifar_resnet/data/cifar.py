"""CIFAR-10 and CIFAR-100 as torchvision reads them: from files that lie there, from the published archive, or downloaded once.

torchvision downloads and unpacks. It is imported only then: its import takes seconds on a slow machine.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from ..errors import DataError, first_line
from ..files import rename, user_cache
from .splits import Split

_ADVICE = "or use --dataset digits, which needs no download"


class Published(NamedTuple):
    """An archive, its folder, and its files, with the MD5 checksums that torchvision has."""

    title: str
    url: str
    archive: str
    md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    names: str  # the key of the classes in `meta`


PUBLISHED = {
    "cifar10": Published(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        "label_names",
    ),
    "cifar100": Published(
        "CIFAR-100",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        {"meta": "7973b15100ade9c7d40fb424638fde48"},
        "fine_label_names",
    ),
}


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
    published = PUBLISHED[name]
    parts = published.train, published.test, published.meta
    with _unpacked(name, data_directory(data_dir), notify) as folder, ThreadPoolExecutor() as pool:
        reading = [[pool.submit(_read, folder / each, md5) for each, md5 in part.items()] for part in parts]
        train, test, meta = ([each.result() for each in part] for part in reading)
    return _split(train), _split(test), tuple(meta[0][published.names])


def check_at_hand(name: str, data_dir: Path | str | None) -> None:
    """Whether `cifar` finds what it needs on this machine.

    Raises:
        DataError: it would download it.
    """
    published, folder = PUBLISHED[name], data_directory(data_dir)
    if not _holding(published, folder) and not (folder / published.archive).exists():
        raise DataError(f"{published.title} is not in {folder}; give its folder with --data-dir")


def _read(path: Path, expected: str) -> dict[str, Any]:
    """A pickle of this MD5 checksum. Nothing else is unpickled: a pickle can run code."""
    advice = f"Remove its folder to have it downloaded again, {_ADVICE}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a file of MD5 {expected}. {advice}") from None
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != expected:
        raise DataError(f"{path} is damaged: expected MD5 {expected}, found {found}. {advice}")
    return pickle.loads(content, encoding="latin1")


def _split(batches: list[dict[str, Any]]) -> Split:
    labels = np.concatenate([batch["labels" if "labels" in batch else "fine_labels"] for batch in batches])
    pixels = torch.empty(len(labels), 32 * 32, 3, dtype=torch.uint8)  # the files have the channels first
    torch.cat([torch.from_numpy(batch["data"]).view(-1, 3, 32 * 32).mT for batch in batches], out=pixels)
    return Split(pixels.view(-1, 32, 32, 3).numpy(), labels.astype(np.int64), np.arange(len(labels)))


@contextmanager
def _unpacked(name: str, folder: Path, notify: Callable[[str], None]) -> Iterator[Path]:
    """The folder with the files themselves, for as long as they are read."""
    published = PUBLISHED[name]
    if held := _holding(published, folder):
        yield held
    elif (folder / published.archive).exists():
        with _from_archive(published, folder, notify) as unpacked:
            yield unpacked
    else:
        _download(name, folder, notify)
        yield folder / published.folder


def _holding(published: Published, folder: Path) -> Path | None:
    """Where files of the archive lie: in its folder, in one of that name in it, or in `folder` itself."""
    target = folder / published.folder
    for place in (target, folder, target / published.folder):
        found = [os.path.isfile(place / name) for name in (*published.train, *published.test, *published.meta)]
        if all(found) or (any(found) and place.name == target.name):
            return place
    return target if target.exists() else None


@contextmanager
def _from_archive(published: Published, folder: Path, notify: Callable[[str], None]) -> Iterator[Path]:
    """Unpacks the published archive that lies in the folder: into it, or for this once where nothing can be written."""
    from torchvision.datasets.utils import calculate_md5, extract_archive

    archive, target = folder / published.archive, folder / published.folder
    try:
        if (found := calculate_md5(archive)) != published.md5:
            advice = f"Remove it to have it downloaded, {_ADVICE}"
            raise DataError(f"{archive} is damaged or another: expected MD5 {published.md5}, found {found}. {advice}")
        notify(f"unpacking {archive}")
        writable = os.access(folder, os.W_OK)
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder if writable else None) as part:
            extract_archive(str(archive), part)
            unpacked = Path(part) / published.folder
            yield _put(unpacked, target) if writable else unpacked
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{archive} cannot be unpacked: {first_line(error)}") from None


def _download(name: str, folder: Path, notify: Callable[[str], None]) -> None:
    """Into a temporary folder beside it, checked, then renamed; a second process waits for the first."""
    from torchvision.datasets import CIFAR10, CIFAR100

    published, dataset = PUBLISHED[name], {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    target = folder / published.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, notify):
            if target.exists():
                return
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as part:
                notify(f"{published.title} is not in {folder}; downloading {published.url}")
                with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # where its bar goes
                    dataset(part, download=True)
                _put(Path(part) / published.folder, target)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"{published.title} is not in {folder} (expected {target / next(iter(published.train))} and the others), and downloading "
            f"{published.url} there failed: {first_line(error)}. Give its folder with --data-dir, {_ADVICE}"
        ) from None


@contextmanager
def _alone(folder: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock that other users can take too. One that another user made for himself alone is done without."""
    lock = FileLock(folder / ".download.lock", mode=0o666)
    with suppress(PermissionError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            notify(f"waiting for another process that downloads into {folder}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _put(unpacked: Path, target: Path) -> Path:
    """Renames it, unless another process was sooner."""
    try:
        rename(unpacked, target)
    except OSError:
        if not target.exists():
            raise
    return target
