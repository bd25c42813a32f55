"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DataError, RunDirectoryError, UsageError

LEFT_BY_SYSTEMS = {".ds_store", "desktop.ini", "thumbs.db", "ehthumbs.db", "icon\r"}


def write_whole(path: Path, content: bytes | str) -> None:
    """Under a temporary name, flushed to the disk, then renamed: a kill leaves the old file or the new one.

    Raises:
        RunDirectoryError: it cannot be written, and the old file is as it was; or the new file is there, and its folder could not be
            flushed.
    """
    refuse_special(path)
    path = Path(os.path.realpath(path)) if os.path.islink(path) else path  # the link stays
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with open(part, "wb") as file:
            with suppress(FileNotFoundError):
                shutil.copymode(path, part)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        rename(part, path)
        if sys.platform != "win32":  # where a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that flush no folders
                    raise
            finally:
                os.close(folder)
    except OSError as error:
        raise RunDirectoryError(f"{path} could not be written: {error.strerror}") from None
    finally:  # also after Ctrl-C
        with suppress(OSError):
            part.unlink(missing_ok=True)


def rename(part: Path, path: Path) -> None:
    """Renames a file, over an old one, or a folder.

    Windows refuses while another program has one of them open. That is often a virus scanner, for a moment. So two seconds of tries.
    """
    for _ in range(20 if sys.platform == "win32" else 0):
        with suppress(PermissionError):
            return os.replace(part, path)
        time.sleep(0.1)
    return os.replace(part, path)


def remove(path: Path) -> None:
    """Removes a file of an earlier state, if it is there.

    Raises:
        RunDirectoryError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{path} is of an earlier state, and cannot be removed: {error.strerror}") from None


def left_by_systems(name: str) -> bool:
    """Whether a file is one that file browsers leave in folders that they show."""
    return name.startswith("._") or name.lower() in LEFT_BY_SYSTEMS


def same_place(one: Path | str, other: Path | str) -> bool:
    """Whether two paths are of one file or folder: by links, and where the file system takes several spellings of a name for one."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    with suppress(OSError):  # one is not there
        return os.path.samefile(one, other)
    return False


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def read_json(path: Path | str, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UsageError: the file is missing, or holds something else.
    """
    try:
        # UTF-8, or what PowerShell makes of `>`: UTF-16 with a mark.
        value = json.loads(Path(path).read_bytes(), object_pairs_hook=_without_doubles)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise UsageError(f"{what} {path} cannot be read: {reason}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{what} {path} holds a {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def csv_of(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as CSV, under a line with the names of the columns, which are the first row's keys if not given."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill beside `path`, which then becomes `path`: what fails leaves nothing behind.

    Raises:
        RunDirectoryError: as from `check_new_folder`, or it cannot be written.
    """
    check_new_folder(path)
    path = Path(os.path.realpath(path))
    part = writable(path.parent) / f".{path.name}.{os.getpid()}.new"  # unlike .part, not removed by a run beside it
    try:
        part.mkdir()
        yield part
        if path.exists():
            shutil.copymode(path, part)
            for name in filter(left_by_systems, os.listdir(path)):
                (path / name).unlink()
            path.rmdir()
        rename(part, path)
    except OSError as error:
        raise RunDirectoryError(f"folder {path} could not be written: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Whether a folder of this name can be made, or is there and empty; what a file browser leaves does not count.

    Raises:
        RunDirectoryError: it holds something, is no folder or the current one, or cannot be made.
    """
    check_writable(path)
    if path.exists() and not all(map(left_by_systems, os.listdir(path))):
        raise RunDirectoryError(f"folder {path} is not empty; choose a new one")
    if same_place(path, os.curdir):
        raise RunDirectoryError(f"folder {path} is the current one, which a new one cannot replace; choose a new one")


def check_writable(path: Path) -> Path:
    """Gives the folder back. It need not be there, and is not made.

    Raises:
        RunDirectoryError: the folder or, if it is missing, the nearest one above it cannot be written.
    """
    there = next((folder for folder in (path, *path.absolute().parents) if os.path.exists(folder)), None)
    if there is None:  # a drive of Windows
        raise RunDirectoryError(f"folder {path} cannot be made: there is no {path.absolute().anchor}")
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise RunDirectoryError(f"folder {path} cannot be made or written: {there} is no folder that can be written")
    return path


def check_file(path: Path, *suffixes: str) -> None:
    """Whether a file can be written there, whose folder may be missing.

    Raises:
        UsageError: its name does not end in one of these.
        RunDirectoryError: it cannot.
    """
    refuse_special(path)
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{path} must end in {' or '.join(filter(None, (', '.join(suffixes[:-1]), suffixes[-1])))}")
    check_writable(path.parent)


def refuse_special(path: Path) -> None:
    """Refuses a folder, a device, a pipe: a file would take its place."""
    if os.path.exists(path) and not os.path.isfile(path):  # which raise nothing, unlike the methods of Path
        raise RunDirectoryError(f"{path} cannot be written: it is {'a folder' if os.path.isdir(path) else 'no ordinary file'}")


def writable(path: Path) -> Path:
    """The folder, made if it is missing.

    Raises:
        RunDirectoryError: it cannot be made or written.
    """
    check_writable(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"folder {path} cannot be made: {error.strerror}") from None
    return path


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
