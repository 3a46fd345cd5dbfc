"""Faults of a dataset: all that are there, none that is not."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.training import faults
from sdcli.training.samples import Fault
from tests.commands import Shell

COUNT = 1000


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs commands in this process."""
    return Shell(capfdbinary, monkeypatch)


def png(seed: int, side: int = 16) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 100,000 x 100,000 px."""
    whole = png(0)
    header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def plant(folder: Path) -> dict[str, str]:
    """Spoil twenty of the pictures or captions; returns the file of each fault with its kind."""
    planted = {}
    for i in range(20):
        picture, caption = folder / f"{i * 50:04}.png", folder / f"{i * 50:04}.txt"
        kind = ("cut", "empty", "suffix", "no caption", "encoding", "duplicate", "bomb", "size")[i % 8]
        if kind == "cut":
            picture.write_bytes(picture.read_bytes()[:-100])
        elif kind == "empty":
            picture.write_bytes(b"")
        elif kind == "suffix":
            Image.open(io.BytesIO(png(i))).save(picture, format="JPEG")
        elif kind == "no caption":
            caption.unlink()
        elif kind == "encoding":
            caption.write_bytes("a café".encode("latin-1"))
        elif kind == "duplicate":
            picture.write_bytes((folder / "0001.png").read_bytes())
        elif kind == "bomb":
            picture.write_bytes(bomb())
        else:
            picture.write_bytes(png(i, side=1))
        path = caption if kind == "encoding" else picture
        planted[path.name] = {"cut": "picture", "empty": "picture", "bomb": "picture"}.get(kind, kind)
    return planted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A thousand whole pictures with their captions."""
    (tmp_path / "images").mkdir()
    for i in range(COUNT):
        (tmp_path / "images" / f"{i:04}.png").write_bytes(png(i))
        (tmp_path / "images" / f"{i:04}.txt").write_text(f"picture {i}", encoding="utf-8")
    return tmp_path / "images"


def found(folder: Path) -> dict[str, str]:
    return {Path(event.path).name: event.kind for event in faults.find(folder) if isinstance(event, Fault)}


def test_twenty_faults_among_a_thousand_pictures_are_named_and_nothing_else(folder: Path) -> None:
    assert found(folder) == {}
    planted = plant(folder)
    assert len(planted) == 20
    assert found(folder) == planted


def test_what_can_be_mended_is_and_the_rest_is_told(shell: Shell, own_pictures: Path) -> None:
    Image.new("RGB", (16, 16)).save(own_pictures / "bar.png", format="JPEG")
    (own_pictures / "dot.txt").write_bytes("a café".encode("latin-1"))
    (own_pictures / "ring.png").write_bytes(b"no picture")
    outcome = shell("dataset", "check", own_pictures, "--fix", "--json")
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert {Path(row["path"]).name: row["is_mended"] for row in rows} == {
        "bar.png": True,
        "dot.txt": True,
        "ring.png": False,
    }
    assert outcome.code == 3
    assert json.loads(outcome.stderr)["error"] == f"{own_pictures}: 1 fault"
    assert (own_pictures / "bar.jpg").is_file() and not (own_pictures / "bar.png").exists()
    assert (own_pictures / "dot.txt").read_text(encoding="utf-8") == "a café"
    (own_pictures / "ring.png").unlink()
    outcome = shell("dataset", "check", own_pictures)
    assert (outcome.code, outcome.stdout) == (0, "")
    assert outcome.stderr == "5 pictures, captions beside the pictures\n"
