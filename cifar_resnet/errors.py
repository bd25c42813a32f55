"""What a user is told when something is wrong: one line, and the exit code that goes with it."""

import os
import shlex
import subprocess


def shell_command(*words: object) -> str:
    """A command line to paste, its words quoted as the system's shell wants them."""
    given = ["cifar-resnet", *map(str, words)]
    return subprocess.list2cmdline(given) if os.name == "nt" else shlex.join(given)


class CifarResnetError(Exception):
    """Went wrong while running: exit code 1."""

    exit_code = 1


class UsageError(CifarResnetError, ValueError):
    """Asked for something that cannot be: exit code 2."""

    exit_code = 2


class DataError(CifarResnetError):
    """A data file that is missing, damaged or cannot be had."""


class CheckpointError(CifarResnetError):
    """A checkpoint or a run's file that cannot be read or trusted."""


class RunDirectoryError(CifarResnetError):
    """A run directory that cannot be written, or is not free to be."""


class NonFiniteLossError(CifarResnetError):
    """The loss, or a weight, stopped being a finite number."""
