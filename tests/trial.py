"""Compares recipes over several seeds, and says by how much they differ.

    python tests/trial.py docs/results/even-batches.json              # trains what the file still lacks
    python tests/trial.py docs/results/even-batches.json --show       # only prints the table

The file is question and answer in one. It is written by hand up to "results":

    {
      "question": "Do batches of equal size train better?",
      "expected": "No difference that three seeds could show.",
      "common": {"epochs": 4, "holdout": 5000},
      "arms": {"fixed": {"batches": "fixed"}, "even": {"batches": "even"}},
      "seeds": 3
    }

"common" and each arm hold fields of a `Recipe`, "recipe" among them; "holdout" must be above 0, so that no choice is made on the test set.
An arm's "levers" are names of changes that are no field: see `levers.py`.
The first arm is the control. The arms take turns: seed 0 of each, then seed 1 of each. Every run is added to the file when it
ends. A call that was interrupted goes on where it stopped: unfinished runs lie in --runs.

In place of "arms" a file may have "factors": changes, each as an arm has it, whose order must stay. Each is then in half of the
arms, of which there are eight for seven changes, and each two are in a quarter (a fractional factorial design, see Plackett and
Burman 1946). So each change is judged by all runs, and few seeds suffice. Its effect is aliased with interactions of others, of
which nothing is known. Such a trial has a second table, with the effects.
"""

import argparse
import json
import math
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from levers import LEVERS
from scipy import stats
from scipy.linalg import hadamard

from cifar_resnet import CifarResnetError, Recipe, train
from cifar_resnet.files import write_json
from cifar_resnet.jobs.bench import training_flop


def arms_of(trial):
    return design(trial["factors"])[0] if "factors" in trial else trial["arms"]


def design(factors):
    """The arms of a fractional factorial design, a name to what it changes, and the factors of each. The first has none."""
    size = 2 ** len(factors).bit_length()
    arms, chosen = {}, {}
    for row in hadamard(size)[:, 1 : len(factors) + 1] < 0:
        on = [name for name, is_on in zip(factors, row, strict=True) if is_on]
        arm = "+".join(str(1 + list(factors).index(name)) for name in on) or "none"
        fields = {name: value for each in on for name, value in factors[each].items() if name != "levers"}
        arms[arm] = fields | {"levers": [lever for each in on for lever in factors[each].get("levers", ())]}
        chosen[arm] = on
    return arms, chosen


def effects(trial):
    """A row a factor: the accuracies with and without it, and its effect with the half-width of the 95 % interval, by least squares.

    The model is a sum of the effects of the factors and of the seeds; its residual variance estimates the noise. There are no rows
    where the runs do not tell the effects apart yet.
    """
    names, results = list(trial["factors"]), trial["results"]
    if not results:
        return []
    _, chosen = design(trial["factors"])
    seeds = sorted({row["seed"] for row in results})
    accuracy = np.array([row["accuracy"] for row in results])
    has = np.array([[name in chosen[row["arm"]] for name in names] for row in results], dtype=float)
    of_seed = np.array([[row["seed"] == seed for seed in seeds] for row in results], dtype=float)
    model = np.hstack([has, of_seed])
    if np.linalg.matrix_rank(model) < model.shape[1]:
        return []
    fit = np.linalg.lstsq(model, accuracy, rcond=None)[0].round(9)  # what follows differs from processor to processor
    free = len(accuracy) - model.shape[1]
    variance = ((accuracy - model @ fit) ** 2).sum() / free if free else math.inf
    halves = stats.t.ppf(0.975, max(free, 1)) * np.sqrt(variance * np.diag(np.linalg.pinv(model.T @ model)))
    rows = zip(names, has.T > 0, fit, halves, strict=False)
    return [
        {"factor": name, "with": accuracy[mine], "without": accuracy[~mine], "effect": effect, "half": half}
        for name, mine, effect, half in rows
    ]


def recipe_of(trial, arm, seed):
    fields = {**trial["common"], **arms_of(trial)[arm]}
    if unknown := set(fields.pop("levers", ())) - set(LEVERS):
        sys.exit(f"{arm}: there is no lever {', '.join(unknown)}; there are {', '.join(LEVERS)}")
    recipe = Recipe.build(fields.pop("recipe", None), seed=seed, **fields)
    if not recipe.holdout:
        sys.exit("a trial is judged on held-out images: give common a holdout, such as 5000")
    return recipe


def pflop(recipe, images, levers=()):
    """PFLOP of training with `images` over all epochs. A sharpness-aware step counts twice."""
    factor = math.prod(LEVERS[name][1](recipe) for name in levers)
    return training_flop(recipe) * images * (1 + recipe.sam_share) * factor / 1e15


def run(trial, arm, seed, runs, device, captured):
    """Trains one recipe, or goes on with its run, and gives its row."""
    recipe, folder = recipe_of(trial, arm, seed), runs / f"{arm}-s{seed}"
    begun = (folder / "recipe.json").exists()
    how = dict(resume=folder) if begun else dict(recipe=recipe, run_dir=folder)
    levers = arms_of(trial)[arm].get("levers", ())
    with ExitStack() as changes:
        for name in levers:
            changes.enter_context(LEVERS[name][0](recipe))
        checkpoint = train(**how, device=device, captured=captured)
    last, at = checkpoint.history[-1], checkpoint.environment
    images = sum(row["images_per_second"] * row["seconds"] for row in checkpoint.history)
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": last["test_accuracy"],
        "loss": last["test_loss"],
        "train_accuracy": last["train_accuracy"],
        "seconds": sum(row["seconds"] for row in checkpoint.history),
        "pflop": pflop(checkpoint.recipe, images, levers),
        "environment": {name: at[name] for name in ("cifar_resnet", "python", "torch", "device", "device_name", "threads")},
    }


def interval(values):
    """Mean, and half of its 95 % interval by Student's t: infinite for one value."""
    count = len(values)
    if count < 2:
        return statistics.fmean(values), math.inf
    return statistics.fmean(values), float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)


def summary(trial):
    """A row an arm: n, means, and the difference to the control over the seeds that both have."""
    by_arm = {arm: {row["seed"]: row for row in trial["results"] if row["arm"] == arm} for arm in arms_of(trial)}
    control, rows = next(iter(by_arm.values())), []
    for arm, found in by_arm.items():
        if not found:
            continue
        paired = [found[seed]["accuracy"] - control[seed]["accuracy"] for seed in found if seed in control]
        difference = interval(paired) if found is not control and paired else None
        means = {key: statistics.fmean(row[key] for row in found.values()) for key in ("accuracy", "loss", "seconds", "pflop")}
        rows.append({"arm": arm, "n": len(found), **means, "difference": difference, "pairs": len(paired)})
    return rows


def table(trial):
    """The summary as a Markdown table, after that of the effects where there are some."""
    rows = effects(trial) if "factors" in trial else []
    return "\n\n".join([*([effects_table(rows)] if rows else []), arms_table(trial)])


def effects_table(rows):
    """Of the factors, which the names of the arms number."""
    lines = ["| change | with: n, accuracy | without: n, accuracy | effect (95 %) |", "| --- | --- | --- | --- |"]
    for number, row in enumerate(rows, 1):
        sides = " | ".join(f"{len(row[side])}, {row[side].mean():.2f} %" for side in ("with", "without"))
        lines.append(f"| {number}. {row['factor']} | {sides} | {row['effect']:+.2f} ({ends(row['effect'], row['half'])}) |")
    return "\n".join(lines)


def ends(mean, half):
    return f"{mean - half:+.2f} to {mean + half:+.2f}" if math.isfinite(half) else "no interval"


def arms_table(trial):
    lines = ["| arm | n | accuracy | loss | against the control | PFLOP | seconds |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in summary(trial):
        against = "control"
        if row["difference"]:
            mean, half = row["difference"]
            against = f"{mean:+.2f} ({ends(mean, half)}; {row['pairs']} pairs)"
        figures = f"{row['accuracy']:.2f} % | {row['loss']:.4f} | {against} | {row['pflop']:.3g} | {row['seconds']:,.0f}"
        lines.append(f"| {row['arm']} | {row['n']} | {figures} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Compares recipes over paired seeds.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: the file's name without its ending, in runs/)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--show", action="store_true", help="only print the table")
    given = parser.parse_args(arguments)
    trial = json.loads(given.file.read_text(encoding="utf-8"))
    changes = "factors" if "factors" in trial else "arms"
    if missing := [key for key in ("question", "expected", "common", changes, "seeds") if key not in trial]:
        sys.exit(f"{given.file} lacks {', '.join(missing)}")
    fields = [name for factor in trial.get("factors", {}).values() for name in factor if name != "levers"]
    if twice := {name for name in fields if fields.count(name) > 1}:
        sys.exit(f"{given.file}: two factors change {', '.join(sorted(twice))}")
    trial.setdefault("results", [])
    runs, captured = given.runs or Path("runs") / given.file.stem, {arm: {} for arm in arms_of(trial)}
    done = {(row["arm"], row["seed"]) for row in trial["results"]}
    wanted = [] if given.show else [(arm, seed) for seed in range(trial["seeds"]) for arm in arms_of(trial)]
    for arm, seed in wanted:
        if (arm, seed) not in done:
            trial["results"].append(run(trial, arm, seed, runs, given.device, captured[arm]))
            write_json(given.file, trial)
            print(f"{arm}, seed {seed}: {trial['results'][-1]['accuracy']:.2f} %", flush=True)
    print(table(trial))


if __name__ == "__main__":
    try:
        main()
    except CifarResnetError as error:
        sys.exit(str(error))
