"""Many pictures on one, captioned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MAX_TILE = 512  # px, of the longer side; larger pictures are scaled down
MIN_TILE = 160  # px, of the shorter side, for a seed to fit; smaller pictures are enlarged by a whole factor
MAX_SHEET_PIXELS = 64_000_000  # of all tiles: what keeps a sheet of ten thousand pictures in memory
MARGIN = 8  # px
FONT_SIZE = 13  # px, of Pillow's own font
LINE = 18  # px
MAX_HEADING_LINES = 3
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

    tiles: at least one, as of `tile`; they may differ in size. captions: one each, a line or several.
    """
    font = ImageFont.load_default(FONT_SIZE)
    width, height = max(one.width for one in tiles), max(one.height for one in tiles)
    below = LINE * max(caption.count("\n") + 1 for caption in captions)
    across = columns(len(tiles), width, height + below)
    total = MARGIN + across * (width + MARGIN)
    lines = _wrapped(heading, font, total - 2 * MARGIN)
    top = MARGIN + LINE * len(lines) + (MARGIN if lines else 0)
    rows = math.ceil(len(tiles) / across)
    sheet = Image.new("RGB", (total, top + rows * (height + below + MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * LINE), line, fill=INK, font=font)
    for number, (one, caption) in enumerate(zip(tiles, captions, strict=True)):
        left = MARGIN + number % across * (width + MARGIN)
        upper = top + number // across * (height + below + MARGIN)
        sheet.paste(one, (left + (width - one.width) // 2, upper + (height - one.height) // 2))
        for row, line in enumerate(caption.split("\n")):
            place = (left + width // 2, upper + height + row * LINE + 3)
            draw.text(place, _shortened(line, font, width), fill=INK, font=font, anchor="ma")
    return sheet


def columns(count: int, width: int, height: int) -> int:
    """How many of `count` tiles of width x height px stand in a row: about square, with few places empty at the end."""
    across = min(count, max(1, math.ceil(math.sqrt(count * height / width))))
    candidates = range(across, min(count, across + 1) + 1)
    return min(candidates, key=lambda n: (-count % n, n))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of words that fit; the last of too many is cut."""
    lines: list[str] = []
    words = text.split()
    while words:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        is_last = len(lines) + 1 == MAX_HEADING_LINES
        lines.append(_shortened(" ".join(words[:200] if is_last else words[:taken]), font, width))
        words = [] if is_last else words[taken:]
    return lines


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    line = "".join(c if c.isprintable() else " " for c in line[:width])  # no letter is narrower than a pixel
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
