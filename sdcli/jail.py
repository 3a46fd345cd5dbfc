"""Runs the child process that reads files of torch.save, and says what its end means. Imports nothing of torch.

What the child may do, and why there is one, is told in pipeline/pickles.py, which is what it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

from sdcli.errors import InputError, ResourceError
from sdcli.files import atomic_write, exists, make_folder, open_regular, read_bytes, remove_dead_parts, stamp

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch began its files before 1.6 wrote zip archives
REFUSED, NO_ROOM = 3, 5  # exit codes of the child: it says why on stdout; the file it hands over cannot be written
GET_SAFETENSORS = "get the same as safetensors"
MAX_YAML_BYTES = 1 << 20
# Of what as_safetensors makes: the stem, and hashes of the path and of what tells the file from one written anew.
COPY_NAME = re.compile(r"[\w.+,-]{1,80}-(?P<place>[0-9a-f]{16})-[0-9a-f]{16}\.safetensors", re.ASCII)
MAX_WORDS = 1 << 16  # bytes of what the child says
# The path of imports is the parent's, and nothing is read from where the command happens to run.
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sdcli.pipeline import pickles; "
    "pickles.serve(pickles.{})"
)


def is_pickled(path: Path) -> bool:
    """Whether a file begins as torch.save begins one. Raises InputError for one that cannot be read."""
    with open_regular(path) as stream:
        start = stream.read(len(LEGACY_MAGIC))
    return start.startswith(ZIP_MAGIC) or start == LEGACY_MAGIC


def run(path: Path, reader: str, handed_over: IO[bytes], *, max_bytes: int | None = None) -> None:
    """Let the child read a file of torch.save and hand it over as safetensors.

    reader: the function of pipeline/pickles.py that says what of it.
    handed_over: a file open for writing and reading.
    Raises InputError when the file is malformed or holds anything else, ResourceError when there is no room to read it.
    """
    with open_regular(path, max_bytes=max_bytes) as stream:
        start = stream.read(len(LEGACY_MAGIC))
        if not start.startswith(ZIP_MAGIC) and start != LEGACY_MAGIC:
            raise InputError(f"{path}: was not written by torch.save", "name a .pt, .bin or .ckpt file that was")
        code = subprocess.run(
            [sys.executable, "-I", "-c", CHILD.format(reader), json.dumps(sys.path)],
            stdin=stream,
            stdout=handed_over,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
    if code != 0:
        handed_over.seek(0)
        tell(path, code, handed_over.read(MAX_WORDS))


def as_safetensors(path: Path, folder: Path) -> Path:
    """The tensors of a pickled checkpoint as safetensors: a copy in our cache, made where there is none yet.

    Copies of what the file was before it was written anew go.
    folder: where such copies lie. Errors as `run`; OutputError when the copy cannot be written.
    """
    copy = copy_of(path, folder)
    if exists(copy):
        return copy
    make_folder(folder)
    remove_dead_parts(folder)
    mode = path.stat().st_mode & 0o777  # who may not read the one may not read the other
    beside = path.with_suffix(".yaml")
    if exists(beside):  # it may say what the model predicts; the copy counts as whole once its tensors are there
        with atomic_write(copy.with_suffix(".yaml"), mode=mode) as part:
            part.write_bytes(read_bytes(beside, max_bytes=MAX_YAML_BYTES))
    with atomic_write(copy, mode=mode) as part, part.open("w+b") as stream:
        run(path, "checkpoint", stream)
    for old in copies_of(path, folder):
        if old != copy:
            for one in (old, old.with_suffix(".yaml")):
                with suppress(OSError):  # not there, or not ours to delete
                    one.unlink()
    return copy


def copies_of(path: Path, folder: Path) -> list[Path]:
    """All copies there are of what a pickled checkpoint is and was."""
    place = _digest(str(path.resolve()))
    named = ((one, COPY_NAME.fullmatch(one.name)) for one in folder.glob("*.safetensors"))
    return sorted(one for one, match in named if match is not None and match["place"] == place)


def copy_of(path: Path, folder: Path) -> Path:
    """Where the copy of a pickled checkpoint lies, or would: by what is new in a file written anew, its .yaml too."""
    known = ""
    for one in (path, path.with_suffix(".yaml")):
        if exists(one):
            known += "".join(f":{number}" for number in stamp(one.stat()))
    stem = re.sub(r"[^\w.+,-]", "-", path.stem, flags=re.ASCII)[:80]
    return folder / f"{stem}-{_digest(str(path.resolve()))}-{_digest(known)}.safetensors"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def tell(path: Path, code: int, words: bytes) -> NoReturn:
    """Raise what the end of the child means."""
    if code == REFUSED:
        told = json.loads(words)
        raise InputError(f"{path}: {told['what']}", told["hint"])
    if code in (NO_ROOM, 1, -signal.SIGKILL):  # 1: it could not even begin
        what = f"{path}: there is not the room to read it"
        raise ResourceError(what, f"free memory, and space in {tempfile.gettempdir()} and the cache")
    how = "took too long" if code == -signal.SIGXCPU else f"ended with signal {-code}"
    raise InputError(f"{path}: reading it {how}", GET_SAFETENSORS)
