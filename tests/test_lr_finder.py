import json

import numpy as np
import pytest
import torch

from cifar_resnet import Recipe, build_model, find_lr, lr_finder, lr_search, train
from cifar_resnet.batches import TensorBatches
from cifar_resnet.data import load, with_statistics
from cifar_resnet.errors import CifarResnetError, UsageError
from cifar_resnet.lr_finder import History, Trial, suggest
from cifar_resnet.lr_search import with_found_lr

CPU = torch.device("cpu")


def made(best=0.3, noise=0.02, points=200, seed=0):
    """A range test's usual shape: flat, falling from 1e-2 on, lowest near `best`, then up."""
    lr = np.geomspace(1e-4, 10, points)
    fall = 1.6 / (1 + (lr / 0.01) ** -1.2)
    loss = 2.3 - fall + 3 * np.maximum(np.log10(lr / best), 0) ** 2
    return History(lr, loss + np.random.default_rng(seed).normal(0, noise, points))


def test_steepest_is_torch_lr_finders_own():
    import matplotlib.pyplot as plt
    from torch_lr_finder import LRFinder

    history = made()
    model = torch.nn.Linear(1, 1)
    finder = LRFinder(model, torch.optim.SGD(model.parameters(), 0.1), torch.nn.MSELoss(), device="cpu")
    finder.history = {"lr": history.lr.tolist(), "loss": lr_finder.exponential(history.loss).tolist()}
    axis = plt.figure().gca()
    _, theirs = finder.plot(ax=axis, suggest_lr=True)
    plt.close("all")
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
    for too_few, why_not in (
        (trials[:2], "from LR 0.125 to 0.25, is not between worse ones"),
        (trials[1:], "from LR 0.25 to 1, is not between worse ones"),
        ([Trial(0.5, np.inf), Trial(1.0, np.inf)], "below the first loss, down to LR 0.5"),
        ([Trial(0.5, 2.6), Trial(1.0, 2.5), Trial(2.0, 2.7)], "below the first loss, down to LR 0.5"),
    ):
        found = suggest(history, too_few)
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
    from cifar_resnet.engine import Step

    def pretended(recipe, state, batches, evaluation, device):
        for step in range(1, 41):
            yield Step(1, step, 40, 0.1, torch.tensor(9.0 if step <= 32 else losses[int(np.log2(recipe.max_lr))]))

    monkeypatch.setattr(lr_finder, "train", pretended)
    recipe = with_statistics(Recipe.build("digits", train_limit=70, batch_size=16))
    batches = TensorBatches(load(recipe).train, recipe, CPU)
    trials = lr_finder.run_trials(recipe, batches, CPU, made(best=0.09, noise=0), steps=40)
    first, last = first_to_last
    expected = [losses[power] for power in range(first, last + 1)]
    assert [trial.max_lr for trial in trials] == [2.0**power for power in range(first, last + 1)]
    assert [trial.loss for trial in trials] == pytest.approx([np.inf if np.isnan(loss) else loss for loss in expected])


def test_a_trial_is_a_short_run_of_the_recipe(narrow):
    """Its loss against a hand loop with torch's own optimizer and OneCycleLR, at a low LR, where rounding does not grow."""
    fields = dict(train_limit=70, batch_size=16, precision="float32", init="default", base_momentum=0.8)
    recipe = Recipe.build("digits", **fields, sam_share=1.0)  # which trials go without
    recipe = with_statistics(recipe)
    batches, done = TensorBatches(load(recipe).train, recipe, CPU), []
    history = made(noise=0)._replace(lr=made().lr / 100)
    before = torch.random.get_rng_state()
    trials = lr_finder.run_trials(recipe, batches, CPU, history, steps=20, progress=lambda *numbers: done.append(numbers))
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
    whole = [batch for epoch in range(5) for batch in batches.epoch(epoch) if len(batch[1]) == 16]
    assert len(whole) == 20
    theirs = []
    for images, labels in whole:
        loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        theirs.append(loss.item())
    assert abs(theirs[-1] - theirs[0]) > 0.02  # it learned
    assert first.loss == pytest.approx(np.mean(theirs[-4:]), rel=1e-3)


@pytest.mark.parametrize(("options", "steps"), [({}, 92), ({"batch_size": 512}, 50), ({"epochs": 80, "peak_epoch": 20.0}, 400)])
def test_a_trial_takes_25600_images_or_half_of_the_run(options, steps):
    recipe = Recipe.build("digits", **options)
    assert lr_finder.usual_steps(recipe, TensorBatches(load(recipe).train, with_statistics(recipe), CPU)) == steps


def test_find_lr_with_trials_from_the_command_line(cli, tmp_path):
    options = ("--train-limit", 300, "--batch-size", 16, "--precision", "float32", "--num-iter", 40, "--trial-steps", 20)
    code, out, err = cli(
        "find-lr", "--dataset", "digits", *options, "--loader", "albumentations", "--workers", 0, "--run-dir", tmp_path
    )
    assert (code, err) == (0, "")
    content = json.loads((tmp_path / "lr_finder.json").read_text())
    history = History(*(np.array(content["history"][key]) for key in ("lr", "loss")))
    trials = [Trial(row["max_lr"], np.inf if row["loss"] is None else row["loss"]) for row in content["trials"]]
    assert content["trial_steps"] == 20
    assert 3 <= len(trials) <= 6
    assert content["run_steps"] == 8 * 19
    assert suggest(history, trials, 8 * 19 / 20)._asdict() == content["suggestions"]
    assert f"short trainings, maximum LR and last loss: {trials[0].max_lr:g} {trials[0].loss:.3f}, " in out
    found = content["suggestions"]
    if found["max_lr"] is None:
        assert f"no LR is recommended: {found['why_not']}" in out
    else:
        assert f"--max-lr {found['max_lr']:.3g} --batch-size 16 --div-factor {found['max_lr'] / found['min_lr']:.3g}" in out


def test_a_second_fall_after_the_bottom_is_left_does_not_count():
    """As real range tests of this network show it: down until 0.15, up again until 1, lowest of all at 3."""
    lr = np.geomspace(1e-4, 10, 200)
    loss = np.interp(np.log10(lr), [-4, -3, -0.85, 0, 0.5, 1], [2.33, 2.28, 1.6, 2.0, 1.5, 1.75])
    for seed in range(5):
        found = suggest(History(lr, loss + np.random.default_rng(seed).normal(0, 0.03, 200)))
        assert 0.12 < found.max_lr < 0.3
        assert 0.008 < found.min_lr < 0.012


@pytest.mark.parametrize(("slope", "why_not"), [(0.0, "never fell"), (0.5, "never fell"), (-0.5, "a higher --end-lr")])
def test_nothing_is_recommended_where_the_loss_never_falls_or_never_stops(slope, why_not):
    lr = np.geomspace(1e-4, 10, 200)
    loss = 2.3 + slope * (np.log10(lr) + 4) + np.random.default_rng(0).normal(0, 0.05, 200)
    found = suggest(History(lr, loss))
    assert (found.max_lr, found.min_lr) == (None, None)
    with pytest.raises(CifarResnetError, match=f"no LR is recommended: .*{why_not}"):
        with_found_lr(Recipe(), found)
    assert with_found_lr(Recipe(), found, "steepest").max_lr == found.steepest
    with pytest.raises(UsageError, match="--suggest best"):
        with_found_lr(Recipe(), found, "best")


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


def test_a_real_range_test(tmp_path):
    """On digits: the rates asked for, the files read back, the random state as it was."""
    recipe = Recipe.build("digits", train_limit=64, batch_size=16, precision="float32")
    before, steps = torch.random.get_rng_state(), []
    history, found, trials, _ = find_lr(
        recipe, tmp_path, start_lr=1e-3, end_lr=0.1, num_iter=24, trial_steps=0, progress=lambda *numbers: steps.append(numbers)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert (steps[-1], trials) == ((24, 24), [])
    ratio = 100 ** (1 / 23)
    np.testing.assert_allclose(history.lr[1:] / history.lr[:-1], ratio, rtol=1e-6)
    assert history.lr[-1] == pytest.approx(0.1)
    assert abs(history.lr[0] / 1e-3 - 1) < ratio - 1 + 1e-6
    content = json.loads((tmp_path / "lr_finder.json").read_text())
    assert content["history"] == {"lr": history.lr.tolist(), "loss": history.loss.tolist()}
    assert content["suggestions"] == found._asdict()
    assert content["recipe"] == json.loads(with_statistics(recipe).to_json())
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_gives_what_train_gives(cli, tmp_path, monkeypatch):
    fields = dict(train_limit=32, batch_size=16, precision="float32")
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", value)]
    options += ["--dataset", "digits", "--num-iter", 24, "--trial-steps", 20, "--sweep", 1, "--run-dir", tmp_path / "find"]
    trials = [Trial(0.03, 1.0), Trial(0.06, 0.9), Trial(0.12, 1.0)]
    monkeypatch.setattr(lr_search, "range_test", lambda *arguments, **options: made())
    monkeypatch.setattr(lr_search, "run_trials", lambda *arguments, **options: trials)
    code, out, err = cli("find-lr", *options)
    assert (code, err) == (0, "")
    content = json.loads((tmp_path / "find" / "lr_finder.json").read_text())
    grid = [row["max_lr"] for row in content["sweep"] if row["rule"] == "grid"]
    of_its_length = 0.06 * (2 / 20) ** 0.2  # one epoch of 32 - 10 images
    np.testing.assert_allclose(grid, of_its_length * 2.0 ** np.arange(-3, 4))
    assert content["suggestions"]["max_lr"] == pytest.approx(0.06 * (16 / 20) ** 0.2)
    assert content["sweep"][-1]["max_lr"] == pytest.approx(of_its_length)
    assert "recommended at this length" in out
    for row in (content["sweep"][2], content["sweep"][-1]):
        recipe = Recipe.build(
            "digits", **fields, holdout=10, epochs=1, max_lr=row["max_lr"], div_factor=row["max_lr"] / row["min_lr"]
        )
        last = train(recipe, tmp_path / str(row["max_lr"]), compile="off").history[-1]
        assert (row["accuracy"], row["loss"]) == (last["test_accuracy"], pytest.approx(last["test_loss"]))
        assert f"{row['accuracy']:.2f} %" in out


def test_the_range_test_trains_as_the_recipe_says(narrow):
    """Its first losses against a hand loop: the recipe's optimizer, augmentation, label smoothing, in bfloat16."""
    recipe = with_statistics(Recipe.build("digits", train_limit=64, batch_size=16, precision="bfloat16", optimizer="adam"))
    batches = TensorBatches(load(recipe).train, recipe, CPU)
    history = lr_finder.range_test(recipe, batches, CPU, start_lr=1e-4, end_lr=1e-2, num_iter=20)
    model = build_model(recipe).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    for lr, loss, (images, labels) in zip(history.lr[:3], history.loss, batches.epoch(0), strict=False):
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        expected = torch.nn.functional.cross_entropy(output.float(), labels, label_smoothing=0.1)
        assert loss == pytest.approx(expected.item(), rel=2e-3)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()


def test_a_test_that_diverges_at_once_is_a_clear_error(refused, tmp_path):
    line = refused(
        1, "find-lr", "--dataset", "digits", "--train-limit", 64, "--batch-size", 16, "--start-lr", 1e6, "--end-lr", 1e30,
        "--num-iter", 25, "--run-dir", tmp_path / "find", "--precision", "float32",
    )  # fmt: skip
    assert "points" in line
    assert "--start-lr" in line
    assert not (tmp_path / "find").exists()


@pytest.mark.parametrize(
    "options",
    [("--start-lr", 1, "--end-lr", 0.1), ("--start-lr", -1), ("--num-iter", 5), ("--step-mode", "cos"), ("--trial-steps", 3)],
)
def test_a_range_that_is_none_is_refused(refused, options):
    refused(2, "find-lr", "--dataset", "digits", *options)
