"""Tars for tests, as the standard library writes them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path


def packed(contents: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT, comment: str = "") -> bytes:
    """A tar of files by their names; a comment goes into a pax header for all of them."""
    stream = io.BytesIO()
    about = {"comment": comment} if comment else None
    with tarfile.open(fileobj=stream, mode="w", format=form, pax_headers=about) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def pack_folder(folder: Path, target: Path) -> None:
    """All files of a folder, by their names, as a tar."""
    target.write_bytes(packed({path.name: path.read_bytes() for path in sorted(folder.iterdir())}))
