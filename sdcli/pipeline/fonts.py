"""Letters of any script: in Pillow's own font, matplotlib's DejaVu Sans or fonts of the system; emoji in colour."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

Font = ImageFont.FreeTypeFont

MAX_TEXT = 8_000  # characters that are looked at: more than a sheet has room for
MAX_FONTS = 40  # of the system, that are tried
MAX_FILES = 20_000  # that are looked through for them
NO_LETTER = "\U000fffff"  # Unicode promises that it never is one: what a font shows of it stands for all it lacks
VARIANTS = frozenset(map(chr, range(0xFE00, 0xFE10)))  # which of several looks a letter is to have
SUFFIXES = (".ttf", ".ttc", ".otf")
# How the files of fonts with many letters begin, as systems call them; the first ones are tried first.
KNOWN = (
    *("notosanscjk", "notosanssc", "notosansjp", "notosanskr", "notosanstc", "sourcehansans", "wqymicrohei"),
    *("wqyzenhei", "droidsansfallback", "pingfang", "hiragino", "applesdgothic", "msyh", "yugoth", "malgun", "simsun"),
    *("msgothic", "nanumgothic", "ipag", "takao", "vlgothic", "uming", "notosansarabic", "notosanshebrew"),
    *("notosansdevanagari", "notosansthai", "notosans", "arialuni", "notoemoji", "symbola", "seguisym", "seguiemj"),
    *("freesans", "unifont"),
)
# Fonts of emoji in colour, and the sizes in px that such fonts have: Noto's, and Apple's.
COLOURED, COLOURED_SIZES = ("notocoloremoji", "applecoloremoji"), (109, 160)
SOME_EMOJI = "\U0001f600"
FIRST_EMOJI = "\U0001f000"  # what lies before, hearts and stars, is drawn like the text around it
NOT_PLAIN = ("bold", "italic", "oblique", "black", "light", "thin", "condensed")
# Letters that take their form from their neighbours, or run from the right, which only the Raqm library sets.
SHAPED = (range(0x0590, 0x0900), range(0x0900, 0x0E00), range(0x1000, 0x10A0), range(0x1780, 0x1800))


class Lettering:
    """What draws some texts: emoji in colour where the system has them so, all else in one font that has all its
    letters, or each letter in the first font that has it."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        letters = {letter for text in texts for letter in _cleaned(text) if not _is_blank(letter)}
        self._size, self._fonts = size, list[Font]()
        self._colours = _colours() if any(letter >= FIRST_EMOJI for letter in letters) else None
        letters -= {letter for letter in letters if self._is_coloured(letter)}
        for font in _fonts(size):
            self._fonts.append(font)
            if all(_has(font, letter) for letter in letters):
                self._fonts = [font]
            if all(self._font_of(letter) is not None for letter in letters):
                break
        self.lost = sorted(letter for letter in letters if not self.readable(letter))

    def readable(self, text: str) -> str:
        """The text on one line; what no font has in its plain form if it has one (A of a wide A), else left out."""
        shown = []
        for letter in _cleaned(text):
            if _is_blank(letter) or self._is_coloured(letter) or self._font_of(letter) is not None:
                shown.append(letter)
                continue
            plain = "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
            if all(self._font_of(one) is not None for one in plain):
                shown.append(plain)
        return " ".join("".join(shown).split())

    def length(self, text: str) -> float:
        """How wide a text is, in px."""
        return sum(self._length(font, part) for font, part in self._runs(text))

    def write(self, image: Image.Image, place: tuple[float, float], text: str, fill: tuple[int, int, int]) -> None:
        """Draw a line of text; place: of its upper left corner, in px."""
        left, top = place
        base = top + _own(self._size).getmetrics()[0]
        draw = ImageDraw.Draw(image)
        for font, part in self._runs(text):
            if font is self._colours:
                self._write_emoji(image, (left, base), part)
            else:
                draw.text((left, base), part, fill=fill, font=font, anchor="ls")
            left += self._length(font, part)

    def _write_emoji(self, image: Image.Image, place: tuple[float, float], text: str) -> None:
        """Draw emoji in their font's one size and scale them. place: of the left end of the base line, in px."""
        assert self._colours is not None
        left, top, right, bottom = (round(side) for side in self._colours.getbbox(text, anchor="ls"))
        large = Image.new("RGBA", (max(1, right - left), max(1, bottom - top)))
        ImageDraw.Draw(large).text((-left, -top), text, font=self._colours, anchor="ls", embedded_color=True)
        share = self._size / self._colours.size
        size = (max(1, round(large.width * share)), max(1, round(large.height * share)))
        small = large.resize(size, Image.Resampling.LANCZOS)
        image.paste(small, (round(place[0] + left * share), round(place[1] + top * share)), small)

    def _length(self, font: Font, text: str) -> float:
        return font.getlength(text) * (self._size / font.size)

    def _is_coloured(self, letter: str) -> bool:
        return self._colours is not None and letter >= FIRST_EMOJI and _has(self._colours, letter)

    def _runs(self, text: str) -> Iterator[tuple[Font, str]]:
        """The text in parts of one font each."""
        if len(self._fonts) == 1 and self._colours is None:
            yield self._fonts[0], text
            return
        font = self._fonts[0]
        chosen = []
        for letter in text:
            if self._colours is not None and self._is_coloured(letter):
                font = self._colours
            elif letter.isspace():
                font = self._fonts[0] if font is self._colours else font
            elif not _is_blank(letter):
                font = self._font_of(letter) or self._fonts[0]
            chosen.append((font, letter))
        for _, pairs in groupby(chosen, key=lambda pair: id(pair[0])):
            some = list(pairs)
            yield some[0][0], "".join(letter for _, letter in some)

    def _font_of(self, letter: str) -> Font | None:
        return next((font for font in self._fonts if _has(font, letter)), None)


def _cleaned(text: str) -> str:
    """A text without what is not to be seen, letters and their accents joined."""
    kept = (c if c.isprintable() or unicodedata.category(c) == "Cf" else " " for c in text[:MAX_TEXT])
    whole = unicodedata.normalize("NFC", "".join(kept))
    return "".join(c for c in whole if c not in VARIANTS and (_is_set_by_raqm() or unicodedata.category(c) != "Cf"))


def _is_blank(letter: str) -> bool:
    """Whether a character needs no font: spaces, joiners."""
    return letter.isspace() or unicodedata.category(letter) == "Cf"


def _is_set_by_raqm() -> bool:
    return bool(features.check("raqm"))


@lru_cache(maxsize=1 << 14)
def _has(font: Font, letter: str) -> bool:
    """Whether a font has a letter and it can be set here."""
    if any(ord(letter) in some for some in SHAPED) and not _is_set_by_raqm():
        return False
    return _shape(font, letter) != _shape(font, NO_LETTER)


def _shape(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _own(size: int) -> Font:
    font = ImageFont.load_default(size)
    assert isinstance(font, Font)  # the other is for Pillows without FreeType, which take no size
    return font


@lru_cache(maxsize=1)
def _colours() -> Font | None:
    """The system's font of emoji in colour, in the one size that it has; None where it has none, or Pillow cannot."""
    for path in islice(_of_the_system(_folders(), COLOURED), MAX_FONTS):
        for size in COLOURED_SIZES:
            try:
                font = Font(str(path), size)
                if _has(font, SOME_EMOJI):
                    return font
            except OSError:  # no font, not of this size, or PNG within, which this FreeType does not read
                continue
    return None


def _fonts(size: int) -> Iterator[Font]:
    """Pillow's own font and, opened one after another as they are asked for, others."""
    yield _own(size)
    own = find_spec("matplotlib")
    shipped = Path(str(own.origin)).with_name("mpl-data") / "fonts" / "ttf" / "DejaVuSans.ttf" if own else None
    for path in ([shipped] if shipped is not None else []) + list(islice(_of_the_system(_folders()), MAX_FONTS)):
        try:
            yield Font(str(path), size)  # not by ImageFont.truetype, which looks for another file of the name
        except OSError:
            continue


def _folders() -> list[Path]:
    """Where fonts lie, by the conventions of the systems."""
    home = Path.home()
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return [data / "fonts", home / ".fonts", Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]


def _of_the_system(folders: Iterable[Path], names: Sequence[str] = KNOWN) -> Iterator[Path]:
    """Fonts of these names, the first ones first."""
    found: list[tuple[int, str, Path]] = []
    files = (Path(place) / name for folder in folders for place, _, names in os.walk(folder) for name in sorted(names))
    for path in islice(files, MAX_FILES):
        name = "".join(c for c in path.stem.lower() if c.isalnum())
        rank = next((number for number, known in enumerate(names) if name.startswith(known)), None)
        if rank is not None and path.suffix.lower() in SUFFIXES and not any(word in name for word in NOT_PLAIN):
            found.append((rank, name, path))
    return (path for _, _, path in sorted(found))
