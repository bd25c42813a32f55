"""Tells other programs of a training run while it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..arguments import checked
from ..data.loaders import batch_sizes
from ..data.splits import Data
from ..errors import CifarResnetError, UsageError
from ..recipe import Recipe
from ..training.engine import Epoch, State, Step
from .watch import Watcher

FOLDER = "tensorboard"


@checked
def track(kind: str) -> TensorBoard:
    """A watcher for `train` that writes what another program shows: "tensorboard".

    Raises:
        UsageError: there is no such kind.
        CifarResnetError: the package that it needs is not installed.
    """
    if kind != "tensorboard":
        raise UsageError(f"--track {kind}: it is tensorboard")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise CifarResnetError('--track tensorboard needs the package tensorboard: pip install "cifar-resnet[track]"') from None
    return TensorBoard()


class TensorBoard(Watcher, AbstractContextManager):
    """Writes loss and LR of every step, the metrics of every epoch, the recipe, and at the end the pictures, into the run's folder.

    The horizontal axis counts the steps of the run. A loss is read from the device at the end of its epoch, so no step waits.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []  # that have not been written
        self.writer: Any = None

    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: Data, state: State) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.__exit__()  # what an earlier run left
        self.recipe, self.judged, self.state = recipe, data.evaluated_on, state
        self.steps_per_epoch = len(batch_sizes(recipe, len(data.train)))
        first = state.epoch * self.steps_per_epoch + state.step + 1  # a run that was killed may have written later ones
        self.writer = SummaryWriter(str(run_dir / FOLDER), purge_step=first)
        fields = {name: each if isinstance(each, bool | int | float) else str(each) for name, each in recipe.to_dict().items()}
        for summary in hparams(fields, {f"{self.judged}/accuracy": None}):
            self.writer.file_writer.add_summary(summary)

    def step(self, step: Step, state: State) -> None:
        self.steps.append(step)

    def epoch(self, epoch: Epoch) -> None:
        self._write_steps()
        m = epoch.metrics
        at = m["epoch"] * self.steps_per_epoch
        for part, name in (("train", "train"), (self.judged, "test")):
            for quantity in ("loss", "accuracy"):
                self.writer.add_scalar(f"{part}/{quantity}", m[f"{name}_{quantity}"], at)
        self.writer.add_scalar("images per second", m["images_per_second"], at)
        if m["epoch"] == self.recipe.epochs:
            from ..look import figures

            history, recipe = self.state.history, self.recipe
            self.writer.add_figure("curves", figures.curves(history, recipe, self.judged), at)
            self.writer.add_figure("learning rate", figures.learning_rate(recipe, self.steps_per_epoch), at)
        self.writer.flush()

    def _write_steps(self) -> None:
        losses: list[float] = torch.stack([step.loss for step in self.steps]).tolist() if self.steps else []
        for step, loss in zip(self.steps, losses, strict=True):
            at = (step.epoch - 1) * step.steps + step.step
            self.writer.add_scalar("step/loss", loss, at)
            self.writer.add_scalar("step/LR", step.lr, at)
        self.steps = []

    def __exit__(self, *_: Any) -> None:
        """Writes the steps of an epoch that was not finished, too."""
        if self.writer is not None:
            self._write_steps()
            self.writer.close()
            self.writer = None
