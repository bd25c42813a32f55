"""One step, the loop around it, its clock, and what it counts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain import Doubled, PlainTraining, doubled, mean_of
from ranks import random_split
from sklearn.metrics import accuracy_score, log_loss
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import load, with_statistics
from cifar_resnet.data.loaders import TensorLoader, make_loader
from cifar_resnet.data.splits import Split
from cifar_resnet.errors import NonFiniteLossError
from cifar_resnet.training import engine, runtime
from cifar_resnet.training.engine import Clock, Epoch, Rates, Step, rates_at, train_step

CPU = torch.device("cpu")


def small_run(**changes):
    """The default recipe in float32 and 4 channels wide, on 40 digits at batch 16 (steps of 14, 13 and 13); its loaders."""
    fields = dict(
        recipe="default", dataset="digits", width=4, epochs=2, train_limit=40, test_limit=20, batch_size=16, precision="float32"
    )
    recipe = with_statistics(Recipe.build(**{**fields, **changes}))
    data = load(recipe)
    return recipe, TensorLoader(data.train, recipe, CPU), TensorLoader(data.evaluation, recipe, CPU)


def run(recipe, loader, evaluation):
    state = engine.start(recipe, CPU)
    return state, list(engine.train(state, loader, lambda: evaluation.plain(1000)))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def same_optimizer(a, b):
    slots = zip(a.state_dict()["state"].items(), b.state_dict()["state"].items(), strict=True)
    return all(i == j and all(torch.equal(x[key], y[key]) for key in x.keys() | y.keys()) for (i, x), (j, y) in slots)


@pytest.mark.parametrize(
    "changes",
    [
        dict(max_lr=0.05, sam_share=0.75, sam_radius=0.1, ema_decay=0.8, ema_every=2),
        dict(max_lr=0.05, sam_share=0.0, base_momentum=0.85, momentum=0.95, grad_clip=1e-3, muon_lr_factor=0.5),
        dict(optimizer="sgd", max_lr=0.05, base_momentum=0.85, momentum=0.95, ema_decay=0.8, ema_every=2),
        dict(optimizer="sgd", max_lr=0.05, grad_clip=1e-3, sam_share=0.75),
        dict(optimizer="sgd", max_lr=0.05, sam_share=0.75, batches="even"),
        dict(optimizer="adam", max_lr=1e-3, base_momentum=0.85, momentum=0.95, output="softmax", logit_scale=1.0),
        dict(optimizer="adamw", max_lr=1e-3, weight_decay=0.1),
        dict(optimizer="sgd", max_lr=0.01, output="log-softmax", loss="nll", label_smoothing=0.0, logit_scale=1.0),
    ],
    ids=str,
)
def test_the_loop_is_the_plain_one(changes):
    """Six steps, the peak among them: losses, rates, weights and averaged weights.

    In float64, but for the loss: in float32 the rounding of the first step would grow a thousandfold by the third. Steps of 8 and
    4 images round nothing there. Even ones, of 7 and 6, do. The images are noise: in the flat parts of digits pixels are equal but
    for their rounding, and which of them is the largest of its pool would depend on the processor.
    """
    recipe, _, evaluation = small_run(epochs=4, train_limit=20, batch_size=8, **{"batches": "fixed", **changes})
    loader = TensorLoader(random_split(20), recipe, CPU)
    rounding = 1 if recipe.batches == "fixed" else 10
    state, plain = doubled(engine.start(recipe, CPU)), PlainTraining(recipe, total_steps=12)
    records = engine.train(state, Doubled(loader), lambda: Doubled(evaluation).plain(1000))
    for images, labels, weight in [batch for epoch in (0, 1) for batch in Doubled(loader).epoch(epoch)]:
        record = next(records)
        record = next(records) if isinstance(record, Epoch) else record
        assert record.lr == pytest.approx(plain.lr, abs=1e-12)
        assert float(record.loss) == pytest.approx(plain.step(images, labels, weight), rel=1e-5 * rounding)
    compared = [(state.model, plain.weights())] + ([(state.averaged, plain.average())] if recipe.ema_decay else [])
    for model, expected in compared:
        for name, value in expected.items():
            assert float((model.state_dict()[name] - value).norm() / value.norm()) < 1e-4 * rounding, name


def test_the_average_after_few_updates_weighs_the_random_start_by_nothing():
    recipe, loader, evaluation = small_run(ema_decay=0.999, ema_every=2, max_lr=0.02)
    state, kept = engine.start(recipe, CPU), []
    for tensor in (tensor for tensor in state.averaged.state_dict().values() if tensor.is_floating_point()):
        tensor.fill_(1e6)  # any part of it would show
    steps = (record for record in engine.train(state, loader, lambda: evaluation.plain(1000)) if isinstance(record, Step))
    for done, _ in enumerate(steps, start=1):
        if done % 2 == 0:
            kept.append({name: tensor.clone() for name, tensor in state.model.state_dict().items()})
    assert len(kept) == 3
    for name, value in mean_of(kept, [0.999**2, 0.999, 1.0]).items():
        torch.testing.assert_close(state.averaged.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_where_no_update_comes_the_average_is_the_weights():
    """An epoch that ends before the first update is judged by the weights themselves, not by those before training."""
    recipe, loader, evaluation = small_run(ema_decay=0.9, ema_every=1000, max_lr=0.02)
    state, plain = engine.start(recipe, CPU), engine.start(recipe.replace(ema_decay=0.0), CPU)
    averaged, usual = (
        [record.metrics for record in engine.train(each, loader, evaluation.plain) if isinstance(record, engine.Epoch)]
        for each in (state, plain)
    )
    for with_average, without in zip(averaged, usual, strict=True):
        for name in ("train_loss", "test_loss", "test_accuracy"):
            assert with_average[name] == without[name]


@pytest.mark.parametrize(("share", "first"), [(0.0, 96), (0.25, 72), (0.26, 71), (1.0, 0)])
def test_the_last_share_of_the_run_is_in_sharpness_aware_steps(share, first):
    recipe = Recipe(sam_share=share)
    assert [rates_at(recipe, step, 96).sam for step in range(96)] == [step >= first for step in range(96)]


def test_the_metrics_are_means_over_the_images():
    recipe, loader, evaluation = small_run(max_lr=0.02)
    state = engine.start(recipe, CPU)
    sizes, losses = [14, 13, 13], []
    for record in engine.train(state, loader, lambda: evaluation.plain(7)):
        if isinstance(record, Step):
            losses.append(float(record.loss))
            continue
        metrics = record.metrics
        assert metrics["train_loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-5)
        logits, labels = engine.predict_logits(recipe, state.model, evaluation.plain(1000), CPU)
        assert metrics["test_accuracy"] == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))
        assert metrics["test_loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(10)), rel=1e-5)
        assert metrics["images_per_second"] == pytest.approx(40 / metrics["seconds"])
        losses = []
    assert [row["epoch"] for row in state.history] == [1, 2]


def test_train_accuracy_counts_the_hits_of_every_step():
    """Of the output before each step, in training mode."""
    recipe, loader, _ = small_run(max_lr=0.02)
    state, hits = engine.start(recipe, CPU), []
    state.model.register_forward_hook(lambda _module, _images, output: hits.append(output.argmax(1)))
    labels = torch.cat([batch.labels for batch in loader.epoch(0)])
    record = next(each for each in engine.train(state, loader, lambda: loader.plain(1000)) if isinstance(each, Epoch))
    assert len(hits) == 3  # of the training steps: the evaluation calls `logits`
    assert record.metrics["train_accuracy"] == pytest.approx(100 * accuracy_score(labels, torch.cat(hits)))


def test_twice_the_same_recipe_gives_the_same_bits():
    (a, _), (b, _) = (
        run(*small_run(precision="bfloat16", train_limit=20, batch_size=8, ema_decay=0.9, ema_every=2)) for _ in range(2)
    )
    assert same_weights(a.model, b.model)
    assert same_weights(a.averaged, b.averaged)
    assert [row["test_loss"] for row in a.history] == [row["test_loss"] for row in b.history]


@pytest.mark.parametrize("batches", ["even", "fixed"])
def test_a_run_goes_on_in_the_middle_of_an_epoch_where_its_state_stands(batches):
    recipe, loader, evaluation = small_run(ema_decay=0.9, ema_every=2, batches=batches)
    whole, _ = run(recipe, loader, evaluation)
    state = engine.start(recipe, CPU)
    begun = engine.train(state, loader, lambda: evaluation.plain(1000))
    while (state.epoch, state.step) != (1, 2):
        next(begun)
    assert len(list(engine.train(state, loader, lambda: evaluation.plain(1000)))) == 2  # the last step, and the epoch
    assert same_weights(state.model, whole.model)
    assert same_weights(state.averaged, whole.averaged)
    assert [row["train_loss"] for row in state.history] == [row["train_loss"] for row in whole.history]


def test_an_image_more_than_whole_batches_costs_no_accuracy():
    """49 images of two grey levels at batch 16. With a last step of its own the odd image leaves half of the others wrong."""
    rng, labels = np.random.default_rng(0), np.arange(49) % 2
    images = (rng.integers(0, 80, (49, 32, 32, 3)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    fields = dict(optimizer="sgd", max_lr=0.05, epochs=6, sam_share=0.0, batch_size=16, width=16, seed=1, precision="float32")
    recipe = with_statistics(Recipe.build("default", **fields))
    loader = TensorLoader(Split(images, labels, np.arange(49)), recipe, CPU)
    state = engine.start(recipe, CPU, classes=2)
    *_, last = engine.train(state, loader, lambda: loader.plain(49))
    assert last.metrics["test_accuracy"] == 100
    assert last.metrics["test_loss"] < 0.3


def test_bfloat16_and_float32_agree_at_the_first_step():
    losses = []
    for precision in ("float32", "bfloat16"):
        recipe, loader, _ = small_run(precision=precision, width=8)
        losses.append(float(next(engine.train(engine.start(recipe, CPU), loader, lambda: ())).loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    recipe, loader, evaluation = small_run(max_lr=0.1)
    state, seen = engine.start(recipe, CPU), 0
    with pytest.raises(NonFiniteLossError, match=r"step 2 of epoch 1 \(LR .*--max-lr"):  # noqa: PT012
        for _ in engine.train(state, loader, lambda: evaluation.plain(1000)):
            seen += 1
            state.model.fc.weight.data.fill_(float("inf"))
    assert seen == 3  # the epoch's end is where it is read
    with pytest.raises(NonFiniteLossError):
        state.check_finite(loader.steps)


def test_weights_that_are_not_finite_are_noticed_before_a_loss_is():
    recipe, loader, _ = small_run()
    state = engine.start(recipe, CPU)
    state.check_finite(loader.steps)
    state.step = 1
    state.model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="step 1 of epoch 1"):
        state.check_finite(loader.steps)


def test_the_logits_of_a_view_are_those_of_the_images_that_it_shows():
    recipe, _, evaluation = small_run()
    model, split = engine.start(recipe, CPU).model, load(recipe).evaluation
    mirrored, labels = engine.predict_logits(recipe, model, evaluation.plain(7), CPU, lambda images: images.flip(3))
    flipped = Split(split.images[:, :, ::-1].copy(), split.labels, split.indices)
    by_hand, _ = engine.predict_logits(recipe, model, TensorLoader(flipped, recipe, CPU).plain(1000), CPU)
    torch.testing.assert_close(mirrored, by_hand)
    assert labels.tolist() == split.labels.tolist()
    assert not torch.equal(mirrored, engine.predict_logits(recipe, model, evaluation.plain(7), CPU)[0])


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adam", "adamw"])
def test_a_step_takes_its_rates_as_numbers_or_as_tensors_with_the_same_bits(optimizer):
    fields = dict(optimizer=optimizer, max_lr=1e-2, ema_decay=0.9, ema_every=1, sam_share=0.5)
    recipe, loader, _ = small_run(**fields)
    numbers, tensors = engine.start(recipe, CPU), engine.start(recipe, CPU)
    batches = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    for step, batch in enumerate(batches):
        rates = rates_at(recipe, step, len(batches))
        on_device = Rates(
            step=torch.tensor(step),
            lr=torch.tensor(rates.lr, dtype=torch.float64),
            momentum=rates.momentum,
            sam=rates.sam,
            average=torch.tensor(rates.average),
        )
        assert torch.equal(train_step(numbers, batch, rates), train_step(tensors, batch, on_device))
    assert same_weights(numbers.model, tensors.model)
    assert same_weights(numbers.averaged, tensors.averaged)
    assert same_optimizer(numbers.optimizer, tensors.optimizer)
    assert torch.equal(numbers.totals, tensors.totals)
    assert not same_weights(numbers.model, engine.start(recipe, CPU).model)  # it has trained


def test_a_step_leaves_the_course_of_the_run_to_the_loop_and_remembers_the_first_bad_loss():
    recipe, loader, _ = small_run(sam_share=0.0)
    state, batch = engine.start(recipe, CPU), next(loader.epoch(0))
    loss = train_step(state, batch, Rates(step=5, lr=1e-3, momentum=0.9))
    assert (state.epoch, state.step, state.history, state.clock.seconds, int(state.bad_step)) == (0, 0, [], 0.0, -1)
    assert float(state.totals[0]) == pytest.approx(14 * float(loss))
    assert all(parameter.grad is None for parameter in state.model.parameters())
    state.model.fc.weight.data.fill_(float("inf"))
    for step in (6, 7):
        train_step(state, batch, Rates(step=step, lr=1e-3, momentum=0.9))
    assert int(state.bad_step) == 6


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a GPU: values read by the host, sizes that depend on values, masks as indices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert function.overloadpacket not in (aten._local_scalar_dense, aten.nonzero, aten.masked_select), function
        if function.overloadpacket is aten.index:
            assert all(index is None or index.dtype is torch.int64 for index in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adam"])
def test_no_step_reads_from_the_device(optimizer):
    fields = dict(
        optimizer=optimizer,
        max_lr=1e-3,
        ema_decay=0.9,
        ema_every=2,
        sam_share=1.0,
        grad_clip=0.1,
        precision="bfloat16",
        train_limit=24,
        batch_size=8,
    )
    recipe, loader, _ = small_run(**fields)
    records = engine.train(engine.start(recipe, CPU), loader, lambda: ())
    table, step = loader.draw(0), torch.tensor(1)
    with NoReads():
        loader.batch(table, step, loader.sizes[1])
        while next(records).step < loader.steps:
            pass
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        next(records)  # the end of the epoch


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adam"])
@pytest.mark.parametrize("kind", ["tensor", "albumentations"])
def test_no_step_waits_for_the_gpu(kind, optimizer):
    fields = dict(optimizer=optimizer, max_lr=1e-3, ema_decay=0.9, ema_every=2, sam_share=1.0, grad_clip=0.1)
    recipe, _, _ = small_run(precision="bfloat16", train_limit=100, **fields)
    cuda = torch.device("cuda")
    loader = make_loader(load(recipe).train, recipe, cuda, kind)
    records = engine.train(engine.start(recipe, cuda), loader, lambda: ())
    next(records)  # allocates, and looks for the fastest algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        while next(records).step < loader.steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loader.close()


class PretendedDevice:
    """A clock, and a device with a queue: time passes where the host works, and where it waits for what is queued."""

    def __init__(self, monkeypatch):
        self.now, self.queued = 0.0, 0.0
        monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(engine, "wait_for", lambda device: self.wait())

    def work(self, host, device=0.0):
        """The host works, and the device with it on what is queued; then more is queued."""
        self.now += host
        self.queued = max(self.queued - host, 0.0) + device

    def wait(self):
        self.now, self.queued = self.now + self.queued, 0.0


def test_the_clock_waits_for_the_device_at_both_ends_and_stands_still_while_paused(monkeypatch):
    device, clock = PretendedDevice(monkeypatch), Clock(CPU)
    device.work(5, 30)  # before: not counted, even where the device goes on with it
    clock.start()
    device.work(1, 3)
    with clock.paused():
        assert clock.seconds == 4
        device.work(50, 60)
    device.work(2, 2)
    clock.stop()
    assert clock.seconds == 8
    device.work(7)
    clock.stop()  # stopped already
    with pytest.raises(KeyboardInterrupt), clock.paused():  # noqa: PT012, as where a run is stopped while it saves
        device.work(9)
        raise KeyboardInterrupt
    device.work(11)  # it was not running before, and is not now
    clock.stop()
    assert clock.seconds == 8
    clock.start()
    device.work(1)
    clock.stop()
    assert clock.seconds == 9


@pytest.mark.parametrize(
    ("reads", "saves", "seconds"), [(False, False, 10), (True, False, 12), (False, True, 11), (True, True, 12)]
)
def test_an_epochs_seconds_are_its_steps_and_what_is_read_of_them(monkeypatch, reads, saves, seconds):
    """Three steps of a second on the host and three on the device: overlapped, or waited for by a watcher that reads the loss.

    Evaluation, saving and what was queued before are not counted.
    """
    recipe, loader, evaluation = small_run()
    state, device = engine.start(recipe, CPU), PretendedDevice(monkeypatch)

    def steps(state, loader):
        for _ in range(state.step, loader.steps):
            device.work(1, 3)
            yield torch.tensor(1.0)

    def evaluate():
        device.work(100, 100)
        return evaluation.plain(1000)

    device.work(0, 50)
    for record in engine.train(state, loader, evaluate, steps):
        if isinstance(record, Step):
            if reads:
                device.wait()  # float(record.loss)
            if saves and record.step == 2:
                with state.clock.paused():
                    device.work(20, 20)
    assert [row["seconds"] for row in state.history] == [seconds, seconds]
    assert [row["images_per_second"] for row in state.history] == [40 / seconds] * 2


def test_only_a_device_with_a_queue_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    runtime.wait_for(CPU)
    runtime.wait_for(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]
