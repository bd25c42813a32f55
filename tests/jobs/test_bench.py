import json
import statistics
import sys

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch.utils.flop_counter import FlopCounterMode

import cifar_resnet
from cifar_resnet import Recipe, build_model
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.jobs import bench
from cifar_resnet.training import autotune, convolution, engine
from cifar_resnet.training.fused_cpu import library

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """One step a measurement, a small matrix, few images to evaluate."""
    monkeypatch.setattr(bench, "CPU_SIDE", 64)
    monkeypatch.setattr(bench, "TRAIN_IMAGES", 100)
    monkeypatch.setattr(bench, "EVALUATION_BATCH", 16)
    for name, value in dict(MIN_FLOP=0, MIN_POSITIONS=16, CALL_SECONDS=1e-9).items():
        monkeypatch.setattr(autotune, name, value)
    monkeypatch.setattr(convolution, "MIN_POSITIONS", 1)
    plain = bench.bench
    monkeypatch.setattr(bench, "bench", lambda recipe, **options: plain(recipe, **{**options, "seconds": 1e-9}))


def test_bench_measures_everything_and_its_ratios_are_those_of_its_rounds(cli, small, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "fastest", lambda seconds: "winograd")
    options = (
        "--batch-size",
        4,
        "--width",
        4,
        "--rounds",
        7,
        "--reference",
        "--profile",
        "--workers",
        0,
        "--precision",
        "float32",
        "--json",
        tmp_path / "b.json",
    )
    code, out, err = cli("bench", *options)
    assert (code, err.count("cifar-resnet:")) == (0, 0)
    content = json.loads((tmp_path / "b.json").read_text("utf-8"))
    rounds, medians = content["rounds"], content["medians"]
    names = {"model", "optimizer", "tensor", "albumentations", "evaluation", "matrix product", "torch's convolutions", "plain loop"}
    names |= {"torch's BatchNorm"} if library(torch.float32) else set()
    assert set(rounds) == set(medians) == set(content["options"]["steps"]) == names
    for name, values in rounds.items():
        assert len(values) == 7
        assert min(values) > 0
        assert medians[name] == statistics.median(values)

    flop = content["training_flop_per_image"]
    by_hand = {
        "model alone / with torch's own convolutions": [m / o for m, o in zip(rounds["model"], rounds["torch's convolutions"], strict=True)],
        "optimizer's share of the model alone": [m / o for m, o in zip(rounds["model"], rounds["optimizer"], strict=True)],
        "training, tensor loader / plain loop": [t / p for t, p in zip(rounds["tensor"], rounds["plain loop"], strict=True)],
        "training, tensor loader / matrix product": [
            flop * t / p for t, p in zip(rounds["tensor"], rounds["matrix product"], strict=True)
        ],
    }
    if "torch's BatchNorm" in names:
        own = zip(rounds["model"], rounds["torch's BatchNorm"], strict=True)
        by_hand["model alone / with torch's own BatchNorm"] = [m / o for m, o in own]
    for name, values in by_hand.items():
        row = content["ratios"][name]
        assert row["median"] == pytest.approx(statistics.median(values))
        assert (row["low"], row["high"]) == (pytest.approx(min(values)), pytest.approx(max(values)))  # of 7, so it is for 95 %
        assert f"{row['low']:.3f} to {row['high']:.3f}" in out
    assert len(content["convolutions"]) == 6 * 3
    for each in content["convolutions"]:
        share = each["flop"] / each["seconds"]["winograd"] / medians["matrix product"]
        times = [f"{1000 * each['seconds'][way]:.1f}" for way in ("winograd", "torch")]
        row = next(line for line in out.splitlines() if each["layer"] in line and each["direction"].replace("_", " ") in line)
        assert row.split()[-4:] == ["winograd", *times, f"{share:.2f}"]
    assert content["predicted_seconds"]["training"] == pytest.approx((18 + 2 * 6) * 100 / medians["tensor"])
    peak = content["peak_memory"]["process"]
    assert peak is None if sys.platform == "win32" else 1e8 < peak < 1e11
    assert content["peak_memory"]["device"] is None
    assert {"bfloat16", "threads", "torch", "albumentations", "device_name"} <= set(content["environment"])
    operators = {row["operator"]: row for row in content["profile"]}
    assert operators["_ConvolutionBackward"]["calls"] == 3 * 8  # steps, layers
    assert 0 < sum(row["share"] for row in content["profile"]) < 110


def test_the_plain_loop_is_torchs_own_and_in_float32(monkeypatch):
    seen = []
    convolve = torch.nn.Conv2d.forward

    def watched(self, images):
        seen.append((images.dtype, images.is_contiguous(), len(images)))
        return convolve(self, images)

    class Once:
        asked = iter([True, False])
        recv = staticmethod(asked.__next__)
        sent: list[None] = []
        send = staticmethod(sent.append)

    monkeypatch.setattr(convolution._Convolution, "apply", pytest.fail)
    monkeypatch.setattr(bench, "leave_signals", lambda _: None)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    recipe = Recipe.build(batch_size=2, width=64, optimizer="sgd", precision="bfloat16")
    usual = convolution.Conv3x3(64, 64)._ways(torch.empty(2, 64, 32, 32))
    assert usual == (convolution.WINOGRAD if torch.backends.mkl.is_available() else convolution.TORCH)
    bench._plain_loop(Once, with_statistics(recipe), CPU, 4, 0)
    assert Once.sent == [None]
    assert seen == [(torch.float32, True, 2)] * 8


@pytest.mark.parametrize(("rounds", "rank"), [(6, 1), (9, 2), (15, 4), (40, 14)])
def test_the_interval_of_a_median_holds_it_95_times_of_100(rounds, rank):
    values = np.random.default_rng(0).normal(size=rounds)
    found = bench.ratio(list(values), [1.0] * rounds)
    low, high = sorted(values)[rank - 1], sorted(values)[rounds - rank]
    assert (found["low"], found["high"]) == (low, high)
    assert 1 - 2 * binom.cdf(rank - 1, rounds, 0.5) >= 0.95 > 1 - 2 * binom.cdf(rank, rounds, 0.5)
    assert found["low"] < found["median"] == np.median(values) < found["high"]


@pytest.mark.parametrize("name", ["default", "eva6-s9"])
def test_the_flop_of_training_are_those_that_torch_counts(name):
    """The two differ by the gradient of the images, which nobody computes: 0.15 %."""
    recipe = Recipe.build(name)
    with torch.device("meta"):
        model, images = build_model(recipe), torch.empty(3, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert bench.training_flop(recipe) == pytest.approx(counter.get_total_flops() / 3, rel=0.005)


def test_what_is_timed_as_training_is_what_a_run_does(monkeypatch):
    """Over an epoch's end: the weights of plain steps with the loop's own batches and rates."""
    recipe = with_statistics(Recipe.build("default", batch_size=8, epochs=2, width=4, precision="float32", sam_share=0.9))
    loader, states, start = TensorLoader(bench._random_split(20), recipe, CPU), [], engine.start

    def remember(*arguments, **more):
        states.append(start(*arguments, **more))
        return states[-1]

    monkeypatch.setattr(engine, "start", remember)
    steps = bench._training(recipe, CPU, loader, "auto", {})
    for _ in range(5):
        next(steps)
    (timed,) = states
    whole = start(recipe.replace(sam_share=0.0), CPU)
    records = engine.train(whole, loader, lambda: loader.plain(20))
    taken = 0
    while taken < 5:
        taken += isinstance(next(records), engine.Step)
    assert all(torch.equal(a, b) for a, b in zip(timed.model.parameters(), whole.model.parameters(), strict=True))
    assert not torch.equal(timed.model.fc.weight, start(recipe, CPU).model.fc.weight)


def test_the_model_alone_is_the_first_step_of_a_run_on_noise(monkeypatch):
    """Against torch's own SGD."""
    fields = dict(batch_size=8, width=4, precision="float32", optimizer="sgd", sam_share=0.9)
    recipe, states, start = with_statistics(Recipe.build("default", **fields)), [], engine.start
    monkeypatch.setattr(engine, "start", lambda *given, **more: states.append(start(*given, **more)) or states[-1])
    torch.manual_seed(0)
    step = bench._model_alone(recipe, CPU, "auto", {})
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(8) % 10
    model = build_model(recipe).train()
    lr = recipe.max_lr / recipe.div_factor
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    for _ in range(2):
        step()
        torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(states[0].model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(model.fc.weight, build_model(recipe).fc.weight, rtol=1e-4, atol=1e-6)


def test_wrong_usage_of_bench_is_refused_in_one_line(refused, tmp_path):
    assert "--rounds 5 must be at least 6" in refused(2, "bench", "--rounds", 5)
    assert "--workers -1" in refused(2, "bench", "--workers", -1, "--width", 1, "--batch-size", 1)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(1, "bench", "--json", tmp_path / "file" / "b.json")
    assert f"{tmp_path} cannot be written: it is a folder" in refused(1, "bench", "--json", tmp_path)
    assert cifar_resnet.bench is bench.bench
