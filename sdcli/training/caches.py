"""What never changes in a run, computed once and kept on disk: posterior moments of pictures, contexts of captions."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdcli.files import atomic_write, make_folder, output_error
from sdcli.pipeline import text
from sdcli.pipeline import vae as latent
from sdcli.train_specs import TrainSpec
from sdcli.training import data
from sdcli.training.loop import Preparing

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import TextEncoder, Vae

Size = tuple[int, int]  # width, height in px
CONTEXTS = "contexts"
MAX_CONTEXT_BYTES = 4 << 30


@dataclass(frozen=True)
class Moments:
    """Mean and log-variance of every sample's posterior, unscaled, float32, mapped from disk."""

    tables: Mapping[str, Tensor]  # `WxH` -> (n, 2C, H/f, W/f)
    places: Sequence[tuple[str, int]]  # sample -> table and row

    def __getitem__(self, sample: int) -> Tensor:
        """The moments of one sample: (1, 2C, h, w)."""
        table, row = self.places[sample]
        return self.tables[table][row : row + 1]

    def groups(self, samples: Sequence[int]) -> list[list[int]]:
        """The samples by the size of their latents: what can lie in one batch."""
        found: dict[str, list[int]] = {}
        for sample in samples:
            found.setdefault(self.places[sample][0], []).append(sample)
        return [found[name] for name in sorted(found)]


def moments(
    folder: Path, vae: Vae, dataset: data.Dataset, sizes: Sequence[Size], spec: TrainSpec, accelerator: Accelerator
) -> Generator[Preparing, None, Moments]:
    """The moments of every sample: from a file in `folder`, which the first process fills while the others wait.

    sizes: of each of `dataset.pictures` as trained on.
    """
    path = folder / "moments.safetensors"
    if accelerator.is_main_process:
        is_bfloat16 = spec.mixed_precision == "bf16"  # in float16 many a VAE overflows
        yield from fill_moments(
            path, vae, dataset, sizes, batch_size=spec.batch_size, workers=spec.workers, is_bfloat16=is_bfloat16
        )
    accelerator.wait_for_everyone()
    places: dict[Path, tuple[str, int]] = {}
    for size, rows in _by_size(sizes).items():
        places |= {dataset.pictures[i].place: (_name(size), row) for row, i in enumerate(rows)}
    return Moments(load_file(path), [places[sample.place] for sample in dataset.samples])


@torch.no_grad()
def fill_moments(
    path: Path,
    vae: Vae,
    dataset: data.Dataset,
    sizes: Sequence[Size],
    *,
    batch_size: int,
    workers: int = 2,
    is_bfloat16: bool = False,
) -> Iterator[Preparing]:
    """Encode every picture once, however often an epoch shows it, unless `path` holds that already.

    sizes: of each of `dataset.pictures` as trained on. is_bfloat16: compute in bfloat16. The file lies in a run folder,
    whose settings, data and VAE cannot change: being there, whole, is being right. Memory stays flat. Raises
    OutputError.
    """
    members = _by_size(sizes)
    factor, channels = latent.factor(vae), 2 * int(vae.config["latent_channels"])
    shapes = {
        _name(size): (len(rows), channels, size[1] // factor, size[0] // factor) for size, rows in members.items()
    }
    if _is_whole(path, shapes):
        return
    device, pictures = next(vae.parameters()).device, dataset.pictures

    def rows() -> Iterator[Tensor]:
        with data.readers(workers) as readers:
            for size, ids in members.items():
                for first in range(0, len(ids), batch_size):
                    chosen = [pictures[i] for i in ids[first : first + batch_size]]
                    pixels = torch.cat(list(readers.map(lambda one, s=size: data.load_pixels(one, s), chosen)))
                    with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
                        mean, logvar = latent.moments(vae, pixels.to(device))
                    yield torch.cat([mean, logvar], dim=1).float().cpu()

    done = 0
    for count in _written(path, shapes, rows()):
        done += count
        yield Preparing("caching latents", done, len(pictures))


def context_bytes(encoder: TextEncoder, captions: int) -> int:
    """The size of the context of so many captions."""
    config = encoder.model.config
    return 4 * captions * int(config.max_position_embeddings) * int(config.hidden_size)


@torch.no_grad()
def fill_contexts(path: Path, encoder: TextEncoder, captions: Sequence[str], *, batch_size: int) -> Iterator[Preparing]:
    """Encode every caption once, unless `path` holds that already; as `fill_moments`."""
    config = encoder.model.config
    shapes = {CONTEXTS: (len(captions), int(config.max_position_embeddings), int(config.hidden_size))}
    if _is_whole(path, shapes):
        return

    def rows() -> Iterator[Tensor]:
        for first in range(0, len(captions), batch_size):
            tokens = [text.tokenize(encoder, caption) for caption in captions[first : first + batch_size]]
            yield text.encode(encoder, tokens).float().cpu()

    done = 0
    for count in _written(path, shapes, rows()):
        done += count
        yield Preparing("caching captions", done, len(captions))


def contexts(path: Path) -> Tensor:
    """What `fill_contexts` wrote: (captions, 77, D) float32, mapped from disk."""
    return load_file(path)[CONTEXTS]


def _by_size(sizes: Sequence[Size]) -> dict[Size, list[int]]:
    found: dict[Size, list[int]] = {}
    for i, size in enumerate(sizes):
        found.setdefault(size, []).append(i)
    return dict(sorted(found.items()))


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _written(path: Path, shapes: Mapping[str, Sequence[int]], rows: Iterator[Tensor]) -> Generator[int, None, None]:
    """Write float32 tensors row by row, in the order of `shapes`, as a safetensors file; yields how many each time."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text_header = json.dumps(header).encode()
    text_header += b" " * (-len(text_header) % 8)  # the format wants the data aligned
    make_folder(path.parent)
    try:
        with atomic_write(path) as part, part.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text_header)) + text_header)
            for batch in rows:
                stream.write(batch.contiguous().numpy().tobytes())
                yield len(batch)
    except OSError as error:
        raise output_error(path, error) from error


def _is_whole(path: Path, shapes: Mapping[str, Sequence[int]]) -> bool:
    if not path.exists():
        return False
    try:
        return {name: tuple(value.shape) for name, value in load_file(path).items()} == {
            name: tuple(shape) for name, shape in shapes.items()
        }
    except (SafetensorError, OSError):
        return False
