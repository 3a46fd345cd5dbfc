"""What earlier starts found out about the pictures of a folder, kept in the cache: their contents, and what decodes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL

import sdcli
from sdcli import store
from sdcli.errors import InputError, SdcliError
from sdcli.files import atomic_write, make_folder, read_bytes
from sdcli.training.samples import Sample

MAX_BYTES = 1 << 30  # of the file of one folder, which has about 170 bytes a picture
SETTLED_AFTER = 2.0  # s: a younger file may change again and keep its times, for the clocks of file systems are coarse
READER = f"sdcli {sdcli.__version__}, Pillow {PIL.__version__}"  # what one decodes, another may refuse

Row = list[Any]  # facts of the file, SHA-256 of the picture's bytes in hex, whether it was decoded


class Known:
    """The pictures of a folder that were looked at before and have not changed since: by name, size and times.

    A cache that cannot be read or written, or is damaged, costs time and nothing else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self.path = store.cache_folder() / "datasets" / f"{name}.json"
        self._rows: dict[str, Row] = {}
        self._is_changed = False
        with suppress(InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._rows = _read(self.path)

    def content(self, sample: Sample) -> str:
        """SHA-256 of a picture's bytes, in hex. Raises InputError when it cannot be read."""
        facts = _facts(sample)
        found = self._row(sample, facts)
        if found is not None:
            return str(found[1])
        content = content_hash(sample)
        name = sample.name(self.root)
        if facts is not None and time.time_ns() - max(facts[1:3]) > SETTLED_AFTER * 1e9:
            self._rows[name] = [facts, content, False]
        else:
            self._rows.pop(name, None)
        self._is_changed = True
        return content

    def is_decoded(self, sample: Sample) -> bool:
        """Whether the picture, as it is now, was decoded without a fault."""
        found = self._row(sample, _facts(sample))
        return found is not None and found[2] is True

    def note_decoded(self, sample: Sample) -> None:
        """Remember that the picture was decoded, if it still is what its content was asked of."""
        found = self._row(sample, _facts(sample))
        if found is not None:
            found[2] = self._is_changed = True

    def save(self, samples: Iterable[Sample]) -> None:
        """Keep what is known of these, all the pictures there are, for the next start."""
        names = {sample.name(self.root) for sample in samples}
        if not self._is_changed and names >= self._rows.keys():
            return
        rows = {name: row for name, row in self._rows.items() if name in names}
        text = json.dumps({"reader": READER, "pictures": rows}).encode()
        with suppress(SdcliError):
            make_folder(self.path.parent)
            with atomic_write(self.path) as part:
                part.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
            self._is_changed = False

    def _row(self, sample: Sample, facts: list[int] | None) -> Row | None:
        found = self._rows.get(sample.name(self.root))
        return found if found is not None and found[0] == facts else None


def content_hash(sample: Sample) -> str:
    """SHA-256 of a picture's bytes, in hex. Raises InputError when it cannot be read."""
    with sample.open() as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _facts(sample: Sample) -> list[int] | None:
    """What changes whenever a picture's bytes do: its file's size in bytes and times in ns; a member's place in it.

    The second time is that of any change, so that a file put in place with the old one's size and time is told apart.
    """
    try:
        status = sample.path.stat()
    except OSError:
        return None
    place = [sample.member.offset, sample.member.size] if sample.member is not None else []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, *place]


def _read(path: Path) -> dict[str, Row]:
    """What `save` wrote; ValueError and its like where it is damaged."""
    digest, text = read_bytes(path, max_bytes=MAX_BYTES).split(b"\n", 1)
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("damaged")
    whole = json.loads(text)
    rows: dict[str, Row] = whole["pictures"]
    is_same_reader = whole["reader"] == READER
    return {name: [facts, content, is_same_reader and decoded] for name, (facts, content, decoded) in rows.items()}
