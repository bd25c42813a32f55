"""Who is told of a run's course."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from ..data.splits import Data
from ..errors import UsageError
from ..look.progress import TrainingTable, visible
from ..recipe import Recipe
from ..training.engine import Epoch, State, Step


class Watcher:
    """What `train` calls in its course, on rank 0. The methods of this class do nothing.

    A watcher is any object with some of these methods; it need not be made from this class.

    `reading` is called for each image that is read from a folder, with how many are read, of how many. The count begins anew for
    the evaluation images. It is not called for images that are kept from an earlier time. `begin` is called before the first
    step, with the recipe that is trained, the folder, what `metrics.json` keeps as `environment`, the images, and where the run
    stands. `step` is called after every step; reading `step.loss` waits for the device. `epoch` is called after every epoch,
    once it is evaluated, with what `metrics.json` says of it as `epoch.metrics`. `warn` is called with a line that a user should
    see.
    """

    def reading(self, done: int, total: int) -> None: ...
    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: Data, state: State) -> None: ...
    def step(self, step: Step, state: State) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def warn(self, message: str) -> None: ...


TOLD = [name for name in vars(Watcher) if not name.startswith("_")]


class Watchers:
    """Passes each call on to every watcher that has the method.

    As a context manager it enters and exits the watchers that are one.
    """

    def __init__(self, *watchers: object) -> None:
        self.watchers, self.open = watchers, ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:  # which closes what is open, where the next cannot be opened
            for watcher in self.watchers:
                if isinstance(watcher, AbstractContextManager):
                    opened.enter_context(watcher)
            self.open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)

    def _tell(self, method: str, *what: Any) -> None:
        for watcher in self.watchers:
            if hasattr(watcher, method):
                getattr(watcher, method)(*what)

    reading = partialmethod(_tell, "reading")
    begin = partialmethod(_tell, "begin")
    step = partialmethod(_tell, "step")
    epoch = partialmethod(_tell, "epoch")
    warn = partialmethod(_tell, "warn")


def watchers(
    held: ExitStack, progress: bool | None, on_epoch: Callable[[dict[str, float]], object] | None, watcher: object | None
) -> Watchers:
    """All that are told of a run's course. The table of progress is closed with the stack."""
    table = held.enter_context(TrainingTable()) if (visible() if progress is None else progress) else None
    if watcher is not None and (isinstance(watcher, type) or not any(hasattr(watcher, name) for name in TOLD)):
        raise UsageError(f"train: watcher {watcher!r:.60} is no object with one of the methods {', '.join(TOLD)}")
    calling = on_epoch and SimpleNamespace(epoch=lambda epoch: on_epoch(dict(epoch.metrics)))
    return Watchers(*(each for each in (table, calling, watcher) if each is not None))
