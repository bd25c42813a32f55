"""The command line: options in, calls down, what comes back printed.

Torch and what pulls it in are imported inside the commands, so that help and usage errors answer at once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from . import __version__
from .errors import CifarResnetError, UsageError
from .recipe import Recipe

app = typer.Typer(
    help="Take one small ResNet through CIFAR-10: find the learning rate, train, evaluate, see what it gets wrong and why.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    pretty_exceptions_enable=False,
)

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with CIFAR-10, downloaded there if missing.",
        envvar="CIFAR_RESNET_DATA_DIR",
        show_default="the user's cache folder",
        rich_help_panel="Where and how",
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto is the first there of cuda, mps, cpu.", rich_help_panel="Where and how")
]
Loader = Annotated[
    Literal["auto", "tensor", "albumentations"],
    typer.Option(
        help="tensor: the split on the device, augmented a batch at a time. albumentations: image by image in worker processes. "
        "auto: tensor.",
        rich_help_panel="Where and how",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Worker processes of the albumentations loader.",
        show_default="1 on a CPU, 4 beside a GPU",
        rich_help_panel="Where and how",
    ),
]


def recipe_options(*, leave_out: tuple[str, ...] = ()) -> Callable:
    """Gives a command one option for every field of `Recipe`, gathered in its keyword argument `options`."""

    def decorate(command: Callable) -> Callable:
        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
        names = [name for name in Recipe.model_fields if name not in leave_out]

        def wrapped(**arguments: Any) -> Any:
            options = {name: arguments.pop(name) for name in names}
            return command(**arguments, options=options)

        options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name)) for name in names]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapped.__signature__ = inspect.Signature([*own, *options])
        wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        return wrapped

    return decorate


def _option(name: str) -> Any:
    """The Typer option of a Recipe field: its help, panel and default come from the field."""
    field = Recipe.model_fields[name]
    kind = field.annotation
    if type(None) in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    default = {None: "none", True: "yes", False: "no"}[field.default] if field.default in (None, True, False) else str(field.default)
    flags = [f"--{name.replace('_', '-')}"]
    if kind is bool:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
    panel = field.json_schema_extra["panel"]
    return Annotated[kind | None, typer.Option(*flags, help=field.description, show_default=default, rich_help_panel=panel)]


RecipeFile = Annotated[
    Path | None, typer.Option(help="recipe.json of a run, or a part of one, to start from.", rich_help_panel="Recipe", show_default="none")
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"cifar-resnet {__version__}")
        raise typer.Exit


@app.command(rich_help_panel="The four steps")
@recipe_options()
def train(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Empty or new folder for what the run writes.",
            show_default="runs/<recipe>-<dataset>-s<seed>-<UTC time>",
            rich_help_panel="Where and how",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.", rich_help_panel="Where and how")] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    loader: Loader = "auto",
    workers: Workers = None,
    save_every_minutes: Annotated[
        float, typer.Option(min=0.01, help="Minutes inside an epoch between two checkpoints.", rich_help_panel="Where and how")
    ] = 5.0,
) -> None:
    """Train a recipe, and keep the run in a folder.

    Without options: the default recipe, 24 epochs of CIFAR-10 at batch 512. The accuracy reported is the last epoch's.
    """
    from . import experiment
    from .console import TrainingTable

    if resume is None:
        recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    else:
        recipe = None
    with TrainingTable() as watcher:
        experiment.train(
            recipe,
            run_dir,
            resume=resume,
            data_dir=data_dir,
            device=device,
            loader=loader,
            workers=workers,
            save_every_minutes=save_every_minutes,
            watcher=watcher,
        )


def main() -> None:
    """Runs the command line; every failure is one line on standard error, with its exit code."""
    try:
        app()
    except CifarResnetError as error:
        prefix = "usage: " if isinstance(error, UsageError) else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
