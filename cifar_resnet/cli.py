"""The command line: options in, calls down, what comes back printed.

Torch and what pulls it in are imported inside the commands, so that help and usage errors answer at once.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

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

WHERE, STEPS, RANGE, MEASURE = "Where and how", "The four steps", "Range test", "What to measure"

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with CIFAR-10, downloaded there if missing.",
        envvar="CIFAR_RESNET_DATA_DIR",
        show_default="the user's cache folder",
        rich_help_panel=WHERE,
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto is the first there of cuda, mps, cpu.", rich_help_panel=WHERE)
]
Loader = Annotated[
    Literal["auto", "tensor", "albumentations"],
    typer.Option(
        help="tensor: the split on the device, augmented a batch at a time. albumentations: image by image in worker processes. "
        "auto: tensor.",
        rich_help_panel=WHERE,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Worker processes of the albumentations loader.",
        show_default="1 on a CPU, 4 beside a GPU",
        rich_help_panel=WHERE,
    ),
]
Compile = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="Compile the model before the first step; auto does on CUDA.", rich_help_panel=WHERE),
]


def recipe_options(*, leave_out: Sequence[str] = ()) -> Callable:
    """Gives a command one option for every field of `Recipe`, gathered in its keyword argument `options`."""

    def decorate(command: Callable) -> Callable:
        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
        names = [name for name in Recipe.model_fields if name not in leave_out]

        def wrapped(**arguments: Any) -> Any:
            options = {name: arguments.pop(name) for name in names}
            return command(**arguments, options=options)

        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name)) for name in names
        ]
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
    default = {"None": "none", "True": "yes", "False": "no"}.get(str(field.default), str(field.default))
    flags = [f"--{name.replace('_', '-')}"]
    if kind is bool:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
    panel = field.json_schema_extra["panel"]
    return Annotated[kind | None, typer.Option(*flags, help=field.description, show_default=default, rich_help_panel=panel)]


RecipeFile = Annotated[
    Path | None,
    typer.Option(help="recipe.json of a run, or a part of one, to start from.", rich_help_panel="Recipe", show_default="none"),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"cifar-resnet {__version__}")
        raise typer.Exit


CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint file, or the folder of a run.", show_default=False)]
ResultDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Folder for what is written.", show_default="beside the checkpoint", rich_help_panel=WHERE),
]
# What a range test sweeps or never reaches, and so does not take.
NOT_SWEPT = (
    "holdout", "test_limit", "max_lr", "base_momentum", "epochs", "peak_epoch", "div_factor", "final_div_factor",
    "ema_decay", "ema_every",
)  # fmt: skip


@app.command("find-lr", rich_help_panel=STEPS)
@recipe_options(leave_out=NOT_SWEPT)
def find_lr(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    start_lr: Annotated[float, typer.Option(help="Learning rate of the first step.", rich_help_panel=RANGE)] = 1e-4,
    end_lr: Annotated[float, typer.Option(help="Learning rate of the last step.", rich_help_panel=RANGE)] = 10.0,
    num_iter: Annotated[int, typer.Option(help="Steps.", rich_help_panel=RANGE)] = 200,
    step_mode: Annotated[Literal["exp", "linear"], typer.Option(help="How the LR rises.", rich_help_panel=RANGE)] = "exp",
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for lr_finder.json and .png.",
            show_default="runs/find-lr-<recipe>-<dataset>-s<seed>-<UTC time>",
            rich_help_panel=WHERE,
        ),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    loader: Loader = "auto",
    workers: Workers = None,
) -> None:
    """Find the learning rate: a range test, and what it suggests.

    A fresh model is trained for some steps while the LR rises; the loss tells at which LRs it learns.
    """
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    from . import console
    from .run import default_directory

    folder = run_dir or default_directory(recipe, "find-lr-")
    _, found = _range_test(recipe, folder, data_dir, device, loader, workers, start_lr, end_lr, num_iter, step_mode)
    console.lr_suggestions(found, folder)


def _range_test(
    recipe: Recipe, folder: Path | None, data_dir: Path | None, device: str, loader: str, workers: int | None, *settings: Any
) -> Any:
    from . import console, experiment

    names = ("start_lr", "end_lr", "num_iter", "step_mode")
    with console.bar("steps") as progress:
        task = progress.add_task("range test")
        return experiment.find_lr(
            recipe, folder, data_dir=data_dir, device=device, loader=loader, workers=workers,
            **dict(zip(names, settings, strict=False)),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            notify=console.say,
        )  # fmt: skip


@app.command(rich_help_panel=STEPS)
@recipe_options(leave_out=("max_lr",))
def train(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    max_lr: Annotated[
        str | None,
        typer.Option(
            metavar="<float|find>",
            help="Learning rate at the peak of the schedule; find runs the range test first and takes its minimum and maximum.",
            show_default=str(Recipe.model_fields["max_lr"].default),
            rich_help_panel="Optimizer",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Empty or new folder for what the run writes.",
            show_default="runs/<recipe>-<dataset>-s<seed>-<UTC time>",
            rich_help_panel=WHERE,
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder.", show_default=False, rich_help_panel=WHERE)
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    loader: Loader = "auto",
    workers: Workers = None,
    save_every_minutes: Annotated[
        float, typer.Option(help="Minutes inside an epoch between two checkpoints.", rich_help_panel=WHERE)
    ] = 5.0,
    compile: Compile = "auto",
) -> None:
    """Train a recipe, and keep the run in a folder.

    Without options: the default recipe, 24 epochs of CIFAR-10 at batch 512. The accuracy reported is the last epoch's.
    """
    find = max_lr == "find"
    try:
        options["max_lr"] = None if find or max_lr is None else float(max_lr)
    except ValueError:
        raise UsageError(f"--max-lr {max_lr!r} is neither a number nor find") from None
    if find and options["div_factor"] is not None:
        raise UsageError("--div-factor does not go with --max-lr find, which sets it")
    if resume is None:
        recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    else:
        given = {"--run-dir": run_dir, "--recipe-file": recipe_file, "--max-lr find": find}
        if wrong := [option for option, value in given.items() if value]:
            raise UsageError(f"{wrong[0]} does not go with --resume, which takes folder and recipe from the run")
        recipe = None
    began = time.perf_counter()
    from . import console, experiment
    from .run import check_free

    imports = time.perf_counter() - began
    if find:
        if run_dir is not None:
            check_free(run_dir)
        _, found = _range_test(recipe, None, data_dir, device, loader, workers)
        recipe = experiment.with_found_lr(recipe, found)
        console.say(f"range test: LR from {found.min_lr:.3g} to {found.max_lr:.3g}")
    with console.TrainingTable(imports) as watcher:
        result = experiment.train(
            recipe,
            run_dir,
            resume=resume,
            must_match={name: value for name, value in options.items() if value is not None},
            data_dir=data_dir,
            device=device,
            loader=loader,
            workers=workers,
            save_every_minutes=save_every_minutes,
            compile=compile,
            watcher=watcher,
        )
    if not watcher.begun:
        console.say(f"the run in {resume} is finished; nothing to do")
    console.training_result(result)


@app.command(rich_help_panel=STEPS)
def evaluate(
    checkpoint: CheckpointPath,
    tta: Annotated[
        Literal["none", "flip"],
        typer.Option(help="flip: also with the mean logits of each image and its mirror image.", rich_help_panel=WHERE),
    ] = "none",
    run_dir: ResultDir = None,
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint: loss, accuracy, calibration, a table by class, the confusion matrix."""
    from . import console, experiment

    with console.console.status("evaluating"):
        content = experiment.evaluate(checkpoint, run_dir, data_dir=data_dir, device=device, tta=tta, notify=console.say)
    console.evaluation(content, run_dir or Path(content["checkpoint"]).parent)


@app.command(rich_help_panel=STEPS)
def misclassified(
    checkpoint: CheckpointPath,
    count: Annotated[int, typer.Option(help="Images in the two pictures.", rich_help_panel=WHERE)] = 25,
    layer: Annotated[
        Literal["prep", "layer1", "layer2", "layer3"],
        typer.Option(help="Whose output Grad-CAM weighs: 32x32, 16x16, 8x8 or 4x4.", rich_help_panel=WHERE),
    ] = "layer2",
    run_dir: ResultDir = None,
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Show what a checkpoint gets wrong, the surest mistakes first, and where it looked (Grad-CAM)."""
    from . import console, experiment
    from .run import find_checkpoint

    with console.console.status("looking for mistakes"):
        wrong = experiment.misclassified(
            checkpoint, run_dir, count=count, layer=layer, data_dir=data_dir, device=device, notify=console.say
        )
    console.mistakes(wrong, run_dir or find_checkpoint(checkpoint).parent)


def _but(*panels: str) -> list[str]:
    """The recipe fields outside these panels, but the recipe's name."""
    fields = Recipe.model_fields.items()
    return [name for name, field in fields if name != "recipe" and field.json_schema_extra["panel"] not in panels]


@app.command(rich_help_panel="About")
@recipe_options(leave_out=[name for name in _but("Model") if name != "batch_size"])
def summary(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Show the network layer by layer: shapes, parameters, multiply-adds, receptive field."""
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    from . import analysis, console

    rows = analysis.layers(recipe, recipe.batch_size)
    if json_output:
        print(json.dumps(rows, indent=2))
    else:
        console.layers(rows, recipe)


@app.command(rich_help_panel="About")
@recipe_options(leave_out=[name for name in _but("Schedule") if name != "max_lr"])
def schedule(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    policy: Annotated[
        Literal["one-cycle", "triangular"],
        typer.Option(help="The recipe's own, or the cyclical zigzag.", rich_help_panel="Drawing"),
    ] = "one-cycle",
    min_lr: Annotated[float, typer.Option(help="Lower bound of the triangular policy.", rich_help_panel="Drawing")] = 0.001,
    step_size: Annotated[int, typer.Option(help="Steps from one bound to the other.", rich_help_panel="Drawing")] = 490,
    cycles: Annotated[int, typer.Option(help="Times up and down.", rich_help_panel="Drawing")] = 3,
    output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.", rich_help_panel="Drawing")] = Path(
        "schedule.png"
    ),
) -> None:
    """Draw the learning rate of a run before it starts, for the 50,000 images of CIFAR-10."""
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--output {output} must end in .png, .svg or .pdf")
    if step_size < 1 or cycles < 1:
        raise UsageError(f"--step-size {step_size} and --cycles {cycles} must be at least 1")
    if policy == "triangular" and not 0 < min_lr < recipe.max_lr:
        raise UsageError(f"--min-lr {min_lr:g} must be above 0 and below --max-lr {recipe.max_lr:g}")
    from . import console, figures

    if policy == "triangular":
        figure = figures.triangular(min_lr, recipe.max_lr, step_size, cycles)
    else:
        figure = figures.learning_rate(recipe, -(-50_000 // recipe.batch_size))
    figures.save(figure, output)
    console.say(f"written: {output}")


@app.command(rich_help_panel="About")
@recipe_options(leave_out=("dataset", "holdout", "train_limit", "test_limit"))
def bench(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    rounds: Annotated[int, typer.Option(help="Times that everything is measured.", rich_help_panel=MEASURE)] = 9,
    reference: Annotated[
        bool, typer.Option("--reference", help="Measure a plain loop too, as notebooks have it.", rich_help_panel=MEASURE)
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show which operators take the time of training.", rich_help_panel=MEASURE)
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all that was measured.", show_default="none", rich_help_panel=MEASURE)
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    compile: Compile = "auto",
) -> None:
    """Measure this machine: images a second of model, training and evaluation, against its peak; the time of a run.

    Takes about two minutes on a CPU, half as much again with --reference, and no data. Let nothing else run beside it.
    """
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    from . import benchmark, console, run

    if json_file:
        run.check_writable(json_file.parent)
    with console.bar("rounds") as progress:
        task = progress.add_task("measuring", total=rounds)
        content = benchmark.bench(
            recipe, rounds=rounds, reference=reference, profile=profile, device=device, workers=workers, compile=compile,
            progress=lambda done: progress.update(task, completed=done), notify=console.say,
        )  # fmt: skip
    console.bench(content)
    if json_file:
        run.write_json(json_file, content)
        console.say(f"written: {json_file}")


@app.command(rich_help_panel="About")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print every field of this one, as recipe.json.", show_default=False)] = None,
) -> None:
    """List the named recipes, their origin and what was assumed; or print one."""
    if name is not None:
        print(Recipe.build(name).to_json(), end="")
        return
    from . import console

    console.recipes()


def main() -> None:
    """Runs the command line; every failure is one line on standard error, with its exit code."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        code = app(standalone_mode=False)
    except CifarResnetError as error:
        _fail(str(error), error.exit_code)
    except (OSError, MemoryError) as error:
        _fail(str(error) or "out of memory; try a smaller --batch-size", 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's own: an unknown option, a value of the wrong type
            _fail(error.format_message(), error.exit_code)
        if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error)):
            _fail("out of memory; try a smaller --batch-size", 1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, exit_code: int) -> NoReturn:
    if message:
        print(f"cifar-resnet: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)
