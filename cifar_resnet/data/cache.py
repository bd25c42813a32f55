"""Images of a folder that were read once, kept in the user's cache folder. Whoever deletes them loses time only."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
from PIL import ImageFile

from ..errors import DataError
from ..files import user_cache
from .images import RULE


def state_of(folder: Path, files: Sequence[Path], whites: Mapping[str, int]) -> str:
    """A digest of what decides the pixels: names, sizes and times of the files, and the rule of reading."""
    digest = hashlib.sha256(f"{RULE} {PIL.__version__} {ImageFile.LOAD_TRUNCATED_IMAGES} {sorted(whites.items())}".encode())
    for file in files:
        with suppress(OSError):  # then reading it fails too, and nothing is kept
            about = file.stat()
            digest.update(f"\0{file.relative_to(folder)}\0{about.st_size} {about.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def find(folder: Path, state: str, count: int) -> tuple[np.ndarray, dict[str, int]] | None:
    """The images kept for a folder, uint8 (count, 32, 32, 3), and its values of white; None where there are none of this state."""
    try:
        with np.load(_path(folder), allow_pickle=False) as kept:
            if str(kept["state"]) != state:
                return None
            images, whites = kept["images"], dict(zip(kept["kinds"].tolist(), kept["whites"].tolist(), strict=True))
    except (DataError, OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zipfile.LargeZipFile):
        return None
    return (images, whites) if images.shape == (count, 32, 32, 3) and images.dtype == np.uint8 else None


def keep(folder: Path, state: str, images: np.ndarray, whites: Mapping[str, int]) -> None:
    """Keeps a folder's images, in place of those of an earlier state. Where nothing can be written nothing is kept."""
    with suppress(DataError, OSError):
        path = _path(folder)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.part"):
            with suppress(OSError):  # of another user, or open on Windows
                if time.time() - left.stat().st_mtime > 3600:  # by a process that was killed: none writes for so long
                    left.unlink()
        try:
            with open(part, "wb") as file:
                kinds, values = np.array(list(whites), str), np.array(list(whites.values()), np.int64)
                np.savez(file, state=np.array(state), images=images, kinds=kinds, whites=values)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _path(folder: Path) -> Path:
    return user_cache() / "folders" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.npz"
