"""`sdcli replay` as a script sees it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from sdcli.errors import ExitCode
from sdcli.generate import run
from sdcli.plan import plan
from sdcli.specs import GenerateSpec
from tests.commands import Shell, tree

PROMPT = "a picture of a puppy"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory, sd1: Path) -> Path:
    """A picture of the tiny model; to be read only."""
    path = tmp_path_factory.mktemp("drawn") / "x.png"
    spec = GenerateSpec(prompt=PROMPT, model=str(sd1), steps=2, seed=7, output=path)
    for _ in run(spec, plan(spec)):
        pass
    return path


@pytest.fixture
def shell(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: Path
) -> Shell:
    """Commands in a folder with that picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDCLI_MODEL", raising=False)
    shutil.copy(picture, "x.png")
    return Shell(capfdbinary, monkeypatch)


def foreign(path: str, prompt: str = "a dog", extra: str = "") -> None:
    """A picture as A1111 describes one."""
    chunks = PngImagePlugin.PngInfo()
    line = "Steps: 2, Sampler: Euler, CFG scale: 3, Seed: 9, Size: 32x32, RNG: CPU" + extra
    chunks.add_text("parameters", f"{prompt}\n{line}")
    Image.new("RGB", (32, 32)).save(path, pnginfo=chunks)


def test_a_picture_is_drawn_again_under_its_name_and_nothing_is_replaced(shell: Shell) -> None:
    done = shell("replay", "x.png")
    assert (done.code, done.stdout, done.stderr) == (0, "x-2.png\n", "")
    assert Path("x-2.png").read_bytes() == Path("x.png").read_bytes()
    inside = shell("replay", "x.png", "-o", "again/", "--format", "webp", "--json")
    record = json.loads(inside.stdout)
    assert (record["path"], record["source"], record["seed"]) == ("again/x.webp", "x.png", 7)
    piped = shell("replay", "x.png", "-o", "-")
    assert piped.code == 0 and Image.open(io.BytesIO(piped.data)).size == (32, 32)


def test_a_check_prints_a_verdict_and_fails_with_4_beyond_the_tolerance(shell: Shell, tmp_path: Path) -> None:
    before = tree(tmp_path)
    good = shell("replay", "x.png", "--check")
    assert (good.code, good.stdout, good.stderr) == (0, "x.png: byte-equal\n", "")
    bad = shell("replay", "x.png", "--check", "--seed", "8")
    assert bad.code == ExitCode.PARTIAL
    assert bad.lines[0].startswith("x.png: differs by up to ") and "PSNR" in bad.lines[0]
    assert bad.lines[1:] == ["  seed: 7 there, 8 here"]
    assert bad.stderr.startswith("sdcli: error: of 1 picture 1 differs by more than 2/255")
    record = json.loads(shell("replay", "x.png", "--check", "--json").stdout)
    assert record == {
        "source": "x.png", "program": "sdcli", "equal": "bytes", "within": True, "largest": 0, "mean": 0.0,
        "psnr": 106.02, "drift": [],
    }  # fmt: skip
    assert tree(tmp_path) == before


def test_what_is_not_honoured_is_a_warning_each_and_in_the_record(shell: Shell, sd1: Path) -> None:
    foreign("a.png", "a dog <lora:x:1>", ", ENSD: 31337, Tiling: True")
    done = shell("replay", "a.png", "-m", sd1, "-o", "again.png", "--json")
    assert done.code == 0
    warned = done.stderr.splitlines()
    assert [line.removeprefix("sdcli: warning: a.png: ").split(":")[0] for line in warned] == [
        "<lora",
        "ENSD 31337",
        "Tiling True",
        f"model {sd1}",
    ]
    assert len(json.loads(done.stdout)["unheeded"]) == 4


def test_a_bad_file_among_others_is_told_and_the_end_is_4(shell: Shell) -> None:
    Image.new("RGB", (32, 32)).save("silent.png")
    done = shell("replay", "silent.png", "x.png", "none.png", "--check", "--json")
    assert done.code == ExitCode.PARTIAL
    rows = [json.loads(line) for line in done.lines]
    assert [(row["source"], row.get("exit_code"), row.get("within")) for row in rows] == [
        ("silent.png", 3, None),
        ("x.png", None, True),
        ("none.png", 3, None),
    ]
    assert "silent.png: says nothing about its making" in done.stderr
    assert json.loads(done.stderr.splitlines()[-1])["exit_code"] == 4


def test_the_model_of_the_environment_takes_no_pictures_own_place(
    shell: Shell, classed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDCLI_MODEL", str(classed))
    assert shell("replay", "x.png", "--check").stdout == "x.png: byte-equal\n"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--seed", "-1"], ExitCode.USAGE, "--seed -1: out of range"),
        (["--steps", "0"], ExitCode.USAGE, "--steps 0: out of range"),
        (["--clip-skip", "-1"], ExitCode.USAGE, "--clip-skip -1: out of range"),
        (["--clip-skip", "9"], ExitCode.USAGE, "x.png: --clip-skip 9"),
        (["--guidance", "0.5"], ExitCode.USAGE, "--guidance 0.5: out of range"),
        (["--guidance-interval", "1"], ExitCode.USAGE, "--guidance-interval 1: is no interval"),
        (["--guidance-rescale", "2"], ExitCode.USAGE, "--guidance-rescale 2.0: out of range"),
        (["--eta", "2"], ExitCode.USAGE, "--eta 2.0: out of range"),
        (["--eta", "1"], ExitCode.USAGE, "x.png: --eta 1.0: scheduler"),
        (["--order", "9"], ExitCode.USAGE, "x.png: --order 9: scheduler"),
        (["--sigmas", "odd"], ExitCode.USAGE, "x.png: --sigmas odd: scheduler"),
        (["--variance", "odd"], ExitCode.USAGE, "x.png: --variance odd: scheduler"),
        (["--timestep-spacing", "odd"], ExitCode.USAGE, "x.png: --timestep-spacing odd: scheduler"),
        (["--scheduler", "magic"], ExitCode.USAGE, "x.png: scheduler 'magic' is unknown"),
        (["--size", "big"], ExitCode.USAGE, "--size big: is no size"),
        (["--size", "33x32"], ExitCode.USAGE, "width 33 px: is no multiple of 2"),
        (["--class", "dog"], ExitCode.USAGE, "the prompt and --class exclude each other"),
        (["--prompt", " "], ExitCode.USAGE, "x.png: the prompt is empty"),
        (["--strength", "2"], ExitCode.USAGE, "--strength 2.0: out of range"),
        (["--strength", "0.5"], ExitCode.USAGE, "x.png: --strength without --init-image"),
        (["--mask", "x.png"], ExitCode.USAGE, "x.png: --mask without --init-image"),
        (["--init-image", "none.png"], ExitCode.INPUT, "none.png: no such file"),
        (["--latents", "none.st"], ExitCode.INPUT, "none.st: no such file"),
        (["--embedding", "none.st"], ExitCode.INPUT, "none.st: no such file"),
        (["--prediction", "noise"], ExitCode.USAGE, "--prediction noise: unknown"),
        (["--model", "nowhere"], ExitCode.INPUT, "nowhere: no such model"),
        (["--device", "warp"], ExitCode.USAGE, "--device warp: unknown"),
        (["--dtype", "half"], ExitCode.USAGE, "--dtype half: unknown"),
        (["--format", "gif"], ExitCode.USAGE, "--format gif: unknown"),
        (["--quality", "0"], ExitCode.USAGE, "--quality 0: out of range"),
        (["--quality", "50"], ExitCode.USAGE, "--quality 50: a PNG picture loses nothing"),
        (["--if-exists", "ask"], ExitCode.USAGE, "--if-exists ask: unknown"),
        (["--if-exists", "error"], ExitCode.OUTPUT, "x.png: exists"),
        (["-o", "y.bmp"], ExitCode.USAGE, "y.bmp: is of no kind of picture"),
        (["-o", "y.png", "x.png"], ExitCode.USAGE, "--output y.png: is one file for 2 results"),
        (["-o", "-", "x.png"], ExitCode.USAGE, "--output -: is one file for 2 results"),
        (["--check", "-o", "-"], ExitCode.USAGE, "--output - with --check"),
        (["--check", "--format", "webp"], ExitCode.USAGE, "--format and --quality with --check"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    shell: Shell, tmp_path: Path, options: list[str], code: ExitCode, words: str
) -> None:
    before = tree(tmp_path)
    outcome = shell("replay", "x.png", *options)
    assert outcome.code == code and words in outcome.stderr, outcome.stderr
    assert outcome.stderr.count("\n") == 1 and outcome.stdout == ""
    assert tree(tmp_path) == before


def test_no_picture_at_all_is_a_usage_error_and_an_empty_folder_an_input_error(shell: Shell, tmp_path: Path) -> None:
    assert shell("replay").code == ExitCode.USAGE
    (tmp_path / "empty").mkdir()
    assert shell("replay", "empty").code == ExitCode.INPUT


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_drawn(shell: Shell) -> None:
    shutil.copy("x.png", "file")
    outcome = shell("replay", "x.png", "-o", "file/again/")
    assert outcome.code == ExitCode.OUTPUT and "file" in outcome.stderr
