"""Signals that end a process: the step in flight ends first, and the run is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CifarResnetError, shell_command


class Interrupted(CifarResnetError):
    """Stopped by a signal, with a checkpoint written."""

    def __init__(self, number: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with: {shell_command('train', '--resume', run_dir)}")
        self.number = number
        self.exit_code = 128 + number


class _Received(list):
    """Signals received, and their handler: after the first one, the next acts at once."""

    def __call__(self, number: int, _frame: Any) -> None:
        self.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, so that the step in flight can end; the second one acts at once.

    Inside another of these it gives that one's.
    """
    outer = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield []  # only the main thread may set handlers
    elif isinstance(outer, _Received):
        yield outer
    else:
        received = _Received()
        before = {number: signal.signal(number, received) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
