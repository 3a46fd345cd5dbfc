"""What a terminal is sent for a picture shows that picture, read back as the terminal would."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdcli.cli.preview import HALF, Screen, cells_of, find_screen, protocol_of, text_of
from tests.commands import Outcome, Shell

PROMPT = "a red apple"
COLOUR = r"(38|48);(?:2;(\d+;\d+;\d+)|5;(\d+))"
Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A ramp with a red bar, 24 x 18 px."""
    x, y = np.meshgrid(np.arange(24), np.arange(18))
    pixels = np.stack([x * 10, y * 14, 255 - x * 5], axis=-1).astype(np.uint8)
    pixels[4:7] = (255, 0, 0)
    return Image.fromarray(pixels)


def read_kitty(text: str) -> tuple[dict[str, str], Image.Image]:
    """The keys of the first command and the picture in all of them."""
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert all(len(payload) <= 4096 for _, payload in commands)
    more = [dict(pair.split("=") for pair in keys.split(","))["m"] for keys, _ in commands]
    assert more == ["1"] * (len(commands) - 1) + ["0"]
    data = base64.b64decode("".join(payload for _, payload in commands))
    return dict(pair.split("=") for pair in commands[0][0].split(",")), Image.open(io.BytesIO(data)).convert("RGB")


def read_sixel(text: str) -> Pixels:
    """Pixels (H, W, 3) by DEC's rules: raster size, colours in percent, runs, bands, carriage returns."""
    found = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\\n', text, re.DOTALL)
    assert found is not None
    width, height = int(found[1]), int(found[2])
    pixels = np.full((height + 6, width, 3), 7, dtype=np.uint8)
    palette: dict[int, tuple[int, ...]] = {}
    colour, x, top = 0, 0, 0
    for token in re.finditer(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|(\$)|(-)", found[3]):
        if token[1] is not None:
            colour = int(token[1])
            if token[2] is not None:
                palette[colour] = tuple(round(int(token[i]) * 255 / 100) for i in (2, 3, 4))
        elif token[8] or token[9]:
            x, top = 0, top + 6 * bool(token[9])
        else:
            count, bits = int(token[5] or 1), ord(token[6] or token[7]) - 63
            for row in range(6):
                if bits >> row & 1:
                    pixels[top + row, x : x + count] = palette[colour]
            x += count
    return pixels[:height]


def read_blocks(text: str) -> Pixels:
    """Pixels (H, W, 3) of half blocks in 24-bit colours or the 256; the ground of a last odd row is left out."""
    rows: list[list[tuple[int, ...]]] = []
    for line in text.splitlines():
        upper: list[tuple[int, ...]] = []
        lower: list[tuple[int, ...]] = []
        now: dict[str, tuple[int, ...]] = {}
        for codes, block in re.findall(r"(?:\x1b\[([\d;]*)m)?(\u2580)?", line):
            for ground, direct, number in re.findall(COLOUR, codes):
                now[ground] = tuple(map(int, direct.split(";"))) if direct else xterm(int(number))
            if "49" in re.sub(COLOUR, "", codes).split(";"):
                now.pop("48", None)
            if block:
                upper.append(now["38"])
                lower += [now["48"]] if "48" in now else []
        assert line.endswith("\x1b[0m")
        rows += [upper] + ([lower] if lower else [])
    return np.array(rows, dtype=np.uint8)


def xterm(number: int) -> tuple[int, ...]:
    if number >= 232:
        return (8 + 10 * (number - 232),) * 3
    levels = (0, 95, 135, 175, 215, 255)
    return tuple(levels[(number - 16) // place % 6] for place in (36, 6, 1))


def apart(a: Pixels, b: Image.Image) -> int:
    return int(np.abs(a.astype(int) - np.asarray(b, dtype=int)).max())


def test_kitty_is_sent_the_picture_in_chunks_quietly_with_its_cells() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    keys, shown = read_kitty(text_of(noise, Screen("kitty", 80, 24)))
    assert apart(np.asarray(shown), noise) == 0
    assert keys == {"a": "T", "f": "100", "q": "2", "c": "22", "r": "8", "m": "1"}  # 180 x 120 px: twice its size


def test_iterm2_is_sent_the_file_with_its_length(picture: Image.Image) -> None:
    text = text_of(picture, Screen("iterm2", 80, 24))
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);width=(\d+);preserveAspectRatio=1:(.*)\a\n", text)
    assert found is not None
    data = base64.b64decode(found[3])
    assert len(data) == int(found[1])
    assert apart(np.asarray(Image.open(io.BytesIO(data))), picture) == 0


def test_sixels_are_the_picture_in_as_many_colours_as_they_have(picture: Image.Image) -> None:
    screen = Screen("sixel", 80, 24, cell=(8, 16))
    few = read_sixel(text_of(picture, screen))
    assert few.shape == (176, 234, 3)  # ten times its size, in 30 x 11 cells
    large = picture.resize((few.shape[1], few.shape[0]), Image.Resampling.NEAREST)
    assert np.abs(few.astype(int) - np.asarray(large, dtype=int)).mean() < 6
    flat = Image.new("RGB", (250, 13), (255, 128, 0))  # bands of six and one of one
    assert apart(read_sixel(text_of(flat, Screen("sixel", 500, 200, cell=(10, 13)))), flat) <= 1


@pytest.mark.parametrize(("colours", "most"), [(1 << 24, 0), (256, 48)])
def test_half_blocks_are_the_picture_pixel_for_pixel(picture: Image.Image, colours: int, most: int) -> None:
    for height in (18, 17):
        cropped = picture.crop((0, 0, 24, height))
        shown = read_blocks(text_of(cropped, Screen("blocks", 80, 24, colours=colours)))
        assert shown.shape == (height, 24, 3)
        assert apart(shown, cropped) <= most


@pytest.mark.parametrize("protocol", ["kitty", "sixel", "blocks"])
@pytest.mark.parametrize("size", [(2000, 100), (100, 2000), (700, 700)])
def test_no_picture_is_wider_or_higher_than_the_terminal(protocol: str, size: tuple[int, int]) -> None:
    screen = Screen(protocol, 40, 20, colours=1 << 24)
    text = text_of(Image.new("RGB", size, "navy"), screen)
    if protocol == "kitty":
        keys, _ = read_kitty(text)
        columns, rows = int(keys["c"]), int(keys["r"])
    elif protocol == "sixel":
        height, width = read_sixel(text).shape[:2]
        columns, rows = -(-width // 8), -(-height // 16)
    else:
        height, columns = read_blocks(text).shape[:2]
        rows = -(-height // 2)
    assert 1 <= columns <= 40 and 1 <= rows <= 18
    assert columns == 40 or rows == 18 or protocol == "sixel"


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    assert cells_of((64, 64), Screen("kitty", 80, 24, cell=(8, 16))) == (32, 16)  # four times
    assert cells_of((512, 512), Screen("kitty", 80, 60, cell=(8, 16))) == (64, 32)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230801"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "210401"}, "blocks"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "TMUX": "x"}, "blocks"),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, "blocks"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode"}, "blocks"),
        ({"TERM": "linux"}, "blocks"),
    ],
)
def test_what_a_terminal_shows_is_told_by_its_environment(environment: dict[str, str], protocol: str) -> None:
    assert protocol_of(environment) == protocol


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, "NO_COLOR is set"),
        ({"TERM": "dumb"}, "this terminal shows text alone"),
        ({}, "this terminal shows text alone"),
    ],
)
def test_what_can_show_no_picture_says_why(environment: dict[str, str], why: str) -> None:
    assert find_screen(environment) == why


class Terminal:
    """Runs generate in this process with stderr on a terminal, 70 columns wide with cells of 9 x 18 px."""

    def __init__(self, shell: Shell, patch: pytest.MonkeyPatch, model: Path) -> None:
        self._shell, self._patch, self._model = shell, patch, model

    def __call__(self, *options: str, **environment: str) -> tuple[Outcome, str]:
        """What the command left behind, and what the terminal got."""
        for name in ("TERM", "TMUX", "STY", "COLORTERM", "NO_COLOR", "TERM_PROGRAM", "KITTY_WINDOW_ID", "LC_TERMINAL"):
            self._patch.delenv(name, raising=False)
        for name, value in environment.items():
            self._patch.setenv(name, value)
        terminal, stderr = pty.openpty()
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 70, 630, 720))
        shown: list[bytes] = []
        listener = threading.Thread(target=_listen, args=(terminal, shown))
        listener.start()
        with os.fdopen(stderr, "w", encoding="utf-8") as stream, self._patch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            outcome = self._shell("generate", PROMPT, "-m", self._model, "--steps", 1, "--preview", *options)
        listener.join()
        os.close(terminal)
        return outcome, b"".join(shown).decode().replace("\r\n", "\n")


def _listen(terminal: int, shown: list[bytes]) -> None:
    try:
        while data := os.read(terminal, 1 << 16):
            shown.append(data)
    except OSError:  # how Linux tells that the other side is closed
        return


@pytest.fixture
def terminal(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd1: Path
) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(Shell(capfdbinary, monkeypatch), monkeypatch, sd1)


def test_generate_shows_the_picture_it_wrote_on_the_terminal_and_its_path_on_stdout(terminal: Terminal) -> None:
    outcome, shown = terminal("-o", "x.png", TERM="xterm-kitty")
    assert (outcome.code, outcome.stdout) == (0, "x.png\n")
    keys, picture = read_kitty(shown)
    assert apart(np.asarray(picture), Image.open("x.png")) == 0
    assert (keys["c"], keys["r"]) == ("28", "14")  # 256 px in cells of 9 x 18


def test_a_picture_for_stdout_is_shown_in_blocks(terminal: Terminal) -> None:
    outcome, shown = terminal("-o", "-", TERM="xterm-256color", COLORTERM="truecolor")
    there = Image.open(io.BytesIO(outcome.data))
    blocks = shown[shown.index("\x1b[38;2") : shown.rindex(HALF) + 5]
    assert outcome.code == 0 and apart(read_blocks(blocks), there) == 0


def test_every_picture_is_shown_and_no_sheet(terminal: Terminal) -> None:
    outcome, shown = terminal("-n", "2", "--grid", "sheet.png", "--json", TERM="xterm-kitty")
    assert len(outcome.lines) == 3 and all(json.loads(line) for line in outcome.lines)
    assert shown.count("\x1b_Ga=T") == 2


@pytest.mark.parametrize(
    ("options", "environment", "note"),
    [
        (["--quiet"], {"TERM": "xterm-kitty"}, ""),
        ([], {"TERM": "xterm-kitty", "NO_COLOR": "1"}, "no preview: NO_COLOR is set\n"),
        ([], {"TERM": "dumb"}, "no preview: this terminal shows text alone\n"),
    ],
)
def test_no_preview_where_it_is_not_wanted_or_cannot_be(
    terminal: Terminal, options: list[str], environment: dict[str, str], note: str
) -> None:
    outcome, shown = terminal("-o", "x.png", *options, **environment)
    assert outcome.code == 0
    assert HALF not in shown and "\x1b_G" not in shown
    assert note in shown and (shown == "") == (note == "")


def test_no_preview_where_stderr_is_no_terminal(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd1: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = Shell(capfdbinary, monkeypatch)("generate", PROMPT, "-m", sd1, "--steps", 1, "--preview", "-o", "x.png")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "x.png\n", "")
