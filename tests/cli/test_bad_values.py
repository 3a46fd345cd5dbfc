"""Every option of every command refuses a bad value in one line, before weights are read or a file is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image
from safetensors.torch import save_file

from sdcli import __version__, store
from sdcli.cli.app import COMMANDS, command_tree
from sdcli.errors import ExitCode
from sdcli.output import escape
from sdcli.pipeline.metadata import png_bytes
from tests import models
from tests.bad_values import BAD, ENOUGH
from tests.commands import Shell, tree

RECORD = {
    "prompt": "a cat",
    "negative": "",
    "model": "model",
    "seed": 7,
    "sdcli": __version__,
    "width": models.SIZE,
    "height": models.SIZE,
    "scheduler": "dpm",
    "steps": 5,
    "evaluations": 5,
    "guidance": 3.0,
    "seconds": 0.1,
    "tokens": {"kept": 2, "cut": 0, "chunks": 1},
}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its name, as Typer parses it."""

    def walk(command: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        below = getattr(command, "commands", None)
        if below is None:
            yield " ".join(names), command
            return
        for name, one in below.items():
            yield from walk(one, (*names, name))

    for name in COMMANDS:
        root: Any = typer.main.get_command(command_tree([name]))
        yield from walk(root.commands[name], (name,))


def parameters(*, are_flags: bool) -> Iterator[tuple[str, str]]:
    """Each command with each of its parameters that are flags, or are none: options by their long name."""
    for name, command in commands():
        for one in command.params:
            if getattr(one, "is_flag", False) == are_flags:
                yield name, one.opts[0] if one.param_type_name == "option" else one.name


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, sd1: Path) -> Path:
    """A folder with one of each thing that a command may be given."""
    folder = tmp_path_factory.mktemp("there")
    model = models.copy(sd1, folder / "model")
    for part in ("unet", "vae", "text_encoder"):
        models.weight_file(model / part).write_bytes(b"")
    image = Image.new("RGB", (models.SIZE, models.SIZE))
    image.save(folder / "photo.png")
    model_hash = store.model_hash(store.resolve(str(model)))
    (folder / "drawn.png").write_bytes(png_bytes(image, RECORD | {"model_hash": model_hash}))
    save_file({"latents": torch.zeros(1, *models.LATENTS)}, folder / "noise.safetensors", {"mode": "noise"})
    (folder / "jobs.jsonl").write_text('{"prompt": "a cat"}\n', encoding="utf-8")
    (folder / "file").write_bytes(b"no picture")
    (folder / "images").mkdir()
    for name in ("one", "two"):
        shutil.copy(folder / "photo.png", folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text("a <x>", encoding="utf-8")
    return folder


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, there: Path) -> Shell:
    monkeypatch.chdir(there)
    for name in ("SDCLI_DEVICE", "SDCLI_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDCLI_MODEL", "model")
    monkeypatch.setenv("SDCLI_OFFLINE", "1")
    return Shell(capfdbinary, monkeypatch)


def refused(shell: Shell, there: Path, arguments: list[str], name: str, value: str) -> None:
    """Run a command that must fail at once, cleanly, and tell in one line of the option or of what it was given."""
    before = tree(there)
    outcome = shell(*arguments)
    line = outcome.stderr.removesuffix("\n")
    assert (outcome.data, line.startswith("sdcli: error: "), line.isprintable()) == (b"", True, True), line
    assert outcome.code in (ExitCode.USAGE, ExitCode.INPUT, ExitCode.OUTPUT), line
    assert name in line or (len(value) > 2 and escape(value) in line)
    assert tree(there) == before


def test_every_parameter_has_a_bad_value_to_be_tried() -> None:
    known = {(name, one) for name, some in BAD.items() for one in some}
    assert set(parameters(are_flags=False)) == known, "every one needs its line in tests/bad_values.py"


@pytest.mark.parametrize(("command", "parameter"), [(name, one) for name, some in BAD.items() for one in some])
def test_a_bad_value_is_refused_by_name(shell: Shell, there: Path, command: str, parameter: str) -> None:
    bad = BAD[command][parameter]
    value, *others = (bad,) if isinstance(bad, str) else bad
    if parameter.startswith("--"):
        arguments = [*command.split(), *ENOUGH[command], *others, parameter, value]
    else:
        arguments = [*command.split(), value, *ENOUGH[command][1:], *others]
    refused(shell, there, arguments, parameter, value)


@pytest.mark.parametrize(("command", "flag"), list(parameters(are_flags=True)))
def test_a_flag_takes_no_value(shell: Shell, there: Path, command: str, flag: str) -> None:
    refused(shell, there, [*command.split(), *ENOUGH[command], f"{flag}=maybe"], flag, "")
