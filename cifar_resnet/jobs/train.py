"""Trains a recipe, or a run on from its checkpoint, and keeps it in a run directory."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import Compile, Convolution, Format, LoaderKind, checked
from ..checkpoint import Checkpoint, load_checkpoint
from ..data.datasets import load, with_statistics
from ..data.loaders import Loader, Share, TensorLoader, batch_sizes, check_batches, check_loader, make_loader
from ..data.splits import Data, same_images
from ..errors import CifarResnetError, NonFiniteLossError, RunDirectoryError, UsageError, first_line
from ..files import remove
from ..presets import PRESETS
from ..recipe import Recipe, option_words
from ..run_dir import PICTURES, RunDir, check_free, save_due
from ..runs import default_directory, find_run
from ..training import calibration, distributed, engine, ways
from ..training.capture import CapturedEpoch, capturable
from ..training.engine import Epoch, State, Step
from ..training.runtime import compiled, environment, resolve_device, resolve_precision
from .common import check_images, prepare, save_figure, with_gradients
from .convolutions import choose, compiled_here
from .interrupt import Interrupted, signals
from .watch import Watchers, watchers

DRAWN_EVERY = 100  # times as long as drawing takes: a hundredth of a run at most goes into its curves
RunEpoch = Callable[[State, Loader], Iterator[Tensor]]


@checked
@with_gradients
def train(
    recipe: Recipe | None = None,
    run_dir: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    must_match: dict[str, Any] | None = None,
    data_dir: Path | str | None = None,
    device: str = "auto",
    loader: LoaderKind = "auto",
    workers: int | None = None,
    save_every_minutes: float = 5.0,
    compile: Compile = "auto",
    convolution: Convolution = "auto",
    tf32: bool = False,
    target: float | None = None,
    format: Format = "png",
    progress: bool | None = None,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    watcher: object | None = None,
    captured: dict[Any, CapturedEpoch | None] | None = None,
) -> Checkpoint:
    """Trains a recipe to its end, or a run on from its checkpoint, and keeps it in a run directory.

    Gives the final checkpoint, with the metrics of every epoch. Processes of `torchrun` share every batch; rank 0 alone writes.

    Args:
        recipe: what to train; `Recipe()` if not given. Left out where `resume` is given.
        run_dir: an empty or new folder; a new one in `runs` if not given, see `default_directory`.
        resume: the folder of a run to go on with, or "latest"; a run that is finished is returned as it is.
        must_match: recipe fields that the resumed run must have.
        loader: "auto", "tensor" or "albumentations", whose processes are `workers`. "auto" is tensor, or what a resumed run had.
        save_every_minutes: how long inside an epoch until a checkpoint is saved.
        compile: "auto", "on" or "off"; see `runtime.compiled`. Several processes train without it.
        convolution: "auto" or "torch"; see `convolutions.choose`. A resumed run goes on as it began, but for "torch".
        tf32: whether an NVIDIA GPU may round the factors of float32 products to TF32. A run that was begun so goes on so.
        target: accuracy in percent, drawn as a line into the accuracy curve.
        format: of the pictures: "png", "svg" or "pdf".
        progress: whether a table of the epochs is shown; by default in a terminal and in a notebook.
        on_epoch: called after every epoch with its metrics, as `metrics.json` has them.
        watcher: is told of the run's course: an object with any of the methods of `Watcher`.
        captured: steps that earlier calls captured on a GPU, by what they depend on, None if they could not be; this call adds to it.

    Raises:
        CifarResnetError: one line that says what was wrong. A run that had begun can be resumed.
    """
    where: dict[str, Any] = dict(data_dir=data_dir, device=device, loader=loader, workers=workers, convolution=convolution)
    asked = dict(where, save_every_minutes=save_every_minutes, compile=compile, tf32=tf32, target=target, format=format)
    check_options(save_every_minutes, target)
    with distributed.joined(), ExitStack() as held:
        run = _Run(recipe, run_dir, resume, must_match or {}, asked, watchers(held, progress, on_epoch, watcher))
        if ended := run.read():
            return ended
        run.load_images(held)
        run.claim_folder(held)
        with signals():  # from here on there is a run that can go on
            run.make_state()
            run.make_steps({} if captured is None else captured)
            run.begin()
            run.steps_to_the_end()
        return distributed.on_first(run.finish)


def check_options(save_every_minutes: float, target: float | None) -> None:
    if not save_every_minutes > 0:
        raise UsageError(f"--save-every-minutes {save_every_minutes:g} must be above 0")
    if target is not None and not 0 <= target <= 100:
        raise UsageError(f"--target {target:g} must be 0 to 100")


def to_go_on(options: dict[str, Any]) -> dict[str, Any]:
    """Of the options of `train` those that a command must name, for a run to go on with them."""
    usual, of_python = inspect.signature(train).parameters, ("progress", "on_epoch")
    return {name: value for name, value in options.items() if name not in of_python and value != usual[name].default}


class _Run:
    """One call of `train`, stage by stage. Every rank has one."""

    recipe: Recipe
    checkpoint: Checkpoint | None
    data: Data
    loader: Loader
    evaluation: TensorLoader
    state: State
    folder: RunDir
    environment: dict[str, Any]
    kept: dict[str, Any]  # the environment that a run that goes on had before
    run_epoch: RunEpoch
    temperature: float | None = None  # of the trained model

    def __init__(
        self, recipe: Recipe | None, run_dir: Path | str | None, resume: Path | str | None, must_match: dict[str, Any],
        asked: dict[str, Any], watcher: Watchers,
    ) -> None:  # fmt: skip
        if resume is not None and (recipe is not None or run_dir is not None):
            raise UsageError("a resumed run takes recipe and folder from itself; give neither")
        self.asked_recipe, self.run_dir, self.must_match, self.asked = recipe, run_dir, must_match, asked
        self.resume: RunDir | None = None
        if resume is not None:
            run = find_run(resume)
            self.resume = RunDir(run.parent if run.is_file() else run)  # a run may be named by its checkpoint file
        self.watcher = watcher if distributed.rank() == 0 else Watchers()
        self.began, self.seconds = time.perf_counter(), dict[str, float]()
        self.drawn, self.drawing = time.monotonic(), 0.5  # when the curves were drawn last, and the seconds that it took
        self.read_data: Data | None = None  # on rank 0, before the others have the recipe

    def read(self) -> Checkpoint | None:
        """Reads what is to be trained; gives the checkpoint of a run that has ended."""
        self.recipe, self.checkpoint, self.kept, finished = distributed.on_first(self._read)
        return self.checkpoint if finished else None

    def _read(self) -> tuple[Recipe, Checkpoint | None, dict[str, Any], bool]:
        """On rank 0, which says what is wrong with the options of all."""
        planned, checkpoint, kept = self.asked_recipe, None, dict[str, Any]()
        check_loader(self.asked["loader"], self.asked["workers"])
        if distributed.ranks() > 1 and self.asked["compile"] == "on":
            raise UsageError("--compile on: several processes train without compiling; leave it out")
        if self.run_dir is not None:
            check_free(Path(self.run_dir))
        if self.resume is not None:
            planned, checkpoint = self.resume.open(self.must_match)
            kept = checkpoint.environment if checkpoint else self.resume.environment()
            if checkpoint and checkpoint.finished and self.resume.is_whole():
                with suppress(RunDirectoryError), self.resume.lock():  # it may have been killed right after its last file
                    self.resume.remove_parts()
                return planned, checkpoint, kept, True
        where = self.asked["device"], self.asked["data_dir"]
        planned, _, self.read_data = prepare(planned, *where, self.watcher.warn, self.watcher.reading)
        least = 2 if self.resume is None else 1  # a run that was begun with steps of one image goes on
        check_batches(planned, len(self.read_data.train), distributed.ranks(), least)
        steps = planned.epochs * len(batch_sizes(planned, len(self.read_data.train)))
        if self.resume is None and planned.ema_decay and planned.ema_every > steps:
            never = f"the {steps} steps of the run: the average would never be updated"
            raise UsageError(f"--ema-every {planned.ema_every} is more than {never}")
        return planned, checkpoint, kept, False

    def load_images(self, held: ExitStack) -> None:
        share = Share(distributed.rank(), distributed.ranks())
        self.data = self.read_data or load(self.recipe, self.asked["data_dir"], self.watcher.warn)
        self.device = resolve_device(self.asked["device"], self.asked["tf32"] or self.kept.get("tf32") is True)
        self.loader = make_loader(self.data.train, self.recipe, self.device, *self._loader_options(), share)
        held.callback(self.loader.close)
        mine = self.data.evaluation.take(share.of(len(self.data.evaluation)))
        self.evaluation = TensorLoader(mine, self.recipe, self.device)
        self._stage("data")

    def _loader_options(self) -> tuple[str, int | None]:
        """Loader and workers. A run goes on with the loader that it began with, as the other one augments differently."""
        asked, workers = self.asked["loader"], self.asked["workers"]
        before = self.kept.get("loader", asked)
        if asked == "auto":
            return before, self.kept.get("workers") if before == "albumentations" else None
        if before != asked:
            self.watcher.warn(f"--loader {asked}: the run had {before}, and its images are augmented differently from here on")
        return asked, workers

    def claim_folder(self, held: ExitStack) -> None:
        """Locks the run directory. What it says once nobody else can write it is what is trained."""
        first, *others = distributed.gather(self.data.fingerprints)
        for rank, found in enumerate(others, 1):
            if not all(same_images(first[part], found[part]) for part in first):
                raise CifarResnetError(f"process {rank} has other images than process 0; give each the same")
        path, self.recipe, self.checkpoint = distributed.on_first(partial(self._claim, held))
        self.folder = RunDir(path)

    def _claim(self, held: ExitStack) -> tuple[Path, Recipe, Checkpoint | None]:
        planned, checkpoint = self.recipe, None
        folder = self.resume or RunDir(self.run_dir or default_directory(self.recipe))
        if self.resume is None:
            taken_over = held.enter_context(folder.create(planned))
        else:
            planned, checkpoint, taken_over = held.enter_context(folder.resume(self.must_match))
            if checkpoint:
                check_images(checkpoint, self.data, self.watcher.warn)
            else:
                self.watcher.warn(f"the run in {folder.path} has no checkpoint, and begins anew")
            planned = with_statistics(resolve_precision(planned, self.device), self.data.train)
            folder.begin(planned)
            if not (checkpoint and checkpoint.finished) and (made := folder.remove_made()):
                of = "the checkpoint that the run goes on from" if checkpoint else "a checkpoint that is gone"
                self.watcher.warn(f"removed what was made of {of}: {', '.join(made)}")
        if taken_over:
            self.watcher.warn(taken_over)
        return folder.path, planned, checkpoint

    def make_state(self) -> None:
        if self.checkpoint:
            self.state = self.checkpoint.state(self.device)
        else:
            self.state = engine.start(self.recipe, self.device, len(self.data.classes), images=self.data.train.images)
        self.state.totals *= distributed.rank() == 0  # each rank adds its own
        self._stage("model")
        self._choose_ways()
        self._stage("convolutions")

    def _choose_ways(self) -> None:
        """Of a new run. One that goes on computes its layers as before, but where torch's own are asked for, or nothing can be built."""
        mode, traced, choice = self.asked["convolution"], self.asked["compile"] == "on", ways.used(self.state.model)
        if self.device.type != "cpu":
            if mode == "torch":
                self.watcher.warn(f"--convolution torch changes nothing: it is for a CPU, and the run is on {self.device}")
            return
        if mode == "torch" or (choice is None and not traced):
            choice = choose(mode, self.state.model, self.recipe, self.device)
        elif choice and choice.keys() & ways.COMPILED and not compiled_here(self.recipe):
            self.watcher.warn(
                "no C compiler here can build BatchNorm as it was built so far; PyTorch's own goes on, with other last bits"
            )
            choice = ways.without_compiled(choice)
        for model in {self.state.model, self.state.tested}:
            ways.use(model, choice)

    def make_steps(self, captured: dict[Any, CapturedEpoch | None]) -> None:
        """Compiles and captures where that is asked for, or is sooner done."""
        self.run_epoch = engine.plain_epoch
        if distributed.ranks() == 1:
            loader = self.loader if isinstance(self.loader, TensorLoader) else None
            earlier = captured.get(self._steps_depend_on())
            if loader and earlier:
                self.state = earlier.adopt(self.state, loader)
            else:
                compile, sizes = self.asked["compile"], dict.fromkeys(self.loader.sizes)
                self.state.forward = compiled(compile, self.recipe, self.state.model, self.device, sizes)
            refused = earlier is None and self._steps_depend_on() in captured
            if loader and capturable(self.state) and not refused:
                self._capture(earlier or CapturedEpoch(self.state, loader), captured)
            elif self.device.type == "cuda" and self.recipe.base_momentum is not None:
                self.watcher.warn("a graph cannot hold steps whose momentum changes, as this recipe's does; it trains without")
        self._stage("compile")

    def _capture(self, steps: CapturedEpoch, captured: dict[Any, CapturedEpoch | None]) -> None:
        try:
            steps.capture()
        except Exception as error:  # an old driver, an operation that cannot be captured, a kernel that Triton cannot build
            cause: BaseException | None = error
            while cause:  # ending a capture that failed raises an error of its own
                if isinstance(cause, torch.cuda.OutOfMemoryError):
                    raise cause from None
                cause = cause.__context__
            captured[self._steps_depend_on()] = None  # the next seed need not try
            self.watcher.warn(f"the step cannot be captured as a graph: {first_line(error)}; it trains without")
            return
        self.run_epoch = captured[self._steps_depend_on()] = steps

    def _steps_depend_on(self) -> Hashable:
        """All that captured steps hold: recipe, device, images, whether they are compiled, and how matrices are multiplied."""
        asked = self.asked["compile"], self.asked["tf32"]
        return self.recipe.replace(seed=0), self.device, *asked, self.data.fingerprints["train"]["sha256"]

    def begin(self) -> None:
        self.environment = {
            **environment(self.device),
            "processes": distributed.ranks(),
            **self.loader.options,
            "compiled": self.state.forward is not self.state.model,
            "captured": self.run_epoch is not engine.plain_epoch,
            "convolutions": ways.used(self.state.model),
            "startup_seconds": self.seconds,
        }
        if self.resume is None:
            self._warn_of_idle_options()
        if self.asked["tf32"] and self.device.type != "cuda":
            self.watcher.warn(f"--tf32 changes nothing: it is for an NVIDIA GPU, and the run is on {self.device}")
        # A run that is killed before its first checkpoint goes on by metrics.json. Later that may be an epoch ahead of the checkpoint.
        distributed.on_first(partial(self.folder.write_metrics, self.state, self.data, self.environment))
        if self.checkpoint:
            distributed.on_first(partial(self._unless_refused, self._write_table))
        self.watcher.begin(self.recipe, self.folder.path, copy.deepcopy(self.environment), self.data, self.state)

    def _warn_of_idle_options(self) -> None:
        """Says which settings, other than the preset's, change nothing."""
        preset = PRESETS.get(self.recipe.recipe)
        usual = {**Recipe().model_dump(), **(preset.fields if preset else {})}
        for name, reason in self.recipe.idle().items():
            if (value := getattr(self.recipe, name)) != usual[name]:
                self.watcher.warn(f"{' '.join(option_words(name, value))} changes nothing: {reason}")

    def steps_to_the_end(self) -> None:
        checked = saved = time.monotonic()
        with signals() as received:
            for record in engine.train(self.state, self.loader, self.evaluation.plain, self.run_epoch):
                epoch_done, run_done = isinstance(record, Epoch), self.state.epoch == self.recipe.epochs
                self._tell(record)
                now, every = time.monotonic(), self.asked["save_every_minutes"]
                due, check, stop = distributed.max_over_ranks(
                    save_due(now - saved, every, epoch_done, run_done), now - checked >= 10, received[0] if received else 0
                )
                if (due or stop or check) and not epoch_done:  # at whose end `engine.train` has checked
                    self.state.check_finite(self.loader.steps)
                    checked = time.monotonic()
                if run_done:
                    self.temperature = distributed.on_first(self._find_temperature)
                if due or stop or epoch_done:
                    self._save(bool(due or stop), must_succeed=bool(run_done or stop))
                    if due:  # saved, or it could not be
                        saved = time.monotonic()
                if epoch_done and not run_done and time.monotonic() - self.drawn >= DRAWN_EVERY * self.drawing:
                    self._draw_curves()
                if stop and not run_done:
                    self._draw_curves()
                    raise Interrupted(stop, self.folder.path, to_go_on(self.asked))

    def _tell(self, record: Step | Epoch) -> None:
        """Tells who watches. Where that fails the run is saved first; several processes would wait for each other."""
        try:
            if isinstance(record, Epoch):
                self.watcher.epoch(record)
            else:
                self.watcher.step(record, self.state)
        except Exception:
            if distributed.ranks() == 1:
                with suppress(NonFiniteLossError):
                    self.state.check_finite(self.loader.steps)
                    if self.state.epoch == self.recipe.epochs:
                        self.temperature = self._find_temperature()
                    self._save(True, must_succeed=False)
            raise

    def _find_temperature(self) -> float | None:
        accuracy = self.state.history[-1]["test_accuracy"]
        return calibration.find_temperature(self.recipe, self.state.tested, self.data, self.device, accuracy)

    def _save(self, checkpoint: bool, must_succeed: bool) -> None:
        with self.state.clock.paused():
            distributed.merge([self.state.model, self.state.tested], self.state.totals)
            save = partial(self.folder.save, self.state, self.data, self.environment, checkpoint, self.temperature)
            trouble = distributed.on_first(save)
            self.state.totals *= distributed.rank() == 0
            if not trouble and self.state.epoch < self.recipe.epochs:  # else see `finish`
                distributed.on_first(partial(self._unless_refused, self._write_table))
        if trouble and must_succeed:
            raise RunDirectoryError(trouble)
        if trouble:
            self.watcher.warn(f"{trouble}; the run goes on, unsaved")

    def _write_table(self) -> None:
        self.folder.write_table(self.state.history)

    def _unless_refused(self, write: Callable[[], None]) -> None:
        """Writes what the run can do without: a file may be open in a spreadsheet, and Windows then does not let it be written."""
        try:
            write()
        except RunDirectoryError as error:
            self.watcher.warn(f"{error}; the run goes on")

    def _draw_curves(self) -> None:
        """Draws the epochs so far. Several processes would wait for it, and so draw at their end alone."""
        if distributed.ranks() > 1 or not self.state.history:
            return
        began = time.monotonic()
        self._unless_refused(self._write_curves)
        self.drawn = time.monotonic()
        self.drawing = self.drawn - began

    def _write_curves(self) -> None:
        from ..look import figures  # whose Matplotlib the first step need not wait for

        figure = figures.curves(self.state.history, self.recipe, self.data.evaluated_on, self.asked["target"])
        save_figure(figure, self.folder.path / f"curves.{self.asked['format']}")

    def finish(self) -> Checkpoint:
        """Draws the run, and gives its checkpoint."""
        from ..look import figures

        self._write_curves()
        for suffix in set(PICTURES) - {f".{self.asked['format']}"}:  # drawn before the run was stopped
            remove(self.folder.path / f"curves{suffix}")
        self._write_table()
        figure = figures.learning_rate(self.recipe, self.loader.steps)
        save_figure(figure, self.folder.path / f"learning_rate.{self.asked['format']}")  # see `RunDir.is_whole`
        return load_checkpoint(self.folder.path)

    def _stage(self, name: str) -> None:
        """Ends a stage of the start, whose seconds `metrics.json` keeps."""
        now = time.perf_counter()
        self.began, self.seconds[name] = now, now - self.began
