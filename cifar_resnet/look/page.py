"""The page in the browser: Predict, Mistakes, Run. It takes what it shows as functions, and knows no run and no network.

An exported Space holds a copy of this file, so it imports nothing of the package. Nothing is fetched from elsewhere and
nothing is sent. An upload is removed from the disk as soon as it is read; all pictures of the page are inside it.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which Gradio reads when it is imported
import gradio as gr  # noqa: E402
from gradio.data_classes import Base64ImageData, ImageData  # noqa: E402
from gradio.utils import is_in_or_equal  # noqa: E402

MEGAPIXELS, MEGABYTES = 50, 50  # more of an upload is refused: one such image takes 600 MB of memory
LAYERS = ("prep", "layer1", "layer2", "layer3")
INFERNO = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # Matplotlib's, in five steps
MOST_PROBABLE, ANY = ("the most probable", ""), ("any", "")  # what a list shows, and its value, which no class can have


class Mistake(NamedTuple):
    """An image, uint8 (32, 32, 3), that is taken for another class; `name` says which one it is."""

    name: str
    true: str
    predicted: str
    confidence: float
    image: np.ndarray
    doubted: bool = False  # shown for its label, which may be wrong


@dataclass(frozen=True)
class Content:
    """What the page shows. Images are uint8 (N, 32, 32, 3). A `Problem` that `mistakes` or `run` raises is shown."""

    title: str
    notice: str
    classes: Sequence[str]
    examples: Sequence[tuple[np.ndarray, str]]  # an image of each class, and the class
    augmented: bool  # whether test-time augmentation is offered
    orders: Sequence[str]
    read: Callable[[str], np.ndarray]  # an image file as the network sees it, uint8 (32, 32, 3)
    probabilities: Callable[[np.ndarray, bool], np.ndarray]  # of images, with test-time augmentation or not: (N, classes)
    grad_cam: Callable[[np.ndarray, Sequence[str], str], np.ndarray]  # of images, classes and a layer: (N, 32, 32) in 0 to 1
    mistakes: Callable[[str, str | None, str | None], Sequence[Mistake]]  # in an order, of a true and of a predicted class
    overlays: Callable[[Sequence[Mistake]], tuple[np.ndarray, np.ndarray]]  # of the class predicted, and of the true one
    run: Callable[[], str]  # HTML
    wait: str = ""  # what the tabs of mistakes and run show until they are filled


class Problem(Exception):
    """What the page says in the place of what it cannot show."""


def problem(error: object) -> str:
    return f'<p class="problem" role="alert">{escape(str(error))}</p>'


def data_url(image: Image.Image | np.ndarray) -> str:
    """A picture as text that stands in the page itself."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def overlay(heat: np.ndarray) -> np.ndarray:
    """Grad-CAM maps, (..., H, W) in 0 to 1, in colours that let the image below shine through: uint8 (..., H, W, 4)."""
    steps = np.linspace(0, 1, len(INFERNO))
    colours = [np.interp(heat, steps, channel) for channel in zip(*INFERNO, strict=True)]
    return np.stack([*colours, 255 * (0.4 + 0.6 * heat)], axis=-1).round().astype(np.uint8)


def tile(image: np.ndarray, overlay: np.ndarray | None = None) -> str:
    """An image, under an overlay if one is given, whose opacity is the page's."""
    over = "" if overlay is None else f'<img class="heat" alt="Grad-CAM" src="{data_url(overlay)}">'
    return f'<span class="tile"><img class="plain" alt="" src="{data_url(image)}">{over}</span>'


def card(tiles: str, caption: str) -> str:
    return f'<button class="card"><span class="tiles">{tiles}</span><span class="caption">{caption}</span></button>'


def mistake_cards(shown: Sequence[Mistake], overlays: tuple[np.ndarray, np.ndarray] | None) -> str:
    """One card a mistake; with Grad-CAM of the class predicted and of the true one beside the image if given."""
    cards = []
    for i, each in enumerate(shown):
        predicted, true = f'<b class="wrong">{escape(each.predicted)}', f'<b class="right">{escape(each.true)}</b>'
        names = f"{predicted} {100 * each.confidence:.1f} %</b><br>true: {true}"
        if each.doubted:
            names = f"labelled {true}<br>perhaps mislabelled: {predicted}?</b>"
        caption = f"{names}<br><small>{escape(each.name)}</small>"
        over = "" if overlays is None else "".join(tile(each.image, of_class[i]) for of_class in overlays)
        cards.append(card(tile(each.image) + over, caption))
    return f'<div class="cards{"" if overlays is None else " wide"}">{"".join(cards)}</div>'


def _upload() -> gr.Image:
    """Gradio's image, which hands on where its picture lies, undecoded, and shows pictures that lie in no file."""

    def preprocess(payload: ImageData | None) -> str | None:
        if payload is None:
            return None
        if payload.url and payload.url.startswith("data:"):
            return payload.url
        if not is_in_or_equal(payload.path or "", picture.GRADIO_CACHE):  # Gradio asks that only of what says it is a file
            raise gr.Error("This is no upload.", print_exception=False)
        return payload.path

    def postprocess(url: str | None) -> Base64ImageData | None:
        return Base64ImageData(url=url) if url else None

    picture = gr.Image(label="An image", sources=["upload", "clipboard", "webcam"], height=300)
    vars(picture).update(preprocess=preprocess, postprocess=postprocess)  # for a class Gradio would write a file beside this one
    return picture


Received = tuple[str | None, bytes | None, str]  # a picture to show, its 32x32 pixels, and what is wrong with it if anything
RECENT = 20


def receive(content: Content, recent: dict[str, Received], source: str | None) -> Received:
    """Takes an upload, and removes its file; or takes a picture of the page, from its address, which holds it whole.

    Gradio names a file by its bytes. So two who send the same image at once send one file: the second finds it in `recent`.
    """
    if source is None:
        return None, None, ""
    inside = source.startswith("data:")
    if source in recent and not os.path.exists(source):
        return recent[source]
    try:
        picture = _preview(io.BytesIO(base64.b64decode(source.partition(",")[2])) if inside else source)
        pixels = content.read(source) if picture is None or not inside else np.asarray(picture)[5::10, 5::10]
        picture = picture or Image.fromarray(pixels).resize((320, 320), Image.Resampling.NEAREST)
        received: Received = data_url(picture), pixels.tobytes(), ""
    except Problem as error:
        received = None, None, problem(error)
    except Exception:  # whatever a damaged file makes its decoder raise
        received = None, None, problem("This is no image that can be read. Take a PNG, JPEG or WebP file.")
    if not inside:
        with suppress(OSError):  # gone, or in Windows still read by Gradio, which removes the file later
            os.remove(source)
        recent[source] = received
        while len(recent) > RECENT:
            recent.pop(next(iter(recent)))
    return received


def turned(image: Image.Image) -> Image.Image:
    """The image turned as EXIF says, where EXIF can be read."""
    image.load()
    with suppress(Exception):
        image.getexif()  # which the image keeps
    for name in ("exif", "Raw profile type exif"):  # else Pillow writes it anew, and fails where any tag is odd
        image.info.pop(name, None)
    return ImageOps.exif_transpose(image)


def _preview(file: str | io.BytesIO) -> Image.Image | None:
    """The centred square of an image, RGB, 320 pixels wide; None for one of more than 8 bits, whose white is not known here."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(file)
        with image:
            if image.width * image.height > MEGAPIXELS * 1e6:
                raise Image.DecompressionBombError
            if image.mode[0] in "IF":
                return None
            image.draft("RGB", (640, 640))
            upright = turned(image).convert("RGBA")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Problem(f"This image is huge: at most {MEGAPIXELS} megapixels are taken. Make it smaller first.") from None
    square = ImageOps.fit(upright, (320, 320), Image.Resampling.NEAREST if min(upright.size) < 160 else Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")


# A click on a card hands on its picture; a touch of the slider changes all maps of the page at once.
CLICK = """element.addEventListener('click', event => {
  const card = event.target.closest('.card');
  if (card) trigger('click', {source: card.querySelector('img').src});
});"""
OPACITY = "value => { document.documentElement.style.setProperty('--heat', value / 100); }"

CSS = """
.gradio-container { width: 100%; max-width: 76rem !important; margin: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: 0.7rem; }
.cards.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.cards.small { grid-template-columns: repeat(5, 1fr); gap: 0.25rem; }
.card { display: block; padding: 0.3rem; border-radius: 8px; border: 1px solid var(--border-color-primary); text-align: left;
  background: var(--background-fill-secondary); color: var(--body-text-color); line-height: 1.3; cursor: pointer; min-width: 0; }
.card:hover, .card:focus-visible { border-color: var(--color-accent); }
.tiles { display: flex; gap: 3px; } .tile { position: relative; flex: 1; aspect-ratio: 1; display: block; }
.tile img { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 4px; }
.plain { image-rendering: pixelated; } .heat { opacity: var(--heat, 0.6); }
.caption { display: block; margin-top: 0.25rem; font-size: 0.82rem; overflow-wrap: anywhere; }
.small .card { padding: 0.12rem; } .small .caption { font-size: 0.55rem; font-weight: 400; text-align: center; }
.wrong { color: #d55e00; } .right { color: #0072b2; } .dark .wrong { color: #ff9448; } .dark .right { color: #6cb8ee; }
.problem, .notice { padding: 0.5rem 0.8rem; border-radius: 8px; border: 1px solid #d55e00; color: var(--body-text-color); }
.big { padding-top: 0.8rem !important; } .big .tile { max-width: 22rem; margin: auto; }
.headline { font-size: 3rem; font-weight: 700; line-height: 1.1; margin: 0; }
.run h2 { font-size: 1.1rem; margin: 1.5rem 0 0.5rem; } .run pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin-top: 1rem; }
.pictures img { width: 100%; border-radius: 6px; } .dark .pictures img { filter: invert(0.91) hue-rotate(180deg); }
.run table { width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; display: table; }
.run td, .run th { padding: 0.2rem 0.4rem !important; overflow-wrap: anywhere; }
.run .numbers td + td { white-space: nowrap; text-align: right; } .run .numbers th + th { text-align: right; overflow-wrap: normal; }
@media (max-width: 30rem) { .run table { font-size: 0.72rem; } .run td, .run th { padding: 0.2rem 0.25rem !important; } }
"""


def build(content: Content) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=content.title, analytics_enabled=False, delete_cache=(60, 60)) as page:
        gr.Markdown(f"# {escape(content.title)}")
        if content.notice:
            gr.HTML(f'<p class="notice" role="status">{escape(content.notice)}</p>')
        with gr.Tabs() as tabs:
            with gr.Tab("Predict", id="predict"):
                predict = _predict(content)
            with gr.Tab("Mistakes", id="mistakes") as tab:
                _mistakes(content, tab, tabs, predict)
            with gr.Tab("Run", id="run") as tab:
                shown = gr.HTML(_waiting(content), elem_classes="run")
                tab.select(_said(content.run), None, shown, concurrency_id="slow")
    return page


def _waiting(content: Content) -> str:
    return f"<p>{escape(content.wait)}</p>" if content.wait else ""


def launch(page: gr.Blocks, **where: Any) -> str:
    """Serves the page without waiting for its end, and gives its address."""
    direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1", "localhost")
    os.environ["no_proxy"] = ",".join(filter(None, direct))  # Gradio asks its own server whether it answers
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    quiet: dict[str, Any] = dict(quiet=True, share=False, run_history=False, enable_monitoring=False, footer_links=[])
    how: dict[str, Any] = dict(theme=theme, css=CSS, ssr_mode=False, max_file_size=MEGABYTES * 10**6, prevent_thread_lock=True)
    return page.launch(**how, **quiet, **where)[1]


def _said(function: Callable[..., str]) -> Callable[..., str]:
    """The function, whose problem becomes a message in its place."""

    def run(*values: Any) -> str:
        try:
            return function(*values)
        except Problem as error:
            return problem(error)

    return run


def _predict(content: Content) -> list[Any]:
    """The first tab; gives what `receive` fills."""
    seen = gr.State(None)
    with gr.Row():
        with gr.Column(min_width=320, scale=5):
            picture = _upload()
            message = gr.HTML()
            examples = "".join(card(tile(image), escape(name)) for image, name in content.examples)
            if examples:
                cards = gr.HTML(f'<p>or one of these:</p><div class="cards small">{examples}</div>', js_on_load=CLICK)
        with gr.Column(min_width=300, scale=4):
            bars = gr.Label(label="What the network sees in it", num_top_classes=10)
            top = gr.Slider(1, min(10, len(content.classes)), min(5, len(content.classes)), step=1, label="Classes shown")
            views = gr.Checkbox(
                label="Test-time augmentation", info="Mean over mirrored and shifted views", visible=content.augmented
            )
        with gr.Column(min_width=300, scale=4):
            cam = gr.HTML(label="Grad-CAM", show_label=True, container=True, elem_classes="big", min_height=120)
            explained = gr.Dropdown([MOST_PROBABLE, *content.classes], value="", label="Class to explain")
            layer = gr.Radio(LAYERS, value="layer2", label="Layer", info="32x32, 16x16, 8x8 and 4x4 places")
            opacity = gr.Slider(0, 100, 60, step=1, label="Opacity, percent")

    def answer(pixels: bytes | None, top: int, views: bool, explained: str, layer: str) -> tuple[dict[str, float] | None, str]:
        if pixels is None:
            return None, ""
        image = np.frombuffer(pixels, np.uint8).reshape(1, 32, 32, 3).copy()
        found = content.probabilities(image, views)[0]
        best = [(content.classes[i], float(found[i])) for i in np.argsort(-found, kind="stable")]
        name = explained or best[0][0]
        over = tile(image[0], overlay(content.grad_cam(image, [name], layer)[0]))
        return dict(best[: int(top)]), f'{over}<span class="caption">bright: where it saw <b>{escape(name)}</b></span>'

    settings: list[Any] = [seen, top, views, explained, layer]
    once: dict[str, Any] = dict(concurrency_id="quick", show_progress="hidden")
    gr.on([each.change for each in settings], answer, settings, [bars, cam], **once)
    shown: list[Any] = [picture, seen, message]
    picture.input(partial(receive, content, {}), picture, shown, concurrency_id="upload", api_name="receive")
    opacity.input(None, opacity, None, js=OPACITY)
    if examples:
        cards.click(_clicked(content), None, shown, **once)
    return shown


def _clicked(content: Content) -> Callable[[gr.EventData], Received]:
    """What takes the picture of a card that was clicked, which the page hands on as it is shown."""

    def take(event: gr.EventData) -> Received:
        return receive(content, {}, f"data:{str(event.source).partition('data:')[2]}")

    return take


def _mistakes(content: Content, tab: gr.Tab, tabs: gr.Tabs, predict: list[Any]) -> None:
    with gr.Row():
        count = gr.Slider(5, 100, 20, step=5, label="How many", min_width=200)
        order = gr.Dropdown(list(content.orders), value=content.orders[0], label="Order", min_width=160)
        true = gr.Dropdown([ANY, *content.classes], value="", label="True class", min_width=160)
        predicted = gr.Dropdown([ANY, *content.classes], value="", label="Taken for", min_width=160)
        with_cam = gr.Checkbox(value=True, label="Grad-CAM", info="of the class predicted and of the true one", min_width=160)
    cards = gr.HTML(_waiting(content), js_on_load=CLICK, min_height=200)

    @_said
    def show(count: int, order: str, true: str, predicted: str, with_cam: bool) -> str:
        found = content.mistakes(order, true or None, predicted or None)
        shown = found[: int(count)]
        if not shown:
            return "<p>There is no such mistake.</p>"
        overlays = content.overlays(shown) if with_cam else None
        which = f"{len(shown):,} of {len(found):,} mistakes, {order}" if len(found) > 1 else "One mistake"
        return f"<p>{which}. A click takes one to Predict.</p>{mistake_cards(shown, overlays)}"

    controls: list[Any] = [count, order, true, predicted, with_cam]
    gr.on([tab.select, *(each.change for each in controls)], show, controls, cards, concurrency_id="slow")
    cards.click(_clicked(content), None, predict, concurrency_id="upload", show_progress="hidden").then(
        lambda: gr.Tabs(selected="predict"), None, tabs
    )
