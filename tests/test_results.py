"""The tables of results are what the files of results say."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest

from cifar_resnet import PRESETS, Recipe
from cifar_resnet.presets import MEASURED

RESULTS = Path(__file__).parents[1] / "docs" / "results"
specification = importlib.util.spec_from_file_location("tables", RESULTS / "tables.py")
tables = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tables)


def test_every_table_in_readme_and_docs_is_up_to_date(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_mark_has_an_end():
    for path in (tables.ROOT / "README.md", *(tables.ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall("<!-- table: ", text)) == len(tables.MARKED.findall(text)), path


def test_the_headline_has_mean_and_deviation_of_the_runs():
    rows = json.loads((RESULTS / "accuracy.json").read_text("utf-8"))
    runs = next(row["accuracy"] for row in rows if row["recipe"] == "page")
    line = next(line for line in tables.headline().splitlines() if line.startswith("| `page`"))
    assert f"{sum(runs) / len(runs):.2f} ± {statistics.stdev(runs):.2f} %" in line
    assert f"| {len(runs)} |" in line


def test_what_the_list_of_recipes_tells_was_measured():
    """Of each recipe the first row, which is of the recipe as it is."""
    first = {row["recipe"]: row for row in reversed(json.loads((RESULTS / "accuracy.json").read_text("utf-8")))}
    assert set(MEASURED) == set(first)
    for name, found in MEASURED.items():
        runs = first[name]["accuracy"]
        deviation = round(statistics.stdev(runs), 2) if len(runs) > 1 else None
        assert (found.accuracy, found.std, found.runs) == (round(statistics.fmean(runs), 2), deviation, len(runs))
        assert found.seconds == first[name]["seconds"]
        assert all(word in first[name]["hardware"] for word in found.hardware.split())


def test_the_first_row_of_a_recipe_is_of_the_recipe_as_it_is():
    rows = {row["recipe"]: row["command"] for row in reversed(json.loads((RESULTS / "accuracy.json").read_text("utf-8")))}
    for name, command in rows.items():
        given = {option.replace("-", "_"): value for option, value in re.findall(r"--(\S+) (\S+)", command)}
        given.pop("repeat", None)
        assert Recipe.build(given.pop("recipe", None), **given) == Recipe.build(name)


def test_rows_name_recipes_that_there_are_and_their_commands():
    for row in json.loads((RESULTS / "accuracy.json").read_text("utf-8")):
        assert row["recipe"] in PRESETS
        named = re.search(r"--(?:recipe|dataset) (\S+)", row["command"])
        assert (named[1] if named else "default") == row["recipe"]
        epochs = re.search(r"--epochs (\d+)", row["command"])
        assert row["epochs"] == (int(epochs[1]) if epochs else Recipe.build(row["recipe"]).epochs)


@pytest.mark.parametrize(("seconds", "text"), [(None, "not measured"), (4.64, "4.6 s"), (94, "94 s"), (1884, "31 min"), (19980, "5.5 h")])
def test_durations_are_short(seconds, text):
    assert tables.duration(seconds) == text
