"""Several processes against one, on gloo. They are started by torchrun, with one thread each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch

from cifar_resnet import engine, load_checkpoint, winograd

RANKS = ranks.__file__
TINY = ["--dataset", "digits", "--train-limit", 70, "--test-limit", 41, "--batch-size", 16, "--epochs", 2, "--ema-decay", 0.9]


def torchrun(processes, *arguments, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout)


def check(folder, processes, *sizes):
    """What each rank found, in their order; one alone in this process."""
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "scores", engine.scores)  # which the check replaces, as it does the next
            patch.setattr(winograd, "MIN_TILES", winograd.MIN_TILES)
            ranks.checks(folder, *sizes)
    else:
        done = torchrun(processes, RANKS, "checks", folder, *sizes)
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of processes: what each rank found, with gradients at 64 and 40 images."""
    folder = tmp_path_factory.mktemp("ranks")

    class Found(dict):
        def __missing__(self, processes):
            return self.setdefault(processes, check(folder, processes, 64, 40))

    return Found()


THREE = pytest.param(3, marks=pytest.mark.slow)


def same_gradients(one, many):
    for a, *others in zip(one[0]["gradients"], *(rank["gradients"] for rank in many), strict=True):
        for b in others:
            assert torch.linalg.vector_norm(a - b) < 1e-5 * torch.linalg.vector_norm(a)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    return True


@pytest.mark.parametrize("processes", [2, THREE])
def test_the_gradient_is_that_of_the_whole_batch(found, processes):
    assert same_gradients(found[1], found[processes])


@pytest.mark.slow
def test_the_gradient_of_512_and_of_336_images_is_that_of_one_process(tmp_path):
    one, two, three = (check(tmp_path, processes, 512, 336) for processes in (1, 2, 3))
    assert same_gradients(one, two)
    assert same_gradients(one, three)


@pytest.mark.parametrize("loader", ["tensor", "albumentations"])
@pytest.mark.parametrize("processes", [2, THREE])
def test_the_ranks_together_see_the_batches_of_one_process(found, processes, loader):
    (one,), many = found[1], found[processes]
    assert len(one[loader]) == 12
    for (images, labels), *parts in zip(one[loader], *(rank[loader] for rank in many), strict=True):
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)
        assert max(len(part) for _, part in parts) - min(len(part) for _, part in parts) <= 1


@pytest.mark.parametrize("processes", [1, 2, THREE])
def test_every_image_is_evaluated_once_and_the_ranks_end_alike(found, processes):
    """Parameters and BatchNorm statistics, of the averaged model too, to the bit; metrics but the clock's."""
    first = found[processes][0]["epoch"]
    for rank in found[processes]:
        assert rank["epoch"]["counted"]
        for name in ("weights", "averaged"):
            assert all(torch.equal(a, b) for a, b in zip(first[name].values(), rank["epoch"][name].values(), strict=True))
        for key, value in first["metrics"].items():
            assert "second" in key or rank["epoch"]["metrics"][key] == value
    hits = first["metrics"]["train_accuracy"] * 40 / 100
    assert hits == pytest.approx(round(hits))
    one = found[1][0]["epoch"]
    assert first["metrics"]["train_loss"] == pytest.approx(one["metrics"]["train_loss"], rel=0.1)
    for name, value in one["weights"].items():
        if "running_mean" in name:
            torch.testing.assert_close(first["weights"][name], value, rtol=0.2, atol=0.1)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_one_step_and_another_number_goes_on(tmp_path):
    folder = tmp_path / "run"
    stopped = torchrun(2, RANKS, "run", tmp_path, *TINY, "--run-dir", folder, "--loader", "albumentations")
    said = [line for line in (stopped.stdout + stopped.stderr).splitlines() if line.startswith("cifar-resnet: ")]
    assert said == [f"cifar-resnet: stopped by SIGTERM; go on with: cifar-resnet train --resume {folder}"]
    assert re.search(r"rank\s+: 0 .*\n.*exitcode\s+: 143", stopped.stderr)
    steps = [(tmp_path / f"steps-{rank}").read_text() for rank in (0, 1)]
    assert steps == ["3", "3"]
    content = load_checkpoint(folder).content
    assert (content["epoch"], content["step"]) == (0, 3)
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "metrics.json", "recipe.json"]

    resumed = torchrun(3, "-m", "cifar_resnet", "train", "--resume", folder, "--loader", "albumentations")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("going on after epoch 0, step 3") == 1
    assert resumed.stdout.count("last epoch:") == 1
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["environment"]["processes"] == 3
    for row in metrics["epochs"]:  # 70 images, 3 steps of them by 2 processes and 2 by 3
        for key, images in (("train_accuracy", 70), ("test_accuracy", 41)):
            assert row[key] * images / 100 == pytest.approx(round(row[key] * images / 100))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["train", "--dataset", "digits", "--batch-size", "2"], 2, "--batch-size 2"),
        (["evaluate", "run"], 2, "without torchrun"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(tmp_path, monkeypatch, command, code, words):
    monkeypatch.chdir(tmp_path)
    done = torchrun(3, "-m", "cifar_resnet", *command)
    said = {line for line in done.stderr.splitlines() if line.startswith("cifar-resnet: ")}
    assert len(said) == 1
    assert words in said.pop()
    assert f"exitcode  : {code} " in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all_in_one_line(tmp_path):
    code = f"import os, signal, sys; sys.path.insert(0, {str(Path(RANKS).parent)!r}); import ranks\n"
    code += "kill = os.kill; os.kill = lambda pid, number: kill(pid, signal.SIGKILL); ranks.run(*sys.argv[1:])"
    (tmp_path / "killed.py").write_text(code)
    done = torchrun(3, tmp_path / "killed.py", tmp_path, *TINY, "--run-dir", tmp_path / "run")
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("cifar-resnet: ")]
    assert len(said) == 1
    assert "a process of the run is gone" in said[0]
    assert "Signal 9 (SIGKILL)" in done.stderr


@pytest.mark.slow
def test_the_accuracy_of_a_short_run_is_within_its_noise(tmp_path):
    """Four epochs of the digits by 1, 2 and 3 processes: 360 test images, so one standard deviation is 1.1 points at 95 %."""
    accuracies = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        done = torchrun(processes, "-m", "cifar_resnet", "train", "--dataset", "digits", "--epochs", 4, "--run-dir", folder)
        assert done.returncode == 0, done.stderr
        accuracies.append(load_checkpoint(folder).history[-1]["test_accuracy"])
    assert min(accuracies) > 90, accuracies
    assert max(accuracies) - min(accuracies) < 5, accuracies
