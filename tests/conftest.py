"""What the tests share. They need no network; the real CIFAR-10 is used where it is there."""

import functools
import hashlib
import os
import pickle
import sys

import numpy as np
import pytest
import torch

from cifar_resnet import Recipe, train
from cifar_resnet.data import cache, cifar, datasets
from cifar_resnet.jobs import convolutions
from cifar_resnet.training import kernels

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # and so do the processes that tests start
torch.backends.mps.is_available = functools.cache(lambda: False)  # Apple's GPUs do not give the bits of a CPU
datasets._digits = functools.cache(datasets._digits)  # the tests load them often


def pytest_collection_modifyitems(items):
    folder = cifar.data_directory() / cifar.PUBLISHED["cifar10"].folder
    missing = pytest.mark.skip(reason=f"the real CIFAR-10 is not in {folder}; set CIFAR_RESNET_DATA_DIR")
    for item in items:
        if "cifar10" in item.keywords and not folder.exists():
            item.add_marker(missing)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))
        if "posix" in item.keywords and sys.platform == "win32":
            item.add_marker(pytest.mark.skip(reason="Windows has no such links, signals, terminals or file names"))


@pytest.fixture(autouse=True, scope="session")
def kept_for_the_tests_alone(tmp_path_factory):
    """What is read of folders, and chosen, is kept, but not in the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    cache.user_cache = convolutions.user_cache = lambda: folder


@pytest.fixture(autouse=True)
def no_kernel_fails_unseen(request):
    yield
    left_out, kernels._left_out = kernels._left_out, False
    assert "cuda" not in request.keywords or not left_out, "a kernel failed, and the test went on without our kernels"


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


class TorchvisionSays(dict):
    """What `cifar.PUBLISHED` holds, as torchvision has it at the moment."""

    def __getitem__(self, name):
        from torchvision.datasets import CIFAR10, CIFAR100

        title, source = {"cifar10": ("CIFAR-10", CIFAR10), "cifar100": ("CIFAR-100", CIFAR100)}[name]
        meta = {source.meta["filename"]: source.meta["md5"]}
        lists = dict(source.train_list), dict(source.test_list), meta
        return cifar.Published(title, source.url, source.filename, source.tgz_md5, source.base_folder, *lists, source.meta["key"])


@pytest.fixture
def as_torchvision_says(monkeypatch):
    """Addresses and checksums of CIFAR-10 and CIFAR-100 are torchvision's, where a test may change them."""
    monkeypatch.setattr(cifar, "PUBLISHED", TorchvisionSays())


@pytest.fixture
def fake_cifar10(tmp_path, monkeypatch, as_torchvision_says):
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


TINY = dict(
    dataset="digits", epochs=2, train_limit=70, test_limit=40, batch_size=32, ema_decay=0.9, ema_every=2, sam_share=0.4, width=4
)


@pytest.fixture(scope="session")
def tiny_recipe():
    """A network of width 4; two epochs of three steps, of 24, 23 and 23 images, with averaging and sharpness-aware steps."""
    return Recipe.build("default", **TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_recipe):
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny_recipe, folder)
    return folder


@pytest.fixture(scope="session")
def unfinished(tiny_recipe, tmp_path_factory):
    """The folder of a tiny run that was stopped after the first step of its second epoch."""
    from run_helpers import StopAfter

    folder = tmp_path_factory.mktemp("runs") / "unfinished"
    with pytest.raises(Exception, match="stopped by SIGINT"):
        train(tiny_recipe, folder, watcher=StopAfter(4))
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Pictures of one byte, as drawing them takes longer than a tiny run."""
    monkeypatch.setattr("cifar_resnet.look.rendering.render", lambda figure, format="png": b".")
