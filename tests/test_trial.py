"""The script that compares recipes over paired seeds."""

import json
import math

import pytest
import trial
from scipy import stats

from cifar_resnet import CifarResnetError

TINY = {"recipe": "digits", "epochs": 2, "holdout": 40, "width": 4, "train_limit": 60, "test_limit": 20, "batch_size": 20}
QUESTION = {"question": "?", "expected": "nothing", "common": TINY, "arms": {"slow": {}, "fast": {"max_lr": 0.2}}, "seeds": 2}


def called(tmp_path, content):
    """What a call of the script leaves in its file."""
    file = tmp_path / "trial.json"
    file.write_text(json.dumps(content))
    trial.main([str(file), "--runs", str(tmp_path / "runs"), "--device", "cpu"])
    return json.loads(file.read_text())


def rows(*accuracies):
    """Results of two arms, by seed."""
    of = dict(loss=1.0, seconds=1.0, pflop=0.1)
    return [{"arm": arm, "seed": seed, "accuracy": value, **of} for arm, seed, value in accuracies]


def test_arms_take_turns_and_a_second_call_trains_only_what_is_missing(tmp_path, capsys):
    content = called(tmp_path, QUESTION)
    assert [(row["arm"], row["seed"]) for row in content["results"]] == [("slow", 0), ("fast", 0), ("slow", 1), ("fast", 1)]
    kept = content["results"][1:]
    kept[0]["accuracy"] = 77.0  # trained again, this would be another figure
    capsys.readouterr()
    content = called(tmp_path, {**content, "results": kept})
    assert capsys.readouterr().out.startswith("slow, seed 0")
    assert content["results"][:3] == kept
    assert len(content["results"]) == 4


def test_the_interval_is_that_of_a_paired_t_test():
    control, other = [90.1, 91.0, 90.4, 89.9], [90.6, 91.1, 91.2, 90.1]
    runs = [("a", seed, value) for seed, value in enumerate(control)] + [("b", seed, value) for seed, value in enumerate(other)]
    mean, half = trial.summary({"arms": {"a": {}, "b": {}}, "results": rows(*runs)})[1]["difference"]
    expected = stats.ttest_rel(other, control).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


def test_one_pair_has_no_interval_and_a_seed_of_one_arm_alone_is_no_pair():
    content = {"arms": {"a": {}, "b": {}}, "results": rows(("a", 0, 90.0), ("b", 0, 91.0), ("b", 1, 99.0))}
    row = trial.summary(content)[1]
    assert row["pairs"] == 1
    assert row["difference"] == (1.0, math.inf)
    assert "no interval; 1 pairs" in trial.table(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"common": {**TINY, "holdout": 0}}, "holdout"),
        ({"arms": {"a": {"max_lr": -1}}}, "--max-lr -1"),
        ({"arms": {"a": {"no_such": 1}}}, "--no-such"),
    ],
)
def test_what_cannot_be_tried_is_said(change, said, tmp_path):
    with pytest.raises((SystemExit, CifarResnetError), match=said):
        called(tmp_path, {**QUESTION, **change})
