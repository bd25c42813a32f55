"""Finished runs side by side."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..arguments import checked
from ..checkpoint import SCHEMA, Checkpoint, load_checkpoint
from ..errors import CifarResnetError, UsageError, shell_command
from ..files import check_file, read_json
from ..look import figures
from ..recipe import DATASETS, Recipe
from ..run_dir import PICTURES
from ..runs import CHECKPOINT, REPEAT, find_runs, seeds_of
from .common import save_figure, spread


@checked
def compare(runs: Sequence[Path | str], path: Path | str | None = None) -> dict[str, Any]:
    """Finished runs side by side; those that train alike but for the seed are one group, with mean and standard deviation.

    Two recipes train alike where they differ only in fields that change nothing under them; see `Recipe.canonical`.

    Args:
        runs: checkpoint files, run directories, or those of repetitions, which stand for all their runs; "latest" is the newest run.
        path: where the picture goes (.png, .svg or .pdf), if anywhere.

    Returns:
        `evaluated_on` and `groups`, each with its `label` (recipe and what tells it from the others), `n`, `mean`, `std` and
        `interval` of the last accuracy in percent (see `spread`), mean `test_loss`, `train_loss` and `seconds`, `differs`, `runs`
        and `folders`: the one of a whole repetition, or those of the runs.

    Raises:
        CifarResnetError: a run cannot be read or has not ended, or a repetition lacks a seed.
        UsageError: a run is given twice, or two of them are of one recipe and seed, or holdout and test figures would mix.
    """
    if not runs:
        raise UsageError("compare takes at least one run")
    if path is not None:
        check_file(Path(path), *PICTURES)
    loaded = [checkpoint for run in runs for checkpoint in _ended(run)]
    _check_runs(loaded)
    together: dict[tuple[Recipe, str], list[Checkpoint]] = {}
    known = {checkpoint.recipe.dataset: _images(checkpoint) for checkpoint in loaded if checkpoint.fingerprints}
    for checkpoint in loaded:
        together.setdefault(_trained_as(checkpoint, known), []).append(checkpoint)
    for members in together.values():
        _check_seeds(members)
    evaluated_on, groups = loaded[0].evaluated_on, _groups(together)
    if path is not None:
        save_figure(figures.comparison(groups, evaluated_on), Path(path))
    return {"schema": SCHEMA, "evaluated_on": evaluated_on, "groups": groups}


def _ended(run: Path | str) -> list[Checkpoint]:
    """The last checkpoint of a run, or those of all runs of a repetition."""
    folder, found = Path(run), find_runs([run])
    if not os.path.exists(folder / REPEAT):
        return [_finished(each) for each in found]
    count: Any = None
    with suppress(UsageError):  # of a file that is damaged: then those that were begun are all
        count = read_json(folder / REPEAT, "repetition").get("count")
    planned = count if type(count) is int else len(found)
    ended = [each for each in (load_checkpoint(one) for one in found if (one / CHECKPOINT).exists()) if each.finished]
    if len(ended) < planned:
        advice = f"finish it: {shell_command('train', '--resume', folder)}; or name the runs that have ended"
        raise CifarResnetError(f"{folder} has {len(ended)} of its {planned} runs; {advice}")
    return ended


def _finished(path: Path | str) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    if not checkpoint.finished:
        again = shell_command("train", "--resume", checkpoint.path.parent)
        raise CifarResnetError(f"{checkpoint.path} stands at {checkpoint.stands_at}; finish it: {again}")
    return checkpoint


def _trained_as(run: Checkpoint, known: dict[str, str]) -> tuple[Recipe, str]:
    """What runs of one group have in common: the recipe but for its seed, and the images. A folder may have been moved between them.

    A checkpoint of an old version does not know its images: they are what others found in the folder.
    """
    recipe = run.recipe.canonical().replace(seed=0)
    if recipe.dataset in DATASETS:
        return recipe, ""
    images = _images(run) or known.get(recipe.dataset, recipe.dataset)
    return recipe.model_copy(update={"dataset": ""}), images


def _images(run: Checkpoint) -> str:
    """The digests of a run's images, shortened; "" for a checkpoint of an old version. Pixels that another version of a library
    decodes otherwise are other images."""
    return " and ".join(each["sha256"][:12] for each in run.fingerprints.values())


def _check_runs(runs: list[Checkpoint]) -> None:
    paths = [run.path.resolve() for run in runs]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UsageError(f"{twice[0].parent} is given twice")
    first = runs[0]
    for run in runs[1:]:
        if run.evaluated_on != first.evaluated_on:
            other = f"{first.path} on the {first.evaluated_on} images; they cannot be compared"
            raise UsageError(f"{run.path} was evaluated on the {run.evaluated_on} images, {other}")


def _check_seeds(members: list[Checkpoint]) -> None:
    by_seed: dict[int, Checkpoint] = {}
    for run in members:
        first = by_seed.setdefault(run.recipe.seed, run)
        if first is not run:
            raise UsageError(f"{first.path} and {run.path} are of one recipe and one seed, so no two samples; leave one out")


def _differ(name: str, recipes: list[Recipe]) -> bool:
    return len({getattr(recipe, name) for recipe in recipes}) > 1


def _groups(together: dict[tuple[Recipe, str], list[Checkpoint]]) -> list[dict[str, Any]]:
    """What `compare` gives as `groups`, of the runs by what they have in common."""
    recipes, own = [recipe for recipe, _ in together], [members[0].recipe for members in together.values()]
    images_of = {(members[0].recipe.dataset, images) for (_, images), members in together.items() if images}
    images_differ = len({images for _, images in images_of}) > 1
    # A field that changes nothing has its default in `recipes`, and in `own` the value that the run had, which is shown.
    fields = [name for name in Recipe.model_fields if name != "recipe" and _differ(name, recipes) and _differ(name, own)]
    if images_differ and len({folder for folder, _ in images_of}) == len(images_of):  # then their folders tell them apart
        fields, images_differ = list(dict.fromkeys(["dataset", *fields])), False
    names = [recipe.recipe for recipe in recipes]
    groups = []
    for (recipe, images), members in together.items():
        differs = {name: getattr(members[0].recipe, name) for name in fields}
        if images_differ:
            differs["images"] = images or recipe.dataset
        label = recipe.recipe
        if names.count(label) > 1:
            short = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in differs.items()}
            label += ": " + ", ".join(f"{name} {value}" for name, value in short.items())
        last = [run.history[-1]["test_accuracy"] for run in members]
        means = {name: statistics.fmean(run.history[-1][name] for run in members) for name in ("test_loss", "train_loss")}
        means["seconds"] = statistics.fmean(sum(row["seconds"] for row in run.history) for run in members)
        runs = [
            dict(path=str(run.path), seed=run.recipe.seed, test_accuracy=[row["test_accuracy"] for row in run.history])
            for run in members
        ]
        folders = [run.path.parent for run in members]
        if seeds_of(folders[0].parent) == folders:  # a whole repetition
            folders = [folders[0].parent]
        where = dict(differs=differs, runs=runs, folders=[str(each) for each in folders])
        groups.append(dict(label=label, n=len(last), **spread(last), **means, **where))
    return groups
