"""The run directory: its files, written whole or not at all, its lock, its checkpoint."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .engine import State, start
from .errors import CheckpointError, RunDirectoryError
from .model import ResNet, build_model
from .optimizer import make_optimizer
from .recipe import ADDED, Recipe, read_json

CHECKPOINT, LOCK = "checkpoint.pt", ".lock"
ROW = {"epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "images_per_second"}
KIND, SCHEMA = "cifar-resnet checkpoint", 1


def write_whole(path: Path, content: bytes | str) -> None:
    """Under a temporary name, flushed to the disk, then renamed: a kill leaves the old file or the new one.

    Raises:
        RunDirectoryError: it cannot be written; the old file is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunDirectoryError(f"{path} could not be written: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def default_directory(recipe: Recipe, prefix: str = "") -> Path:
    return Path("runs") / f"{prefix}{recipe.recipe}-{recipe.dataset_name}-s{recipe.seed}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def check_free(path: Path) -> None:
    """Whether a folder can take a new run.

    Raises:
        RunDirectoryError: it is not empty, or cannot be made or written.
    """
    check_writable(path)
    if path.exists() and any(name != LOCK and not name.endswith(".part") for name in os.listdir(path)):
        go_on = f", or go on with the run in it: cifar-resnet train --resume {path}" if (path / "recipe.json").exists() else ""
        raise RunDirectoryError(f"run directory {path} is not empty; choose another{go_on}")


def check_writable(path: Path) -> None:
    """Whether the folder, or the nearest one above it that is there, can be written.

    Raises:
        RunDirectoryError: it cannot.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunDirectoryError(f"folder {path} cannot be made or written: {there} is no folder that can be written")


def writable(path: Path) -> Path:
    """The folder, made if it is missing.

    Raises:
        RunDirectoryError: it cannot be made or written.
    """
    check_writable(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(path: Path) -> Iterator[str]:
    """Holds the run directory against other writers; gives a line to show where a dead process had held it, or "".

    Raises:
        RunDirectoryError: another process holds it.
    """
    while True:
        try:
            lock = open(path / LOCK, "a+")  # noqa: SIM115
        except OSError as error:
            raise RunDirectoryError(f"run directory {path} cannot be locked: {error.strerror}") from None
        lock.seek(0)
        holder = lock.read().strip()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunDirectoryError(f"run directory {path} is in use by {holder or 'another process'}") from None
        with suppress(FileNotFoundError):
            if os.stat(path / LOCK).st_ino == os.fstat(lock.fileno()).st_ino:
                break
        lock.close()  # its holder removed it just now: try again with a new one
    with lock:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield f"took over the lock of {holder}, which is gone" if holder else ""
        finally:
            with suppress(OSError):
                (path / LOCK).unlink()


def remove_parts(path: Path) -> None:
    """What a killed writer left under temporary names; call it with the lock held."""
    for part in path.glob(".*.part"):
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, read and verified; tensors on the CPU."""

    path: Path
    recipe: Recipe
    classes: tuple[str, ...]
    evaluated_on: str
    environment: dict[str, Any]
    content: dict[str, Any]

    @property
    def history(self) -> list[dict[str, float]]:
        return self.content["history"]

    @property
    def finished(self) -> bool:
        return self.content["epoch"] == self.recipe.epochs

    def model(self, device: torch.device | str = "cpu") -> ResNet:
        """The model that is evaluated: the averaged weights where there are any."""
        model = build_model(self.recipe, len(self.classes))
        model.load_state_dict(self.content["averaged"] or self.content["model"])
        return model.to(device).eval()

    def state(self, device: torch.device) -> State:
        """Where the run stood, to go on from."""
        content = self.content
        state = start(self.recipe, device, len(self.classes))
        state.model.load_state_dict(content["model"])
        if state.averaged is not None:
            state.averaged.load_state_dict(content["averaged"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.totals.copy_(content["totals"])
        state.epoch, state.step, state.seconds = content["epoch"], content["step"], content["seconds"]
        state.history = list(content["history"])
        return state


def save_checkpoint(
    path: Path, recipe: Recipe, state: State, classes: tuple[str, ...], evaluated_on: str, environment: dict[str, Any]
) -> None:
    """Everything that evaluation and resuming need; tensors and plain values only."""
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "version": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "classes": list(classes),
        "evaluated_on": evaluated_on,
        "environment": environment,
        "model": state.model.state_dict(),
        "averaged": state.averaged.state_dict() if state.averaged is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "totals": state.totals.cpu(),
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "history": state.history,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def find_checkpoint(path: Path) -> Path:
    """The checkpoint of a run directory, or the file itself."""
    return path / CHECKPOINT if path.is_dir() else path


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Reads a checkpoint file, or that of a run directory, trusting nothing in it.

    Raises:
        CheckpointError: it is missing, damaged, of another kind, or holds anything but tensors and plain values.
    """
    path = find_checkpoint(Path(path))
    content = _read_archive(path)
    try:
        if content["kind"] != KIND:
            raise CheckpointError(f"{path} is not a checkpoint of cifar-resnet")
        if content["schema"] != SCHEMA:
            raise CheckpointError(f"{path} has schema {content['schema']}; this version of cifar-resnet reads {SCHEMA}")
        recipe = Recipe.parse({**ADDED, **content["recipe"]}, source=f"{path}: its recipe is not valid: ")
        checkpoint = Checkpoint(path, recipe, tuple(content["classes"]), content["evaluated_on"], content["environment"], content)
        _check_content(checkpoint)
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is not a checkpoint that this version of cifar-resnet can use: {reason[0]}") from None
    return checkpoint


def _read_archive(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        # torch.load would accept a flipped bit in a tensor, and unpack a deflated archive of any size.
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(f"{path} is not a checkpoint: its archive is compressed")
            if damaged := archive.testzip():
                raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path} is not a checkpoint, or is cut short") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a hostile file makes the unpickler raise
        refused = "code" if "weights_only" in str(error) or "Unsupported" in str(error) else "something"
        raise CheckpointError(f"{path} holds {refused} that a checkpoint must not; it was not loaded") from None
    if not isinstance(content, dict) or "kind" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of cifar-resnet")
    return content


def _check_content(checkpoint: Checkpoint) -> None:
    """Shapes, finite weights and a position inside the run; load_state_dict raises for the first."""
    recipe, content = checkpoint.recipe, checkpoint.content
    if len(checkpoint.classes) != len(content["model"]["fc.weight"]):
        raise CheckpointError(f"{checkpoint.path} has {len(checkpoint.classes)} classes, its model another number")
    if not all(isinstance(name, str) for name in checkpoint.classes):
        raise CheckpointError(f"{checkpoint.path} has class names that are no text")
    if any(set(row) != ROW or not all(math.isfinite(value) for value in row.values()) for row in content["history"]):
        raise CheckpointError(f"{checkpoint.path} has metrics that are not those of epochs")
    inside = 0 <= content["epoch"] <= recipe.epochs and content["step"] >= 0 and len(content["history"]) == content["epoch"]
    if not inside:
        raise CheckpointError(f"{checkpoint.path} stands at a place that its run does not have")
    if (content["averaged"] is not None) != (recipe.ema_decay > 0):
        raise CheckpointError(f"{checkpoint.path} has averaged weights or not, against its recipe")
    optimizer = make_optimizer(recipe, build_model(recipe, len(checkpoint.classes)))
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for index, slots in content["optimizer"]["state"].items():
        if any(
            value.shape != (() if name == "step" else shapes[index]) for name, value in slots.items() if torch.is_tensor(value)
        ):
            raise CheckpointError(f"{checkpoint.path} has an optimizer state of another model")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.state(torch.device("cpu")).tensors()):
        raise CheckpointError(f"{checkpoint.path} holds weights that are not finite numbers")


def write_metrics(path: Path, recipe: Recipe, history: list[dict], evaluated_on: str, environment: dict[str, Any]) -> None:
    """`metrics.json`: after every epoch; `final` is null until the last one."""
    final = None
    if len(history) == recipe.epochs:
        final = {**history[-1], "seconds": sum(epoch["seconds"] for epoch in history)}
    content = {"schema": SCHEMA, "environment": environment, "evaluated_on": evaluated_on, "epochs": history, "final": final}
    write_json(path / "metrics.json", content)


def read_recipe(path: Path) -> Recipe:
    return Recipe.parse({**ADDED, **read_json(path / "recipe.json", "recipe file")})
