"""Commands that a message tells of can be pasted."""

import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cifar_resnet import CifarResnetError, compare
from cifar_resnet.errors import shell_command, shell_word
from cifar_resnet.jobs.interrupt import Interrupted
from cifar_resnet.run_dir import check_free

AWKWARD = ["plain", "two words", "it's", "$HOME", "a;b", "*", "üñí", "-x", 'say "hi"', "new\nline"]


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_shell_takes_the_words_apart_as_they_were():
    line = shell_command("train", "--resume", *AWKWARD)
    assert line.startswith("cifar-resnet train --resume plain 'two words' ")
    found = subprocess.run(["sh", "-c", line.replace("cifar-resnet", r"printf '%s\0'", 1)], capture_output=True, check=True)
    assert found.stdout.decode().split("\0")[:-1] == ["train", "--resume", *AWKWARD]


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        (r"C:\Users\me\runs\default-1", r"C:\Users\me\runs\default-1"),
        ("--max-lr=0.4", "--max-lr=0.4"),
        ("runs\\Bär", "runs\\Bär"),
        (r"C:\R&D\run", r'"C:\R&D\run"'),
        ("two words", '"two words"'),
        ("C:\\R&D\\", r'"C:\R&D\\"'),
        ("it's", '"it\'s"'),
        ("a;b", '"a;b"'),
        ("f(x)", '"f(x)"'),
        ("", '""'),
    ],
)
def test_a_word_is_quoted_for_the_shells_of_windows(word, quoted, monkeypatch):
    """cmd and PowerShell both take what is in double quotes for one word."""
    monkeypatch.setattr("cifar_resnet.errors.os", SimpleNamespace(name="nt"))
    assert shell_word(word) == quoted


@pytest.mark.parametrize("name", ["two words", "$1"])
@pytest.mark.posix
def test_hints_name_a_folder_so_that_it_can_be_pasted(unfinished, name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(unfinished, folder)
    with pytest.raises(CifarResnetError) as not_free:
        check_free(folder)
    with pytest.raises(CifarResnetError) as not_finished:
        compare([folder])
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(CifarResnetError) as not_begun:
        compare([folder])
    for said in (not_free, not_finished, not_begun):
        assert str(said.value).endswith(f"cifar-resnet train --resume '{folder}'"), said.value
    assert shlex.split(str(Interrupted(2, folder, {})))[-1] == str(folder)
