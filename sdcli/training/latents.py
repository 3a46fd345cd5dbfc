"""The posterior moments of every picture, computed once a run and kept on disk."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdcli.files import make_folder
from sdcli.pipeline import vae as latent
from sdcli.training import checkpoint, data
from sdcli.training.loop import Preparing

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

KEY = "moments"


@torch.no_grad()
def cached(
    path: Path, vae: AutoencoderKL, dataset: data.Dataset, *, resolution: int, batch_size: int, workers: int = 2
) -> Generator[Preparing, None, Tensor]:
    """Mean and log-variance of every sample, from `path` if they are there, else encoded now and written there.

    A picture that an epoch shows several times is encoded once.

    The file lies in a run folder, whose settings, data and VAE cannot change: being there, whole, is being right.
    Returns (N, 2C, h, w) float32, unscaled, mapped from disk.
    """
    pictures = dataset.pictures
    count = len(pictures)
    if not _is_whole(path, count):
        rows: list[Tensor] = []
        device = next(vae.parameters()).device
        with ThreadPoolExecutor(workers) as readers:
            for first in range(0, count, batch_size):
                samples = pictures[first : first + batch_size]
                pixels = torch.cat(list(readers.map(lambda s: data.load_pixels(s, resolution), samples)))
                rows.append(torch.cat(latent.moments(vae, pixels.to(device)), dim=1).float().cpu())
                yield Preparing("caching latents", min(first + batch_size, count), count)
        make_folder(path.parent)
        checkpoint.write_tensors(path, {KEY: torch.cat(rows)})
    rows_of_pictures = load_file(path)[KEY]
    if count == len(dataset.samples):
        return rows_of_pictures
    row = {picture.place: i for i, picture in enumerate(pictures)}
    return rows_of_pictures[[row[sample.place] for sample in dataset.samples]]


def _is_whole(path: Path, count: int) -> bool:
    if not path.exists():
        return False
    try:
        return load_file(path)[KEY].shape[0] == count
    except (SafetensorError, KeyError, OSError):
        return False
