"""The jobs, whole: what a command of the command line does, and a notebook calls."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import analysis, distributed, engine, figures
from . import data as datasets
from .batches import Batches, make_batches
from .device import environment, resolve_device, resolve_precision
from .engine import Epoch, State, Step
from .errors import CifarResnetError, RunDirectoryError, UsageError
from .lr_finder import MIN_POINTS, History, Suggestions, range_test, suggest
from .model import ResNet
from .recipe import Recipe
from .run import (
    CHECKPOINT,
    SCHEMA,
    Checkpoint,
    check_free,
    check_writable,
    default_directory,
    load_checkpoint,
    locked,
    read_recipe,
    remove_parts,
    save_checkpoint,
    writable,
    write_json,
    write_metrics,
    write_whole,
)


class Watcher:
    """What `train` tells of its course, on rank 0; each method may be overridden. This one is silent."""

    def begin(self, recipe: Recipe, run_dir: Path, environment: dict[str, Any], data: datasets.Data, state: State) -> None: ...
    def step(self, step: Step, state: State) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def warn(self, message: str) -> None: ...


class Interrupted(CifarResnetError):
    """Stopped by a signal, with a checkpoint written."""

    def __init__(self, number: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with: cifar-resnet train --resume {run_dir}")
        self.exit_code = 128 + number


def prepare(recipe: Recipe, device: str = "auto") -> tuple[Recipe, Any]:
    """The recipe with what depends on dataset and device resolved, and the device."""
    place = resolve_device(device)
    return resolve_precision(datasets.with_statistics(recipe), place), place


def train(
    recipe: Recipe | None = None,
    run_dir: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    must_match: dict[str, Any] | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    loader: str = "auto",
    workers: int | None = None,
    save_every_minutes: float = 5.0,
    watcher: Watcher | None = None,
) -> Checkpoint:
    """Trains a recipe to its end, or a run on from its checkpoint, and keeps it in a run directory.

    The processes that `torchrun` started share every batch; rank 0 alone reads and writes the run directory.

    Args:
        recipe: what to train; `Recipe()` if not given. Left out where `resume` is given.
        run_dir: an empty or new folder; `runs/<recipe>-<dataset>-s<seed>-<UTC time>` if not given.
        resume: the folder of a run to go on with; a run that is finished is returned as it is.
        must_match: recipe fields that the resumed run must have.
        loader: "auto", "tensor" or "albumentations".
        workers: processes of the albumentations loader.
        save_every_minutes: how long inside an epoch until a checkpoint is saved.

    Returns:
        The final checkpoint, whose history holds the metrics of every epoch.

    Raises:
        CifarResnetError: one line that says what was wrong. A run that had begun can be resumed.
    """
    if not save_every_minutes > 0:
        raise UsageError(f"--save-every-minutes {save_every_minutes:g} must be above 0")
    if resume is not None and (recipe is not None or run_dir is not None):
        raise UsageError("a resumed run takes recipe and folder from itself; give neither")
    with distributed.joined(), ExitStack() as held:
        watcher = watcher if watcher and distributed.rank() == 0 else Watcher()
        images_in, data = Path(data_dir) if data_dir else None, None

        def read() -> tuple[Recipe, Checkpoint | None, bool]:
            """The run as it stands, and whether it is finished; if not, rank 0 has the images."""
            nonlocal data
            planned, checkpoint = recipe or Recipe(), None
            if resume is not None:
                planned, checkpoint = _standing(Path(resume), must_match or {})
                if checkpoint and checkpoint.finished and (Path(resume) / "learning_rate.png").exists():  # a run's last file
                    return planned, checkpoint, True
            planned, _ = prepare(planned, device)
            data = datasets.load(planned, images_in, watcher.warn)
            fewest, ranks = (len(data.train) - 1) % planned.batch_size + 1, distributed.ranks()
            if fewest < ranks:
                raise UsageError(f"--batch-size {planned.batch_size}: a step of {fewest} images is too few for {ranks} processes")
            return planned, checkpoint, False

        recipe, checkpoint, finished = distributed.on_first(read)
        if finished:
            return checkpoint
        data, place = data or datasets.load(recipe, images_in, watcher.warn), resolve_device(device)
        batches = make_batches(data.train, recipe, place, loader, workers)
        evaluation = make_batches(data.evaluation.take(distributed.share(len(data.evaluation))), recipe, place)
        folder = Path(resume or run_dir or default_directory(recipe))

        def claim() -> tuple[Recipe, Checkpoint | None]:
            """What the run directory says once nobody else can write it."""
            if resume is None:
                check_free(folder)
            if taken_over := held.enter_context(locked(writable(folder))):
                watcher.warn(taken_over)
            planned, checkpoint = recipe, None
            if resume is None:
                check_free(folder)
            else:
                planned, checkpoint = _standing(folder, must_match or {})
                planned, _ = prepare(planned, device)
            remove_parts(folder)
            write_whole(folder / "recipe.json", planned.to_json())
            return planned, checkpoint

        recipe, checkpoint = distributed.on_first(claim)
        state = checkpoint.state(place) if checkpoint else engine.start(recipe, place, len(data.classes))
        state.totals *= distributed.rank() == 0  # each rank adds its own
        described = {**environment(place), "processes": distributed.ranks(), **batches.options}
        watcher.begin(recipe, folder, described, data, state)

        def save(metrics_only: bool = False) -> str:
            """Gives what kept the run from being saved, or ""."""
            try:
                if not metrics_only:
                    save_checkpoint(folder / CHECKPOINT, recipe, state, data.classes, data.evaluated_on, described)
                write_metrics(folder, recipe, state.history, data.evaluated_on, described)
            except RunDirectoryError as error:
                return str(error)
            return ""

        if checkpoint:  # the truth: metrics.json may be an epoch ahead of it
            distributed.on_first(partial(write_metrics, folder, recipe, state.history, data.evaluated_on, described))
        saved = checked = time.monotonic()
        with signals() as received:
            for record in engine.train(recipe, state, batches, lambda: evaluation.plain(engine.EVALUATION_BATCH), place):
                now, done = time.monotonic(), state.epoch == recipe.epochs
                if isinstance(record, Epoch):
                    watcher.epoch(record)
                    due = done or now - saved >= 20
                else:
                    watcher.step(record, state)
                    due = now - saved >= 60 * save_every_minutes
                due, check, stop = distributed.highest(due, now - checked >= 10, received[0] if received else 0)
                if due or stop or check or isinstance(record, Epoch):
                    state.check_finite(recipe, batches.steps)
                    checked = now
                if due or stop or isinstance(record, Epoch):
                    distributed.merge([state.model, state.tested], state.totals)
                    trouble = distributed.on_first(partial(save, metrics_only=not (due or stop)))
                    state.totals *= distributed.rank() == 0
                    saved = time.monotonic() if due else saved
                    if trouble and (done or stop):
                        raise RunDirectoryError(trouble)
                    if trouble:
                        watcher.warn(f"{trouble}; the run goes on, unsaved")
                if stop and not done:
                    raise Interrupted(stop, folder)

        def finish() -> Checkpoint:
            figures.save(figures.curves(state.history, recipe, data.evaluated_on), folder / "curves.png")
            figures.save(figures.learning_rate(recipe, batches.steps), folder / "learning_rate.png")
            return load_checkpoint(folder)

        return distributed.on_first(finish)


def _standing(folder: Path, must_match: dict[str, Any]) -> tuple[Recipe, Checkpoint | None]:
    """The recipe of the run in a folder, and its checkpoint where it lived to write one."""
    if (folder / CHECKPOINT).exists():
        checkpoint = load_checkpoint(folder)
        recipe = checkpoint.recipe
    elif (folder / "recipe.json").exists():
        checkpoint, recipe = None, read_recipe(folder)
    else:
        raise UsageError(f"--resume {folder}: holds neither {CHECKPOINT} nor recipe.json, so no run to go on with")
    for name, value in must_match.items():
        planned = getattr(recipe, name)
        if value != planned and (name, value) != ("precision", "auto"):
            reason = " (the schedule would change)" if name == "epochs" else ""
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value} contradicts the run in {folder}, which has {planned}{reason}; leave it out")
    return recipe, checkpoint


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, so that the step in flight can end; the second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_lr(
    recipe: Recipe | None = None,
    run_dir: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    loader: str = "auto",
    workers: int | None = None,
    start_lr: float = 1e-4,
    end_lr: float = 10.0,
    num_iter: int = 200,
    step_mode: str = "exp",
    progress: Callable[[int, int], None] = lambda done, total: None,
    notify: Callable[[str], None] = lambda message: None,
) -> tuple[History, Suggestions]:
    """Runs the learning-rate range test; with `run_dir`, writes `lr_finder.json` and `lr_finder.png` there.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if not 0 < start_lr < end_lr:
        raise UsageError(f"--start-lr {start_lr:g} must be above 0 and below --end-lr {end_lr:g}")
    if num_iter < MIN_POINTS:
        raise UsageError(f"--num-iter {num_iter} must be at least {MIN_POINTS}")
    if run_dir is not None:
        check_writable(Path(run_dir))
    recipe, place = prepare(recipe or Recipe(), device)
    data = datasets.load(recipe, Path(data_dir) if data_dir else None, notify)
    batches = make_batches(data.train, recipe, place, loader, workers)
    settings = dict(start_lr=start_lr, end_lr=end_lr, num_iter=num_iter, step_mode=step_mode)
    history = range_test(recipe, batches, place, len(data.classes), **settings, progress=progress)
    suggestions = suggest(history)
    if run_dir is not None:
        folder = writable(Path(run_dir))
        content = {
            "schema": SCHEMA,
            "environment": environment(place),
            "recipe": recipe.model_dump(mode="json"),
            **settings,
            "suggestions": suggestions._asdict(),
            "history": {"lr": history.lr.tolist(), "loss": history.loss.tolist()},
        }
        write_json(folder / "lr_finder.json", content)
        figures.save(figures.lr_finder(history, suggestions, recipe, step_mode), folder / "lr_finder.png")
    return history, suggestions


def with_found_lr(recipe: Recipe, suggestions: Suggestions) -> Recipe:
    """The recipe at the recommended maximum, starting from the recommended minimum.

    Raises:
        CifarResnetError: the range test recommends nothing.
    """
    if suggestions.max_lr is None or suggestions.min_lr is None:
        raise CifarResnetError(
            "the range test recommends no LR: its loss never fell clearly, or fell to the end; give --max-lr a number"
        )
    return recipe.replace(max_lr=suggestions.max_lr, div_factor=suggestions.max_lr / suggestions.min_lr)


class Prediction(NamedTuple):
    """A checkpoint's logits, float32 (N, classes), on the images that it is judged by."""

    checkpoint: Checkpoint
    model: ResNet
    data: datasets.Data
    images: Batches
    logits: Tensor
    labels: Tensor
    device: torch.device


def predict(checkpoint: Path | str, data_dir: Path | str | None, device: str, notify: Callable[[str], None]) -> Prediction:
    """Dataset, recipe and precision are the checkpoint's, so that the figures are those that `train` reported."""
    place = resolve_device(device)
    loaded = load_checkpoint(checkpoint)
    data = datasets.load(loaded.recipe, Path(data_dir) if data_dir else None, notify)
    if len(data.classes) != len(loaded.classes):
        raise CifarResnetError(f"{loaded.path} has {len(loaded.classes)} classes, the images have {len(data.classes)}")
    model, images = loaded.model(place), make_batches(data.evaluation, loaded.recipe, place)
    logits, labels = engine.predict(loaded.recipe, model, images.plain(engine.EVALUATION_BATCH), place)
    return Prediction(loaded, model, data, images, logits, labels, place)


def evaluate(
    checkpoint: Path | str,
    run_dir: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    tta: str = "none",
    notify: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """What `evaluation.json` holds: loss, accuracy, calibration and the report by class, of the single view.

    Args:
        checkpoint: a checkpoint file, or a run directory.
        run_dir: where `evaluation.json` and `confusion_matrix.png` go; beside the checkpoint if not given.
        tta: "flip" adds loss and accuracy of the mean logits of the image and its mirror image.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    found = predict(checkpoint, data_dir, device, notify)
    loaded = found.checkpoint
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "checkpoint": str(loaded.path),
        "epoch": loaded.content["epoch"],
        "evaluated_on": found.data.evaluated_on,
        "environment": environment(found.device),
        **analysis.report(found.logits, found.labels, found.data.classes),
        "tta": None,
    }
    if tta == "flip":
        plain = found.images.plain(engine.EVALUATION_BATCH)
        mirrored, _ = engine.predict(loaded.recipe, found.model, plain, found.device, mirrored=True)
        both = engine.scores((found.logits + mirrored) / 2, found.labels)
        content["tta"] = {"flip": {"loss": both["test_loss"], "accuracy": both["test_accuracy"]}}
    folder = writable(Path(run_dir) if run_dir else loaded.path.parent)
    write_json(folder / "evaluation.json", content)
    title = (
        f"{loaded.recipe.recipe}, {found.data.evaluated_on} images: {content['accuracy']:.2f} % of {content['images']:,} right"
    )
    figure = figures.confusion_matrix(content["confusion_matrix"], found.data.classes, title)
    figures.save(figure, folder / "confusion_matrix.png")
    return content


def misclassified(
    checkpoint: Path | str,
    run_dir: Path | str | None = None,
    *,
    count: int = 25,
    layer: str = "layer2",
    data_dir: Path | str | None = None,
    device: str = "auto",
    notify: Callable[[str], None] = lambda message: None,
) -> list[analysis.Mistake]:
    """Every mistake, the surest first; writes `misclassified.json`, `misclassified.png` and `gradcam.png`.

    Args:
        checkpoint: a checkpoint file, or a run directory.
        run_dir: where the files go; beside the checkpoint if not given.
        count: how many of the mistakes the two pictures show.
        layer: whose output Grad-CAM weighs; see `analysis.grad_cam`.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    if not 1 <= count <= 100:
        raise UsageError(f"--count {count} must be 1 to 100")
    found = predict(checkpoint, data_dir, device, notify)
    loaded, split, classes = found.checkpoint, found.data.evaluation, found.data.classes
    wrong = analysis.mistakes(found.logits, found.labels, split, classes)
    folder = writable(Path(run_dir) if run_dir else loaded.path.parent)
    listed = [{key: value for key, value in mistake._asdict().items() if key != "position"} for mistake in wrong]
    content = {"schema": SCHEMA, "checkpoint": str(loaded.path), "evaluated_on": found.data.evaluated_on, "images": len(split)}
    write_json(folder / "misclassified.json", {**content, "mistakes": listed})
    if shown := wrong[:count]:
        chosen = split.take(np.array([mistake.position for mistake in shown]))
        images = next(make_batches(chosen, loaded.recipe, found.device).plain(len(chosen)))[0]
        predicted = torch.tensor([classes.index(mistake.predicted) for mistake in shown], device=found.device)
        maps = analysis.grad_cam(found.model, images, predicted, layer)
        what = f"the {len(shown)} surest of {len(wrong)} mistakes in {len(split):,} {found.data.evaluated_on} images"
        figures.save(figures.misclassified(chosen.images, shown, what), folder / "misclassified.png")
        title = f"Grad-CAM of the class predicted, at {layer}: {what}"
        figures.save(figures.grad_cam(chosen.images, maps, shown, title), folder / "gradcam.png")
    return wrong
