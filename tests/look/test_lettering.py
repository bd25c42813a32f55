import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure

from cifar_resnet.look import lettering


def test_a_long_name_loses_its_middle():
    assert lettering.name("a" * 24) == "a" * 24
    assert lettering.name("a" * 40 + "b" * 40) == "a" * 12 + "…" + "b" * 11
    assert lettering.name("猫" * 12) == "猫" * 12
    assert lettering.name("猫" * 13) == "猫" * 6 + "…" + "猫" * 5
    assert lettering.name("$5") == r"\$5"
    assert lettering.title("5 of " + "c" * 90) == "5 of " + "c" * 20 + "…" + "c" * 19


@pytest.fixture
def font_of(tmp_path, monkeypatch):
    """Makes the one font of this machine, which has these letters."""

    def make(letters):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0)), pen.lineTo((0, 500)), pen.lineTo((500, 0)), pen.closePath()
        glyphs = {".notdef": TTGlyphPen(None).glyph(), **{f"g{ord(each)}": pen.glyph() for each in letters}}
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder(list(glyphs))
        font.setupCharacterMap({ord(each): f"g{ord(each)}" for each in letters})
        font.setupGlyf(glyphs)
        font.setupHorizontalMetrics({name: (600, 0) for name in glyphs})
        font.setupHorizontalHeader(ascent=800, descent=-200)
        font.setupNameTable(dict(familyName="Only These", styleName="Regular"))
        font.setupOS2()
        font.setupPost()
        font.save(tmp_path / "only.ttf")
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "only.ttf")])
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
        lettering._fonts_with.cache_clear()
        lettering._warned.clear()

    yield make
    lettering._fonts_with.cache_clear()


def figure_of(*names):
    figure = Figure()
    figure.subplots().set_yticks(range(len(names)), names)
    return figure


def test_a_font_that_has_the_letters_is_used(font_of):
    font_of("猫狗")
    figure = figure_of("猫", "dog")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lettering.choose_fonts(figure)
    (axis,) = figure.axes
    assert axis.get_yticklabels()[0].get_fontfamily() == ["DejaVu Sans", "Only These"]


def test_letters_that_no_font_has_are_named_once(font_of):
    font_of("狗")
    with pytest.warns(UserWarning, match="no font on this machine has 猫: "):
        lettering.choose_fonts(figure_of("猫", "狗"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lettering.choose_fonts(figure_of("猫"))
