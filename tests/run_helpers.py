"""What the tests of runs share: stopping one, and telling whether two are the same."""

import signal
from pathlib import Path

import torch

from cifar_resnet import Watcher

FILES = ["checkpoint.pt", "curves.png", "learning_rate.png", "metrics.csv", "metrics.json", "recipe.json"]


class StopAfter(Watcher):
    """Sends its own process a signal after so many steps of the run."""

    def __init__(self, steps, number=signal.SIGINT):
        self.left, self.number = steps, number

    def step(self, step, state):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)


class Listener(Watcher):
    """Keeps the warnings of a run."""

    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


def content(folder):
    """What the checkpoint of a run holds, read by torch alone."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def equal_weights(a, b):
    """Whether weights and averaged weights of two checkpoints' contents are equal to the bit."""
    return all(
        torch.equal(x, y)
        for name in ("model", "averaged")
        for x, y in zip((a[name] or {}).values(), (b[name] or {}).values(), strict=True)
    )


def timeless(history):
    return [{key: value for key, value in row.items() if "second" not in key} for row in history]


def assert_same_run(a, b):
    """Weights, averaged weights, temperature and optimizer to the bit, and the metrics, times aside."""
    assert a["temperature"] == b["temperature"]
    assert equal_weights(a, b)
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(x[key]), torch.as_tensor(y[key])) for key in x)
    assert timeless(a["history"]) == timeless(b["history"])
