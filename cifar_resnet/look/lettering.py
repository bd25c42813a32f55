"""Names in pictures: read as text and not as formulas, cut where they are long, in a font that has their letters."""

from __future__ import annotations

import warnings
from functools import cache
from typing import cast

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from rich.cells import cell_len, set_cell_size

DEFAULT = "DejaVu Sans"  # Matplotlib's own
MOST = 24  # columns of a name in a picture


def name(text: str, most: int = MOST) -> str:
    """A name as Matplotlib is to draw it; one wider than `most` columns loses its middle. Chinese letters take two columns."""
    if cell_len(text) > most:
        first, last = set_cell_size(text, most // 2), set_cell_size(text[::-1], most - most // 2 - 1)[::-1]
        text = f"{first.rstrip()}…{last.lstrip()}"
    return text.replace("$", r"\$")


def title(text: str) -> str:
    """A title as Matplotlib is to draw it, with its long words cut."""
    return " ".join(name(word, 40) for word in text.split(" "))


def choose_fonts(figure: Figure) -> None:
    """Gives the texts of a figure fonts of this machine that have their letters; warns of letters that none has, once each."""
    for axis in figure.axes:
        axis.get_xticklabels(), axis.get_yticklabels()  # which makes them
    texts = cast(list[Text], figure.findobj(Text))
    letters = {letter for text in texts for letter in text.get_text() if not letter.isspace()}
    missing = letters - _letters(font_manager.findfont(DEFAULT))
    if missing:
        families, without = _fonts_with(frozenset(missing))
        for text in texts:
            text.set_fontfamily([DEFAULT, *families])
        _warn(without)


@cache
def _letters(font: str) -> frozenset[str]:
    """The letters of a font's file; none of one that cannot be read or scaled."""
    try:
        face = FT2Font(font)
        return frozenset(map(chr, face.get_charmap())) if face.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _fonts_with(wanted: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """The names of the fewest fonts found here that have these letters, and the letters that no font has."""
    files, names = sorted(font_manager.findSystemFonts()), []
    while wanted and files:
        best = max(files, key=lambda file: len(_letters(file) & wanted))
        if not _letters(best) & wanted:
            break
        font_manager.fontManager.addfont(best)
        names.append(font_manager.FontProperties(fname=best).get_name())
        wanted -= _letters(best)
    return names, wanted


_warned: set[str] = set()


def _warn(without: frozenset[str]) -> None:
    if new := sorted(without - _warned):
        _warned.update(new)
        letters = "".join(new[:20]) + ("…" if len(new) > 20 else "")
        advice = "pictures show boxes instead; install a font that does"
        warnings.warn(f"no font on this machine has {letters}: {advice}", stacklevel=4)
