"""What several jobs share."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "output", "code", "said"),
    [
        (["samples", "--dataset", "digits", "--output"], "x.gif", 2, "must end in .png, .svg or .pdf"),
        (["samples", "--dataset", "digits", "--output"], "file/x.png", 1, "is no folder that can be written"),
        (["schedule", "--output"], "folder.png", 1, "it is a folder"),
        (["compare", "RUN", "--output"], "x.jpg", 2, "must end in .png, .svg or .pdf"),
        (["compare", "RUN", "--output"], "folder.png", 1, "it is a folder"),
        (["evaluate", "RUN", "--run-dir"], "file", 1, "is no folder that can be written"),
        (["misclassified", "RUN", "--run-dir"], "file", 1, "is no folder that can be written"),
        (["report", "RUN", "--output"], "folder.png", 1, "it is a folder"),
        (["report", "RUN", "--format", "markdown", "--output"], "file", 1, "is no folder that can be written"),
        (["export", "RUN", "--format", "safetensors", "--output"], "folder.png", 1, "it is a folder"),
        (["export", "RUN", "--format", "space", "--output"], "file", 1, "is no folder that can be written"),
        (["misclassified", "RUN", "--sort", "label", "--folds", 2, "--run-dir"], "file", 1, "is no folder that can be written"),
        (["find-lr", "--dataset", "digits", "--run-dir"], "file", 1, "is no folder that can be written"),
        (["bench", "--json"], "folder.png", 1, "it is a folder"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_anything_is_done(
    tiny_run, refused, tmp_path, monkeypatch, arguments, output, code, said
):
    def done(*_, **__):
        raise AssertionError("it began")

    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name in ("data.datasets.load", "jobs.common.predict_logits", "jobs.export._safetensors", "jobs.compare._ended", "jobs.bench.bench"):
        monkeypatch.setattr(f"cifar_resnet.{name}", done)
    monkeypatch.setattr("cifar_resnet.look.figures.learning_rate", done)
    assert said in refused(code, *[tiny_run if each == "RUN" else each for each in arguments], tmp_path / output)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.png"]


def test_the_folder_of_a_picture_is_made(cli, tmp_path):
    assert cli("schedule", "--output", tmp_path / "new" / "folder" / "rate.svg")[0] == 0
    assert (tmp_path / "new" / "folder" / "rate.svg").read_bytes().startswith(b"<?xml")
