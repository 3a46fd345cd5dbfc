"""Hostile files: every door that a file can come in by, and what somebody could send through it.

An attack prepares an empty folder, which is the working folder, and gives the command that a user would run there. What
is expected is always the same: one line that blames the file, exit code 3 (7 for numbers that are not finite), nothing
run, nothing written, little time and memory. `tests/hostile/test_attacks.py` looks at the former, `measure.py` at both.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sdcli import latent_files, layout
from sdcli.errors import ExitCode
from sdcli.pipeline.tokenizer_files import MAX_TOKENIZER_BYTES
from tests import models, originals
from tests.pipeline.test_pickles import archive

Command = Sequence[object]
Content = bytes | Callable[[], bytes]  # what is large is made when it is tried
CANARY = "executed"  # the file that a payload makes, if it is ever run
SMALL = originals.Kind(vocabulary=10)
HUGE = 10**9
DEEP = 100_000  # levels of nesting
LONGEST = "a list as long as may be"
LIST_BYTES = 16 << 20  # of a JSON document that is one long list of lists


@dataclass(frozen=True)
class Attack:
    """One hostile file, or folder, at one door."""

    door: str
    name: str
    prepare: Callable[[], Command]  # in the working folder
    code: ExitCode = ExitCode.INPUT
    starts_child: bool = False  # whether the process that reads pickles is started: 2 s each

    def __str__(self) -> str:
        return f"{self.door}: {self.name}"


def attacks(sd1: Path) -> Iterator[Attack]:
    """All of them. sd1: a sound model folder, of which each takes a copy."""
    yield from _folders(sd1)
    yield from _texts(sd1)
    yield from _single_files()
    yield from _safetensors(sd1)
    yield from _special_files(sd1)
    yield from _pickles(sd1)
    yield from _pictures(sd1)
    yield from _lists(sd1)


# Doors: what each is opened with.


def model_door(sd1: Path, spoil: Callable[[Path], object], *more: object) -> Callable[[], Command]:
    """A model folder, a copy of which is spoiled."""

    def prepare() -> Command:
        spoil(models.copy(sd1, Path("model")))
        return ("generate", "a cat", "--model", "model", "--steps", 1, "--seed", 1, "-o", "out.png", *more)

    return prepare


def file_door(door: str, sd1: Path, name: str, write: Callable[[Path], object]) -> Callable[[], Command]:
    """A single file, which `write` makes at the path it is given."""

    def prepare() -> Command:
        write(Path(name))
        drawn = ("generate", "a cat", "--steps", 1, "--seed", 1, "-o", "out.png", "--model")
        return {
            "single file": (*drawn, name),
            "VAE": ("models", "convert", sd1, "--vae", name, "-o", "out"),
            "LoRA": (*drawn, sd1, "--lora", name),
            "embedding": (*drawn, sd1, "--embedding", name),
            "latents": ("decode", name, "--model", sd1, "-o", "out.png"),
            "noise": (*drawn, sd1, "--latents", name),
            "image": ("encode", name, "--model", sd1, "-o", "out.safetensors"),
            "first image": (*drawn, sd1, "--init-image", name),
            "mask": (*drawn, sd1, "--init-image", _sound_picture("sound.png"), "--strength", 1, "--mask", name),
            "metadata": ("meta", name),
            "replay": ("replay", name, "--model", sd1, "-o", "out.png"),
            "jobs": ("batch", name, "--model", sd1, "-o", "out"),
        }[door]

    return prepare


WEIGHT_FILES = ("single file", "VAE", "LoRA", "embedding", "latents", "noise")
PICTURES = ("image", "first image", "mask", "metadata", "replay")
FILES = (*WEIGHT_FILES, *PICTURES, "jobs")
NAMES = {"jobs": "a.jsonl", **dict.fromkeys(PICTURES, "a.png"), **dict.fromkeys(WEIGHT_FILES, "a.safetensors")}


# Configs of a model folder.


def _folders(sd1: Path) -> Iterator[Attack]:
    configs: dict[str, dict[str, Any]] = {
        "unet/config.json": {
            "_class_name": "os.system",
            "block_out_channels": [HUGE, HUGE],
            "layers_per_block": HUGE,
            "transformer_layers_per_block": [[HUGE, HUGE]] * 2,
            "attention_head_dim": HUGE,
            "cross_attention_dim": HUGE,
            "in_channels": HUGE,
            "sample_size": HUGE,
            "norm_num_groups": HUGE,
            "norm_eps": float("nan"),
            "down_block_types": ["DownBlock2D"] * 10**6,
            "act_fn": "eval",
            "addition_embed_type": "text_time",
            "encoder_hid_dim_type": "ip_image_proj",
            "time_embedding_type": "fourier",
            "conv_in_kernel": HUGE + 1,
        },
        "vae/config.json": {
            "_class_name": "subprocess.Popen",
            "block_out_channels": [HUGE, HUGE],
            "down_block_types": ["AttnDownEncoderBlock2D"] * 10**5,
            "latent_channels": HUGE,
            "layers_per_block": 10**6,
            "scaling_factor": float("nan"),
            "latents_mean": [0.5] * 4,
            "norm_num_groups": 0,
        },
        "text_encoder/config.json": {
            "architectures": ["../../evil.py"],
            "hidden_size": HUGE,
            "num_hidden_layers": HUGE,
            "num_attention_heads": 0,
            "intermediate_size": 10**18,
            "max_position_embeddings": HUGE,
            "vocab_size": HUGE,
            "hidden_act": "eval",
            "attn_implementation": "owner/kernel",
            "auto_map": {"AutoModel": "evil.Evil"},
            "quantization_config": {"quant_method": "evil"},
            "layer_norm_eps": "x",
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "../evil",
            "num_train_timesteps": HUGE,
            "trained_betas": [0.1] * 10**6,
            "beta_start": float("nan"),
            "steps_offset": HUGE,
        },
        "model_index.json": {"_class_name": "EvilPipeline", "auto_map": {"x": "evil.py"}},
        "sdcli.json": {"size": "99999999x99999999", "steps": HUGE, "guidance": float("nan"), "scheduler": "os.system"},
    }
    for file, changes in configs.items():
        for key, value in changes.items():
            yield Attack(file, key, model_door(sd1, _edited(file, key, value)))
    both = {"layers_per_block": 100, "transformer_layers_per_block": 100}
    yield Attack(
        "unet/config.json", "100 x 100 layers", model_door(sd1, lambda at: _edit(at, "unet/config.json", both))
    )
    index: dict[str, Any] = {
        "../": "../../secret.safetensors",
        "absolute": "/etc/hostname",
        "a null byte": "a\0b",
        "itself": ".",
        "a device": "/dev/zero",
        "no text": [1, 2],
    }
    for name, shard in index.items():
        yield Attack("shard index", name, model_door(sd1, _sharded(shard)))


def _edited(file: str, key: str, value: object) -> Callable[[Path], None]:
    return lambda at: _edit(at, file, {key: value})


def _edit(at: Path, file: str, changes: dict[str, Any]) -> None:
    if not (at / file).exists():
        (at / file).write_text("{}")
    models.edit_json(at / file, **changes)


def _sharded(name: object) -> Callable[[Path], None]:
    def spoil(at: Path) -> None:
        path = models.weight_file(at / "unet")
        path.rename("secret.safetensors")
        path.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))

    return spoil


# JSON and text, wherever it is read.

GENEROUS = ("sdcli.json", "tokenizer_config.json", "special_tokens_map.json")  # where other names may stand
UNUSUAL = ("sdcli.json", "added_tokens.json", "tokenizer.json")  # which a model need not have
JSON_FILES = (
    *("model_index.json", "sdcli.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"),
    *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"),
    *("tokenizer/special_tokens_map.json", "tokenizer/added_tokens.json", "tokenizer/tokenizer.json"),
)
OTHER_TEXTS = ("tokenizer/merges.txt",)
SOUND_FILES = (*(file for file in JSON_FILES if Path(file).name not in UNUSUAL), *OTHER_TEXTS)
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def bombs(most: int) -> dict[str, Content]:
    """Documents that cost more than they weigh, or that no parser should read. most: bytes that are read."""
    return {
        "deep": b"[" * DEEP + b"]" * DEEP,
        "deep objects": b'{"a":' * DEEP + b"0" + b"}" * DEEP,
        "a long list": lambda: b'{"a": ' + long_list(LIST_BYTES) + b"}",
        LONGEST: lambda: b'{"a": ' + long_list(most - 100) + b"}",
        "a long number": b'{"a": ' + b"9" * 10**6 + b"}",
        "no UTF-8": b'{"a": "\xff\xfe"}',
        "empty": b"",
    }


def _texts(sd1: Path) -> Iterator[Attack]:
    for file in (*JSON_FILES, *OTHER_TEXTS):
        for name, content in bombs(layout.MAX_JSON_BYTES).items():
            is_passed_over = (
                name == LONGEST and Path(file).name in GENEROUS
            )  # a list of another name than is listened to
            code = ExitCode.OK if is_passed_over else ExitCode.INPUT
            if not (file == "sdcli.json" and name == "a long number"):
                yield Attack(file, name, model_door(sd1, _written(file, content)), code)
    longest = bombs(MAX_TOKENIZER_BYTES)[LONGEST]
    yield Attack("tokenizer/tokenizer.json", "longer", model_door(sd1, _written("tokenizer/tokenizer.json", longest)))
    tokens = {
        "code": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "vocab_file": "/etc/passwd"},
        "a bomb of added tokens": {"added_tokens_decoder": {str(n): {"content": f"t{n}"} for n in range(300_000)}},
    }
    harmless = {"num_labels": HUGE, "id2label": {str(n): "x" for n in range(1000)}, "bad_words_ids": [[[1]]]}
    door = model_door(sd1, lambda at: _edit(at, "text_encoder/config.json", harmless))
    yield Attack("text_encoder/config.json", "tables of labels that nobody reads", door, ExitCode.OK)
    door = model_door(sd1, _edited("tokenizer/tokenizer_config.json", "vocab", {"a": HUGE}))
    yield Attack("tokenizer/tokenizer_config.json", "another vocabulary", door, ExitCode.OK)
    door = model_door(sd1, _edited("tokenizer/special_tokens_map.json", "pad_token", 5))
    yield Attack("tokenizer/special_tokens_map.json", "a number for a mark", door)
    for name, changes in tokens.items():
        file = "tokenizer/tokenizer_config.json"
        yield Attack(file, name, model_door(sd1, lambda at, file=file, changes=changes: _edit(at, file, changes)))


def long_list(size: int) -> bytes:
    """JSON of so many bytes that is one list of empty lists: twenty times as much when it is read."""
    return b"[" + b"[]," * (size // 3 - 2) + b"[]]"


def _written(file: str, content: Content) -> Callable[[Path], None]:
    return lambda at: _bytes(content)(at / file)


# Single files.


def _single_files() -> Iterator[Attack]:
    shapes: dict[str, dict[str, Any]] = {
        "a layer 1e9": {f"model.diffusion_model.input_blocks.{HUGE}.0.in_layers.0.weight": [32]},
        "1e9 context": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [32, HUGE]},
        "1e9 channels": {"model.diffusion_model.input_blocks.0.0.weight": [HUGE, 4, 3, 3]},
        "1e9 words": {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [HUGE, 16]},
        "1e9 positions": {"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": [HUGE, 16]},
    }
    for name, changes in shapes.items():
        yield Attack("single file", name, file_door("single file", Path(), "a.safetensors", _reshaped(changes)))
    said = {
        "configs of 1e9 channels": {"unet": {"_class_name": "UNet2DConditionModel", "block_out_channels": [HUGE] * 4}},
        "configs of another class": {"vae": {"_class_name": "os.system"}},
        "configs of code": {"text_encoder": {"auto_map": {"AutoModel": "evil.Evil"}}},
        "settings": {"settings": {"steps": HUGE}},
        "configs that are a list": [1],
    }
    for name, value in said.items():
        write = _with_metadata({"sdcli.configs": json.dumps(value)})
        yield Attack("single file", name, file_door("single file", Path(), "a.safetensors", write))
    deep = _with_metadata({"sdcli.configs": "[" * DEEP})
    yield Attack("single file", "configs nested deep", file_door("single file", Path(), "a.safetensors", deep))


def _reshaped(changes: dict[str, Any]) -> Callable[[Path], None]:
    """A sound checkpoint with other shapes in its header; no byte of theirs is there."""

    def write(path: Path) -> None:
        header, data = taken_apart(originals.write(path, SMALL).read_bytes())
        for key, shape in changes.items():
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data)]}
        path.write_bytes(put_together(header, data))

    return write


def _with_metadata(metadata: dict[str, str]) -> Callable[[Path], None]:
    return lambda path: originals.write(path, SMALL, metadata=metadata)


# Safetensors, whatever is in them.


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def put_together(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape: Sequence[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    shape = shape if shape is not None else [(last - first) // 4]
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def broken_safetensors() -> dict[str, Content]:
    """Files whose header tells of what is not there, or not so."""
    twice = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": %s}'
    return {
        "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"{}",
        "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
        "40 GB described": put_together({"a": entry(0, 40 << 30)}, b"1234"),
        "overlapping": put_together({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "one place for two": put_together({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
        "a name twice": put_together(twice % json.dumps(entry(0, 4)).encode(), bytes(4)),
        "a gap": put_together({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
        "a shape beyond all sense": put_together({"a": entry(0, 4, [HUGE, HUGE, HUGE])}, bytes(4)),
        "a negative shape": put_together({"a": entry(0, 4, [-1])}, bytes(4)),
        "a type that is none": put_together({"a": entry(0, 4, [1], "EVIL")}, bytes(4)),
        "bytes behind": put_together({"a": entry(0, 4)}, bytes(400)),
        "nested deep": put_together(b'{"a":' * DEEP, b""),
        "a long list": lambda: put_together(b'{"a": ' + long_list(LIST_BYTES) + b"}", b""),
        "a million tensors": lambda: put_together({str(n): entry(0, 0) for n in range(10**6)}, b""),
        "no tensors": put_together({}, b""),
    }


def _safetensors(sd1: Path) -> Iterator[Attack]:
    for name, content in broken_safetensors().items():
        for door in WEIGHT_FILES:
            yield Attack(door, name, file_door(door, sd1, "a.safetensors", _bytes(content)))
        for part in ("unet", "vae", "text_encoder"):
            yield Attack(f"{part} weights", name, model_door(sd1, _weights(part, content)))
    nan = ExitCode.NUMERICAL
    yield Attack("unet weights", "NaN", model_door(sd1, _spoiled("unet", "conv_in.bias", float("nan"))), nan)
    key = "embeddings.token_embedding.weight"
    yield Attack("text_encoder weights", "Inf", model_door(sd1, _spoiled("text_encoder", key, float("inf"))), nan)
    yield Attack("latents", "NaN", file_door("latents", sd1, "a.safetensors", _latents(float("nan"))), nan)
    yield Attack("noise", "Inf", file_door("noise", sd1, "a.safetensors", _latents(float("inf"))), nan)
    word = {"<cat>": torch.full((1, models.CONTEXT), torch.nan)}
    yield Attack("embedding", "NaN", file_door("embedding", sd1, "a.safetensors", lambda at: save_file(word, at)), nan)
    yield Attack("LoRA", "NaN", file_door("LoRA", sd1, "a.safetensors", lambda at: _lora(at, sd1, torch.nan)), nan)


def _bytes(content: Content) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content())

    return write


def _weights(part: str, content: Content) -> Callable[[Path], None]:
    return lambda at: _bytes(content)(models.weight_file(at / part))


def _spoiled(part: str, key: str, value: float) -> Callable[[Path], None]:
    def change(weights: models.Weights) -> models.Weights:
        weights[key].reshape(-1)[0] = value
        return weights

    return lambda at: models.edit_weights(at / part, change)


def _latents(value: float) -> Callable[[Path], None]:
    latents = torch.randn(1, *models.LATENTS)
    latents[0, 0, 0, 0] = value
    facts = {"model": "m", "scaling_factor": 0.18215, "height": models.SIZE, "width": models.SIZE}
    return lambda at: at.write_bytes(latent_files.file_bytes(latents, facts)) and None


def _lora(at: Path, sd1: Path, value: float) -> None:
    tensors = load_file(models.write_lora(at, sd1))
    next(one for key, one in tensors.items() if key.endswith("lora_up.weight"))[0, 0] = value
    save_file(tensors, at)


# What is no regular file, and what leads elsewhere.


def _special_files(sd1: Path) -> Iterator[Attack]:
    kinds: dict[str, Callable[[Path], object]] = {
        "a FIFO": os.mkfifo,
        "a device": lambda at: at.symlink_to("/dev/zero"),
        "a folder": lambda at: at.mkdir(),
        "a loop of links": lambda at: at.symlink_to(at.name),
        "a process": lambda at: at.symlink_to("/proc/self/mem"),
    }
    for name, make in kinds.items():
        for door in FILES:
            yield Attack(door, name, file_door(door, sd1, NAMES[door], make))
        for file in ("unet/config.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "sdcli.json"):
            yield Attack(file, name, model_door(sd1, _replaced(file, make)))
        for part in ("unet", "text_encoder"):
            yield Attack(f"{part} weights", name, model_door(sd1, _replaced(WEIGHTS[part], make)))
    for file in (*SOUND_FILES, *WEIGHTS.values()):
        yield Attack(file, "a link out of the folder", model_door(sd1, _moved_out(file)))


def _replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(at: Path) -> None:
        (at / file).unlink(missing_ok=True)
        make(at / file)

    return spoil


def _moved_out(file: str) -> Callable[[Path], None]:
    """The very file, sound as it is, outside the folder, and a link to it in its place."""

    def spoil(at: Path) -> None:
        (at / file).rename("secret")
        (at / file).symlink_to(Path("secret").absolute())

    return spoil


# Pickles.


class Payload:
    """Unpickled by pickle itself, it makes a file."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {CANARY}",)


class State(dict[str, Any]):
    """A dict whose state is a payload: what BUILD is given."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), {"x": Payload()}


def torch_saved(value: object, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def pickled_payloads() -> dict[str, Content]:
    """Files with a payload in every place that one can hide in."""
    weights = {"a.weight": torch.ones(2, 3)}
    persistent = b"\x80\x02" + pickle.dumps(Payload(), 0)[:-1] + b"Q."  # BINPERSID of what the payload returns
    numpy_like = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + pickle.dumps((), 2)[2:-1] + b"R."
    return {
        "__reduce__": torch_saved({"state_dict": weights, "x": Payload()}),
        "__reduce__, before 1.6": torch_saved(
            {"state_dict": weights, "x": Payload()}, _use_new_zipfile_serialization=False
        ),
        "as a key": torch_saved({(Payload(),): 1}),
        "the root": torch_saved(Payload()),
        "a persistent id": archive(persistent),
        "a ParameterDict": torch_saved({"string_to_param": _parameters()}),
        "BUILD": torch_saved({"a": State()}),
        "numpy": archive(numpy_like),
        "broken behind the payload": torch_saved({"x": Payload(), **weights})[:-200],
        "a broken pickle behind the payload": archive(pickle.dumps([Payload()], 2)[:-3] + b"\xff" * 40),
        "an archive in an archive": archive(pickle.dumps({}, 2), more={"inner.pt": torch_saved(Payload())}),
        "constants.pkl": archive(pickle.dumps({}, 2), more={"constants.pkl": pickle.dumps(Payload(), 2)}),
        "TorchScript": archive(pickle.dumps({}, 2), more={"constants.pkl": b"", "code/__torch__.py": b"import os"}),
        "a plain pickle": pickle.dumps(Payload()),
        "protocol 5": pickle.dumps(Payload(), 5),
        "torch's tar": _tar({"pickle": pickle.dumps(Payload()), "storages": b"", "tensors": b""}),
        "deflated": archive(pickle.dumps(Payload(), 2), compression=zipfile.ZIP_DEFLATED),
        "gz": zlib.compress(pickle.dumps(Payload())),
    }


def _parameters() -> nn.ParameterDict:
    held = nn.ParameterDict({"*": nn.Parameter(torch.ones(2, models.CONTEXT))})
    vars(held)["payload"] = Payload()
    return held


def _tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            one = tarfile.TarInfo(name)
            one.size = len(content)
            tar.addfile(one, io.BytesIO(content))
    return stream.getvalue()


def pickled_bombs() -> dict[str, Content]:
    """Data, and far too much of it."""
    laugh: list[Any] = []
    for _ in range(40):
        laugh = [laugh, laugh]
    text = b"\x80\x02]q\x00(X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x01"
    text += b"h\x01" * 10**5 + b"e."
    return {
        "40 GB of one number": torch_saved({"a": torch.zeros(1).expand(10**5, 10**5)}),
        "a laugh": torch_saved(laugh),
        "100,000 times a megabyte": archive(text),
        "a number of a million digits": torch_saved({"state_dict": {"a": torch.ones(1)}, "global_step": 10**4300}),
        "a storage of 1e9": _edited_program(torch_saved({"a": torch.zeros(8)}), b"K\x08", b"J\xff\xff\xff\x7f"),
        "deep": archive(b"\x80\x02" + b"(" * 10**5 + b"l" * 10**5 + b"."),
        "a million marks": archive(b"\x80\x02" + b"]" * 10**6 + b"."),
        "256 MB deflated": lambda: archive(bytes(1 << 28), compression=zipfile.ZIP_DEFLATED),
        "no weights": torch_saved({"a": 5}),
    }


def _edited_program(saved: bytes, old: bytes, new: bytes) -> bytes:
    """A file of torch.save whose pickle says something else."""
    with zipfile.ZipFile(io.BytesIO(saved)) as source:
        parts = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    return archive(parts.pop("data.pkl").replace(old, new), more=parts)


def _pickles(sd1: Path) -> Iterator[Attack]:
    doors = {"single file": "a.ckpt", "embedding": "a.pt", "VAE": "a.pt", "LoRA": "a.bin"}
    for name, content in (pickled_payloads() | pickled_bombs()).items():
        is_torchs = name not in ("a plain pickle", "protocol 5", "torch's tar", "gz")
        for door, file in doors.items():
            if door in ("single file", "embedding") or name in ("__reduce__", "BUILD") or not is_torchs:
                prepare = file_door(door, sd1, file, _bytes(content))
                yield Attack(door, f"pickle, {name}", prepare, starts_child=is_torchs)
    for door in ("LoRA", "embedding", "single file"):
        prepare = file_door(door, sd1, "a.safetensors", _bytes(torch_saved({"a": Payload()})))
        yield Attack(door, "pickle called safetensors", prepare, starts_child=True)
    for part in ("unet", "vae", "text_encoder"):
        yield Attack(f"{part} weights", "pickle beside no other", model_door(sd1, _pickled_part(part)))
        yield Attack(
            f"{part} weights", "pickle called safetensors", model_door(sd1, _weights(part, torch_saved(Payload())))
        )


def _pickled_part(part: str) -> Callable[[Path], None]:
    def spoil(at: Path) -> None:
        path = models.weight_file(at / part)
        path.with_suffix(".bin").write_bytes(torch_saved({**load_file(path), "x": Payload()}))
        path.with_name("pytorch_model.bin").write_bytes(torch_saved(Payload()))
        path.unlink()

    return spoil


# Pictures, and what they say.


def _sound_picture(name: str) -> str:
    Image.new("RGB", (models.SIZE, models.SIZE), "red").save(name)
    return name


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: int | None = None) -> bytes:
    """A black PNG with chunks of one's own before the pixels. rows: how many there really are."""
    data = zlib.compress(bytes(1 + width) * (rows if rows is not None else height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bad_pictures() -> dict[str, Content]:
    """Bombs, and files that are no pictures."""
    gif = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    frame = b",\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00"
    return {
        "4 gigapixels": png(1 << 16, 1 << 16, rows=1),
        "a side of 2^31": png(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", 2**31 - 1, 2**31 - 1)),
        "WebP of 268 megapixels": _webp_head(16384, 16384),
        "a picture cut short": png(64, 64)[:-30],
        "half a GIF": gif + frame[:5],
        "TIFF whose list begins anew": b"II*\x00\x08\x00\x00\x00" + bytes(2) + struct.pack("<I", 8),
        "TIFF of 2^32 values": _tiff_of_many(),
        "no picture": b"\x80\x04cos\nsystem\n.",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\n",
    }


def _webp_head(width: int, height: int) -> bytes:
    """A lossless WebP that says its size and no more."""
    bits = (width - 1) | (height - 1) << 14
    body = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", bits) + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _tiff_of_many() -> bytes:
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 2**32 - 1, 8)]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\x00\x08\x00\x00\x00" + body


def bad_metadata() -> dict[str, Content]:
    """Pictures whose texts are bombs."""
    return {
        "zTXt of 256 MB": lambda: png(8, 8, (b"zTXt", b"parameters\0\0" + _packed_zeros())),
        "iTXt of 256 MB": lambda: png(8, 8, (b"iTXt", b"parameters\0\1\0\0\0" + _packed_zeros())),
    }


def _packed_zeros() -> bytes:
    return zlib.compress(bytes(1 << 28), 9)


def _pictures(sd1: Path) -> Iterator[Attack]:
    for name, content in bad_pictures().items():
        for door in ("image", "first image", "mask"):
            yield Attack(door, name, file_door(door, sd1, "a.png", _bytes(content)))
    for name, content in bad_metadata().items():
        for door in PICTURES:
            yield Attack(door, name, file_door(door, sd1, "a.png", _bytes(content)))
    for name, content in pictures_of_embeddings().items():
        yield Attack("embedding", f"PNG, {name}", file_door("embedding", sd1, "a.png", _bytes(content)))
    record = {"prompt": "a", "model": "../../../etc", "seed": 1, "init_image": {"file": "../../secret.png"}}
    told = png(8, 8, (b"tEXt", b"sdcli\0" + json.dumps(record).encode()))
    yield Attack("replay", "names of files elsewhere", file_door("replay", sd1, "a.png", _bytes(told)))


def pictures_of_embeddings() -> dict[str, Content]:
    """A1111's embeddings in pictures, whose JSON is anything."""
    values = {"deep": b"[" * DEEP, "a long list": long_list(1 << 22), "NaN": b'{"a": NaN}'}
    values["a pickle"] = pickle.dumps(Payload())
    return {
        name: png(8, 8, (b"tEXt", b"sd-ti-embedding\0" + base64.b64encode(value))) for name, value in values.items()
    }


# Lists: jobs, captions, tables.


def _lists(sd1: Path) -> Iterator[Attack]:
    jobs: dict[str, Content] = {
        "deep": b"[" * DEEP,
        "a line of 16 MB": lambda: b'{"prompt": "' + b"a" * LIST_BYTES + b'"}',
        "a long list": b'{"prompt": ' + long_list(1 << 19) + b"}",
        "a picture elsewhere": b'{"prompt": "a", "output": "/tmp/evil.png"}',
        "an id elsewhere": b'{"prompt": "a", "id": "../../evil"}',
        "a device as picture": b'{"prompt": "a", "init_image": "/dev/zero"}',
        "a million counts": b'{"prompt": "a", "count": 1000000000000}',
        "NaN": b'{"prompt": "a", "guidance": NaN}',
        "no UTF-8": b'{"prompt": "\xff\xfe"}',
        "a long number": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    }
    for name, content in jobs.items():
        yield Attack("jobs", name, file_door("jobs", sd1, "a.jsonl", _bytes(content)))
    row = b'{"file_name": "a.png", "text": '
    tables: dict[str, dict[str, Content]] = {
        "metadata.jsonl": {
            "elsewhere": b'{"file_name": "../../../etc/passwd", "text": "a"}',
            "a long list": lambda: row + long_list(LIST_BYTES) + b"}",
            "a line of 300 MB": lambda: row + b'"' + b"a" * (300 << 20) + b'"}',
            "deep": row + b"[" * DEEP,
        },
        "metadata.csv": {
            "elsewhere": b"file_name,text\n/etc/passwd,a\n",
            "a field of 300 MB": lambda: b'file_name,text\na.png,"' + b"a" * (300 << 20) + b'"\n',
        },
        "meta.json": {
            "a long list": lambda: b'{"a.png": {"caption": "a", "x": ' + long_list(LIST_BYTES) + b"}}",
            "deep": b'{"a.png": {"caption": ' + b"[" * DEEP,
        },
        "a.txt": {"no text": b"\xff\xfe\x00\xd8", "a long caption": lambda: b"a" * (64 << 20)},
    }
    for file, contents in tables.items():
        for name, content in contents.items():
            yield Attack(file, name, dataset_door(sd1, file, content))
    yield Attack("a.txt", "a FIFO", dataset_door(sd1, "a.txt", None))


def dataset_door(sd1: Path, file: str, content: Content | None) -> Callable[[], Command]:
    """A folder of training pictures; content: of one file in it, None makes a FIFO of it."""

    def prepare() -> Command:
        folder = Path("data")
        folder.mkdir()
        for name in ("a.png", "b.png"):
            _sound_picture(str(folder / name))
        (folder / "b.txt").write_text("a dog")
        if content is None:
            os.mkfifo(folder / file)
        else:
            _bytes(content)(folder / file)
        return ("train-unet", "--data", "data", "--model", sd1, "--steps", 1, "--run", "out")

    return prepare
