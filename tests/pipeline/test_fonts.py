"""Letters of any script are drawn, or known to be lost."""

from __future__ import annotations

import io
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib.tables.DefaultTable import DefaultTable
from PIL import Image, ImageDraw, ImageFont, features

from sdcli.errors import SdcliWarning
from sdcli.pipeline import fonts
from sdcli.pipeline.fonts import Lettering
from sdcli.pipeline.sheets import contact_sheet

SIZE = 13


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder in which fonts of the system are looked for."""
    monkeypatch.setattr(fonts, "_folders", lambda: [tmp_path / "none", tmp_path])
    fonts._colours.cache_clear()
    return tmp_path


def write_font(path: Path, letters: str) -> None:
    """A font in which each of these letters is a triangle, and what it lacks a square."""
    names = [".notdef", *(f"u{ord(letter):X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    drawn = {}
    for name in names:
        pen = TTGlyphPen(None)
        corners = [(100, 0), (100, 800), (900, 800), (900, 0)] if name == ".notdef" else [(0, 0), (500, 800), (999, 0)]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
        drawn[name] = pen.glyph()
    builder.setupGlyf(drawn)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(path)


def write_colours(path: Path, colours: dict[str, tuple[int, int, int]]) -> None:
    """A font of one size, 109 px, in which each of these letters is a picture: a square of its colour, 136 x 128 px.

    As Noto Color Emoji is made: Google's CBDT and CBLC tables, small metrics and PNG (glyph format 17).
    """
    names = [".notdef", *(f"u{ord(letter):X}" for letter in colours)]
    builder = FontBuilder(2048, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(colours, names[1:], strict=True)})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (2550, 0)))
    builder.setupHorizontalHeader(ascent=1900, descent=-500)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=1900, usWinAscent=1900, usWinDescent=500)
    builder.setupPost()
    pictures, places = b"\0\3\0\0", [4]
    for colour in colours.values():
        png = io.BytesIO()
        Image.new("RGBA", (136, 128), (*colour, 255)).save(png, format="PNG")
        pictures += struct.pack(">BBbbBI", 128, 136, 0, 101, 136, len(png.getvalue())) + png.getvalue()
        places.append(len(pictures))
    line = struct.pack(">12b", 101, -27, -128, 0, 0, 0, 0, 0, 101, -27, 0, 0)
    index = struct.pack(">HHI", 1, len(names) - 1, 8) + struct.pack(">HHI", 1, 17, 0)
    index += b"".join(struct.pack(">I", place) for place in places)
    size = struct.pack(">IIII", 56, len(index), 1, 0) + line * 2
    size += struct.pack(">HHBBBb", 1, len(names) - 1, 109, 109, 32, 1)
    for tag, data in (("CBDT", pictures), ("CBLC", struct.pack(">HHI", 3, 0, 1) + size + index)):
        table = builder.font[tag] = DefaultTable(tag)
        table.data = data
    builder.save(path)


def drawn(text: str, lettering: Lettering | None = None) -> np.ndarray:
    image = Image.new("RGB", (300, 24), "white")
    (lettering or Lettering([text], SIZE)).write(image, (4, 2), text, (0, 0, 0))
    return np.asarray(image)


def has_letters_in_colour() -> bool:
    """Whether the FreeType of this Pillow reads pictures in fonts, which are PNG files."""
    with tempfile.TemporaryDirectory() as folder:
        write_colours(Path(folder) / "x.ttf", {"\U0001f436": (255, 0, 0)})
        try:
            return ImageFont.truetype(f"{folder}/x.ttf", 109).getmask("\U0001f436").size[1] == 128
        except OSError:
            return False


def test_plain_words_are_drawn_as_pillow_draws_them() -> None:
    image = Image.new("RGB", (300, 24), "white")
    ImageDraw.Draw(image).text((4, 2), "seed 7, (a dog)", fill=(0, 0, 0), font=ImageFont.load_default(SIZE))
    assert np.array_equal(drawn("seed 7, (a dog)"), np.asarray(image))


@pytest.mark.parametrize(
    "text", ["naïve café", "žluťoučký kůň", "привет", "Ελληνικά", "— → ★", "😀", "e\u0301 ☀\ufe0f"]
)
def test_letters_beyond_ascii_have_forms_of_their_own(text: str) -> None:
    lettering = Lettering([text], SIZE)
    assert lettering.lost == []
    forms = {drawn(letter).tobytes() for letter in lettering.readable(text) if not letter.isspace()}
    assert len(forms) == len(set(lettering.readable(text)) - {" "})


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow does not shape letters")
def test_arabic_is_shaped_and_lost_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    word = "\u0633\u0644\u0627\u0645"
    whole = Lettering([word], SIZE)
    assert whole.lost == [] and whole.length(word) < sum(whole.length(letter) for letter in word)
    monkeypatch.setattr(features, "check", lambda name: False)
    fonts._has.cache_clear()
    assert Lettering([word + " a"], SIZE).lost == sorted(word)
    fonts._has.cache_clear()


def test_what_no_font_has_is_left_out_or_plain_and_told_by_the_sheet() -> None:
    text = "a 小狗 \uff21 \U0001d4ea, please"
    lettering = Lettering([text], SIZE)
    assert (lettering.lost, lettering.readable(text)) == (["小", "狗"], "a A a, please")
    with pytest.warns(SdcliWarning, match="the contact sheet leaves out 小狗: no font of this machine has them"):
        contact_sheet([Image.new("RGB", (160, 160))], ["seed 7"], text)
    with pytest.warns(SdcliWarning, match="and others"):
        contact_sheet([Image.new("RGB", (160, 160))], ["seed 7"], "".join(map(chr, range(0x4E00, 0x4E40))))


def test_a_font_of_the_system_is_used_where_it_is_needed(folder: Path) -> None:
    (folder / "NotoSansCJK-Regular.ttc").write_bytes(b"no font")
    (folder / "sub").mkdir()
    write_font(folder / "sub" / "NotoSansSC-Regular.ttf", "小狗")
    lettering = Lettering(["a dog 小狗"], SIZE)
    assert lettering.lost == [] and lettering.readable("a dog 小狗") == "a dog 小狗"
    assert lettering.length("小狗") == 2 * SIZE
    both = drawn("a小", lettering)
    assert np.array_equal(both[:, :10], drawn("a", Lettering(["a"], SIZE))[:, :10])
    assert (both[:, 12:] < 128).any()


def test_a_font_that_has_all_letters_draws_them_all(folder: Path) -> None:
    write_font(folder / "unifont.otf", "小狗abc")
    assert Lettering(["abc 小狗"], SIZE).length("abc") == 3 * SIZE
    assert Lettering(["abc"], SIZE).length("abc") < 3 * SIZE


@pytest.mark.skipif(not has_letters_in_colour(), reason="this Pillow reads no letters in colour")
def test_emoji_are_drawn_in_colour_at_the_size_of_the_letters_where_there_is_a_font_of_them(folder: Path) -> None:
    text = "a 🐶 and 😀"
    assert Lettering([text], SIZE).lost == ["🐶"]
    fonts._colours.cache_clear()  # there was none
    write_colours(folder / "NotoColorEmoji.ttf", {"🐶": (255, 0, 0), "😀": (0, 0, 255)})
    lettering = Lettering([text], SIZE)
    assert lettering.lost == [] and lettering.readable(text) == text
    assert lettering.length("🐶") == pytest.approx(136 * SIZE / 109, abs=0.5)
    rows, columns = np.nonzero((drawn("🐶", lettering) == (255, 0, 0)).all(-1))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (pytest.approx(15, abs=1), pytest.approx(16, abs=1))
    whole = drawn(text, lettering)
    assert (whole == (0, 0, 255)).all(-1).sum() > 150  # in colour, too, though other fonts have it
    assert np.array_equal(whole[:, :10], drawn("a", Lettering(["a"], SIZE))[:, :10])


def test_an_emoji_font_that_cannot_be_read_is_none(folder: Path) -> None:
    (folder / "NotoColorEmoji.ttf").write_bytes(b"no font")
    assert Lettering(["🐶"], SIZE).lost == ["🐶"]


def test_known_fonts_come_first_and_bold_ones_never(folder: Path) -> None:
    names = (
        "unifont.ttf",
        "NotoSans-Regular.ttf",
        "NotoSansCJK-Regular.ttc",
        "NotoSansCJK-Bold.ttc",
        "Other.ttf",
        "msyh.txt",
    )
    for name in names:
        (folder / name).touch()
    assert [path.name for path in fonts._of_the_system([folder])] == [names[2], names[1], names[0]]
