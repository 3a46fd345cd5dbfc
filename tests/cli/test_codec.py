"""`sdcli encode` and `sdcli decode` as a script sees them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.errors import ExitCode
from tests.commands import Shell, tree


@pytest.fixture
def shell(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd1: Path
) -> Shell:
    """Commands in a folder with two pictures, with the tiny model as the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDCLI_MODEL", str(sd1))
    for seed, name in enumerate(("one.png", "two.png")):
        noise = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(name)
    return Shell(capfdbinary, monkeypatch)


def test_there_and_back_prints_a_path_a_line(shell: Shell) -> None:
    there = shell("encode", "one.png", "two.png", "-o", "z")
    assert (there.code, there.stderr) == (0, "")
    assert there.lines == ["z/one.latents.safetensors", "z/two.latents.safetensors"]

    back = shell("decode", "z", "-o", "back")
    assert (back.code, back.stderr) == (0, "")
    assert back.lines == ["back/one.png", "back/two.png"]
    assert Image.open("back/one.png").size == (24, 16)


def test_json_is_one_line_a_file(shell: Shell, sd1: Path) -> None:
    there = [json.loads(line) for line in shell("encode", "one.png", "--sample", "--seed", 7, "--json").lines]
    assert there == [
        {
            "path": "one.latents.safetensors",
            "source": "one.png",
            "shape": [1, 4, 8, 12],
            "model": str(sd1),
            "scaling_factor": 0.18215,
            "height": 16,
            "width": 24,
            "mode": "sample",
            "seed": 7,
        }
    ]
    back = [json.loads(line) for line in shell("decode", "one.latents.safetensors", "-o", "x.png", "--json").lines]
    assert back == [
        {"path": "x.png", "source": "one.latents.safetensors", "width": 24, "height": 16, "model": str(sd1)}
    ]


def test_a_model_that_reads_no_text_encodes_and_decodes_as_any(shell: Shell, sd1: Path, classed: Path) -> None:
    for model, folder in ((sd1, "a"), (classed, "b")):  # the same VAE
        there = shell("encode", "one.png", "-m", model, "-o", folder)
        back = shell("decode", f"{folder}/one.latents.safetensors", "-m", model, "-o", folder)
        assert (there.code, there.stderr, back.code, back.stderr) == (0, "", 0, "")
    assert Path("a/one.png").read_bytes() == Path("b/one.png").read_bytes()


def test_a_size_that_is_cut_is_told_on_stderr(shell: Shell) -> None:
    Image.new("RGB", (9, 6)).save("odd.png")
    outcome = shell("encode", "odd.png")
    assert (outcome.code, outcome.stdout) == (0, "odd.latents.safetensors\n")
    assert outcome.stderr == "sdcli: warning: odd.png: 9 x 6 px cut to 8 x 6, multiples of 2\n"


def test_the_same_command_twice_gives_the_same_bytes(shell: Shell) -> None:
    for folder in ("a", "b"):
        shell("encode", "one.png", "--sample", "--seed", 7, "-o", folder)
        shell("decode", f"{folder}/one.latents.safetensors", "-o", folder)
    assert tree(Path("a")) == tree(Path("b"))
    assert set(tree(Path("a"))) == {"one.latents.safetensors", "one.png"}


def test_what_is_there_is_skipped_when_asked(shell: Shell) -> None:
    shell("encode", "one.png")
    outcome = shell("encode", "one.png", "two.png", "--if-exists", "skip", "--json")
    assert outcome.code == 0
    assert [json.loads(line).get("skipped", False) for line in outcome.lines] == [True, False]


def test_decoded_pictures_are_of_the_format_asked_for(shell: Shell) -> None:
    shell("encode", "one.png")
    latents = "one.latents.safetensors"
    assert shell("decode", latents, "-o", "back", "--format", "webp").stdout == "back/one.webp\n"
    assert shell("decode", latents, "-o", "back.JPG", "--quality", 50).stdout == "back.JPG\n"
    assert [Image.open(path).format for path in ("back/one.webp", "back.JPG")] == ["WEBP", "JPEG"]
    for options, words in ((["--quality", "9"], "a PNG picture"), (["-o", "x.jpg", "--format", "png"], "contradict")):
        outcome = shell("decode", latents, *options)
        assert outcome.code == ExitCode.USAGE and words in outcome.stderr
