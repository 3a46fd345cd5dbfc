"""Training runs: their commands, what two of them must share to be called the same, what may befall a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMON = ("--init", "tiny", "--steps", 6, "--batch-size", 4, "--lr", 0.001, "--save-every", 2, "--device", "cpu")


def train_vae(data: Path, run: Path) -> tuple[object, ...]:
    """A command that trains a tiny VAE for six steps."""
    return ("train-vae", "--data", data, "--run", run, *COMMON)


def train_unet(data: Path, run: Path, vae_run: Path) -> tuple[object, ...]:
    """A command that trains a tiny model on a trained VAE for six steps, its text encoder along."""
    vae = ("--vae", vae_run / "export")
    return ("train-unet", "--data", data, "--run", run, *vae, "--train-text-encoder", *COMMON)


def final_files(run: Path) -> dict[str, bytes]:
    """All that a run ends with, byte for byte: the newest checkpoint, the metrics, the summary, the export."""
    roots = [newest_checkpoint(run), run / "export", run / "metrics.jsonl", run / "summary.json", run / "config.json"]
    paths = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.is_file()}


def names(run: Path) -> list[str]:
    """Every file and folder of a run."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def newest_checkpoint(run: Path) -> Path:
    """The folder of the checkpoint of the highest step."""
    return max((run / "checkpoints").glob("checkpoint-*"))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": _flip_a_bit,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}
