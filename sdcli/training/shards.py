"""WebDataset's layout: tars in which all that belongs to one picture has one name up to the first dot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from sdcli.errors import InputError
from sdcli.files import open_regular, reason
from sdcli.pipeline.images import MAX_FILE_BYTES, SUFFIXES
from sdcli.training import tar
from sdcli.training.samples import MAX_CAPTION_BYTES, Fault, Layout, Sample, is_label
from sdcli.training.tables import captions_of
from sdcli.training.tar import Member

NAME = "tars"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
CAPTIONS = ("txt", "caption", "json")  # the first that is there counts
CLASS = "cls"
PACK_ANEW = "pack the tar anew (--fix changes no tar)"

Parts = dict[str, Member]  # what belongs to one picture, by what stands after the first dot of its name


def read(root: Path) -> Layout | None:
    """The samples of the tars in a folder: the tars in the order of their names, each in its own; None without tars.

    A sample is `key.jpg`, or with another suffix of pictures; `key.txt`, `key.caption`, or `key.json` with `text` or
    `caption` says what it shows, and `key.cls` its class. Reads headers and captions; pictures stay where they are.
    """
    whole = tars(root)
    unpacked = {path.stem for path in whole}
    compressed = sorted(path for path in root.iterdir() if (name := _compressed_name(path)) and name not in unpacked)
    if not whole and not compressed:
        return None
    rows = [row for path in whole for row in _rows(path)]
    return Layout.of(NAME, [*rows, *(_compressed(path) for path in compressed)])


def tars(root: Path) -> list[Path]:
    """The uncompressed tars right in a folder."""
    return sorted(path for path in root.iterdir() if path.suffix.lower() == ".tar" and not path.is_dir())


def _compressed_name(path: Path) -> str | None:
    """The name of a compressed tar without what says that it is one."""
    ending = next((ending for ending in COMPRESSED if path.name.endswith(ending)), None)
    return path.name.removesuffix(ending) if ending is not None else None


def _compressed(path: Path) -> Fault:
    return Fault("tar", str(path), "is compressed", "unpack it to a .tar, out of which pictures are read as they are")


def _rows(path: Path) -> Iterator[Sample | Fault]:
    """What one tar holds."""
    try:
        with open_regular(path) as stream:
            groups, faults = _grouped(path, stream)
            yield from faults
            yield from (_sample(path, stream, parts) for parts in groups.values())
    except InputError as error:
        yield Fault("tar", str(path), error.message.removeprefix(f"{path}: "), error.hint)
        return
    if not groups and not faults:
        yield Fault("tar", str(path), "holds no picture", "pack them as 0001.png beside 0001.txt")


def _grouped(path: Path, stream: BinaryIO) -> tuple[dict[str, Parts], list[Fault]]:
    """The members of a tar by the key of their sample, and what of it is none or cannot be used."""
    groups: dict[str, Parts] = {}
    faults = []
    try:
        for member in tar.members(stream):
            name = PurePosixPath(member.name)
            problem = _problem(member, name)
            if member.kind == tar.FILE and problem is None and not any(part[0] == "." for part in name.parts):
                key, _, suffix = name.name.partition(".")
                if _belongs(suffix.lower()):
                    parts = groups.setdefault(str(name.with_name(key)), {})
                    problem = "is there twice" if suffix.lower() in parts else None
                    parts.setdefault(suffix.lower(), member._replace(name=str(name)))
            if problem is not None:
                faults.append(Fault("tar", f"{path}/{member.name}", problem, f"leave it out: {PACK_ANEW}"))
    except tar.Compressed:
        faults.append(_compressed(path))
    except tar.Damaged as error:
        faults.append(Fault("tar", str(path), str(error), "fetch it or pack it anew"))
    return groups, faults


def _problem(member: Member, name: PurePosixPath) -> str | None:
    """Why a member must not be there, even if nothing is unpacked here."""
    if name.is_absolute() or ".." in name.parts:
        return "leads outside the tar"
    return None if member.kind in (tar.FILE, tar.FOLDER) else f"is {member.kind}"


def _belongs(suffix: str) -> bool:
    """Whether a member may be part of a sample; `seg.png` may, to be named where no picture stands beside it."""
    return suffix in (*CAPTIONS, CLASS) or PurePosixPath(f"_.{suffix}").suffix in SUFFIXES


def _sample(path: Path, stream: BinaryIO, parts: Parts) -> Sample | Fault:
    pictures = [member for suffix, member in parts.items() if f".{suffix}" in SUFFIXES]
    if not pictures:
        part = next(iter(parts.values()))
        hint = f"a picture and its caption are called alike up to the first dot; {PACK_ANEW}"
        return Fault("no picture", f"{path}/{part.name}", "has no picture beside it", hint)
    picture, *others = pictures
    if others:
        what = f"has the name of {picture.name}"
        return Fault("tar", f"{path}/{others[0].name}", what, f"give each picture its own and {PACK_ANEW}")
    if picture.size > MAX_FILE_BYTES:
        what = f"has {picture.size:,} bytes"
        return Fault("picture", f"{path}/{picture.name}", what, f"at most {MAX_FILE_BYTES:,} are accepted here")
    said = next((parts[suffix] for suffix in CAPTIONS if suffix in parts), None)
    part = picture
    try:
        captions = _captions(stream, part := said) if said is not None else ()
        label = _label(stream, part := parts[CLASS]) if CLASS in parts else None
    except UnicodeDecodeError:
        return Fault("encoding", f"{path}/{part.name}", "is not UTF-8", f"save it as UTF-8 and {PACK_ANEW}")
    except (ValueError, TypeError, RecursionError) as error:
        return Fault("caption", f"{path}/{part.name}", reason(error), f"mend it and {PACK_ANEW}")
    return Sample(path, captions, label, picture)


def _captions(stream: BinaryIO, member: Member) -> tuple[str, ...]:
    text = _text(stream, member)
    if not member.name.lower().endswith(".json"):
        return (" ".join(text.split()),)
    row = json.loads(text)
    if not isinstance(row, dict):
        raise TypeError(f"says {row!r}, no object")
    return captions_of(row)


def _label(stream: BinaryIO, member: Member) -> str:
    text = _text(stream, member).strip()
    if not is_label(text):
        raise ValueError(f"names the class {text!r}: one line of printable text is a name")
    return text


def _text(stream: BinaryIO, member: Member) -> str:
    if member.size > MAX_CAPTION_BYTES:
        raise ValueError(f"has {member.size:,} bytes, of {MAX_CAPTION_BYTES:,} that are accepted")
    stream.seek(member.offset)
    return stream.read(member.size).decode("utf-8-sig")
