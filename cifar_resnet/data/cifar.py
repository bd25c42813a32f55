"""CIFAR-10 as torchvision reads it, downloaded once."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..errors import DataError
from .splits import Split


def data_directory(data_dir: Path | None = None) -> Path:
    """The folder given, else CIFAR_RESNET_DATA_DIR, else `cifar-resnet` in the user's cache folder."""
    if chosen := data_dir or os.environ.get("CIFAR_RESNET_DATA_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar-resnet"


def cifar10(folder: Path, notify: Callable[[str], None]) -> tuple[Split, Split, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10

    if not (folder / CIFAR10.base_folder).exists():
        _download(folder, notify)
    splits = []
    for train in (True, False):
        try:
            dataset = CIFAR10(folder, train=train)
        except (RuntimeError, OSError):
            raise _damage(folder) from None
        splits.append(Split(dataset.data, np.array(dataset.targets, np.int64), np.arange(len(dataset.targets))))
    return splits[0], splits[1], tuple(dataset.classes)


def _damage(folder: Path) -> DataError:
    """What is wrong in a folder that torchvision's integrity check turned down."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    for name, expected in [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]:
        path = folder / CIFAR10.base_folder / name
        try:
            found = calculate_md5(path)
        except OSError as error:
            return DataError(f"{path} cannot be read ({error.strerror}); expected a file of MD5 {expected}. {_ADVICE}")
        if found != expected:
            return DataError(f"{path} is damaged: expected MD5 {expected}, found {found}. {_ADVICE}")
    return DataError(f"{folder / CIFAR10.base_folder} was changed while it was read; try again")


_ADVICE = "Remove its folder to have it downloaded again, or use --dataset digits, which needs no download"


def _download(folder: Path, notify: Callable[[str], None]) -> None:
    """Into a temporary folder beside it, checked, then renamed; a second process waits for the first."""
    from torchvision.datasets import CIFAR10

    target = folder / CIFAR10.base_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            if target.exists():
                return
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as part:
                notify(f"CIFAR-10 is not in {folder}; downloading {CIFAR10.url}")
                with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # where its bar goes
                    CIFAR10(part, download=True)
                os.replace(Path(part) / CIFAR10.base_folder, target)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"CIFAR-10 is not in {folder} (expected {target / 'data_batch_1'} and the others), and downloading "
            f"{CIFAR10.url} there failed: {(str(error) or type(error).__name__).splitlines()[0]}. Give its folder with --data-dir, "
            "or use --dataset digits, which needs no download"
        ) from None
