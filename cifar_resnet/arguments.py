"""Checks the arguments of a public function by its annotations. A wrong argument is a `UsageError` of one line."""

from __future__ import annotations

import errno
import functools
import inspect
import operator
import os
from collections.abc import Callable
from os import PathLike
from types import GenericAlias, UnionType
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, InstanceOf, TypeAdapter, ValidationError

from .errors import UsageError, check_choice

# Options with a few values, in Python as on the command line.
Compile = Literal["auto", "on", "off"]
Convolution = Literal["auto", "torch"]
ExportFormat = Literal["onnx", "safetensors", "space"]
Format = Literal["png", "svg", "pdf"]
GradCamLayer = Literal["prep", "layer1", "layer2", "layer3"]
LoaderKind = Literal["auto", "tensor", "albumentations"]
ReportFormat = Literal["html", "markdown"]
Sort = Literal["confidence", "label", "class", "random"]
StepMode = Literal["exp", "linear"]
Tta = Literal["none", "flip", "flip-shift"]

P = ParamSpec("P")
R = TypeVar("R")
HINTS: dict[type, str] = {str: "Recipe.build({})", dict: "Recipe.build(**fields)"}  # what was meant in place of a Recipe


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with its arguments checked first; see `check`."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        plain = check(function, *arguments, **named)
        return function(*plain.args, **plain.kwargs)

    return call


def check(function: Callable[..., Any], *arguments: Any, **named: Any) -> inspect.BoundArguments:
    """Checks arguments by the annotations of a function, and gives them with NumPy's numbers as Python's.

    The text "3" is not taken as a number, nor is True.

    Raises:
        UsageError: an argument is missing, not known, or of another type.
    """
    signature, types = _taken(inspect.unwrap(function))
    try:
        bound = signature.bind(*arguments, **named)
    except TypeError as error:
        raise UsageError(f"{function.__name__}: {error}") from None
    for name, value in bound.arguments.items():
        if name in types:
            plain = value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value
            if not _fits(plain, types[name]):
                _refuse(function, signature.parameters[name], value)
            if "Path" in str(signature.parameters[name].annotation):  # a text, as it stands in the code
                for path in plain if isinstance(plain, list | tuple) else [plain]:
                    _check_path(function, name, path)
            bound.arguments[name] = plain
    return bound


def _fits(value: Any, type_of: TypeAdapter[Any]) -> bool:
    try:
        type_of.validate_python((value,))
    except ValidationError:
        return False
    return True


def _check_path(function: Callable[..., Any], name: str, value: Any) -> None:
    """Refuses what cannot be the name of a file here: it is empty, too long, or holds a character that no name has, such as NUL."""
    if isinstance(value, str) and not value:
        raise UsageError(f"{function.__name__}: {name} is empty")
    reason = None
    try:
        if isinstance(value, str | PathLike):
            os.lstat(value)
    except OSError as error:
        reason = error.strerror if error.errno == errno.ENAMETOOLONG else None  # on Windows it is just not there
    except ValueError as error:
        reason = str(error)
    if reason:
        raise UsageError(f"{function.__name__}: {name} {_short(str(value))}: {reason}")


def _refuse(function: Callable[..., Any], parameter: inspect.Parameter, value: Any) -> NoReturn:
    takes, values = str(parameter.annotation), get_args(get_type_hints(inspect.unwrap(function))[parameter.name])
    if values and all(isinstance(each, str) for each in values):
        if isinstance(value, str):
            check_choice(parameter.name.replace("_", "-"), value, *values)
        takes = f"{', '.join(values[:-1])} or {values[-1]}"
    meant = HINTS.get(type(value), "").format(_short(value)) if takes.startswith("Recipe") else ""
    raise UsageError(
        f"{function.__name__}: {parameter.name} {_short(value)} is of the type {type(value).__name__}; it takes {takes}"
        f"{meant and f', such as {meant}'}"
    )


@functools.cache
def _taken(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, TypeAdapter[Any]]]:
    """What a function takes, and what looks at each argument that has an annotation."""
    hints, signature = get_type_hints(function), inspect.signature(function)
    one_by_one = [name for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD and name in hints]
    adapter: Any = TypeAdapter
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    # As a tuple of one: a model alone would not take the configuration.
    return signature, {name: adapter(GenericAlias(tuple, (_of_instances(hints[name]),)), config=config) for name in one_by_one}


def _of_instances(hint: Any) -> Any:
    """The type, changed so that a pydantic model must be an instance. A dictionary of its fields does not pass."""
    instance_of: Any = InstanceOf
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    models = [isinstance(part, type) and issubclass(part, BaseModel) for part in parts]
    return functools.reduce(operator.or_, (instance_of[part] if each else part for part, each in zip(parts, models, strict=True)))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:59] + "…"
