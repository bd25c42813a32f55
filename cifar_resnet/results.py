"""Finished runs for a reader: several side by side, or one as a page of HTML that needs nothing beside it."""

from __future__ import annotations

import base64
import shlex
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from . import analysis, evaluation, figures
from .data import with_statistics
from .errors import CifarResnetError, UsageError
from .recipe import DATASETS, PRESETS, Recipe
from .run import SCHEMA, Checkpoint, load_checkpoint, write_whole


def finished(path: Path | str) -> Checkpoint:
    """The last checkpoint of a run.

    Raises:
        CifarResnetError: it cannot be read, or the run has not ended.
    """
    checkpoint = load_checkpoint(path)
    if not checkpoint.finished:
        where = f"stands at epoch {checkpoint.content['epoch']} of {checkpoint.recipe.epochs}"
        raise CifarResnetError(f"{checkpoint.path} {where}; finish it: cifar-resnet train --resume {checkpoint.path.parent}")
    return checkpoint


def compare(runs: Sequence[Path | str], path: Path | str | None = None) -> dict[str, Any]:
    """Finished runs side by side; those that differ only in the seed are one group, with mean and standard deviation.

    Args:
        runs: checkpoint files or run directories.
        path: where the picture goes (.png, .svg or .pdf), if anywhere.

    Returns:
        `evaluated_on` and `groups`, each with its `label` (recipe and what tells it from the others), `n`, `mean` and `std`
        of the last accuracy in percent (`std` over n - 1; None for one run), mean `seconds`, `differs` and `runs`.

    Raises:
        CifarResnetError: a run cannot be read or has not ended.
        UsageError: a run is given twice, or two of them are of one recipe and seed, or holdout and test figures would mix.
    """
    loaded = [finished(run) for run in runs]
    if len({checkpoint.path.resolve() for checkpoint in loaded}) < len(loaded):
        raise UsageError("a run is given twice")
    for checkpoint in loaded[1:]:
        if (evaluated_on := checkpoint.evaluated_on) != loaded[0].evaluated_on:
            raise UsageError(
                f"{checkpoint.path} was evaluated on the {evaluated_on} images, {loaded[0].path} on the {loaded[0].evaluated_on} "
                "images; they cannot be compared"
            )
    together: dict[Recipe, list[Checkpoint]] = {}
    for checkpoint in loaded:
        together.setdefault(checkpoint.recipe.replace(seed=0), []).append(checkpoint)
    for members in together.values():
        by_seed = {checkpoint.recipe.seed: checkpoint for checkpoint in members}
        if len(by_seed) < len(members):
            twice = next(checkpoint for checkpoint in members if checkpoint not in by_seed.values())
            first = by_seed[twice.recipe.seed]
            raise UsageError(f"{first.path} and {twice.path} are of one recipe and one seed, so no two samples; leave one out")
    differing = [
        name for name in Recipe.model_fields if name != "recipe" and len({getattr(recipe, name) for recipe in together}) > 1
    ]
    groups = []
    for recipe, members in together.items():
        last = [checkpoint.history[-1]["test_accuracy"] for checkpoint in members]
        seconds = [sum(row["seconds"] for row in checkpoint.history) for checkpoint in members]
        differs = {name: getattr(recipe, name) for name in differing}
        same_name = sum(other.recipe == recipe.recipe for other in together) > 1
        told = ", ".join(f"{name} {value}" for name, value in differs.items()) if same_name else ""
        groups.append(
            {
                "label": f"{recipe.recipe}: {told}" if told else recipe.recipe,
                "n": len(last),
                "mean": statistics.fmean(last),
                "std": statistics.stdev(last) if len(last) > 1 else None,
                "seconds": statistics.fmean(seconds),
                "differs": differs,
                "runs": [
                    {
                        "path": str(checkpoint.path),
                        "seed": checkpoint.recipe.seed,
                        "test_accuracy": [row["test_accuracy"] for row in checkpoint.history],
                    }
                    for checkpoint in members
                ],
            }
        )
    content = {"schema": SCHEMA, "evaluated_on": loaded[0].evaluated_on, "groups": groups}
    if path is not None:
        figures.save(figures.comparison(groups, loaded[0].evaluated_on), Path(path))
    return content


def command(recipe: Recipe) -> str:
    """The command line that repeats a run: its preset, and every option that differs from it."""
    preset = recipe.recipe if recipe.recipe in PRESETS else "default"
    before = Recipe.build(preset)
    if recipe.dataset in DATASETS:  # which fill in what the preset leaves to them
        recipe, filled = with_statistics(recipe), with_statistics(before.replace(dataset=recipe.dataset))
        before = before.replace(mean=filled.mean, std=filled.std)
    words = ["cifar-resnet", "train", "--recipe", preset]
    for name, value in recipe:
        moved = name == "peak_epoch" and recipe.epochs != before.epochs  # it would move in proportion
        if name == "recipe" or (value == getattr(before, name) and not moved):
            continue
        if value is None:  # which no option can say
            return "cifar-resnet train --recipe-file recipe.json"
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def report(
    run: Path | str,
    path: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    device: str = "auto",
    notify: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes a finished run as one HTML file, images inside, and gives its path.

    Args:
        run: a checkpoint file, or a run directory.
        path: the file; `report.html` beside the checkpoint if not given.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    checkpoint = finished(run)
    found = evaluation.logits_of(checkpoint.path, data_dir, device, notify)
    content = evaluation.content_of(found, "flip" if checkpoint.recipe.flip_probability else "none")
    wrong = analysis.mistakes(found.logits, found.labels, found.data.evaluation, found.data.classes)
    path = Path(path) if path else checkpoint.path.parent / "report.html"
    write_whole(path, _page(checkpoint, content, found, wrong))
    return path


def _page(checkpoint: Checkpoint, content: dict[str, Any], found: evaluation.Prediction, wrong: list[analysis.Mistake]) -> str:
    recipe, judged = checkpoint.recipe, content["evaluated_on"]
    pictures = {
        "Loss and accuracy by epoch": figures.curves(checkpoint.history, recipe, judged, stacked=True),
        "Learning rate of every step": figures.learning_rate(recipe, -(-len(found.data.train) // recipe.batch_size)),
        **dict(
            zip(
                ("Confusion matrix", "Accuracy by class", "Calibration"),
                evaluation.evaluation_figures(content).values(),
                strict=True,
            )
        ),
    }
    seen = [evaluation.mistake_figures(found, [mistake], "layer2", "")["gradcam"] for mistake in wrong[:8]]
    by_class = [
        (name, *(f"{row[key]:.1f} %" for key in ("precision", "recall", "f1")), row["count"])
        for name, row in content["classes"].items()
    ]
    pairs = [(row["true"], row["predicted"], row["count"], f"{row['share']:.1f} %") for row in content["most_confused"]]
    seconds = sum(row["seconds"] for row in checkpoint.history)
    figures_of = (
        *(("with flips at test time", f"{row['accuracy']:.2f} %") for row in (content["tta"] or {}).values()),
        ("negative log likelihood", f"{content['loss']:.4f}"),
        ("expected calibration error", f"{content['calibration_error']:.2f} %"),
        ("training images", f"{len(found.data.train):,}"),
        ("epochs, batch size", f"{recipe.epochs}, {recipe.batch_size}"),
        ("seconds of training", f"{seconds:,.0f}"),
    )
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{recipe.title}, seed {recipe.seed}"),
        accuracy=f"{content['accuracy']:.2f} %",
        judged=escape(
            f"{judged} accuracy of the last epoch, single view, {content['images']:,} images; n = 1 run, seed {recipe.seed}"
        ),
        figures=_table((), figures_of),
        command=escape(command(recipe)),
        pictures="".join(_picture(title, figure, "svg") for title, figure in pictures.items()),
        count=min(len(wrong), 8),
        wrong=f"{len(wrong):,}",
        mistakes="".join(_picture(f"mistake {i}", figure, "png") for i, figure in enumerate(seen, start=1)),
        by_class=_table(("class", "precision", "recall", "F1", "images"), by_class),
        pairs=_table(("true", "predicted as", "images", "of the class"), pairs),
        environment=_table(
            (), [(key.replace("_", " "), value) for key, value in checkpoint.environment.items() if key != "startup_seconds"]
        ),
        recipe=_table((), [(name, value) for name, value in recipe]),
    )


def _picture(title: str, figure: Any, format: str) -> str:
    kind = {"svg": "svg+xml", "png": "png"}[format]
    data = base64.b64encode(figures.render(figure, format)).decode()
    return f'<img class="{format}" alt="{escape(title)}" src="data:image/{kind};base64,{data}">\n'


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if header else ''}<tbody>\n{body}</tbody></table>"
