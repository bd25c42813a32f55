import json
import statistics

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch.utils.flop_counter import FlopCounterMode

import cifar_resnet
from cifar_resnet import Recipe, benchmark, engine, winograd
from cifar_resnet.data import with_statistics

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """One step a measurement, a small matrix, few images to evaluate."""
    monkeypatch.setattr(benchmark, "CPU_SIDE", 64)
    monkeypatch.setattr(benchmark, "TRAIN_IMAGES", 100)
    monkeypatch.setattr(engine, "EVALUATION_BATCH", 16)
    plain = benchmark.bench
    monkeypatch.setattr(benchmark, "bench", lambda recipe, **options: plain(recipe, **{**options, "seconds": 0.0}))


def test_bench_measures_everything_and_its_ratios_are_those_of_its_rounds(cli, small, tmp_path):
    options = ("--batch-size", 4, "--rounds", 7, "--reference", "--profile", "--optimizer", "sgd", "--json", tmp_path / "b.json")
    code, out, err = cli("bench", *options)
    assert (code, err.count("cifar-resnet:")) == (0, 0)
    content = json.loads((tmp_path / "b.json").read_text())
    rounds, medians = content["rounds"], content["medians"]
    names = {"model", "optimizer", "tensor", "albumentations", "evaluation", "matrix product", "plain loop"}
    assert set(rounds) == set(medians) == set(content["options"]["steps"]) == names
    for name, values in rounds.items():
        assert len(values) == 7
        assert min(values) > 0
        assert medians[name] == statistics.median(values)

    flop = content["training_flop_per_image"]
    by_hand = {
        "optimizer's share of the model alone": [m / o for m, o in zip(rounds["model"], rounds["optimizer"], strict=True)],
        "training, tensor loader / plain loop": [t / p for t, p in zip(rounds["tensor"], rounds["plain loop"], strict=True)],
        "training, tensor loader / matrix product": [
            flop * t / p for t, p in zip(rounds["tensor"], rounds["matrix product"], strict=True)
        ],
    }
    for name, values in by_hand.items():
        row = content["ratios"][name]
        assert row["median"] == pytest.approx(statistics.median(values))
        assert (row["low"], row["high"]) == (pytest.approx(min(values)), pytest.approx(max(values)))  # of 7, so it is for 95 %
        assert f"{row['low']:.3f} to {row['high']:.3f}" in out
    assert content["predicted_seconds"]["training"] == pytest.approx((18 + 2 * 6) * 100 / medians["tensor"])
    assert 1e8 < content["peak_memory"]["process"] < 1e11
    assert content["peak_memory"]["device"] is None
    assert {"bfloat16", "threads", "torch", "albumentations", "device_name"} <= set(content["environment"])
    operators = {row["operator"]: row for row in content["profile"]}
    assert operators["aten::native_batch_norm_backward"]["calls"] == 3 * 8
    assert 0 < sum(row["share"] for row in content["profile"]) < 110


def test_the_plain_loop_has_torchs_own_convolutions(monkeypatch):
    def fail(*_):
        raise AssertionError

    class Once:
        asked = iter([True, False])
        recv = staticmethod(asked.__next__)
        sent: list[None] = []
        send = staticmethod(sent.append)

    monkeypatch.setattr(winograd, "MIN_TILES", winograd.MIN_TILES)  # the loop changes it, in a process of its own
    monkeypatch.setattr(winograd._Winograd, "apply", fail)
    monkeypatch.setattr(benchmark, "leave_signals", lambda _: None)
    benchmark._plain_loop(Once, with_statistics(Recipe.build(batch_size=8, optimizer="sgd")), CPU, 16, 0)
    assert Once.sent == [None]


@pytest.mark.parametrize(("rounds", "rank"), [(6, 1), (9, 2), (15, 4), (40, 14)])
def test_the_interval_of_a_median_holds_it_95_times_of_100(rounds, rank):
    values = np.random.default_rng(0).normal(size=rounds)
    found = benchmark.ratio(list(values), [1.0] * rounds)
    low, high = sorted(values)[rank - 1], sorted(values)[rounds - rank]
    assert (found["low"], found["high"]) == (low, high)
    assert 1 - 2 * binom.cdf(rank - 1, rounds, 0.5) >= 0.95 > 1 - 2 * binom.cdf(rank, rounds, 0.5)
    assert found["low"] < found["median"] == np.median(values) < found["high"]


@pytest.mark.parametrize("name", ["default", "eva6-s9"])
def test_the_flop_of_training_are_those_that_torch_counts(name):
    """The two differ by the gradient of the images, which nobody computes: 0.15 %."""
    recipe = Recipe.build(name)
    with torch.device("meta"):
        model, images = engine.build_model(recipe), torch.empty(3, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert benchmark.training_flop(recipe) == pytest.approx(counter.get_total_flops() / 3, rel=0.005)


def test_the_model_alone_trains_as_the_loop_does(narrow):
    """So that the loop is compared with the same work."""
    recipe = with_statistics(Recipe.build(batch_size=8, precision="bfloat16"))
    states, start = [], engine.start

    def remember(*arguments):
        states.append(start(*arguments))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "start", remember)
        torch.manual_seed(0)
        step = benchmark._model_alone(recipe, CPU, "auto", print)
    torch.manual_seed(0)
    batch = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(8) % 10
    endless = type("", (), dict(count=16, steps=benchmark.ENDLESS, epoch=lambda *_: iter([batch, batch])))()
    loop = start(recipe, CPU)
    records = engine.train(recipe, loop, endless, lambda: (), CPU)
    for _ in range(2):
        step()
        next(records)
    assert all(torch.equal(a, b) for a, b in zip(states[0].model.parameters(), loop.model.parameters(), strict=True))
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(recipe.max_lr / recipe.div_factor)


def test_wrong_usage_is_refused_in_one_line(refused, tmp_path):
    assert "--rounds 5 must be at least 6" in refused(2, "bench", "--rounds", 5)
    assert "--workers -1" in refused(2, "bench", "--workers", -1)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(1, "bench", "--json", tmp_path / "file" / "b.json")
    assert cifar_resnet.bench is benchmark.bench
