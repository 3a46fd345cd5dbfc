"""Run a command in the test's own process, as the shell would see it: exit code, bytes on stdout, text on stderr."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdcli.cli.app import run


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    data: bytes
    stderr: str

    @property
    def stdout(self) -> str:
        return self.data.decode()

    @property
    def lines(self) -> list[str]:
        return self.stdout.splitlines()


class Shell:
    """Runs commands; made by the fixture `shell` of the tests that use it."""

    def __init__(self, capture: pytest.CaptureFixture[bytes], patch: pytest.MonkeyPatch) -> None:
        self._capture, self._patch = capture, patch

    def __call__(self, *arguments: object, stdin: bytes = b"") -> Outcome:
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self._capture.readouterr()
        code = run([str(argument) for argument in arguments])
        data, words = self._capture.readouterr()
        return Outcome(int(code), data, words.decode())


def tree(folder: Path) -> dict[str, Any]:
    """Every file below a folder with its bytes, and every folder: to see that nothing was left or changed."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
