"""The run directory: its files, its lock, its checkpoint, and when that is saved."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import socket
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from . import __version__
from .arguments import checked
from .data.images import WHITES
from .data.splits import Data, same_images
from .errors import CheckpointError, RunDirectoryError, UsageError, first_line, printable, shell_command
from .files import check_writable, csv_of, left_by_systems, same_place, writable, write_json, write_whole
from .recipe import DATASETS, Recipe, read_json
from .training import convolution
from .training.engine import State, finite, start
from .training.model import ResNet, build_model
from .training.optim import make_optimizer

CHECKPOINT, RECIPE, REPEAT, LOCK, HOLDER = "checkpoint.pt", "recipe.json", "repeat.json", ".lock", ".lock-holder"
RUNS, LATEST, TRIES = Path("runs"), "latest", 100
PICTURES = (".png", ".svg", ".pdf")
DRAWN = ("class_accuracy", "confusion_matrix", "reliability", "gradcam", "misclassified")
# Files that commands make of a checkpoint, and write beside it. labels.csv is not among them: a user may have corrected it.
MADE_OF_CHECKPOINT = {
    *("evaluation.json", "labels.json", "misclassified.json", "model.onnx", "model.safetensors", "report.html"),
    *(f"{name}{suffix}" for name in DRAWN for suffix in PICTURES),
}
ROW = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "images_per_second")
KIND, SCHEMA = "cifar-resnet checkpoint", 1


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
    there = folder.glob("s*") if (folder / REPEAT).exists() else ()
    seeds = sorted(int(each.name[1:]) for each in there if each.name[1:].isdecimal() and (each / RECIPE).exists())
    return [folder / f"s{seed}" for seed in seeds]


def is_run(path: Path) -> bool:
    """Whether a path is meant as a run: a folder with a file of one, or a file that is an archive, as a checkpoint is."""
    in_folder = any((path / name).exists() for name in (CHECKPOINT, RECIPE, REPEAT))
    return in_folder or path.suffix == ".pt" or str(path) == LATEST or (path.is_file() and zipfile.is_zipfile(path))


def check_free(path: Path) -> None:
    """Whether a folder can take a new run.

    Raises:
        RunDirectoryError: it is not empty, or cannot be made or written.
    """
    check_writable(path)
    if path.exists() and not all(
        name in (LOCK, HOLDER) or name.endswith(".part") or left_by_systems(name) for name in os.listdir(path)
    ):
        advice = "choose another"
        if (path / RECIPE).exists() or (path / REPEAT).exists():
            advice += f", leave it out for a new one, or go on with the run in it: {shell_command('train', '--resume', path)}"
        raise RunDirectoryError(f"run directory {path} is not empty; {advice}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, read and verified; tensors on the CPU."""

    path: Path
    recipe: Recipe
    classes: tuple[str, ...]
    evaluated_on: str
    environment: dict[str, Any]
    temperature: float  # logits are divided by it before their softmax; 1 if none was fitted
    whites: dict[str, int]  # of images of more than 8 bits, see `images.read_image`; old checkpoints have none
    fingerprints: dict[str, dict[str, Any]]  # of "train" and "evaluation", see `splits.fingerprint`; old ones have none
    convolutions: dict[str, list[str]] | None  # their ways, see `convolution.use`; old ones and those of a GPU do not say
    content: dict[str, Any]

    def __repr__(self) -> str:
        judged = f", {self.evaluated_on} accuracy {self.history[-1]['test_accuracy']:.2f} %" if self.history else ""
        return f"Checkpoint({self.path}: {self.recipe.title}, epoch {len(self.history)} of {self.recipe.epochs}{judged})"

    @property
    def history(self) -> list[dict[str, float]]:
        return self.content["history"]

    @property
    def finished(self) -> bool:
        return self.content["epoch"] == self.recipe.epochs

    @property
    def stands_at(self) -> str:
        """The place of the weights, as text: epochs done, and steps of the next one."""
        step = f", step {self.content['step']}" if self.content["step"] else ""
        return f"epoch {self.content['epoch']} of {self.recipe.epochs}{step}"

    def difference(self, part: str, now: Mapping[str, Any]) -> str:
        """What differs between images and the run's "train" or "evaluation" images; "" for nothing. Old checkpoints do not know.

        Args:
            now: the `splits.fingerprint` of the images.
        """
        before = self.fingerprints.get(part)
        if before is None or before["sha256"] == now["sha256"]:
            return ""
        if before["images"] != now["images"]:
            return f"there were {before['images']:,}, and there are {now['images']:,}"
        if same_images(before, now):
            return (
                f"of the {now['images']:,}, pixels have changed in files of the same names; another version of Pillow does this, "
                "or a file that was replaced"
            )
        return f"of the {now['images']:,}, pixels or labels have changed"

    def model(self, device: torch.device | str = "cpu") -> ResNet:
        """The model that is evaluated: the averaged weights where there are any."""
        model = build_model(self.recipe, len(self.classes))
        convolution.use(model, self.convolutions)
        model.load_state_dict(self.content["averaged"] or self.content["model"])
        return model.to(device).eval()

    def state(self, device: torch.device) -> State:
        """Where the run stood, to go on from."""
        content = self.content
        state = start(self.recipe, device, len(self.classes), self.convolutions)
        state.model.load_state_dict(content["model"])
        if state.averaged is not None:
            state.averaged.load_state_dict(content["averaged"])
        own = state.optimizer.state_dict()  # whose settings are the recipe's
        state.optimizer.load_state_dict({**own, "state": content["optimizer"]["state"]})
        for parameter, slots in state.optimizer.state.items():  # torch keeps the file's tensors, of whatever strides
            for name, value in slots.items():
                slots[name] = torch.empty_like(parameter if value.dim() else value).copy_(value)
        state.totals.copy_(content["totals"])
        state.epoch, state.step, state.clock.seconds = content["epoch"], content["step"], content["seconds"]
        state.history = list(content["history"])
        return state


def save_checkpoint(path: Path, state: State, data: Data, environment: dict[str, Any], temperature: float | None = None) -> None:
    """Everything that evaluation and resuming need; tensors and plain values only."""
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "version": __version__,
        "recipe": state.recipe.to_dict(),
        "classes": list(data.classes),
        "evaluated_on": data.evaluated_on,
        "environment": environment,
        "model": state.model.state_dict(),
        "averaged": state.averaged.state_dict() if state.averaged is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "totals": state.totals.cpu(),
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.clock.seconds,
        "history": state.history,
        "temperature": temperature,
        "whites": dict(data.whites),
        "data": data.fingerprints,
        "convolutions": convolution.used(state.model),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


@checked
def load_checkpoint(path: Path | str = LATEST) -> Checkpoint:
    """Reads a checkpoint file, or that of a run directory, trusting nothing in it; see `find_run` for `latest`.

    Raises:
        CheckpointError: it is missing, damaged, of another kind, or holds anything but tensors and plain values.
        UsageError: there is no latest run.
    """
    path = find_run(path)
    path = path / CHECKPOINT if path.is_dir() else path
    content = _read_archive(path)
    try:
        if content["schema"] != SCHEMA:
            raise CheckpointError(f"{path} has schema {content['schema']}; this version of cifar-resnet reads {SCHEMA}")
        recipe = Recipe.load(content["recipe"], source=f"{path}: its recipe is not valid: ")
        classes = tuple(printable(name) if isinstance(name, str) else name for name in content["classes"])
        temperature = 1.0 if content.get("temperature") is None else content["temperature"]
        later = temperature, content.get("whites") or {}, content.get("data") or {}, content.get("convolutions")
        checkpoint = Checkpoint(path, recipe, classes, content["evaluated_on"], content["environment"], *later, content)
        _check_content(checkpoint)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that this version of cifar-resnet can use: {first_line(error)}"
        ) from None
    return checkpoint


def _instead(missing: Path) -> str:
    """What the folder of a missing checkpoint holds instead, and what to do."""
    folder = missing.parent
    if missing.name != CHECKPOINT:
        return ""
    if runs := seeds_of(folder):
        return f": {folder} is a repetition of several runs; give one of them, {runs[0]} for example"
    if (folder / RECIPE).exists():
        return f": the run has not come to its first one; go on with: {shell_command('train', '--resume', folder)}"
    return ": the folder holds a search for the learning rate, no run" if (folder / "lr_finder.json").exists() else ""


def _read_archive(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}{_instead(path)}")
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
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CheckpointError(f"{path} is not a checkpoint of cifar-resnet")
    return content


def _check_content(checkpoint: Checkpoint) -> None:
    """Checks every value that is used later. `load_state_dict` raises for wrong shapes."""
    recipe, content = checkpoint.recipe, checkpoint.content
    width = len(content["model"]["prep.0.weight"])
    if width != recipe.width:  # looked at first: a wide network that is not there would fill the memory
        raise CheckpointError(f"{checkpoint.path} has a model of width {width}, its recipe {recipe.width}")
    if len(checkpoint.classes) != len(content["model"]["fc.weight"]):
        raise CheckpointError(f"{checkpoint.path} has {len(checkpoint.classes)} classes, its model another number")
    if not all(isinstance(name, str) for name in checkpoint.classes):
        raise CheckpointError(f"{checkpoint.path} has class names that are no text")
    if any(set(row) != set(ROW) or not all(math.isfinite(value) for value in row.values()) for row in content["history"]):
        raise CheckpointError(f"{checkpoint.path} has metrics that are not those of epochs")
    json.dumps([checkpoint.environment, content["history"], content["seconds"]], allow_nan=False)  # which raises for other values
    if not isinstance(checkpoint.environment, dict) or checkpoint.evaluated_on not in ("test", "holdout"):
        raise CheckpointError(f"{checkpoint.path} does not say where it was trained, or on what it was evaluated")
    epoch, step = content["epoch"], content["step"]
    whole = type(epoch) is type(step) is int and content["seconds"] >= 0
    if not whole or not 0 <= epoch <= recipe.epochs or step < 0 or len(content["history"]) != epoch:
        raise CheckpointError(f"{checkpoint.path} stands at a place that its run does not have")
    if not isinstance(checkpoint.whites, dict) or not set(checkpoint.whites.values()) <= set(WHITES):
        raise CheckpointError(f"{checkpoint.path} has the values of white {checkpoint.whites!r}; they are of {WHITES}")
    fingerprints = checkpoint.fingerprints
    if not set(fingerprints) <= {"train", "evaluation"} or not all(map(_is_fingerprint, fingerprints.values())):
        raise CheckpointError(f"{checkpoint.path} does not say which images it was trained on")
    if not (isinstance(checkpoint.temperature, float) and 0 < checkpoint.temperature < math.inf):
        raise CheckpointError(f"{checkpoint.path} has the temperature {checkpoint.temperature!r}, which must be a number above 0")
    if (content["averaged"] is not None) != (recipe.ema_decay > 0):
        raise CheckpointError(f"{checkpoint.path} has averaged weights or not, against its recipe")
    _check_optimizer(checkpoint, make_optimizer(recipe, build_model(recipe, len(checkpoint.classes))))
    if not finite(checkpoint.state(torch.device("cpu")).tensors()):
        raise CheckpointError(f"{checkpoint.path} holds weights that are not finite numbers")


def _is_fingerprint(value: Any) -> bool:
    kinds = {"images": int, "sha256": str}
    return isinstance(value, dict) and {key: type(value[key]) for key in value} in (kinds, kinds | {"files": str})


def _check_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Whether its state is one of `optimizer`: for each weight all that it keeps, or nothing."""
    kept = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else {"momentum_buffer"}
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for index, slots in checkpoint.content["optimizer"]["state"].items():
        shape = shapes[range(len(shapes)).index(index)]  # which raises for what is no index, a negative one too
        fits = all(each.shape == (() if name == "step" else shape) and each.is_floating_point() for name, each in slots.items())
        if slots and (set(slots) != kept or not fits):
            raise CheckpointError(f"{checkpoint.path} has an optimizer state of another model")


class SavePolicy:
    """When a checkpoint is due: at the end of the run, at the end of an epoch if the last one is 20 s old, and inside an epoch
    every `every_minutes`. Every rank keeps one."""

    def __init__(self, every_minutes: float) -> None:
        self.seconds, self.last = 60 * every_minutes, time.monotonic()

    def due(self, epoch_done: bool, run_done: bool) -> bool:
        return run_done or time.monotonic() - self.last >= (20 if epoch_done else self.seconds)

    def saved(self) -> None:
        """To be called when a checkpoint was saved, or could not be."""
        self.last = time.monotonic()


class RunDir:
    """The folder of one run, whose writer holds its lock."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @contextmanager
    def create(self, recipe: Recipe) -> Iterator[str]:
        """Makes the folder for a new run, and holds it locked; gives what `lock` gives.

        Raises:
            RunDirectoryError: it is not empty, cannot be written, or another process holds it.
        """
        check_free(self.path)
        writable(self.path)
        with self.lock() as taken_over:
            check_free(self.path)
            self.begin(recipe)
            yield taken_over

    def open(self, must_match: dict[str, Any] | None = None) -> tuple[Recipe, Checkpoint | None]:
        """The recipe of the run, and its checkpoint, or None where it has none yet.

        Args:
            must_match: values that fields of the recipe must have. Another `dataset` is the new folder of the images. If there is a
                checkpoint, it must have fingerprints, by which the caller checks the images; else the old folder must be gone.

        Raises:
            UsageError: there is no run in the folder, or its recipe has another value.
            CheckpointError: the checkpoint cannot be trusted.
        """
        if (self.path / CHECKPOINT).exists():
            checkpoint = load_checkpoint(self.path)
            recipe = checkpoint.recipe
        elif (self.path / RECIPE).exists():
            checkpoint, recipe = None, Recipe.load(read_json(self.path / RECIPE, "recipe file"))
        else:
            raise UsageError(f"--resume {self.path}: holds neither {CHECKPOINT} nor recipe.json, so no run to go on with")
        must_match = dict(must_match or {})
        if moved(recipe, must_match) and (checkpoint.fingerprints if checkpoint else not os.path.exists(recipe.dataset)):
            recipe = recipe.replace(dataset=str(must_match.pop("dataset")))
            checkpoint = checkpoint and replace(checkpoint, recipe=recipe)
        check_match(recipe, must_match, self.path)
        return recipe, checkpoint

    @contextmanager
    def resume(self, must_match: dict[str, Any] | None = None) -> Iterator[tuple[Recipe, Checkpoint | None, str]]:
        """Holds the folder locked, and gives what `open` gives, and a line to show where a dead process had held the lock, or ""."""
        check_writable(self.path)
        with self.lock() as taken_over:
            yield *self.open(must_match), taken_over

    @contextmanager
    def lock(self) -> Iterator[str]:
        """Holds the folder against other writers; gives a line to show where a dead process had held it, or "".

        Raises:
            RunDirectoryError: another process holds it, or it cannot be locked.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(f"run directory {self.path} is in use by {self._holder() or 'another process'}") from None
        except OSError as error:
            raise RunDirectoryError(f"run directory {self.path} cannot be locked: {error.strerror}") from None
        try:
            gone = self._holder()
            write_whole(self.path / HOLDER, f"process {os.getpid()} on {socket.gethostname()}")
            yield f"took over the lock of {gone}, which is gone" if gone else ""
        finally:
            for name in (HOLDER, LOCK):
                with suppress(OSError):
                    (self.path / name).unlink()
            lock.release()

    def _holder(self) -> str:
        """What `.lock-holder` says: which process holds the lock, or died with it; "" if there is no such file."""
        try:
            return (self.path / HOLDER).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def begin(self, recipe: Recipe) -> None:
        """Writes `recipe.json`, and removes what a killed writer left; with the lock held."""
        self.remove_parts()
        write_whole(self.path / RECIPE, recipe.to_json())

    def remove_parts(self) -> None:
        """Removes what a killed writer left under temporary names; with the lock held."""
        for part in self.path.glob(".*.part"):
            if not part.is_dir():  # which no writer of the run made
                with suppress(OSError):  # of Windows, while a virus scanner reads the file
                    part.unlink()

    def remove_made(self) -> list[str]:
        """Removes what commands made of the checkpoint, which is about to change, and gives the names of the files.

        Raises:
            RunDirectoryError: one cannot be removed.
        """
        made = sorted(name for name in MADE_OF_CHECKPOINT if (self.path / name).is_file())
        for name in made:
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise RunDirectoryError(
                    f"{self.path / name} is of an earlier state, and cannot be removed: {error.strerror}"
                ) from None
        return made

    def save(
        self, state: State, data: Data, environment: dict[str, Any], checkpoint: bool = True, temperature: float | None = None
    ) -> str:
        """Writes `checkpoint.pt`, if asked, and `metrics.json`; gives what kept them from being written, or ""."""
        try:
            if checkpoint:
                save_checkpoint(self.path / CHECKPOINT, state, data, environment, temperature)
            self.write_metrics(state, data, environment)
        except RunDirectoryError as error:
            return str(error)
        return ""

    def write_metrics(self, state: State, data: Data, environment: dict[str, Any]) -> None:
        """`metrics.json`, after every epoch; `final` is null until the last one."""
        history, final = state.history, None
        if len(history) == state.recipe.epochs:
            final = {**history[-1], "seconds": sum(epoch["seconds"] for epoch in history)}
        content = {"evaluated_on": data.evaluated_on, "epochs": history, "final": final}
        write_json(self.path / "metrics.json", {"schema": SCHEMA, "environment": environment, **content})

    def write_table(self, history: Sequence[dict[str, Any]]) -> None:
        """The epochs of `metrics.json` as `metrics.csv`."""
        write_whole(self.path / "metrics.csv", csv_of(history, ROW))

    def has_last_file(self) -> bool:
        return any(self.path.glob("learning_rate.*"))


def moved(recipe: Recipe, must_match: Mapping[str, Any]) -> bool:
    """Whether `must_match` has another folder for the images of a recipe on a folder."""
    now = must_match.get("dataset", recipe.dataset)
    return not {recipe.dataset, now} & set(DATASETS) and not same_place(now, recipe.dataset)


def check_match(recipe: Recipe, must_match: dict[str, Any], folder: Path) -> None:
    """Whether the recipe of a run has these values; a path is the same in every spelling.

    Raises:
        UsageError: names the first field that has another one.
    """
    for name, value in must_match.items():
        if name not in Recipe.model_fields:
            raise UsageError(f"{name} is no field of a recipe")
        planned = getattr(recipe, name)
        same = (tuple(value) if isinstance(value, list) else value) == planned or (name, value) == ("precision", "auto")
        if name == "dataset":
            same = same_place(value, planned)
        if not same:
            reason = " (the schedule would change)" if name == "epochs" else ""
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value} contradicts the run in {folder}, which has {planned}{reason}; leave it out")
