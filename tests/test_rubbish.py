"""Rubbish in: options, damaged checkpoints, damaged JSON. Never a traceback, a success that is none, or a changed input.

The command line runs in this process on a tiny network; every valid case trains one step. Each test has a quick run and,
marked slow, one of forty times as many cases.
"""

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from run_helpers import StopAfter

from cifar_resnet import Recipe, load_checkpoint, train
from cifar_resnet.cli import main
from cifar_resnet.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("no_figures")
STEP = dict(dataset="digits", train_limit=12, test_limit=10, batch_size=12, epochs=1, width=4)
OPTIONS = [word for name, value in STEP.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def cases(quick):
    """Runs the property `check(data, folder, source, stopped)` on so many cases, and on forty times as many where slow ones are run."""

    def decorate(check):
        @pytest.mark.parametrize("count", [quick, pytest.param(40 * quick, marks=pytest.mark.slow)])
        def test(tmp_path, source, stopped, count):
            number = iter(range(10**6))

            @settings(
                max_examples=count, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate],
            )  # fmt: skip
            @given(st.data())
            def run(data):
                folder = tmp_path / str(next(number))
                folder.mkdir()
                check(data, folder, source, stopped)
                shutil.rmtree(folder)

            run()
            print(f"{next(number)} cases")

        return test

    return decorate


def command(*arguments):
    """Exit code, after checking that a failure is one line on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["cifar-resnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
    code = exit.value.code or 0
    assert code in (0, 1, 2), err.getvalue()
    assert (err.getvalue().count("\n"), err.getvalue()[:14]) == ((1, "cifar-resnet: ") if code else (0, "")), err.getvalue()
    return code


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run of one step with averaging and Muon."""
    folder = tmp_path_factory.mktemp("rubbish") / "source"
    train(Recipe.build("default", **STEP, peak_epoch=0.5, ema_decay=0.9, ema_every=1), folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its first step of two."""
    folder = tmp_path_factory.mktemp("rubbish") / "stopped"
    with pytest.raises(Exception, match="stopped by SIGINT"):
        train(Recipe.build("default", **{**STEP, "batch_size": 6}, peak_epoch=0.5), folder, watcher=StopAfter(1))
    return folder


WORDS = st.sampled_from(
    ["", "0", "-1", "1e999", "nan", "inf", "1e-320", "none", "\x00", "💥", "../..", "1,2", "0x10", " 3", "--"]
)
NUMBERS = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.floats(0, 1), WORDS).map(str)
SIZES = ("dataset", "train_limit", "epochs", "width")  # which are to stay small; the first three are given once


@st.composite
def options(draw):
    """Some options of `train` with values that are right, wrong, or nearly right."""
    chosen = []
    fields = {name: field for name, field in Recipe.model_fields.items() if name not in SIZES}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=4)):
        flag, kind = f"--{name.replace('_', '-')}", fields[name].annotation
        if kind is bool:
            chosen.append(draw(st.sampled_from([flag, f"--no-{flag[2:]}"])))
            continue
        words = [word for part in (kind, *get_args(kind)) for word in get_args(part) if isinstance(word, str)]
        values = st.one_of(st.sampled_from(words), WORDS) if words else NUMBERS
        chosen += [flag, *(draw(values) for _ in range(3 if name in ("mean", "std") else 1))]
    for flag, values in {
        "--loader": ["tensor", "albumentations", "auto", "none"], "--workers": ["0", "-1", "x"], "--device": ["cpu", "cuda:9", "meta", "💥"],
        "--save-every-minutes": ["1e-9", "0", "nan", "-inf"], "--data-dir": ["/nowhere"], "--recipe-file": ["/nowhere", "/"],
        "--width": ["1", "5", "0", "1025", "4.5", "x"], "--target": ["0", "-1", "nan", "95"],
    }.items():  # fmt: skip
        if draw(st.integers(0, 5)) == 0:
            chosen += [flag, draw(st.sampled_from(values))]
    return chosen


@cases(15)
def test_options(data, folder, source, stopped):
    given = data.draw(options())
    code = command("train", *OPTIONS, "--run-dir", folder / "run", *given)
    finished = (folder / "run" / "learning_rate.png").exists()
    assert (code == 0) == finished
    if finished:
        assert load_checkpoint(folder / "run").finished


def damaged(data, whole):
    """Bytes cut short, overwritten, inserted or repeated at one place."""
    place, length = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.sampled_from([1, 2, 7, 100, 5000]))
    rubbish = data.draw(st.sampled_from([b"\x00", b"\xff", b"\x80", b"PK", b'"', b"9", b"}"])) * length
    kind = data.draw(st.sampled_from(["cut", "over", "insert", "drop", "repeat"]))
    return {
        "cut": whole[:place],
        "over": whole[:place] + rubbish[:length] + whole[place + length :],
        "insert": whole[:place] + rubbish + whole[place:],
        "drop": whole[:place] + whole[place + length :],
        "repeat": whole[: place + length] + whole[place:],
    }[kind]


def same(a, b):
    """Equality of nested plain values and tensors."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    return a == b


def used(path, folder):
    """Exit codes of commands that take a checkpoint, on this one, which must stay as it was."""
    before = path.read_bytes()
    codes = [
        command("evaluate", path, "--run-dir", folder / "out"),
        command("misclassified", path, "--run-dir", folder / "out"),
        command("train", "--resume", path.parent),
    ]
    assert path.read_bytes() == before
    return codes


@cases(8)
def test_damaged_bytes_of_a_checkpoint(data, folder, source, stopped):
    """Code 0 only for the content of `source`."""
    shutil.copytree(source, folder / "run")
    path = folder / "run" / "checkpoint.pt"
    path.write_bytes(damaged(data, path.read_bytes()))
    if 0 in used(path, folder):
        assert same(load_checkpoint(path).content, load_checkpoint(source).content)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 5), st.integers(), st.floats(), st.text(max_size=3),
        st.sampled_from([torch.zeros(0), torch.ones(3), torch.full((2, 2), torch.nan), torch.tensor(True), torch.tensor(1j)]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)  # fmt: skip


def replaced(data, value, inner):
    """A nested value with one of its parts, at any depth, replaced, dropped or added."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, copied = data.draw(st.sampled_from(keys)), value.copy()
        change = data.draw(st.integers(0, 9))
        if change == 0:
            del copied[key]
        elif change == 1 and isinstance(value, dict):
            copied[data.draw(st.sampled_from(["", "extra", 0]))] = data.draw(inner)
        else:
            copied[key] = replaced(data, value[key], inner)
        return copied
    return data.draw(inner)


@cases(4)
def test_checkpoints_of_other_content(data, folder, source, stopped):
    """Well-formed archives: what does not raise must be usable whole, so only a fitting value can give code 0."""
    shutil.copytree(source, folder / "run")
    path = folder / "run" / "checkpoint.pt"
    torch.save(replaced(data, torch.load(path, weights_only=True), VALUES), path)
    used(path, folder)
    shutil.copytree(stopped, folder / "stopped")
    path = folder / "stopped" / "checkpoint.pt"
    torch.save(replaced(data, torch.load(path, weights_only=True), VALUES), path)
    command("train", "--resume", path.parent)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)


@cases(10)
def test_damaged_recipes(data, folder, source, stopped):
    """As `--recipe-file`, and as all that a run left that was killed before its first checkpoint."""
    path = folder / "run" / "recipe.json"
    path.parent.mkdir()
    text = (source / "recipe.json").read_bytes()
    damage = data.draw(st.sampled_from([damaged, lambda *given: json.dumps(replaced(data, json.loads(text), JSON)).encode()]))
    text = damage(data, text)
    path.write_bytes(text)
    command("train", "--recipe-file", path, "--run-dir", folder / "new", *OPTIONS, "--holdout", "0")
    assert path.read_bytes() == text
    try:
        planned, _ = RunDir(path.parent).open()  # where, unlike in --recipe-file, the preset's name may be any
    except Exception:
        assert command("train", "--resume", path.parent) != 0
        assert path.read_bytes() == text
    else:
        if {name: getattr(planned, name) for name in STEP} == STEP:
            command("train", "--resume", path.parent)
