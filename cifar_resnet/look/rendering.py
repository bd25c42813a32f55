"""How a Matplotlib figure becomes a file, in which style and colours."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from . import lettering

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
DPI = 220
STYLING = threading.RLock()  # of Matplotlib's settings, which all threads share


@contextmanager
def page_style() -> Iterator[None]:
    """Matplotlib's own style, whatever a notebook has chosen; in an svg letters stay text."""
    with STYLING, matplotlib.style.context(["default", {"svg.fonttype": "none"}]):
        yield


def render(figure: Figure, format: str = "png") -> bytes:
    """The figure as a file of this format: png in 256 colours, svg or pdf."""
    lettering.choose_fonts(figure)
    buffer = io.BytesIO()
    with STYLING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # which choose_fonts has said
        if format == "png":
            return _in_few_colours(_drawn(figure))
        figure.savefig(buffer, format=format, dpi=DPI)
    written = buffer.getvalue()
    return re.sub(rb'<g id="hover: ([^"]*)">', rb"<g><title>\1</title>", written) if format == "svg" else written


def _drawn(figure: Figure) -> Image.Image:
    """The figure in pixels. savefig gives the same pixels, but lays the figure out twice."""
    before = figure.dpi, figure.canvas
    try:
        figure.dpi, canvas = DPI, FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    finally:
        figure.dpi, figure.canvas = before


def _in_few_colours(picture: Image.Image) -> bytes:
    """The picture as a PNG in 256 colours, of which those of lines and letters are exact: a quarter of the size."""
    exact = np.array([to_rgb(colour) for colour in ("white", "black", *COLOURS)]) * 255
    some = picture.resize((-(-picture.width // 3), -(-picture.height // 3)), Image.Resampling.NEAREST)  # enough to find colours
    found: np.ndarray = np.reshape(some.quantize(256 - len(exact)).getpalette() or [], (-1, 3))
    far = np.abs(found[:, None] - exact).max(2).min(1) > 8  # Pillow does not tell neighbours apart
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([exact.round(), found[far]]).astype(np.uint8).ravel().tolist())
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def hover(artist: Artist, text: str) -> None:
    """What an svg shows where the mouse rests on the artist."""
    artist.set_gid(f"hover: {text}")
