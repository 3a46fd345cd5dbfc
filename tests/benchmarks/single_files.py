"""Compare what is read of single files at real size with diffusers' own converter, tensor by tensor, and time it.

    python -m tests.benchmarks.single_files [--kinds 1.5,2.1,xl] [--dtypes float32,float16] [--folder DIR] [--json]

Each file is written with random weights in the authors' naming, looked at, and removed: 4.3 GB of 1.5 in float32, 13.9
of XL. What takes the time is reading every number of it twice.
"""

import argparse
import json
import math
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils as oracle
from safetensors import safe_open
from torch import Tensor

from sdcli.original.checkpoint import Checkpoint, read_checkpoint
from sdcli.pipeline.weights import read_state
from tests import originals

KINDS = {"1.5": originals.REAL_SD1, "2.1": originals.REAL_SD2, "xl": originals.REAL_SDXL}
FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def main() -> None:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description="Compare single files of real size with diffusers' converter.")
    parser.add_argument("--kinds", default="1.5", help="some of 1.5, 2.1 and xl (default 1.5)")
    parser.add_argument("--dtypes", default="float32,float16", help="of the weights (default float32,float16)")
    parser.add_argument("--folder", type=Path, help="where the files are put (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for kind in given.kinds.split(","):
            for dtype in given.dtypes.split(","):
                row = {"kind": kind, "dtype": dtype} | compare(Path(folder) / "m.safetensors", KINDS[kind], dtype)
                words = ", ".join(f"{key} {value}" for key, value in row.items())
                sys.stdout.write(f"{json.dumps(row) if given.json else words}\n")
                sys.stdout.flush()


def compare(path: Path, kind: originals.Kind, dtype: str) -> dict[str, object]:
    """Write a checkpoint and read it in both ways; the tensors that differ are named."""
    write(path, kind, dtype)
    began = time.process_time()
    checkpoint = read_checkpoint(path)
    parts = {part: read_state(path, part) for part in checkpoint.sources}
    seconds = time.process_time() - began
    different, count = [], 0
    for part, state in parts.items():
        expected = converted(path, part, checkpoint)
        different += [f"{part}.{key}" for key in sorted(expected.keys() ^ state.keys())]
        for key, value in expected.items():
            count += 1
            if key in state and (value.dtype != state[key].dtype or not torch.equal(value, state[key])):
                different.append(f"{part}.{key}")
    size = path.stat().st_size
    path.unlink()
    return {"bytes": size, "tensors": count, "different": different, "seconds_to_read": round(seconds, 3)}


def converted(path: Path, part: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What diffusers makes of one part, under our modules' names."""
    with safe_open(path, framework="pt") as file:
        whole = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    if part == "unet":
        return dict(oracle.convert_ldm_unet_checkpoint(whole, dict(checkpoint.configs[part])))
    if part == "vae":
        return dict(oracle.convert_ldm_vae_checkpoint(whole, dict(checkpoint.configs[part])))
    if part == "text_encoder_2":
        return dict(oracle.convert_open_clip_checkpoint(None, whole, prefix=originals.OPEN_CLIP_XL))
    if checkpoint.family.startswith("Stable Diffusion 2"):
        whole["cond_stage_model.model.text_projection"] = torch.empty(1024, 1024)  # it asks this for the width
        found = oracle.convert_open_clip_checkpoint(None, whole)
    else:
        found = oracle.convert_ldm_clip_checkpoint(whole)
    names = (key for key in found if not key.endswith(("text_projection.weight", "position_ids")))
    return {key.removeprefix("text_model."): found[key] for key in names}


def write(path: Path, kind: originals.Kind, dtype: str) -> None:
    """A checkpoint of random weights, written tensor by tensor: none but the one at hand takes memory."""
    header, end, shapes = {}, 0, originals.shapes(kind)
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    for key, shape in shapes.items():
        begin, end = end, end + width * math.prod(shape)
        header[key] = {"dtype": FORMATS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header | {"__metadata__": {"modelspec.prediction_type": "epsilon"}}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in _weights(shapes, getattr(torch, dtype)):
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _weights(shapes: originals.Shapes, dtype: torch.dtype) -> Iterator[Tensor]:
    chance = torch.Generator().manual_seed(0)
    for shape in shapes.values():
        yield torch.rand(shape, generator=chance).sub_(0.5).mul_(0.1).to(dtype)


if __name__ == "__main__":
    main()
