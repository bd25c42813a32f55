import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from cifar_resnet import Recipe, load_checkpoint, samples, train
from cifar_resnet.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\udce9", r"caf\udce9"),  # a byte of Latin-1 in a file's name
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\u202etxt.exe", r"\u202etxt.exe"),  # which would be shown backwards
        ("猫 $5 <b> é", "猫 $5 <b> é"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_what_is_no_character_to_look_at_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    shown.encode()


@pytest.mark.filterwarnings("ignore:no font on this machine")
@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows have no such names")
def test_foreign_class_names_go_through_every_command(tmp_path, cli, no_figures, monkeypatch):
    """They are cleaned where they come in: what is shown, and what is written, holds no control character."""
    names = [b"caf\xe9", b"th\x1b[31m\n", "猫".encode(), b"a|b <i>"]
    for part in (b"train", b"test"):
        for i, name in enumerate(names):
            folder = os.path.join(os.fsencode(tmp_path), b"own", part, name)
            os.makedirs(folder)
            for j in range(4):
                Image.new("RGB", (32, 32), (60 * i, 10 * j, 0)).save(os.path.join(os.fsdecode(folder), f"{j}.png"))
    recipe = Recipe.build(dataset=str(tmp_path / "own"), epochs=1, batch_size=8, max_lr=0.02, width=4)
    train(recipe, tmp_path / "run")
    utf8 = sys.getfilesystemencoding() == "utf-8"
    expected = {r"caf\udce9", r"th\x1b[31m\n", "猫" if utf8 else r"\udce7\udc8c\udcab", "a|b <i>"}
    assert set(load_checkpoint(tmp_path / "run").classes) == expected
    for command in ("evaluate", "misclassified", "report"):
        code, out, err = cli(command, tmp_path / "run")
        assert code == 0, err
        assert "\x1b" not in out
    assert set(json.loads((tmp_path / "run" / "evaluation.json").read_text("utf-8"))["classes"]) == expected
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert r"caf\udce9" in page
    assert "\x1b" not in page
    monkeypatch.undo()
    figure = samples(recipe, tmp_path / "samples.png", views=1)
    assert {axis.get_ylabel() for axis in figure.axes[::2]} == expected
    assert np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).std() > 0
