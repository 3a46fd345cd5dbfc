"""`sdcli diffuse` as a script sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdcli.errors import ExitCode
from tests.commands import Shell, tree


@pytest.fixture
def shell(shell: Shell) -> Shell:
    """Commands in a folder with a picture, with the tiny model as the default."""
    Image.new("RGB", (24, 16), "teal").save("photo.png")
    return shell


def test_a_strip_is_one_path(shell: Shell) -> None:
    outcome = shell("diffuse", "photo.png", "--t", "0,500", "-o", "strip.png")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "strip.png\n", "")
    assert Image.open("strip.png").format == "PNG"


def test_json_is_one_line_a_file(shell: Shell) -> None:
    outcome = shell("diffuse", "photo.png", "--t", "0,500", "-o", "out", "--save-latents", "z", "--json")
    rows = [json.loads(line) for line in outcome.lines]
    assert [(row["path"], row["space"], row["t"]) for row in rows] == [
        ("out/photo-0000-pixels.png", "pixels", 0),
        ("out/photo-0500-pixels.png", "pixels", 500),
        ("z/photo-0000.latents.safetensors", "latents", 0),
        ("out/photo-0000-latents.png", "latents", 0),
        ("z/photo-0500.latents.safetensors", "latents", 500),
        ("out/photo-0500-latents.png", "latents", 500),
    ]
    assert {Path(row["path"]) for row in rows} == set(Path().glob("*/*"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["photo.png", "--t", "1000"], ExitCode.USAGE, "--t 1000: out of range; this model has the steps 0 to 999"),
        (["photo.png", "--t", "5,5"], ExitCode.USAGE, "--t 5,5: 5 is named twice; name every step once"),
        (["none.png"], ExitCode.INPUT, "none.png: no such file or directory; name a file that can be read"),
        (["photo.png", "-o", "photo.png/x.png"], ExitCode.OUTPUT, "photo.png: "),
        (["photo.png", "-m", "nowhere/"], ExitCode.INPUT, "nowhere"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(
    shell: Shell, arguments: list[str], code: ExitCode, said: str
) -> None:
    before = tree(Path())
    outcome = shell("diffuse", *arguments)
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (code, "", 1)
    assert outcome.stderr.startswith("sdcli: error: ") and said in outcome.stderr
    assert tree(Path()) == before
