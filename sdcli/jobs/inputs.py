"""The files that jobs name: which fields do, what is in them, and whether that is a picture. No torch.

A file of another content makes another job, whatever it is called.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

from sdcli import latent_files
from sdcli.errors import SdcliWarning
from sdcli.files import sha256
from sdcli.plan.initial import InitialPicture
from sdcli.specs import BatchSpec, GenerateSpec

FILES_AND_MORE = ("embedding", "lora")  # fields of `FILE:MORE`
PATHS = [
    f.name for f in dataclasses.fields(GenerateSpec) if "Path" in str(f.type) and f.name not in BatchSpec.OF_THE_RUN
]


def files(asked: GenerateSpec) -> Iterator[Path]:
    """The files that a job names; of `FILE:MORE` either reading."""
    yield from (path for name in PATHS if (path := getattr(asked, name)) is not None)
    for text in (text for name in FILES_AND_MORE for text in getattr(asked, name)):
        yield from map(Path, (text, text.rpartition(":")[0]))


def stamp(path: Path) -> tuple[int, ...]:
    """What is another as soon as a file is written anew; the same for all that is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def content(path: Path) -> str:
    """The hash of a file. Raises InputError when it cannot be read."""
    return sha256(path, max_bytes=latent_files.MAX_BYTES)


def check_pictures(initial: InitialPicture) -> None:
    """Raise InputError for a picture or a mask that cannot be decoded to its end."""
    from sdcli.pipeline import images  # deferred: 0.1 s that only pictures need; it brings no torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdcliWarning)  # told when it is drawn from
        for path in (initial.path, initial.mask):
            if path is not None:
                images.load_image(path)
