"""The command line: options in, calls down, what comes back printed.

Torch and what pulls it in are imported inside the commands, so that help and usage errors answer at once.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from typer.core import TyperCommand

from . import __version__, arguments
from .errors import CifarResnetError, UsageError, is_other_rank, printable, shell_word
from .look import console, progress
from .look.words import plural
from .recipe import Recipe, option_words

app = typer.Typer(
    help="Train a small ResNet on CIFAR-10: find the learning rate, train, evaluate, see what it gets wrong and where it looked.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    pretty_exceptions_enable=False,
)

STEPS, AFTER, BEFORE = "The four steps", "After a run", "Before a run"
WHERE, RANGE, CHOICE, DRAWING, MEASURE = "Where and how", "Range test", "Which mistakes", "Drawing", "What to measure"
MEANT = {  # by what Typer says of an option: what its user looks for
    r"option:? '?(--quiet|-q)\b": "it goes before the command",
    r"value for '--output': '[^']*[/\\].*'softmax'": "train takes the folder of a run as --run-dir",
}
NAME = "<name>"  # in place of choices, which would leave a narrow terminal no room: the help names them

# What --help shows of a command that takes a recipe's fields, in this order.
USUAL = (
    "recipe", "dataset", "epochs", "batch_size", "max_lr", "seed", "rounds", "reference", "profile", "policy", "sweep",
    "views", "device", "run_dir", "output", "json_output", "json_file", "resume", "repeat", "help_all",
)  # fmt: skip


class PredictCommand(TyperCommand):
    """Its one argument holds a run that may be left out, and images: Typer would show both as required."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "[RUN]", "IMAGE..."]


class BriefCommand(TyperCommand):
    """A command whose --help shows the usual options in one panel, and whose --help-all shows every option by panel.

    Both end with the command's examples, which are what Typer takes as its epilog.
    """

    whole = False

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples, self.epilog = self.epilog, None

    def format_help(self, context: Any, formatter: Any) -> None:
        if not self.whole:
            options: list[Any] = self.params
            usual = {each.name: each for each in options if each.name in USUAL and each.rich_help_panel != "Model"}
            self.params = [usual[name] for name in USUAL if name in usual]
            for each in usual.values():
                each.rich_help_panel = None
        super().format_help(context, formatter)
        formatter.write(f"Examples:\n{self.examples}\n")


def _show_all(context: typer.Context, asked: bool) -> None:
    if asked:
        assert isinstance(context.command, BriefCommand)
        context.command.whole = True
        typer.echo(context.get_help())
        raise typer.Exit


def _command(panel: str, *examples: str) -> Any:
    """Registers a command that takes a recipe's fields."""
    return app.command(cls=BriefCommand, rich_help_panel=panel, epilog="\n".join(f"  cifar-resnet {each}" for each in examples))


def _option(help: str, panel: str = WHERE, *flags: str, default: str | None = None, **more: Any) -> Any:
    """`default` says in words what holds where the option is not given."""
    if default is not None:
        help, more["show_default"] = f"{help} [dim]\\[default: {default}][/dim]", False
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


def _argument(help: str, metavar: str) -> Any:
    return typer.Argument(help=help, metavar=metavar, show_default=False, readable=False)  # what cannot be read is our own error


# What commands take beside the fields of a recipe: first what several of them share, then by command.
# fmt: off
RunArgument = Annotated[list[Path] | None, _argument(
    "Folder of a run, or its checkpoint file. Without one, or with latest: the newest in runs/.", "RUN"
)]
RunArguments = Annotated[list[Path] | None, _argument(
    "Folders of runs or of repetitions, or checkpoint files. Without one, or with latest: the newest run in runs/.", "RUN"
)]
RecipeFile = Annotated[Path | None, _option("recipe.json of a run, or a part of one, to start from.", "Recipe", default="none")]
Suggest = Annotated[Literal["recommended", "steepest", "valley", "minimum"], _option(
    "Rule for the learning rate. recommended: by the short trainings. steepest: where the loss falls fastest. valley: the middle of the "
    "longest fall. minimum: a tenth of the learning rate at the lowest loss. train takes it with --max-lr find.", RANGE, metavar=NAME
)]
RunDir = Annotated[Path | None, _option("Folder for what is written.", default="beside the checkpoint")]
DATA_DIR = "CIFAR_RESNET_DATA_DIR, or the user's cache folder"
DataDir = Annotated[Path | None, _option(
    "Folder of CIFAR-10 and CIFAR-100. They are downloaded into it if they are missing.", default=DATA_DIR
)]
DemoDataDir = Annotated[Path | None, _option(
    "Folder of CIFAR-10 and CIFAR-100. If your own images were moved: the folder above theirs, which must have kept its name.",
    default=DATA_DIR,
)]
Moved = Annotated[str | None, _option("The folder of the run's images, if it was moved.", WHERE, "--dataset", show_default=False)]
Device = Annotated[str, _option("Where to compute: cpu, cuda, cuda:N, mps, or auto: cuda if there is one, else mps, else cpu.")]
Loader = Annotated[arguments.LoaderKind, _option(
    "How images are augmented. tensor: a batch at a time, on the device. albumentations: one by one, in worker processes. auto: tensor, but a run goes on as it began.",
    metavar=NAME,
)]
Workers = Annotated[int | None, _option("Worker processes of the albumentations loader.", default="1 on a CPU, 4 beside a GPU")]
Compile = Annotated[arguments.Compile, _option(
    "Whether torch.compile compiles the model before the first step: on, off, or auto, which is off.", metavar=NAME
)]
Convolution = Annotated[arguments.Convolution, _option(
    "How a CPU computes convolutions and BatchNorm. auto: in the ways that are fastest on this machine. torch: by PyTorch alone.",
    metavar=NAME,
)]
Format = Annotated[arguments.Format, _option("Format of the pictures: png, svg or pdf.", metavar=NAME)]
Tta = Annotated[arguments.Tta, _option(
    "Test-time augmentation: average the logits of several views. none: the image alone. flip: also its mirror image. flip-shift: also "
    "both, shifted by a pixel down and right, and up and left.", metavar=NAME
)]
Json = Annotated[bool, _option("Print the result as JSON.", WHERE, "--json")]
Picture = Annotated[Path, _option("Where the picture goes: a .png, .svg or .pdf.", DRAWING)]

StartLR = Annotated[float, _option("Learning rate of the first step.", RANGE)]
EndLR = Annotated[float, _option("Learning rate of the last step.", RANGE)]
NumIter = Annotated[int, _option("Steps of the range test.", RANGE)]
StepMode = Annotated[arguments.StepMode, _option("How the LR rises: exp or linear.", RANGE, metavar=NAME)]
TrialSteps = Annotated[int | None, _option(
    "Steps of each of the three to six short trainings; 0: no short trainings.", RANGE,
    default="the steps of 25,600 images; at most half of the run; at least 50",
)]
Sweep = Annotated[int | None, _option(
    "Also train this many epochs at each of up to nine peak learning rates, and evaluate each training on held-out images.", RANGE
)]
FinderDir = Annotated[Path | None, _option("Folder for lr_finder.json and its picture.", default="runs/find-lr-<name>-<n>")]

MaxLR = Annotated[str | None, _option(
    "Learning rate at the peak of the schedule; or find, to search for it first, as find-lr does.",
    "Optimizer", metavar="<float>", default=str(Recipe.model_fields["max_lr"].default),
)]
NewRunDir = Annotated[Path | None, _option("Empty or new folder for what the run writes.", default="runs/<name>-<n>, or runs/repeat-<name>-<n>")]
Resume = Annotated[Path | None, _option("Go on with the run or repetition in this folder; latest is the newest run in runs/.", show_default=False)]
Repeat = Annotated[int | None, _option("Train this many seeds in a row, two or more, from --seed upward, each in a folder of its own.", show_default=False)]
SaveEveryMinutes = Annotated[float, _option("Minutes between two checkpoints inside an epoch.")]
TF32 = Annotated[bool, _option("Let float32 matrix products and convolutions use TF32 on NVIDIA GPUs.", WHERE, "--tf32")]
Track = Annotated[Literal["tensorboard"] | None, _option(
    "Also write the run for a viewer: tensorboard. It needs the package's extra track.", metavar=NAME, default="none"
)]
Target = Annotated[float | None, _option("Accuracy in percent, drawn as a line into the accuracy curve.", min=0, max=100)]

Count = Annotated[int, _option("Mistakes in a picture, 1 to 100.", CHOICE)]
Sort = Annotated[arguments.Sort, _option(
    "Order of the mistakes. confidence: surest first. label: least probable label first. class: by class. random.", CHOICE, metavar=NAME,
)]
Folds = Annotated[int | None, _option(
    "With --sort label: judge the training labels, by this many networks, each trained without the images that it judges.", CHOICE,
    default="none",
)]
FoldEpochs = Annotated[int | None, _option("With --folds: epochs of each network.", CHOICE, "--epochs", default="the run's")]
TrueClass = Annotated[str | None, _option("Only this true class.", CHOICE, metavar="CLASS", default="all")]
PredictedClass = Annotated[str | None, _option("Only this predicted class.", CHOICE, metavar="CLASS", default="all")]
CopyTo = Annotated[Path | None, _option("New folder: copy all chosen files to true/predicted/file.", CHOICE, default="none")]
SaveImages = Annotated[Path | None, _option(
    "New folder: write all chosen images to true/predicted/ as PNG, 32x32.", CHOICE, default="none"
)]
Layer = Annotated[arguments.GradCamLayer, _option(
    "Layer for Grad-CAM: prep (32x32), layer1 (16x16), layer2 (8x8) or layer3 (4x4).", CHOICE, metavar=NAME
)]

Runs = Annotated[list[Path], _argument("Folders of finished runs or of repetitions, or checkpoint files.", "RUN")]
Page = Annotated[Path | None, _option(
    "File for the HTML page, or folder for the Markdown.", default="report.html or report beside the checkpoint"
)]
ReportFormat = Annotated[arguments.ReportFormat, _option("html: one file with its pictures inside. markdown: a folder with README.md and pictures.")]
RunAndImages = Annotated[list[Path], _argument(
    "The folder of a run, or its checkpoint file. Then image files, or folders of them. Without a run: the newest one in runs/.",
    "RUN, IMAGE",
)]
Top = Annotated[int, _option("Classes shown for each image.")]
Exported = Annotated[Path | None, _option("New file, or new folder of a space.", default="model.<format> or space, beside the checkpoint")]
ExportFormat = Annotated[arguments.ExportFormat, _option(
    "space is the page of demo as a folder to publish. It needs the extra demo; onnx and safetensors need the extra export. "
    "--data-dir and --device go with space."
)]
WithPreprocessing = Annotated[bool, _option(
    "Normalise inside the ONNX graph, which then takes uint8 (N, 32, 32, 3).", WHERE, "--with-preprocessing"
)]

Host = Annotated[str, _option("Address to listen at; 0.0.0.0 shows the page to other machines.")]
Port = Annotated[int, _option("Port to listen at.")]
Open = Annotated[bool, _option("Show the page in your browser.", WHERE, "--open")]

Views = Annotated[int, _option("Augmented views of each image.", DRAWING)]
Policy = Annotated[Literal["one-cycle", "triangular"], _option(
    "Schedule to draw: one-cycle, the recipe's own; or triangular: the cyclical LR.", DRAWING, metavar=NAME
)]
MinLR = Annotated[float, _option("Lower bound of the triangular policy.", DRAWING)]
StepSize = Annotated[int, _option("Steps of the triangular policy from one bound to the other.", DRAWING)]
Cycles = Annotated[int, _option("How often the triangular policy goes up and down.", DRAWING)]
Rounds = Annotated[int, _option("Number of repetitions of each measurement, at least 6.", MEASURE)]
Reference = Annotated[bool, _option("Also measure a plain float32 training loop with a DataLoader.", MEASURE, "--reference")]
Profile = Annotated[bool, _option("Show how the time of training divides among operators, on CUDA among kernels.", MEASURE, "--profile")]
JsonFile = Annotated[Path | None, _option("Write all that was measured to this file.", MEASURE, "--json", default="none")]
RecipeName = Annotated[str | None, _argument("Recipe whose fields are printed, in the form of recipe.json.", "NAME")]
HelpAll = Annotated[bool | None, typer.Option(
    "--help-all", help="Show every option, by subject, and exit.", callback=_show_all, is_eager=True
)]
# fmt: on


def with_fields(taken: Callable[[str, str], bool]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds to a command an option for each field of `Recipe` that it takes, which `taken` says by name and panel.

    A command with a parameter `recipe` gets the recipe built of them and of --recipe-file, which is added too. One with a
    parameter `options` gets them as they were given, None for those that were not.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(function, eval_str=True).parameters)
        built = own.pop("options", None) is None
        added: dict[str, Any] = {"help_all": HelpAll, **({"recipe_file": RecipeFile} if built else {})}
        own.pop("recipe", None)
        fields = [name for name in Recipe.model_fields if name == "recipe" or (name not in own and taken(name, _panel(name)))]
        added |= {name: _field_option(name) for name in fields}

        @functools.wraps(function)
        def run(help_all: None, **given: Any) -> None:
            options = {name: given.pop(name) for name in fields}
            if built:
                function(recipe=Recipe.build(options.pop("recipe"), given.pop("recipe_file"), **options), **given)
            else:
                function(options=options, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        new = [inspect.Parameter(name, keyword, default=None, annotation=option) for name, option in added.items()]
        signature = inspect.Signature([*(each.replace(kind=keyword) for each in own.values()), *new])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
        return run

    return decorate


def _field_option(name: str) -> Any:
    """The Typer option of a Recipe field: its help, panel and default come from the field."""
    field = Recipe.model_fields[name]
    kind: Any = field.annotation
    if type(None) in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    default = {"None": "none", "True": "yes", "False": "no"}.get(str(field.default), str(field.default))
    shown, choices = {}, get_args(kind) if get_origin(kind) is Literal else ()
    if choices:
        default, shown = f"{default}; or: {', '.join(each for each in choices if each != field.default)}", {"metavar": NAME}
    elif get_origin(kind) is tuple:
        shown = {"metavar": "R G B"}
    flag = name.replace("_", "-")
    flags = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    return Annotated[kind | None, _option(str(field.description), _panel(name), flags, default=default, **shown)]


def _panel(name: str) -> str:
    extra: Any = Recipe.model_fields[name].json_schema_extra
    return extra["panel"]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print only errors, and what --json or recipes NAME asks for. Before the command."),
    ] = False,
) -> None:
    if version:
        typer.echo(f"cifar-resnet {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise UsageError("--quiet goes before a command, and none is given; cifar-resnet --help lists them")
    if quiet:
        console.console.quiet = True


def _say_written(*paths: Path) -> None:
    console.say("\n".join(["written:", *(f"  {path}" for path in paths)]))


# Fields that find-lr does not take: it finds them, or its short trainings do without.
NOT_SWEPT = ("holdout", "test_limit", "max_lr", "div_factor", "sam_share", "sam_radius", "ema_decay", "ema_every")


@_command(STEPS, "find-lr", "find-lr --dataset digits", "find-lr --sweep 2")
@with_fields(lambda name, panel: name not in NOT_SWEPT)
def find_lr(
    recipe: Recipe, start_lr: StartLR = 1e-4, end_lr: EndLR = 10.0, num_iter: NumIter = 100, step_mode: StepMode = "exp",
    trial_steps: TrialSteps = None, suggest: Suggest = "recommended", sweep: Sweep = None, run_dir: FinderDir = None,
    data_dir: DataDir = None, device: Device = "auto", loader: Loader = "auto", workers: Workers = None,
    convolution: Convolution = "auto", format: Format = "png",
) -> None:  # fmt: skip
    """Recommend a learning rate: by a range test, then by short trainings.

    The range test trains a new model while the learning rate rises. Three to six short trainings then try peaks around the LR of the lowest loss.
    """
    from .jobs.common import command_line
    from .jobs.find_lr import find_lr, with_found_lr
    from .runs import folder_for

    with folder_for(run_dir, recipe, "find-lr-") as folder:
        found = find_lr(
            recipe, folder, start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode, trial_steps=trial_steps,
            sweep=sweep, data_dir=data_dir, device=device, loader=loader, workers=workers, convolution=convolution,
            format=format, notify=console.say,
        )  # fmt: skip
    then, options = "", dict(data_dir=data_dir, device=device, loader=loader, workers=workers, convolution=convolution)
    where = [
        shell_word(word) for name, value in options.items() if value not in (None, "auto") for word in option_words(name, value)
    ]
    if found.suggestions.by(suggest):
        chosen = with_found_lr(recipe, found.suggestions, suggest)
        then = " ".join([command_line(chosen, ("max_lr", "div_factor") if suggest == "recommended" else ("max_lr",)), *where])
    usual = Recipe.build(recipe.recipe)
    words = [command_line(recipe.replace(max_lr=usual.max_lr, div_factor=usual.div_factor)), "--max-lr find"]
    at_once = " ".join([*words, *([f"--suggest {suggest}"] if suggest != "recommended" else []), *where])
    console.lr_suggestions(found, suggest, then, at_once)
    _say_written(folder / "lr_finder.json", folder / f"lr_finder.{format}")


@_command(STEPS, "train --dataset digits", "train --epochs 24 --batch-size 512 --seed 1", "train --resume runs/default-1")
@with_fields(lambda name, panel: True)
def train(
    options: dict[str, Any], recipe_file: RecipeFile = None, max_lr: MaxLR = None, suggest: Suggest = "recommended",
    run_dir: NewRunDir = None, resume: Resume = None, repeat: Repeat = None, data_dir: DataDir = None, device: Device = "auto",
    loader: Loader = "auto", workers: Workers = None, save_every_minutes: SaveEveryMinutes = 5.0, compile: Compile = "auto",
    convolution: Convolution = "auto", tf32: TF32 = False, track: Track = None, target: Target = None, format: Format = "png",
) -> None:  # fmt: skip
    """Train a recipe, and keep the run in a folder.

    Without options: the default recipe, 24 epochs of CIFAR-10 at batch 512. The accuracy reported is the last epoch's.
    """
    find = max_lr == "find"
    options["max_lr"] = None if find else _max_lr(max_lr)
    _check_found(find, suggest, options)
    recipe = None
    if resume is None:
        recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    else:
        _check_resumed({"--run-dir": run_dir, "--recipe-file": recipe_file, "--max-lr find": find, "--repeat": repeat})
    began = time.perf_counter()
    from .jobs import repeat as repetition
    from .jobs import track as tracking
    from .jobs import train as training
    from .jobs.interrupt import Interrupted
    from .jobs.watch import Watchers
    from .runs import REPEAT, find_run

    if resume is not None:
        given, resume = resume, find_run(resume, repetition=True)
        _say_newest(given != resume, resume)

    table = progress.TrainingTable(began)

    def watch(shown: Any = None) -> Watchers:
        return Watchers(shown or progress.TrainingTable(), *([tracking.track(track)] if track else []))

    watcher = watch(table)
    where = dict(data_dir=data_dir, device=device, loader=loader, workers=workers, convolution=convolution)
    if recipe and find:  # which takes minutes
        training.check_options(save_every_minutes, target)
        if repeat is not None:
            repetition.check_count(recipe, repeat)
        recipe = _with_found_lr(recipe, suggest, run_dir, **where)
    must_match = {name: value for name, value in options.items() if value is not None}
    how: dict[str, Any] = dict(
        progress=False, save_every_minutes=save_every_minutes, compile=compile, tf32=tf32, target=target, format=format
    )
    settings: dict[str, Any] = dict(resume=resume, must_match=must_match, **where, **how)
    try:
        if repeat is not None or (resume is not None and (resume / REPEAT).exists()):
            console.repetition(repetition.repeat(recipe, repeat, run_dir, watch=watch, **settings))
            return
        with watcher:
            result = training.train(recipe, run_dir, watcher=watcher, **settings)
    except Interrupted as stopped:
        again = {**stopped.options, **({"track": track} if track else {})}
        raise Interrupted(stopped.number, stopped.run_dir, again) from None
    if not table.begun:
        console.say(f"the run in {resume} is finished; nothing to do")
    console.training_result(result, data_dir)


def _max_lr(given: str | None) -> float | None:
    try:
        return None if given is None else float(given)
    except ValueError:
        raise UsageError(f"--max-lr {given!r} is neither a number nor find") from None


def _check_found(find: bool, suggest: str, options: dict[str, Any]) -> None:
    if find and options["div_factor"] is not None:
        raise UsageError("--div-factor does not go with --max-lr find, which sets it")
    if suggest != "recommended" and not find:
        raise UsageError(f"--suggest {suggest} goes with --max-lr find")


def _check_resumed(given: dict[str, Any]) -> None:
    if wrong := [option for option, value in given.items() if value]:
        raise UsageError(f"{wrong[0]} does not go with --resume, which takes folder and recipe from the run")


def _with_found_lr(recipe: Recipe, suggest: str, run_dir: Path | None, **where: Any) -> Recipe:
    from .jobs.find_lr import find_lr, with_found_lr
    from .run_dir import check_free

    if run_dir is not None:
        check_free(run_dir)
    found = find_lr(recipe, trial_steps=None if suggest == "recommended" else 0, **where, notify=console.say)
    recipe = with_found_lr(recipe, found.suggestions, suggest)
    console.say(f"found: LR from {recipe.max_lr / recipe.div_factor:.3g} to {recipe.max_lr:.3g}")
    return recipe


def _say_newest(chosen: bool, run: Path) -> None:
    """On standard error, as standard output may be read by a program."""
    if chosen and not console.console.quiet:
        _aside(f"the newest run is {run}")


def _aside(message: str) -> None:
    """A line on standard error."""
    print(_line(message), file=sys.stderr)


def _line(message: str) -> str:
    """A message as one line of standard error."""
    return f"cifar-resnet: {printable(' '.join(map(str.strip, message.strip().splitlines())))}"


def _runs(given: list[Path] | None) -> list[Path]:
    """The runs that a command was given; the newest one, where it was given none."""
    from .runs import LATEST, find_runs

    runs = find_runs(given)
    _say_newest(given in (None, [], [Path(LATEST)]) and runs != given, runs[0])
    return runs


def _one_run(given: list[Path] | None, command: str) -> Path:
    from .runs import find_run

    if given and len(given) > 1:
        raise UsageError(f"{command} takes one run, not {len(given)}: {', '.join(map(str, given))}")
    run = find_run(given[0] if given else None)
    _say_newest([run] != given, run)
    return run


@app.command(rich_help_panel=STEPS)
def evaluate(
    checkpoints: RunArguments = None, tta: Tta = "none", json_output: Json = False, run_dir: RunDir = None,
    dataset: Moved = None, data_dir: DataDir = None, device: Device = "auto", format: Format = "png",
) -> None:  # fmt: skip
    """Evaluate checkpoints: loss, accuracy, calibration, a table by class, the confusion matrix.

    If one of several runs fails, it is named, the others are evaluated, and the exit code is 1.
    """
    from .jobs.evaluate import evaluate
    from .runs import CHECKPOINT

    runs, done, notify = _runs(checkpoints), [], _aside if json_output else console.say
    once = {os.path.realpath(run if run.is_file() else run / CHECKPOINT): run for run in runs}
    runs, folders = list(once.values()), list(map(os.path.dirname, once))
    if run_dir and len(runs) > 1:
        raise UsageError(f"--run-dir takes the files of one run, not of {len(runs)}; without it they go beside each checkpoint")
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        advice = "evaluate one at a time, with --run-dir"
        raise UsageError(f"two of these checkpoints would write the same files, in {twice.pop()}; {advice}")
    how: dict[str, Any] = dict(tta=tta, dataset=dataset, data_dir=data_dir, device=device, format=format)
    if not json_output:
        how["found"] = console.evaluation
    for run in runs:
        if len(runs) > 1 and not json_output:
            console.say(str(run), style="bold")
        try:
            with console.console.status("evaluating"):
                content = evaluate(run, run_dir, **how, notify=notify)
        except CifarResnetError as error:
            if len(runs) == 1:
                raise
            _aside(str(error))
            continue
        if not json_output:
            names = ["evaluation.json", *(f"{name}.{format}" for name in ("confusion_matrix", "class_accuracy", "reliability"))]
            _say_written(*((run_dir or Path(content["checkpoint"]).parent) / name for name in names))
        done.append(content)
    if json_output:
        print(json.dumps(done if len(runs) > 1 else done[0], indent=2))
    elif len(runs) > 1 and done:
        console.evaluations(done)
    if len(done) < len(runs):
        raise typer.Exit(1)


@app.command(rich_help_panel=STEPS)
def misclassified(
    checkpoint: RunArgument = None, count: Count = 25, sort: Sort = "confidence", true: TrueClass = None,
    predicted: PredictedClass = None, layer: Layer = "layer2", folds: Folds = None, epochs: FoldEpochs = None,
    copy_to: CopyTo = None, save_images: SaveImages = None, run_dir: RunDir = None, dataset: Moved = None,
    data_dir: DataDir = None, device: Device = "auto", format: Format = "png",
) -> None:  # fmt: skip
    """Show the mistakes of a checkpoint, with Grad-CAM of the predicted and of the true class."""
    if folds is not None and sort != "label":
        raise UsageError(f"--folds {folds} goes with --sort label")
    if epochs is not None and folds is None:
        raise UsageError(f"--epochs {epochs} goes with --folds")
    if folds is not None and layer != "layer2":
        raise UsageError(f"--layer {layer} does not go with --folds, which draws no Grad-CAM")
    from .jobs.misclassified import misclassified
    from .jobs.training_labels import training_labels

    run = _one_run(checkpoint, "misclassified")
    written = list[Path]()
    how: dict[str, Any] = dict(
        count=count, true=true, predicted=predicted, copy_to=copy_to, save_images=save_images, dataset=dataset, data_dir=data_dir,
        device=device, format=format, notify=console.say, written=written.append,
    )  # fmt: skip
    if folds is not None:
        chosen = training_labels(run, run_dir, folds=folds, epochs=epochs, **how)
    else:
        with console.console.status("looking for mistakes"):
            chosen = misclassified(run, run_dir, sort=sort, layer=layer, **how)
    files = [path for path in written if path not in (copy_to, save_images)]
    show = console.doubtful_labels if sort == "label" else console.mistakes
    show(chosen)
    _say_written(*files)
    for folder in written[len(files) :]:
        console.say(f"{plural(len(chosen), 'image')} written in\n  {folder}")


@app.command(rich_help_panel=AFTER)
def compare(runs: Runs, output: Picture = Path("comparison.png"), json_output: Json = False) -> None:
    """Compare finished runs in one table and one picture. Runs that differ only in the seed share a column, with mean and standard deviation."""
    from .jobs.compare import compare

    content = compare(runs, output)
    if json_output:
        print(json.dumps(content, indent=2))
    else:
        console.comparison(content)
        _say_written(output)


@app.command(rich_help_panel=AFTER)
def report(
    checkpoint: RunArgument = None, format: ReportFormat = "html", output: Page = None, dataset: Moved = None,
    data_dir: DataDir = None, device: Device = "auto",
) -> None:  # fmt: skip
    """Write a run as one HTML page, or as Markdown: figures, pictures, mistakes, recipe, and the command that repeats it."""
    from .jobs.report import report

    run = _one_run(checkpoint, "report")
    with console.console.status("writing the report"):
        path = report(run, output, format=format, dataset=dataset, data_dir=data_dir, device=device, notify=console.say)
    _say_written(path)


@app.command(cls=PredictCommand, rich_help_panel=AFTER)
def predict(
    run_and_images: RunAndImages, top: Top = 3, json_output: Json = False, tta: Tta = "none", device: Device = "auto"
) -> None:
    """Predict the classes of images. The model sees the centred square of each image, scaled to 32x32.

    A given file that is no image is named and skipped, and the exit code is then 1. Such a file in a given folder is skipped too, without changing the exit code.
    """
    from .jobs.predict import predict

    run, images = _run_and_images(run_and_images)
    skipped, others = list[str](), list[str]()
    with progress.telling(None, "predicting", "images") as told:
        how: dict[str, Any] = dict(top=top, tta=tta, device=device)
        found = list(predict(run, images, **how, progress=told, skipped=skipped.append, notify=others.append))
    if json_output:
        print(json.dumps(found, indent=2))
    else:
        console.predictions(found)
    for line in [f"skipped {each}" for each in skipped] + ([] if console.console.quiet else others):
        _aside(line)
    if skipped:
        raise typer.Exit(1)


def _run_and_images(given: list[Path]) -> tuple[Path, list[Path]]:
    """The run, which may be left out, and what follows. Where much follows, what is not there is meant as a run."""
    from .runs import is_run

    if among := [each for each in given[1:] if each.suffix == ".pt" or (os.path.isdir(each) and is_run(each))]:
        raise UsageError(f"predict {among[0]}: that is a run, which stands before the images, and alone")
    if not is_run(given[0]) and (len(given) == 1 or given[0].exists()):
        return _one_run(None, "predict"), given
    if len(given) == 1:
        raise UsageError(f"predict {given[0]}: that is a run, and no image is given")
    return _one_run(given[:1], "predict"), given[1:]


@app.command(rich_help_panel=AFTER)
def demo(
    checkpoint: RunArgument = None, host: Host = "127.0.0.1", port: Port = 7860, open: Open = False, data_dir: DemoDataDir = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Show a run in the browser: try it on your own images, look through its mistakes. Ctrl-C ends the demo.

    The command needs the package's extra demo. Nothing leaves this machine.
    """
    from .jobs.demo import demo

    demo(_one_run(checkpoint, "demo"), host=host, port=port, open=open, data_dir=data_dir, device=device, notify=console.say)


@app.command(rich_help_panel=AFTER)
def export(
    checkpoint: RunArgument = None, output: Exported = None, format: ExportFormat = "onnx",
    with_preprocessing: WithPreprocessing = False, data_dir: DemoDataDir = None, device: Device = "auto",
) -> None:  # fmt: skip
    """Export the model as an ONNX graph, its weights as safetensors, or the page of demo as a folder to publish: a space."""
    from .jobs.export import export

    how: dict[str, Any] = dict(with_preprocessing=with_preprocessing, data_dir=data_dir, device=device, notify=console.say)
    path = export(_one_run(checkpoint, "export"), output, format=format, **how)
    _say_written(path)
    if format == "space":
        console.say(f"to try it in {path}: pip install -r requirements.txt, then python app.py")
    if format == "onnx":
        pixels, normalised = "uint8 (N, 32, 32, 3), pixels", "float32 (N, 3, 32, 32), normalised by the recipe's mean and std"
        console.say(f"input images: {pixels if with_preprocessing else normalised}; output logits: float32 (N, classes)")


@_command(BEFORE, "samples", "samples --dataset digits --views 12 --output digits.png")
@with_fields(lambda name, panel: panel in ("Recipe", "Augmentation") or name in ("dataset", "split", "mean", "std", "seed"))
def samples(
    recipe: Recipe, views: Views = 8, output: Picture = Path("samples.png"), data_dir: DataDir = None, loader: Loader = "auto",
    workers: Workers = None,
) -> None:  # fmt: skip
    """Draw a training image of each class, and what the recipe's augmentation makes of it."""
    from .jobs.samples import samples

    samples(recipe, output, views=views, data_dir=data_dir, loader=loader, workers=workers, notify=console.say)
    _say_written(output)


@_command(BEFORE, "summary", "summary --recipe page --json")
@with_fields(lambda name, panel: panel in ("Recipe", "Model") or name == "batch_size")
def summary(recipe: Recipe, json_output: Json = False) -> None:
    """Show the network layer by layer: shapes, parameters, multiply-adds, receptive field."""
    from .look import analysis

    content = analysis.summary(recipe)
    if json_output:
        print(json.dumps(content, indent=2))
    else:
        console.summary(content)


TRIANGULAR = 0.001, 490, 3  # lower bound, steps from one bound to the other, cycles
MOST_STEPS = 1_000_000  # in a picture of --policy triangular


@_command(BEFORE, "schedule", "schedule --recipe page --epochs 12", "schedule --policy triangular --max-lr 0.1")
@with_fields(lambda name, panel: panel in ("Recipe", "Schedule") or name == "max_lr")
def schedule(
    options: dict[str, Any], recipe_file: RecipeFile = None, policy: Policy = "one-cycle", min_lr: MinLR = TRIANGULAR[0],
    step_size: StepSize = TRIANGULAR[1], cycles: Cycles = TRIANGULAR[2], output: Picture = Path("schedule.png"),
) -> None:  # fmt: skip
    """Draw the learning rate of a run before it starts, for the 50,000 images of CIFAR-10."""
    idle = [name.replace("_", "-") for name, value in options.items() if value is not None and name not in ("recipe", "max_lr")]
    if policy == "triangular" and idle:
        takes = "--max-lr, --min-lr, --step-size and --cycles"
        raise UsageError(f"--{idle[0]} does not go with --policy triangular, which takes {takes}")
    recipe = Recipe.build(options.pop("recipe"), recipe_file, **options)
    if policy != "triangular" and (min_lr, step_size, cycles) != TRIANGULAR:
        raise UsageError("--min-lr, --step-size and --cycles go with --policy triangular")
    if step_size < 1 or cycles < 1:
        raise UsageError(f"--step-size {step_size} and --cycles {cycles} must be at least 1")
    if policy == "triangular" and 2 * step_size * cycles > MOST_STEPS:
        raise UsageError(f"--step-size {step_size} and --cycles {cycles} are more than {MOST_STEPS:,} steps")
    if policy == "triangular" and not 0 < min_lr < recipe.max_lr:
        raise UsageError(f"--min-lr {min_lr:g} must be above 0 and below --max-lr {recipe.max_lr:g}")
    from .data.loaders import batch_sizes
    from .files import check_file
    from .jobs.common import save_figure
    from .look import figures
    from .run_dir import PICTURES

    check_file(output, *PICTURES)
    if policy == "triangular":
        figure = figures.triangular(min_lr, recipe.max_lr, step_size, cycles)
    else:
        figure = figures.learning_rate(recipe, len(batch_sizes(recipe, 50_000)))
    save_figure(figure, output)
    _say_written(output)


@_command(BEFORE, "bench", "bench --reference --json bench.json")
@with_fields(lambda name, panel: name not in ("dataset", "split", "holdout", "train_limit", "test_limit"))
def bench(
    recipe: Recipe, rounds: Rounds = 9, reference: Reference = False, profile: Profile = False, json_file: JsonFile = None,
    device: Device = "auto", workers: Workers = None, compile: Compile = "auto",
    convolution: Convolution = "auto",
) -> None:  # fmt: skip
    """Measure this machine: images a second in training and evaluation, speed relative to a large matrix product, and how long a run takes.

    bench needs no data. On two CPU cores it takes two to ten minutes: ten without bfloat16 and with --reference. Run nothing else meanwhile.
    """
    from .files import check_file, writable, write_json
    from .jobs.bench import bench

    if json_file:
        check_file(json_file, ".json")
    where: dict[str, Any] = dict(device=device, workers=workers, compile=compile, convolution=convolution)
    content = bench(recipe, rounds=rounds, reference=reference, profile=profile, **where)
    console.bench(content)
    if json_file:
        writable(json_file.parent)
        write_json(json_file, content)
        _say_written(json_file)


@app.command(rich_help_panel=BEFORE)
def recipes(name: RecipeName = None) -> None:
    """List the named recipes, or print one."""
    if name is None:
        console.recipes()
    else:
        print(Recipe.build(name).to_json(), end="")
        if not console.console.quiet:
            console.assumed(name)


def main() -> None:
    """Runs the command line; every failure is one line on standard error, with its exit code."""
    os.environ["MPLBACKEND"] = "Agg"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # who started this process had closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 until the process ends
    console.replace_unencodable()
    warnings.formatwarning = lambda message, *_: f"{_line(str(message))}\n"
    try:
        for before, word in pairwise(sys.argv):
            if word and not re.fullmatch("--[^=]+=", word):
                continue
            what = word[:-1] or (before if before.startswith("-") else "a word")
            raise UsageError(f"{what} is empty; perhaps a variable of the shell is not set")
        code = app(standalone_mode=False)
    except CifarResnetError as error:
        _fail(str(error), error.exit_code)
    except (OSError, MemoryError) as error:
        _fail(str(error) or "out of memory; try a smaller --batch-size", 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # Typer's own: an unknown option, a value of the wrong type
            message = _with_value(error.format_message().replace("Value error, ", ""), getattr(error, "param", None))
            hint = next((f"; {hint}" for pattern, hint in MEANT.items() if re.search(pattern, message)), "")
            _fail(message.rstrip(".") + hint, getattr(error, "exit_code", 2))
        if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error)):
            _fail("out of memory; try a smaller --batch-size", 1)
        raise
    if code == 130:  # Ctrl-C, which Typer turns into this
        _fail("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _with_value(message: str, parameter: Any) -> str:
    """What Typer says of an option's value, with the value: as many words as the option takes."""
    option = re.match(r"Invalid value for '(-[^']*)'", message)
    if not option or "Input should" not in message:
        return message
    words, count = sys.argv[1:], parameter.nargs if parameter else 1
    given = [words[at + 1 : at + 1 + count] for at, word in enumerate(words) if word == option[1]]
    given += [[word.partition("=")[2]] for word in words if word.startswith(f"{option[1]}=")]
    return message.replace(option[0], f"{option[0]}, {' '.join(given[-1])!r}", 1) if given else message


def _fail(message: str, exit_code: int) -> NoReturn:
    """Ends with a message. Under torchrun every process meets a wrong usage. Rank 0 prints it, and the others wait, because torchrun
    ends all once one has failed."""
    if exit_code == 2 and is_other_rank():
        time.sleep(5)
    elif message:
        line = _line(message)
        with suppress(OSError):  # a terminal that was closed
            print(console.wrapped(line, shutil.get_terminal_size().columns) if sys.stderr.isatty() else line, file=sys.stderr)
    with suppress(OSError):
        sys.stdout.flush()
    sys.exit(exit_code)
