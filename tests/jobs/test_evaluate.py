import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_helpers import content

from cifar_resnet import CifarResnetError, Recipe, evaluate, load_checkpoint, misclassified, predict, report, train
from cifar_resnet.data import label_errors
from cifar_resnet.data.datasets import load
from cifar_resnet.data.loaders import make_loader
from cifar_resnet.errors import UsageError
from cifar_resnet.look import console
from cifar_resnet.runs import REPEAT

CPU = torch.device("cpu")


def images_of(recipe):
    """The images that a run is judged by, as the network takes them, and their labels."""
    split = load(recipe).evaluation
    batch = next(make_loader(split, recipe, CPU).plain(len(split)))
    return batch.images, batch.labels


def test_what_train_reports_is_what_evaluate_prints(tiny_run, tmp_path, cli, no_figures):
    last = load_checkpoint(tiny_run).history[-1]
    code, out, _ = cli("evaluate", tiny_run / "checkpoint.pt", "--run-dir", tmp_path, "--tta", "flip")
    assert code == 0
    found = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    assert (found["accuracy"], found["loss"]) == (last["test_accuracy"], last["test_loss"])
    assert f"test accuracy {last['test_accuracy']:.2f} % of 40 images" in out
    assert sum(row["count"] for row in found["classes"].values()) == found["images"] == 40
    assert sum(found["confusion_matrix"][i][i] for i in range(10)) == round(0.4 * found["accuracy"])
    assert set(found["tta"]) == {"flip"}
    assert sorted(os.listdir(tmp_path)) == ["class_accuracy.png", "confusion_matrix.png", "evaluation.json", "reliability.png"]


def test_the_temperature_changes_loss_and_calibration_alone(tiny_run, tmp_path, cli, no_figures):
    """As a network does whose last layer is scaled by it. The command says both calibration errors."""
    content = load_checkpoint(tiny_run).content
    content["recipe"] = {**content["recipe"], "precision": "float32"}  # bfloat16 would round the scaled weights
    torch.save({**content, "temperature": 0.7}, tmp_path / "checkpoint.pt")
    code, out, _ = cli("evaluate", tmp_path)
    assert code == 0
    before = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    scaled = copy.deepcopy(content)
    for name in ("model", "averaged"):
        for key in ("fc.weight", "fc.bias"):
            scaled[name][key] /= 0.7
    torch.save({**scaled, "temperature": None}, tmp_path / "checkpoint.pt")
    after = evaluate(tmp_path, tmp_path / "after")
    assert f"expected calibration error {before['calibration_error']:.2f} %" in out
    assert f"expected calibration error {before['calibrated']['calibration_error']:.2f} %" in out
    assert after["calibrated"] is None
    assert after["accuracy"] == before["accuracy"]
    for name in ("loss", "calibration_error"):
        assert before["calibrated"][name] == pytest.approx(after[name], rel=1e-3)
        assert before[name] != pytest.approx(after[name], rel=1e-3)


@pytest.mark.parametrize("tta", ["flip", "flip-shift"])
def test_test_time_augmentation_is_the_mean_of_its_views(tiny_run, tmp_path, tta, no_figures):
    """The shifts by rolling an image that is one pixel larger on every side, reflected."""
    checkpoint = load_checkpoint(tiny_run)
    images, labels = images_of(checkpoint.recipe)
    plain = [images, images.flip(3)]
    larger = [torch.nn.functional.pad(each, (1, 1, 1, 1), mode="reflect") for each in plain]
    shifted = [each.roll((by, by), (2, 3))[:, :, 1:33, 1:33] for each in larger for by in (1, -1)]
    weighed = (
        [(1 / 2, each) for each in plain]
        if tta == "flip"
        else [(1 / 4, each) for each in plain] + [(1 / 8, each) for each in shifted]
    )
    model = checkpoint.model()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=checkpoint.recipe.precision == "bfloat16"):
        logits = sum(weight * model.logits(each).float() for weight, each in weighed)
    found = evaluate(tiny_run, tmp_path, tta=tta)["tta"][tta]
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert found["accuracy"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    with pytest.raises(UsageError, match="--tta crop"):
        evaluate(tiny_run, tmp_path / "none", tta="crop")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("native", [True, False])
def test_where_bfloat16_is_only_emulated_evaluation_is_in_float32(native, no_figures, tmp_path, cli, monkeypatch):
    recipe = Recipe.build("digits", epochs=1, train_limit=70, test_limit=40, precision="bfloat16", width=4)
    monkeypatch.setattr("cifar_resnet.training.calibration.find_temperature", lambda *_: None)
    checkpoint = train(recipe, tmp_path / "run")
    monkeypatch.setattr("cifar_resnet.training.runtime._multiplies_bfloat16", lambda device: native)
    images, labels = images_of(checkpoint.recipe)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=native):
        logits = checkpoint.model().logits(images).double()
    code, out, err = cli("evaluate", tmp_path / "run")
    assert code == 0
    assert ("evaluated in float32 on this CPU" in out + err) is not native
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text("utf-8"))
    assert found["precision"] == ("bfloat16" if native else "float32")
    loss = found["loss"]
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert (loss == checkpoint.history[-1]["test_loss"]) is native
    Image.fromarray(load(recipe).evaluation.images[0]).save(tmp_path / "x.png")
    (one,) = predict(tmp_path / "run", [tmp_path / "x.png"], top=1)
    probability = one["classes"][0]["probability"]
    assert probability == pytest.approx(float(logits[0].softmax(0).max()), rel=1e-2)
    with torch.inference_mode():
        exact = checkpoint.model().logits(images[:1]).double().softmax(1).max()
    assert (probability == pytest.approx(float(exact), rel=1e-6)) is not native


def test_pictures_come_in_the_format_asked_for(cli, tiny_run, tmp_path):
    assert cli("evaluate", tiny_run, "--format", "svg", "--run-dir", tmp_path)[0] == 0
    svgs = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert set(svgs) == {"confusion_matrix.svg", "class_accuracy.svg", "reliability.svg"}
    assert all(b"<svg" in content for content in svgs.values())


def test_an_unfinished_run_is_evaluated_as_it_stands(unfinished, tmp_path, no_figures):
    said = []
    content = evaluate(unfinished, tmp_path, notify=said.append)
    assert (content["epoch"], content["images"]) == (1, 40)
    assert said == ["the run stands at epoch 1 of 2, step 1: what follows is not its end"]


def test_own_images_that_were_moved_are_found_and_others_refused(own_images, tmp_path, cli, no_figures):
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    code, out, _ = cli("evaluate", tmp_path / "run")
    assert code == 0
    assert "bright" in out
    (tmp_path / "elsewhere").mkdir()
    shutil.move(own_images, tmp_path / "elsewhere")
    assert "the folder that holds it with --data-dir" in cli("evaluate", tmp_path / "run")[2]
    assert cli("evaluate", tmp_path / "run", "--data-dir", tmp_path / "elsewhere")[:2] == (0, out)
    (tmp_path / "elsewhere" / "own").rename(tmp_path / "elsewhere" / "renamed")
    assert cli("evaluate", tmp_path / "run", "--dataset", tmp_path / "elsewhere" / "renamed")[:2] == (0, out)
    (tmp_path / "elsewhere" / "renamed").rename(tmp_path / "elsewhere" / "own")
    for part in ("train", "test"):
        (tmp_path / "elsewhere" / "own" / part / "dark").rename(tmp_path / "elsewhere" / "own" / part / "cold")
    with pytest.raises(CifarResnetError, match="knows bright, dark; the images are of bright, cold"):
        evaluate(tmp_path / "run", data_dir=tmp_path / "elsewhere")


def test_the_images_of_another_published_dataset_are_not_downloaded(tiny_run, refused):
    line = refused(2, "evaluate", tiny_run, "--dataset", "cifar100")
    assert f"--dataset cifar100: {tiny_run / 'checkpoint.pt'} was trained on digits, which has other classes" in line


def test_images_that_are_too_few_for_the_run_are_said_not_to_fit(own_images, tiny_run, tmp_path, refused):
    """The command has no option of the name that does not fit: the run has."""
    line = refused(2, "evaluate", tiny_run, "--dataset", own_images)
    assert "does not fit these images: --train-limit 70 does not fit: it takes 2 to 48 images here" in line
    assert line.startswith(f"cifar-resnet: the recipe of {tiny_run / 'checkpoint.pt'} does not")
    assert "there is no folder" in refused(2, "evaluate", tiny_run, "--dataset", tmp_path / "none")


def test_a_folder_that_is_called_like_a_dataset_is_a_folder(own_images, tmp_path, cli, no_figures, monkeypatch):
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    accuracy = evaluate(tmp_path / "run")["accuracy"]
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "cifar10"):
        own_images = own_images.rename(tmp_path / name)
        found = evaluate(tmp_path / "run", dataset=Path(name))
        assert (found["images"], found["accuracy"], found["images_changed"]) == (12, accuracy, False)
        code, out, _ = cli("evaluate", tmp_path / "run", "--dataset", f"./{name}")
        assert code == 0
        assert f"{accuracy:.2f} % of 12 images" in out


def test_images_that_are_not_the_runs_are_told_of(own_images, tmp_path, no_figures):
    run, said = tmp_path / "run", []
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), run)
    own_images.rename(tmp_path / "now")
    where = dict(dataset=tmp_path / "now", notify=said.append)
    assert evaluate(run, **where)["images_changed"] is False
    assert said == []
    (tmp_path / "now" / "test" / "dark" / "3.png").unlink()
    assert evaluate(run, **where)["images_changed"] is True
    misclassified(run, **where)
    report(run, **where)
    assert said.count("the evaluation images are not those of the run: there were 12, and there are 11") == 3


def test_a_checkpoint_that_does_not_know_its_images_is_evaluated(tmp_path, no_figures):
    shutil.copytree(Path(__file__).parent.parent / "data" / "run-0.1", tmp_path / "run")
    assert evaluate(tmp_path / "run")["images_changed"] is None


# Which runs


@pytest.fixture
def two_runs(tiny_run, tmp_path, monkeypatch):
    """The tiny run as runs/digits-1 and, the newer one, runs/digits-2 of the current folder."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        shutil.copytree(tiny_run, f"runs/digits-{number}")
        for file in Path(f"runs/digits-{number}").iterdir():
            os.utime(file, (10**9 + number, 10**9 + number))


@pytest.mark.parametrize("given", [[], ["latest"]])
def test_the_newest_run_is_evaluated_and_named(two_runs, cli, no_figures, monkeypatch, given):
    code, _, err = cli("evaluate", *given)
    assert (code, err) == (0, f"cifar-resnet: the newest run is {Path('runs/digits-2')}\n")
    assert [path.parent.name for path in Path("runs").glob("*/evaluation.json")] == ["digits-2"]
    monkeypatch.setattr(console.console, "quiet", False)  # set back at the end
    assert cli("--quiet", "evaluate", *given) == (0, "", "")


def test_a_repetition_of_one_seed_is_not_called_the_newest_run(two_runs, cli, no_figures):
    shutil.copytree("runs/digits-1", "runs/again/s0")
    Path("runs/again", REPEAT).write_text("{}")
    code, _, err = cli("evaluate", "runs/again")
    assert (code, err) == (0, "")


def test_each_of_several_runs_is_evaluated_and_one_that_fails_is_named(two_runs, cli, no_figures):
    Path("runs/find-lr-digits-1").mkdir()
    Path("runs/find-lr-digits-1/lr_finder.json").write_text("{}")
    runs = sorted(Path("runs").iterdir())
    code, out, err = cli("evaluate", *runs)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{Path('find-lr-digits-1/checkpoint.pt')}: the folder holds a search for the learning rate, no run" in err
    assert sorted(path.parent.name for path in Path("runs").glob("*/evaluation.json")) == ["digits-1", "digits-2"]
    assert out.count("most confused") == 2
    assert [line.split()[-1] for line in out.splitlines()[-2:]] == [str(Path(f"runs/digits-{number}/checkpoint.pt")) for number in (1, 2)]


def test_two_checkpoints_of_one_folder_would_write_the_same_files(two_runs, refused):
    shutil.copy("runs/digits-1/checkpoint.pt", "runs/digits-1/old.pt")
    line = refused(2, "evaluate", "runs/digits-2", "runs/digits-1", "runs/digits-1/old.pt")
    assert f"two of these checkpoints would write the same files, in {Path('runs/digits-1').resolve()}; evaluate one at a time" in line
    assert not list(Path("runs").glob("*/evaluation.json"))


@pytest.mark.posix
def test_a_run_given_twice_is_evaluated_once(two_runs, cli, no_figures, tmp_path):
    Path("link").symlink_to("runs/digits-1")
    code, out, err = cli("evaluate", "runs/digits-1", "runs/digits-1/checkpoint.pt", "link", "--run-dir", "here")
    assert (code, err, out.count("test accuracy")) == (0, "", 1)


def test_several_runs_that_all_fail_are_named_and_no_table_is_printed(refused, cli, tmp_path):
    code, out, err = cli("evaluate", tmp_path / "a", tmp_path / "b")
    assert (code, err.count("there is no checkpoint")) == (1, 2)
    assert "accuracy" not in out


def test_evaluate_takes_a_repetition_as_its_runs(two_runs, cli, no_figures):
    Path("runs/many").mkdir()
    Path("runs/many/repeat.json").write_text("{}")
    Path("runs/digits-1").rename("runs/many/s9")
    Path("runs/digits-2").rename("runs/many/s10")
    code, out, err = cli("evaluate", "runs/many")
    assert (code, err) == (0, "")
    assert [line.split()[-1] for line in out.splitlines()[-2:]] == [str(Path(f"runs/many/{seed}/checkpoint.pt")) for seed in ("s9", "s10")]


def test_a_second_figure_leaves_out_labels_known_to_be_wrong(fake_cifar10, tmp_path, cli, monkeypatch, no_figures):
    monkeypatch.setenv("CIFAR_RESNET_DATA_DIR", str(fake_cifar10))
    monkeypatch.setattr(label_errors, "CIFAR10_TEST", frozenset({3, 4, 17, 2000}))
    small = dict(epochs=1, batch_size=16, width=4)
    for name, more in (("test", {}), ("holdout", dict(holdout=20))):
        train(Recipe.build(**small, **more), tmp_path / name)
    code, out, _ = cli("evaluate", tmp_path / "test")
    assert code == 0
    found = json.loads((tmp_path / "test" / "evaluation.json").read_text("utf-8"))
    wrong = {mistake.index for mistake in misclassified(tmp_path / "test")}
    assert found["accuracy"] == pytest.approx(100 * (20 - len(wrong)) / 20)
    expected = 100 * (17 - len(wrong - {3, 4, 17})) / 17
    assert found["without_label_errors"] == {"images": 17, "accuracy": pytest.approx(expected)}
    assert f"test accuracy {found['accuracy']:.2f} % of 20 images" in out
    assert f"without the 3 images whose label is known to be wrong: accuracy {expected:.2f} %" in out
    assert evaluate(tmp_path / "holdout")["without_label_errors"] is None


def test_the_labels_known_to_be_wrong_are_those_published(tiny_run, tmp_path, no_figures):
    """54 of the 10,000, among them the frog that is called a cat; no other data set has any."""
    assert len(label_errors.CIFAR10_TEST) == 54
    assert {2405, 165, 9793} < label_errors.CIFAR10_TEST < set(range(10_000))
    assert evaluate(tiny_run, tmp_path)["without_label_errors"] is None


def test_json_is_what_the_file_holds_and_nothing_else_is_printed(tiny_run, unfinished, cli, tmp_path, no_figures):
    code, out, err = cli("evaluate", tiny_run, "--json", "--run-dir", tmp_path)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    runs = [shutil.copytree(run, tmp_path / run.name) for run in (tiny_run, unfinished)]
    code, out, err = cli("evaluate", *runs, "--json")
    assert (code, [each["checkpoint"] for each in json.loads(out)]) == (0, [str(run / "checkpoint.pt") for run in runs])
    assert "the run stands at epoch 1 of 2" in err


def test_the_figures_are_known_before_the_pictures_are_drawn(tiny_run, tmp_path, cli, monkeypatch):
    """So that a picture that cannot be drawn takes nothing else along."""

    def fails(figure, format="png"):
        raise MemoryError("no room for a picture")

    monkeypatch.setattr("cifar_resnet.look.rendering.render", fails)
    code, out, err = cli("evaluate", tiny_run, "--run-dir", tmp_path)
    assert (code, err) == (1, "cifar-resnet: no room for a picture\n")
    assert "% of 40 images" in out
    assert json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["images"] == 40


@pytest.mark.posix
def test_what_is_written_does_not_wait_for_who_reads_the_table(tiny_run, tmp_path):
    """The reader is gone before the table is printed, and the pictures are drawn after that."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "cifar_resnet", "evaluate", str(tiny_run), "--run-dir", str(tmp_path / "out")]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"evaluation.json", "confusion_matrix.png", "reliability.png"} <= set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize(
    "command", ["evaluate", "evaluate --json", "misclassified", "report", "predict --json", "export --format space"]
)
def test_a_network_that_has_diverged_is_refused_in_one_line(command, tiny_run, tmp_path, refused):
    if command.startswith("export"):
        pytest.importorskip("safetensors", reason="the extra demo is not installed")
    ran = content(tiny_run)
    for weights in filter(None, (ran["model"], ran["averaged"])):
        for gain in (each for name, each in weights.items() if name.endswith("weight") and each.dim() == 1):
            gain.fill_(1e30)
    torch.save(ran, tmp_path / "checkpoint.pt")
    Image.new("L", (8, 8), 255).save(tmp_path / "my.png")
    name, *options = command.split()
    images = [tmp_path / "my.png"] if name == "predict" else []
    said = refused(1, name, tmp_path / "checkpoint.pt", *images, *options)
    assert "the network's logits are not finite, so it has diverged; train again with a lower --max-lr than 0.4" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "my.png"]
