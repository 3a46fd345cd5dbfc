"""The README's examples, run as they stand but for the numbers of steps."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdcli import store
from sdcli.cli.app import COMMANDS, run
from sdcli.errors import ExitCode
from sdcli.pipeline.adapters import Embedding, write_embedding
from sdcli.plan.parts import text_widths
from tests.models import write_lora

README = Path(__file__).parents[1] / "README.md"
NEEDS_THE_HUB = "stable-diffusion-"


def commands() -> list[str]:
    """Every line of the README's shell blocks that calls sdcli and needs no download."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r"(^|\| )sdcli ", line) and NEEDS_THE_HUB not in line]


def shortened(line: str) -> str:
    """The same command, but in short: two steps of training, four of drawing, two schedulers, an idle moment."""
    if line.startswith("sdcli serve"):
        return re.sub(r"--idle \S+ &", "--idle 0.1s", line)
    if line.startswith("sdcli bench"):
        line = re.sub(r"--(schedulers|steps|seeds) \S+", "", line)
        return line + " --schedulers ddim,dpm --steps 1,2 --reference-steps 4 --prompt 'a penguin'"
    if line.startswith("sdcli generate") and not re.search(r"--init-image|[|>]", line):
        return re.sub(r"--steps \d+", "", line) + " --steps 4"
    if not line.startswith("sdcli train-"):
        return line
    return re.sub(r"--steps \d+", "--steps 2", line) if "--steps" in line else line + " --steps 2"


def test_every_example_works_in_the_order_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _draw_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in commands():
        if "|" in line or ">" in line:
            _run_in_a_shell(shortened(line))
            continue
        assert run(shlex.split(shortened(line))[1:]) is ExitCode.OK, f"{line}\n{capfd.readouterr().err}"
    drawn = {"penguin.png", "apple.png", "cat.png", "back.png", "a-picture-of-a-puppy-7.png"}
    assert drawn <= {path.name for path in tmp_path.iterdir()}
    assert Image.open(tmp_path / "cat.png").size == (64, 64)


def test_every_command_has_an_example() -> None:
    text = "\n".join(commands())
    assert [name for name in COMMANDS if f"sdcli {name}" not in text] == []


def test_make_targets_named_in_the_readme_exist() -> None:
    named = re.findall(r"make ([a-z-]+)", README.read_text(encoding="utf-8"))
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= set(named)
    assert [name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []


def _run_in_a_shell(line: str) -> None:
    command = line.replace("sdcli ", f"{shlex.quote(sys.executable)} -m sdcli ")
    subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, capture_output=True)


def _draw_inputs(folder: Path) -> None:
    for place in ("images", "photos"):
        (folder / place).mkdir()
        for i, name in enumerate(("cat", "dog", "car", "sun")):
            Image.new("RGB", (64, 64), (60 * i, 90, 120)).save(folder / place / f"{name}.png")
            (folder / place / f"{name}.txt").write_text(f"a {name}\n", encoding="utf-8")
    for number, place in enumerate(("cat", "classes/cats", "classes/dogs")):
        (folder / place).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (90 * number, 80 * i, 120)).save(folder / place / f"{i}.png")
    Image.new("RGB", (96, 64), "orange").save(folder / "photo.png")
    Image.linear_gradient("L").resize((96, 64)).save(folder / "mask.png")
    _write_jobs(folder)
    for name in ("blue", "ink"):
        write_lora(folder / f"{name}.safetensors", store.BUILTIN_FOLDER, gain=0.001)
    width, _ = text_widths(store.BUILTIN_FOLDER)
    write_embedding(folder, Embedding("my-style", torch.randn(2, width, generator=torch.Generator().manual_seed(0))))


def _write_jobs(folder: Path) -> None:
    (jobs,) = re.findall(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (folder / "jobs.jsonl").write_text(jobs, encoding="utf-8")
    (folder / "prompts.txt").write_text("a penguin\na bee\n", encoding="utf-8")
