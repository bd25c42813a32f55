"""Every function of the library looks at what it is given, and says in one line what was wrong."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import cifar_resnet
from cifar_resnet import (
    Recipe,
    bench,
    build_model,
    compare,
    evaluate,
    export,
    find_lr,
    load_checkpoint,
    misclassified,
    predict,
    repeat,
    report,
    samples,
    train,
)
from cifar_resnet.arguments import check, checked
from cifar_resnet.errors import UsageError


def test_every_public_function_looks_at_its_arguments():
    functions = [getattr(cifar_resnet, name) for name in cifar_resnet.__all__]
    functions = [each for each in functions if inspect.isfunction(each)]
    assert len(functions) >= 13
    assert [each.__name__ for each in functions if not hasattr(each, "__wrapped__")] == []


SMALL = Recipe.build("digits", epochs=1, train_limit=32, test_limit=20, batch_size=16, width=4)
WRONG_TYPES = [
    (train, ("digits",), {}, "recipe 'digits' is of the type str; it takes Recipe | None, such as Recipe.build('digits')"),
    (train, ({"epochs": 8},), {}, "recipe {'epochs': 8} is of the type dict; it takes Recipe | None, such as Recipe.build(**fields)"),
    (train, (), dict(recipe=Recipe), "it takes Recipe | None"),
    (train, (SMALL, 5), {}, "run_dir 5 is of the type int; it takes Path | str | None"),
    (train, (SMALL,), dict(device=3), "device 3 is of the type int; it takes str"),
    (train, (SMALL,), dict(format=3), "format 3 is of the type int; it takes png, svg or pdf"),
    (train, (SMALL,), dict(tf32="no"), "tf32 'no' is of the type str; it takes bool"),
    (train, (SMALL,), dict(workers=1.5), "workers 1.5"),
    (train, (SMALL,), dict(target="94"), "target '94'"),
    (train, (SMALL,), dict(save_every_minutes=None), "save_every_minutes None"),
    (train, (SMALL,), dict(must_match=["epochs"]), "must_match ['epochs']"),
    (train, (SMALL,), dict(epochs=3), "unexpected keyword argument 'epochs'"),
    (repeat, (SMALL,), dict(count="3"), "count '3' is of the type str; it takes int | None"),
    (repeat, (SMALL,), dict(count=True), "count True"),
    (repeat, (SMALL, 2), dict(workrs=1), "unexpected keyword argument 'workrs'"),
    (repeat, (SMALL, 2), dict(device=0), "device 0"),
    (repeat, (SMALL, 2), dict(watch=3), "watch 3"),
    (find_lr, (SMALL,), dict(end_lr="10"), "end_lr '10'"),
    (find_lr, (SMALL,), dict(num_iter=50.0), "num_iter 50.0"),
    (bench, (), dict(rounds="9"), "rounds '9'"),
    (bench, ("page",), {}, "Recipe.build('page')"),
    (samples, ("page",), {}, "Recipe.build('page')"),
    (evaluate, (["a", "b"],), {}, "checkpoint ['a', 'b']"),
    (evaluate, ("a",), dict(tta=True), "tta True"),
    (misclassified, ("a",), dict(count="9"), "count '9'"),
    (compare, ("run",), {}, "runs 'run' is of the type str; it takes Sequence[Path | str]"),
    (compare, (), {}, "missing a required argument: 'runs'"),
    (report, (7,), {}, "run 7"),
    (export, ("a", "b", "onnx"), {}, "too many positional arguments"),
    (predict, (), {}, "missing a required argument: 'checkpoint'"),
    (predict, ("a", "b"), dict(top="3"), "top '3'"),
    (load_checkpoint, (None,), {}, "path None"),
    (build_model, ("default",), {}, "Recipe.build('default')"),
    (build_model, (SMALL,), dict(classes="10"), "classes '10'"),
    (Recipe.build, (5,), {}, "recipe 5"),
    (Recipe.build, (), dict(file=5), "file 5"),
]


@pytest.mark.parametrize(("function", "arguments", "named", "words"), WRONG_TYPES)
def test_an_argument_of_another_type_is_refused_in_one_line(function, arguments, named, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        function(*arguments, **named)
    assert words in str(refused.value)
    assert str(refused.value).startswith((f"{function.__name__}: ", "train: "))  # whose options repeat hands on
    assert "\n" not in str(refused.value)
    assert "pydantic" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@checked
def given(count: int = 0, share: float | None = None, *, name: str = "", **more: object) -> tuple[object, ...]:
    return count, share, name, more


def test_numbers_of_numpy_arrive_as_those_of_python():
    found = given(np.int64(3), share=np.float32(0.5), name="x", other=np.int64(7))
    assert found == (3, 0.5, "x", {"other": 7})
    assert [type(each) for each in found[:2]] == [int, float]
    assert given() == (0, None, "", {})


LONG = "l" * 5000  # more than any system takes
WRONG_VALUES = [
    (lambda: train(SMALL, target=101.0), "--target 101 must be 0 to 100"),
    (lambda: train(SMALL, target=float("nan")), "--target nan"),
    (lambda: train(SMALL, save_every_minutes=0), "--save-every-minutes 0"),
    (lambda: train(SMALL, loader="fast"), "--loader fast"),
    (lambda: train(SMALL, compile="yes"), "--compile yes"),
    (lambda: train(SMALL, format="gif"), "--format gif: it is png, svg or pdf"),
    (lambda: train(SMALL, device="tpu"), "--device tpu"),
    (lambda: train(SMALL, resume="x"), "give neither"),
    (lambda: repeat(SMALL, 1), "--repeat 1 must be at least 2"),
    (lambda: repeat(SMALL, resume="x"), "give none of them"),
    (lambda: repeat(SMALL, 2, loader="fast"), "--loader fast"),
    (lambda: find_lr(SMALL, end_lr=float("inf")), "--end-lr inf"),
    (lambda: find_lr(SMALL, step_mode="log"), "--step-mode log"),
    (lambda: bench(seconds=0), "seconds 0 must be above 0"),
    (lambda: bench(rounds=1), "--rounds 1"),
    (lambda: bench(compile="yes"), "--compile yes"),
    (lambda: bench(workers=-1), "--workers -1"),
    (lambda: bench(workers=10**400), "must be 0 to 256"),
    (lambda: train(SMALL, loader="albumentations", workers=10**400), "must be 0 to 256"),
    (lambda: compare([]), "at least one run"),
    (lambda: export("x", format="coreml"), "--format coreml"),
    (lambda: evaluate("x", tta="crop"), "--tta crop"),
    (lambda: misclassified("x", layer="layer9"), "--layer layer9"),
    (lambda: samples(SMALL, views=0), "--views 0"),
    (lambda: build_model(SMALL, 0), "classes 0 must be at least 1"),
    (lambda: Recipe(epochs=0), "--epochs 0"),
    (lambda: Recipe(epochs=10**400), "less than or equal to 1000000"),
    (lambda: Recipe(batch_size=10**18), "less than or equal to 1000000"),
    (lambda: Recipe(epochs="many"), "--epochs 'many'"),
    (lambda: Recipe(epochs=8, peak_epoch=9), "--peak-epoch 9 is not before the last of 8"),
    (lambda: Recipe(depth=18), "--depth 18"),
    (lambda: Recipe.build(epochs="many"), "--epochs 'many'"),
    (lambda: Recipe.build(epochs=[3]), "--epochs [3]"),
    (lambda: Recipe.build(epochs=float("inf")), "--epochs inf"),
    (lambda: Recipe.build("digits", depth=18), "--depth 18"),
    (lambda: Recipe().replace(max_lr="high"), "--max-lr 'high'"),
    (lambda: train(Recipe.build(dataset=LONG)), "lll; if it was moved"),
    (lambda: train(Recipe.build(dataset="a\0b")), "b; if it was moved"),
    (lambda: train(SMALL, "a\0b"), "train: run_dir 'a"),
    (lambda: train(SMALL, ""), "train: run_dir is empty"),
    (lambda: find_lr(SMALL, ""), "find_lr: run_dir is empty"),
    (lambda: compare(["a", ""]), "compare: runs is empty"),
    (lambda: compare(["a"], "a\0.png"), "compare: path 'a"),
    (lambda: evaluate(np.add), "checkpoint <ufunc 'add'>"),
]
TOO_LONG = [  # on Windows such a file is just not there
    (lambda: train(SMALL, LONG), "train: run_dir 'lll"),
    (lambda: train(resume=LONG), "train: resume 'lll"),
    (lambda: load_checkpoint(LONG), "load_checkpoint: path 'lll"),
    (lambda: compare(["a", LONG]), "compare: runs 'lll"),
    (lambda: evaluate("a", dataset=Path(LONG)), "evaluate: dataset 'lll"),
    (lambda: misclassified("a", save_images=LONG), "misclassified: save_images 'lll"),
]
WRONG_VALUES += [pytest.param(*each, marks=pytest.mark.posix) for each in TOO_LONG]


@pytest.mark.parametrize(("call", "words"), WRONG_VALUES)
def test_a_value_that_cannot_be_is_refused_as_the_command_line_does(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        call()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_fits_is_handed_on_as_it_is():
    given = []

    @checked
    def keeping(recipe: Recipe | None, path: Path | str, *, share: float = 0.5, count: int = 1) -> int:
        """Documented."""
        given.append((recipe, path, share, count))
        return 7

    assert keeping(SMALL, "x", count=np.int64(3), share=1) == 7
    assert keeping(None, Path("x"), share=np.float32(0.25)) == 7
    assert given[0][0] is SMALL
    assert given[0][1:] == ("x", 1, 3)
    assert keeping.__doc__ == "Documented."
    with pytest.raises(UsageError, match="share array"):
        check(keeping, None, "x", share=np.zeros(3))


def test_a_long_value_is_cut():
    with pytest.raises(UsageError) as refused:
        train("x" * 1000)
    assert len(str(refused.value)) < 240
