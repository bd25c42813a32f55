"""Writes the tables of results into README.md and docs/ from the files beside this script.

    python docs/results/tables.py           # rewrites what stands between the marks
    python docs/results/tables.py --check   # changes nothing; exit code 1 where a table is out of date

A mark is `<!-- table: NAME -->`; the table ends at `<!-- end of table -->`. NAME is one of `TABLES`, or `trial FILE` for a file of
`tests/trial.py`.
"""

import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MARKED = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
sys.path.append(str(ROOT / "tests"))


def read(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def markdown(head, rows):
    """A table; rows hold text."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def score(values):
    """Mean and standard deviation in percent, of a list of runs or of what was kept of one; a single run without spread."""
    if values is None:
        return "not measured"
    if isinstance(values, dict):
        mean, std = values["mean"], values["std"]
    elif len(values) == 1:
        return f"{values[0]:.2f} %"
    else:
        mean, std = statistics.fmean(values), statistics.stdev(values)
    return f"{mean:.2f} ± {std:.2f} %"


def duration(seconds):
    """One decimal below a minute, else whole seconds, minutes or hours."""
    if seconds is None:
        return "not measured"
    if seconds < 120:
        return f"{seconds:.{int(seconds < 60)}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def headline():
    """The first row of each recipe of ours, and of page: of the recipe as it is."""
    rows = []
    for name in ("default", "sprint", "page", "digits"):
        first = next(row for row in read("accuracy.json") if row["recipe"] == name)
        measured = [score(first["accuracy"]), str(len(first["accuracy"])), duration(first["seconds"]), first["hardware"]]
        rows.append([f"`{name}`", str(first["epochs"]), *measured])
    return markdown(["recipe", "epochs", "accuracy", "n", "training", "hardware"], rows)


def accuracy():
    """Every full run made."""
    head = ["recipe", "epochs", "single view", "with flips", "flips and shifts", "n", "training", "hardware", "torch", "command"]
    rows = [
        [
            f"`{row['recipe']}`", str(row["epochs"]), score(row["accuracy"]), score(row["flip"]), score(row["flip-shift"]),
            str(len(row["accuracy"])), duration(row["seconds"]), row["hardware"], row["torch"], f"`{row['command']}`",
        ]
        for row in read("accuracy.json")
    ]  # fmt: skip
    return markdown(head, rows)


def stated():
    """The recipes that come from a document, beside what the document states."""
    rows = [
        [f"`{row['recipe']}`", row["stated"], score(row["accuracy"]), str(len(row["accuracy"]))]
        for row in read("accuracy.json")
        if "stated" in row
    ]
    return markdown(["recipe", "its document states", "measured here", "n"], rows)


def speed():
    """What one gets by machine."""
    head = ["machine", "arithmetic", "images a second", "over a plain loop", "`default`, 24 epochs", "10 epochs, as `sprint` was"]
    rows = [
        [
            row["machine"], row["precision"], f"{row['training']:,}" if row["training"] else "not measured",
            f"{row['reference']:.2f}" if row["reference"] else "not measured",
            duration(row["default_seconds"]) + (" by `bench`'s estimate" if row.get("estimated") else ""),
            duration(row["sprint_seconds"]),
        ]
        for row in read("speed.json")
    ]  # fmt: skip
    return markdown(head, rows)


def trial_table(file):
    import trial

    content = read(file)
    return f"{content['question']} Expected: {content['expected']}\n\n{trial.table(content)}\n"


TABLES = {"headline": headline, "accuracy": accuracy, "stated": stated, "speed": speed}


def filled(text):
    """A document with its tables made anew."""

    def table(mark):
        name = mark["name"].strip()
        made = trial_table(name.removeprefix("trial ")) if name.startswith("trial ") else TABLES[name]()
        return f"{mark[1]}\n{made}\n"

    return MARKED.sub(table, text)


def main(arguments):
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{name}: {'out of date' if '--check' in arguments else 'written'}" for name in stale) or "up to date")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
