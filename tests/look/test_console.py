"""What is printed: on a terminal, without one, and nothing at all."""

import io

import numpy as np
import pytest
from rich.console import Console

from cifar_resnet import Recipe
from cifar_resnet.look import analysis, console
from cifar_resnet.training.lr_finder import FoundLR, History, Suggestions, Trial


@pytest.fixture
def shown(monkeypatch):
    """What a terminal of so many columns shows of what a function prints, line by line."""

    def run(width, function, *arguments):
        file = io.StringIO()
        monkeypatch.setattr(console, "console", Console(file=file, force_terminal=True, color_system=None, width=width))
        function(*arguments)
        return [line.rstrip() for line in file.getvalue().splitlines()]

    return run


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_the_summary_has_a_total_row_and_folds_no_name(shown, width):
    content = analysis.summary(Recipe(batch_size=2))
    lines = shown(width, console.summary, content)
    assert max(map(len, lines)) <= width
    for row in content["layers"]:
        assert len([line for line in lines if line.split()[:1] == [row["layer"]]]) == 1
    (total,) = [line for line in lines if line.startswith("total")]
    assert total.split() == ["total", "6,573,130", "379.27"]  # millions, of one image
    (names,), legend = ([line.split() for line in lines if line.startswith("layer ")], " ".join(lines[-5:]))
    for name in ("k", "jump", "start"):
        assert (f"{name}: " in legend) == (name in names)


RULES = Suggestions(steepest=3.1, valley=0.2, minimum_tenth=0.05, max_lr=0.356, min_lr=0.0142)
TRIALS = [Trial(0.03, 1.5), Trial(0.06, 1.25), Trial(5.0, float("inf"))]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_search_says_first_what_to_take_then_what_to_type(shown, width):
    found = FoundLR(History(np.ones(1), np.ones(1)), RULES, TRIALS, [], 50)
    command = "cifar-resnet train --recipe default --max-lr 0.356 --div-factor 25.1"
    lines = shown(width, console.lr_suggestions, found, "recommended", command, "cifar-resnet train --width 8 --max-lr find")
    assert " ".join(lines[:2]).startswith("recommended: LR 0.356 at the peak, 0.0142 at the start")
    order = [next(i for i, line in enumerate(lines) if text in line) for text in ("recommended:", command, "of 50 steps", "steepest")]
    assert order == sorted(order)
    assert [line.split() for line in lines[order[2] + 2 : order[2] + 5]] == [["0.03", "1.500"], ["0.06", "1.250", "lowest"], ["5", "diverged"]]
    assert "  cifar-resnet train --width 8 --max-lr find" in lines


def test_a_search_that_recommends_nothing_says_so_first(shown):
    found = FoundLR(History(np.ones(1), np.ones(1)), RULES._replace(max_lr=None, min_lr=None, why_not="it never fell"), [], [])
    lines = shown(80, console.lr_suggestions, found, "valley", "cifar-resnet train --max-lr 0.2", "cifar-resnet train --max-lr find")
    assert lines[:3] == ["no LR is recommended: it never fell", "to train by the rule valley:", "  cifar-resnet train --max-lr 0.2"]
    assert not any("--max-lr find" in line for line in lines)


@pytest.mark.parametrize("width", [40, 80, 140])
def test_runs_are_compared_in_columns_that_fit(shown, width):
    def group(number, mean):
        runs = [{"path": f"runs/default-{number}/checkpoint.pt", "seed": 0}]
        losses = dict(test_loss=0.2 + number, train_loss=0.9, seconds=4440)
        return {"label": "default: max_lr 0.4", "n": 1, "mean": mean, "std": None, **losses, "differs": {"max_lr": number / 10}, "runs": runs, "folders": [f"runs/default-{number}"]}

    content = {"evaluated_on": "test", "groups": [group(number, 90 + number) for number in range(6)]}
    lines = shown(width, console.comparison, content)
    assert max(map(len, lines)) <= width
    folders = " ".join(line for line in lines if line.startswith("runs ")).split()
    assert [each for each in folders if each != "runs"] == [f"runs/default-{number}" for number in (5, 4, 3, 2, 1, 0)]
    losses = " ".join(line.removeprefix("test loss") for line in lines if line.startswith("test loss")).split()
    assert losses == ["5.2000", "4.2000", "3.2000", "2.2000", "1.2000", "0.2000"]
    assert any(line.split()[:4] == ["training", "1", "h", "14"] for line in lines)


@pytest.mark.parametrize("width", [80, 200])
def test_runs_are_compared_under_their_folders(shown, width):
    def group(mean, *folders):
        runs = [{"seed": seed} for seed in range(2)]
        numbers = dict(mean=mean, std=0.1, test_loss=0.2, train_loss=0.9, seconds=60)
        return {"label": "default: width 8", "n": len(runs), **numbers, "differs": {"width": 8}, "folders": folders, "runs": runs}

    groups = [group(90, "r-1"), group(80, "runs/a-1", "runs/b\n-7"), group(70, "r-2/s0")]
    lines = shown(width, console.comparison, {"evaluated_on": "test", "groups": groups})
    assert [line.split() for line in lines[:2]] == [["runs", "r-1", "runs/a-1", "r-2/s0"], ["runs/b\\n-7"]]


@pytest.mark.parametrize(("width", "said"), [(40, "the terminal has room for 1 of 3 classes; --json prints all"), (120, "")])
def test_classes_that_find_no_room_are_told_of(shown, width, said):
    classes = [{"class": f"class {number}", "probability": 0.3} for number in range(3)]
    lines = shown(width, console.predictions, [{"image": "a/long/name.png", "classes": classes}])
    assert " ".join(lines[2:]) == said


def test_many_classes_and_a_long_name_go_into_a_file_on_one_line(monkeypatch):
    found = [{"image": "x" * 1500, "classes": [{"class": f"class {number}", "probability": 0.01} for number in range(100)]}]
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=file, width=console.UNBOUNDED, highlight=False))
    console.predictions(found)
    assert len(file.getvalue().splitlines()) == 2


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_the_list_of_recipes_fits(shown, width):
    lines = shown(width, console.recipes)
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if line.startswith("default "))
    assert row.split()[:2] == ["default", "24"]
    assert "95.05 ± 0.12 %" in row
    assert ("9.4 s, NVIDIA H200" in row) == (width >= 80)


def test_one_label_is_in_the_singular(shown):
    for count, words in ((1, "1 label is less probable"), (2, "2 labels are less probable"), (0, "0 labels are less probable")):
        mistake = analysis.Mistake(*[0] * len(analysis.Mistake._fields))
        assert any(line.startswith(words) for line in shown(80, console.doubtful_labels, [mistake] * count))


def test_quiet_prints_nothing(tiny_run, tmp_path, cli, monkeypatch, no_figures):
    monkeypatch.setattr(console.console, "quiet", False)  # as it is again afterwards
    assert cli("--quiet", "evaluate", tiny_run, "--run-dir", tmp_path) == (0, "", "")
    assert (tmp_path / "evaluation.json").exists()


def test_brackets_in_a_message_are_no_markup():
    with console.console.capture() as captured:
        console.say("written in [bold]here[/bold] :smile:")
    assert captured.get() == "written in [bold]here[/bold] :smile:\n"


def test_prose_is_wrapped_between_words_and_a_path_stays_whole(monkeypatch):
    path, shown = "/a" * 40, io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=40, highlight=False))
    console.say(f"one two three four five six seven eight nine {path} is not empty; go on: cifar-resnet train --resume {path}")
    lines = shown.getvalue().splitlines()
    assert lines[0] == "one two three four five six seven eight"
    assert f"{path}" in lines
    assert lines[-1] == f"  cifar-resnet train --resume {path}"
    assert all(len(line) <= 40 or path in line for line in lines)


def test_a_number_and_its_percent_stay_together(shown):
    for width in range(20, 40):
        lines = shown(width, console.say, "test accuracy 98.61 % of 360 images, expected calibration error 12.80 %")
        assert not any(line.startswith("%") for line in lines)
        assert " ".join(lines) == "test accuracy 98.61 % of 360 images, expected calibration error 12.80 %"


def test_of_predictions_a_narrow_terminal_shows_fewer_but_whole(shown):
    classes = [{"class": name, "probability": p} for name, p in (("automobile", 0.5), ("airplane", 0.3), ("ship", 0.2))]
    found = [{"image": "photo.png", "classes": classes}]
    wide, narrow = shown(80, console.predictions, found), shown(40, console.predictions, found)
    assert " ".join(wide[1].split()) == "photo.png automobile 50.0 % airplane 30.0 % ship 20.0 %"
    assert " ".join(narrow[1].split()) == "photo.png automobile 50.0 %"
