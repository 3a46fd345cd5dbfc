"""Many pictures on one, captioned."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence

from PIL import Image

from sdcli.errors import SdcliWarning
from sdcli.pipeline.fonts import Lettering

MAX_TILE = 512  # px, of the longer side; larger pictures are scaled down
MIN_TILE = 160  # px, of the shorter side, for a seed to fit; smaller pictures are enlarged by a whole factor
MAX_SHEET_PIXELS = 64_000_000  # of all tiles: what keeps a sheet of ten thousand pictures in memory
MARGIN = 8  # px
FONT_SIZE = 13  # px
LINE = 18  # px
MAX_LINES = 3  # of a heading, or of a line of a caption
MAX_CAPTION = 1_000  # characters: far more than fit under a picture
MAX_TOLD = 12  # letters that no font has
PAPER, INK = (240, 240, 240), (40, 40, 40)  # a picture on white shows where it ends


def tile(image: Image.Image, count: int) -> Image.Image:
    """A picture at the size it has on a sheet of `count`: what is kept until the sheet is drawn."""
    most = min(MAX_TILE, math.isqrt(MAX_SHEET_PIXELS // max(1, count)))
    longer, shorter = max(image.size), min(image.size)
    if longer > most:
        size = (max(1, image.width * most // longer), max(1, image.height * most // longer))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, min(math.ceil(MIN_TILE / shorter), most // longer))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def contact_sheet(tiles: Sequence[Image.Image], captions: Sequence[str], heading: str = "") -> Image.Image:
    """Pictures in rows, each over its caption, under a heading; what is too long for its place ends in an ellipsis.

    tiles: at least one, as of `tile`; they may differ in size. captions: one each, of a line or several, which are
    wrapped.
    """
    captions = [caption[:MAX_CAPTION] for caption in captions]
    lettering = Lettering([heading, *captions], FONT_SIZE)
    if lettering.lost:
        told = "".join(lettering.lost[:MAX_TOLD]) + (" and others" if len(lettering.lost) > MAX_TOLD else "")
        what = f"the contact sheet leaves out {told}: no font of this machine has them; the Noto fonts have"
        warnings.warn(what, SdcliWarning, stacklevel=2)
    heading = lettering.readable(heading)
    width, height = max(one.width for one in tiles), max(one.height for one in tiles)
    lines_below = [
        [part for line in caption.split("\n") for part in _wrapped(lettering.readable(line), lettering, width) or [""]]
        for caption in captions
    ]
    below = LINE * max(map(len, lines_below))
    across = columns(len(tiles), width, height + below)
    total = MARGIN + across * (width + MARGIN)
    lines = _wrapped(heading, lettering, total - 2 * MARGIN)
    top = MARGIN + LINE * len(lines) + (MARGIN if lines else 0)
    rows = math.ceil(len(tiles) / across)
    sheet = Image.new("RGB", (total, top + rows * (height + below + MARGIN)), PAPER)
    for number, line in enumerate(lines):
        lettering.write(sheet, (MARGIN, MARGIN + number * LINE), line, INK)
    for number, (one, caption) in enumerate(zip(tiles, lines_below, strict=True)):
        left = MARGIN + number % across * (width + MARGIN)
        upper = top + number // across * (height + below + MARGIN)
        sheet.paste(one, (left + (width - one.width) // 2, upper + (height - one.height) // 2))
        for row, line in enumerate(caption):
            place = (left + (width - lettering.length(line)) / 2, upper + height + row * LINE + 3)
            lettering.write(sheet, place, line, INK)
    return sheet


def columns(count: int, width: int, height: int) -> int:
    """How many of `count` tiles of width x height px stand in a row: about square, with few places empty at the end."""
    across = min(count, max(1, math.ceil(math.sqrt(count * height / width))))
    candidates = range(across, min(count, across + 1) + 1)
    return min(candidates, key=lambda n: (-count % n, n))


def _wrapped(text: str, lettering: Lettering, width: int) -> list[str]:
    """Lines of words that fit; the last of too many is cut."""
    lines: list[str] = []
    words = text.split()
    while words:
        taken = 1
        while taken < len(words) and lettering.length(" ".join(words[: taken + 1])) <= width:
            taken += 1
        is_last = len(lines) + 1 == MAX_LINES
        lines.append(_shortened(" ".join(words[:200] if is_last else words[:taken]), lettering, width))
        words = [] if is_last else words[taken:]
    return lines


def _shortened(line: str, lettering: Lettering, width: int) -> str:
    line = line[:width]  # no letter is narrower than a pixel
    if lettering.length(line) <= width:
        return line
    fitting = bisect_left(range(len(line)), True, key=lambda end: lettering.length(line[:end] + "...") > width)
    return line[: max(0, fitting - 1)] + "..."
