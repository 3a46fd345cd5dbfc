"""Class conditioning and learned variance from pictures to pictures: ten classes that the test draws."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tests.forks import Forks

SIDE, EACH = 16, 12

FIGURES = {
    "bar left": [(2, 1, 5, 14)],
    "bar right": [(10, 1, 13, 14)],
    "bar top": [(1, 2, 14, 5)],
    "bar bottom": [(1, 10, 14, 13)],
    "square": [(4, 4, 11, 11)],
    "cross": [(6, 1, 9, 14), (1, 6, 14, 9)],
    "frame": [(1, 1, 14, 3), (1, 12, 14, 14), (1, 1, 3, 14), (12, 1, 14, 14)],
    "two dots": [(2, 2, 6, 6), (9, 9, 13, 13)],
    "other dots": [(9, 2, 13, 6), (2, 9, 6, 13)],
    "corner": [(1, 1, 14, 4), (1, 1, 4, 14)],
}


def draw(folder: Path) -> None:
    """Twelve pictures a class, each moved a little and in a grey of its own."""
    chance = random.Random(0)
    for name, boxes in FIGURES.items():
        (folder / name).mkdir(parents=True)
        for number in range(EACH):
            image = Image.new("RGB", (SIDE, SIDE), "white")
            x, y, grey = chance.randint(-1, 1), chance.randint(-1, 1), chance.randint(0, 60)
            for left, top, right, bottom in boxes:
                ImageDraw.Draw(image).rectangle((left + x, top + y, right + x, bottom + y), fill=(grey, grey, grey))
            image.save(folder / name / f"{number}.png")


def values(path: Path) -> NDArray[np.float64]:
    return np.asarray(Image.open(path), dtype=np.float64)


@pytest.mark.slow
def test_a_model_trained_on_ten_classes_with_learned_variance_draws_the_class_it_is_asked_for(
    forks: Forks, tmp_path: Path
) -> None:
    draw(tmp_path / "data")
    common = ("--data", tmp_path / "data", "--init", "tiny", "--lr", 3e-3, "--lr-schedule", "linear", "--device", "cpu")
    vae = ("--steps", 400, "--batch-size", 16, "--perceptual-weight", 0, "--run", tmp_path / "vae")
    ended = forks.sdcli("train-vae", *common, *vae)
    assert ended.code == 0, ended.stderr
    flags = ("--condition", "class", "--loss", "hybrid", "--prediction", "v", "--vae", tmp_path / "vae" / "export")
    ended = forks.sdcli("train-unet", *common, *flags, "--steps", 600, "--batch-size", 20, "--run", tmp_path / "unet")
    assert ended.code == 0, ended.stderr
    model = tmp_path / "unet" / "export"
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert config["variance_type"] == "learned_range"
    means = {name: np.mean([values(p) for p in (tmp_path / "data" / name).iterdir()], axis=0) for name in FIGURES}
    right = 0
    for name in FIGURES:
        picture = tmp_path / f"{name}.png"
        settings = ("--scheduler", "ddpm", "--steps", 20, "--guidance", 2, "--seed", 1, "--device", "cpu")
        ended = forks.sdcli("generate", "--class", name, "--model", model, *settings, "--output", picture)
        assert ended.code == 0, ended.stderr
        right += min(means, key=lambda known: float(((means[known] - values(picture)) ** 2).mean())) == name
    assert right >= 9
