import json
import math
import re
import shutil
import signal
from contextlib import nullcontext

import numpy as np
import pytest
from run_helpers import StopAfter, assert_same_run, content
from scipy import stats

from cifar_resnet import Recipe, Watcher, compare, load_checkpoint, repeat, train
from cifar_resnet.errors import UsageError, shell_word
from cifar_resnet.jobs.common import spread
from cifar_resnet.jobs.interrupt import Interrupted
from cifar_resnet.look import console
from cifar_resnet.training import runtime

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def recipe():
    """Two steps of a tiny network."""
    return Recipe.build("digits", epochs=1, train_limit=32, test_limit=20, batch_size=16, width=4)


def in_turn(*watchers):
    """Gives each run the next of these."""
    left = iter(watchers)
    return lambda: nullcontext(next(left))


def test_repeat_trains_seeds_and_sums_them_up(cli, tmp_path):
    options = (
        "--dataset",
        "digits",
        "--batch-size",
        64,
        "--epochs",
        1,
        "--width",
        4,
    )  # enough images for three accuracies to differ
    code, out, _ = cli("train", *options, "--repeat", 3, "--seed", 5, "--run-dir", tmp_path / "many")
    assert code == 0
    found = json.loads((tmp_path / "many" / "repeat.json").read_text("utf-8"))
    runs = [load_checkpoint(tmp_path / "many" / f"s{seed}") for seed in (5, 6, 7)]
    assert found["accuracies"] == [run.history[-1]["test_accuracy"] for run in runs]
    assert [run.recipe.seed for run in runs] == [5, 6, 7]
    assert len(set(found["accuracies"])) == 3
    assert (found["mean"], found["std"]) == pytest.approx((np.mean(found["accuracies"]), np.std(found["accuracies"], ddof=1)))
    expected = stats.t.interval(0.95, 2, np.mean(found["accuracies"]), stats.sem(found["accuracies"]))
    assert found["interval"] == pytest.approx(expected)
    assert f"3 seeds: {found['mean']:.2f} ± {found['std']:.2f} %" in out
    shutil.rmtree(tmp_path / "many" / "s7")  # as if it had been stopped before the third
    before = (tmp_path / "many" / "s6" / "checkpoint.pt").stat().st_mtime_ns
    assert cli("train", "--resume", tmp_path / "many")[0] == 0
    assert json.loads((tmp_path / "many" / "repeat.json").read_text("utf-8")) == found
    assert (tmp_path / "many" / "s6" / "checkpoint.pt").stat().st_mtime_ns == before
    code, _, err = cli("train", "--resume", tmp_path / "many", "--epochs", 3)
    assert code == 2
    assert "--epochs 3 contradicts" in err


def test_there_is_no_interval_of_two_seeds_and_none_beyond_what_can_be():
    assert spread([90.0]) == {"mean": 90.0, "std": None, "interval": None}
    assert spread([97.0, 99.0]) == {"mean": 98.0, "std": pytest.approx(math.sqrt(2)), "interval": None}
    accuracies = [99.9, 98.0, 99.8]
    high = stats.t.interval(0.95, 2, np.mean(accuracies), stats.sem(accuracies))
    assert high[1] > 100
    assert spread(accuracies)["interval"] == [pytest.approx(high[0]), 100.0]
    assert spread([100 - each for each in accuracies])["interval"] == [0.0, pytest.approx(100 - high[0])]


def test_a_repetition_of_two_seeds_prints_no_interval(recipe, tmp_path, capsys):
    content = repeat(recipe, 2, tmp_path / "many")
    assert json.loads((tmp_path / "many" / "repeat.json").read_text("utf-8"))["interval"] is None
    console.repetition(content)
    assert "95 %" not in capsys.readouterr().out
    (group,) = compare([tmp_path / "many"])["groups"]
    assert group["folders"] == [str(tmp_path / "many")]
    (of_one,) = compare([tmp_path / "many" / "s1"])["groups"]
    assert of_one["folders"] == [str(tmp_path / "many" / "s1")]
    assert {key: group[key] for key in ("mean", "std", "interval")} == {key: content[key] for key in ("mean", "std", "interval")}


def test_what_no_repetition_takes_leaves_nothing_behind(recipe, tmp_path, refused):
    with pytest.raises(UsageError, match="repeat takes no watcher"):
        repeat(recipe, 2, tmp_path / "many", watcher=Watcher())
    line = refused(2, "train", "--dataset", "digits", "--repeat", 2, "--seed", 2**32 - 1, "--run-dir", tmp_path / "many")
    assert "--seed 4294967296" in line
    assert not (tmp_path / "many").exists()


def test_a_repetition_stopped_inside_a_seed_goes_on_there(recipe, tmp_path):
    whole = repeat(recipe, 2, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"stopped by SIGINT; .* --resume {re.escape(shell_word(tmp_path / 'many'))}$"):
        repeat(recipe, 2, tmp_path / "many", watch=in_turn(Watcher(), StopAfter(1)))
    assert content(tmp_path / "many" / "s1")["step"] == 1
    found = repeat(resume=tmp_path / "many")
    assert found == whole
    for seed in ("s0", "s1"):
        assert_same_run(content(tmp_path / "many" / seed), content(tmp_path / "whole" / seed))


def test_a_repetition_goes_on_with_the_loader_of_its_first_run(recipe, tmp_path):
    class Fails(Watcher):
        def begin(self, *_):
            raise ZeroDivisionError

    whole = repeat(recipe, 2, tmp_path / "whole", loader="albumentations", workers=0)
    with pytest.raises(ZeroDivisionError):
        repeat(recipe, 2, tmp_path / "many", loader="albumentations", workers=0, watch=in_turn(Watcher(), Fails()))
    shutil.rmtree(tmp_path / "many" / "s1")  # as if it had not begun
    assert repeat(resume=tmp_path / "many") == whole
    assert_same_run(content(tmp_path / "many" / "s1"), content(tmp_path / "whole" / "s1"))


def test_a_signal_after_the_last_step_of_a_seed_stops_the_repetition(recipe, tmp_path):
    class Late(Watcher):
        def epoch(self, epoch):
            signal.raise_signal(signal.SIGINT)

    many, before = tmp_path / "many", signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped by SIGINT; .* --resume {re.escape(shell_word(many))}$"):
        repeat(recipe, 2, many, watch=lambda: nullcontext(Late()))
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(many / "s0").finished
    assert not (many / "s1").exists()
    assert len(repeat(resume=many)["accuracies"]) == 2


def test_a_signal_before_the_first_step_of_a_seed_stops_that_seed(recipe, tmp_path):
    class Early(Watcher):
        def begin(self, *_):
            signal.raise_signal(signal.SIGTERM)

    many = tmp_path / "many"
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM; .* --resume {re.escape(shell_word(many))}$"):
        repeat(recipe, 2, many, watch=in_turn(Watcher(), Early()))
    assert (content(many / "s1")["epoch"], content(many / "s1")["step"]) == (0, 1)
    assert len(repeat(resume=many)["accuracies"]) == 2


def test_a_repetition_goes_on_where_its_images_have_moved_to(own_images, tmp_path, cli, refused):
    """One run has ended, one has begun, one has not; from then on the repetition finds the images there."""
    fields, many, now = dict(epochs=1, batch_size=16, width=4), tmp_path / "many", tmp_path / "now"
    repeat(Recipe.build(dataset=str(own_images), **fields), 3, tmp_path / "whole")
    with pytest.raises(Interrupted):
        repeat(Recipe.build(dataset=str(own_images), **fields), 3, many, watch=in_turn(Watcher(), StopAfter(1)))
    own_images.rename(now)
    before = (many / "repeat.json").read_text("utf-8")
    image = now / "train" / "dark" / "0.png"
    image.rename(tmp_path / "0.png")
    line = refused(1, "train", "--resume", many, "--dataset", now)
    assert f"not those of the run in {many / 's0'}: there were 48, and there are 47" in line
    assert (many / "repeat.json").read_text("utf-8") == before
    (tmp_path / "0.png").rename(image)
    with pytest.raises(Interrupted):
        repeat(resume=many, must_match={"dataset": str(now), "seed": 0}, watch=in_turn(Watcher(), Watcher(), StopAfter(1)))
    code, _, err = cli("train", "--resume", many)
    assert (code, err) == (0, "")
    for seed in ("s0", "s1", "s2"):
        assert_same_run(content(many / seed), content(tmp_path / "whole" / seed))


def test_a_repetition_that_has_trained_nothing_begins_where_its_images_have_moved_to(own_images, tmp_path):
    class Early(Watcher):
        def begin(self, *_):
            raise KeyboardInterrupt

    recipe, many = Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, width=4), tmp_path / "many"
    with pytest.raises(KeyboardInterrupt):
        repeat(recipe, 2, many, watch=lambda: nullcontext(Early()))
    own_images.rename(tmp_path / "now")
    assert len(repeat(resume=many, must_match={"dataset": str(tmp_path / "now")})["accuracies"]) == 2


def test_a_repetition_goes_on_with_a_copy_of_its_images(own_images, tmp_path):
    """One run has ended, one has begun and has no checkpoint, and the images are still where they were, too."""

    class Second(Watcher):
        def begin(self, recipe, *_):
            if recipe.seed == 1:
                raise KeyboardInterrupt

    recipe, many = Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, width=4), tmp_path / "many"
    with pytest.raises(KeyboardInterrupt):
        repeat(recipe, 2, many, watch=lambda: nullcontext(Second()))
    shutil.copytree(own_images, tmp_path / "copy")
    before = (many / "s1" / "recipe.json").read_text("utf-8")
    with pytest.raises(UsageError, match="--epochs 7 contradicts"):
        repeat(resume=many, must_match={"dataset": str(tmp_path / "copy"), "epochs": 7})
    assert (many / "s1" / "recipe.json").read_text("utf-8") == before
    assert len(repeat(resume=many, must_match={"dataset": str(tmp_path / "copy")})["accuracies"]) == 2
    assert load_checkpoint(many / "s1").recipe.dataset == str(tmp_path / "copy")


def test_what_contradicts_a_repetition_is_one_line(recipe, tmp_path, refused):
    """A field that is a list, which the repetition leaves to the data set."""
    repeat(recipe, 2, tmp_path / "many")
    line = refused(2, "train", "--resume", tmp_path / "many", "--mean", 0.5, 0.5, 0.5)
    assert "--mean 0.5 0.5 0.5 contradicts the run" in line
    with pytest.raises(UsageError, match="give count"):
        repeat(recipe)


@pytest.fixture
def native(monkeypatch):
    """Sets whether the CPU multiplies in bfloat16, which decides what precision `auto` is."""
    return lambda yes: monkeypatch.setattr(runtime, "_multiplies_bfloat16", lambda device: yes)


def precisions(folder, seeds):
    return [load_checkpoint(folder / f"s{seed}").recipe.precision for seed in seeds]


@pytest.mark.parametrize(("begun", "precision"), [(False, "float32"), (True, "bfloat16")])
def test_a_repetition_gone_on_with_on_another_machine_keeps_its_precision(recipe, tmp_path, native, begun, precision):
    native(begun)
    with pytest.raises(Interrupted):
        repeat(recipe, 2, tmp_path / "many", watch=in_turn(StopAfter(2)))
    assert json.loads((tmp_path / "many" / "repeat.json").read_text("utf-8"))["recipe"]["precision"] == precision
    native(not begun)
    repeat(resume=tmp_path / "many")
    assert precisions(tmp_path / "many", (0, 1)) == [precision, precision]


def test_a_repetition_of_the_version_before_goes_on_in_the_precision_of_its_first_run(recipe, tmp_path, native):
    """Its repeat.json says auto, and has a recipe of schema 1. Seeds of one and two digits, which sort otherwise as text."""
    native(False)
    repeat(recipe.replace(seed=9), 2, tmp_path / "many")
    path = tmp_path / "many" / "repeat.json"
    written = json.loads(path.read_text("utf-8"))
    written["recipe"]["precision"] = "auto"
    del written["recipe"]["schema"]
    path.write_text(json.dumps({key: written[key] for key in ("schema", "recipe", "count")} | {"count": 3}))
    second = tmp_path / "many" / "s10" / "recipe.json"
    second.write_text(second.read_text("utf-8").replace("float32", "bfloat16"))  # as a machine between them may have left it
    native(True)
    repeat(resume=tmp_path / "many")
    assert precisions(tmp_path / "many", (9, 11)) == ["float32", "float32"]
    assert json.loads(path.read_text("utf-8"))["recipe"]["precision"] == "float32"


def test_a_repetition_that_was_killed_before_its_first_run_takes_the_precision_of_where_it_goes_on(recipe, tmp_path, native):
    (tmp_path / "many").mkdir()
    content = {"schema": 1, "recipe": recipe.to_dict(), "count": 2}
    (tmp_path / "many" / "repeat.json").write_text(json.dumps(content))
    native(False)
    assert len(repeat(resume=tmp_path / "many")["accuracies"]) == 2
    assert precisions(tmp_path / "many", (0, 1)) == ["float32", "float32"]


def test_what_is_no_repetition_is_refused(recipe, refused, tmp_path, tiny_run, monkeypatch):
    assert "--repeat 1 must be at least 2" in refused(2, "train", "--dataset", "digits", "--repeat", 1)
    assert "--repeat does not go with --resume" in refused(2, "train", "--resume", tiny_run, "--repeat", 2)
    path = tmp_path / "many" / "repeat.json"
    path.parent.mkdir()
    for text, word in (
        ('{"count": 3}', "repeat.json: "),
        (json.dumps({"recipe": recipe.to_dict()}), "has the count None, not a number of runs"),
        (json.dumps({"recipe": recipe.to_dict(), "count": "3"}), "has the count '3'"),
        (json.dumps({"recipe": {**recipe.to_dict(), "schema": 4}, "count": 3}), "a recipe of schema 4"),
        ("no JSON", "not JSON"),
    ):
        path.write_text(text)
        assert word in refused(2, "train", "--resume", path.parent)
        assert path.read_text("utf-8") == text
    with pytest.raises(UsageError, match=r"is a repetition of several runs; in Python repeat\(resume=...\) goes on with it"):
        train(resume=path.parent)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="does not go with torchrun"):
        repeat(recipe, 2, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_seed_that_has_its_checkpoint_alone_goes_on_and_one_of_another_seed_is_refused(tiny_recipe, tmp_path, no_figures):
    before = repeat(tiny_recipe, 2, tmp_path / "r")
    (tmp_path / "r" / "s1" / "recipe.json").unlink()
    assert repeat(resume=tmp_path / "r") == before
    shutil.copy(tmp_path / "r" / "s0" / "checkpoint.pt", tmp_path / "r" / "s1")
    with pytest.raises(UsageError, match="--seed 1 contradicts the run in .*s1, which has 0"):
        repeat(resume=tmp_path / "r")
