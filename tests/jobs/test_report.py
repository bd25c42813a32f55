import base64
import json
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from chromium import CHROMIUM
from PIL import Image
from run_helpers import StopAfter, content

from cifar_resnet import Recipe, load_checkpoint, report, train
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.errors import CifarResnetError, UsageError, shell_word
from cifar_resnet.jobs.common import cell, command_line
from cifar_resnet.jobs.interrupt import Interrupted


@pytest.fixture(scope="session")
def page(tiny_run, tmp_path_factory):
    return report(tiny_run, tmp_path_factory.mktemp("page") / "report.html")


def test_the_report_holds_the_figures_and_needs_nothing_beside_it(page, tiny_run):
    html = page.read_text("utf-8")
    assert f"{load_checkpoint(tiny_run).history[-1]['test_accuracy']:.2f} %" in html
    assert "n = 1 run, seed 0" in html
    assert command_line(load_checkpoint(tiny_run).recipe) in Reader(html).text
    assert "<script" not in html
    assert "<td><bdi>9</bdi></td>" in html  # a name in another direction of writing turns no number beside it around
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', html)) == {"data:"}
    assert len(re.findall("<figure><figcaption>", html)) == len(re.findall("<svg", html)) == 6
    assert len(re.findall(r"image/png;base64,", html)) == 3 * 10 + 1  # and the matrix in its chart
    for data in re.findall(r"image/png;base64,([^\"]+)", html):
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"\$\w+|\{\{|\{%", html)
    history = load_checkpoint(tiny_run).history
    for row in history:
        assert f"<title>epoch {row['epoch']}: test accuracy {row['test_accuracy']:.2f} %</title>" in html
        assert f"<td>{row['train_loss']:.4f}</td>" in html


def test_labels_that_may_be_wrong_are_shown_as_misclassified_ranks_them(page, tiny_run, tmp_path, cli, no_figures):
    """In the page and in the Markdown: the same images, in the same order, with the same guess."""
    assert cli("misclassified", tiny_run, "--sort", "label", "--run-dir", tmp_path)[0] == 0
    ranked = json.loads((tmp_path / "labels.json").read_text("utf-8"))["labels"][:10]
    section = page.read_text("utf-8").partition("<h2>Labels that may be wrong")[2].partition('<div class="tables">')[0]
    cards = [Reader(card).text.split() for card in section.split('<div class="card">')[1:]]
    expected = [f"{row['given']}, {100 * row['score']:.1f} % perhaps mislabelled:{row['suggested']}?" for row in ranked]
    assert [" ".join(card) for card in cards] == [f"{text} image {row['index']}" for text, row in zip(expected, ranked, strict=True)]
    text = report(tiny_run, tmp_path / "markdown", format="markdown").read_text("utf-8")
    rows = [f"| image {row['index']} | {row['given']} | {100 * row['score']:.2f} % | {row['suggested']}? |" for row in ranked]
    assert "\n".join(rows) in text


class Reader(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_what_a_checkpoint_holds_is_text_on_the_page_and_no_html(tiny_run, tmp_path, no_figures, page, monkeypatch):
    """Class names, device and recipe's name; a checkpoint may come from anybody."""
    evil = "<script>alert(1)</script>"
    shutil.copytree(tiny_run, tmp_path / "run")
    found = content(tmp_path / "run")
    found["classes"] = [f"{name}{evil}" for name in found["classes"]]
    found["environment"]["device_name"] = found["recipe"]["recipe"] = evil
    torch.save(found, tmp_path / "run" / "checkpoint.pt")
    from cifar_resnet.data import datasets

    digits = datasets._digits()
    monkeypatch.setattr(datasets, "_digits", lambda: (*digits[:2], tuple(found["classes"])))
    shown = Reader(report(tmp_path / "run").read_text("utf-8"))
    assert shown.tags <= Reader(page.read_text("utf-8")).tags
    assert shown.text.count(evil) >= 12


@pytest.mark.posix
def test_the_command_on_the_page_keeps_a_folder_with_spaces_in_one_word(own_images, tmp_path, no_figures):
    folder = own_images.rename(tmp_path / "my own")
    train(Recipe.build(dataset=str(folder), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    command = re.search("<pre>(.*?)</pre>", report(tmp_path / "run").read_text("utf-8"), re.DOTALL)[1]
    words = shlex.split(Reader(command).text)
    assert words[words.index("--dataset") + 1] == str(folder)


def test_the_command_repeats_the_run(cli, tmp_path, no_figures):
    options = ("--dataset", "digits", "--train-limit", 48, "--test-limit", 20, "--batch-size", 16, "--epochs", 1, "--seed", 3)
    options += ("--no-nesterov", "--mean", 0.1, 0.2, 0.3, "--width", 4)
    assert cli("train", *options, "--run-dir", tmp_path / "a")[0] == 0
    recipe = load_checkpoint(tmp_path / "a").recipe
    words = command_line(recipe).split()
    assert words[:2] == ["cifar-resnet", "train"]
    assert cli(*words[1:], "--run-dir", tmp_path / "b")[0] == 0
    assert load_checkpoint(tmp_path / "b").recipe == recipe
    assert command_line(with_statistics(Recipe.build("page"))) == "cifar-resnet train --recipe page"
    assert command_line(Recipe.build("digits", max_lr=0.2)) == "cifar-resnet train --recipe digits --max-lr 0.2"
    assert command_line(Recipe.build(max_lr=0.123456, seed=7), rounded=["max_lr"]).endswith(" --max-lr 0.123 --seed 7")
    small = dict(dataset="digits", train_limit=48, test_limit=20, batch_size=16, epochs=1, peak_epoch=0.5, width=4)
    recipe = Recipe.build("eva6-s9", **small, precision="float32").replace(base_momentum=None)  # which no option can say
    assert cli(*shlex.split(command_line(recipe))[1:], "--run-dir", tmp_path / "c")[0] == 0
    assert load_checkpoint(tmp_path / "c").recipe == with_statistics(recipe.replace(recipe="default"))


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_the_screen_in_chromium(page, width, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    probe = """<script>addEventListener("load", () => {
      const frame = document.querySelector("iframe"), inner = frame.contentDocument, images = [...inner.images];
      document.title = [inner.documentElement.scrollWidth, images.length, images.filter(i => i.complete && i.naturalWidth).length];
    });</script>"""
    frame = f'<iframe src="report.html" style="border: 0; width: {width}px; height: 5000px"></iframe>'
    (tmp_path / "probe.html").write_text(f"<body style='margin: 0'>{frame}{probe}")
    shutil.copy(page, tmp_path / "report.html")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=5000")
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "probe.html")]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    scroll_width, images, loaded = map(int, re.search(r"<title>(\d+),(\d+),(\d+)</title>", dom).groups())
    assert scroll_width <= width
    assert images == loaded >= 5  # those inside of charts aside


def test_the_report_prints_on_few_pages(page, tmp_path):
    """Of which the last one is the shortest: none is mostly empty before it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    subprocess.run([CHROMIUM, *options, f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri()], timeout=120, check=True)
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) in (3, 4)


def test_a_report_of_own_images_is_written_beside_the_run(own_images, tmp_path, no_figures):
    train(Recipe.build(dataset=str(own_images), epochs=1, batch_size=16, max_lr=0.02, width=4), tmp_path / "run")
    assert report(tmp_path / "run") == tmp_path / "run" / "report.html"
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "default on own, seed 0" in html
    assert f"--dataset {shell_word(own_images)}" in Reader(html).text


def test_an_unfinished_run_is_reported_as_what_it_is(unfinished, tmp_path, no_figures):
    page = report(unfinished, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "an unfinished run, after epoch 1 of 2, step 1" in page
    assert "after the last epoch" not in page
    folder = report(unfinished, tmp_path / "folder", format="markdown").parent
    assert "unfinished: after epoch 1 of 2, step 1." in (folder / "README.md").read_text(encoding="utf-8")


def test_a_run_stopped_in_its_first_epoch_is_reported(tiny_recipe, tmp_path, no_figures):
    with pytest.raises(Interrupted):
        train(tiny_recipe, tmp_path / "run", watcher=StopAfter(1))
    page = report(tmp_path / "run").read_text("utf-8")
    assert "an unfinished run, after epoch 0 of 2, step 1" in page
    assert "Loss by epoch" not in page
    page = report(tmp_path / "run", tmp_path / "md", format="markdown").read_text("utf-8")
    assert "unfinished: after epoch 0 of 2, step 1." in page
    assert "## Training" not in page


def test_markdown_holds_the_run_and_its_pictures(tiny_run, tmp_path, cli):
    code, out, _ = cli("report", tiny_run, "--format", "markdown", "--output", tmp_path / "page")
    assert code == 0
    text = (tmp_path / "page" / "README.md").read_text(encoding="utf-8")
    checkpoint = load_checkpoint(tiny_run)
    last = checkpoint.history[-1]
    assert f"**{last['test_accuracy']:.2f} %** test accuracy" in text
    assert f"epoch  2  LR {last['lr']:.5f}  train loss {last['train_loss']:.4f}" in text
    assert command_line(checkpoint.recipe) in text
    parameters = sum(each.numel() for each in checkpoint.model().parameters())
    assert f"| all | | | {parameters:,} |" in text
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / "page" / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path / "page")) == ["README.md", "confusion_matrix.png", "curves.png", "gradcam.png", "labels.png"]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_name_breaks_no_table_of_markdown():
    assert cell("a|b\n<i>*x*") == r"a\|b\\n&lt;i&gt;\*x\*"
    with pytest.raises(UsageError, match="--format pdf"):
        report("nowhere", format="pdf")


def test_the_folder_of_the_page_is_made_or_refused_before_the_work(tiny_run, tmp_path, monkeypatch, no_figures):
    assert report(tiny_run, tmp_path / "new" / "one" / "page.html").exists()
    monkeypatch.setattr("cifar_resnet.jobs.report.logits_of", None)
    with pytest.raises(CifarResnetError, match="page.html is no folder that can be written"):
        report(tiny_run, tmp_path / "new" / "one" / "page.html" / "more" / "page.html")


def test_a_missing_run_is_one_line(refused, tmp_path):
    assert "there is no checkpoint" in refused(1, "report", tmp_path / "nowhere")
    with pytest.raises(CifarResnetError):
        report(tmp_path)
    assert issubclass(UsageError, CifarResnetError)


def test_a_report_takes_the_place_of_a_report_alone(tiny_run, tmp_path, refused, no_figures):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My own", encoding="utf-8")
    words = "report", tiny_run, "--format", "markdown", "--output", tmp_path / "mine"
    assert "is not empty, and holds no report; choose a new one" in refused(1, *words)
    assert (tmp_path / "mine" / "README.md").read_text(encoding="utf-8") == "# My own"
    for _ in range(2):
        assert report(tiny_run, tmp_path / "new", format="markdown").exists()
    before = (tiny_run / "checkpoint.pt").read_bytes()
    assert "checkpoint.pt must end in .html or .htm" in refused(2, "report", tiny_run, "--output", tiny_run / "checkpoint.pt")
    assert (tiny_run / "checkpoint.pt").read_bytes() == before


def test_a_report_on_other_images_says_so(own_images, tmp_path, no_figures):
    recipe = Recipe(dataset=str(own_images), epochs=1, peak_epoch=0.5, width=4, batch_size=24, precision="float32")
    train(recipe, tmp_path / "run", loader="albumentations", workers=0)
    page = report(tmp_path / "run", tmp_path / "a.html").read_text(encoding="utf-8")
    assert "not those of the run" not in page
    assert "--loader albumentations" in Reader(page).text  # which augments otherwise than the usual one
    ran = load_checkpoint(tmp_path / "run")
    torch.save({**ran.content, "environment": {**ran.environment, "compiled": True}}, tmp_path / "compiled.pt")
    words = Reader(report(tmp_path / "compiled.pt", tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "--loader albumentations --compile on" in words
    Image.new("RGB", (40, 40)).save(own_images / "test" / "dark" / "0.png")
    for format, name in (("html", "b.html"), ("markdown", "b")):
        path = report(tmp_path / "run", tmp_path / name, format=format)
        assert "which are not those of the run" in path.read_text(encoding="utf-8")
