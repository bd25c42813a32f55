import functools
import hashlib
import http.server
import multiprocessing
import os
import tarfile
import threading

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from cifar_resnet import Recipe, data
from cifar_resnet.errors import DataError, UsageError


def test_digits_are_split_1437_to_360_and_stratified():
    loaded = data.load(Recipe.build("digits"))
    assert (len(loaded.train), len(loaded.evaluation)) == (1437, 360)
    assert loaded.train.images.shape == (1437, 32, 32, 3)
    assert set(loaded.train.indices).isdisjoint(loaded.evaluation.indices)
    shares = [np.bincount(split.labels) / len(split) for split in (loaded.train, loaded.evaluation)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005
    pixels = loaded.train.images / 255
    assert pixels.mean((0, 1, 2)) == pytest.approx(data.DIGITS_MEAN, abs=1e-4)
    assert pixels.std((0, 1, 2)) == pytest.approx(data.DIGITS_STD, abs=1e-4)


def test_digits_are_scikit_learns_enlarged():
    from sklearn.datasets import load_digits

    loaded, source = data.load(Recipe.build("digits")), load_digits()
    for split in (loaded.train, loaded.evaluation):
        assert np.array_equal(split.labels, source.target[split.indices])
        small = split.images.astype(float).mean(3).reshape(-1, 8, 4, 8, 4).mean((2, 4)) * 16 / 255
        correlation = np.corrcoef(small.ravel(), source.images[split.indices].ravel())[0, 1]
        assert correlation > 0.95


@pytest.mark.parametrize("count", [10, 95, 300, 999, 1000])
def test_stratified_takes_each_class_in_proportion(count):
    labels = np.random.default_rng(1).choice(5, 1000, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    taken = data.stratified(labels, count, seed=3)
    assert len(set(taken)) == count
    shares = np.bincount(labels) * count / 1000
    assert np.abs(np.bincount(labels[taken], minlength=5) - shares).max() <= 1
    assert set(data.stratified(labels, count // 2, seed=3)) < set(taken)


def test_stratified_leaves_no_class_out():
    labels = np.repeat([0, 1, 2], [900, 98, 2])
    assert set(labels[data.stratified(labels, 100, seed=0)]) == {0, 1, 2}


def test_the_holdout_is_disjoint_and_the_same_for_every_seed():
    a, b = (data.load(Recipe.build("digits", holdout=200, seed=seed)) for seed in (0, 1))
    assert a.evaluated_on == "holdout"
    assert (len(a.train), len(a.evaluation)) == (1237, 200)
    assert set(a.train.indices).isdisjoint(a.evaluation.indices)
    assert np.array_equal(a.evaluation.indices, b.evaluation.indices)
    assert set(a.train.indices) | set(a.evaluation.indices) == set(data.load(Recipe.build("digits")).train.indices)


@pytest.mark.parametrize(
    "fields",
    [
        dict(holdout=1437),
        dict(holdout=3),
        dict(train_limit=5),
        dict(train_limit=2000),
        dict(test_limit=361),
        dict(batch_size=1438),
    ],
)
def test_what_does_not_fit_the_split_is_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}"):
        data.load(Recipe.build("digits", **fields))


def test_cifar10_is_what_torchvision_reads(fake_cifar10):
    recipe = Recipe.build(batch_size=10)
    loaded = data.load(recipe, fake_cifar10)
    train, test = CIFAR10(fake_cifar10, train=True), CIFAR10(fake_cifar10, train=False)
    assert np.array_equal(loaded.train.images, train.data)
    assert loaded.train.labels.tolist() == train.targets
    assert np.array_equal(loaded.evaluation.images, test.data)
    assert loaded.classes == tuple(train.classes)
    assert loaded.evaluated_on == "test"


@pytest.mark.cifar10
def test_the_real_cifar10():
    loaded = data.load(Recipe())
    assert (len(loaded.train), len(loaded.evaluation)) == (50_000, 10_000)
    assert np.bincount(loaded.train.labels).tolist() == [5000] * 10
    pixels = loaded.train.images[::10] / 255
    assert pixels.mean((0, 1, 2)) == pytest.approx(data.with_statistics(Recipe()).mean, abs=0.004)
    assert pixels.std((0, 1, 2)) == pytest.approx(data.with_statistics(Recipe()).std, abs=0.004)


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_an_altered_file_is_named_with_both_checksums(fake_cifar10, name, refused):
    path = fake_cifar10 / CIFAR10.base_folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    files = dict([*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])
    line = refused(1, "train", "--data-dir", fake_cifar10, "--batch-size", 10, "--run-dir", fake_cifar10 / "run")
    assert str(path) in line
    assert files[name] in line
    assert hashlib.md5(content).hexdigest() in line
    assert not (fake_cifar10 / "run").exists()


def test_a_missing_file_of_an_incomplete_folder_is_named(fake_cifar10, refused):
    path = fake_cifar10 / CIFAR10.base_folder / "data_batch_1"
    path.unlink()
    assert str(path) in refused(1, "train", "--data-dir", fake_cifar10, "--batch-size", 10)


@pytest.fixture
def server(fake_cifar10, tmp_path, monkeypatch):
    """Serves the fake archive over HTTP on this machine; gives the list of paths asked for."""
    (tmp_path / "web").mkdir()
    archive = tmp_path / "web" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(fake_cifar10 / CIFAR10.base_folder, CIFAR10.base_folder)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{httpd.server_port}/{CIFAR10.filename}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        yield asked
        httpd.shutdown()


def test_missing_images_are_downloaded_once_and_whole(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_RESNET_DATA_DIR", str(tmp_path / "new" / "folder"))
    said = []
    assert len(data.load(Recipe.build(batch_size=10), notify=said.append).train) == 80
    requests = len(server)
    assert len(data.load(Recipe.build(batch_size=10), notify=said.append).train) == 80
    assert len(server) == requests > 0
    assert len(said) == 1
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [".download.lock", CIFAR10.base_folder]


def test_two_processes_on_a_missing_folder_download_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    sizes = context.Queue()

    def load(folder="shared"):
        sizes.put(len(data.load(Recipe.build(batch_size=10), tmp_path / folder, notify=lambda _: None).train))

    load("alone")
    assert sizes.get() == 80
    requests = len(server)

    processes = [context.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    assert [sizes.get(timeout=60) for _ in processes] == [80, 80]
    for process in processes:
        process.join()
    assert len(server) == 2 * requests


def test_a_damaged_download_leaves_nothing_behind(server, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(DataError, match="downloading"):
        data.load(Recipe(), tmp_path / "new", notify=lambda _: None)
    assert os.listdir(tmp_path / "new") == [".download.lock"]


def test_no_network_names_folder_file_and_a_way_out(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    line = refused(1, "train", "--data-dir", tmp_path / "none")
    assert str(tmp_path / "none") in line
    assert "data_batch_1" in line
    assert "--dataset digits" in line


def test_a_data_folder_that_cannot_be_made(tmp_path, refused):
    (tmp_path / "file").write_text("")
    line = refused(1, "train", "--data-dir", tmp_path / "file" / "images")
    assert str(tmp_path / "file" / "images") in line
