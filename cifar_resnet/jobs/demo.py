"""A trained model on a page in the browser: an image to try it on, its mistakes, its run."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..arguments import checked
from ..checkpoint import Checkpoint
from ..data.cifar import check_at_hand
from ..data.images import read_image
from ..data.loaders import EVALUATION_BATCH, Batch, TensorLoader
from ..data.splits import Data, Split
from ..errors import CifarResnetError, UsageError
from ..look import analysis, figures, rendering
from ..recipe import Recipe
from ..runs import LATEST
from .common import Prediction, by_label, command_line, content_of, data_url, images_of, logits_of, opened, rendered
from .interrupt import signals

if TYPE_CHECKING:
    from ..look.page import Content, Mistake

LAYER = "layer2"  # of the mistakes' Grad-CAM
SHORT_BATCH = 125  # images that a CPU looks at before it can end
ORDERS = {"surest first": "confidence", "by class": "class", "random": "random", "label may be wrong": "label"}


@checked
def demo(
    run: Path | str = LATEST,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    open: bool = False,
    data_dir: Path | str | None = None,
    device: str = "auto",
    notify: Callable[[str], None] = lambda message: None,
) -> None:
    """Serves a page about a run until the process is interrupted; `notify` is told its address.

    Args:
        run: a checkpoint file, a run directory, or "latest": the newest run in `runs`. It need not be finished.
        host: the address to listen at; 0.0.0.0 is every one of this machine.
        open: show the page in the browser of this machine.

    Raises:
        UsageError: there is no such port.
        CifarResnetError: the port is in use, Gradio is not installed, or the checkpoint cannot be read.
    """
    _check_free(host, port)
    _make_folder_for_uploads()
    try:
        from ..look import page
    except ImportError as error:
        raise CifarResnetError(f'demo needs the package {error.name}: pip install "cifar-resnet[demo]"') from None
    shown = _Shown(*opened(run, device), data_dir)
    built = page.build(shown.content())
    if host not in ("127.0.0.1", "::1", "localhost"):
        notify(f"--host {host}: there is no password; everyone who can reach port {port} of this machine can open the page")
    address = page.launch(built, server_name=f"[{host}]" if ":" in host else host, server_port=port, inbrowser=open)
    notify(f"the page is at {address}, until Ctrl-C")
    _wait_for_the_end(shown)
    built.close(verbose=False)


@cache
def _make_folder_for_uploads() -> None:
    """Where they lie until they are read: one folder a process, as Gradio asks for it when it is imported. It goes with the process."""
    os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="cifar-resnet-demo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _check_free(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port} must be 1 to 65535")
    if not host:
        raise UsageError("--host is empty; 127.0.0.1 is this machine alone")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise CifarResnetError(f"--host {host} --port {port}: {error.strerror}; choose another --port or --host") from None
    except (TypeError, ValueError):  # of names that cannot be encoded
        raise UsageError(f"--host {host} is no name of a host") from None


def _wait_for_the_end(shown: _Shown) -> None:
    """Until Ctrl-C, or another signal that would end the process; in a thread beside the main one, for good.

    The evaluation images are looked at meanwhile, so that the tabs that need them are soon filled.
    """
    with signals() as received:
        shown.look_ahead(received)
        while not received:
            time.sleep(0.5)


def content_of_page(
    run: Checkpoint | Path | str, data_dir: Path | str | None, device: str, download: Callable[[str], None] | None = None,
    recipe: Recipe | None = None,
) -> Content:  # fmt: skip
    """What the page shows of a run. Its test images are looked at when a tab first asks for them.

    Args:
        download: told of images that are fetched. Without it nothing is fetched, and what needs images that are missing is left out.
        recipe: shown in place of the run's own.
    """
    return _Shown(*opened(run, device), data_dir, download, recipe).content()


class _Shown:
    """A checkpoint, and what of its images has been read and looked at so far."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, data_dir: Path | str | None,
        download: Callable[[str], None] | None = None, recipe: Recipe | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.device, self.data_dir, self.download = checkpoint, device, data_dir, download
        self.notify = download or (lambda message: None)
        self.recipe = recipe or Recipe.load(checkpoint.content["recipe"])  # the run's, which the checkpoint opened may not have
        self.model = checkpoint.model(device)
        self.lock = threading.Lock()  # captum hangs its hooks on the model
        self.judging = threading.Lock()  # who comes second waits for what the first one finds
        self.ended: Sequence[int] = ()  # has an element when the demo ends

    def content(self) -> Content:
        from ..look.page import Content

        loaded = self.checkpoint
        recipe = loaded.recipe
        try:
            examples, missing = self.examples(), ""
        except CifarResnetError as error:
            if self.download:
                raise
            examples, missing = [], f"There are no examples to show: {error}"
        unfinished = "" if loaded.finished else f"The run stands at {loaded.stands_at}: this is not its end. "
        content = Content(
            title=f"{recipe.title}, seed {recipe.seed}",
            notice=unfinished + missing,
            classes=loaded.classes,
            examples=examples,
            augmented=recipe.flip_probability > 0,
            orders=list(ORDERS),
            read=lambda file: read_image(Path(file), loaded.whites),
            probabilities=self.probabilities,
            grad_cam=self.grad_cam,
            mistakes=self.mistakes,
            overlays=self.overlays,
            run=lambda: self.run,
            wait="The network looks at all evaluation images, once. On a CPU this can take two minutes.",
        )
        content.grad_cam(np.zeros((1, 32, 32, 3), np.uint8), [loaded.classes[0]], LAYER)  # so that the first answer is quick
        return content

    def examples(self) -> list[tuple[np.ndarray, str]]:
        """The first evaluation image of each of the first ten classes."""
        images, classes = self.data.evaluation, self.data.classes
        firsts = [(np.flatnonzero(images.labels == label), name) for label, name in enumerate(classes[:10])]
        return [(images.images[found[0]], name) for found, name in firsts if len(found)]

    def probabilities(self, images: np.ndarray, augmented: bool) -> np.ndarray:
        with self.lock:
            tta = "flip-shift" if augmented else "none"
            logits = analysis.mean_logits(self.model, self._loader(images), tta)
        return analysis.probabilities(logits, self.checkpoint.temperature).numpy()

    def grad_cam(self, images: np.ndarray, names: Sequence[str], layer: str) -> np.ndarray:
        labels = torch.tensor([self.checkpoint.classes.index(name) for name in names], device=self.device)
        with self.lock:
            return analysis.grad_cam(self.model, next(self._loader(images).plain(len(images))).images, labels, layer)

    def mistakes(self, order: str, true: str | None, predicted: str | None) -> list[Mistake]:
        from ..look.page import Mistake, Problem

        try:
            found, wrong = self.judged()
            doubted = ORDERS[order] == "label"
            wrong = self.doubted if doubted else wrong
        except CifarResnetError as error:
            if self.download:
                raise
            raise Problem(f"There are no mistakes to show: {error}") from None
        chosen = analysis.choose(wrong, found.data.classes, ORDERS[order], true, predicted)
        images = found.data.evaluation.images
        return [Mistake(one.caption, one.true, one.predicted, one.confidence, images[one.position], doubted) for one in chosen]

    def overlays(self, shown: Sequence[Mistake]) -> tuple[np.ndarray, np.ndarray]:
        from ..look.page import overlay

        images = np.stack([each.image for each in shown])
        predicted, true = ([getattr(each, kind) for each in shown] for kind in ("predicted", "true"))
        return overlay(self.grad_cam(images, predicted, LAYER)), overlay(self.grad_cam(images, true, LAYER))

    @cached_property
    def run(self) -> str:
        """The last tab, as HTML."""
        loaded, missing, content = self.checkpoint, "", None
        pictures = figures.captioned_curves(loaded.history, loaded.recipe, loaded.evaluated_on, (6, 3.8))
        try:
            content = content_of(self.judged()[0])
            pictures["Confusion matrix"] = figures.evaluation(content)["confusion_matrix"]
        except CifarResnetError as error:
            missing = f"What the run gets right by class cannot be shown: {error}"
        return rendered(
            "run.html",
            run=replace(loaded, recipe=self.recipe),
            content=content,
            missing=missing,
            command=command_line(self.recipe),
            pictures={title: data_url(rendering.render(figure, "svg"), "svg") for title, figure in pictures.items()},
        )

    def look_ahead(self, ended: Sequence[int]) -> None:
        """Finds what is `judged`, unless the demo ends: `ended` then gets an element. What fails is said by the tabs."""
        self.ended = ended
        with suppress(Exception):
            self.judged()

    def judged(self) -> tuple[Prediction, list[analysis.Mistake]]:
        """The logits of all evaluation images, and the mistakes; this takes a while, once."""
        with self.judging:
            return self._judged

    @cached_property
    def _judged(self) -> tuple[Prediction, list[analysis.Mistake]]:
        found = logits_of(self.checkpoint, None, str(self.device), self.notify, data=self.data, batches=self._batches)
        return found, analysis.mistakes(*found.judged)

    def _batches(self, images: TensorLoader) -> Iterator[Batch]:
        for batch in images.plain(SHORT_BATCH if self.device.type == "cpu" else EVALUATION_BATCH):
            if self.ended:
                raise CifarResnetError("the demo ends")
            yield batch

    @cached_property
    def doubted(self) -> list[analysis.Mistake]:
        """The images whose label is less probable than another class, the least probable first."""
        return by_label(self.judged()[0])[0]

    @cached_property
    def data(self) -> Data:
        if self.checkpoint.recipe.dataset in ("cifar10", "cifar100") and not self.download:
            check_at_hand(self.checkpoint.recipe.dataset, self.data_dir)
        return images_of(self.checkpoint, self.data_dir, self.notify)[1]

    def _loader(self, images: np.ndarray) -> TensorLoader:
        count = len(images)
        return TensorLoader(Split(images, np.zeros(count, np.int64), np.arange(count)), self.checkpoint.recipe, self.device)
