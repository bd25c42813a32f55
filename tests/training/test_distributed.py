"""Several processes against one, on gloo. They are started by torchrun, with one thread each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from filelock import FileLock
from plain import PlainTraining, doubled
from sklearn.metrics import log_loss

from cifar_resnet import load_checkpoint, train
from cifar_resnet.errors import CifarResnetError, DataError, UsageError, shell_word
from cifar_resnet.training import distributed, engine

RANKS = ranks.__file__
TINY = ["--dataset", "digits", "--train-limit", 70, "--test-limit", 41, "--batch-size", 16, "--epochs", 2, "--ema-decay", 0.9]
TINY += ["--recipe", "default", "--width", 4]


def torchrun(processes, *arguments, timeout=300):
    if sys.platform == "win32":
        pytest.skip("torchrun needs libuv, which torch's wheels for Windows lack")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of processes: what each rank of them found, in their order. The workers of pytest-xdist share it."""
    several = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if several else tmp_path_factory.mktemp("ranks")

    def check(processes):
        with FileLock(folder / "ranks.lock"):
            files = [folder / f"{processes}-{rank}.pt" for rank in range(processes)]
            if not files[-1].exists():
                done = torchrun(processes, RANKS, "checks", folder)
                assert done.returncode == 0, done.stderr
            return [torch.load(file, weights_only=True) for file in files]

    return check


MANY = pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])


@MANY
def test_the_gradient_is_that_of_the_whole_batch(found, processes):
    one = [ranks.gradient(step, sam_share=share) for share in (0.0, 1.0) for step in (0, 2)]
    for rank in found(processes):
        for whole, shared in zip(one, rank["gradients"], strict=True):
            assert torch.linalg.vector_norm(shared - whole) < 1e-6 * torch.linalg.vector_norm(whole)


@MANY
def test_an_epoch_is_that_of_one_process_that_trains_every_rank_in_turn(found, processes):
    """Weights, averaged weights, BatchNorm's means and variances, and the loss, against the plain loop."""
    recipe, loader = ranks.run_of(ema_decay=0.9, ema_every=1, sam_share=0.4, sam_radius=0.1)
    plain = PlainTraining(recipe, total_steps=3, ranks=processes)
    losses = [plain.step(images, labels) for images, labels, _ in loader.epoch(0)]
    for rank in found(processes):
        for name, expected in (("weights", plain.weights()), ("averaged", plain.average())):
            for key, value in expected.items():
                assert float((rank["epoch"][name][key] - value).norm() / value.norm()) < 1e-4, key
        assert rank["epoch"]["metrics"]["train_loss"] == pytest.approx(np.average(losses, weights=[15, 15, 10]), rel=1e-5)


@MANY
def test_every_image_is_evaluated_once_and_the_ranks_end_alike(found, processes):
    """Parameters and BatchNorm statistics, of the averaged model too, to the bit; metrics but the clock's."""
    evaluated = ranks.random_split(31)
    first, *others = (rank["epoch"] for rank in found(processes))
    assert first["labels"] == evaluated.labels.tolist()
    for other in others:
        assert other["labels"] == first["labels"]
        for name in ("weights", "averaged"):
            assert all(torch.equal(a, b) for a, b in zip(first[name].values(), other[name].values(), strict=True))
        for key, value in first["metrics"].items():
            assert "second" in key or other["metrics"][key] == value
    hits = first["metrics"]["train_accuracy"] * 40 / 100
    assert hits == pytest.approx(round(hits))

    recipe, _ = ranks.run_of(ema_decay=0.9)
    model = doubled(engine.start(recipe, ranks.CPU)).averaged
    model.load_state_dict(first["averaged"])
    plain = ranks.Doubled(ranks.TensorLoader(evaluated, recipe, ranks.CPU)).plain(31)
    logits, labels = engine.predict_logits(recipe, model, plain, ranks.CPU)
    assert first["metrics"]["test_loss"] == pytest.approx(
        log_loss(labels, logits.double().softmax(1), labels=range(10)), rel=1e-5
    )


def test_a_torch_without_processes_trains_in_one(monkeypatch, tiny_recipe, tiny_run, tmp_path, no_figures):
    """Some wheels for Windows are built without them, and have nothing of torch.distributed but `is_available`."""
    monkeypatch.setattr(distributed, "dist", SimpleNamespace(is_available=lambda: False))
    trained = train(tiny_recipe, tmp_path / "run")
    assert trained.history[-1]["test_accuracy"] == load_checkpoint(tiny_run).history[-1]["test_accuracy"]


def test_in_a_process_of_its_own_nothing_is_shared():
    model, totals = torch.nn.BatchNorm2d(3), torch.tensor([1.0, 2.0])
    with distributed.joined():
        assert (distributed.rank(), distributed.ranks(), distributed.started()) == (0, 1, 1)
        assert distributed.parallel(model) is model
        model.running_mean += 1
        distributed.merge([model], totals)
        assert (totals.tolist(), model.running_mean.tolist()) == ([1, 2], [1, 1, 1])
        assert distributed.max_over_ranks(3, 5) == [3, 5]
        assert distributed.gather("one") == ["one"]
        assert distributed.on_first(lambda: "done") == "done"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is -1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "port"),
        ({"WORLD_SIZE": "2"}, "RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR expected"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "y"}, "'y'"),
    ],
)
def test_variables_of_torchrun_that_do_not_fit_are_one_line(variables, words, refused, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refused(2, "train", *TINY, "--run-dir", tmp_path / "run")
    assert words in line
    assert "start with torchrun, or unset WORLD_SIZE" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_one_step_and_another_number_goes_on(tmp_path):
    folder = tmp_path / "run"
    stopped = torchrun(2, RANKS, "run", tmp_path, *TINY, "--run-dir", folder, "--loader", "albumentations")
    said = [line for line in (stopped.stdout + stopped.stderr).splitlines() if line.startswith("cifar-resnet: ")]
    assert said == [f"cifar-resnet: stopped by SIGTERM; go on with: cifar-resnet train --resume {shell_word(folder)} --loader albumentations"]
    assert re.search(r"rank\s+: 0 .*\n.*exitcode\s+: 143", stopped.stderr)
    steps = [(tmp_path / f"steps-{rank}").read_text("utf-8") for rank in (0, 1)]
    assert steps == ["3", "3"]
    content = load_checkpoint(folder).content
    assert (content["epoch"], content["step"]) == (0, 3)
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "metrics.csv", "metrics.json", "recipe.json"]

    resumed = torchrun(3, "-m", "cifar_resnet", "train", "--resume", folder, "--loader", "albumentations")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("going on after epoch 0, step 3") == 1
    assert resumed.stdout.count("last epoch:") == 1
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
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
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("cifar-resnet: ")]
    assert words in said
    assert f"exitcode  : {code} " in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.posix
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
        options = ["--dataset", "digits", "--epochs", 4, "--width", 16, "--run-dir", folder]
        done = torchrun(processes, "-m", "cifar_resnet", "train", *options)
        assert done.returncode == 0, done.stderr
        accuracies.append(load_checkpoint(folder).history[-1]["test_accuracy"])
    assert min(accuracies) > 90, accuracies
    assert max(accuracies) - min(accuracies) < 5, accuracies


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_wrong_with_one_process_alone_is_said_by_it(rank, monkeypatch):
    """A GPU that its machine has not got, say: of a usage error the command line leaves the word to rank 0."""
    monkeypatch.setattr(distributed, "started", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_: None)
    for error, found in ((UsageError, CifarResnetError if rank else UsageError), (DataError, DataError)):
        with pytest.raises(CifarResnetError, match="^what is wrong$") as raised, distributed.joined():
            raise error("what is wrong")
        assert type(raised.value) is found
    with pytest.raises(CifarResnetError) as raised, distributed.joined():
        raise CifarResnetError("all say so")
    assert isinstance(raised.value, distributed.Left) == bool(rank)
