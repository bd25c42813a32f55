import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import cifar_resnet
from cifar_resnet import Recipe, console, load_checkpoint, samples


def fresh(*arguments):
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cifar_resnet", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_version_and_module():
    assert fresh("--version").stdout == f"cifar-resnet {cifar_resnet.__version__}\n"


def test_help_and_usage_errors_answer_at_once_without_torch():
    """In half a second; on a slow machine in three times what the libraries behind every answer take, measured beside it."""

    def seconds(code):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
        return time.monotonic() - began

    code = "import sys; sys.argv = ['cifar-resnet', *{}]\nfrom cifar_resnet.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    for arguments in (["--help"], ["train", "--help"], ["train", "--epochs", "0"], ["train", "--recipe", "nine"], ["recipes"]):
        rounds = [(seconds("import pydantic.main, typer.rich_utils"), seconds(code.format(arguments))) for _ in range(5)]
        assert any(answer < max(0.5, 3 * libraries) for libraries, answer in rounds), (arguments, rounds)


def test_importing_the_package_imports_nothing_heavy():
    code = "import cifar_resnet, sys; assert not {'torch', 'pydantic', 'matplotlib'} & set(sys.modules); cifar_resnet.train"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there():
    for name in cifar_resnet.__all__:
        assert getattr(cifar_resnet, name) is not None
    with pytest.raises(AttributeError):
        _ = cifar_resnet.nothing


def test_help_names_every_field_with_its_default(cli):
    code, out, _ = cli("train", "--help")
    assert code == 0
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", out).split())
    for name, field in Recipe.model_fields.items():
        default = {"None": "none", "True": "yes", "False": "no"}.get(str(field.default), str(field.default))
        assert re.search(rf"--{name.replace('_', '-')} .*?\[default: \(?{re.escape(default)}\)?\]", text), name


def test_recipes_are_listed_with_origin_and_assumptions(cli):
    code, out, _ = cli("recipes")
    assert code == 0
    for name, preset in cifar_resnet.PRESETS.items():
        assert name in out
        assert preset.origin.split()[0] in out
    code, out, _ = cli("recipes", "page")
    assert json.loads(out) == json.loads(Recipe.build("page").to_json())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--epochs", "0"), "--epochs 0"),
        (("train", "--max-lr", "-0.1"), "--max-lr -0.1"),
        (("train", "--max-lr", "much"), "--max-lr 'much'"),
        (("train", "--recipe", "defualt"), "did you mean default"),
        (("train", "--dataset", "digits", "--batch-size", "2000"), "--batch-size 2000"),
        (("train", "--dataset", "mnist"), "mnist"),
        (("train", "--loader", "fast"), "fast"),
        (("train", "--device", "tpu"), "--device tpu"),
        (("train", "--resume", "/nowhere"), "/nowhere"),
        (("train", "--recipe-file", "/nowhere.json"), "/nowhere.json"),
        (("train", "--nonsense"), "--nonsense"),
        (("recipes", "nine"), "nine"),
        (("evaluate",), "checkpoint"),
        (("evaluate", "x", "--tta", "crop"), "crop"),
        (("misclassified", "x", "--count", "0"), "--count 0"),
        (("train", "--dataset", "digits", "--workers", "-1"), "--workers -1"),
        (("train", "--dataset", "digits", "--save-every-minutes", "0"), "--save-every-minutes 0"),
        (("trian",), "train"),
        (("train", "--dataset", "digits", "--workers", "2"), "--loader albumentations"),
        (("train", "--dataset", "digits", "--device", "cpu:x"), "--device cpu:x"),
        (("train", "--mean", "125", "123", "114"), "not within 0 to 1"),
        (("train", "--max-lr", "find", "--div-factor", "10"), "--div-factor"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(refused, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(2, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_is_drawn_before_the_run(cli, refused, tmp_path):
    for options in (("--recipe", "page"), ("--policy", "triangular", "--cycles", 2)):
        code, out, _ = cli("schedule", *options, "--output", tmp_path / "lr.svg")
        assert code == 0
        assert "lr.svg" in out
        assert b"<svg" in (tmp_path / "lr.svg").read_bytes()
    assert ".gif" in refused(2, "schedule", "--output", tmp_path / "lr.gif")
    assert "--min-lr 3" in refused(2, "schedule", "--policy", "triangular", "--min-lr", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named_with_those_that_are(refused):
    assert "cpu" in refused(2, "train", "--dataset", "digits", "--device", "cuda")


def test_a_missing_checkpoint_is_exit_code_1(refused, tmp_path):
    for command in ("evaluate", "misclassified"):
        assert str(tmp_path / "none.pt") in refused(1, command, tmp_path / "none.pt")


def test_a_run_directory_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(1, "train", "--dataset", "digits", "--run-dir", tmp_path / "file" / "run")


SMALL = ("--dataset", "digits", "--train-limit", 48, "--test-limit", 20, "--batch-size", 16)


def test_without_a_terminal_there_is_one_plain_line_an_epoch(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", *SMALL, "--epochs", 2, "--holdout", 30)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-digits-s0-\d{8}T\d{6}Z", folder.name)
    for line, row in zip(lines, load_checkpoint(folder).history, strict=True):
        assert f"holdout loss {row['test_loss']:.4f} accuracy {row['test_accuracy']:.2f} %" in line
    assert json.loads((folder / "metrics.json").read_text())["evaluated_on"] == "holdout"


def test_on_a_terminal_there_is_a_table_with_a_row_an_epoch(tiny_run, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=120, highlight=False))
    checkpoint = load_checkpoint(tiny_run)
    from cifar_resnet.data import load
    from cifar_resnet.engine import Epoch, Step

    state = checkpoint.state(torch.device("cpu"))
    rows, state.history = state.history, []
    with console.TrainingTable() as table:
        table.begin(checkpoint.recipe, tiny_run, checkpoint.environment, load(checkpoint.recipe), state)
        for row in rows:
            table.step(Step(row["epoch"], 1, 3, 0.1, torch.tensor(1.0)), state)
            table.epoch(Epoch(row))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    for row in rows:
        assert f"{row['test_accuracy']:.2f} %" in shown
    assert "images/s" in shown


def test_train_with_max_lr_find_uses_both_ends(cli, tmp_path, monkeypatch):
    from cifar_resnet import lr_search
    from cifar_resnet.lr_finder import Suggestions

    monkeypatch.setattr(lr_search, "suggest", lambda history, trials, longer: Suggestions(1.0, 1.0, 1.0, 0.06, 0.002))
    monkeypatch.setattr(lr_search, "range_test", lambda *arguments, **options: None)
    tried = []
    monkeypatch.setattr(lr_search, "run_trials", lambda *arguments, **options: tried.append(arguments) or [])
    code, out, _ = cli("train", *SMALL, "--epochs", 1, "--max-lr", "find", "--run-dir", tmp_path / "run")
    assert code == 0
    recipe = load_checkpoint(tmp_path / "run").recipe
    assert (recipe.max_lr, recipe.div_factor) == (0.06, pytest.approx(30))
    options = ("--epochs", 1, "--max-lr", "find", "--suggest", "minimum", "--run-dir", tmp_path / "other")
    assert cli("train", *SMALL, *options)[0] == 0
    recipe = load_checkpoint(tmp_path / "other").recipe
    assert (recipe.max_lr, recipe.div_factor) == (1.0, Recipe().div_factor)
    assert len(tried) == 1  # another rule needs none


@pytest.mark.cifar10
def test_a_short_run_on_real_images_learns(cli, tmp_path):
    options = ("--epochs", 2, "--train-limit", 1024, "--test-limit", 300, "--batch-size", 64, "--max-lr", 0.1)
    code, out, _ = cli("train", *options, "--run-dir", tmp_path / "run")
    assert code == 0
    history = load_checkpoint(tmp_path / "run").history
    assert history[-1]["train_accuracy"] > 25  # 10 by chance
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert "last epoch:" in out


def test_the_readme_tells_the_commands_that_are_there(cli):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    _, listed, _ = cli("--help")
    commands = set(re.findall(r"^│ ([a-z][a-z-]+)\s", listed, re.MULTILINE))
    assert commands
    assert {command for command in commands if f"cifar-resnet {command}" in readme} == commands
    assert set(re.findall(r"^ *cifar-resnet ([a-z-]+)", readme, re.MULTILINE)) <= commands


@pytest.mark.parametrize("loader", [("--loader", "tensor"), ("--loader", "albumentations", "--workers", 0)], ids=str)
def test_samples_are_drawn_by_the_loader_itself(loader, cli, tmp_path):
    options = ("--dataset", "digits", "--cutout-size", 12, "--views", 3, "--output", tmp_path / "s.png")
    assert cli("samples", *options, *loader)[0] == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_the_views_beside_an_image_are_of_that_image():
    """Without crop, flip and cutout each view is the image itself."""
    recipe = Recipe.build("digits", pad=0, cutout_count=0, flip_probability=0.0)
    figure = samples(recipe, views=3)
    rows = np.array([axis.images[0].get_array() for axis in figure.axes]).reshape(10, 4, 32, 32, 3)
    for view in (1, 2, 3):
        assert np.array_equal(rows[:, view], rows[:, 0])
    labels = [axis.get_ylabel() for axis in figure.axes[::4]]
    assert labels == [str(digit) for digit in range(10)]
    assert len({rows[i, 0].tobytes() for i in range(10)}) == 10


def test_pictures_come_in_the_format_asked_for(cli, tiny_run, tmp_path):
    assert cli("evaluate", tiny_run, "--format", "svg", "--run-dir", tmp_path)[0] == 0
    assert cli("misclassified", tiny_run, "--format", "pdf", "--count", 2, "--run-dir", tmp_path)[0] == 0
    svgs = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert set(svgs) == {"confusion_matrix.svg", "class_accuracy.svg", "reliability.svg"}
    assert all(b"<svg" in content for content in svgs.values())
    assert all(path.read_bytes().startswith(b"%PDF") for path in tmp_path.glob("*.pdf"))
    assert len(list(tmp_path.glob("*.pdf"))) == 2


def test_a_class_that_does_not_exist_is_named(refused, tiny_run):
    line = refused(2, "misclassified", tiny_run, "--true", "cow")
    assert "--true cow: no such class; there are 0, 1, 2" in line
