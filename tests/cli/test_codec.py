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
def shell(shell: Shell) -> Shell:
    """Commands in a folder with two pictures, with the tiny model as the default."""
    for seed, name in enumerate(("one.png", "two.png")):
        noise = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(name)
    return shell


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


@pytest.mark.parametrize("command", ["encode", "decode", "roundtrip"])
def test_a_hyphen_is_no_folder(shell: Shell, command: str) -> None:
    Image.new("RGB", (32, 32)).save("x.png")
    file = Path(shell("encode", "x.png").lines[0] if command == "decode" else "x.png")
    outcome = shell(command, file, "-o", "-")
    assert (outcome.code, outcome.stdout) == (2, "") and not Path("-").exists()
    assert outcome.stderr.startswith("sdcli: error: --output -: nothing of this goes to stdout; name a file")


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


def test_a_round_trip_prints_figures_and_a_path_only_with_an_output(shell: Shell) -> None:
    bare = shell("roundtrip", "one.png", "two.png")
    assert (bare.code, bare.stderr) == (0, "")
    assert [line.split(":")[0] for line in bare.lines[::2]] == ["one.png", "two.png"]
    assert "PSNR" in bare.lines[0] and "SSIM" in bare.lines[0] and "perceptual distance" in bare.lines[0]
    assert bare.lines[1] == "  3 x 16 x 24 pixels, 1,152 bytes -> 4 x 8 x 12 latents, 1,536 bytes: 0.75 to 1"

    paired = shell("roundtrip", ".", "-o", "pairs", "--json")
    assert [json.loads(line)["path"] for line in paired.lines] == ["pairs/one.png", "pairs/two.png"]
    assert Image.open("pairs/one.png").size == (48, 16)
    skipped = shell("roundtrip", "one.png", "-o", "pairs", "--if-exists", "skip")
    assert (skipped.code, skipped.stdout) == (0, "one.png: skipped, pairs/one.png is there\n")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--seed", "-1"], ExitCode.USAGE, "--seed -1: out of range"),
        (["--seed", "3"], ExitCode.USAGE, "--seed 3 without --sample"),
        (["--size", "big"], ExitCode.USAGE, "--size big: is no size"),
        (["--size", "33x32"], ExitCode.USAGE, "width 33 px: is no multiple of 2"),
        (["--if-exists", "ask"], ExitCode.USAGE, "--if-exists ask: unknown"),
        (["--dtype", "half"], ExitCode.USAGE, "--dtype half: unknown"),
        (["--device", "warp"], ExitCode.USAGE, "--device warp: unknown"),
        (["--model", "nowhere"], ExitCode.INPUT, "nowhere: no such model"),
        (["-o", "x.bmp"], ExitCode.USAGE, "x.bmp: is of no kind of picture"),
        (["-o", "x.png", "two.png"], ExitCode.USAGE, "is one file for 2 results"),
        (["none.png"], ExitCode.INPUT, "none.png: no such file"),
    ],
)
def test_what_a_round_trip_cannot_do_is_one_line(
    shell: Shell, tmp_path: Path, options: list[str], code: ExitCode, words: str
) -> None:
    before = tree(tmp_path)
    outcome = shell("roundtrip", "one.png", *options)
    assert outcome.code == code and words in outcome.stderr and outcome.stderr.count("\n") == 1
    assert tree(tmp_path) == before and outcome.stdout == ""
