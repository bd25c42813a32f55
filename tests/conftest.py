"""What the tests share. They need no network; the real CIFAR-10 is used where it is there."""

import functools
import hashlib
import pickle
import sys

import numpy as np
import pytest

from cifar_resnet import Recipe, data
from cifar_resnet import train as train_run


def pytest_collection_modifyitems(items):
    from torchvision.datasets import CIFAR10

    folder = data.data_directory() / CIFAR10.base_folder
    missing = pytest.mark.skip(reason=f"the real CIFAR-10 is not in {folder}; set CIFAR_RESNET_DATA_DIR")
    for item in items:
        if "cifar10" in item.keywords and not folder.exists():
            item.add_marker(missing)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs the command line in this process; gives exit code, standard output and standard error."""
    from cifar_resnet.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cifar-resnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def refused(cli):
    """Runs the command line, which must fail with this code and one line; gives the line."""

    def run(code, *arguments):
        found, _, err = cli(*arguments)
        assert found == code, err
        assert err.count("\n") == 1
        assert err.startswith("cifar-resnet: ")
        return err

    return run


@pytest.fixture
def fake_cifar10(tmp_path, monkeypatch):
    """A folder with 100 random images laid out as the published archive, and torchvision's checksums to match."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(count):
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", write(f"data_batch_{i}", batch(40))] for i in (1, 2)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch(20))]])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return folder.parent


TINY = dict(dataset="digits", epochs=2, train_limit=70, test_limit=40, batch_size=32, ema_decay=0.9, ema_every=2, sam_share=0.4)


@pytest.fixture(scope="session")
def tiny_recipe():
    """Two epochs of three steps, the last short, with averaging."""
    return Recipe.build(**TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_recipe):
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train_run(tiny_recipe, folder)
    return folder


@pytest.fixture
def narrow(monkeypatch):
    """Divides the network's channels by 16, for tests of what happens around it: a step takes milliseconds.

    The digits are loaded once.
    """
    import torch

    from cifar_resnet import winograd

    monkeypatch.setattr(data, "_digits", functools.cache(data._digits))

    class Conv3x3(winograd.Conv3x3):
        def __init__(self, inputs, outputs, bias=False):
            super().__init__(inputs if inputs == 3 else inputs // 16, outputs // 16, bias)

    class Narrow:
        @staticmethod
        def BatchNorm2d(channels):
            return torch.nn.BatchNorm2d(channels // 16)

        @staticmethod
        def Linear(inputs, outputs, **options):
            return torch.nn.Linear(inputs // 16, outputs, **options)

        def __getattr__(self, name):
            return getattr(torch.nn, name)

    monkeypatch.setattr("cifar_resnet.model.nn", Narrow())
    monkeypatch.setattr("cifar_resnet.model.Conv3x3", Conv3x3)


@pytest.fixture
def no_figures(monkeypatch):
    """Pictures of one byte, as drawing them takes longer than a narrow run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: file.write(b"."))
