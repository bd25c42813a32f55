"""The step that reads buffers on the device: on a CPU uncaptured, with the bits of the plain loop; on a GPU as a graph."""

import itertools
import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import load, with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.training import engine, kernels
from cifar_resnet.training.capture import WARM_UP, CapturedEpoch, capturable, graph_of, snapshot

CPU = torch.device("cpu")


def made(**changes):
    """A recipe on 40 digits at batch 16 (steps of 14, 13 and 13) for a network of width 4."""
    fields = dict(dataset="digits", epochs=2, train_limit=40, test_limit=20, batch_size=16, precision="float32", width=4)
    return with_statistics(Recipe.build("default", **{**fields, **changes}))


def begun(recipe, device=CPU):
    data = load(recipe)
    return engine.start(recipe, device), TensorLoader(data.train, recipe, device), TensorLoader(data.evaluation, recipe, device)


def trained(state, loader, evaluation, run_epoch):
    records = list(engine.train(state, loader, lambda: evaluation.plain(100), run_epoch))
    return [float(record.loss) for record in records if isinstance(record, engine.Step)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        dict(sam_share=0.5, ema_decay=0.9, ema_every=2),
        dict(sam_share=0.0, grad_clip=0.01),
        dict(optimizer="sgd", momentum=0.95, base_momentum=0.85, max_lr=0.05, sam_share=0.0, batches="fixed"),
        dict(optimizer="adam", max_lr=0.001, sam_share=0.0, flip_order="random", cutout_count=2),
    ],
    ids=str,
)
def test_buffers_on_the_device_give_the_bits_of_the_plain_loop(changes):
    recipe = made(**changes)
    plain, loader, evaluation = begun(recipe)
    losses = trained(plain, loader, evaluation, engine.plain_epoch)
    buffered, loader, evaluation = begun(recipe)
    assert trained(buffered, loader, evaluation, CapturedEpoch(buffered, loader)) == losses
    assert same(plain, buffered)
    assert all(isinstance(group["lr"], float) for group in buffered.optimizer.param_groups)  # as a checkpoint holds it


def test_a_run_goes_on_inside_an_epoch():
    recipe = made(sam_share=0.5)
    whole, loader, evaluation = begun(recipe)
    losses = trained(whole, loader, evaluation, engine.plain_epoch)
    state, loader, evaluation = begun(recipe)
    first = [float(record.loss) for record in itertools.islice(engine.train(state, loader, lambda: (), engine.plain_epoch), 2)]
    assert first + trained(state, loader, evaluation, CapturedEpoch(state, loader)) == losses
    assert same(whole, state)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_second_seed_in_the_buffers_of_the_first_trains_as_it_would_alone(optimizer):
    recipe = made(sam_share=0.5, ema_decay=0.9, ema_every=2, optimizer=optimizer, max_lr=0.01)
    first, loader, evaluation = begun(recipe)
    captured = CapturedEpoch(first, loader)
    trained(first, loader, evaluation, captured)
    alone, loader, evaluation = begun(recipe.replace(seed=1))
    losses = trained(alone, loader, evaluation, engine.plain_epoch)
    state, loader, evaluation = begun(recipe.replace(seed=1))
    state = captured.adopt(state, loader)
    assert trained(state, loader, evaluation, captured) == losses
    assert same(alone, state)


def test_a_warm_up_that_fails_leaves_no_gradients():
    """The next step would add its own to them."""
    state, _, _ = begun(made())
    restore = snapshot(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    restore()
    assert all(parameter.grad is None for parameter in state.model.parameters())


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_what_warm_up_changes_is_put_back(optimizer, steps_before):
    recipe = made(sam_share=1.0, ema_decay=0.9, ema_every=1, optimizer=optimizer, max_lr=0.01)
    state, loader, evaluation = begun(recipe)
    untouched, other, _ = begun(recipe)
    for run, batches in ((state, loader), (untouched, other)):
        list(itertools.islice(engine.train(run, batches, lambda: ()), steps_before))
    restore = snapshot(state)
    state.model.train()
    for step, batch in enumerate(loader.epoch(1)):
        engine.train_step(state, batch, engine.rates_at(recipe, step, 6))
    restore()
    assert trained(state, loader, evaluation, engine.plain_epoch) == trained(untouched, other, evaluation, engine.plain_epoch)
    assert same(state, untouched)


def test_steps_of_a_momentum_that_changes_are_not_captured():
    state, _, _ = begun(made())
    assert not capturable(state)  # on a CPU
    cycled, _, _ = begun(made(optimizer="sgd", momentum=0.95, base_momentum=0.85))
    cycled.totals = torch.empty(2, device="meta")
    assert not capturable(cycled)


def test_our_kernels_are_for_what_is_captured_and_what_warms_up_for_it(monkeypatch):
    """With a GPU that does nothing."""
    stream, seen = SimpleNamespace(wait_stream=lambda other: None), []
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(kernels, "triton", object())
    weight = torch.nn.Parameter(torch.zeros(1))
    graph_of(lambda: seen.append(kernels.worth_launching()), torch.optim.SGD([weight], lr=0.1))
    assert seen == [True] * (WARM_UP + 1)
    assert not kernels.worth_launching()


def test_a_kernel_that_fails_is_left_out_and_what_fails_without_kernels_too_is_not_their_fault(monkeypatch):
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "_left_out", False)
    done = []

    def fails(always: bool = False, error: type[Exception] = ValueError) -> None:
        if always or kernels.worth_launching():
            raise error("of Triton\nin many lines")
        done.append(True)

    with pytest.raises(ValueError, match="of Triton"):
        kernels.try_kernels(partial(fails, always=True))  # outside of a graph there are no kernels
    with kernels.for_a_graph():
        with pytest.raises(torch.cuda.OutOfMemoryError):
            kernels.try_kernels(partial(fails, error=torch.cuda.OutOfMemoryError))
        with pytest.raises(ValueError, match="of Triton"):
            kernels.try_kernels(partial(fails, always=True))
        assert kernels.worth_launching()
        with pytest.warns(UserWarning, match="a Triton kernel fails here, so training takes longer: of Triton$"):
            kernels.try_kernels(fails)
        kernels.try_kernels(fails)
        assert not kernels.worth_launching()
    assert done == [True, True]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam"])
def test_a_captured_step_trains_as_the_plain_one(optimizer, precision):
    """Losses of six steps, plain and sharpness-aware, of two sizes; a GPU adds in no fixed order, so they differ a little."""
    fields = dict(optimizer=optimizer, max_lr=0.01, sam_share=0.5, width=16, ema_decay=0.9, ema_every=2)
    recipe = made(**fields, precision=precision)
    device = torch.device("cuda")
    plain, loader, evaluation = begun(recipe, device)
    losses = trained(plain, loader, evaluation, engine.plain_epoch)
    state, loader, evaluation = begun(recipe, device)
    before = [tensor.clone() for tensor in (*state.model.state_dict().values(), state.totals, state.bad_step)]
    captured = CapturedEpoch(state, loader)
    captured.capture()
    assert len(captured.graphs) >= 4
    after = (*state.model.state_dict().values(), state.totals, state.bad_step)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trained(state, loader, evaluation, captured) == pytest.approx(losses, rel=0.02 if precision == "float32" else 0.1)
    for mine, its in zip(state.tested.parameters(), plain.tested.parameters(), strict=True):  # the average
        # Adam moves a number by about its rate at every step, and a gradient near 0 may have either sign.
        noise = 0.1 * recipe.max_lr * its.numel() ** 0.5 if (optimizer, precision) == ("adam", "bfloat16") else 1e-3
        assert (mine - its).norm() < 0.1 * its.norm() + noise


@pytest.mark.cuda
def test_a_second_seed_in_the_graphs_of_the_first_trains_as_it_would_alone():
    recipe = made(sam_share=0.5, width=16, ema_decay=0.9, ema_every=2, max_lr=0.01)  # at a higher rate rounding grows a hundredfold
    device = torch.device("cuda")
    first, loader, evaluation = begun(recipe, device)
    captured = CapturedEpoch(first, loader)
    captured.capture()
    trained(first, loader, evaluation, captured)
    alone, loader, evaluation = begun(recipe.replace(seed=1), device)
    losses = trained(alone, loader, evaluation, engine.plain_epoch)
    state, loader, evaluation = begun(recipe.replace(seed=1), device)
    state = captured.adopt(state, loader)
    assert trained(state, loader, evaluation, captured) == pytest.approx(losses, rel=0.02)


UNCAPTURED = """
import sys
from cifar_resnet import Recipe, repeat
from cifar_resnet.training import capture

step = capture.train_step
capture.train_step = lambda *given: (step(*given), given[0].totals.sum().item())[0]  # waits for the GPU, which a capture forbids
recipe = Recipe.build("digits", epochs=2, width=8, train_limit=200)
repeat(recipe, 2, sys.argv[1], device="cuda", progress=True)
"""


@pytest.mark.cuda
def test_a_step_that_cannot_be_captured_trains_as_before(tmp_path):
    """In a process of its own, as a capture that failed may leave its process unable to capture another. It is tried for one seed."""
    command = [sys.executable, "-c", UNCAPTURED, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert " ".join((done.stdout + done.stderr).split()).count("the step cannot be captured as a graph") == 1
    for seed in (0, 1):
        metrics = json.loads((tmp_path / "run" / f"s{seed}" / "metrics.json").read_text("utf-8"))
        assert metrics["environment"]["captured"] is False
        assert metrics["final"]["train_loss"] < 2.6


@pytest.mark.cuda
def test_no_captured_step_waits_for_the_gpu():
    recipe = made(sam_share=0.5, width=16, ema_decay=0.9, ema_every=2)
    state, loader, _ = begun(recipe, torch.device("cuda"))
    captured = CapturedEpoch(state, loader)
    captured.capture()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(captured(state, loader))) == loader.steps
    finally:
        torch.cuda.set_sync_debug_mode("default")
