"""Two processes at half the batch are one at the whole: data parallelism on the CPU, through gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training import pair

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def two_processes(pictures: Path, unet_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left what they agree on."""
    out = tmp_path_factory.mktemp("pair")
    common = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, pair.__file__, str(pictures), str(unet_run / "export"), str(out)]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
    return out


@pytest.mark.parametrize("kind", pair.TASKS)
def test_two_processes_at_half_the_batch_are_one_at_the_whole(
    kind: str, pictures: Path, unet_run: Path, two_processes: Path
) -> None:
    # From the same cache of latents: those are float32, and rounded as the number of threads has it.
    alone = pair.run(kind, pictures, unet_run / "export", two_processes / f"cache-{kind}")
    together = load_file(two_processes / f"{kind}.safetensors")
    assert alone.keys() == together.keys()
    assert any(name.startswith("grad.") for name in alone)
    largest = max(float(value.abs().max()) for name, value in alone.items() if name.startswith("grad."))
    for name, value in alone.items():
        apart = float((together[name] - value).abs().max())
        if name.startswith("grad."):  # a bias before a norm has none but that of rounding
            assert apart <= 1e-5 * max(float(value.abs().max()), 1e-9 * largest), name
        else:
            assert apart <= 1e-8, name
    if kind == "vae":
        assert any(name.startswith("weight.critic.") for name in alone)
