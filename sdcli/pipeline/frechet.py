"""Pictures as a network sees them, for the Frechet distance: which network looks, and at what."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sdcli.errors import InputError, SdcliWarning
from sdcli.files import is_folder, read_bytes
from sdcli.pipeline.features import BUILTIN, embedded, lpips, read_weights
from sdcli.pipeline.images import MAX_FILE_BYTES, SUFFIXES, fit, load_image, read_image, to_images, to_pixels
from sdcli.pipeline.inception import FIRST_KEY, inception
from sdcli.pipeline.measures import RunningGaussian

VGG16_KEY = "features.0.weight"
EXPECTED = "expected is the state dict of torchvision's vgg16 or of FID's Inception v3, in .pth or .safetensors"
BATCH_PIXELS = 16 * 256 * 256  # looked at together


class Extractor(Protocol):
    """A network that turns a picture into a vector: `features` (B, 3, H, W) in [-1, 1] -> (B, D)."""

    name: str

    @property
    def device(self) -> torch.device:
        """Where it works."""
        ...

    def features(self, pixels: Tensor) -> Tensor:
        """What pictures show."""
        ...


def extractor(weights: str, device: torch.device) -> Extractor:
    """The network that `weights` asks for: `builtin`, or the file with the weights of VGG16 or of FID's Inception v3.

    Which of them a file holds is found by the names of its tensors.
    Raises InputError when the file cannot be read or holds something else, NumericalError when it holds NaN or Inf.
    """
    if weights == BUILTIN:
        return embedded().to(device)
    path = Path(weights)
    names = read_weights(path).keys()
    if FIRST_KEY in names:
        return inception(path).to(device)
    if VGG16_KEY not in names:
        raise InputError(f"{weights}: holds neither VGG16 nor Inception v3", EXPECTED)
    return lpips(path).to(device)


def pictures(folder: Path) -> list[Path]:
    """Every picture below a folder, in the order of their names. Raises InputError when there is none."""
    named = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    found = sorted(path for path in named if not is_folder(path))
    if not found:
        raise InputError(f"--data {folder}: holds no picture", f"accepted are {', '.join(sorted(SUFFIXES))}")
    return found


def checked(folder: Path, paths: Sequence[Path]) -> Generator[tuple[int, int], None, str]:
    """Read and decode all pictures of a folder; yields how many are done, and of how many.

    Returns the hash of their names and bytes. Warns (SdcliWarning) of an animation, of which the first frame is taken.
    Raises InputError for the first that is no picture, cut short or no regular file.
    """
    digest = hashlib.sha256()
    for number, path in enumerate(paths, start=1):
        data = read_bytes(path, max_bytes=MAX_FILE_BYTES)
        read_image(io.BytesIO(data), path)
        found = hashlib.sha256(data).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {found}\n".encode(errors="surrogateescape"))
        yield number, len(paths)
    return digest.hexdigest()


def look_at_files(
    network: Extractor, paths: Sequence[Path], size: tuple[int, int], seen: RunningGaussian
) -> Iterator[int]:
    """Take picture files into `seen`, scaled and cropped to a size in px; yields how many are done.

    Raises InputError for a file that cannot be read. Of animations `checked` has warned.
    """
    at_once = max(1, BATCH_PIXELS // (size[0] * size[1]))
    for first in range(0, len(paths), at_once):
        batch = paths[first : first + at_once]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SdcliWarning)
            images = [load_image(path) for path in batch]
        look(network, torch.cat([to_pixels(fit(image, *size)) for image in images]), seen)
        yield first + len(batch)


def look_at_drawn(network: Extractor, pixels: Tensor, seen: RunningGaussian) -> None:
    """Take drawn pictures (B, 3, H, W) into `seen` as their files would be: clipped, of 8 bits."""
    look(network, torch.cat([to_pixels(image) for image in to_images(pixels)]), seen)


@torch.no_grad()
def look(network: Extractor, pixels: Tensor, seen: RunningGaussian) -> None:
    """Take what a network sees in pixels (B, 3, H, W) in [-1, 1] into `seen`."""
    seen.add(network.features(pixels.to(network.device)))
