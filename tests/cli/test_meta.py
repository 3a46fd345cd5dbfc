"""`sdcli meta` as a script sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from sdcli.errors import ExitCode
from tests.commands import Shell, tree

TEXT = "a \x1b[31mred dog\nSteps: 9, Sampler: Euler a, Seed: 3"


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    """Commands in a folder with a picture that A1111 might have drawn, and one that says nothing."""
    monkeypatch.chdir(tmp_path)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", TEXT)
    Image.new("RGB", (8, 8), "red").save("told.png", pnginfo=chunks)
    Image.new("RGB", (8, 8), "red").save("mute.png")
    return Shell(capfdbinary, monkeypatch)


def test_a_person_reads_a_fact_a_line_and_no_text_steers_the_terminal(shell: Shell) -> None:
    outcome = shell("meta", "told.png", "mute.png")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.lines == [
        "told.png: a1111",
        "  prompt: a \\x1b[31mred dog",
        "  negative: ",
        "  seed: 3",
        "  scheduler: euler-a",
        "  sampler: Euler a",
        "  steps: 9",
        "mute.png: says nothing about its making",
    ]


def test_json_is_a_line_a_picture_with_the_texts_as_they_stand_there(shell: Shell) -> None:
    told, mute = (json.loads(line) for line in shell("meta", "told.png", "mute.png", "--json").lines)
    assert told == {
        "path": "told.png",
        "source": "a1111",
        "prompt": "a \x1b[31mred dog",
        "negative": "",
        "seed": 3,
        "scheduler": "euler-a",
        "sampler": "Euler a",
        "steps": 9,
        "raw": {"parameters": TEXT},
    }
    assert mute == {"path": "mute.png", "source": None, "raw": {}}


def test_stripping_prints_the_paths(shell: Shell) -> None:
    outcome = shell("meta", "--strip", "told.png", "mute.png")
    assert (outcome.code, outcome.lines, outcome.stderr) == (0, ["told.png", "mute.png"], "")
    assert shell("meta", "told.png").stdout == "told.png: says nothing about its making\n"
    assert json.loads(shell("meta", "--strip", "told.png", "--json").stdout)["removed"] == 0


def test_what_is_no_picture_is_an_input_error(shell: Shell) -> None:
    Path("x.gif").write_bytes(b"GIF89a")
    before = tree(Path())
    for name, words in (("x.gif", "is no PNG, JPEG or WebP picture"), ("none.png", "no such file")):
        for more in ([], ["--strip"]):
            outcome = shell("meta", name, *more)
            assert (outcome.code, outcome.stdout) == (ExitCode.INPUT, "")
            assert f"sdcli: error: {name}: {words}" in outcome.stderr
    assert shell("meta").code == ExitCode.USAGE
    assert tree(Path()) == before


def test_every_bad_file_is_told_and_the_exit_code_is_that_of_the_first(shell: Shell) -> None:
    Path("cut.png").write_bytes(Path("told.png").read_bytes()[:-1])
    outcome = shell("meta", "cut.png", "told.png", "none.png", "mute.png")
    assert outcome.code == ExitCode.INPUT
    assert [line for line in outcome.lines if not line.startswith(" ")] == [
        "told.png: a1111",
        "mute.png: says nothing about its making",
    ]
    assert outcome.stderr.splitlines() == [
        "sdcli: error: cut.png: is cut short; the file is damaged; save it again",
        "sdcli: error: none.png: no such file or directory; name a file that can be read",
    ]
    rows = shell("meta", "cut.png", "told.png", "--json")
    assert (rows.code, len(rows.lines), json.loads(rows.stderr)["exit_code"]) == (ExitCode.INPUT, 1, 3)
