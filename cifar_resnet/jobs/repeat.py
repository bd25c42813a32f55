"""Trains several seeds of a recipe in a row, and sums them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..arguments import check, checked
from ..checkpoint import SCHEMA, Checkpoint
from ..data.datasets import load
from ..errors import UsageError
from ..files import read_json, writable, write_json, write_whole
from ..recipe import Recipe
from ..run_dir import RunDir, check_free, check_match, moved
from ..runs import CHECKPOINT, RECIPE, REPEAT, find_run, folder_for, is_run, seeds_of
from ..training import distributed
from ..training.capture import CapturedEpoch
from ..training.runtime import resolve_device, resolve_precision
from .common import check_images, spread
from .interrupt import Interrupted, signals
from .train import to_go_on, train
from .watch import Watcher, Watchers


@checked
def repeat(
    recipe: Recipe | None = None,
    count: int | None = None,
    run_dir: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    must_match: dict[str, Any] | None = None,
    watch: Callable[[], AbstractContextManager[object]] = lambda: nullcontext(Watcher()),
    **options: Any,
) -> dict[str, Any]:
    """Trains `count` seeds in a row, from the recipe's own upward, each into `s<seed>` of one folder, and sums them up.

    The precision is resolved once, so that a repetition resumed on another machine does not mix two.

    Args:
        recipe, run_dir, must_match, options: as `train` takes them; `progress` and `on_epoch` are for each run.
        resume: the folder of a repetition to go on with, or "latest"; it knows recipe and count. A `dataset` in `must_match` may be
            where its images are now.
        watch: gives a context with a watcher for each run.

    Returns:
        What `repeat.json` holds: `recipe`, `count`, `evaluated_on`, and of the last accuracies, in percent: `accuracies`,
        `mean`, `std` (over n - 1) and `interval`; see `spread`.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    check(train, **options)
    if own := {"watcher", "captured"} & set(options):
        raise UsageError(f"repeat takes no {own.pop()}; watch gives a watcher for each run")
    if resume is not None and (recipe is not None or count is not None or run_dir is not None):
        raise UsageError("a resumed repetition takes recipe, count and folder from itself; give none of them")
    if distributed.started() > 1:
        raise UsageError("--repeat does not go with torchrun: train one seed after the other")
    device, said = options.get("device", "auto"), list[str]()
    if resume is None:
        if count is None:
            raise UsageError("repeat: give count, the number of seeds")
        begun: Any = _begin(recipe or Recipe(), count, run_dir, device)
    else:
        where = device, options.get("data_dir"), said.append
        begun = nullcontext(_read_repetition(find_run(resume, repetition=True), must_match or {}, *where))
    done, captured = list[Checkpoint](), dict[Any, CapturedEpoch | None]()
    with begun as (folder, recipe, count), signals() as received:
        for seed in range(recipe.seed, recipe.seed + count):
            one = folder / f"s{seed}"
            new = dict(recipe=recipe.replace(seed=seed), run_dir=one)
            how = dict(resume=one, must_match={"dataset": recipe.dataset, "seed": seed}) if is_run(one) else new
            with suppress(Interrupted), watch() as watcher:
                while said:
                    Watchers(watcher).warn(said.pop(0))
                alike = _as_begun(done[0], options) if done else options
                done.append(train(**how, watcher=watcher, captured=captured, **alike))  # type: ignore[arg-type]
            if received and len(done) < count:
                raise Interrupted(received[0], folder, to_go_on(options))
    accuracies = [checkpoint.history[-1]["test_accuracy"] for checkpoint in done]
    content = _content(recipe, count) | {"accuracies": accuracies, **spread(accuracies)}
    content["evaluated_on"] = done[0].evaluated_on
    write_json(folder / REPEAT, content)
    return content


def _as_begun(first: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the loader, and TF32, of the first run: a repetition that goes on is not told them again."""
    kept, names = first.environment, ("loader", "workers") if options.get("loader", "auto") == "auto" else ()
    return {**options, **{name: kept[name] for name in names if name in kept}, "tf32": kept.get("tf32") is True}


@contextmanager
def _begin(recipe: Recipe, count: int, run_dir: Path | str | None, device: str) -> Iterator[tuple[Path, Recipe, int]]:
    """Folder, recipe and count of a new repetition. If its first run cannot begin, nothing of the repetition stays."""
    check_count(recipe, count)
    recipe = resolve_precision(recipe, resolve_device(device))
    with folder_for(Path(run_dir) if run_dir else None, recipe, "repeat-") as folder:
        check_free(folder)
        write_json(writable(folder) / REPEAT, _content(recipe, count))
        try:
            yield folder, recipe, count
        finally:
            if not seeds_of(folder):
                (folder / REPEAT).unlink(missing_ok=True)


def check_count(recipe: Recipe, count: int) -> None:
    if count < 2:
        raise UsageError(f"--repeat {count} must be at least 2")
    recipe.replace(seed=recipe.seed + count - 1)  # which is refused where it is too high


def _read_repetition(
    folder: Path, must_match: dict[str, Any], device: str, data_dir: Path | str | None, warn: Callable[[str], None]
) -> tuple[Path, Recipe, int]:
    """Folder, recipe and count of a repetition that was begun."""
    path = folder / REPEAT
    written = read_json(path, "repetition")
    recipe, count = Recipe.load(written.get("recipe"), f"{path}: "), written.get("count")
    if not isinstance(count, int) or count < 2:
        raise UsageError(f"{path} has the count {count!r}, not a number of runs")
    with_checkpoint = [run for run in seeds_of(folder) if (run / CHECKPOINT).exists()]
    if moved(recipe, must_match) and (with_checkpoint or not Path(recipe.dataset).exists()):
        now = recipe.replace(dataset=str(must_match["dataset"]))
        if with_checkpoint:
            _, checkpoint = RunDir(with_checkpoint[0]).open({"dataset": now.dataset})
            assert checkpoint is not None
            check_images(checkpoint, load(now, data_dir, warn), warn)
        recipe = now
    check_match(recipe, must_match, folder)
    for run in set(seeds_of(folder)) - set(with_checkpoint):  # begun, and not trained yet: its images may have moved
        begun = Recipe.load(read_json(run / RECIPE, "recipe file"))
        write_whole(run / RECIPE, begun.replace(dataset=recipe.dataset).to_json())
    if recipe.precision == "auto":  # begun by a version that left it to each run: the first one's holds
        files = [folder / f"s{seed}" / RECIPE for seed in range(recipe.seed, recipe.seed + count)]
        first = next((Recipe.load(read_json(file, "recipe file")).precision for file in files if file.exists()), "auto")
        recipe = resolve_precision(recipe.replace(precision=first), resolve_device(device))
    write_json(path, {**written, **_content(recipe, count)})
    return folder, recipe, count


def _content(recipe: Recipe, count: int) -> dict[str, Any]:
    return {"schema": SCHEMA, "recipe": recipe.to_dict(), "count": count}
