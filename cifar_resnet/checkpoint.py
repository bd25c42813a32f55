"""The checkpoint: a run's recipe, weights and metrics in one file of tensors and plain values, checked when it is read."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .arguments import checked
from .data.images import WHITES
from .data.splits import Data, same_images
from .errors import CheckpointError, first_line, printable, shell_command
from .files import write_whole
from .recipe import Recipe
from .runs import CHECKPOINT, LATEST, RECIPE, find_run, seeds_of
from .training import ways
from .training.engine import State, finite, start
from .training.model import ResNet, build_model
from .training.optim import make_optimizer
from .training.runtime import check_defaults

ROW = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "images_per_second")
KIND, SCHEMA = "cifar-resnet checkpoint", 1


@dataclass(frozen=True, eq=False)
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
    convolutions: dict[str, list[str]] | None  # their ways, see `ways.use`; old ones and those of a GPU do not say
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
            cause = "another version of Pillow does this, or a file that was replaced"
            return f"of the {now['images']:,}, pixels have changed in files of the same names; {cause}"
        return f"of the {now['images']:,}, pixels or labels have changed"

    def model(self, device: torch.device | str = "cpu") -> ResNet:
        """The model that is evaluated: the averaged weights where there are any."""
        model = build_model(self.recipe, len(self.classes))
        ways.use(model, self.convolutions)
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
        "convolutions": ways.used(state.model),
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
    check_defaults()
    path = find_run(path)
    if path.is_dir():
        if not os.access(path, os.X_OK):
            raise CheckpointError(f"folder {path} cannot be entered; this user may not")
        path = path / CHECKPOINT
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
        reason = first_line(error)
        raise CheckpointError(f"{path} is not a checkpoint that this version of cifar-resnet can use: {reason}") from None
    return checkpoint


def _instead(missing: Path) -> str:
    """What the folder of a missing checkpoint holds instead, and what to do."""
    folder = missing.parent
    if missing.name != CHECKPOINT:
        return ""
    if runs := seeds_of(folder):
        return f": {folder} is a repetition of several runs; give one of them, {runs[0]} for example"
    if (folder / RECIPE).exists():
        return f": the run has written none yet; wait while it trains, or go on with it: {shell_command('train', '--resume', folder)}"
    return ": the folder holds a search for the learning rate, no run" if (folder / "lr_finder.json").exists() else ""


def _read_archive(path: Path) -> dict[str, Any]:
    if not os.path.exists(path):
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
