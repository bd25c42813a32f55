"""What the terminal shows: live tables, bars and one-line messages; plain lines where it is no terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from .data import Data
from .engine import Epoch, State, Step
from .experiment import Watcher
from .recipe import Recipe

COLUMNS = ("epoch", "LR", "train loss", "train acc %", "test loss", "test acc %", "seconds", "images/s")


class TrainingTable(Watcher):
    """One row an epoch, and a bar with the time left inside it."""

    def __init__(self) -> None:
        self.console = Console()

    def __enter__(self) -> TrainingTable:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: Data, state: State) -> None:
        print(f"run directory: {run_dir}", flush=True)
        print(
            f"{recipe.recipe} on {recipe.dataset}: {recipe.epochs} epochs of {len(data.train):,} images at batch {recipe.batch_size}, "
            f"{recipe.optimizer} to LR {recipe.max_lr:g} at epoch {recipe.peak_epoch:g}, {recipe.precision} on {environment['device']}",
            flush=True,
        )

    def epoch(self, epoch: Epoch) -> None:
        m = epoch.metrics
        print(
            f"epoch {m['epoch']:2d}  LR {m['lr']:.5f}  train loss {m['train_loss']:.4f}  accuracy {m['train_accuracy']:.2f} %  "
            f"test loss {m['test_loss']:.4f}  accuracy {m['test_accuracy']:.2f} %  {m['seconds']:.1f} s  "
            f"{m['images_per_second']:.0f} images/s",
            flush=True,
        )

    def warn(self, message: str) -> None:
        print(message, file=sys.stderr)
