"""Two processes at half the batch are one at the whole: data parallelism and FSDP on the CPU, through gloo."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from tests.runs import final_files, metrics
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
    shutil.copytree(pictures, out / "pictures")
    for number, path in enumerate(sorted(pictures.glob("*.png"))):
        (out / pair.CLASSES / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / pair.CLASSES / f"class {number % 2}")
    common = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, pair.__file__, str(out / "pictures"), str(unet_run / "export"), str(out)]
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


@pytest.mark.filterwarnings("ignore:the captions of 6 of 6 pictures")
@pytest.mark.parametrize("kind", pair.TASKS)
def test_two_processes_at_half_the_batch_are_one_at_the_whole(kind: str, unet_run: Path, two_processes: Path) -> None:
    # From the same cache of latents: those are float32, and rounded as the number of threads has it.
    alone = pair.run(kind, two_processes / "pictures", unet_run / "export", two_processes / f"cache-{kind}")
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


@pytest.mark.slow
def test_a_command_run_by_two_processes_speaks_once_resumes_and_belongs_to_two(
    pictures: Path, unet_run: Path, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    common = ["--model", str(unet_run / "export"), "--resolution", "16", "--device", "cpu", "--save-every", "3"]
    common += ["--steps", "6", "--holdout", "0.3", "--sample-every", "6", "--data", str(pictures)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def train(launcher: list[str], run: Path, batch_size: int, *more: str) -> subprocess.CompletedProcess[str]:
        command = ["sdcli", "train-unet", *common, "--run", str(run), "--batch-size", str(batch_size), *more]
        prefix = [*launcher, "-m", "--"] if launcher else [sys.executable, "-m"]
        return subprocess.run([*prefix, *command], env=environment, capture_output=True, text=True, check=False)

    two, one = tmp_path / "two", tmp_path / "one"
    assert train(launch, two, 2, "--stop-after", "2").returncode == 0
    ended = train(launch, two, 2)
    assert (ended.returncode, ended.stdout) == (0, f"{two / 'export'}\n"), ended.stderr
    assert train([], one, 4).returncode == 0
    alone, together = ([row["validation"] for row in metrics(run) if "validation" in row] for run in (one, two))
    assert len(together) == 2
    for a, b in zip(alone, together, strict=True):
        assert b == pytest.approx(a, rel=1e-4)  # in float32; the test above has the figures
    steps = [row["step"] for row in metrics(two) if "validation" not in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    refused = train([], two, 2)
    assert (refused.returncode, "processes was 2 and is 1 now" in refused.stderr) == (3, True)


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_equal_leaves_what_others_do_and_goes_on_without_shards(
    pictures: Path, unet_run: Path, tmp_path: Path
) -> None:
    common = ["--model", str(unet_run / "export"), "--data", str(pictures), "--resolution", "16", "--device", "cpu"]
    common += ["--steps", "6", "--save-every", "3", "--holdout", "0.3", "--sample-every", "6", "--batch-size", "2"]

    def train(run: str, *more: str, is_sharded: bool) -> str:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "--"]
        command = [sys.executable, *launch, "sdcli", "train-unet", *common, "--run", str(tmp_path / run), *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FSDP_VERSION": "2"}
        environment["ACCELERATE_USE_FSDP"] = str(is_sharded).lower()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert train("straight", is_sharded=True) == f"{tmp_path / 'straight' / 'export'}\n"
    train("parts", "--stop-after", "2", is_sharded=True)
    shutil.copytree(tmp_path / "parts", tmp_path / "mixed")
    train("parts", is_sharded=True)
    train("mixed", is_sharded=False)
    straight, parts, mixed = (final_files(tmp_path / name) for name in ("straight", "parts", "mixed"))
    assert parts == straight
    assert mixed.keys() == straight.keys()
    for name in (name for name in straight if name.endswith("safetensors") and "rng" not in name):
        ours, theirs = load(straight[name]), load(mixed[name])
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)
