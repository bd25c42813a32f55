import json

import numpy as np
import pytest
import torch

from cifar_resnet import CifarResnetError, Recipe, export, load_checkpoint
from cifar_resnet.data.datasets import load
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.errors import UsageError


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_the_onnx_model_gives_the_same_logits(with_preprocessing, tiny_run, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    checkpoint = load_checkpoint(tiny_run)
    split = load(checkpoint.recipe).evaluation
    path = export(tiny_run, tmp_path / "m.onnx", with_preprocessing=with_preprocessing)
    assert b'File "' not in path.read_bytes()  # of a stack trace, with a path of this machine
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = next(TensorLoader(split, checkpoint.recipe, torch.device("cpu")).plain(40)).images
    with torch.inference_mode():
        expected = checkpoint.model().logits(images).numpy()
    for count in (1, 40):
        given = split.images[:count] if with_preprocessing else images[:count].contiguous().numpy()
        (found,) = session.run(["logits"], {"images": given})
        np.testing.assert_allclose(found, expected[:count], rtol=1e-3, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(checkpoint.classes)
    assert json.loads(metadata["temperature"]) == checkpoint.temperature
    assert Recipe.load(json.loads(metadata["recipe"])) == checkpoint.recipe


def test_safetensors_hold_the_weights_that_are_evaluated(tiny_run, tmp_path, cli, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra export is not installed")
    monkeypatch.setenv("CIFAR_RESNET_DATA_DIR", str(tmp_path))  # which is of no concern here
    code, out, _ = cli("export", tiny_run, "--format", "safetensors", "--output", tmp_path / "m.safetensors")
    assert code == 0
    assert "stands at epoch" not in out
    assert "m.safetensors" in out
    found = safetensors.load_file(tmp_path / "m.safetensors")
    expected = load_checkpoint(tiny_run).model().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_of_an_unfinished_run_the_weights_say_so(unfinished, tmp_path, cli):
    safetensors = pytest.importorskip("safetensors", reason="the extra export is not installed")
    code, out, _ = cli("export", unfinished, "--format", "safetensors", "--output", tmp_path / "m.safetensors")
    assert code == 0
    assert "the run stands at epoch 1 of 2" in out
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert (file.metadata()["epoch"], file.metadata()["epochs"]) == ("1", "2")


def test_what_cannot_be_exported_is_refused(tiny_run, tmp_path, monkeypatch, refused):
    for option in (("--data-dir", tmp_path), ("--device", "cpu")):
        assert f"{option[0]} {option[1]} goes with --format space" in refused(2, "export", tiny_run, *option)
    assert "--with-preprocessing goes with" in refused(2, "export", tiny_run, "--format", "safetensors", "--with-preprocessing")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(CifarResnetError, match=r"cifar-resnet\[export\]"):
        export(tiny_run, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="--format h5"):
        export(tiny_run, format="h5")
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_another_format_is_refused(tiny_run, refused, tmp_path):
    assert "must end in .onnx" in refused(2, "export", tiny_run, "--output", tmp_path / "model.safetensors")
    assert "must end in .onnx" in refused(2, "export", tiny_run, "--output", tiny_run / "checkpoint.pt")
    assert load_checkpoint(tiny_run).finished
