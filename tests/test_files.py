"""Files and folders that are written whole or not at all."""

import errno
import os
import re
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty import CALLS, CODES, Faulty

from cifar_resnet import files
from cifar_resnet.errors import RunDirectoryError
from cifar_resnet.files import check_file, check_new_folder, check_writable, new_folder, same_place, writable, write_whole


@pytest.mark.posix
def test_a_whole_write_flushes_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    faulty = Faulty(monkeypatch)
    write_whole(tmp_path / "file", "new")
    assert faulty.called == CALLS
    assert (tmp_path / "file").read_text("utf-8") == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [".", "..", "folder", "folder/."])
def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirectoryError, match=f"{re.escape(str(Path(name)))} cannot be written: it is a folder"):
        write_whole(Path(name), "text")
    with pytest.raises(RunDirectoryError, match="it is a folder"):
        check_file(Path(name))


@pytest.mark.parametrize("name", [300 * "a", f"{300 * 'a'}/file"])
def test_a_name_that_is_too_long_is_one_line(tmp_path, name):
    def write():
        check_file(tmp_path / name)
        writable((tmp_path / name).parent)
        write_whole(tmp_path / name, "text")

    with pytest.raises(RunDirectoryError):
        write()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("failing", range(len(CALLS)), ids=lambda call: f"{call}-{CALLS[call]}")
@pytest.mark.posix
def test_a_write_that_fails_anywhere_leaves_one_whole_file(tmp_path, failing, code):
    """Before the rename the old one, after it the new one."""
    path = tmp_path / "file"
    write_whole(path, "the old one")
    with pytest.MonkeyPatch.context() as patch:
        faulty = Faulty(patch, failing, code)
        with pytest.raises(RunDirectoryError, match=f"{re.escape(str(path))} could not be written: {os.strerror(code)}"):
            write_whole(path, "the new one")
    assert faulty.called == CALLS[: failing + 1]
    assert path.read_text("utf-8") == ("the old one" if failing <= CALLS.index("os.replace") else "the new one")
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "the old one")

    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "the new one")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text("utf-8") == "the old one"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows opens no folders")
def test_a_file_system_that_flushes_no_folders_is_written_to(tmp_path, monkeypatch):
    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text("utf-8") == "new"


# Folders


@pytest.mark.parametrize("left", [".DS_Store", "desktop.ini", "Thumbs.db"])
def test_what_a_file_browser_left_in_a_folder_does_not_count(tmp_path, left):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / left).touch()
    check_new_folder(tmp_path / "new")
    with new_folder(tmp_path / "new") as part:
        (part / "file").touch()
    assert os.listdir(tmp_path / "new") == ["file"]
    with pytest.raises(RunDirectoryError, match="not empty"):
        check_new_folder(tmp_path / "new")


def test_what_comes_into_a_folder_that_is_about_to_be_filled_stays(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(RunDirectoryError, match="could not be written"), new_folder(tmp_path / "new"):
        (tmp_path / "new" / "mine.txt").touch()
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["mine.txt"]


def test_a_drive_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    with pytest.raises(RunDirectoryError, match="cannot be made: there is no "):
        check_writable(tmp_path / "run")


@pytest.mark.posix
def test_a_place_is_the_same_by_a_link_and_by_what_the_file_system_says(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    (tmp_path / "link").symlink_to("pets")
    assert same_place(tmp_path / "link", tmp_path / "pets")
    assert same_place(tmp_path / "gone", tmp_path / "link" / ".." / "gone")
    assert not same_place(tmp_path / "gone", tmp_path / "pets")
    assert same_place(tmp_path / "Pets", tmp_path / "pets") == (tmp_path / "Pets").exists()  # as a Mac takes them for one
    monkeypatch.setattr(os.path, "samefile", lambda one, other: str(one).lower() == str(other).lower())
    assert same_place(tmp_path / "Pets", tmp_path / "pets")


@pytest.mark.posix
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (check_file, lambda path: write_whole(path, "text")):
        with pytest.raises(RunDirectoryError, match="pipe cannot be written: it is no ordinary file"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("new", "newer"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text(encoding="utf-8") == text


@pytest.mark.posix
def test_a_folder_that_was_there_keeps_its_mode_and_the_current_one_stays(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir(0o700)
    with new_folder(tmp_path / "mine") as part:
        (part / "file").touch()
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RunDirectoryError, match="is the current one"), new_folder(Path(".")):
        pass


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: files.write_whole(tmp_path / "a", str(k) * 1000), range(8)))
    assert (tmp_path / "a").read_text() in [str(k) * 1000 for k in range(8)]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.posix
def test_a_file_keeps_who_may_read_it(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o600)
    files.write_whole(tmp_path / "a", "new")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
