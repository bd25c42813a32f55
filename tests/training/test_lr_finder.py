"""The range test, the trials after it, and what is read off them. The job around it is in tests/jobs."""

import re
from functools import partial

import numpy as np
import pytest
import torch

from cifar_resnet import Recipe, build_model
from cifar_resnet.data.datasets import load, with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.errors import CifarResnetError, UsageError
from cifar_resnet.training import engine, lr_finder
from cifar_resnet.training.engine import Rates, train_step
from cifar_resnet.training.lr_finder import History, Trial, range_test, run_trials, suggest, usual_steps

CPU = torch.device("cpu")
BEGIN = partial(engine.start, device=CPU)


def made(best=0.3, noise=0.02, points=200, seed=0):
    """A range test's usual shape: flat, falling from 1e-2 on, lowest near `best`, then up."""
    lr = np.geomspace(1e-4, 10, points)
    fall = 1.6 / (1 + (lr / 0.01) ** -1.2)
    loss = 2.3 - fall + 3 * np.maximum(np.log10(lr / best), 0) ** 2
    return History(lr, loss + np.random.default_rng(seed).normal(0, noise, points))


def small(recipe="digits", **changes):
    """A recipe on 72 digits at batch 16 (five steps, of 15 and 14) for a network of width 4, and its loader."""
    fields = dict(dataset="digits", width=4, train_limit=72, batch_size=16, precision="float32")
    recipe = with_statistics(Recipe.build(recipe, **{**fields, **changes}))
    return recipe, TensorLoader(load(recipe).train, recipe, CPU)


def test_steepest_is_torch_lr_finders_own():
    from matplotlib.figure import Figure
    from torch_lr_finder import LRFinder

    history = made()
    model = torch.nn.Linear(1, 1)
    finder = LRFinder(model, torch.optim.SGD(model.parameters(), 0.1), torch.nn.MSELoss(), device="cpu")
    finder.history = {"lr": history.lr.tolist(), "loss": lr_finder.exponential(history.loss).tolist()}
    _, theirs = finder.plot(ax=Figure().subplots(), suggest_lr=True)
    assert suggest(history).steepest == pytest.approx(theirs)


@pytest.mark.parametrize("best", [0.03, 0.3, 1.0])
def test_the_recommendation_is_steady_under_noise(best):
    found = [suggest(made(best=best, seed=seed)) for seed in range(5)]
    highs = [each.max_lr for each in found]
    assert max(highs) / min(highs) < 1.6
    for each in found:
        assert each.min_lr < each.max_lr / 2


def test_the_minimum_is_where_half_of_the_drop_is_done():
    lr = np.geomspace(1e-4, 10, 500)
    loss = np.interp(np.log10(lr), [-4, -3, -1, 0, 1], [2, 2, 1, 1, 5])
    found = suggest(History(lr, loss))
    assert np.log10(found.min_lr) == pytest.approx(-2, abs=0.03)
    assert np.log10(found.max_lr) == pytest.approx(0, abs=0.12)


def test_trials_give_the_maximum_by_a_parabola():
    history, losses = made(noise=0), (1.3, 1.0, 1.02, 1.5)
    trials = [Trial(2.0**power, loss) for power, loss in zip(range(-3, 1), losses, strict=True)]
    found = suggest(history, trials)
    curve = np.polyfit([-3, -2, -1], losses[:3], 2)
    assert np.log2(found.max_lr) == pytest.approx(-curve[1] / (2 * curve[0]))
    assert found.min_lr == suggest(history).min_lr
    assert suggest(history, trials, 243.0).max_lr == pytest.approx(3 * found.max_lr)
    assert suggest(history, [Trial(2.0**power, 1.0) for power in range(3)]).why_not  # no best
    diverged = suggest(history, [*trials[:2], Trial(0.5, np.inf)])
    assert 0.25 / 2**0.5 < diverged.max_lr < 0.25


@pytest.mark.parametrize(
    ("trials", "why_not"),
    [
        ([(0.125, 1.3), (0.25, 1.0)], "from LR 0.125 to 0.25, is not between worse ones"),
        ([(0.25, 1.0), (0.5, 1.02), (1.0, 1.5)], "from LR 0.25 to 1, is not between worse ones"),
        ([(0.5, np.inf), (1.0, np.inf)], "below the first loss, down to LR 0.5"),
        ([(0.5, 2.6), (1.0, 2.5), (2.0, 2.7)], "below the first loss, down to LR 0.5"),
    ],
)
def test_nothing_is_recommended_where_the_trials_show_no_bottom(trials, why_not):
    found = suggest(made(noise=0), [Trial(*each) for each in trials])
    assert (found.max_lr, found.min_lr) == (None, None)
    assert why_not in found.why_not


@pytest.mark.parametrize(
    ("losses", "first_to_last"),
    [
        ({-5: 1.5, -4: 1.4, -3: 1.36, -2: 1.35, -1: 1.46, 0: 2.0}, (-3, -1)),  # found at once
        ({-5: 1.5, -4: 1.4, -3: 1.41, -2: 1.6}, (-5, -2)),  # up, then down
        ({-3: 1.4, -2: 1.3, -1: 1.2, 0: 1.21}, (-3, 0)),
        ({-6: 1.7, -5: 1.5, -4: np.nan, -3: np.inf}, (-6, -3)),
        ({power: 1.5 - 0.01 * power for power in range(-9, 9)}, (-3, 2)),  # no end upward
        ({power: np.inf for power in range(-9, 9)}, (-8, -3)),
    ],
)
def test_trials_go_up_and_down_until_the_best_is_between_worse_ones(monkeypatch, losses, first_to_last):
    """With losses that are given: of a trial's 40 steps the last eight have the one that counts."""

    def given(state, batch, rates):
        return torch.tensor(9.0 if rates.step < 32 else losses[int(np.log2(state.recipe.max_lr))])

    monkeypatch.setattr(lr_finder, "train_step", given)
    recipe, loader = small()
    trials = run_trials(BEGIN, recipe, loader, made(best=0.09, noise=0), steps=40)
    first, last = first_to_last
    expected = [losses[power] for power in range(first, last + 1)]
    assert [trial.max_lr for trial in trials] == [2.0**power for power in range(first, last + 1)]
    assert [trial.loss for trial in trials] == pytest.approx([np.inf if np.isnan(loss) else loss for loss in expected])


@pytest.mark.parametrize(("batches", "sizes"), [("even", {15, 14}), ("fixed", {16})])
def test_a_trial_is_a_short_run_of_the_recipe(batches, sizes):
    """Without what fixed batches leave. Its loss against a hand loop with torch's own optimizer and OneCycleLR, at a low LR, where rounding does not grow."""
    recipe, loader = small(batches=batches, base_momentum=0.8, ema_decay=0.9, sam_share=1.0, sam_radius=1.0)  # a trial goes without the last three
    history, done = made(noise=0)._replace(lr=made().lr / 100), []
    before = torch.random.get_rng_state()
    trials = run_trials(BEGIN, recipe, loader, history, steps=20, progress=lambda *numbers: done.append(numbers))
    assert torch.equal(before, torch.random.get_rng_state())
    assert done[-1] == (20 * len(trials), 20 * max(4, len(trials)))

    first = trials[0]
    model = build_model(recipe).train()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, first.max_lr, total_steps=20, pct_start=recipe.peak_epoch / recipe.epochs, anneal_strategy="linear",
        div_factor=first.max_lr / suggest(history).min_lr, final_div_factor=recipe.final_div_factor, base_momentum=0.8,
        max_momentum=0.9,
    )  # fmt: skip
    whole = [batch for epoch in range(5) for batch in loader.epoch(epoch) if len(batch.labels) in sizes]
    assert {len(batch.labels) for batch in whole} == sizes
    theirs = []
    for images, labels, weight in whole[:20]:
        loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        (weight * loss).backward()
        optimizer.step()
        schedule.step()
        theirs.append(loss.item())
    assert abs(theirs[-1] - theirs[0]) > 0.02  # it learned
    assert first.loss == pytest.approx(np.mean(theirs[-4:]), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 92), ({"batch_size": 512}, 50), ({"epochs": 80, "peak_epoch": 20.0}, 400)], ids=str
)
def test_a_trial_takes_25600_images_or_half_of_the_run(options, steps):
    recipe, loader = small(**{"train_limit": None, "batch_size": 64, **options})
    assert usual_steps(recipe, loader) == steps


def test_a_second_fall_after_the_bottom_is_left_does_not_count():
    """As real range tests of this network show it: down until 0.15, up again until 1, lowest of all at 3."""
    lr = np.geomspace(1e-4, 10, 200)
    loss = np.interp(np.log10(lr), [-4, -3, -0.85, 0, 0.5, 1], [2.33, 2.28, 1.6, 2.0, 1.5, 1.75])
    for seed in range(5):
        found = suggest(History(lr, loss + np.random.default_rng(seed).normal(0, 0.03, 200)))
        assert 0.12 < found.max_lr < 0.3
        assert 0.008 < found.min_lr < 0.012


@pytest.mark.parametrize(("slope", "why_not"), [(0.0, "clearly; try a higher --end-lr"), (0.5, "clearly; try a lower --"), (-0.5, "end of the range; try a higher --end-lr")])
def test_nothing_is_recommended_where_the_loss_never_falls_or_never_stops(slope, why_not):
    lr = np.geomspace(1e-4, 10, 200)
    loss = 2.3 + slope * (np.log10(lr) + 4) + np.random.default_rng(0).normal(0, 0.05, 200)
    found = suggest(History(lr, loss))
    assert (found.max_lr, found.min_lr) == (None, None)
    assert why_not in found.why_not


def curve(start_lr, end_lr, points=100):
    """A part of the usual range test: flat to 1e-3, lowest at 0.3, then up without end."""
    lr = np.geomspace(start_lr, end_lr, points)
    x = np.log10(lr)
    loss = np.interp(x, [-3, -0.5], [2.3, 0.8]) + 40 * np.maximum(x + 0.5, 0)
    return History(lr, loss + np.random.default_rng(0).normal(0, 0.005, points))


@pytest.mark.parametrize(
    ("begun", "advice", "followed"),
    [
        (dict(start_lr=1e-7, end_lr=1e-4), "try a higher --end-lr", dict(start_lr=1e-7, end_lr=10)),
        (dict(start_lr=1e-5, end_lr=1e-2), "try a higher --end-lr", dict(start_lr=1e-5, end_lr=10)),
        (dict(start_lr=0.5, end_lr=10), "try a lower --start-lr", dict(start_lr=1e-4, end_lr=10)),
        (dict(start_lr=1e-4, end_lr=1e30, points=30), "try a lower --end-lr, or more --num-iter", dict(start_lr=1e-4, end_lr=10)),
        (dict(start_lr=1e-4, end_lr=1e30, points=30), "try a lower --end-lr, or more --num-iter", dict(start_lr=1e-4, end_lr=1e30, points=2000)),
    ],
)  # fmt: skip
def test_what_is_advised_where_nothing_is_recommended_helps(begun, advice, followed):
    assert advice in suggest(curve(**begun)).why_not
    assert 0.01 < suggest(curve(**followed)).max_lr < 0.4


def test_without_trials_there_is_a_recommendation_where_these_show_none():
    found = suggest(made(noise=0), [Trial(0.5, np.inf), Trial(1.0, np.inf)])
    assert found.why_not.endswith("try more --trial-steps, or --trial-steps 0, which reads the maximum off the range test")
    assert suggest(made(noise=0)).max_lr is not None


@pytest.mark.parametrize("diverged", [np.nan, 1e6])
@pytest.mark.parametrize(
    "settings",
    [
        dict(start_lr=1e-4, end_lr=1e30, num_iter=40),
        dict(start_lr=1e-4, end_lr=1e30, num_iter=20),
        dict(start_lr=1e-3, end_lr=5e3, num_iter=24),
        dict(start_lr=1e-3, end_lr=300.0, num_iter=100, step_mode="linear"),
        dict(start_lr=50.0, end_lr=100.0, num_iter=25),
        dict(start_lr=1e-4, end_lr=1e5, num_iter=25, step_mode="linear"),
    ],
    ids=str,
)
def test_a_test_with_too_few_points_says_what_gives_more(monkeypatch, settings, diverged):
    """The loss is of a rate that must stay below 20; each piece of advice is followed by itself."""
    worst = 0.0

    def given(state, batch, rates):
        nonlocal worst
        before, worst = worst, max(worst, float(rates.lr))
        return torch.tensor(diverged if before > 20 else 2.3)

    monkeypatch.setattr(lr_finder, "train_step", given)
    recipe, loader = small()
    with pytest.raises(CifarResnetError, match="only .* points") as raised:
        range_test(BEGIN, recipe, loader, **settings)
    advice = str(raised.value).split("needs 20: ")[1]
    given_numbers = re.findall(r"--(end-lr|num-iter) ([\d.e+-]+)(?=,|$)", advice)
    changes = [{name.replace("-", "_"): float(number) if name == "end-lr" else int(number)} for name, number in given_numbers]
    if "lower --start-lr" in advice:
        changes = [dict(start_lr=1e-3)]
    if "lower --end-lr" in advice:
        changes = [dict(end_lr=10.0)]
    assert changes
    for change in changes:
        worst = 0.0
        assert len(range_test(BEGIN, recipe, loader, **{**settings, **change}).lr) >= 20, advice


def test_a_rule_names_its_learning_rate():
    found = suggest(made())
    assert [found.by(rule) for rule in ("steepest", "valley", "minimum", "recommended")] == list(found[:4])
    with pytest.raises(UsageError, match="--suggest best: it is steepest, valley, minimum or recommended"):
        found.by("best")


def test_smoothing_does_not_lag_and_keeps_a_line():
    line = np.linspace(3, 1, 200)
    np.testing.assert_allclose(lr_finder.smooth(line)[20:-20], line[20:-20])
    assert (lr_finder.exponential(line)[20:] - line[20:]).min() > 0.05  # as the other one does


def test_valley_is_fastais():
    """fastai's loop, word for word, on falling and rising stretches."""

    def theirs(losses):
        n = len(losses)
        max_start, max_end, lds = 0, 0, [1] * n
        for i in range(1, n):
            for j in range(i):
                if losses[i] < losses[j] and lds[i] < lds[j] + 1:
                    lds[i] = lds[j] + 1
                if lds[max_end] < lds[i]:
                    max_end = i
                    max_start = max_end - lds[max_end]
        sections = (max_end - max_start) / 3
        return max_start + int(sections) + int(sections / 2)

    for seed in range(5):
        loss = lr_finder.exponential(made(seed=seed, points=100).loss)
        assert lr_finder.valley(loss) == theirs(loss)


@pytest.mark.parametrize("mode", ["exp", "linear"])
def test_the_rates_rise_as_asked_and_the_random_state_stays(mode):
    recipe, loader = small()
    before, steps = torch.random.get_rng_state(), []
    history = range_test(
        BEGIN,
        recipe,
        loader,
        start_lr=1e-3,
        end_lr=0.1,
        num_iter=24,
        step_mode=mode,
        progress=lambda *numbers: steps.append(numbers),
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert steps == [(done, 24) for done in range(25)]
    rates = np.log(history.lr) if mode == "exp" else history.lr
    np.testing.assert_allclose(np.diff(rates), np.diff(rates).mean(), rtol=1e-6)
    assert history.lr[-1] == pytest.approx(0.1)
    assert rates[0] - (np.log(1e-3) if mode == "exp" else 1e-3) <= np.diff(rates).mean() * 1.001


def test_the_range_test_trains_as_the_recipe_says():
    """Its losses against a hand loop: the recipe's optimizer, augmentation, label smoothing, in bfloat16."""
    recipe, loader = small(precision="bfloat16", optimizer="adam", train_limit=64)
    history = range_test(BEGIN, recipe, loader, start_lr=1e-4, end_lr=1e-2, num_iter=20)
    model = build_model(recipe).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    for lr, loss, (images, labels, _) in zip(history.lr[:4], history.loss, loader.epoch(0), strict=False):
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        expected = torch.nn.functional.cross_entropy(output.float(), labels, label_smoothing=0.1)
        assert loss == pytest.approx(expected.item(), rel=2e-3)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()


def test_every_step_of_the_range_test_is_one_of_the_training_loop():
    """To the bit, over more than one epoch, with batches of both sizes; of the default recipe, in plain steps and without averaging."""
    recipe, loader = small("default", sam_share=1.0, ema_decay=0.9, max_lr=0.3)
    history = range_test(BEGIN, recipe, loader, start_lr=1e-3, end_lr=0.1, num_iter=20)
    state = engine.start(recipe, CPU)
    every = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
    assert {len(batch.labels) for batch in every} == {15, 14}
    for step, (lr, batch) in enumerate(zip(history.lr, every, strict=True)):
        assert history.loss[step] == float(train_step(state, batch, Rates(step, float(lr), recipe.momentum)))


@pytest.mark.parametrize("end_lr", [1e30, 1e5])  # the loss is soon not finite, or passes five times its lowest
def test_a_test_that_diverges_at_once_is_a_clear_error(end_lr):
    recipe, loader = small(optimizer="sgd")
    with pytest.raises(
        CifarResnetError, match=r"only \d+ points .* give a lower --start-lr than 1000"
    ):
        range_test(BEGIN, recipe, loader, start_lr=1e3, end_lr=end_lr, num_iter=25)


def test_a_bump_on_the_flat_start_is_no_bottom():
    """The loss first rises a little, before it has ever fallen."""
    lr = np.geomspace(1e-4, 10, 80)
    start = 1.1 + 0.05 * np.exp(-((np.arange(80) - 10) ** 2) / 20)
    loss = start - 0.8 / (1 + np.exp(-(np.arange(80) - 48) / 3)) + 0.02 * np.maximum(0, np.arange(80) - 68) ** 2
    found = suggest(History(lr, loss))
    assert found.why_not is None
    assert lr[50] < found.max_lr < lr[72]
