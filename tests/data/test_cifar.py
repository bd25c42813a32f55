"""CIFAR-10 and CIFAR-100: their files, their archive, their download, and whose folder it is."""

import functools
import hashlib
import http.server
import multiprocessing
import os
import pickle
import re
import shutil
import stat
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100

from cifar_resnet import Recipe, train
from cifar_resnet.data import cifar
from cifar_resnet.data.cifar import data_directory
from cifar_resnet.data.datasets import load, with_statistics
from cifar_resnet.errors import DataError

NOWHERE = "http://127.0.0.1:9/none.tar.gz"
LOCK = ".download.lock"  # which some versions of filelock remove when they let go of it


pytestmark = pytest.mark.usefixtures("as_torchvision_says")
PUBLISHED = cifar.PUBLISHED  # before a fixture changes it


def silent(message):
    pass


@pytest.mark.parametrize("name", ["cifar10", "cifar100"], ids=["CIFAR-10", "CIFAR-100"])
def test_addresses_and_checksums_are_torchvisions(name):
    assert PUBLISHED[name] == cifar.PUBLISHED[name]


def test_no_pickle_is_opened_whose_checksum_is_wrong(fake_cifar10, monkeypatch):
    path = fake_cifar10 / CIFAR10.base_folder / "data_batch_1"
    path.write_bytes(pickle.dumps(Path("/")))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(DataError, match="damaged"):
        load(Recipe.build(batch_size=10), fake_cifar10)


def test_cifar10_is_what_torchvision_reads(fake_cifar10):
    loaded = load(Recipe.build(batch_size=10), fake_cifar10)
    train, test = CIFAR10(fake_cifar10, train=True), CIFAR10(fake_cifar10, train=False)
    assert np.array_equal(loaded.train.images, train.data)
    assert loaded.train.labels.tolist() == train.targets
    assert np.array_equal(loaded.evaluation.images, test.data)
    assert loaded.classes == tuple(train.classes)
    assert loaded.evaluated_on == "test"


@pytest.mark.cifar10
def test_the_real_cifar10():
    loaded = load(Recipe())
    assert (len(loaded.train), len(loaded.evaluation)) == (50_000, 10_000)
    assert np.bincount(loaded.train.labels).tolist() == [5000] * 10
    pixels = loaded.train.images[::10] / 255
    assert pixels.mean((0, 1, 2)) == pytest.approx(with_statistics(Recipe()).mean, abs=0.004)
    assert pixels.std((0, 1, 2)) == pytest.approx(with_statistics(Recipe()).std, abs=0.004)


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_an_altered_file_is_named_with_both_checksums(fake_cifar10, name):
    path = fake_cifar10 / CIFAR10.base_folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    files = dict([*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])
    with pytest.raises(DataError) as error:
        load(Recipe.build(batch_size=10), fake_cifar10)
    for word in (str(path), files[name], hashlib.md5(content).hexdigest()):
        assert word in str(error.value)


def test_a_missing_file_of_an_incomplete_folder_is_named_before_anything_is_written(fake_cifar10, tmp_path, refused):
    path = fake_cifar10 / CIFAR10.base_folder / "data_batch_1"
    path.unlink()
    line = refused(1, "train", "--data-dir", fake_cifar10, "--batch-size", 10, "--run-dir", tmp_path / "run")
    assert str(path) in line
    assert not (tmp_path / "run").exists()


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
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{httpd.server_port}/{CIFAR10.filename}")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        yield asked
        httpd.shutdown()


def test_missing_images_are_downloaded_once_and_whole(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_RESNET_DATA_DIR", str(tmp_path / "new" / "folder"))
    said = []
    assert len(load(Recipe.build(batch_size=10), notify=said.append).train) == 80
    requests = len(server)
    assert len(load(Recipe.build(batch_size=10), notify=said.append).train) == 80
    assert len(server) == requests > 0
    assert len(said) == 1
    assert set(os.listdir(tmp_path / "new" / "folder")) - {LOCK} == {CIFAR10.base_folder}


@pytest.mark.skipif(sys.platform != "linux", reason="a process that is not forked does not know the archive of the test")
def test_two_processes_on_a_missing_folder_download_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    sizes = context.Queue()

    def load_into(folder):
        sizes.put(len(load(Recipe.build(batch_size=10), tmp_path / folder, notify=silent).train))

    load_into("alone")
    assert sizes.get() == 80
    requests = len(server)

    processes = [context.Process(target=load_into, args=("shared",)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [sizes.get(timeout=60) for _ in processes] == [80, 80]
    for process in processes:
        process.join()
    assert len(server) == 2 * requests


def test_who_waits_for_another_process_says_so(server, tmp_path):
    said, lock = [], FileLock(tmp_path / "shared" / ".download.lock", thread_local=False)
    (tmp_path / "shared").mkdir()
    lock.acquire()

    def notify(message):
        said.append(message)
        lock.release()

    load(Recipe.build(batch_size=10), tmp_path / "shared", notify=notify)
    assert said[0] == f"waiting for another process that downloads into {tmp_path / 'shared'}"


def test_a_damaged_download_leaves_nothing_behind(server, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(DataError, match="downloading"):
        load(Recipe(), tmp_path / "new", notify=silent)
    assert set(os.listdir(tmp_path / "new")) - {LOCK} == set()


def test_no_network_names_folder_file_and_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", NOWHERE)
    with pytest.raises(DataError) as error:
        load(Recipe(), tmp_path / "none", notify=silent)
    for word in (str(tmp_path / "none"), "data_batch_1", "--dataset digits"):
        assert word in str(error.value)


def test_a_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "file" / "images"))):
        load(Recipe(), tmp_path / "file" / "images", notify=silent)


def test_the_data_folder_is_the_one_given_then_the_variables_then_the_cache(monkeypatch):
    for name in ("CIFAR_RESNET_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):  # of POSIX and of Windows
        monkeypatch.setenv(name, "/home/ann")
    assert data_directory() == Path("/home/ann/.cache/cifar-resnet")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_directory() == Path("/cache/cifar-resnet")
    monkeypatch.setenv("CIFAR_RESNET_DATA_DIR", "/images")
    assert data_directory() == Path("/images")
    assert data_directory(Path("/mine")) == Path("/mine")


# Files and archives that lie there already


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", NOWHERE)


@pytest.fixture
def archive(fake_cifar10, tmp_path, offline, monkeypatch):
    """A data folder with the fake archive alone, as somebody puts it there by hand."""
    path = tmp_path / "by-hand" / CIFAR10.filename
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(fake_cifar10 / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_an_archive_that_lies_in_the_folder_is_unpacked_once(archive, fake_cifar10):
    said = []
    loaded, expected = load(Recipe(batch_size=10), archive.parent, said.append), load(Recipe(batch_size=10), fake_cifar10)
    assert np.array_equal(loaded.train.images, expected.train.images)
    assert said == [f"unpacking {archive}"]
    assert sorted(os.listdir(archive.parent)) == [CIFAR10.base_folder, CIFAR10.filename]
    archive.unlink()
    assert len(load(Recipe(batch_size=10), archive.parent).train) == 80


def test_an_archive_in_a_folder_that_cannot_be_written_is_read_all_the_same(archive, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != archive.parent)
    assert len(load(Recipe(batch_size=10), archive.parent, silent).train) == 80
    assert os.listdir(archive.parent) == [CIFAR10.filename]


def test_a_damaged_archive_is_named_with_both_checksums(archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError) as error:
        load(Recipe(batch_size=10), archive.parent, silent)
    for word in (str(archive), CIFAR10.tgz_md5, hashlib.md5(archive.read_bytes()).hexdigest()):
        assert word in str(error.value)
    assert os.listdir(archive.parent) == [CIFAR10.filename]


@pytest.mark.parametrize("where", ["the folder of the files", "a folder too deep", "the folder of the files, renamed"])
def test_files_one_level_off_are_used(where, fake_cifar10, tmp_path, offline):
    folder = fake_cifar10 / CIFAR10.base_folder
    if where == "a folder too deep":
        (tmp_path / "deep" / CIFAR10.base_folder).mkdir(parents=True)
        shutil.move(folder, tmp_path / "deep" / CIFAR10.base_folder)
        folder = tmp_path / "deep"
    elif where.endswith("renamed"):
        folder = Path(shutil.move(folder, tmp_path / "images of mine"))
    before = sorted(folder.rglob("*"))
    assert len(load(Recipe(batch_size=10), folder).train) == 80
    assert sorted(folder.rglob("*")) == before


def test_images_that_are_there_are_read_without_writing_anything(fake_cifar10, monkeypatch):
    before = sorted(fake_cifar10.rglob("*"))
    monkeypatch.setattr(FileLock, "acquire", lambda self: pytest.fail("locked"))
    load(Recipe(batch_size=10), fake_cifar10)
    assert sorted(fake_cifar10.rglob("*")) == before


# Whose folder it is


@pytest.mark.skipif(os.name == "nt", reason="permissions are of POSIX")
def test_the_lock_of_a_download_can_be_taken_by_others(server, tmp_path):
    before, modes = os.umask(0o077), []
    try:
        load(Recipe(batch_size=10), tmp_path / "shared", lambda _: modes.append((tmp_path / "shared" / LOCK).stat().st_mode))
    finally:
        os.umask(before)
    assert list(map(stat.S_IMODE, modes)) == [0o666]


def test_a_lock_that_another_user_keeps_closed_stops_no_download(server, tmp_path, monkeypatch):
    def acquire(self, timeout=None):
        raise PermissionError(13, "Permission denied", self.lock_file)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert len(load(Recipe(batch_size=10), tmp_path / "shared", silent).train) == 80


def test_a_user_without_a_home_is_told_of_data_dir(monkeypatch, refused, tmp_path):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("CIFAR_RESNET_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    line = refused(1, "train", "--run-dir", tmp_path / "run")
    assert "this user has no home folder for images; give a folder for them with --data-dir" in line


# CIFAR-100


@pytest.fixture
def fake_cifar100(tmp_path, monkeypatch):
    """A data folder with an archive of 300 random images laid out as the published one, and torchvision's checksums to match."""
    rng, files = np.random.default_rng(0), tmp_path / CIFAR100.base_folder
    files.mkdir()

    def write(name, content):
        (files / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((files / name).read_bytes()).hexdigest()

    def part(count):
        fine = [i % 100 for i in range(count)]
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": data, "fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}

    names = {"fine_label_names": [f"fine{i:02}" for i in range(100)], "coarse_label_names": [f"coarse{i:02}" for i in range(20)]}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", write("train", part(200))]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write("test", part(100))]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": write("meta", names)})
    (tmp_path / "images").mkdir()
    archive = tmp_path / "images" / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files, CIFAR100.base_folder)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "url", NOWHERE)
    return archive.parent


def test_cifar100_is_what_torchvision_reads(fake_cifar100):
    recipe = Recipe.build(dataset="cifar100", batch_size=10)
    assert recipe.recipe == "cifar100"
    loaded = load(recipe, fake_cifar100, silent)
    train = CIFAR100(fake_cifar100, train=True)
    assert np.array_equal(loaded.train.images, train.data)
    assert loaded.train.labels.tolist() == train.targets
    assert loaded.classes == tuple(f"fine{i:02}" for i in range(100))
    assert loaded.evaluation.labels.tolist() == list(range(100))
    filled = with_statistics(recipe, loaded.train)
    assert filled.mean == (0.5071, 0.4865, 0.4409)
    assert filled.std == (0.2673, 0.2564, 0.2762)


def test_a_missing_cifar100_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", NOWHERE)
    (tmp_path / "train").mkdir()  # as files of the archive are called too
    with pytest.raises(DataError, match=r"CIFAR-100 is not in .* \(expected .*cifar-100-python[/\\]train and the others\)"):
        load(Recipe.build(dataset="cifar100"), tmp_path, silent)


def test_a_network_of_100_classes_is_trained(fake_cifar100, tmp_path, no_figures):
    recipe = Recipe.build(dataset="cifar100", epochs=1, peak_epoch=0.5, batch_size=100, width=4, sam_share=0.0)
    checkpoint = train(recipe, tmp_path / "run", data_dir=fake_cifar100)
    assert checkpoint.model().fc.out_features == 100
    assert np.isfinite(checkpoint.history[-1]["test_loss"])
