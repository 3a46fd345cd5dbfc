"""Files of torch.save (.pt, .bin, .ckpt) -> values, read in a child process that can do nothing else.

Such a file is a program. torch's `weights_only` parser knows no instruction that runs code, but it is a parser, not a
jail: so it works in a process that has no socket and can open no file, within a limit of memory and of time, and what
it finds comes back as safetensors: the tensors, and in the header everything else as JSON.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import resource
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO, NoReturn, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdcli import jail
from sdcli.errors import InputError
from sdcli.files import reason
from sdcli.jail import GET_SAFETENSORS, NO_ROOM, REFUSED, ZIP_MAGIC

Value: TypeAlias = "bool | int | float | str | Tensor | list[Value] | dict[str | int, Value] | None"
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_ENTRIES = 100_000
MAX_SHOWN = 100  # characters of a name that a file gives
MAX_PICKLE_BYTES = 16 << 20  # without the tensors, which lie beside it; Stable Diffusion's has 0.5 MB
MAX_DEPTH = 50
MAX_VALUES = 200_000
MAX_CHARACTERS = 16 << 20  # of all texts, each as often as it is there
MAX_INTEGER = 1 << 1024  # a larger one is no number of steps, and JSON has no more
CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
BYTES_OUT, SPARE_BYTES_OUT = 2, 64 << 20  # of tensors for each byte of the file, and besides: they may share storage
BYTES_IN, SPARE_BYTES_IN = 3, 256 << 20  # of memory likewise: as read, as a tensor, once more to make it contiguous
SECONDS = 20
BYTES_A_SECOND = 50_000_000
DTYPES = {  # the names that safetensors has for them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MAX_STEPS = 1 << 62  # of a training
MAX_WRAPPERS = 3  # `state_dict` within `state_dict`
# What Lightning's and numpy's pickles name beside the weights. None of it is loaded: something inert stands for each.
LIGHTNING = (
    *(f"{package}.callbacks.{name}" for package in ("pytorch_lightning", "lightning.pytorch") for name in CALLBACKS),
    *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *("numpy.dtype", *(f"numpy.dtypes.{kind}DType" for kind in ("Float32", "Float64", "Int64"))),
    "argparse.Namespace",
)


def read_pickle(path: Path, *, max_bytes: int | None = None) -> Value:
    """What a file of torch.save holds: dicts, lists, numbers, texts and dense tensors on the CPU.

    Tuples and sets come as lists; an nn.ParameterDict as a dict of its attributes, its tensors under `_parameters`.
    max_bytes: the largest file accepted.
    Raises InputError when the file is malformed or holds anything else, ResourceError when there is no room to read it.
    """
    with tempfile.TemporaryFile() as handed_over:
        jail.run(path, "everything", handed_over, max_bytes=max_bytes)
        return _taken(path, handed_over.fileno())


def serve(read: Callable[[BinaryIO, int, BinaryIO], None]) -> NoReturn:
    """Read the file on stdin and hand it over on stdout: the work of the child process, by one of the two readers."""
    _warm_up()
    size = os.fstat(sys.stdin.fileno()).st_size
    _limit(size)
    try:
        read(sys.stdin.buffer, size, sys.stdout.buffer)
    except InputError as error:
        sys.stdout.buffer.write(json.dumps({"what": error.message, "hint": error.hint}).encode())
        sys.exit(REFUSED)
    except OSError:
        sys.exit(NO_ROOM)
    sys.exit(0)


def everything(stream: BinaryIO, size: int, handed_over: BinaryIO) -> None:
    """Hand over the whole value of a file: its tensors by number, the rest as JSON. Raises InputError as `parse`."""
    tensors: list[Tensor] = []
    tree = _to_json(parse(stream, size), tensors)
    numbered = {str(number): tensor for number, tensor in enumerate(tensors)}
    _hand_over(numbered, {"tree": json.dumps(tree)}, handed_over)


def checkpoint(stream: BinaryIO, size: int, handed_over: BinaryIO) -> None:
    """Hand over the weights of a checkpoint under their names, out of whatever its trainer has wrapped them in.

    What else a trainer saves with them (callbacks, optimizers) is not looked at, but for the number of its step.
    Raises InputError as `parse`, and for a file without named tensors.
    """
    loaded = _load(stream, size, LIGHTNING)
    step = loaded.get("global_step") if isinstance(loaded, dict) else None
    for _ in range(MAX_WRAPPERS):
        inner = loaded.get("state_dict") if isinstance(loaded, dict) else None
        if inner is None:
            break
        loaded = inner
    named = loaded if isinstance(loaded, dict) else {}
    weights = {key: one for key, one in named.items() if isinstance(key, str) and isinstance(one, Tensor)}
    if not weights or "__metadata__" in weights:  # of safetensors the name of what is no tensor
        raise InputError("holds no weights under names", "name a checkpoint of Stable Diffusion")
    value = _Checker(size).value(weights)
    metadata = {"global_step": str(step)} if isinstance(step, int) and 0 <= step < MAX_STEPS else {}
    _hand_over(cast("dict[str, Tensor]", value), metadata, handed_over)


def parse(stream: BinaryIO, size: int) -> Value:
    """The checked value of a file of torch.save of `size` bytes, by torch's parser in this very process.

    Raises InputError, whose message does not name the file, for all that is no plain value or does not fit the size.
    """
    loaded = _load(stream, size, ("torch.nn.modules.container.ParameterDict",))
    try:
        return _Checker(size).value(loaded)
    except RecursionError as error:
        raise InputError("is nested too deeply, or holds too many values", "get the file again") from error


def _load(stream: BinaryIO, size: int, inert: Sequence[str]) -> object:
    """What torch's parser makes of a file, unchecked. inert: classes by name, of which attributes alone are kept."""
    try:
        stream.seek(0)
        if stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            _check_zip(stream, size)
        stream.seek(0)
        with torch.serialization.safe_globals([(_Attributes, name) for name in inert]):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError("needs more memory than a file of its size may", "get the file again") from error
    except Exception as error:  # torch raises some ten types on a malformed file
        match = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
        if match is not None:
            raise InputError(f"holds {match[1][:MAX_SHOWN]}, which is code and was not run", GET_SAFETENSORS) from error
        if isinstance(error, UnpicklingError):  # torch's words are for programmers, and many
            raise InputError("cannot be read: it is not whole, or not data alone", GET_SAFETENSORS) from error
        raise InputError(f"cannot be read ({reason(error)})", "get the file again") from error


class _Attributes:
    """Stands for an object of a known class: what was saved of it, without anything it could do."""

    def __init__(self, *arguments: object) -> None:
        """Takes what the class would be called with, and makes nothing of it."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update({key: value for key, value in state.items() if isinstance(key, str)})


class _Checker:
    """Turns what torch loaded into plain values, counting them and the bytes of their tensors."""

    def __init__(self, size: int) -> None:
        self.values_left, self.characters_left = MAX_VALUES, MAX_CHARACTERS
        self.bytes_left = BYTES_OUT * size + SPARE_BYTES_OUT

    def value(self, loaded: object, depth: int = 0) -> Value:
        self.values_left -= 1
        if depth > MAX_DEPTH or self.values_left < 0:
            raise InputError("is nested too deeply, or holds too many values", "get the file again")
        if isinstance(loaded, Tensor):
            return self._tensor(loaded)
        if isinstance(loaded, _Attributes):
            loaded = vars(loaded)
        if isinstance(loaded, dict):
            return {self._key(key): self.value(one, depth + 1) for key, one in loaded.items()}
        if isinstance(loaded, list | tuple | set):
            return [self.value(one, depth + 1) for one in loaded]
        if isinstance(loaded, str):
            return self._text(loaded)
        if isinstance(loaded, int) and abs(loaded) > MAX_INTEGER:
            raise InputError("holds an integer beyond all sense", "get the file again")
        if loaded is None or isinstance(loaded, bool | int | float):
            return loaded
        raise InputError(f"holds a {type(loaded).__name__}, which is neither number, text nor tensor", GET_SAFETENSORS)

    def _text(self, text: str) -> str:
        self.characters_left -= len(text)
        if self.characters_left < 0:
            raise InputError("holds more text than it has bytes for", "get the file again")
        return text

    def _key(self, key: object) -> str | int:
        if isinstance(key, str):
            return self._text(key)
        if isinstance(key, int) and abs(key) <= MAX_INTEGER:
            return key
        raise InputError(f"has a key that is a {type(key).__name__}", GET_SAFETENSORS)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device.type}"
            raise InputError(f"holds a tensor of kind {kind}", "only dense tensors of numbers are read")
        length = tensor.numel() * tensor.element_size()
        self.bytes_left -= length
        if self.bytes_left < 0:
            raise InputError(f"describes a tensor of {length:,} bytes, more than it can hold", "get the file again")
        return tensor.detach()


def _check_zip(stream: BinaryIO, size: int) -> None:
    """Raise InputError unless the archive is one as torch.save writes it: everything stored as it is."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise InputError(f"is no whole zip archive ({reason(error)})", "get the file again") from error
    for entry in entries:
        name = entry.filename[:MAX_SHOWN]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise InputError(f"{name} in it is compressed", "torch.save stores without compression")
        if entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise InputError(f"{name} in it has {entry.file_size:,} bytes", "get the file again")
    if len(entries) > MAX_ENTRIES or len({entry.filename for entry in entries}) < len(entries):
        raise InputError("is an archive of too many files, or of two with one name", "get the file again")
    if sum(entry.file_size for entry in entries) > size:
        raise InputError("says that it holds more than it has", "get the file again")


def _warm_up() -> None:
    """Load both kinds of file once: Python imports some parts only then, and later no file can be opened."""
    for encoding in ("latin-1", "cp437"):  # of pickled bytes, and of names in a zip archive
        codecs.lookup(encoding)
    for is_zip in (True, False):
        buffer = io.BytesIO()
        torch.save({"": torch.zeros(1)}, buffer, _use_new_zipfile_serialization=is_zip)
        parse(buffer, len(buffer.getvalue()))


def _limit(size: int) -> None:
    """Leave this process what reading a file of `size` bytes needs: memory, time, and not a single new descriptor."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS + size // BYTES_A_SECOND
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),  # a signal that tells why, then the one that cannot be caught
        resource.RLIMIT_FSIZE: (BYTES_OUT * size + 2 * SPARE_BYTES_OUT,) * 2,  # the header has a part of it
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),  # no process and no thread besides, but for root, who is not asked
        resource.RLIMIT_NOFILE: (0, 0),  # no file, no socket, and no program, whose loader would have to be opened
    }
    with suppress(OSError):  # only Linux says what is taken, and heeds the limit
        # torch maps ten times as much by itself in some builds as in others: the limit counts from there.
        taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = (taken + BYTES_IN * size + SPARE_BYTES_IN,) * 2
    for kind, most in limits.items():
        with suppress(ValueError):  # a stricter limit is there already
            resource.setrlimit(kind, most)


def _hand_over(named: Mapping[str, Tensor], metadata: Mapping[str, str], stream: BinaryIO) -> None:
    """Write tensors as safetensors."""
    names, tensors = list(named), list(named.values())
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # The widest first, as the library writes them: each then starts at a multiple of its own width.
    order = sorted(range(len(tensors)), key=lambda number: -tensors[number].element_size())
    end = 0
    for number in order:
        tensor = tensors[number]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        place = {"shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[names[number]] = {"dtype": DTYPES[tensor.dtype], **place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for number in order:
        stream.write(tensors[number].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    stream.flush()


def _to_json(value: Value, tensors: list[Tensor]) -> Json:
    """A value as JSON; its tensors go to the end of `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):  # as pairs: a key may be a number, which JSON has not
        return {"dict": [[key, _to_json(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list):
        return [_to_json(one, tensors) for one in value]
    return value


def _from_json(tree: Json, tensor: Callable[[str], Tensor]) -> Value:
    if isinstance(tree, list):
        return [_from_json(one, tensor) for one in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensor(str(tree["tensor"]))
    pairs = cast("list[tuple[str | int, Json]]", tree["dict"])
    return {key: _from_json(one, tensor) for key, one in pairs}


def _taken(path: Path, descriptor: int) -> Value:
    """The value that the child has handed over; the tensors stay mapped on the nameless file it wrote."""
    try:
        with safe_open(f"/dev/fd/{descriptor}", framework="pt") as file:
            return _from_json(json.loads((file.metadata() or {})["tree"]), file.get_tensor)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})", "get the file again") from error
