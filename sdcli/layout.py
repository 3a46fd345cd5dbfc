"""What the files of a model hold and say, in the diffusers layout or in a single one. Reads headers, never weights.

Where a function takes a `place`, that is either; a `folder` is a folder.
"""

from __future__ import annotations

import copy
import json
import os
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcli.errors import InputError
from sdcli.files import atomic_write, exists, open_regular, read_bytes, reason
from sdcli.headers import parse, read_header
from sdcli.original.checkpoint import REFINER_HINT, SDXL_REFINER, Checkpoint, read_checkpoint

PARTS = {  # folder -> classes
    "vae": ("AutoencoderKL", "VQModel"),
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "class_embedder": ("ClassEmbedder",),
}
ENCODERS = ("text_encoder", "text_encoder_2")  # of Stable Diffusion XL both, of 1.x and 2.x the first
STEMS = dict.fromkeys(PARTS, "diffusion_pytorch_model") | dict.fromkeys(ENCODERS, "model")  # of the weights
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # folders, each of an encoder's
CONDITIONERS = ("text_encoder", "class_embedder")  # a model has one of them
XL_EMBEDDING = "text_time"  # addition_embed_type of XL's UNet: a summary of the prompt, and sizes
VARIANTS = ("", ".fp16")  # the first that is there is read: float32, or as published, before the float16 copy
# diffusers' pipelines with the parts that are read; those of XL have a second text encoder.
PIPELINES, PIPELINES_XL = (
    tuple(f"StableDiffusion{xl}{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")) for xl in ("", "XL")
)
SHARED_MARK = ".huggingface-shared-blobs"  # in a Hub cache's folder of blobs that repositories share
MAX_JSON_BYTES = 2 << 20  # of lists in lists, 45 MB when read; Stable Diffusion XL's index of shards has 0.2 MB
CODE_KEYS = ("auto_map", "quantization_config", "attn_implementation", "custom_pipelines")
MAX_CLASSES = 100_000
MAX_CLASS_NAME = 255  # characters; ImageNet's longest has 121
MAX_CONTEXT_WIDTH = 16_384  # Stable Diffusion's is 768 to 2,048
TOKENIZER_FOLDER = Path(__file__).with_name("builtin") / "model" / "tokenizer"  # CLIP's, whole


def read_json(path: Path, *, within: Path | None = None, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    within, max_bytes: as in `open_regular`. Raises InputError, also for a name that is there twice, of which a reader
    would take either, and in a file within a model for NaN and for code.
    """
    try:
        text = read_bytes(path, max_bytes=max_bytes, within=within)
        value = parse(text, may_hold_nan=within is None)  # as our own journals may
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({reason(error)})", "get the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object", "get the file again")
    if within is not None:
        refuse_code(path, value)
    return value


def read_own(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a model, which lies inside it. Raises InputError as `read_json`."""
    return read_json(folder / name, within=root(folder, folder / name))


def refuse_code(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for what a model's JSON says of code that other programs fetch and run."""
    for key in CODE_KEYS:
        if config.get(key) is not None:
            raise InputError(f"{path}: asks for code with {key}", "only models that bring none are read")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, keys in a stable order."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def root(folder: Path, path: Path | None = None) -> Path:
    """The real folder that every file of a model must lie in, so that no link leads out of it.

    A Hub cache keeps its files as links to ../../../blobs, inside the folder of the repository. What is there may be a
    link in turn to the blobs that all repositories share: if that is so of the file at `path`, it is their folder.
    """
    real = folder.resolve()
    is_snapshot = real.parent.name == "snapshots" and real.parents[1].name.startswith("models--")
    if not is_snapshot:
        return real
    shared = real.parents[2] / "blobs"
    if path is not None and exists(shared / SHARED_MARK) and os.path.realpath(path).startswith(f"{shared}{os.sep}"):
        return shared
    return real.parents[1]


def single_file(place: Path) -> Checkpoint | None:
    """The checkpoint that a place is; None for a folder. Raises InputError as `read_checkpoint`."""
    return read_checkpoint(place) if place.is_file() else None


def config(place: Path, part: str, prediction: str | None = None) -> dict[str, Any]:
    """The config of one part of a model, of `scheduler` too. Raises InputError.

    prediction: what the user says that the UNet predicts, in diffusers' words; on it hangs the native size of a single
    file. None takes the model's own word.
    """
    checkpoint = single_file(place)
    if checkpoint is None:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        found = read_own(place, f"{part}/{name}")
        if part == "scheduler" and "_class_name" not in found:  # else diffusers' defaults would be taken for its own
            raise InputError(f"{place}/{part}/{name}: has no _class_name", "get the file again")
    else:
        if prediction not in (None, checkpoint.scheduler.get("prediction_type")):
            checkpoint = read_checkpoint(place, prediction)
        there = checkpoint.scheduler if part == "scheduler" else checkpoint.configs.get(part)
        if there is None:
            raise InputError(f"{place}: holds no {part}", "name a whole model")
        refuse_code(place, there)
        found = copy.deepcopy(dict(there))
    if part == "scheduler" and prediction is not None:
        found["prediction_type"] = prediction
    return found


def settings(place: Path) -> dict[str, Any]:
    """A model's own defaults (`scheduler, steps, guidance, size`), empty when it states none. Raises InputError."""
    checkpoint = single_file(place)
    if checkpoint is not None:
        return copy.deepcopy(dict(checkpoint.settings))
    path = place / "sdcli.json"
    return read_own(place, "sdcli.json") if os.path.lexists(path) else {}


def tokenizer(place: Path, encoder: str = "text_encoder") -> Path:
    """Where the tokenizer of a text encoder is: a folder, or the single file whose model reads CLIP's own pieces."""
    return place if place.is_file() else place / TOKENIZERS[encoder]


def conditioner(folder: Path) -> str:
    """The part that conditions the UNet of a model: `text_encoder`, which is also what a folder without any lacks.

    Raises InputError when there are two.
    """
    there = [part for part in CONDITIONERS if (folder / part).is_dir()]
    if len(there) > 1:
        raise InputError(f"{folder}: has both {' and '.join(f'{part}/' for part in there)}", "remove one of them")
    return there[0] if there else CONDITIONERS[0]


def encoders(place: Path) -> tuple[str, ...]:
    """The text encoders of a model: two of Stable Diffusion XL, none of one that reads no text.

    Raises InputError as `conditioner` does.
    """
    if conditioner(place) != "text_encoder":
        return ()
    checkpoint = single_file(place)
    has_second = (place / ENCODERS[1]).is_dir() if checkpoint is None else ENCODERS[1] in checkpoint.configs
    return ENCODERS if has_second else ENCODERS[:1]


def is_empty_zero(place: Path) -> bool:
    """Whether an empty negative prompt of Stable Diffusion XL is all zeros; where a model does not say, it is.

    Raises InputError.
    """
    checkpoint = single_file(place)
    index = read_own(place, "model_index.json") if checkpoint is None else checkpoint.index
    value = index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(value, bool):
        what = f"{place}/model_index.json:force_zeros_for_empty_prompt: is {reprlib.repr(value)}"
        raise InputError(what, "expected is true or false")
    return value


def parts(folder: Path) -> tuple[str, ...]:
    """The parts of a model that hold weights. Raises InputError as `conditioner` does."""
    return ("vae", "unet", *(encoders(folder) or (conditioner(folder),)))


def check_kind(folder: Path, name: str | None = None) -> None:
    """Raise InputError unless the index of `folder` says that it is a model of a kind that is read.

    name: what the folder is called in the error, where that is not its path.
    """
    if not (folder / "model_index.json").is_file():
        what = f"{name or folder}: has no model_index.json"
        raise InputError(what, "name the folder of a model in the diffusers layout")
    kind = read_own(folder, "model_index.json").get("_class_name")
    if kind not in (*PIPELINES, *PIPELINES_XL):
        what = f"{name or folder}: is a {reprlib.repr(kind)}"
        raise InputError(what, "only models of Stable Diffusion 1.x, 2.x and XL are supported")


def check_folder(folder: Path, name: str | None = None) -> None:
    """Raise InputError unless `folder` looks like a whole model in the diffusers layout; name: as in `check_kind`."""
    check_kind(folder, name)
    is_xl = read_own(folder, "model_index.json").get("_class_name") in PIPELINES_XL
    if is_xl and (folder / ENCODERS[1]).is_dir() and not (folder / ENCODERS[0]).is_dir():
        raise InputError(f"{name or folder}: is a {SDXL_REFINER}", REFINER_HINT)
    needed = {**dict.fromkeys(parts(folder)), **dict.fromkeys(ENCODERS if is_xl else ())}
    for part in (*needed, *(TOKENIZERS[part] for part in needed if part in TOKENIZERS), "scheduler"):
        if not (folder / part).is_dir():
            raise InputError(f"{name or folder}: has no {part}/", "name the folder of a whole model")


def classes(folder: Path) -> tuple[str, ...] | None:
    """The classes a model draws, none when it is unconditional; None where it has a text encoder.

    Raises InputError as `class_names` and `conditioner` do.
    """
    if conditioner(folder) == "text_encoder":
        return None
    return class_names(config(folder, "class_embedder"))


def class_names(config: Mapping[str, object]) -> tuple[str, ...]:
    """The classes a class embedder knows, by its config and in the order of their indices; none when unconditional.

    Raises InputError when a value is out of range.
    """
    width, names = config.get("width"), config.get("names")
    if type(width) is not int or not 1 <= width <= MAX_CONTEXT_WIDTH:
        raise _no_class_config("width", width, f"an integer from 1 to {MAX_CONTEXT_WIDTH}")
    if not isinstance(names, list) or len(names) > MAX_CLASSES:
        raise _no_class_config("names", names, f"a list of up to {MAX_CLASSES:,} names")
    for name in names:
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_CLASS_NAME or not _is_plain(name):
            expected = f"text of 1 to {MAX_CLASS_NAME} characters without control characters"
            raise _no_class_config("names", name, expected)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise _no_class_config("names", twice[0], "a name of one class alone")
    return tuple(names)


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files that hold the weights of one part of a model: a single one, or every shard its index names.

    Of a model in a single file it is that file.

    Raises InputError when there is none, or one is missing or lies outside the folder.
    """
    if folder.is_file():
        return [folder]
    stem = STEMS[part]
    for variant in VARIANTS:
        single = folder / part / f"{stem}{variant}.safetensors"
        index = folder / part / f"{stem}.safetensors.index{variant}.json"
        if single.exists():
            return _inside(folder, [single])
        if index.exists():
            return _inside(folder, [index.parent / name for name in shard_names(index)])
    raise InputError(f"{folder / part}: has no {stem}.safetensors", "pickled weights are not read; convert them first")


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names. Raises InputError."""
    weight_map = read_own(index.parent.parent, f"{index.parent.name}/{index.name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map", "get the file again")
    return sorted(set(map(str, weight_map.values())))


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises InputError when the header is malformed or the file shorter or longer than it says.
    """
    entries = read_header(path).entries
    start = min((entry.first for entry in entries.values()), default=0)
    return {
        name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.first - start, e.last - start]}
        for name, e in entries.items()
    }


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says besides the tensors; raises as `safetensors_header`."""
    return read_header(path).metadata


def with_sorted_header(data: bytes) -> bytes:
    """A safetensors file whose header's keys are in order: the library leaves that of the metadata to chance."""
    end = 8 + int.from_bytes(data[:8], "little")  # length of the header, header, tensors
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


def _is_plain(name: str) -> bool:
    """Whether a name can be printed and written: no control characters, no halves of surrogate pairs."""
    return not any(unicodedata.category(c) in ("Cc", "Cs") for c in name)


def _no_class_config(key: str, value: object, expected: str) -> InputError:
    return InputError(f"class_embedder/config.json:{key}: is {reprlib.repr(value)}", f"expected is {expected}")


def _inside(folder: Path, paths: list[Path]) -> list[Path]:
    for path in paths:
        open_regular(path, within=root(folder, path)).close()
    return paths
