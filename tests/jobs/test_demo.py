import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from chromium import CHROMIUM, Browser
from PIL import Image
from run_helpers import content

from cifar_resnet import demo, load_checkpoint, misclassified
from cifar_resnet.data.datasets import load
from cifar_resnet.errors import CifarResnetError, DataError
from cifar_resnet.look import analysis

pytest.importorskip("gradio", reason="the extra demo is not installed")
from cifar_resnet.jobs import demo as demo_module  # noqa: E402
from cifar_resnet.jobs.common import opened  # noqa: E402
from cifar_resnet.jobs.demo import content_of_page  # noqa: E402
from cifar_resnet.look import page  # noqa: E402

WINDOWS = os.name == "nt"


@pytest.fixture(scope="module")
def served(tiny_run, tmp_path_factory):
    """The address of a page of the tiny run, and the folder where uploads lie until they are read."""
    folder = tmp_path_factory.mktemp("served")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cifar_resnet", "demo", str(tiny_run), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **piped, env=environment, creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if WINDOWS else 0)
    line = process.stdout.readline()
    assert line == f"the page is at http://127.0.0.1:{port}/, until Ctrl-C\n", process.communicate()
    yield line.split()[4].rstrip(","), folder
    process.send_signal(signal.CTRL_BREAK_EVENT if WINDOWS else signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def shown(tiny_run):
    return content_of_page(tiny_run, None, "cpu")


@pytest.fixture
def photo(tmp_path):
    """A JPEG file of 600x400 pixels."""
    grey = np.linspace(0, 255, 600 * 400).reshape(400, 600).astype(np.uint8)
    Image.fromarray(grey).convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def click(browser, tag, text):
    browser.js(f"[...document.querySelectorAll({tag!r})].find(e => e.textContent.trim() == {text!r}).click()")


def slide(browser, label, value):
    """Moves the slider of this label."""
    browser.js(
        f"""(() => {{ const block = [...document.querySelectorAll('.block')].find(e => e.innerText.trim().startsWith({label!r}));
        const slider = block.querySelector('input[type=range]'); slider.value = {value};
        slider.dispatchEvent(new Event('input', {{bubbles: true}})); slider.dispatchEvent(new Event('pointerup')); }})()"""
    )


def choose(browser, label, value):
    """Takes an option of the drop-down list of this label."""
    browser.js(f"document.querySelector('input[aria-label=\"{label}\"]').focus()")
    option = f"document.querySelector('[role=option][aria-label=\"{value}\"]')"
    browser.until(option)
    browser.js(f"{option}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")


@pytest.mark.parametrize(("width", "dark"), [(390, True), pytest.param(1280, False, marks=pytest.mark.slow)])
def test_the_page_works_in_chromium(served, photo, width, dark):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    address, folder = served
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(profile, width, dark=dark) as browser:
        browser.go(address)
        browser.until("document.querySelectorAll('.card').length == 10")
        assert browser.js("document.body.classList.contains('dark')") is dark
        browser.upload("input[type=file]", photo)
        browser.until("document.querySelector('.big img.heat')")
        before = browser.js("document.querySelector('.big img.heat').src")
        slide(browser, "Opacity", 25)
        browser.until("getComputedStyle(document.querySelector('.big img.heat')).opacity == '0.25'")
        browser.js("document.querySelector('input[type=radio][value=prep]').click()")
        browser.until(f"document.querySelector('.big img.heat').src != {before!r}")
        browser.until("document.querySelectorAll('.confidence-set').length == 5")
        slide(browser, "Classes shown", 3)
        browser.until("document.querySelectorAll('.confidence-set').length == 3")
        click(browser, "button[role=tab]", "Mistakes")
        browser.until("document.querySelector('.cards.wide .card')")
        choose(browser, "True class", "3")
        browser.until("[...document.querySelectorAll('.right')].every(e => e.textContent == '3')")
        click(browser, "button[role=tab]", "Run")
        browser.until("document.querySelectorAll('.pictures img').length == 3")
        assert browser.js("document.documentElement.scrollWidth") <= width
        click(browser, "button[role=tab]", "Mistakes")
        browser.js("document.querySelector('.cards.wide .card').click()")
        browser.until("document.querySelector('button[role=tab][aria-selected=true]').textContent.trim() == 'Predict'")
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))] == []
        assert len(browser.requests) > 20
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_ten_uploads_at_once_and_what_is_no_image_leave_the_page_up(served, photo, tmp_path):
    from gradio_client import Client, handle_file

    address, folder = served
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    (tmp_path / "words.txt").write_text("no image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    files = [photo] * 7 + [tmp_path / name for name in ("broken.png", "words.txt", "huge.png")]
    client = Client(address, verbose=False)
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda file: client.predict(handle_file(file), api_name="/receive"), files))
    assert [bool(picture) for picture, _ in answers] == [True] * 7 + [False] * 3
    assert all(message == "" for _, message in answers[:7])
    assert all("no image that can be read" in message for _, message in answers[7:9])
    assert "at most 50 megapixels" in answers[9][1]
    assert client.predict(handle_file(photo), api_name="/receive")[1] == ""
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "other"}}])
def test_only_what_was_uploaded_is_read_and_removed(served, photo, meta):
    """Whoever reaches the port can send any path. Of one that is marked as a file Gradio says no by itself."""
    asked = json.dumps({"data": [{"path": str(photo), **meta}]}).encode()
    calls = f"{served[0]}gradio_api/call/receive"
    with urlopen(Request(calls, asked, {"Content-Type": "application/json"}), timeout=60) as answer:
        number = json.load(answer)["event_id"]
    with urlopen(f"{calls}/{number}", timeout=60) as answer:
        assert answer.read().startswith(b"event: error")
    assert photo.exists()


def test_what_the_page_answers_is_what_predict_and_grad_cam_say(shown, tiny_run, cli, tmp_path):
    checkpoint = load_checkpoint(tiny_run)
    for i, (image, name) in enumerate(shown.examples):
        assert name == str(i)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for tta, augmented in (("none", False), ("flip-shift", True)):
        found = json.loads(cli("predict", tiny_run, tmp_path, "--json", "--top", 10, "--tta", tta)[1])
        for row, (image, _) in zip(found, shown.examples, strict=True):
            probabilities = dict(zip(shown.classes, shown.probabilities(image[None], augmented)[0], strict=True))
            assert {each["class"]: each["probability"] for each in row["classes"]} == pytest.approx(probabilities, abs=1e-4)
    images = np.stack([image for image, _ in shown.examples])
    normalised = (torch.tensor(images) / 255 - torch.tensor(checkpoint.recipe.mean)) / torch.tensor(checkpoint.recipe.std)
    expected = analysis.grad_cam(checkpoint.model(), normalised.permute(0, 3, 1, 2), torch.full((10,), 7), "layer1")
    np.testing.assert_allclose(shown.grad_cam(images, ["7"] * 10, "layer1"), expected, atol=1e-3)


def test_the_mistakes_are_those_of_the_run_in_order(shown, tiny_run):
    evaluation = load(load_checkpoint(tiny_run).recipe).evaluation
    found = shown.mistakes("surest first", None, None)
    wrong = round(40 * (1 - load_checkpoint(tiny_run).history[-1]["test_accuracy"] / 100))
    assert len(found) == wrong
    assert [each.confidence for each in found] == sorted((each.confidence for each in found), reverse=True)
    places = [int(re.sub(r"\D", "", each.name)) for each in found]
    for place, each in zip(places, found, strict=True):
        (position,) = np.flatnonzero(evaluation.indices == place)
        assert str(evaluation.labels[position]) == each.true != each.predicted
        np.testing.assert_array_equal(evaluation.images[position], each.image)
    assert sorted(each.name for each in shown.mistakes("random", None, None)) == sorted(each.name for each in found)
    assert {each.true for each in shown.mistakes("random", found[0].true, None)} == {found[0].true}
    assert {each.predicted for each in shown.mistakes("by class", None, found[0].predicted)} == {found[0].predicted}


def test_labels_that_may_be_wrong_are_shown_in_the_order_of_misclassified(shown, tiny_run, tmp_path, no_figures):
    expected = misclassified(tiny_run, tmp_path, sort="label")
    found = shown.mistakes("label may be wrong", None, None)
    assert [each.name for each in found] == [each.caption for each in expected]
    said = re.sub("<[^>]*>", "", page.mistake_cards(found[:1], None))
    assert said == f"labelled {expected[0].true}perhaps mislabelled: {expected[0].predicted}?{expected[0].caption}"


def test_the_run_is_told_of_with_n_and_command(shown, tiny_run):
    html = shown.run()
    last = load_checkpoint(tiny_run).history[-1]["test_accuracy"]
    assert f'<p class="headline">{last:.2f} %</p>' in html
    assert "n = 1 run, seed 0" in html
    assert "cifar-resnet train --recipe default --dataset digits" in html
    assert html.count("data:image/svg+xml") == 3


def test_the_command_shown_is_of_the_run_where_bfloat16_is_emulated(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run")
    found = content(tmp_path / "run")
    found["recipe"]["precision"] = "bfloat16"
    torch.save(found, tmp_path / "run" / "checkpoint.pt")
    monkeypatch.setattr(
        "cifar_resnet.jobs.common.without_emulation", lambda recipe, device: recipe.replace(precision="float32")
    )
    html = content_of_page(tmp_path / "run", None, "cpu").run()
    assert "--precision bfloat16" in html
    assert "float32" not in html


def test_an_image_of_12_bits_is_read_by_the_white_of_training(tiny_run, tmp_path):
    """The image alone would say that 255 is white."""
    shutil.copytree(tiny_run, tmp_path / "run")
    torch.save(content(tmp_path / "run") | {"whites": {"uint16": 4095}}, tmp_path / "run" / "checkpoint.pt")
    Image.fromarray(np.full((40, 40), 255, np.uint16)).save(tmp_path / "dark.png")
    assert content_of_page(tmp_path / "run", None, "cpu").read(str(tmp_path / "dark.png")).max() == 255 * 255 // 4095


def test_a_picture_is_handed_on_as_it_is_and_an_upload_is_removed(shown, photo):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    _, pixels, message = page.receive(shown, {}, page.data_url(image))
    assert (pixels, message) == (image.tobytes(), "")
    picture, pixels, message = page.receive(shown, {}, str(photo))
    assert picture.startswith("data:image/png;base64,")
    assert (len(pixels), message) == (3072, "")
    assert not photo.exists()
    assert page.receive(shown, {}, None) == (None, None, "")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_picture_of_more_than_8_bits_is_shown_as_the_network_sees_it(shown, tmp_path, dtype):
    """Pillow alone would show one of 16 bits white, and one of floating-point numbers black."""
    top = 65535 if dtype == np.uint16 else 1
    Image.fromarray((np.linspace(0, top, 1600).reshape(40, 40)).astype(dtype)).save(tmp_path / "deep.tif")
    expected = shown.read(str(tmp_path / "deep.tif"))
    picture, pixels, message = page.receive(shown, {}, str(tmp_path / "deep.tif"))
    assert (pixels, message) == (expected.tobytes(), "")
    assert page.receive(shown, {}, picture)[1] == expected.tobytes()  # a click on it
    assert expected.max() - expected.min() > 200


def test_a_class_can_have_the_name_of_a_choice(shown):
    asked = []
    classes = ["any", "the most probable"]
    built = page.build(replace(shown, classes=classes, examples=[], mistakes=lambda *what: asked.append(what) or []))
    lists = {block.label: block.choices for block in built.blocks.values() if isinstance(block, page.gr.Dropdown)}
    for label, usual in (("True class", "any"), ("Taken for", "any"), ("Class to explain", "the most probable")):
        assert lists[label] == [(usual, ""), *((name, name) for name in classes)]
    show = next(each.fn for each in built.fns.values() if each.name == "run" and len(each.inputs) == 5)
    show(20, "surest first", "any", "", False)
    assert asked == [("surest first", "any", None)]


def test_what_a_checkpoint_holds_is_text_on_the_page():
    evil = "<script>${alert(1)}{{7}}</script>"
    image, heat = np.zeros((32, 32, 3), np.uint8), np.zeros((1, 32, 32))
    html = page.mistake_cards([page.Mistake(evil, evil, evil, 0.5, image)], (page.overlay(heat), page.overlay(heat)))
    assert html.count("&lt;script&gt;") == 3
    assert "<script" not in html


def test_an_unfinished_run_says_so(unfinished):
    assert content_of_page(unfinished, None, "cpu").notice.startswith("The run stands at epoch 1 of 2")
    assert "as the run stands" in content_of_page(unfinished, None, "cpu").run()


def test_without_the_images_a_checkpoint_still_predicts(tiny_run, monkeypatch):
    def missing(*_):
        raise DataError("CIFAR-10 is not in /x")

    monkeypatch.setattr("cifar_resnet.data.datasets.load", missing)
    shown = content_of_page(tiny_run, None, "cpu")
    assert "no examples to show: CIFAR-10 is not in /x" in shown.notice
    assert shown.probabilities(np.zeros((1, 32, 32, 3), np.uint8), False).sum() == pytest.approx(1)
    with pytest.raises(page.Problem, match="no mistakes to show: CIFAR-10 is not in /x"):
        shown.mistakes("surest first", None, None)
    assert "cannot be shown: CIFAR-10 is not in /x" in shown.run()


def test_nothing_is_downloaded_for_a_page(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: pytest.fail("a download"))
    shutil.copytree(tiny_run, tmp_path / "run")
    found = content(tmp_path / "run")
    found["recipe"]["dataset"] = "cifar10"
    torch.save(found, tmp_path / "run" / "checkpoint.pt")
    assert f"CIFAR-10 is not in {tmp_path}" in content_of_page(tmp_path / "run", tmp_path, "cpu").notice


def test_a_page_reads_its_images_once(tiny_run, monkeypatch):
    from cifar_resnet.data import datasets

    calls, original = [], datasets.load
    monkeypatch.setattr(datasets, "load", lambda *given: calls.append(given) or original(*given))
    shown = content_of_page(tiny_run, None, "cpu")
    assert len(shown.examples) == 10
    assert shown.mistakes("label may be wrong", None, None)
    assert len(calls) == 1


def test_mistakes_are_found_once_and_before_somebody_asks_unless_the_demo_ends(tiny_run, tmp_path, monkeypatch):
    calls, original = [], demo_module.logits_of
    monkeypatch.setattr(demo_module, "logits_of", lambda *given, **named: calls.append(given) or original(*given, **named))
    shown = demo_module._Shown(*opened(tiny_run, "cpu"), None)
    shown.look_ahead([signal.SIGINT])
    assert "_judged" not in vars(shown)
    shown.look_ahead([])
    assert len(calls) == 2
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda order: shown.mistakes(order, None, None), ["surest first", "by class"]))
    assert len(calls) == 2
    named = {mistake.index for mistake in misclassified(tiny_run, tmp_path)}
    assert [len(each) for each in found] == [len(named)] * 2

    two_at_once = demo_module._Shown(*opened(tiny_run, "cpu"), None)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: two_at_once.mistakes("random", None, None), range(2)))
    assert len(calls) == 3


def test_a_page_for_other_machines_says_that_it_has_no_password(tiny_run, monkeypatch):
    monkeypatch.setattr(page, "launch", lambda shown, **where: f"http://{where['server_name']}:{where['server_port']}/")
    monkeypatch.setattr("cifar_resnet.jobs.demo._wait_for_the_end", lambda shown: None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = {"0.0.0.0": [], "127.0.0.1": []}
    for host, lines in said.items():
        demo(tiny_run, host=host, port=port, notify=lines.append)
    assert [len(lines) for lines in said.values()] == [2, 1]
    assert f"no password; everyone who can reach port {port}" in said["0.0.0.0"][0]


def in_use(taken):
    """What the system says of an address that a socket has taken."""
    with pytest.raises(OSError, match="bind") as error:
        socket.create_server(taken.getsockname()[:2], family=taken.family)
    return error.value.strerror.split(" (")[0]


def test_an_address_of_ipv6_is_served(tiny_run, refused, monkeypatch):
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("there is no IPv6 here")
    with taken:
        port = taken.getsockname()[1]
        assert in_use(taken) in refused(1, "demo", tiny_run, "--host", "::1", "--port", port)
    told = []
    monkeypatch.setattr("cifar_resnet.jobs.demo._wait_for_the_end", lambda shown: told.append(urlopen(f"http://[::1]:{port}").status))
    demo(tiny_run, host="::1", port=port, notify=told.append)
    assert told == [f"the page is at http://[::1]:{port}/, until Ctrl-C", 200]


def test_what_cannot_be_served_is_one_line(refused, tiny_run, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(1, "demo", tiny_run, "--port", taken.getsockname()[1])
        assert f"--port {taken.getsockname()[1]}: {in_use(taken)}" in line
    assert "--port 70000 must be 1 to 65535" in refused(2, "demo", tiny_run, "--port", 70000)
    for host in ("ä..b", "l" * 70 + "ä", "a\0b"):
        assert "is no name of a host" in refused(2, "demo", tiny_run, "--host", host)
    assert "--host is empty" in refused(2, "demo", tiny_run, "--host", "")
    assert "no.such.host.invalid" in refused(1, "demo", tiny_run, "--host", "no.such.host.invalid")
    assert "there is no checkpoint" in refused(1, "demo", tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"another model's")
    assert "is not a checkpoint" in refused(1, "demo", tmp_path)
    monkeypatch.setitem(sys.modules, "cifar_resnet.look.page", None)
    monkeypatch.delattr("cifar_resnet.look.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(CifarResnetError, match=r'pip install "cifar-resnet\[demo\]"'):
        demo(tiny_run)
    assert Path(tmp_path).exists()
