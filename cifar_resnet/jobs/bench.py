"""What to expect of this machine: images a second of the model alone, of training and of evaluation, against its peak.

Every contestant is warmed up; then every round measures each of them once, for seconds, so that what disturbs the machine
disturbs them all. A ratio is the median over the rounds of the ratio within a round, with its 95 % interval by binomial
order statistics (scipy.stats.quantile_test). The interval assumes no distribution, and needs six rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, count
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate

from ..arguments import Compile, Convolution, checked
from ..checkpoint import SCHEMA
from ..data.augment import train_transform
from ..data.datasets import with_statistics
from ..data.loaders import EVALUATION_BATCH, Batch, Loader, TensorLoader, check_loader, leave_signals, make_loader
from ..data.splits import Split
from ..errors import CifarResnetError, UsageError
from ..look import analysis
from ..look.progress import telling
from ..recipe import Recipe
from ..training import engine
from ..training.autotune import Timing
from ..training.capture import CapturedEpoch, capturable, graph_of
from ..training.engine import State, rates_at, train_step
from ..training.model import build_model
from ..training.optim import make_optimizer, set_rates
from ..training.runtime import compiled, environment, resolve_device, resolve_precision, wait_for
from ..training.ways import COMPILED, use, without_compiled
from .common import with_gradients
from .convolutions import Choice, choose, chosen_here, compiled_here, measure_anew

MIN_ROUNDS, TRAIN_IMAGES, TEST_IMAGES, CPU_SIDE = 6, 50_000, 10_000, 4096
RATIOS = (
    ("model", "optimizer", "optimizer's share of the model alone"),
    ("model", "torch's convolutions", "model alone / with torch's own convolutions"),
    ("model", "torch's BatchNorm", "model alone / with torch's own BatchNorm"),
    ("tensor", "model", "training, tensor loader / model alone"),
    ("albumentations", "model", "training, albumentations loader / model alone"),
    ("model", "matrix product", "model alone / matrix product"),
    ("tensor", "matrix product", "training, tensor loader / matrix product"),
    ("tensor", "plain loop", "training, tensor loader / plain loop"),
    ("albumentations", "plain loop", "training, albumentations loader / plain loop"),
)


@checked
@with_gradients
def bench(
    recipe: Recipe | None = None,
    *,
    rounds: int = 9,
    reference: bool = False,
    profile: bool = False,
    device: str = "auto",
    workers: int | None = None,
    compile: Compile = "auto",
    convolution: Convolution = "auto",
    seconds: float = 2.0,
    progress: Callable[[int], None] | bool | None = None,
) -> dict[str, Any]:
    """Measures a recipe on random images of CIFAR-10's size and number; needs no data.

    Args:
        rounds: how often everything is measured.
        reference: measures a plain loop too, see `_plain_loop`; and the model with torch's own convolutions, and with torch's own
            BatchNorm, where others were chosen.
        profile: adds the operators that take the time of training with the tensor loader.
        workers: processes of the albumentations loader, and of the plain loop's.
        compile: "auto", "on" or "off"; see `runtime.compiled`.
        convolution: "auto", or "torch" for torch's own. With auto every way to convolve is timed, and later runs go by these timings.
        seconds: about how long one measurement takes; a step at least.
        progress: as `find_lr` takes it; a function is called with the rounds done.

    Returns:
        `rounds`: what was measured by contestant, images a second, or FLOP/s of the matrix product; `medians` of these;
        `ratios` with `median`, `low` and `high`; `convolutions`: see `autotune.Timing`; `predicted_seconds` of the recipe's epochs
        on CIFAR-10; `peak_memory`: bytes of this process (null on Windows), and on CUDA of the device, over all that was measured;
        `profile`: see `_operators`.

    Raises:
        UsageError: the rounds are too few for an interval.
    """
    _check(rounds, seconds, workers)
    place = resolve_device(device)
    recipe = resolve_precision(with_statistics(recipe or Recipe()), place)
    with ExitStack() as held:
        told = held.enter_context(telling(progress, "measuring", "rounds", rounds))
        timings, ways = _ways(recipe, place, compile, convolution)
        contestants, used = _contestants(recipe, place, workers, compile, ways)
        if reference:
            for name, others in _with_torchs_own(ways or {}).items():
                contestants[name] = (_model_alone(recipe, place, compile, others), recipe.batch_size)
            step = held.enter_context(_plain_process(recipe, place, _whole(recipe), used))
            contestants["plain loop"] = (step, recipe.batch_size)
        steps, measured = _measure(contestants, place, rounds, seconds, told)
    operators = _operators(contestants["tensor"][0], max(3, steps["tensor"]), place) if profile else None
    native = resolve_precision(recipe.replace(precision="auto"), place).precision == "bfloat16"
    return {
        "schema": SCHEMA,
        "environment": {**environment(place), "bfloat16": native},
        "options": {"compile": compile, "convolution": convolution, "workers": used, "steps": steps},
        "recipe": recipe.to_dict(),
        **_conclusions(recipe, measured),
        "convolutions": [timing._asdict() for timing in timings],
        "peak_memory": _peak_memory(place),
        "profile": operators,
    }


def _check(rounds: int, seconds: float, workers: int | None) -> None:
    if rounds < MIN_ROUNDS:
        raise UsageError(f"--rounds {rounds} must be at least {MIN_ROUNDS}: fewer give no 95 % interval of a median")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds {seconds:g} must be above 0")
    check_loader("albumentations", workers)


def _ways(recipe: Recipe, device: torch.device, compile: str, convolution: str) -> tuple[list[Timing], Choice | None]:
    """How long each convolution takes, where one is chosen; and what a run would choose."""
    model = build_model(recipe)
    if convolution == "auto" and compile != "on" and chosen_here(recipe, device):
        timings, choice = measure_anew(model, recipe)
        return timings, choice | compiled_here(recipe)
    return [], choose(convolution, model, recipe, device) if compile != "on" else None


def _with_torchs_own(choice: Choice) -> dict[str, Choice]:
    """The choice without what replaces torch's convolutions, and without what replaces its BatchNorm; where it has any."""
    norm = {layer: way for layer, way in choice.items() if layer in COMPILED}
    found = {"torch's convolutions": norm, "torch's BatchNorm": without_compiled(choice)}
    return {name: others for name, others in found.items() if others != choice}


def _peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory that this process and a CUDA device have held, in bytes; None where there is none, and on Windows."""
    process = None
    if sys.platform != "win32":
        import resource

        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"process": process, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def _whole(recipe: Recipe) -> int:
    """Images in whole batches, about as many as CIFAR-10 has."""
    return max(TRAIN_IMAGES // recipe.batch_size, 1) * recipe.batch_size


def _contestants(
    recipe: Recipe, device: torch.device, workers: int | None, compile: str, ways: Choice | None
) -> tuple[dict[str, tuple[Callable[[], Any], float]], int]:
    """What is measured, by name: a call, and the images or FLOP of it; and the workers of the albumentations loader."""
    size, (split, small) = recipe.batch_size, (_random_split(images) for images in (_whole(recipe), EVALUATION_BATCH))
    evaluated, model = TensorLoader(small, recipe, device), engine.start(recipe, device, convolutions=ways).model
    contestants: dict[str, tuple[Callable[[], Any], float]] = {
        "model": (_model_alone(recipe, device, compile, ways), size),
        "optimizer": (_optimizer_alone(recipe, device), size),
        "evaluation": (lambda: engine.predict_logits(recipe, model, evaluated.plain(), device), len(small)),
        "matrix product": _matrix_product(recipe, device),
    }
    for name in ("tensor", "albumentations"):
        loader = make_loader(split, recipe, device, name, workers if name == "albumentations" else None)
        contestants[name] = (_training(recipe, device, loader, compile, ways).__next__, size)
    return contestants, loader.options["workers"]


def _measure(
    contestants: dict[str, tuple[Callable[[], Any], float]], device: torch.device, rounds: int, seconds: float,
    progress: Callable[[int], None],
) -> tuple[dict[str, int], dict[str, list[float]]]:  # fmt: skip
    """Calls of each contestant in a round, and what each did in a second, by round."""

    def timed(name: str, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            contestants[name][0]()
        wait_for(device)
        return time.perf_counter() - began

    calls, measured = {}, dict[str, list[float]]()
    for name in contestants:
        timed(name, 2)
        once = timed(name, 1)
        if few := round(seconds / 4 / once):  # which tell more than one: a loader has the first batches at hand
            once = timed(name, few) / few
        calls[name], measured[name] = max(1, round(seconds / once)), []
    for done in range(rounds):
        progress(done)
        for name in list(contestants)[:: -1 if done % 2 else 1]:  # there and back: none always follows the same one
            measured[name].append(calls[name] * contestants[name][1] / timed(name, calls[name]))
    return calls, measured


def _conclusions(recipe: Recipe, measured: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, ratios, and the seconds of a run."""
    flop, medians = training_flop(recipe), {name: float(np.median(values)) for name, values in measured.items()}
    return {
        "training_flop_per_image": flop,
        "rounds": measured,
        "medians": medians,
        "ratios": {
            title: ratio(measured[above], measured[below], flop if below == "matrix product" else 1)
            for above, below, title in RATIOS
            if below in measured
        },
        "predicted_seconds": {
            "training": recipe.epochs * (1 + recipe.sam_share) * TRAIN_IMAGES / medians["tensor"],
            "evaluation": recipe.epochs * TEST_IMAGES / medians["evaluation"],
        },
    }


def training_flop(recipe: Recipe) -> int:
    """FLOP of an image, forward and backward: two a multiply-add of direct convolutions, and backward twice as many as forward."""
    return 6 * sum(layer["multiply_adds"] for layer in analysis.layers(recipe.replace(batch_size=1)))


def ratio(above: list[float], below: list[float], factor: float = 1.0) -> dict[str, float]:
    """Median over the rounds of factor * above / below, and its 95 % interval."""
    from scipy.stats import quantile_test

    values = factor * np.divide(above, below)
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def _operators(train: Callable[[], Any], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """The 20 operators that themselves take most time, on CUDA the kernels: share of the wall time in percent, and calls."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells a user without a GPU that there is an error
    kinds = {"cpu": torch.profiler.ProfilerActivity.CPU, "cuda": torch.profiler.ProfilerActivity.CUDA}
    with torch.profiler.profile(activities={kinds["cpu"], kinds.get(device.type, kinds["cpu"])}) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            train()
        wait_for(device)
        seconds = time.perf_counter() - began
    cuda = device.type == "cuda"  # where the operators of a captured step are no longer called
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == wanted]
    rows = [{"operator": e.key, "share": getattr(e, kind) / 1e4 / seconds, "calls": e.count} for e in events]
    return sorted(rows, key=lambda row: -row["share"])[:20]


def _random_split(images: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (images, 32, 32, 3), np.uint8), rng.integers(0, 10, images), np.arange(images))


def _started(recipe: Recipe, device: torch.device, compile: str, ways: Choice | None) -> State:
    """A run of plain steps before its first, compiled as asked."""
    state = engine.start(recipe.replace(sam_share=0.0), device, convolutions=ways)
    state.forward = compiled(compile, recipe, state.model, device, [recipe.batch_size])
    state.model.train()
    return state


def _training(recipe: Recipe, device: torch.device, loader: Loader, compile: str, ways: Choice | None) -> Iterator[torch.Tensor]:
    """Steps without end, epoch after epoch, with no evaluation between."""
    state = _started(recipe, device, compile, ways)
    run_epoch: Callable[[State, Loader], Iterator[torch.Tensor]] = engine.plain_epoch
    if isinstance(loader, TensorLoader) and capturable(state):
        run_epoch = captured = CapturedEpoch(state, loader)
        captured.capture()
    while True:
        yield from run_epoch(state, loader)
        state.epoch = (state.epoch + 1) % recipe.epochs


def _captured(call: Callable[[], Any], state: State) -> Callable[[], Any]:
    """The call as a graph, where a run would be one. A graph keeps no tensor alive: whoever replays it keeps the call."""
    if not capturable(state):
        return call
    graph = graph_of(call, state.optimizer)

    def replay(_kept: Callable[[], Any] = call) -> None:
        graph.replay()

    return replay


def _model_alone(recipe: Recipe, device: torch.device, compile: str, ways: Choice | None) -> Callable[[], Any]:
    """The first step, on one batch of noise. An average that is updated every few steps is not updated."""
    state = _started(recipe, device, compile, ways)
    images = torch.randn(recipe.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(recipe.batch_size, device=device) % 10)
    first, later = (rates_at(state.recipe, step, TRAIN_IMAGES) for step in (0, state.recipe.ema_every))
    return _captured(partial(train_step, state, batch, first._replace(average=later.average)), state)


def _optimizer_alone(recipe: Recipe, device: torch.device) -> Callable[[], Any]:
    state = engine.start(recipe, device)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return _captured(state.optimizer.step, state)


def _matrix_product(recipe: Recipe, device: torch.device) -> tuple[Callable[[], Any], float]:
    """A product of square matrices in the recipe's precision, and its FLOP.

    On a CPU as a convolution of kernel 1: torch gives float32 products to another library, which can be slower.
    """
    side = CPU_SIDE if device.type == "cpu" else 2 * CPU_SIDE
    left, right = torch.randn(2, side, side, dtype=getattr(torch, recipe.precision), device=device)
    images, kernel = left.view(-1, 8, 8, side).permute(0, 3, 1, 2), right.view(side, side, 1, 1)
    return partial(functional.conv2d, images, kernel) if device.type == "cpu" else partial(torch.mm, left, right), 2 * side**3


@contextmanager
def _plain_process(*arguments: Any) -> Iterator[Callable[[], None]]:
    """Gives what lets `_plain_loop`, in a process of its own, take one step."""
    context = multiprocessing.get_context("spawn")
    pipe, its_end = context.Pipe()
    process = context.Process(target=_plain_loop, args=(its_end, *arguments))
    process.start()
    its_end.close()

    def step() -> None:
        try:
            pipe.send(True)
            pipe.recv()
        except (EOFError, OSError):
            raise CifarResnetError("the plain loop failed, as shown above") from None

    try:
        yield step
    finally:
        with suppress(OSError):
            pipe.send(False)
        process.join()


def _plain_loop(pipe: Any, recipe: Recipe, device: torch.device, images: int, workers: int) -> None:
    """The loop of many a notebook: float32, NCHW, a DataLoader over Albumentations, loss and hits read at every step.

    It has the recipe's optimizer, and torch's own convolutions. It runs in a process of its own, begun anew, without
    `runtime.keep_large_blocks`, which cannot be undone and which a notebook has not got; between its steps it rests.
    """
    leave_signals(0)
    recipe = recipe.replace(precision="float32", flip_order="random")
    model = build_model(recipe).to(device).to(memory_format=torch.contiguous_format)
    use(model, {})
    optimizer, first = make_optimizer(recipe, model), rates_at(recipe, 0, TRAIN_IMAGES)
    set_rates(optimizer, first.lr, first.momentum)
    collate = partial(_collate, _random_split(images), train_transform(recipe))
    options: dict[str, Any] = dict(
        num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda", worker_init_fn=leave_signals
    )
    loader: Any = DataLoader(cast(Any, range(images)), recipe.batch_size, shuffle=True, **options)
    batches, running_loss, hits = chain.from_iterable(loader for _ in count()), 0.0, 0
    with suppress(EOFError, OSError):  # the process that asks is gone
        while pipe.recv():
            inputs, labels = (tensor.to(device) for tensor in next(batches))
            optimizer.zero_grad()
            output = model(inputs)
            loss = engine.training_loss(recipe, output, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            hits += (output.argmax(1) == labels).sum().item()
            pipe.send(None)


def _collate(split: Split, transform: Any, indices: list[int]) -> Batch:
    return default_collate([(transform(image=split.images[i])["image"], split.labels[i]) for i in indices])
