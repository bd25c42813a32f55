import json
import shutil
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_resnet import Recipe, console, data, experiment, export, load_checkpoint, predict
from cifar_resnet import train as train_run
from cifar_resnet.batches import TensorBatches
from cifar_resnet.errors import CifarResnetError, DataError, UsageError


@pytest.fixture
def digit_images(tiny_run, tmp_path):
    """The tiny run's 40 test images as PNG files, in order, and its model's logits of them."""
    checkpoint = load_checkpoint(tiny_run)
    split = data.load(checkpoint.recipe).evaluation
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(split.images):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    images, _ = next(TensorBatches(split, checkpoint.recipe, torch.device("cpu")).plain(40))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, checkpoint.recipe.precision == "bfloat16"):
        return folder, checkpoint.model().logits(images).float()


def test_predictions_on_files_are_those_on_the_dataset(digit_images, tiny_run, cli):
    folder, logits = digit_images
    code, out, err = cli("predict", tiny_run, folder, "--json", "--top", 2)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [row["image"] for row in found] == sorted(str(path) for path in folder.iterdir())
    values, classes = logits.double().softmax(1).topk(2)
    for row, probabilities, labels in zip(found, values, classes, strict=True):
        assert [int(each["class"]) for each in row["classes"]] == labels.tolist()
        assert [each["probability"] for each in row["classes"]] == pytest.approx(probabilities.tolist())


def test_what_is_no_image_is_named_and_skipped(digit_images, tiny_run, cli, tmp_path, monkeypatch):
    folder, _ = digit_images
    monkeypatch.chdir(folder)
    (folder / "aa.txt").write_text("no image")
    (folder / "bb.png").write_bytes((folder / "00.png").read_bytes()[:60])
    code, out, err = cli("predict", tiny_run, ".", tmp_path / "missing.png")
    assert code == 1
    assert [name in err for name in ("aa.txt", "bb.png", "missing.png: No such file")] == [True] * 3
    assert err.count("cifar-resnet: skipped") == 3
    assert "39.png" in out


@pytest.mark.parametrize("kind", ["L", "LA", "P", "RGBA", "I;16", "CMYK", "1"])
def test_images_of_every_mode_are_read(kind, tmp_path):
    grey = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(grey).convert(kind)
    path = tmp_path / ("x.jpg" if kind == "CMYK" else "x.png")
    image.save(path)
    found = data.read_image(path)
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    if kind != "1":  # the centred 48x48, from grey 32 to 223
        assert found[0].mean() == pytest.approx(34, abs=4)
        assert found[-1].mean() == pytest.approx(221, abs=4)


def test_images_are_turned_cut_and_laid_on_white(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64, 0] = 200  # the centred square is red
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (data.read_image(tmp_path / "wide.png") == [200, 0, 0]).all()
    small = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(small).save(tmp_path / "turned.webp", exif=exif, lossless=True)
    np.testing.assert_array_equal(data.read_image(tmp_path / "turned.webp"), np.rot90(small, -1))
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (data.read_image(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "float.tiff")
    assert (data.read_image(tmp_path / "float.tiff") == 127).all()


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_the_onnx_model_gives_the_same_logits(with_preprocessing, tiny_run, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    checkpoint = load_checkpoint(tiny_run)
    split = data.load(checkpoint.recipe).evaluation
    path = export(tiny_run, tmp_path / "m.onnx", with_preprocessing=with_preprocessing)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images, _ = next(TensorBatches(split, checkpoint.recipe, torch.device("cpu")).plain(40))
    with torch.inference_mode():
        expected = checkpoint.model().logits(images).numpy()
    for count in (1, 40):
        given = split.images[:count] if with_preprocessing else images[:count].contiguous().numpy()
        (found,) = session.run(["logits"], {"images": given})
        np.testing.assert_allclose(found, expected[:count], rtol=1e-3, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(checkpoint.classes)


def test_safetensors_hold_the_weights_that_are_evaluated(tiny_run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra export is not installed")
    found = safetensors.load_file(export(tiny_run, tmp_path / "m.safetensors", format="safetensors"))
    expected = load_checkpoint(tiny_run).model().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_exported_or_predicted_is_refused(tiny_run, tmp_path, monkeypatch, refused):
    assert "--with-preprocessing goes with" in refused(2, "export", tiny_run, "--format", "safetensors", "--with-preprocessing")
    assert "--top 0 must be at least 1" in refused(2, "predict", tiny_run, tmp_path, "--top", 0)
    (tmp_path / "empty").mkdir()
    assert "there are no files in" in refused(2, "predict", tiny_run, tmp_path / "empty")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(CifarResnetError, match=r"cifar-resnet\[export\]"):
        export(tiny_run, tmp_path / "m.onnx")
    with pytest.raises(UsageError):
        export(tiny_run, format="h5")


@pytest.fixture
def own_images(tmp_path):
    """A folder of two classes, bright and dark, in sizes of their own."""
    rng, folder = np.random.default_rng(0), tmp_path / "own"
    for part, count in (("train", 24), ("test", 6)):
        for name, low in (("bright", 150), ("dark", 0)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 100, (40, 40, 3), dtype=np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


def test_own_images_are_trained_on_with_their_class_names(own_images, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(own_images.parent)
    options = ("--epochs", 2, "--batch-size", 16, "--max-lr", 0.02, "--run-dir", tmp_path / "run")
    assert cli("train", "--dataset", "own", *options)[0] == 0
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.classes == ("bright", "dark")
    assert checkpoint.recipe.dataset == str(own_images)
    images = np.stack([data.read_image(path) for path in sorted(own_images.glob("train/*/*.png"))]) / 255
    assert checkpoint.recipe.mean == pytest.approx(images.mean((0, 1, 2)), abs=1e-4)
    assert checkpoint.recipe.std == pytest.approx(images.std((0, 1, 2)), abs=1e-4)
    code, out, _ = cli("evaluate", tmp_path / "run")
    assert code == 0
    assert "bright" in out
    (tmp_path / "elsewhere").mkdir()
    shutil.move(own_images, tmp_path / "elsewhere")
    assert "give the folder that holds it with --data-dir" in cli("evaluate", tmp_path / "run")[2]
    assert cli("evaluate", tmp_path / "run", "--data-dir", tmp_path / "elsewhere")[:2] == (0, out)
    own_images = tmp_path / "elsewhere" / "own"
    (found,) = predict(tmp_path / "run", [own_images / "test" / "dark" / "0.png"])
    assert {each["class"] for each in found["classes"]} == {"bright", "dark"}


def test_a_folder_in_another_layout_is_refused(own_images, refused, tmp_path):
    assert "there is no folder" in refused(2, "train", "--dataset", tmp_path / "nowhere")
    assert "--views 0" in refused(2, "samples", "--dataset", own_images, "--views", 0)
    (own_images / "train" / "dark" / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"0\.png: not an image"):
        data.load(Recipe.build(dataset=str(own_images)))
    shutil.rmtree(own_images / "test" / "dark")
    (own_images / "train" / "dark" / "0.png").unlink()
    assert "they must be the same" in refused(1, "train", "--dataset", own_images)
    shutil.rmtree(own_images / "test")
    assert "must hold test/CLASS/*" in refused(1, "train", "--dataset", own_images)


def test_repeat_trains_seeds_and_sums_them_up(cli, tmp_path, narrow):
    from scipy import stats

    options = ("--dataset", "digits", "--batch-size", 64, "--epochs", 1)  # enough images for three accuracies to differ
    code, out, _ = cli("train", *options, "--repeat", 3, "--seed", 5, "--run-dir", tmp_path / "many")
    assert code == 0
    content = json.loads((tmp_path / "many" / "repeat.json").read_text())
    runs = [load_checkpoint(tmp_path / "many" / f"s{seed}") for seed in (5, 6, 7)]
    assert content["accuracies"] == [run.history[-1]["test_accuracy"] for run in runs]
    assert [run.recipe.seed for run in runs] == [5, 6, 7]
    assert len(set(content["accuracies"])) == 3
    expected = stats.t.interval(0.95, 2, np.mean(content["accuracies"]), stats.sem(content["accuracies"]))
    assert content["interval"] == pytest.approx(expected)
    assert f"3 seeds: {content['mean']:.2f} ± {content['std']:.2f} %" in out
    shutil.rmtree(tmp_path / "many" / "s7")  # as if it had been stopped before the third
    before = (tmp_path / "many" / "s6" / "checkpoint.pt").stat().st_mtime_ns
    assert cli("train", "--resume", tmp_path / "many")[0] == 0
    again = json.loads((tmp_path / "many" / "repeat.json").read_text())
    assert again["accuracies"] == content["accuracies"]
    assert (tmp_path / "many" / "s6" / "checkpoint.pt").stat().st_mtime_ns == before
    code, _, err = cli("train", "--resume", tmp_path / "many", "--epochs", 3)
    assert code == 2
    assert "--epochs 3 contradicts" in err


def test_a_signal_after_the_last_step_of_a_seed_stops_the_repetition(tmp_path):
    class Late(experiment.Watcher):
        def epoch(self, epoch):
            signal.raise_signal(signal.SIGINT)

    recipe = Recipe.build("digits", epochs=1, train_limit=32, test_limit=20, batch_size=16)
    many, before = tmp_path / "many", signal.getsignal(signal.SIGINT)
    with pytest.raises(experiment.Interrupted, match=f"stopped by SIGINT; .* --resume {many}$"):
        experiment.repeat(recipe, 2, many, watch=lambda: nullcontext(Late()))
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(many / "s0").finished
    assert not (many / "s1").exists()
    assert len(experiment.repeat(resume=many)["accuracies"]) == 2


def test_repeat_takes_two_or_more(refused, tmp_path):
    assert "--repeat 1 must be at least 2" in refused(2, "train", "--dataset", "digits", "--repeat", 1)
    train_run(Recipe.build("digits", epochs=1, train_limit=16, test_limit=10, batch_size=16), tmp_path / "run")
    assert "--repeat does not go with --resume" in refused(2, "train", "--resume", tmp_path / "run", "--repeat", 2)


def test_quiet_prints_nothing(tiny_run, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(console.console, "quiet", False)  # as it is again afterwards
    assert cli("--quiet", "evaluate", tiny_run, "--run-dir", tmp_path) == (0, "", "")
    assert (tmp_path / "evaluation.json").exists()
