"""The gallery of a folder of pictures: one HTML file with a thumbnail and the settings of each, and a filter."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sdcli.files import atomic_write
from sdcli.pages.charts import number
from sdcli.pages.page import EMBEDDED, Picture, Setting, as_text, as_title, picture, render
from sdcli.plan.naming import GALLERY

MAX_PICTURES = 10_000
# Of a whole page, shared out evenly among its pictures; with links and frame a page has at most 64 MB.
MAX_THUMBNAIL_BYTES = 32_000_000
MAX_TEXT_BYTES = 16_000_000
MOST_TEXT_BYTES = 6_000  # of one picture, however few there are
MAX_SETTINGS = 40  # of one picture
SETTING_BYTES = 64  # of HTML around it
MAX_ALT, MAX_NAME = 300, 60  # characters
LARGEST_SIDE = 320  # px, of a thumbnail
PIXELS_A_BYTE = 3  # of a WebP file in base64, about
MAX_CHOICES = 40  # values of a setting that can be chosen among
MAX_CHOICE = 80  # characters of one
# A page that was opened as a file takes pictures from files, one that was served from its server.
IMAGES = f"{EMBEDDED} 'self' file:"

FIRST = ("negative", "seed", "id", "size", "scheduler", "steps", "guidance", "model")  # of the settings; others follow
NO_SETTINGS = frozenset(
    {"prompt", "path", "key", "job", "width", "height", "model_hash", "tokens", "negative_tokens", "sdcli"}
)
NO_SETTINGS |= {"unknown_words", "negative_unknown_words"}
NO_SETTINGS |= {"model_revision", "evaluations", "seconds", "adopted", "skipped"}
NO_CHOICE = frozenset({"Negative", "Seed", "ID"})

Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Made:
    """What a record says of a picture, cut to what a page may have room for."""

    name: str  # of the file
    title: str
    settings: dict[str, str]


@dataclass(frozen=True)
class Card:
    """One picture of the page: its link, what it shows, and the settings in which it is not like all others."""

    link: str
    title: str
    picture: Picture
    settings: list[Setting]

    @property
    def alt(self) -> str:
        """What is told in place of the picture."""
        return self.title[:MAX_ALT]


@dataclass(frozen=True)
class Choice:
    """A setting that pictures can be chosen by."""

    name: str
    values: list[str]


def write_gallery(folder: Path, records: Iterable[Record], left_out: int = 0) -> Iterator[int]:
    """Write `gallery.html` into a folder, yielding how many thumbnails are made.

    records: of the pictures in the order in which they are shown, at most MAX_PICTURES; `path` is a name in the folder.
    left_out: how many more there would be. The same pictures and records give the same bytes.
    Raises OutputError when the page cannot be written.
    """
    made = [_made(record) for record in records]
    common = _common([one.settings for one in made])
    room = MAX_THUMBNAIL_BYTES // max(1, len(made))
    side = min(LARGEST_SIDE, math.isqrt(PIXELS_A_BYTE * room))
    most = min(MOST_TEXT_BYTES, MAX_TEXT_BYTES // max(1, len(made)))
    cards = []
    for one in made:
        thumbnail = picture(folder / one.name, folder, side, room)
        cards.append(_card(one, common, thumbnail, most))
        yield len(cards)
    page = render(
        "gallery",
        images=IMAGES,
        number=number,
        heading=folder.resolve().name,
        cards=cards,
        left_out=left_out,
        common=[Setting(name, value) for name, value in common.items()],
        choices=list(_choices([one.settings for one in made])),
    )
    with atomic_write(folder / GALLERY) as part, part.open("wb") as stream:
        stream.writelines(page)


def _made(record: Record) -> _Made:
    """A record by the names that a page has for what it says."""
    values = dict(record)
    if "width" in record and "height" in record:
        values["size"] = f"{_said(record['width'])} × {_said(record['height'])}"
    names = [*(name for name in FIRST if name in values), *(name for name in values if name not in FIRST)]
    told = [name for name in names if name not in NO_SETTINGS and values[name] != ""][:MAX_SETTINGS]
    title = _cut(_said(record.get("prompt") or record.get("class") or record["path"]), MOST_TEXT_BYTES // 2)
    settings = _fitting(((as_title(name[:MAX_NAME]), _said(values[name])) for name in told), MOST_TEXT_BYTES // 2)
    return _Made(record["path"], title, settings)


def _fitting(settings: Iterable[tuple[str, str]], room: int) -> dict[str, str]:
    """The first settings, and as much of the last one, that take at most `room` bytes on a page."""
    kept: dict[str, str] = {}
    for name, value in settings:
        room -= SETTING_BYTES + _size(name)
        if room <= 0:
            break
        kept[name] = _cut(value, room)
        room -= _size(kept[name])
    return kept


def _said(value: object) -> str:
    """A value of a record in words; of a class, a file or an embedding its name."""
    if isinstance(value, Mapping) and "scale" in value:  # of a LoRA
        return f"{as_text(value.get('file', ''))}:{_said(value['scale'])}"
    if isinstance(value, Mapping):
        return next((as_text(value[key]) for key in ("name", "token", "file") if key in value), as_text(value))
    if isinstance(value, list):
        return ", ".join(_said(one) if isinstance(one, Mapping) else as_text(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else as_text(value)


def _common(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The settings that are the same in all of several pictures."""
    if len(settings) < 2:
        return {}
    first, *others = settings
    return {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}


def _choices(settings: Sequence[Mapping[str, str]]) -> Iterator[Choice]:
    """The settings of which pictures have several values, yet few enough to choose among."""
    values: dict[str, set[str]] = {}
    for one in settings:
        for name, value in one.items():
            values.setdefault(name, set()).add(value)
    for name, found in values.items():
        if name not in NO_CHOICE and 2 <= len(found) <= MAX_CHOICES and max(map(len, found)) <= MAX_CHOICE:
            yield Choice(name, sorted(found, key=_by_number))


def _by_number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _card(made: _Made, common: Mapping[str, str], thumbnail: Picture, most: int) -> Card:
    """One picture of the page; its texts take at most `most` bytes there."""
    title = _cut(made.title, most // 3)
    own = ((name, value) for name, value in made.settings.items() if name not in common)
    rows = _fitting(own, most - _size(title) - _size(title[:MAX_ALT]))
    settings = [Setting(name, value) for name, value in rows.items()]
    return Card(f"./{quote(os.fsencode(made.name))}", title, thumbnail, settings)


def _cut(text: str, room: int) -> str:
    """As much of a text as takes `room` bytes in HTML."""
    if len(text) <= room and _size(text) <= room:
        return text
    room -= _size("…")
    for place, letter in enumerate(text):
        room -= _size(letter)
        if room < 0:
            return f"{text[:place]}…"
    return text


def _size(text: str) -> int:
    """How many bytes a text takes in HTML."""
    return len(html.escape(text).encode(errors="replace"))
