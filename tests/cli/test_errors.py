"""Every failure is one line on stderr with the right exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdcli.errors import ExitCode
from tests import models
from tests.commands import Outcome, Shell, tree

PROMPT = "a picture of a puppy"
Spoil = Callable[[Path], Any]


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)
    for name in ("SDCLI_MODEL", "SDCLI_DEVICE", "SDCLI_OFFLINE", "SDCLI_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return Shell(capfdbinary, monkeypatch)


def drop_unet(model: Path) -> None:
    for path in sorted((model / "unet").iterdir()):
        path.unlink()
    (model / "unet").rmdir()


def cut_short(model: Path) -> None:
    path = models.weight_file(model / "unet")
    path.write_bytes(path.read_bytes()[:-100])


def add_nan(model: Path) -> None:
    models.edit_weights(model / "vae", lambda w: w | {"decoder.conv_in.bias": torch.full((8,), torch.nan)})


def unknown_scheduler_config(model: Path) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")


def keep(model: Path) -> None:
    pass


# What is wrong with the arguments (added to `generate PROMPT --model model --output out`): exit code, what is said.
ARGUMENTS: list[tuple[list[str], ExitCode, str]] = [
    (["--scheduler", "dmp"], ExitCode.USAGE, "scheduler 'dmp' is unknown; did you mean dpm"),
    (["--steps", "0"], ExitCode.USAGE, "--steps 0: out of range; it must lie in 1..1000"),
    (["--steps", "1001"], ExitCode.USAGE, "--steps 1001: out of range"),
    (["--steps", "many"], ExitCode.USAGE, "invalid value for '--steps'"),
    (["--size", "33x32"], ExitCode.USAGE, "width 33 px: is no multiple of 2, which this model needs; use 32 or 34"),
    (["--size", "big"], ExitCode.USAGE, "--size big: is no size; write it as 512x512"),
    (["--size", "32x32", "--width", "32"], ExitCode.USAGE, "--size and --width/--height exclude each other"),
    (["--guidance", "0.5"], ExitCode.USAGE, "--guidance 0.5: out of range; it must be at least 1"),
    (["--guidance", "nan"], ExitCode.USAGE, "--guidance nan: out of range"),
    (["--seed", "-1"], ExitCode.USAGE, "--seed -1: out of range"),
    (["--seed", "18446744073709551616"], ExitCode.USAGE, "--seed 18446744073709551616: out of range"),
    (["--count", "0"], ExitCode.USAGE, "--count 0: out of range"),
    (["--batch-size", "0"], ExitCode.USAGE, "--batch-size 0: out of range"),
    (["--if-exists", "ask"], ExitCode.USAGE, "--if-exists ask: unknown; use one of number, skip, overwrite, error"),
    (["--dtype", "float8"], ExitCode.USAGE, "--dtype float8: unknown"),
    (["--device", "warp"], ExitCode.USAGE, "--device warp: unknown; use auto, cpu, cuda"),
    (["--device", "cuda:99"], ExitCode.RESOURCES, "--device cuda:99: this machine has no such device"),
    (["--no-such-option"], ExitCode.USAGE, "no such option: --no-such-option; see --help"),
    (["--steps"], ExitCode.USAGE, "option '--steps' requires an argument"),
    (["another prompt"], ExitCode.USAGE, "got unexpected extra argument"),
    (["--scheduler", "ddim", "--steps", "1000"], ExitCode.USAGE, "scheduler ddim cannot do 1000 steps"),
    (["-o", "file/out"], ExitCode.OUTPUT, "file/out: "),
    (["-o", "file/out/x.png"], ExitCode.OUTPUT, "file/out: "),
    (["-o", "x.bmp"], ExitCode.USAGE, "--output x.bmp: is of no kind of picture"),
    (["-o", "-", "-n", "2"], ExitCode.USAGE, "--count 2 with --output -: stdout takes one picture"),
    (["-o", "x" * 300 + ".png"], ExitCode.OUTPUT, "has over 255 bytes"),
    (["--embedding", "none.pt"], ExitCode.INPUT, "none.pt: no such file or directory"),
    (["--embedding", "none.pt:<cat>"], ExitCode.INPUT, "--embedding none.pt:<cat>: no such file; write it as FILE or"),
    (["--embedding", "file:"], ExitCode.USAGE, "--embedding file:: the token after the colon is empty"),
    (["--embedding", "file"], ExitCode.INPUT, "file: was not written by torch.save"),
    (
        ["--embedding", "cat.st"],
        ExitCode.INPUT,
        "cat.st: its vectors are 1024 wide (Stable Diffusion 2.x), the model's",
    ),
    (["--embedding", "cat.st:puppy"], ExitCode.INPUT, "cat.st: its vectors are 1024 wide"),
    (["--lora", "none.pt"], ExitCode.INPUT, "none.pt: no such file or directory"),
    (["--lora", "none.pt:1"], ExitCode.INPUT, "--lora none.pt:1: no such file; write it as FILE or FILE:0.8"),
    (["--lora", "file:"], ExitCode.USAGE, "--lora file:: an empty scale is no number; write it as FILE or FILE:0.8"),
    (["--lora", "file:nan"], ExitCode.USAGE, "--lora file:nan: the scale is out of range"),
    (["--lora", "file:101"], ExitCode.USAGE, "the scale is out of range; expected is -100..100"),
    (["--lora", "file"], ExitCode.INPUT, "file: is neither a safetensors file nor one of torch.save"),
    (["--lora", "cat.st"], ExitCode.INPUT, "cat.st: is no LoRA file: it holds <cat>; give a textual inversion to"),
    (["--model", "nowhere"], ExitCode.INPUT, "nowhere: no such model; use builtin, a folder"),
    (["--model", "./nowhere"], ExitCode.INPUT, "./nowhere: no such model"),
    (["--model", "file"], ExitCode.INPUT, "file: is no whole safetensors file"),
    (["--model", "."], ExitCode.INPUT, ".: has no model_index.json"),
    (["--model", "owner/none", "--offline"], ExitCode.INPUT, "owner/none: is not in the local cache"),
    (["--model", "\x1b[31mred\nline"], ExitCode.INPUT, r"\x1b[31mred\nline: no such model"),
]
# What is wrong with the model.
MODELS: list[tuple[Spoil, ExitCode, str]] = [
    (drop_unet, ExitCode.INPUT, "model: has no unet/; name the folder of a whole model"),
    (cut_short, ExitCode.INPUT, "diffusion_pytorch_model.safetensors: is no whole safetensors file"),
    (add_nan, ExitCode.NUMERICAL, "vae: decoder.conv_in.bias holds NaN or Inf"),
    (unknown_scheduler_config, ExitCode.INPUT, "_class_name: is 'FlowMatchEul"),
]


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize(
    ("arguments", "spoil", "code", "said"),
    [(arguments, keep, code, said) for arguments, code, said in ARGUMENTS]
    + [([], spoil, code, said) for spoil, code, said in MODELS],
)
def test_generate_fails_with_one_line_and_leaves_nothing(
    shell: Shell,
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    spoil: Spoil,
    code: ExitCode,
    said: str,
    is_json: bool,
) -> None:
    (tmp_path / "file").write_text("a file")
    save_file({"<cat>": torch.ones(1, 1024)}, tmp_path / "cat.st")
    spoil(model)
    before = tree(tmp_path)
    json_option = ["--json"] if is_json else []
    outcome = shell("generate", PROMPT, *json_option, "--model", "model", "--output", "out", "--steps", "1", *arguments)
    check(outcome, code, said, is_json=is_json)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], "the prompt is empty; say what to draw"),
        (["generate", "a dog", "--class", "dog"], "the prompt and --class exclude each other"),
        (["generate", "--class", "dog"], "--class 'dog': this model draws from a prompt; say in words what to draw"),
        (["generate", ""], "the prompt is empty; say what to draw"),
        (["generate", "  \n"], "the prompt is empty"),
        (["generate", "-"], "the prompt is empty"),
        (["generat", "a dog"], "no such command 'generat'"),
        (["encode"], "missing argument 'FILE...'"),
        (["models", "shwo"], "no such command 'shwo'"),
        (["schedulers", "dmp"], "scheduler 'dmp' is unknown"),
        (["--no-such-option"], "no such option: --no-such-option"),
    ],
)
def test_a_command_that_is_written_wrong_is_a_usage_error(
    shell: Shell, tmp_path: Path, arguments: list[str], said: str, is_json: bool
) -> None:
    outcome = shell(*arguments, *(["--json"] if is_json else []))
    check(outcome, ExitCode.USAGE, said, is_json=is_json)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "this model draws classes, and none is named; name one with --class: cat, dog, 0, sea urchin, echinoid"),
        (["a dog"], "the prompt 'a dog': this model reads no text; leave it out, and name a class with --class: cat"),
        (["--class", "dgo"], "--class 'dgo': this model has no such class; did you mean dog?"),
        (["--class", "4"], "--class '4': out of range; the indices go from 0 to 3"),
        (["--class", "\x1b[31m"], r"--class '\x1b[31m': this model has no such class"),
        (["--class", "dog", "-N", "cat"], "--negative 'cat': this model reads no text; leave it out"),
    ],
)
def test_a_class_that_is_asked_for_wrongly_is_a_usage_error(
    shell: Shell, classed: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    check(shell("generate", *arguments, "--model", classed), ExitCode.USAGE, said)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a dog"], "the prompt 'a dog': this model reads no text; leave it out"),
        (["--class", "0"], "--class '0': this model has no classes; leave it out"),
        (["--guidance", "1.5"], "--guidance 1.5: this model is unconditional, there is nothing to guide it to"),
    ],
)
def test_what_an_unconditional_model_has_no_use_for_is_a_usage_error(
    shell: Shell, unconditional: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    check(shell("generate", *arguments, "--model", unconditional), ExitCode.USAGE, said)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (b"\xff\xfe", "the prompt on stdin is no valid text"),
        (b"x" * (2**20 + 1), "the prompt on stdin has over 1,048,576"),
    ],
)
def test_a_prompt_on_stdin_that_is_none_is_refused(shell: Shell, stdin: bytes, said: str) -> None:
    check(shell("generate", "-", stdin=stdin), ExitCode.USAGE, said)


def test_a_prompt_that_is_no_unicode_is_refused(shell: Shell, model: Path) -> None:
    outcome = shell("generate", os.fsdecode(b"a \xff dog"), "--model", model)
    check(outcome, ExitCode.USAGE, "is no valid text; write it in UTF-8")


def test_several_wrong_things_are_told_by_the_first(shell: Shell, tmp_path: Path) -> None:
    check(shell("generate", PROMPT, "--steps", "0", "--model", "nowhere", "-o", "/proc/x"), ExitCode.USAGE, "--steps 0")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no file even from root")
def test_an_output_folder_that_takes_no_file_is_an_output_error(shell: Shell, model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    outcome = shell("generate", PROMPT, "--model", model, "--steps", "1", "--output", "/proc/self/x.png")
    check(outcome, ExitCode.OUTPUT, "/proc/self")
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_folder_that_is_read_only_is_told_before_the_model_is_loaded(
    shell: Shell, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    cut_short(model)
    outcome = shell("generate", PROMPT, "--model", model, "--output", "locked/out")
    check(outcome, ExitCode.OUTPUT, "locked/out: cannot be written")


def test_a_full_disk_is_an_output_error_and_leaves_nothing(forks: Any, sd1: Path, tmp_path: Path) -> None:
    """No file of the process may pass 1 kB, as if that were all that is left."""
    arguments = ("generate", PROMPT, "--model", sd1, "--output", tmp_path / "x.png", "--steps", 1)
    ended = forks.sdcli(*arguments, file_limit=1000)
    assert (ended.code, ended.stdout) == (ExitCode.OUTPUT, "")
    assert ended.stderr.startswith("sdcli: error: ") and ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert forks.sdcli(*arguments).code == 0


def test_too_little_memory_is_a_resource_error(forks: Any, sd1: Path, tmp_path: Path) -> None:
    code = "import resource; taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
    code += "resource.setrlimit(resource.RLIMIT_AS, (taken + 64_000_000,) * 2);"
    code += "import sys; from sdcli.cli import app; sys.exit(app.run(arguments))"
    arguments = ["generate", PROMPT, "--model", sd1, "--steps", 1, "--size", "4096x4096", "--output", tmp_path]
    ended = forks.python(code, [str(argument) for argument in arguments])
    assert (ended.code, ended.stdout) == (ExitCode.RESOURCES, "")
    *warned, error = ended.stderr.splitlines()
    assert error == "sdcli: error: out of memory; use a smaller size or batch"
    assert warned and all(line.startswith("sdcli: warning: out of memory: going on with") for line in warned)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback_before_the_line(shell: Shell, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("SDCLI_DEBUG", "1")
    outcome = shell("generate", PROMPT, "--model", "nowhere", *(["--debug"] if how == "option" else []))
    assert outcome.code == ExitCode.INPUT
    assert "Traceback (most recent call last)" in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("sdcli: error: nowhere: no such model")


def test_an_embedding_that_is_a_program_is_refused_by_name(shell: Shell, model: Path, tmp_path: Path) -> None:
    torch.save({"string_to_param": Path("x")}, tmp_path / "evil.pt")  # a call of pathlib's, harmless as it is
    before = tree(tmp_path)
    outcome = shell("generate", PROMPT, "--model", model, "--output", "out", "--embedding", "evil.pt")
    check(outcome, ExitCode.INPUT, "evil.pt: holds pathlib.PosixPath, which is code and was not run; get the same as")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_the_codec_fails_with_one_line_and_leaves_nothing(
    shell: Shell, model: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    before = tree(tmp_path)
    name = "broken.png" if command == "encode" else "broken.safetensors"
    for arguments, code, said in [
        (["none.png"], ExitCode.INPUT, "none.png: no such file or directory"),
        ([name], ExitCode.INPUT, f"{name}: "),
        ([name, "--if-exists", "ask"], ExitCode.USAGE, "--if-exists ask"),
        ([name, "-o", f"{name}/out"], ExitCode.OUTPUT, f"{name}/out"),
        ([name, "-o", "x.bmp"], ExitCode.USAGE, "--output x.bmp: "),
    ]:
        check(shell(command, "--model", model, *arguments), code, said)
    assert tree(tmp_path) == before


def check(outcome: Outcome, code: ExitCode, said: str, *, is_json: bool = False) -> None:
    """One line, of the right form, saying what is wrong; nothing on stdout."""
    assert outcome.data == b""
    assert outcome.stderr.endswith("\n") and outcome.stderr.count("\n") == 1
    line = outcome.stderr.removesuffix("\n")
    if is_json:
        row = json.loads(line)
        assert row.keys() == {"error", "hint", "exit_code"}
        assert row["exit_code"] == code
        line = "sdcli: error: " + row["error"].replace("\x1b", r"\x1b").replace("\n", r"\n") + "; " + row["hint"]
    assert line.isprintable()
    assert line.startswith("sdcli: error: ") and said in line
    assert line.partition("; ")[2]
    assert outcome.code == code
