"""What all commands share: help, usage errors, options, plain output. What a command does is tested with its job."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest
import typer

import cifar_resnet
from cifar_resnet import Recipe, load_checkpoint
from cifar_resnet import cli as command_line

SMALL = ("--dataset", "digits", "--train-limit", 48, "--test-limit", 20, "--batch-size", 16, "--width", 4)


def fresh(*arguments, code=None):
    """A process of its own; without torch it answers at once."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "cifar_resnet"]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_version_and_module():
    assert fresh("--version").stdout == f"cifar-resnet {cifar_resnet.__version__}\n"


def test_help_and_usage_errors_are_answered_without_torch():
    code = """
import contextlib, io, sys
from cifar_resnet.cli import main
for arguments in (["--help"], ["train", "--help"], ["train", "--epochs", "0"], ["train", "--recipe", "nine"], ["recipes"], ["recipes", "page"]):
    sys.argv = ["cifar-resnet", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as exit:
            assert (exit.code or 0) == (2 if "cifar-resnet: " in out.getvalue() else 0), out.getvalue()
    heavy = {"torch", "matplotlib", "numpy", "sklearn", "scipy", "albumentations"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    done = fresh(code=code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    done = fresh(code="import cifar_resnet, sys; assert not {'torch', 'pydantic', 'matplotlib'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in cifar_resnet.__all__:
        assert getattr(cifar_resnet, name) is not None
    with pytest.raises(AttributeError):
        _ = cifar_resnet.nothing


COMMANDS = typer.main.get_command(command_line.app).commands
BRIEF = [name for name, command in COMMANDS.items() if isinstance(command, command_line.BriefCommand)]


@pytest.fixture
def helped(cli, monkeypatch):
    """What a command's help says in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", None)  # in GitHub's workflows, what is no terminal gets colours
    monkeypatch.setattr("rich.console.detect_legacy_windows", lambda: False)  # such a console leaves out the last column

    def run(command, option="--help"):
        code, out, err = cli(command, option)
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= 80
        return out

    return run


def words(out):
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", out).split())


def test_all_help_names_every_field_with_its_default(helped):
    text = words(helped("train", "--help-all"))
    for name, field in Recipe.model_fields.items():
        default = {"None": "none", "True": "yes", "False": "no"}.get(str(field.default), str(field.default))
        assert re.search(rf"--{name.replace('_', '-')} .*?\[default: {re.escape(default)}[;\]]", text), name
    assert "--save-every-minutes" in text


def test_help_begins_with_what_one_uses(helped):
    lines = helped("train").splitlines()
    assert len(lines) < 50
    shown = re.findall(r"^│ (--[a-z-]+)", "\n".join(lines), re.MULTILINE)
    assert shown[:4] == ["--recipe", "--dataset", "--epochs", "--batch-size"]
    assert {"--max-lr", "--seed", "--device", "--resume", "--help-all"} < set(shown)
    assert "--weight-decay" not in shown
    assert len([line for line in lines if line.startswith("  cifar-resnet train ")]) == 3


def test_a_message_has_one_line_and_shows_what_a_terminal_would_obey(refused, tmp_path):
    assert f"there is no checkpoint {tmp_path / 'my  run' / 'checkpoint.pt'}" in refused(1, "evaluate", tmp_path / "my  run" / "checkpoint.pt")
    assert os.sep + "\\x1b[31mred" in refused(1, "evaluate", tmp_path / "\x1b[31mred")


def test_the_usage_of_predict_says_that_the_run_can_be_left_out(helped):
    assert "predict [OPTIONS] [RUN] IMAGE..." in words(helped("predict"))


def choices(command):
    """The values that an option of the command takes, by option."""
    function = next(each.callback for each in command_line.app.registered_commands if each.callback.__name__ == command)
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind = get_args(parameter.annotation)[0]
        for part in (kind, *get_args(kind)):
            yield name.replace("_", "-"), [str(value) for value in get_args(part)] if get_origin(part) is Literal else []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_choice_and_cuts_nothing(helped, command):
    brief = helped(command)
    whole = helped(command, "--help-all") if command in BRIEF else brief
    assert len(brief.splitlines()) < 50
    assert "[default: (" not in whole
    assert "…" not in whole
    for option, values in choices(command.replace("-", "_")):
        assert all(re.search(rf"--{option} .*{value}", words(whole)) for value in values), option
    examples = re.findall(r"^  cifar-resnet (.*)$", brief, re.MULTILINE)
    assert bool(examples) == (command in BRIEF)
    for name, *arguments in map(str.split, examples):
        COMMANDS[name].make_context(name, arguments)


def test_recipes_are_listed_with_origin_and_assumptions(cli):
    code, out, _ = cli("recipes")
    assert code == 0
    for name, preset in cifar_resnet.PRESETS.items():
        assert name in out
        assert preset.origin.split()[0] in out
    code, out, _ = cli("recipes", "page")
    assert json.loads(out) == Recipe.build("page").to_dict()


def test_one_recipe_is_a_file_to_take_back_and_what_was_assumed_is_said_aside(cli, tmp_path):
    assert "the later of its two" not in cli("recipes")[1]
    code, out, err = cli("recipes", "week5-s10")
    assert (code, json.loads(out)) == (0, Recipe.build("week5-s10").to_dict())
    assert "assumed: max LR 1.73e-2 (the later of its two)" in err


USAGE_ERRORS = [
    (("train", "--epochs", "0"), "--epochs 0"),
    (("train", "--max-lr", "-0.1"), "--max-lr -0.1"),
    (("train", "--max-lr", "much"), "--max-lr 'much'"),
    (("train", "--recipe", "defualt"), "did you mean default"),
    (("train", "--recipe", "runs/a/recipe.json"), "a file is given by --recipe-file"),
    (("train", "--dataset", "digits", "--batch-size", "2000"), "--batch-size 2000"),
    (("train", "--dataset", "mnist"), "mnist"),
    (("train", "--dataset", "v\udcf6gel"), "is not UTF-8 here; set PYTHONUTF8=1, or rename it"),
    (("train", "--width", "0"), "--width 0"),
    (("train", "--target", "101"), "--target"),
    (("train", "--loader", "fast"), "fast"),
    (("train", "--device", "tpu"), "--device tpu"),
    (("train", "--resume", "/nowhere"), f"{os.sep}nowhere"),
    (("train", "--recipe-file", "/nowhere.json"), f"{os.sep}nowhere.json"),
    (("train", "--nonsense"), "--nonsense"),
    (("train", "--quiet"), "it goes before the command"),
    (("train", "--output", "runs/mine"), "train takes the folder of a run as --run-dir"),
    (("train", "-q"), "it goes before the command"),
    (("-q",), "--quiet goes before a command, and none is given"),
    (("recipes", "nine"), "nine"),
    (("bench", "--split", "0.2"), "No such option"),
    (("evaluate",), "there is no run in"),
    (("predict",), "IMAGE"),
    (("predict", "x.png"), "there is no run in"),
    (("train", "--resume", "latest"), "there is no run in"),
    (("misclassified", "x", "y"), "misclassified takes one run, not 2: x, y"),
    (("report", "x", "y", "z"), "report takes one run, not 3: x, y, z"),
    (("export", "x", "y"), "export takes one run"),
    (("evaluate", "x", "y", "--run-dir", "z"), "--run-dir takes the files of one run, not of 2"),
    (("evaluate", "x", "--tta", "crop"), "crop"),
    (("misclassified", "x", "--count", "0"), "--count 0"),
    (("train", "--dataset", "digits", "--workers", "-1"), "--workers -1"),
    (("train", "--dataset", "digits", "--save-every-minutes", "0"), "--save-every-minutes 0"),
    (("trian",), "train"),
    (("train", "--dataset", "digits", "--workers", "2"), "--loader albumentations"),
    (("train", "--dataset", "digits", "--device", "cpu:x"), "--device cpu:x"),
    (("train", "--mean", "125", "123", "114"), "not within 0 to 1"),
    (("train", "--max-lr", "find", "--div-factor", "10"), "--div-factor"),
    (("train", "--max-lr", "find", "--dataset", "nowhere", "--repeat", "1"), "--repeat 1 must be"),
    (("train", "--max-lr", "find", "--dataset", "nowhere", "--repeat", "3", "--seed", 2**32 - 1), "--seed 4294967297"),
    (("train", "--max-lr", "find", "--dataset", "nowhere", "--save-every-minutes", "0"), "--save-every-minutes 0"),
    (("train", "--suggest", "valley"), "--suggest valley goes with --max-lr find"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE_ERRORS)
def test_wrong_usage_is_one_line_and_exit_code_2(refused, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(2, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("train", "--epochs", "0"), ("train", "--nonsense"), ("train", "--dataset", "mnist")])
def test_of_several_processes_the_first_says_what_was_wrong(cli, monkeypatch, arguments):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for size, rank in (("2", "0"), ("2", "x"), ("2", "2"), ("1", "1"), (None, "1")):  # a rank alone may be set by another program
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE")
        code, out, first = cli(*arguments)
        assert (code, out, first.count("\n"), waited) == (2, "", 1, [])
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in ("1", "7"):
        monkeypatch.setenv("RANK", rank)
        assert cli(*arguments) == (2, "", "")
    assert len(waited) == 2  # as torchrun ends all the others when one has failed: the first would not come to say it


def test_what_fails_in_one_of_several_processes_is_said_by_it(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = cli("evaluate", tmp_path)
    assert (code, err.count("cifar-resnet: there is no checkpoint")) == (1, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv, which torch's wheels for Windows lack")
def test_torchrun_says_a_usage_error_once():
    options = ("--nproc-per-node", 2, "-m", "cifar_resnet", "train", "--epochs", 0)
    done = fresh(*options, code="from torch.distributed.run import main; main()")
    assert done.returncode != 0
    assert done.stderr.count("cifar-resnet: --epochs 0") == 1
    assert "exitcode  : 2" in done.stderr


def test_a_schedule_is_drawn_before_the_run(cli, refused, tmp_path):
    for options in (("--recipe", "page"), ("--policy", "triangular", "--cycles", 2)):
        code, out, _ = cli("schedule", *options, "--output", tmp_path / "lr.svg")
        assert code == 0
        assert "lr.svg" in out
        assert b"<svg" in (tmp_path / "lr.svg").read_bytes()
    assert ".gif" in refused(2, "schedule", "--output", tmp_path / "lr.gif")
    assert "go with --policy triangular" in refused(2, "schedule", "--cycles", 2)
    assert "--layer prep does not go with --folds" in refused(2, "misclassified", "--sort", "label", "--folds", 3, "--layer", "prep")
    assert "--epochs does not go with --policy triangular" in refused(2, "schedule", "--policy", "triangular", "--epochs", 3)
    assert "--min-lr 3" in refused(2, "schedule", "--policy", "triangular", "--min-lr", 3)
    assert "--cycles 0" in refused(2, "schedule", "--policy", "triangular", "--cycles", 0)


def test_a_missing_checkpoint_is_exit_code_1(refused, tmp_path):
    for command in ("evaluate", "misclassified", "export", "predict"):
        images = [tmp_path] if command == "predict" else []
        assert str(tmp_path / "none.pt") in refused(1, command, tmp_path / "none.pt", *images)


def test_a_run_directory_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(1, "train", "--dataset", "digits", "--run-dir", tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 1, "out of memory; try a smaller --batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), 1, "out of memory; try a smaller --batch-size"),
        (OSError(28, "No space left on device", "/x/y"), 1, "[Errno 28] No space left on device: '/x/y'"),
    ],
)
def test_what_ends_a_command_is_one_line_with_its_exit_code(cli, monkeypatch, error, code, line):
    def fail(*_):
        raise error

    monkeypatch.setattr("cifar_resnet.look.console.recipes", fail)
    assert cli("recipes") == (code, "", f"cifar-resnet: {line}\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_has_no_letters_for_is_replaced(encoding):
    code = r"""
from cifar_resnet.cli import main
from cifar_resnet.look import console
import sys
console.recipes = lambda: console.say("95 \u00b1 1 \u00b7 \u732b \udcff")
sys.argv = ["cifar-resnet", "recipes", *("\u732b" for _ in sys.argv[1:])]
main()
"""
    for arguments in ([], ["any"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, timeout=120,
            env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        )  # fmt: skip
        out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
        if arguments:
            assert (done.returncode, out, err.count("\n")) == (2, "", 1)
            assert err.startswith("cifar-resnet: no recipe '")
        else:
            assert (done.returncode, err) == (0, "")
            assert out.rstrip() == {"ascii": r"95 +/- 1 | ? \udcff", "cp1252": "95 \u00b1 1 \u00b7 ? \\udcff"}[encoding]


def test_ctrl_c_is_exit_code_130_without_a_traceback(cli, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cifar_resnet.look.console.recipes", fail)
    code, out, err = cli("recipes")
    assert (code, out, err) == (130, "", "cifar-resnet: interrupted\n")


def test_without_a_terminal_there_is_one_plain_line_an_epoch(cli, tmp_path, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", *SMALL, "--epochs", 2, "--holdout", 30)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "digits-1"
    for line, row in zip(lines, load_checkpoint(folder).history, strict=True):
        assert f"holdout loss {row['test_loss']:.4f} accuracy {row['test_accuracy']:.2f} %" in line
    assert json.loads((folder / "metrics.json").read_text("utf-8"))["evaluated_on"] == "holdout"
    shown = folder.relative_to(tmp_path)
    assert f"next:\n  cifar-resnet evaluate {shown}\n  cifar-resnet misclassified {shown}\n  cifar-resnet predict {shown} IMAGE\n" in out


@pytest.mark.parametrize("words", [("--epochs", "ten"), ("--epochs=ten",), ("--seed", "1", "--epochs", "ten")])
def test_a_value_of_the_wrong_type_is_shown(words, refused):
    line = refused(2, "train", *words)
    assert "Invalid value for '--epochs'" in line  # what follows is Typer's, and differs from version to version
    assert "'ten'" in line


def test_of_an_option_of_three_values_all_are_shown(refused):
    line = refused(2, "samples", "--mean", "0.1", "0.2", "--std", "1", "1", "1")
    assert "Invalid value for '--mean'" in line
    assert "'0.1 0.2 --std': Input should be" in line or "'--std' is not" in line


def test_an_empty_word_is_refused(refused):
    assert "a word is empty; perhaps a variable of the shell is not set" in refused(2, "predict", "run", "")
    assert "--run-dir is empty" in refused(2, "evaluate", "run", "--run-dir", "")


def test_a_backend_of_matplotlib_that_is_not_there_does_no_harm(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "bogus")
    assert cli("schedule", "--output", tmp_path / "schedule.png")[0] == 0


@pytest.mark.posix
@pytest.mark.parametrize(("words", "code"), [("recipes nope", 2), ("bogus", 2), ("recipes default", 0)])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_change_no_exit_code_and_no_result(words, code, closed, tmp_path):
    command = f"{shlex.quote(sys.executable)} -m cifar_resnet {words} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if closed == "2>&-":
        assert done.stdout == (Recipe().to_json() if code == 0 else "")


def test_ctrl_c_while_python_imports_is_one_line():
    lines = [
        "import sys",
        "class Interrupts:",
        "    def find_spec(self, name, *_):",
        "        if name == 'cifar_resnet.cli': raise KeyboardInterrupt",
        "sys.meta_path.insert(0, Interrupts())",
        "from cifar_resnet.__main__ import main; main()",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "cifar-resnet: interrupted\n")


@pytest.mark.parametrize("word", ["--run-dir=", "--data-dir=", "--dataset="])
def test_an_option_whose_variable_is_not_set_is_refused(word, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{word[:-1]} is empty; perhaps a variable of the shell is not set" in refused(2, "train", "--epochs", 2, word)
    assert not any(tmp_path.iterdir())


def test_commands_to_go_on_with_name_where_the_images_are(cli, fake_cifar10, tmp_path, no_figures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ("--data-dir", fake_cifar10, "--convolution", "torch")
    small = (*where, "--width", 4, "--batch-size", 16, "--epochs", 2)
    said = cli("train", *small, "--run-dir", "run")[1]
    for command in re.findall(r"cifar-resnet (evaluate .*|misclassified .*)", said):
        assert cli(*command.split())[0] == 0
    found = cli("find-lr", *small, "--loader", "albumentations", "--workers", 0, "--trial-steps", 0, "--num-iter", 20, "--suggest", "valley")
    options = f"--data-dir {fake_cifar10} --loader albumentations --workers 0 --convolution torch"
    assert options in found[1].replace("\n", " ")
