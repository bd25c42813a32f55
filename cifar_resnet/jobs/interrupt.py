"""Signals that end a process: the step in flight ends first, and the run is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CifarResnetError, shell_command
from ..recipe import option_words
from ..signals import ENDING

# A user who sends one of these a second time does not want to wait. The others may come again by themselves: a terminal that is
# closed sends SIGHUP from the shell and from the kernel, and SIGXCPU comes every second.
IMPATIENT = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGBREAK")


class Interrupted(CifarResnetError):
    """Stopped by a signal, with a checkpoint written. `options` are those of `train` that the run goes on with."""

    def __init__(self, number: int, run_dir: Path, options: Mapping[str, Any]) -> None:
        words = [word for name, value in options.items() for word in option_words(name, value)]
        again = shell_command("train", "--resume", run_dir, *words)
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with: {again}")
        self.number, self.run_dir, self.options = number, run_dir, options
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[Any, ...]:
        """As it goes to another process."""
        return Interrupted, (self.number, self.run_dir, self.options)


class _Received(list):
    """Signals received, and their handler: after the first one, an impatient one acts as it did before, and the others do nothing."""

    def __init__(self, before: dict[str, Any]) -> None:
        self.before = before

    def __call__(self, number: int, _frame: Any) -> None:
        self.append(number)
        for name, handler in self.before.items():
            signal.signal(getattr(signal, name), handler if name in IMPATIENT else signal.SIG_IGN)


_outer: _Received | None = None  # of the outermost `signals` of the main thread


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first signal that would end the process, so that the step in flight can end, and the run be saved.

    A signal that is ignored stays ignored, SIGHUP under nohup for example. A handler that the program set stays too, unless it is
    for SIGINT or SIGTERM. An inner call gives the list of the outer one, with what was received before the inner call.
    """
    global _outer
    if threading.current_thread() is not threading.main_thread():
        yield []  # only the main thread may set handlers
        return
    if _outer is not None:
        yield _outer
        return
    before = {name: signal.getsignal(getattr(signal, name)) for name in ENDING if hasattr(signal, name)}
    own = {name: handler for name, handler in before.items() if _is_ours(name, handler)}
    _outer = _Received(own)
    try:
        for name in own:
            signal.signal(getattr(signal, name), _outer)
        yield _outer
    finally:
        _outer = None
        for name, handler in own.items():
            signal.signal(getattr(signal, name), handler)


def _is_ours(name: str, handler: Any) -> bool:
    """Whether we take this signal over: nothing handles it yet, or it is SIGINT or SIGTERM. A handler of None is not Python's."""
    return handler == signal.SIG_DFL or (name in ("SIGINT", "SIGTERM") and handler not in (signal.SIG_IGN, None))
