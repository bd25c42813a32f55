import json
import os

import pytest

from cifar_resnet import load_checkpoint, misclassified
from cifar_resnet.data.datasets import load
from cifar_resnet.errors import UsageError
from cifar_resnet.look import figures


def test_every_mistake_is_listed(tiny_run, tmp_path, cli):
    code, out, _ = cli("misclassified", tiny_run, "--count", 4, "--run-dir", tmp_path)
    assert code == 0
    found = json.loads((tmp_path / "misclassified.json").read_text())
    checkpoint = load_checkpoint(tiny_run)
    wrong = round(40 * (1 - checkpoint.history[-1]["test_accuracy"] / 100))
    assert (len(found["mistakes"]), found["images"], found["evaluated_on"]) == (wrong, 40, "test")
    assert f"of {wrong} mistakes" in out
    images = load(checkpoint.recipe).evaluation
    label_of = dict(zip(images.indices.tolist(), images.labels.tolist(), strict=True))
    assert len({mistake["index"] for mistake in found["mistakes"]}) == wrong
    for mistake in found["mistakes"]:
        assert mistake["true"] == str(label_of[mistake["index"]]) != mistake["predicted"]
        assert max(mistake["probabilities"], key=mistake["probabilities"].get) == mistake["predicted"]
    assert sorted(os.listdir(tmp_path)) == ["gradcam.png", "misclassified.json", "misclassified.png"]
    assert (tmp_path / "gradcam.png").read_bytes().startswith(b"\x89PNG")


def test_the_pictures_show_those_chosen(tiny_run, tmp_path, monkeypatch, no_figures):
    """The images shown are those of the mistakes beside them, in the same order; every title says which they are."""
    drawn = {}
    for name in ("misclassified", "grad_cam"):
        draw = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *given, name=name, draw=draw: drawn.update({name: given}) or draw(*given))
    every = misclassified(tiny_run, tmp_path)
    counts = {}
    for each in every:
        counts[each.true] = counts.get(each.true, 0) + 1
    true, most = max(counts.items(), key=lambda pair: pair[1])
    assert most >= 3
    chosen = misclassified(tiny_run, tmp_path, count=2, true=true, layer="layer3", format="pdf")
    assert chosen == [each for each in every if each.true == true]
    images = load(load_checkpoint(tiny_run).recipe).evaluation
    place = {index: position for position, index in enumerate(images.indices.tolist())}
    for name, (pictures, *_, shown, title) in drawn.items():
        assert shown == chosen[:2]
        assert [picture.tobytes() for picture in pictures] == [images.images[place[each.index]].tobytes() for each in shown]
        assert title.endswith(f"2 surest of {most} mistakes in 40 test images, true class {true}"), name
    assert drawn["grad_cam"][-1].startswith("Grad-CAM at layer3: ")
    assert {path.name for path in tmp_path.glob("*.pdf")} == {"misclassified.pdf", "gradcam.pdf"}
    assert len(json.loads((tmp_path / "misclassified.json").read_text())["mistakes"]) == len(every)


def test_no_such_mistake_draws_no_picture(tiny_run, tmp_path, cli):
    every = misclassified(tiny_run, tmp_path / "all", count=1)
    pairs = {(each.true, each.predicted) for each in every}
    true, predicted = next((str(i), str(j)) for i in range(10) for j in range(10) if i != j and (str(i), str(j)) not in pairs)
    code, out, _ = cli("misclassified", tiny_run, "--true", true, "--predicted", predicted, "--run-dir", tmp_path / "none")
    assert code == 0
    assert "there is no such mistake to show" in out
    assert os.listdir(tmp_path / "none") == ["misclassified.json"]


def test_what_cannot_be_chosen_is_refused(refused, tiny_run, tmp_path):
    line = refused(2, "misclassified", tiny_run, "--true", "cow", "--run-dir", tmp_path / "none")
    assert "--true cow: no such class; there are 0, 1, 2" in line
    for options, word in (
        (dict(count=0), "--count 0"),
        (dict(layer="layer9"), "--layer layer9"),
        (dict(format="gif"), "--format gif"),
    ):
        with pytest.raises(UsageError, match=word):
            misclassified(tiny_run, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
