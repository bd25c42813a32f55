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

WHERE, RANGE, CHOICE, DRAWING, MEASURE = "Where and how", "Range test", "Which mistakes", "Drawing", "What to measure"
STEPS, AFTER, ABOUT = "The four steps", "After a run", "Before a run"

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


def recipe_options(*panels: str, also: Sequence[str] = (), leave_out: Sequence[str] = ()) -> Callable:
    """Gives a command one option for every field of `Recipe` in these panels (all, if none is named).

    They come gathered in its keyword argument `options`.
    """
    kept = ("recipe", *also)

    def decorate(command: Callable) -> Callable:
        parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
        fields = {name: field.json_schema_extra["panel"] for name, field in Recipe.model_fields.items() if name not in leave_out}
        names = [name for name, panel in fields.items() if not panels or panel in panels or name in kept]

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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and what --json asks for.")] = False,
) -> None:
    if quiet:
        from . import console

        console.console.quiet = True
    if version:
        typer.echo(f"cifar-resnet {__version__}")
        raise typer.Exit


CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint file, or the folder of a run.", show_default=False)]
ResultDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Folder for what is written.", show_default="beside the checkpoint", rich_help_panel=WHERE),
]
Format = Annotated[Literal["png", "svg", "pdf"], typer.Option(help="Format of the pictures.", rich_help_panel=WHERE)]
Output = Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.", rich_help_panel=DRAWING)]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print the table as JSON.")]
Tta = Annotated[
    Literal["none", "flip", "flip-shift"],
    typer.Option(
        help="Mean of the logits of several views: the image and its mirror image, or each also shifted by a pixel both ways.",
        rich_help_panel=WHERE,
    ),
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
    format: Format = "png",
) -> None:
    """Find the learning rate: a range test, and what it suggests.

    A fresh model is trained for some steps while the LR rises; the loss tells at which LRs it learns.
    """
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    from . import console
    from .run import default_directory

    folder = run_dir or default_directory(recipe, "find-lr-")
    settings = dict(start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode, format=format)
    _, found = _range_test(recipe, folder, data_dir=data_dir, device=device, loader=loader, workers=workers, **settings)
    console.lr_suggestions(found, _written(folder, "lr_finder.json", f"lr_finder.{format}"))


def _range_test(recipe: Recipe, folder: Path | None, **settings: Any) -> Any:
    from . import console, experiment

    with console.bar("steps") as progress:
        task = progress.add_task("range test")
        watch = dict(progress=lambda done, total: progress.update(task, completed=done, total=total), notify=console.say)
        return experiment.find_lr(recipe, folder, **settings, **watch)


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
    repeat: Annotated[
        int | None,
        typer.Option(
            help="Train this many seeds in a row, each in a folder of its own.", show_default="1", rich_help_panel=WHERE
        ),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    loader: Loader = "auto",
    workers: Workers = None,
    save_every_minutes: Annotated[
        float, typer.Option(help="Minutes inside an epoch between two checkpoints.", rich_help_panel=WHERE)
    ] = 5.0,
    compile: Compile = "auto",
    format: Format = "png",
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
        given = {"--run-dir": run_dir, "--recipe-file": recipe_file, "--max-lr find": find, "--repeat": repeat}
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
        _, found = _range_test(recipe, None, data_dir=data_dir, device=device, loader=loader, workers=workers)
        recipe = experiment.with_found_lr(recipe, found)
        console.say(f"range test: LR from {found.min_lr:.3g} to {found.max_lr:.3g}")
    must_match = {name: value for name, value in options.items() if value is not None}
    settings = dict(
        resume=resume, must_match=must_match, data_dir=data_dir, device=device, loader=loader, workers=workers,
        save_every_minutes=save_every_minutes, compile=compile, format=format,
    )  # fmt: skip
    if repeat is not None or (resume is not None and (resume / experiment.REPEAT).exists()):
        content = experiment.repeat(recipe, repeat, run_dir, watch=console.TrainingTable, **settings)
        console.repetition(content)
        return
    with console.TrainingTable(imports) as watcher:
        result = experiment.train(recipe, run_dir, watcher=watcher, **settings)
    if not watcher.begun:
        console.say(f"the run in {resume} is finished; nothing to do")
    console.training_result(result)


@app.command(rich_help_panel=STEPS)
def evaluate(
    checkpoint: CheckpointPath,
    tta: Tta = "none",
    run_dir: ResultDir = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    format: Format = "png",
) -> None:
    """Evaluate a checkpoint: loss, accuracy, calibration, a table by class, the confusion matrix."""
    from . import console, experiment

    with console.console.status("evaluating"):
        content = experiment.evaluate(
            checkpoint, run_dir, data_dir=data_dir, device=device, tta=tta, format=format, notify=console.say
        )
    pictures = ("confusion_matrix", "class_accuracy", "reliability")
    folder = run_dir or Path(content["checkpoint"]).parent
    console.evaluation(content, _written(folder, "evaluation.json", *(f"{name}.{format}" for name in pictures)))


@app.command(rich_help_panel=STEPS)
def misclassified(
    checkpoint: CheckpointPath,
    count: Annotated[int, typer.Option(help="Images in the two pictures.", rich_help_panel=CHOICE)] = 25,
    sort: Annotated[
        Literal["confidence", "class", "random"],
        typer.Option(help="confidence: the surest mistakes first.", rich_help_panel=CHOICE),
    ] = "confidence",
    true: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Only images of this class.", show_default="all", rich_help_panel=CHOICE)
    ] = None,
    predicted: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="Only images taken for this class.", show_default="all", rich_help_panel=CHOICE),
    ] = None,
    layer: Annotated[
        Literal["prep", "layer1", "layer2", "layer3"],
        typer.Option(help="Whose output Grad-CAM weighs: 32x32, 16x16, 8x8 or 4x4.", rich_help_panel=WHERE),
    ] = "layer2",
    run_dir: ResultDir = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    format: Format = "png",
) -> None:
    """Show what a checkpoint gets wrong, and where it looked: Grad-CAM of the class predicted and of the true one."""
    from . import console, experiment
    from .run import find_checkpoint

    with console.console.status("looking for mistakes"):
        chosen = experiment.misclassified(
            checkpoint, run_dir, count=count, layer=layer, sort=sort, true=true, predicted=predicted,
            data_dir=data_dir, device=device, format=format, notify=console.say,
        )  # fmt: skip
    pictures = [f"misclassified.{format}", f"gradcam.{format}"] if chosen else []
    console.mistakes(chosen, _written(run_dir or find_checkpoint(checkpoint).parent, "misclassified.json", *pictures))


def _written(folder: Path, *names: str) -> str:
    return f"written in {folder}: {', '.join(names)}"


@app.command(rich_help_panel=AFTER)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or checkpoint files.", show_default=False)],
    output: Output = Path("comparison.png"),
    json_output: JsonOutput = False,
) -> None:
    """Compare finished runs in one table and one picture; those that differ only in the seed as mean and spread."""
    from . import console, results

    content = results.compare(runs, output)
    if json_output:
        print(json.dumps(content, indent=2))
        return
    console.comparison(content)
    console.say(_written(output.parent, output.name))


@app.command(rich_help_panel=AFTER)
def report(
    run: CheckpointPath,
    output: Annotated[Path | None, typer.Option(help="The file.", show_default="report.html beside the checkpoint")] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Write a finished run as one HTML page: figures, pictures, mistakes, recipe, and the command that repeats it."""
    from . import console, results

    with console.console.status("writing the report"):
        path = results.report(run, output, data_dir=data_dir, device=device, notify=console.say)
    console.say(_written(path.parent, path.name))


@app.command(rich_help_panel=AFTER)
def predict(
    checkpoint: CheckpointPath,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    top: Annotated[int, typer.Option(help="Classes shown for each image.")] = 3,
    json_output: JsonOutput = False,
    tta: Tta = "none",
    device: Device = "auto",
) -> None:
    """Name what is on image files: each one's centred square, scaled to 32x32, through the model.

    A file that is no image is named and skipped; the exit code is then 1.
    """
    from . import console, inference

    skipped: list[str] = []
    with console.bar("images") as progress:
        task = progress.add_task("predicting")
        found = list(
            inference.predict(
                checkpoint, images, top=top, tta=tta, device=device, skipped=skipped.append,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        )  # fmt: skip
    if json_output:
        print(json.dumps(found, indent=2))
    else:
        console.predictions(found)
    for line in skipped:
        print(f"cifar-resnet: skipped {line}", file=sys.stderr)
    if skipped:
        raise typer.Exit(1)


@app.command(rich_help_panel=AFTER)
def export(
    checkpoint: CheckpointPath,
    output: Annotated[Path | None, typer.Option(help="The file.", show_default="model.<format> beside the checkpoint")] = None,
    format: Annotated[Literal["onnx", "safetensors"], typer.Option(help="ONNX needs the extra export.")] = "onnx",
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Normalise inside the graph: it takes uint8 (N, 32, 32, 3).")
    ] = False,
) -> None:
    """Export the model for other programs: as an ONNX graph, or its weights as safetensors."""
    from . import console, inference

    path = inference.export(checkpoint, output, format=format, with_preprocessing=with_preprocessing)
    console.say(_written(path.parent, path.name))


@app.command(rich_help_panel=ABOUT)
@recipe_options("Data", "Augmentation", also=["seed"], leave_out=["holdout", "train_limit", "test_limit"])
def samples(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    views: Annotated[int, typer.Option(help="Augmented views of each image.", rich_help_panel=DRAWING)] = 8,
    output: Output = Path("samples.png"),
    data_dir: DataDir = None,
    loader: Loader = "auto",
    workers: Workers = None,
) -> None:
    """Draw a training image of each class, and what the recipe's augmentation makes of it."""
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    from . import console, experiment

    experiment.samples(recipe, output, views=views, data_dir=data_dir, loader=loader, workers=workers, notify=console.say)
    console.say(_written(output.parent, output.name))


@app.command(rich_help_panel=ABOUT)
@recipe_options("Model", also=["batch_size"])
def summary(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    json_output: JsonOutput = False,
) -> None:
    """Show the network layer by layer: shapes, parameters, multiply-adds, receptive field."""
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    from . import analysis, console

    rows = analysis.layers(recipe, recipe.batch_size)
    if json_output:
        print(json.dumps(rows, indent=2))
    else:
        console.layers(rows, recipe)


@app.command(rich_help_panel=ABOUT)
@recipe_options("Schedule", also=["max_lr"])
def schedule(
    options: dict[str, Any],
    recipe_file: RecipeFile = None,
    policy: Annotated[
        Literal["one-cycle", "triangular"],
        typer.Option(help="The recipe's own, or the cyclical zigzag.", rich_help_panel=DRAWING),
    ] = "one-cycle",
    min_lr: Annotated[float, typer.Option(help="Lower bound of the triangular policy.", rich_help_panel=DRAWING)] = 0.001,
    step_size: Annotated[int, typer.Option(help="Steps from one bound to the other.", rich_help_panel=DRAWING)] = 490,
    cycles: Annotated[int, typer.Option(help="Times up and down.", rich_help_panel=DRAWING)] = 3,
    output: Output = Path("schedule.png"),
) -> None:
    """Draw the learning rate of a run before it starts, for the 50,000 images of CIFAR-10."""
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
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
    console.say(_written(output.parent, output.name))


@app.command(rich_help_panel=ABOUT)
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


@app.command(rich_help_panel=ABOUT)
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
