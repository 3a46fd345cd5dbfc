"""Textual-inversion files, in all their dialects, <-> a learned token and its vectors.

| dialect   | file                  | holds                                                                       |
|-----------|-----------------------|-----------------------------------------------------------------------------|
| diffusers | .safetensors or .bin  | the vectors under the token                                                 |
| A1111     | .pt                   | `string_to_param` (the vectors under `*`), `string_to_token`, `name`, `step` |
| A1111     | .png                  | the same as JSON in base64, as text `sd-ti-embedding`                       |
| kohya     | .safetensors          | the vectors under `emb_params`; the token is the name of the file           |
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sdcli.errors import InputError, NumericalError
from sdcli.files import atomic_write, open_regular, read_bytes, reason
from sdcli.pipeline.adapter_facts import check_pair, check_widths, embedding_facts, encoder_keys, lora_facts
from sdcli.pipeline.containers import PNG_HEAD, look_inside
from sdcli.pipeline.lora_keys import ending_of, first_keys
from sdcli.pipeline.pickles import Value, read_pickle

MAX_BYTES = 16 << 20
MAX_VECTORS = 75  # as many as a prompt has room for
MAX_TOKEN_LENGTH = 100  # characters
MAX_STEM_BYTES = 200
PNG_KEYWORD, PNG_TENSOR = "sd-ti-embedding", "TORCHTENSOR"
STAR_ID = 265  # CLIP's id of "*", which A1111 writes as the token that was trained


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word that a text encoder has learned: how a prompt writes it, and the vectors that stand for it."""

    token: str
    vectors: Tensor  # (n, D) float32
    second: Tensor | None = None  # (n, D of that) for the second text encoder of Stable Diffusion XL


def read_embedding(path: Path, *, width: int, second: int | None = None, token: str | None = None) -> Embedding:
    """The learned token in a textual-inversion file of any dialect; by its content, whatever its suffix.

    width: of the text encoder it is for (D). second: of the other one where the model has two: the file holds a pair.
    token: what prompts shall write instead of the file's own token.
    Raises InputError when the file is malformed, unsafe, of more than 75 vectors or for another family of models,
    NumericalError when its vectors are not finite.
    """
    own, values = _token_and_values(path, _contents(path))
    chosen = own if token is None else token
    check_token(chosen, str(path))
    found = [_vectors(path, value) for value in values]
    check_widths(str(path), [one.shape[1] for one in found], [width] if second is None else [width, second])
    if len(found[0]) != len(found[-1]):
        what = f"{path}: holds {len(found[0])} vectors for the first text encoder, {len(found[1])} for the second"
        raise InputError(what, "get the file again")
    return Embedding(chosen, *found)


def describe_pickle(path: Path, *, max_bytes: int) -> dict[str, Any] | None:
    """What `adapter_facts.describe` tells, of a file of torch.save; None for one that is no adapter.

    Raises InputError for a file that is malformed, unsafe, or has more than max_bytes.
    """
    return _described(path, read_pickle(path, max_bytes=max_bytes))


def write_embedding(folder: Path, embedding: Embedding, *, step: int = 0) -> tuple[Path, ...]:
    """Write an embedding in every dialect: `NAME.safetensors` (diffusers), `NAME.pt` (A1111), `NAME-kohya.safetensors`.

    NAME is the token without what file names should not hold (`<my-cat>` -> `my-cat`); files of that name are replaced.
    step: of the training, for the A1111 file. The same embedding and step give the same bytes.
    Raises NumericalError when the vectors are not finite, OutputError when a file cannot be written.
    """
    check_token(embedding.token, str(folder))
    vectors = embedding.vectors.detach().to("cpu", torch.float32).clone()  # of a larger table, all would be written
    if not vectors.isfinite().all():
        raise NumericalError(f"the vectors of {embedding.token} are not finite", "nothing was written")
    stem = _stem(embedding.token)
    contents = {
        f"{stem}.safetensors": save({embedding.token: vectors}),
        f"{stem}.pt": _a1111_bytes(embedding.token, vectors, step),
        f"{stem}-kohya.safetensors": save({"emb_params": vectors}),
    }
    for name, data in contents.items():
        with atomic_write(folder / name) as part:
            part.write_bytes(data)
    return tuple(folder / name for name in contents)


def check_token(token: str, where: str) -> None:
    """Raise InputError unless a prompt can name a token. where: the file or option it comes from."""
    is_plain = token.isprintable() and token == token.strip() and token != "__metadata__"  # a key of safetensors' own
    if not is_plain or not 1 <= len(token) <= MAX_TOKEN_LENGTH:
        what = f"{where}: no prompt can name the token {token[:MAX_TOKEN_LENGTH]!r}"
        raise InputError(what, f"use 1 to {MAX_TOKEN_LENGTH} printable characters, such as <my-cat>")


def _described(path: Path, value: Value) -> dict[str, Any] | None:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        return None
    if "string_to_param" in value:
        token, (vectors,) = _a1111(path, value)
        facts = embedding_facts({token: tuple(_vectors(path, vectors).shape)})
        return {**facts, "dialects": ["A1111"]} if facts is not None else None
    shapes = {str(key): tuple(one.shape) for key, one in value.items() if isinstance(one, Tensor)}
    if len(shapes) < len(value):
        return None
    if any(map(ending_of, shapes)):
        alphas = (one for key, one in value.items() if str(key).endswith(".alpha"))
        return lora_facts(
            shapes, {}, Counter(float(one) for one in alphas if isinstance(one, Tensor) and one.numel() == 1)
        )
    return embedding_facts(shapes)


def _contents(path: Path) -> Mapping[str | int, Value]:
    with open_regular(path, max_bytes=MAX_BYTES) as stream:
        start = stream.read(9)
    if start.startswith(PNG_HEAD):
        return _from_picture(path)
    if start[8:] == b"{":  # safetensors: eight bytes of length, then JSON
        try:
            return dict[str | int, Value](load(read_bytes(path, max_bytes=MAX_BYTES)).items())
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})", "get the file again") from error
    value = read_pickle(path, max_bytes=MAX_BYTES)
    if not isinstance(value, dict):
        raise _no_embedding(path, f"a {type(value).__name__}")
    return value


def _from_picture(path: Path) -> Mapping[str | int, Value]:
    """What A1111 wrote into the text of a picture: its file as JSON, every tensor a dict of nested lists.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion/image_embedding.py.
    """
    text = look_inside(read_bytes(path, max_bytes=MAX_BYTES), path).texts.get(PNG_KEYWORD)
    if text is None:
        what = f"{path}: has no embedding in its text; one that is hidden in the pixels is not read"
        raise InputError(what, "use the .pt or .safetensors file of the same embedding")
    try:
        value = json.loads(base64.b64decode(text, validate=True), object_hook=_tensor_or_dict)
    except (ValueError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: its {PNG_KEYWORD} cannot be read ({reason(error)})", "get the file again") from error
    if not isinstance(value, dict):
        raise _no_embedding(path, f"a {type(value).__name__}")
    return value


def _tensor_or_dict(found: dict[str, Any]) -> Any:
    return torch.tensor(found[PNG_TENSOR], dtype=torch.float32) if PNG_TENSOR in found else found


def _token_and_values(path: Path, contents: Mapping[str | int, Value]) -> tuple[str, tuple[Value, ...]]:
    """The token a file names, and what stands where its dialect has the vectors: one for each text encoder."""
    check_pair(str(path), contents)
    keys = encoder_keys(contents)
    if keys is not None:
        return path.stem, tuple(contents[key] for key in keys)
    if "string_to_param" in contents:
        return _a1111(path, contents)
    if "emb_params" in contents:
        return path.stem, (contents["emb_params"],)
    if any(ending_of(str(key)) for key in contents):
        raise InputError(f"{path}: is a LoRA file", "give it to --lora")
    if len(contents) != 1:
        raise _no_embedding(path, f"{len(contents)} entries ({first_keys(contents)})")
    ((token, vectors),) = contents.items()
    return str(token), (vectors,)


def _a1111(path: Path, contents: Mapping[str | int, Value]) -> tuple[str, tuple[Value, ...]]:
    learned, name = contents["string_to_param"], contents.get("name")
    if isinstance(learned, dict):
        learned = learned.get("_parameters", learned)  # of an nn.ParameterDict
    if not isinstance(learned, dict) or len(learned) != 1:
        raise _no_embedding(path, "not one tensor in string_to_param")
    return name if isinstance(name, str) and name else path.stem, (next(iter(learned.values())),)


def _vectors(path: Path, value: Value) -> Tensor:
    """Vectors (n, D) in float32. Raises InputError unless a text encoder can read them."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (1, 2):
        kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise _no_embedding(path, f"{kind} in place of vectors")
    count = len(value) if value.dim() == 2 else int(value.numel() > 0)
    if not 1 <= count <= MAX_VECTORS:
        raise InputError(f"{path}: holds {count:,} vectors", f"expected are 1 to {MAX_VECTORS}")
    vectors = value.to(torch.float32).reshape(count, -1) if value.numel() else value.new_empty(count, 0)
    if not vectors.isfinite().all():
        raise NumericalError(f"{path}: its vectors hold NaN or Inf", "get the file again")
    if not vectors.any():
        raise InputError(f"{path}: its vectors are all zero", "get the file again")
    return vectors.clone()  # of a mapped file


def _no_embedding(path: Path, found: str) -> InputError:
    what = f"{path}: is no textual-inversion file: it holds {found}"
    return InputError(what, "name one of A1111's, diffusers' or kohya's form")


def _a1111_bytes(token: str, vectors: Tensor, step: int) -> bytes:
    buffer = io.BytesIO()  # saved to a path, the archive would carry the name of that file
    contents = {
        "string_to_token": {"*": STAR_ID},
        "string_to_param": {"*": vectors},
        "name": token,
        "step": step,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    torch.save(contents, buffer)
    return buffer.getvalue()


def _stem(token: str) -> str:
    """A token as a file name: letters, digits, dots, hyphens and underscores."""
    name = re.sub(r"[^\w.-]+", "-", token).strip("-._")
    return name.encode()[:MAX_STEM_BYTES].decode(errors="ignore") or "embedding"
