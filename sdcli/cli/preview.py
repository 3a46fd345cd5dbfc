"""A picture as text that a terminal shows as one: kitty's, iTerm2's and sixel graphics, else half blocks in colour.

What a terminal can do is told by its environment alone: an answer of its own would have to be waited for, and would be
taken for input where none comes.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

USUAL_CELL = (8, 16)  # px, where the terminal does not tell
LEAST_SIDE = 256  # px; smaller pictures are enlarged by a whole factor
SPARE_ROWS = 2  # for the path below and the prompt of the shell
CHUNK = 4096  # characters of base64 in a command of kitty's
COLOURS = 128  # of a sixel picture
ESC = "\x1b"
HALF = "\u2580"  # upper half block: the colour of the text above that of the ground
CUBE = (0, 95, 135, 175, 215, 255)  # levels of the 6 x 6 x 6 colours from 16 on among 256
KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")
ITERM2_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")
SIXEL_TERMS = ("foot", "mlterm", "yaft", "contour")
KONSOLE_SINCE = 220400  # the version that has kitty's graphics


@dataclass(frozen=True)
class Screen:
    """A terminal: kitty, iterm2, sixel, or blocks of so many colours (1 << 24 or 256); its size in cells and px."""

    protocol: str
    columns: int
    rows: int
    cell: tuple[int, int] = USUAL_CELL
    colours: int = 256


def find_screen(environment: Mapping[str, str]) -> Screen | str:
    """The terminal on stderr, or why nothing can be shown on it."""
    if environment.get("NO_COLOR"):
        return "NO_COLOR is set"
    if environment.get("TERM", "") in ("", "dumb"):
        return "this terminal shows text alone"
    protocol = protocol_of(environment)
    if protocol == "blocks" and not (sys.stderr.encoding or "").lower().startswith("utf"):
        return "the locale of this terminal is not UTF-8"
    size = os.get_terminal_size(sys.stderr.fileno())
    is_true = environment.get("COLORTERM", "") in ("truecolor", "24bit") or environment["TERM"].endswith("-direct")
    columns, rows = (size.columns or 80), (size.lines or 24)
    return Screen(protocol, columns, rows, _cell(columns, rows), 1 << 24 if is_true else 256)


def protocol_of(environment: Mapping[str, str]) -> str:
    """What graphics a terminal has by what it says of itself; within tmux and screen, which keep them back, none."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or "STY" in environment or term.startswith(("tmux", "screen")):
        return "blocks"
    konsole = environment.get("KONSOLE_VERSION", "")
    is_konsole = konsole.isdigit() and int(konsole) >= KONSOLE_SINCE
    if "KITTY_WINDOW_ID" in environment or term in KITTY_TERMS or program == "ghostty" or is_konsole:
        return "kitty"
    if program in ITERM2_PROGRAMS or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "sixel" if term.startswith(SIXEL_TERMS) or "sixel" in term else "blocks"


def picture_text(source: Path | bytes, screen: Screen) -> str:
    """A picture file of ours, or its bytes, as what the terminal is to be sent, the end of the line included."""
    from PIL import Image  # deferred: 0.1 s that only a preview needs

    opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    with opened:
        image = opened.convert("RGB")
    return text_of(image, screen)


def text_of(image: Image.Image, screen: Screen) -> str:
    """The same of an image in RGB."""
    if screen.protocol == "blocks":
        return _blocks(image, screen)
    columns, rows = cells_of(image.size, screen)
    if screen.protocol == "sixel":
        width, height = columns * screen.cell[0], rows * screen.cell[1]
        return _sixel(_scaled(image, *_within(image.size, width, height)))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return _kitty(data, columns, rows) if screen.protocol == "kitty" else _iterm2(data, len(buffer.getvalue()), columns)


def cells_of(size: tuple[int, int], screen: Screen) -> tuple[int, int]:
    """Columns and rows for a picture of width x height px: of its own size or a whole multiple, if there is room."""
    factor = max(1, LEAST_SIDE // max(size))
    width, height = screen.cell
    room = (screen.columns * width, max(1, screen.rows - SPARE_ROWS) * height)
    shrink = min(1.0, room[0] / (size[0] * factor), room[1] / (size[1] * factor))
    columns = max(1, round(size[0] * factor * shrink / width))
    return columns, max(1, round(size[1] * factor * shrink / height))


def _kitty(data: str, columns: int, rows: int) -> str:
    """Transmit and display a PNG, quietly: no answer is read. Source: kitty's terminal graphics protocol."""
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    commands = []
    for number, chunk in enumerate(chunks):
        keys = f"a=T,f=100,q=2,c={columns},r={rows}," if number == 0 else ""
        commands.append(f"{ESC}_G{keys}m={int(number < len(chunks) - 1)};{chunk}{ESC}\\")
    return "".join(commands) + "\n"


def _iterm2(data: str, size: int, columns: int) -> str:
    """A file shown in the line. Source: iTerm2's inline images protocol."""
    return f"{ESC}]1337;File=inline=1;size={size};width={columns};preserveAspectRatio=1:{data}\a\n"


def _sixel(image: Image.Image) -> str:
    """Bands of six rows, each colour of a band in a line of its own. Source: DEC's VT330/VT340 manual, chapter 14."""
    import numpy as np  # deferred, as Pillow

    few = image.quantize(COLOURS)
    palette = few.getpalette() or []
    pixels = np.asarray(few)
    height, width = pixels.shape
    levels = [round(value * 100 / 255) for value in palette]  # in percent
    used = sorted({int(one) for one in np.unique(pixels)})
    colours = "".join(f"#{one};2;{levels[3 * one]};{levels[3 * one + 1]};{levels[3 * one + 2]}" for one in used)
    bands = [_band(pixels[top : top + 6]) for top in range(0, height, 6)]
    return f'{ESC}P0;1q"1;1;{width};{height}{colours}{"-".join(bands)}{ESC}\\\n'


def _band(rows: np.ndarray) -> str:
    """Up to six rows: for each colour a character a column, whose bits are the rows that have it, from the top."""
    import numpy as np

    bits = np.full((COLOURS, rows.shape[1]), 63, dtype=np.uint8)  # (colours, columns); 63 is `?`, no row
    for number, row in enumerate(rows):
        bits[row, np.arange(len(row))] += 1 << number
    lines = []
    for colour in np.unique(rows):
        line = bytes(bits[colour]).decode("ascii").rstrip("?")  # nothing behind the last that is set
        lines.append(f"#{colour}" + re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", line))
    return "$".join(lines)


def _blocks(image: Image.Image, screen: Screen) -> str:
    """Two pixels a cell, one above the other, enlarged by nothing; the last row of an odd number has no ground."""
    import numpy as np

    height = 2 * max(1, screen.rows - SPARE_ROWS)
    size = image.size if image.width <= screen.columns and image.height <= height else None
    pixels = np.asarray(_scaled(image, *(size or _within(image.size, screen.columns, height))))
    lines = []
    for top in range(0, len(pixels), 2):
        upper = [tuple(map(int, one)) for one in pixels[top]]
        lower = [tuple(map(int, one)) for one in pixels[top + 1]] if top + 1 < len(pixels) else [None] * len(upper)
        line, before = "", ("", "")
        for above, below in zip(upper, lower, strict=True):
            now = (_colour(above, 38, screen.colours), _colour(below, 48, screen.colours))
            changed = ";".join(one for one, old in zip(now, before, strict=True) if one != old)
            line += (f"{ESC}[{changed}m" if changed else "") + HALF
            before = now
        lines.append(f"{line}{ESC}[0m\n")
    return "".join(lines)


def _colour(rgb: tuple[int, ...] | None, ground: int, colours: int) -> str:
    """The SGR parameters of a colour, for text (38) or ground (48)."""
    if rgb is None:
        return "49"
    if colours > 256:
        return f"{ground};2;{rgb[0]};{rgb[1]};{rgb[2]}"
    return f"{ground};5;{_nearest(rgb)}"


def _nearest(rgb: tuple[int, ...]) -> int:
    """The number of the nearest of the 256 colours' cube and greys."""
    levels = [min(range(6), key=lambda i, v=value: abs(CUBE[i] - v)) for value in rgb]  # type: ignore[misc]
    grey = max(0, min(23, round((sum(rgb) / 3 - 8) / 10)))
    cube_apart = sum((CUBE[level] - value) ** 2 for level, value in zip(levels, rgb, strict=True))
    grey_apart = sum((8 + 10 * grey - value) ** 2 for value in rgb)
    if grey_apart < cube_apart:
        return 232 + grey
    return 16 + 36 * levels[0] + 6 * levels[1] + levels[2]


def _within(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The largest size of the same shape that fits."""
    scale = min(width / size[0], height / size[1])
    return max(1, math.floor(size[0] * scale)), max(1, math.floor(size[1] * scale))


def _scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import Image

    if image.size == (width, height):
        return image
    is_larger = width >= image.width and height >= image.height
    method = Image.Resampling.NEAREST if is_larger else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


def _cell(columns: int, rows: int) -> tuple[int, int]:
    """Width and height of a cell in px, as the terminal's driver knows them."""
    try:
        import fcntl  # deferred, as the others; Windows has no such modules, and no driver that tells
        import termios

        answer = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
    except (ImportError, OSError):
        return USUAL_CELL
    _, _, width, height = struct.unpack("HHHH", answer)
    return (width // columns, height // rows) if width >= columns and height >= rows else USUAL_CELL
