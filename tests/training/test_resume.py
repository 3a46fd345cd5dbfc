"""At length: every trainer stopped at every step of twelve, and killed at sixty random writes."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import Forks
from tests.runs import final_files, names

STEPS = 12
KILLS = 60
Command = Callable[[Path], tuple[object, ...]]


@pytest.fixture(params=["vae", "vq", "unet", "lora", "embedding", "8bit"])
def command(request: pytest.FixtureRequest, pictures: Path, unet_run: Path) -> Command:
    """What trains for twelve steps into a folder, everything that a checkpoint may hold switched on."""
    common = ("--data", pictures, "--steps", STEPS, "--batch-size", 4, "--save-every", 5, "--device", "cpu")
    watched = ("--holdout", 0.2, "--validate-every", 4, "--sample-every", 6)
    model = ("--model", unet_run / "export", "--resolution", 16)
    adversary = ("--disc-start", 2, "--disc-layers", 1, "--disc-width", 16)
    if request.param == "8bit":
        pytest.importorskip("bitsandbytes")
    own: dict[str, tuple[object, ...]] = {
        "vae": ("train-vae", "--init", "tiny", *adversary, "--learn-logvar", *watched),
        "vq": ("train-vae", "--init", "tiny", "--regularizer", "vq", "--codebook-size", 16, *watched),
        "unet": ("train-unet", *model, "--train-text-encoder", *watched),
        "lora": ("train-unet", *model, "--lora-rank", 2, *watched),
        "8bit": ("train-unet", *model, "--optimizer", "adamw8bit"),
        "embedding": ("train-embedding", *model, "--token", "<x>", "--init-token", "dot", *watched),
    }
    return lambda run: (*own[request.param], *common, "--run", run)


@pytest.mark.slow
def test_stopped_at_any_step_a_run_ends_as_a_straight_one_bit_for_bit(
    command: Command, forks: Forks, tmp_path: Path
) -> None:
    ended = forks.sdcli(*command(tmp_path / "straight"))
    assert ended.code == 0, ended.stderr
    expected = final_files(tmp_path / "straight")
    for stop in range(1, STEPS):
        run = tmp_path / str(stop)
        assert forks.sdcli(*command(run), "--stop-after", stop).code == 0
        assert forks.sdcli(*command(run)).code == 0
        assert final_files(run) == expected, stop


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_a_straight_one_bit_for_bit(
    command: Command, forks: Forks, tmp_path: Path
) -> None:
    """Ten runs of each trainer, sixty in all, each killed once and begun again."""
    straight = forks.sdcli(*command(tmp_path / "straight"))
    assert straight.code == 0, straight.stderr
    expected = final_files(tmp_path / "straight")
    chance = random.Random(straight.writes)
    for number in range(KILLS // 6):
        run = tmp_path / str(number)
        ended = forks.sdcli(*command(run), at=chance.randrange(3, straight.writes - 10), send=signal.SIGKILL)
        assert ended.code == -signal.SIGKILL
        ended = forks.sdcli(*command(run))
        assert ended.code == 0, ended.stderr
        assert final_files(run) == expected, number
        assert names(run) == names(tmp_path / "straight")
