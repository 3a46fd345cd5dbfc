"""The denoising is shown from noise to the picture."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdcli.pipeline.bundle import load_vae
from sdcli.pipeline.film import FRAME_MS, LAST_MS, MAX_FRAMES, animation, frames, is_kept
from sdcli.pipeline.images import to_images
from sdcli.pipeline.vae import decode_finite


@pytest.mark.parametrize("total", [1, 2, 25, 100, 101, 250, 1999])
def test_an_animation_has_few_frames_evenly_and_always_the_last(total: int) -> None:
    kept = [index for index in range(1, total + 1) if is_kept(index, total)]
    assert kept[-1] == total
    assert len(kept) == total if total <= MAX_FRAMES else MAX_FRAMES / 2 <= len(kept) <= MAX_FRAMES
    assert len({b - a for a, b in itertools.pairwise(kept)}) <= 1


def test_of_no_steps_there_is_one_frame() -> None:
    assert is_kept(0, 0)


def test_wide_latents_are_shown_at_the_spread_of_latents_and_others_as_they_are(sd1: Path) -> None:
    vae = load_vae(sd1, device=torch.device("cpu"), dtype=torch.float32)
    narrow = 0.9 * torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    wide = 14.6 * narrow / narrow.std()
    shown = frames(vae, torch.cat([narrow, wide, narrow / narrow.std()]), is_last=False)
    as_they_are = to_images(decode_finite(vae, narrow))[0]
    assert np.array_equal(np.asarray(shown[0]), np.asarray(as_they_are))
    difference = np.asarray(shown[1]).astype(int) - np.asarray(shown[2]).astype(int)
    assert np.abs(difference).max() <= 1
    (last,) = frames(vae, wide, is_last=True)
    assert np.array_equal(np.asarray(last), np.asarray(to_images(decode_finite(vae, wide))[0]))


def test_the_last_frame_stays_longest_and_it_begins_again() -> None:
    data = animation([Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")])
    with Image.open(io.BytesIO(data)) as film:
        times = []
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            times.append(film.info["duration"])
        assert times == [FRAME_MS, FRAME_MS, LAST_MS]
        assert film.info["loop"] == 0
