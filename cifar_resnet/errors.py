"""What a user is told when something is wrong: one line, and the exit code that goes with it; and text that can be shown."""

import os
import re
import shlex
import subprocess
import unicodedata


def shell_command(*words: object) -> str:
    """A command line to paste, its words quoted as the system's shell wants them."""
    return " ".join(map(shell_word, ("cifar-resnet", *words)))


def shell_word(word: object) -> str:
    """The word as the system's shell takes it for one.

    cmd and PowerShell both take double quotes. A word with % or $ is not quoted for both of them.
    """
    if os.name != "nt":
        return shlex.quote(str(word))
    if re.fullmatch(r"[\w.:\\/+=-]+", str(word)):
        return str(word)
    quoted = subprocess.list2cmdline([f"{word} "])  # the blank asks for quotes, and for two backslashes before a quote
    return re.sub(r"(\\*) \"$", r'\1\1"', quoted)


class CifarResnetError(Exception):
    """An error while running: exit code 1."""

    exit_code = 1


class UsageError(CifarResnetError, ValueError):
    """A wrong argument or option: exit code 2."""

    exit_code = 2


class DataError(CifarResnetError):
    """A data file that is missing, damaged or cannot be had."""


class CheckpointError(CifarResnetError):
    """A checkpoint or a run's file that cannot be read or trusted."""


class RunDirectoryError(CifarResnetError):
    """A run directory that cannot be written, or is not free to be."""


class NonFiniteLossError(CifarResnetError):
    """The loss, or a weight, stopped being a finite number."""


def is_other_rank() -> bool:
    """Whether torchrun started this process with a rank above 0. Such a process prints nothing: rank 0 prints for all."""
    given = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    rank, size = (int(each) if re.fullmatch(r"[0-9]{1,9}", each) else 0 for each in given)
    return 0 < rank < size


def check_choice(option: str, value: str, *choices: str) -> None:
    """Checks that an option has one of its values.

    Raises:
        UsageError: it has not; names these values.
    """
    if value not in choices:
        raise UsageError(f"--{option} {value}: it is {', '.join(choices[:-1])} or {choices[-1]}")


def first_line(error: Exception) -> str:
    """Of what an error says; its kind, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """The text, with every invisible character written as an escape: "\\x1b", "\\n", "\\udce9".

    Such are control characters, line breaks, marks that turn the direction of text, and bytes of a file name that are no UTF-8.
    """
    return "".join(each.encode("unicode_escape").decode() if _unseen(each) else each for each in text)


def _unseen(character: str) -> bool:
    joins = character in "\u200c\u200d"  # which letters of several scripts, and emoji, need
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not joins
