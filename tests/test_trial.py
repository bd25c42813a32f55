"""The script that compares recipes over paired seeds."""

import json
import math
from contextlib import nullcontext

import levers
import numpy as np
import pytest
import torch
import trial
from scipy import stats
from torch import nn

from cifar_resnet import CifarResnetError, Recipe, load_checkpoint
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.jobs.bench import _random_split
from cifar_resnet.training import engine

CPU = torch.device("cpu")

TINY = {"recipe": "digits", "epochs": 2, "holdout": 40, "width": 4, "train_limit": 60, "test_limit": 20, "batch_size": 20}
QUESTION = {"question": "?", "expected": "nothing", "common": TINY, "arms": {"slow": {}, "fast": {"max_lr": 0.2}}, "seeds": 2}


def called(tmp_path, content):
    """What a call of the script leaves in its file."""
    file = tmp_path / "trial.json"
    file.write_text(json.dumps(content))
    trial.main([str(file), "--runs", str(tmp_path / "runs"), "--device", "cpu"])
    return json.loads(file.read_text("utf-8"))


def rows(*accuracies):
    """Results of two arms, by seed."""
    of = dict(loss=1.0, seconds=1.0, pflop=0.1)
    return [{"arm": arm, "seed": seed, "accuracy": value, **of} for arm, seed, value in accuracies]


def test_arms_take_turns_and_a_second_call_trains_only_what_is_missing(tmp_path, capsys, no_figures):
    content = called(tmp_path, QUESTION)
    assert [(row["arm"], row["seed"]) for row in content["results"]] == [("slow", 0), ("fast", 0), ("slow", 1), ("fast", 1)]
    kept = content["results"][1:]
    kept[0]["accuracy"] = 77.0  # trained again, this would be another figure
    capsys.readouterr()
    content = called(tmp_path, {**content, "results": kept})
    assert capsys.readouterr().out.startswith("slow, seed 0")
    assert content["results"][:3] == kept
    assert len(content["results"]) == 4


def test_the_interval_is_that_of_a_paired_t_test():
    control, other = [90.1, 91.0, 90.4, 89.9], [90.6, 91.1, 91.2, 90.1]
    runs = [("a", seed, value) for seed, value in enumerate(control)] + [("b", seed, value) for seed, value in enumerate(other)]
    mean, half = trial.summary({"arms": {"a": {}, "b": {}}, "results": rows(*runs)})[1]["difference"]
    expected = stats.ttest_rel(other, control).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


def test_one_pair_has_no_interval_and_a_seed_of_one_arm_alone_is_no_pair():
    content = {"arms": {"a": {}, "b": {}}, "results": rows(("a", 0, 90.0), ("b", 0, 91.0), ("b", 1, 99.0))}
    row = trial.summary(content)[1]
    assert row["pairs"] == 1
    assert row["difference"] == (1.0, math.inf)
    assert "no interval; 1 pairs" in trial.table(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"common": {**TINY, "holdout": 0}}, "holdout"),
        ({"arms": {"a": {"max_lr": -1}}}, "--max-lr -1"),
        ({"arms": {"a": {"no_such": 1}}}, "--no-such"),
        ({"factors": {"a": {"max_lr": 0.1}, "b": {"max_lr": 0.2}}}, "two factors change max_lr"),
        ({"arms": {"a": {"levers": ["resise"]}}}, "a: there is no lever resise; there are first convolution not trained, "),
    ],
)
def test_what_cannot_be_tried_is_said(change, said, tmp_path):
    with pytest.raises((SystemExit, CifarResnetError), match=said):
        called(tmp_path, {**QUESTION, **change})


@pytest.mark.slow
def test_a_lever_changes_its_arm_alone(tmp_path):
    content = called(tmp_path, {**QUESTION, "arms": {"control": {}, "floor": {"levers": ["floor"]}, "again": {}}, "seeds": 1})
    control, changed, again = content["results"]
    assert control["loss"] == again["loss"] != changed["loss"]
    assert control["pflop"] == pytest.approx(changed["pflop"])


FACTORS = {f"factor {number}": {"max_lr": 0.1 + number / 100} for number in range(1, 8)}


@pytest.mark.parametrize("count", range(1, 8))
def test_each_two_factors_of_a_design_meet_in_a_quarter_of_its_arms(count):
    factors = dict(list(FACTORS.items())[:count])
    arms, chosen = trial.design(factors)
    assert list(arms)[0] == "none"
    assert len(arms) == [2, 4, 4, 8, 8, 8, 8][count - 1]
    for name in factors:
        assert sum(name in on for on in chosen.values()) == len(arms) / 2
        for other in set(factors) - {name}:
            assert sum({name, other} <= set(on) for on in chosen.values()) == len(arms) / 4


def test_an_arm_of_a_design_has_the_changes_of_its_factors():
    factors = {"a": {"momentum": 0.8}, "b": {"levers": ["floor"], "pad": 1}, "c": {"levers": ["resize"]}}
    arms, _ = trial.design(factors)
    assert arms == {
        "none": {"levers": []},
        "1+3": {"momentum": 0.8, "levers": ["resize"]},
        "2+3": {"pad": 1, "levers": ["floor", "resize"]},
        "1+2": {"momentum": 0.8, "pad": 1, "levers": ["floor"]},
    }


def test_effects_are_differences_of_means_with_the_interval_of_what_they_leave_over():
    """Of a whole design, by the formulas for balanced designs (Box, Hunter and Hunter 2005, chapter 5)."""
    rng, seeds = np.random.default_rng(0), range(3)
    _, chosen = trial.design(FACTORS)
    true = dict(zip(FACTORS, [0.5, -0.3, 0.0, 0.2, 0.0, 0.0, -0.1], strict=True))
    runs = [(arm, seed, 90 + seed + sum(map(true.get, on)) + rng.normal(0, 0.1)) for seed in seeds for arm, on in chosen.items()]
    content = {"factors": FACTORS, "results": rows(*runs)}
    left, by_seed = [], {seed: np.mean([value for _, at, value in runs if at == seed]) for seed in seeds}
    found = {row["factor"]: row for row in trial.effects(content)}
    for arm, seed, value in runs:
        told = sum(row["effect"] * (0.5 if name in chosen[arm] else -0.5) for name, row in found.items())
        left.append(value - by_seed[seed] - told)
    free = len(runs) - 7 - 3
    half = stats.t.ppf(0.975, free) * np.sqrt(np.square(left).sum() / free * 4 / len(runs))
    for name, row in found.items():
        with_it = np.mean([value for arm, _, value in runs if name in chosen[arm]])
        without = np.mean([value for arm, _, value in runs if name not in chosen[arm]])
        assert row["effect"] == pytest.approx(with_it - without)
        assert abs(row["effect"] - true[name]) < 2 * half
        assert row["half"] == pytest.approx(half)
    assert "| 1. factor 1 | 12, " in trial.table(content)
    for few in (0, 1, 7):  # too few to tell the effects
        assert trial.table({**content, "results": content["results"][:few]}) == trial.arms_table({**content, "results": content["results"][:few]})
    assert trial.table({**content, "results": content["results"][:8]}).count("(no interval)") == 7
    one_lost = {**content, "results": content["results"][:-1]}
    assert [row["effect"] for row in trial.effects(one_lost)] == pytest.approx(list(true.values()), abs=0.2)


def test_a_trial_of_factors_trains_the_arms_of_its_design(tmp_path, no_figures):
    content = called(tmp_path, {**{k: v for k, v in QUESTION.items() if k != "arms"}, "factors": {"fast": {"max_lr": 0.2}}})
    assert [(row["arm"], row["seed"]) for row in content["results"]] == [("none", 0), ("1", 0), ("none", 1), ("1", 1)]
    assert load_checkpoint(tmp_path / "runs" / "1-s0").recipe.max_lr == 0.2


@pytest.fixture
def recipe():
    mean = dict(mean=(0.5,) * 3, std=(0.2,) * 3)
    return Recipe.build("default", width=4, epochs=4, batch_size=8, sam_share=0.5, precision="float32", **mean)


def test_small_images_come_first_and_any_size_goes_through_the_network(recipe):
    loader, seen = TensorLoader(_random_split(16), recipe, CPU), []
    with levers.resize(recipe):
        state = engine.start(recipe, CPU)
        logits = state.model.logits
        state.forward = lambda images: (seen.append(tuple(images.shape[2:])), logits(images))[1]
        for _ in engine.train(state, loader, lambda: loader.plain(16)):
            pass
    assert [seen[at] for at in (0, 1, 2, 3)] == [(20, 20), (20, 20), (24, 24), (24, 24)]
    assert set(seen[4:]) == {(32, 32)}
    assert levers.cost_of_resizing(recipe) == pytest.approx(0.15 * (20 / 32) ** 2 + 0.35 * (24 / 32) ** 2 + 0.5)
    images = torch.randn(2, 3, 32, 32)
    plain = engine.start(recipe, CPU).model
    plain.load_state_dict(state.model.state_dict())
    assert torch.equal(plain.eval().logits(images), state.model.eval().logits(images))


def test_half_of_the_sharpness_aware_steps_are_plain(recipe):
    with levers.sam_every_other_step(recipe):
        steps = [engine.rates_at(recipe, step, 20).sam for step in range(20)]
    assert steps == [False] * 10 + [True, False] * 5
    assert levers.LEVERS["sam every other step"][1](recipe) == 1.25 / 1.5


def test_lookahead_sets_the_weights_to_their_average_every_five_steps(recipe):
    """Against a loop that says so in as many words; 4 epochs of 3 steps."""
    averages, finals = [], []
    for by_lever in (True, False):
        loader = TensorLoader(_random_split(24), recipe, CPU)
        with levers.lookahead(recipe) if by_lever else nullcontext():
            state = engine.start(recipe, CPU)
            if not by_lever:
                norms = [module for module in state.model.modules() if isinstance(module, nn.BatchNorm2d)]
                for norm in norms:
                    norm.momentum = 0.4
                averages = {name: value.clone() for name, value in state.model.state_dict().items()}
            for record in engine.train(state, loader, lambda loader=loader: loader.plain(24), engine.plain_epoch):
                step = 3 * state.epoch + state.step
                if isinstance(record, engine.Step) and not by_lever and step in (5, 10, 12):
                    kept = {5: 0.95**5 * (5 / 12) ** 3, 10: 0.95**5 * (10 / 12) ** 3, 12: 1.0}[step]
                    for name, value in state.model.state_dict().items():
                        if value.is_floating_point():
                            averages[name] = kept * averages[name] + (1 - kept) * value
                            value.copy_(averages[name])
        finals.append(state.model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], rtol=1e-4, atol=1e-5)


def short_run(recipe, lever=nullcontext):
    """Losses of a run on 24 random images, with the lever, and the state after it."""
    loader = TensorLoader(_random_split(24), recipe, CPU)
    with lever(recipe) if lever is not nullcontext else nullcontext():
        state = engine.start(recipe, CPU)
        records = list(engine.train(state, loader, lambda: loader.plain(24)))
    return [float(record.loss) for record in records if isinstance(record, engine.Step)], state


def test_gradients_further_along_the_momentum_replace_the_second_pass(recipe, monkeypatch):
    """The images go through once a step, with weights that stand ahead along the momentum by the radius, and are put back."""
    places, passes = [], []
    backward, climb = engine._backward, levers.optim._climb
    monkeypatch.setattr(engine, "_backward", lambda state, batch: (passes.append(1), backward(state, batch))[1])

    def watched(weights, directions, radius):
        before = [weight.detach().clone() for weight in weights]
        climb(weights, directions, radius)
        norms = [weight.norm() for weight in before]
        moved = [weight.detach() - kept for weight, kept in zip(weights, before, strict=True)]
        slope = sum((move * direction).sum() for move, direction in zip(moved, directions, strict=True))
        length = torch.stack([move.norm() / norm for move, norm in zip(moved, norms, strict=True)]).norm()
        places.append((float(slope), float(length)))

    monkeypatch.setattr(levers.optim, "_climb", watched)
    losses, _ = short_run(recipe, levers.sam_along_momentum)
    assert len(passes) == len(losses) == 12
    assert len(places) == 6  # half of the steps are sharpness-aware
    assert all(slope < 0 for slope, _ in places)
    assert [length for _, length in places] == pytest.approx([recipe.sam_radius] * 6, rel=1e-4)
    plain, _ = short_run(recipe.replace(sam_share=0.0))
    assert losses[:6] == plain[:6]
    assert losses[6:] != plain[6:]
    passes.clear()
    before, _ = short_run(recipe, levers.LEVERS["sam along momentum before"][0])
    assert len(passes) == 6 + 2 * 6  # the sharpness-aware steps have their second pass
    assert before[0] == plain[0]  # there is no momentum yet
    assert before[1:6] != plain[1:6]


def test_holes_end_before_the_run(recipe):
    recipe = recipe.replace(epochs=16)
    loader = TensorLoader(_random_split(24), recipe, CPU)
    with levers.no_holes_at_the_end(recipe):
        without = [bool((loader.draw(epoch)[:, 4:] == -32).all()) for epoch in range(16)]
    assert without == [False] * 14 + [True] * 2
    assert (loader.draw(15)[:, 4:] >= 0).all()


def test_the_schedule_ends_before_its_floor(recipe):
    rates = [engine.rates_at(recipe, step, 36).lr for step in range(36)]
    with levers.floor(recipe):
        found = [engine.rates_at(recipe, step, 40) for step in range(40)]
    assert [each.lr for each in found] == rates + [rates[-1]] * 4
    assert [each.sam for each in found] == [False] * 20 + [True] * 20


def test_biases_of_batchnorm_train_at_a_rate_of_their_own(recipe):
    """The first step, without weight decay, moves them by so many times as much, and nothing else otherwise."""
    recipe = recipe.replace(epochs=1, batch_size=24, weight_decay=0.0, sam_share=0.0)
    start = engine.start(recipe, CPU).model.state_dict()
    (_, plain), (_, faster) = short_run(recipe), short_run(recipe, levers.LEVERS["bias rate 4"][0])
    biases = {f"{name}.bias" for name, module in plain.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, value in plain.model.named_parameters():
        moved, other = value - start[name], faster.model.state_dict()[name] - start[name]
        torch.testing.assert_close(other, 4 * moved if name in biases else moved, rtol=1e-3, atol=1e-6)


def test_batches_are_balanced_and_an_epoch_has_every_image(recipe):
    recipe = Recipe.build("digits", train_limit=101, batch_size=20)
    with levers.balanced_batches(recipe):
        order = levers.loaders.epoch_order(recipe, 0, 101)
        assert not (order == levers.loaders.epoch_order(recipe, 1, 101)).all()
    assert sorted(order) == list(range(101))
    labels = levers.load(recipe, None, print).train.labels[order]
    for start in range(0, 80, 20):
        assert set(np.bincount(labels[start : start + 20], minlength=10)) <= {1, 2, 3}


def test_a_first_convolution_that_is_not_trained_stays(recipe):
    start = engine.start(recipe, CPU).model.prep[0].weight
    _, trained = short_run(recipe)
    _, kept = short_run(recipe, levers.first_convolution_not_trained)
    assert torch.equal(kept.model.prep[0].weight, start)
    assert not torch.equal(trained.model.prep[0].weight, start)
