"""The command line: options in, calls down, what comes back printed.

Torch and what pulls it in are imported inside the commands, so that help and usage errors answer at once.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Callable
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

STEPS, AFTER, BEFORE = "The four steps", "After a run", "Before a run"
WHERE, RANGE, CHOICE, DRAWING, MEASURE = "Where and how", "Range test", "Which mistakes", "Drawing", "What to measure"


def _option(kind: Any, help: str, panel: str = WHERE, *flags: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*flags, help=help, rich_help_panel=panel, **more)]


def _argument(kind: Any, help: str) -> Any:
    return Annotated[kind, typer.Argument(help=help, show_default=False)]


# Every option that is no field of a recipe, by its parameter; "command parameter" where commands mean different things by it.
OPTIONS: dict[str, Any] = {
    "checkpoint": _argument(Path, "A checkpoint file, or the folder of a run."),
    "runs": _argument(list[Path], "Folders of finished runs, or checkpoint files."),
    "images": _argument(list[Path], "Image files, or folders of them."),
    "name": _argument(str | None, "Print every field of this one, as recipe.json."),
    "recipe_file": _option(Path | None, "recipe.json of a run, or a part of one, to start from.", "Recipe", show_default="none"),
    "max_lr": _option(
        str | None, "Learning rate at the peak of the schedule; find does what find-lr does first, and takes its minimum and maximum.",
        "Optimizer", metavar="<float|find>", show_default=str(Recipe.model_fields["max_lr"].default),
    ),
    "start_lr": _option(float, "Learning rate of the first step.", RANGE),
    "end_lr": _option(float, "Learning rate of the last step.", RANGE),
    "num_iter": _option(int, "Steps.", RANGE),
    "trial_steps": _option(
        int | None, "Steps of each of the short trainings, three to six, that find the maximum; 0 for no such trainings.", RANGE,
        show_default="25,600 images, half of the run at most, at least 50 steps",
    ),
    "suggest": _option(
        Literal["recommended", "steepest", "valley", "minimum"], "Rule to go by; minimum is a tenth of the lowest point's.", RANGE
    ),
    "sweep": _option(
        int | None, "Also train this many epochs at each of nine maxima, judged on held-out images: what the rules are worth.", RANGE
    ),
    "step_mode": _option(Literal["exp", "linear"], "How the LR rises.", RANGE),
    "run_dir": _option(Path | None, "Folder for what is written.", show_default="beside the checkpoint"),
    "find-lr run_dir": _option(
        Path | None, "Folder for lr_finder.json and its picture.", show_default="runs/find-lr-<recipe>-<dataset>-s<seed>-<UTC time>"
    ),
    "train run_dir": _option(
        Path | None, "Empty or new folder for what the run writes.", show_default="runs/<recipe>-<dataset>-s<seed>-<UTC time>"
    ),
    "resume": _option(Path | None, "Go on with the run in this folder.", show_default=False),
    "repeat": _option(int | None, "Train this many seeds in a row, each in a folder of its own.", show_default="1"),
    "data_dir": _option(
        Path | None, "Folder with CIFAR-10, downloaded there if missing; or that a folder of your own images is now in.",
        envvar="CIFAR_RESNET_DATA_DIR", show_default="the user's cache folder",
    ),
    "device": _option(str, "auto, cpu, cuda, cuda:N or mps; auto is the first there of cuda, mps, cpu."),
    "loader": _option(
        Literal["auto", "tensor", "albumentations"],
        "tensor: the split on the device, augmented a batch at a time. albumentations: image by image in worker processes. auto: tensor.",
    ),
    "workers": _option(int | None, "Worker processes of the albumentations loader.", show_default="1 on a CPU, 4 beside a GPU"),
    "save_every_minutes": _option(float, "Minutes inside an epoch between two checkpoints."),
    "compile": _option(Literal["auto", "on", "off"], "Compile the model before the first step; auto does on CUDA."),
    "format": _option(Literal["png", "svg", "pdf"], "Format of the pictures."),
    "export format": _option(Literal["onnx", "safetensors"], "The extra export has the packages that they need."),
    "tta": _option(
        Literal["none", "flip", "flip-shift"],
        "Mean logits of several views: the image and its mirror image; or these, and each shifted by a pixel both ways.",
    ),
    "count": _option(int, "Images in the two pictures.", CHOICE),
    "sort": _option(Literal["confidence", "class", "random"], "confidence: the surest mistakes first.", CHOICE),
    "true": _option(str | None, "Only images of this class.", CHOICE, metavar="CLASS", show_default="all"),
    "predicted": _option(str | None, "Only images taken for this class.", CHOICE, metavar="CLASS", show_default="all"),
    "layer": _option(
        Literal["prep", "layer1", "layer2", "layer3"], "Whose output Grad-CAM weighs: 32x32, 16x16, 8x8 or 4x4.", CHOICE
    ),
    "output": _option(Path, "The picture: .png, .svg or .pdf.", DRAWING),
    "report output": _option(Path | None, "The file.", show_default="report.html beside the checkpoint"),
    "export output": _option(Path | None, "The file.", show_default="model.<format> beside the checkpoint"),
    "json_output": _option(bool, "Print it as JSON.", WHERE, "--json"),
    "json_file": _option(Path | None, "File for all that was measured.", MEASURE, "--json", show_default="none"),
    "top": _option(int, "Classes shown for each image."),
    "with_preprocessing": _option(
        bool, "Normalise inside the graph: it takes uint8 (N, 32, 32, 3).", WHERE, "--with-preprocessing"
    ),
    "views": _option(int, "Augmented views of each image.", DRAWING),
    "policy": _option(Literal["one-cycle", "triangular"], "The recipe's own, or the cyclical zigzag.", DRAWING),
    "min_lr": _option(float, "Lower bound of the triangular policy.", DRAWING),
    "step_size": _option(int, "Steps from one bound to the other.", DRAWING),
    "cycles": _option(int, "Times up and down.", DRAWING),
    "rounds": _option(int, "Times that everything is measured.", MEASURE),
    "reference": _option(bool, "Measure a plain loop too, as notebooks have it.", MEASURE, "--reference"),
    "profile": _option(bool, "Show which operators take the time of training.", MEASURE, "--profile"),
}  # fmt: skip


def _recipe_option(name: str) -> Any:
    """The Typer option of a Recipe field: its help, panel and default come from the field."""
    field = Recipe.model_fields[name]
    kind: Any = field.annotation
    if type(None) in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    default = {"None": "none", "True": "yes", "False": "no"}.get(str(field.default), str(field.default))
    flag = f"--{name.replace('_', '-')}"
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    return _option(kind | None, str(field.description), _panel(name), *flags, show_default=default)


def _panel(name: str) -> str:
    extra: Any = Recipe.model_fields[name].json_schema_extra
    return extra["panel"]


def command(panel: str, name: str = "", *, fields: Callable[[str, str], bool] = lambda name, panel: False) -> Callable:
    """Makes a function a command: each parameter the option that `OPTIONS` has for it, and an option for each of `fields`.

    `fields` says which fields of `Recipe` the command takes, by name and panel. They come built into a parameter
    `recipe`, or as they were given, None for those that were not, in a parameter `options`.
    """

    def decorate(function: Callable) -> Callable:
        title = name or function.__name__
        own = inspect.signature(function).parameters
        taken = [field for field in Recipe.model_fields if field not in own and fields(field, _panel(field))]
        if taken:
            taken = ["recipe", *(field for field in taken if field != "recipe")]

        def run(**arguments: Any) -> None:
            options = {field: arguments.pop(field) for field in taken}
            if "options" in own:
                arguments["options"] = options
            elif "recipe" in own:
                arguments["recipe"] = Recipe.build(options.pop("recipe"), arguments.pop("recipe_file"), **options)
            function(**arguments)

        parameters = {
            parameter.name: (OPTIONS.get(f"{title} {parameter.name}", OPTIONS.get(parameter.name)), parameter.default)
            for parameter in own.values()
            if parameter.name not in ("options", "recipe")
        }
        if taken:
            parameters["recipe_file"] = (OPTIONS["recipe_file"], None)
        parameters |= {field: (_recipe_option(field), None) for field in taken}
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                for each, (annotation, default) in parameters.items()
            ]
        )
        run.__annotations__ = {each: annotation for each, (annotation, _) in parameters.items()}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return app.command(title, rich_help_panel=panel)(run)

    return decorate


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


def _written(folder: Path, *names: str) -> str:
    return f"written in {folder}: {', '.join(names)}"


# What a range test and its trials find or never reach, and so do not take.
NOT_SWEPT = ("holdout", "test_limit", "max_lr", "div_factor", "sam_share", "sam_radius", "ema_decay", "ema_every")


@command(STEPS, "find-lr", fields=lambda name, panel: name not in NOT_SWEPT)
def find_lr(
    recipe, start_lr=1e-4, end_lr=10.0, num_iter=100, step_mode="exp", trial_steps=None, suggest="recommended", sweep=None, run_dir=None, data_dir=None,
    device="auto", loader="auto", workers=None, format="png",
):  # fmt: skip
    """Find the learning rate: a range test, then short trainings around its bottom.

    A fresh model is trained for some steps while the LR rises; the loss tells at which LRs it learns. Then three to six short
    trainings with whole schedules tell which maximum trains well.
    """
    from . import console, lr_search, results
    from .run import default_directory

    folder = run_dir or default_directory(recipe, "find-lr-")
    settings = dict(
        start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode, trial_steps=trial_steps, sweep=sweep
    )
    settings |= dict(data_dir=data_dir, device=device, loader=loader, workers=workers, format=format)
    found = _range_test(recipe, folder, **settings)
    then = ""
    if found.suggestions.by(suggest):
        chosen = lr_search.with_found_lr(recipe, found.suggestions, suggest)
        names = ("max_lr", "div_factor") if suggest == "recommended" else ("max_lr",)
        then = results.command(recipe.replace(**{name: float(f"{getattr(chosen, name):.3g}") for name in names}))
    console.lr_suggestions(found, then, _written(folder, "lr_finder.json", f"lr_finder.{format}"))


def _range_test(recipe: Recipe, folder: Path | None, **settings: Any) -> Any:
    from . import console, lr_search

    with console.bar("steps") as progress:
        task = progress.add_task("learning rate")
        settings["progress"] = lambda done, total: progress.update(task, completed=done, total=total)
        return lr_search.find_lr(recipe, folder, **settings, notify=console.say)


@command(STEPS, fields=lambda name, panel: True)
def train(
    options, recipe_file=None, max_lr=None, suggest="recommended", run_dir=None, resume=None, repeat=None, data_dir=None, device="auto", loader="auto",
    workers=None, save_every_minutes=5.0, compile="auto", format="png",
):  # fmt: skip
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
    if suggest != "recommended" and not find:
        raise UsageError(f"--suggest {suggest} goes with --max-lr find")
    recipe = None
    if resume is None:
        recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    else:
        given = {"--run-dir": run_dir, "--recipe-file": recipe_file, "--max-lr find": find, "--repeat": repeat}
        if wrong := [option for option, value in given.items() if value]:
            raise UsageError(f"{wrong[0]} does not go with --resume, which takes folder and recipe from the run")
    began = time.perf_counter()
    from . import console, experiment
    from .run import check_free

    imports = time.perf_counter() - began
    if find:
        from . import lr_search

        if run_dir is not None:
            check_free(run_dir)
        trials = {} if suggest == "recommended" else {"trial_steps": 0}
        found = _range_test(recipe, None, data_dir=data_dir, device=device, loader=loader, workers=workers, **trials).suggestions
        recipe = lr_search.with_found_lr(recipe, found, suggest)
        console.say(f"found: LR from {recipe.max_lr / recipe.div_factor:.3g} to {recipe.max_lr:.3g}")
    must_match = {name: value for name, value in options.items() if value is not None}
    settings: dict[str, Any] = dict(
        resume=resume, must_match=must_match, data_dir=data_dir, device=device, loader=loader, workers=workers,
        save_every_minutes=save_every_minutes, compile=compile, format=format,
    )  # fmt: skip
    if repeat is not None or (resume is not None and (resume / experiment.REPEAT).exists()):
        console.repetition(experiment.repeat(recipe, repeat, run_dir, watch=console.TrainingTable, **settings))
        return
    with console.TrainingTable(imports) as watcher:
        result = experiment.train(recipe, run_dir, watcher=watcher, **settings)
    if not watcher.begun:
        console.say(f"the run in {resume} is finished; nothing to do")
    console.training_result(result)


@command(STEPS)
def evaluate(checkpoint, tta="none", run_dir=None, data_dir=None, device="auto", format="png"):
    """Evaluate a checkpoint: loss, accuracy, calibration, a table by class, the confusion matrix."""
    from . import console, evaluation

    with console.console.status("evaluating"):
        where = dict(data_dir=data_dir, device=device, format=format, notify=console.say)
        content = evaluation.evaluate(checkpoint, run_dir, tta=tta, **where)
    pictures = [f"{name}.{format}" for name in ("confusion_matrix", "class_accuracy", "reliability")]
    folder = run_dir or Path(content["checkpoint"]).parent
    console.evaluation(content, _written(folder, "evaluation.json", *pictures))


@command(STEPS)
def misclassified(
    checkpoint, count=25, sort="confidence", true=None, predicted=None, layer="layer2", run_dir=None, data_dir=None,
    device="auto", format="png",
):  # fmt: skip
    """Show what a checkpoint gets wrong, and where it looked: Grad-CAM of the class predicted and of the true one."""
    from . import console, evaluation
    from .run import find_checkpoint

    with console.console.status("looking for mistakes"):
        where = dict(data_dir=data_dir, device=device, format=format, notify=console.say)
        choice = dict(count=count, sort=sort, true=true, predicted=predicted, layer=layer)
        chosen = evaluation.misclassified(checkpoint, run_dir, **choice, **where)
    pictures = [f"misclassified.{format}", f"gradcam.{format}"] if chosen else []
    console.mistakes(chosen, _written(run_dir or find_checkpoint(checkpoint).parent, "misclassified.json", *pictures))


@command(AFTER)
def compare(runs, output=Path("comparison.png"), json_output=False):
    """Compare finished runs in one table and one picture; those that differ only in the seed as mean and spread."""
    from . import console, results

    content = results.compare(runs, output)
    if json_output:
        print(json.dumps(content, indent=2))
    else:
        console.comparison(content)
        console.say(_written(output.parent, output.name))


@command(AFTER)
def report(checkpoint, output=None, data_dir=None, device="auto"):
    """Write a finished run as one HTML page: figures, pictures, mistakes, recipe, and the command that repeats it."""
    from . import console, results

    with console.console.status("writing the report"):
        path = results.report(checkpoint, output, data_dir=data_dir, device=device, notify=console.say)
    console.say(_written(path.parent, path.name))


@command(AFTER)
def predict(checkpoint, images, top=3, json_output=False, tta="none", device="auto"):
    """Name what is on image files: each one's centred square, scaled to 32x32, through the model.

    A file that is no image is named and skipped; the exit code is then 1.
    """
    from . import console, inference

    skipped: list[str] = []
    with console.bar("images") as progress:
        task = progress.add_task("predicting")
        watch = dict(progress=lambda done, total: progress.update(task, completed=done, total=total), skipped=skipped.append)
        found = list(inference.predict(checkpoint, images, top=top, tta=tta, device=device, **watch))
    if json_output:
        print(json.dumps(found, indent=2))
    else:
        console.predictions(found)
    for line in skipped:
        print(f"cifar-resnet: skipped {line}", file=sys.stderr)
    if skipped:
        raise typer.Exit(1)


@command(AFTER)
def export(checkpoint, output=None, format="onnx", with_preprocessing=False):
    """Export the model for other programs: as an ONNX graph, or its weights as safetensors."""
    from . import console, inference

    path = inference.export(checkpoint, output, format=format, with_preprocessing=with_preprocessing)
    console.say(_written(path.parent, path.name))
    if format == "onnx":
        takes = (
            "uint8 (N, 32, 32, 3), pixels"
            if with_preprocessing
            else "float32 (N, 3, 32, 32), normalised by the recipe's mean and std"
        )
        console.say(f"input images: {takes}; output logits: float32 (N, classes)")


@command(BEFORE, fields=lambda name, panel: panel in ("Recipe", "Augmentation") or name in ("dataset", "mean", "std", "seed"))
def samples(recipe, views=8, output=Path("samples.png"), data_dir=None, loader="auto", workers=None):
    """Draw a training image of each class, and what the recipe's augmentation makes of it."""
    from . import console, experiment

    experiment.samples(recipe, output, views=views, data_dir=data_dir, loader=loader, workers=workers, notify=console.say)
    console.say(_written(output.parent, output.name))


@command(BEFORE, fields=lambda name, panel: panel in ("Recipe", "Model") or name == "batch_size")
def summary(recipe, json_output=False):
    """Show the network layer by layer: shapes, parameters, multiply-adds, receptive field."""
    from . import analysis, console

    rows = analysis.layers(recipe, recipe.batch_size)
    if json_output:
        print(json.dumps(rows, indent=2))
    else:
        console.layers(rows, recipe)


@command(BEFORE, fields=lambda name, panel: panel in ("Recipe", "Schedule") or name == "max_lr")
def schedule(recipe, policy="one-cycle", min_lr=0.001, step_size=490, cycles=3, output=Path("schedule.png")):
    """Draw the learning rate of a run before it starts, for the 50,000 images of CIFAR-10."""
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


@command(BEFORE, fields=lambda name, panel: name not in ("dataset", "holdout", "train_limit", "test_limit"))
def bench(recipe, rounds=9, reference=False, profile=False, json_file=None, device="auto", workers=None, compile="auto"):
    """Measure this machine: images a second of model, training and evaluation, against its peak; the time of a run.

    Takes about two minutes on a CPU, half as much again with --reference, and no data. Let nothing else run beside it.
    """
    from . import benchmark, console, run

    if json_file:
        run.writable(json_file.parent)
    with console.bar("rounds") as progress:
        task = progress.add_task("measuring", total=rounds)
        watch = dict(progress=lambda done: progress.update(task, completed=done), notify=console.say)
        settings = dict(reference=reference, profile=profile, device=device, workers=workers, compile=compile)
        content = benchmark.bench(recipe, rounds=rounds, **settings, **watch)
    console.bench(content)
    if json_file:
        run.write_json(json_file, content)
        console.say(_written(json_file.parent, json_file.name))


@command(BEFORE)
def recipes(name=None):
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
            before = "; it goes before the command" if "--quiet" in error.format_message() else ""
            _fail(error.format_message().replace("Value error, ", "") + before, getattr(error, "exit_code", 2))
        if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error)):
            _fail("out of memory; try a smaller --batch-size", 1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, exit_code: int) -> NoReturn:
    if message:
        print(f"cifar-resnet: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)
