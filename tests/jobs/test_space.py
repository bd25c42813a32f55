import ast
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, Browser
from PIL import Image

from cifar_resnet import PRESETS, Recipe, build_model, export, load_checkpoint, predict, train
from cifar_resnet.arguments import GradCamLayer
from cifar_resnet.data.datasets import load
from cifar_resnet.errors import CifarResnetError
from cifar_resnet.jobs import space as space_file
from cifar_resnet.look import analysis

pytest.importorskip("gradio", reason="the extra demo is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="the extra demo is not installed")


@pytest.fixture(scope="module")
def space(tiny_run, tmp_path_factory):
    return export(tiny_run, tmp_path_factory.mktemp("exported") / "space", format="space")


def test_a_space_of_an_unfinished_run_says_so(unfinished, tmp_path, no_figures):
    readme = (export(unfinished, tmp_path / "space", format="space") / "README.md").read_text(encoding="utf-8")
    assert "The run stands at epoch 1 of 2, step 1: this is not its end." in readme
    assert "It is right on" not in readme


@pytest.fixture
def app_of(monkeypatch):
    """Gives the module app.py of a folder, imported where the package is not."""

    def run(folder):
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.partition(".")[0] in ("cifar_resnet", "page")]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, "cifar_resnet", None)
            patch.syspath_prepend(folder)
            spec = importlib.util.spec_from_file_location("app", folder / "app.py")
            app = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(app)
            sys.modules.pop("page")
        return app

    return run


def assert_same_predictions(app, run, split, folder):
    """Of the exported app and of `cifar-resnet predict`, on these images as files."""
    folder.mkdir()
    for i, image in enumerate(split.images):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    files = sorted(folder.iterdir())
    images = np.stack([app.read(str(file)) for file in files])
    np.testing.assert_array_equal(images, split.images)
    for tta, augmented in (("none", False), ("flip-shift", True)):
        found = app.probabilities(images, augmented)
        for row, probabilities in zip(predict(run, files, top=10, tta=tta), found, strict=True):
            expected = {each["class"]: each["probability"] for each in row["classes"]}
            assert dict(zip(app.SETTINGS["classes"], probabilities, strict=True)) == pytest.approx(expected, abs=1e-4)


def test_its_predictions_are_those_of_predict(space, tiny_run, app_of, tmp_path):
    assert_same_predictions(app_of(space), tiny_run, load(load_checkpoint(tiny_run).recipe).evaluation, tmp_path / "images")


@pytest.mark.cifar10
def test_its_predictions_on_100_real_images_are_those_of_predict(app_of, tmp_path, no_figures):
    recipe = Recipe.build(width=4, epochs=1, train_limit=200, test_limit=100, batch_size=50, max_lr=0.05)
    train(recipe, tmp_path / "run")
    folder = export(tmp_path / "run", format="space")
    assert folder == tmp_path / "run" / "space"
    assert_same_predictions(app_of(folder), tmp_path / "run", load(recipe).evaluation, tmp_path / "images")


def test_its_network_is_that_of_every_preset(space, app_of, tmp_path):
    seen = set()
    for preset in PRESETS:
        recipe = Recipe.build(preset, dataset="digits", width=4)
        names = ("width", "prep_order", "pool_position", "conv_bias", "fc_bias", "logit_scale")
        variant = {name: getattr(recipe, name) for name in names}
        if (key := tuple(variant.values())) in seen:
            continue
        seen.add(key)
        folder = shutil.copytree(space, tmp_path / preset)
        settings = json.loads((folder / "model.json").read_text(encoding="utf-8")) | variant
        (folder / "model.json").write_text(json.dumps(settings))
        model = build_model(recipe).eval()
        (folder / "model.safetensors").write_bytes(safetensors.save({name: value.contiguous() for name, value in model.state_dict().items()}))
        app, images = app_of(folder), torch.randn(4, 3, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(app.MODEL(images), model.logits(images), rtol=1e-4, atol=1e-5)
    assert len(seen) >= 3


def test_its_grad_cam_is_captums(space, tiny_run, app_of):
    app, checkpoint = app_of(space), load_checkpoint(tiny_run)
    images = np.stack([image for image, _ in app.CONTENT.examples])
    labels = torch.arange(10)
    for layer in get_args(GradCamLayer):
        expected = analysis.grad_cam(checkpoint.model(), app.normalised(images), labels, layer)
        np.testing.assert_allclose(app.grad_cam(images, list(checkpoint.classes), layer), expected, atol=1e-3)


def test_it_holds_examples_mistakes_and_their_overlays(space, tiny_run, app_of):
    app, evaluation = app_of(space), load(load_checkpoint(tiny_run).recipe).evaluation
    assert [name for _, name in app.CONTENT.examples] == list(load_checkpoint(tiny_run).classes)
    found = app.mistakes("surest first", None, None)
    assert len(found) == len(json.loads((space / "mistakes.json").read_text(encoding="utf-8"))) > 0
    for each in found:
        (position,) = np.flatnonzero(evaluation.indices == int(each.name.split()[1]))
        np.testing.assert_array_equal(each.image, evaluation.images[position])
        assert str(evaluation.labels[position]) == each.true != each.predicted
    predicted, true = app.overlays(found)
    assert predicted.shape == true.shape == (len(found), 32, 32, 4)
    assert {each.true for each in app.mistakes("by class", found[0].true, None)} == {found[0].true}


def test_it_reads_checkpoint_and_images_once(tiny_run, tmp_path, monkeypatch, no_figures):
    from cifar_resnet.data import datasets

    read, originals = [], (torch.load, datasets.load)
    monkeypatch.setattr(torch, "load", lambda *given, **how: read.append("checkpoint") or originals[0](*given, **how))
    monkeypatch.setattr(datasets, "load", lambda *given: read.append("images") or originals[1](*given))
    export(tiny_run, tmp_path / "space", format="space")
    assert read == ["checkpoint", "images"]


def test_it_needs_nothing_of_the_package_and_trains_nothing(space):
    installed = {"gradio", "torch", "safetensors", "numpy", "PIL", "page"}
    for name in ("app.py", "page.py"):
        source = (space / name).read_text(encoding="utf-8")
        tree = ast.parse(source)
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module.partition(".")[0] for module in modules} <= installed | sys.stdlib_module_names
        assert not re.search(r"cifar.resnet|backward\(|optim", source)
    needed = dict(line.split("==") for line in (space / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert needed == {name: version(name).partition("+")[0] for name in ("gradio", "torch", "safetensors", "numpy", "pillow")}
    front, text = (space / "README.md").read_text(encoding="utf-8").split("---\n")[1:]
    fields = dict(line.split(": ", 1) for line in front.splitlines())
    assert {"title", "emoji", "sdk", "sdk_version", "app_file"} <= set(fields)
    assert "license" not in fields
    assert (fields["sdk"], fields["sdk_version"], fields["app_file"]) == ("gradio", version("gradio"), "app.py")
    assert "cifar-resnet train --recipe default" in text
    assert not re.search(r"\{\{|\{%", front + text)


def test_it_runs_in_chromium_without_the_package(space, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
    code = "import runpy, sys; sys.modules['cifar_resnet'] = None; sys.path.insert(0, '.'); runpy.run_path('app.py', run_name='__main__')"
    environment = {**os.environ, "GRADIO_SERVER_PORT": address.split(":")[2].rstrip("/"), "TMPDIR": str(tmp_path)}
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=space, env=environment, **quiet)
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(profile, 390) as browser:
            browser.wait_for(address)
            browser.until("document.querySelectorAll('.card').length == 10")
            browser.upload("input[type=file]", tmp_path / "photo.jpg")
            browser.until("document.querySelector('.big img.heat')")
            browser.js("[...document.querySelectorAll('button[role=tab]')].find(e => e.textContent.trim() == 'Mistakes').click()")
            browser.until("document.querySelector('.cards.wide .card img.heat')")
            for width in (390, 1280):
                browser.resize(width)
                assert browser.js("document.documentElement.scrollWidth") <= width
            assert browser.errors == []
            assert [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))] == []
    finally:
        process.kill()
        out, err = process.communicate()
    assert (out.decode(), err) == (f"the page is at {address}, until Ctrl-C{os.linesep}", b"")


@pytest.fixture
def own_run(own_images, tmp_path, no_figures):
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    return tmp_path / "run"


def test_what_is_published_names_no_folder_of_this_machine(own_run, own_images, app_of, no_figures):
    folder = export(own_run, format="space")
    for file in folder.rglob("*"):
        assert file.is_dir() or os.fsencode(own_images.parent) not in file.read_bytes(), file
    assert "--dataset ./own" in (folder / "README.md").read_text(encoding="utf-8")
    assert "--dataset ./own" in (folder / "run.html").read_text(encoding="utf-8")
    app = app_of(folder)
    Image.fromarray(np.full((40, 40), 9, np.uint16)).save(own_run / "deep.png")
    with pytest.raises(Exception, match="more than 8 bits a channel"):
        app.read(str(own_run / "deep.png"))


def test_a_class_that_was_renamed_is_one_line(own_run, own_images, refused, no_figures):
    for part in ("train", "test"):
        (own_images / part / "dark").rename(own_images / part / "black")
    line = refused(1, "export", own_run, "--format", "space", "--output", own_run / "space")
    assert "knows bright, dark; the images are of black, bright" in line
    assert not (own_run / "space").exists()


def test_what_cannot_be_exported_as_a_space_is_one_line(refused, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty" in refused(1, "export", tiny_run, "--format", "space", "--output", tmp_path / "full")
    assert "--with-preprocessing goes with" in refused(2, "export", tiny_run, "--format", "space", "--with-preprocessing")
    monkeypatch.delitem(sys.modules, "cifar_resnet.look.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(CifarResnetError, match=r'gradio: pip install "cifar-resnet\[demo\]"'):
        export(tiny_run, tmp_path / "new", format="space")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


@pytest.mark.parametrize(("mistakes", "words"), [(0, "nothing: it made no mistake"), (1, "the 1 surest mistake,"), (300, "the 200 surest mistakes,")])
def test_its_readme_counts_the_mistakes(tiny_run, mistakes, words):
    checkpoint = load_checkpoint(tiny_run)
    content = SimpleNamespace(title="my *digits* <b>", notice="")
    readme = space_file._readme(checkpoint, checkpoint.recipe, content, mistakes)
    assert words in readme
    assert "\n# my \\*digits\\* &lt;b&gt;\n" in readme
