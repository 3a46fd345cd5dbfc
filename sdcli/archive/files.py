"""The files that a picture was made with: looked for beside it, known by their hashes. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sdcli.archive.foreign import Remark
from sdcli.archive.hearing import Named
from sdcli.errors import InputError
from sdcli.files import exists, open_regular, sha256
from sdcli.plan.lora_files import LoraFile, lora_file
from sdcli.plan.words import EmbeddingFile, embedding_file

MAX_BYTES = 4 << 30  # of a LoRA, the largest of them
OPTIONS = {"init_image": "--init-image", "mask": "--mask", "latents": "--latents"}
OPTIONS |= {"embedding": "--embedding", "lora": "--lora"}
REPEATED: dict[str, Callable[[str], EmbeddingFile | LoraFile]] = {"embedding": embedding_file, "lora": lora_file}


def look_up(
    files: Mapping[str, tuple[Named, ...]], given: Mapping[str, Any], picture: Path
) -> tuple[dict[str, Any], list[Remark]]:
    """The fields of GenerateSpec that name files, and what is to be said of those given that are others.

    given: what the user names in place of them, by the same fields. What a picture names is looked for beside it, then
    in the working folder, by the name alone: it leads to no other folder.
    Raises InputError for what is not there, or is another file.
    """
    found: dict[str, Any] = {name: value for name, value in given.items() if value}
    remarks: list[Remark] = []
    for field, all_named in files.items():
        if field in found:
            remarks += _others(field, found[field], all_named)
            continue
        paths = [_find(named, picture, OPTIONS[field]) for named in all_named]
        if field in REPEATED:
            tails = [named.tail for named in all_named]
            found[field] = tuple(_spelled(path, tail) for path, tail in zip(paths, tails, strict=True))
        else:
            found[field] = paths[0]
    return found, remarks


def _find(named: Named, picture: Path, option: str) -> Path:
    if named.name is None:
        what = f"{picture}: was made from another picture, which it does not name"
        raise InputError(what, f"name it with {option}")
    plain = PureWindowsPath(PurePosixPath(named.name).name).name
    apart = None
    for folder in (picture.parent, Path()):
        path = folder / plain
        if not plain or plain.startswith(".") or not exists(path):
            continue
        open_regular(path).close()
        if named.sha256 is None or sha256(path, max_bytes=MAX_BYTES) == named.sha256:
            return path
        apart = path
    if apart is not None:
        what = f"{picture}: was made with {plain}, and {apart} is another file (SHA-256)"
        raise InputError(what, f"name the right one with {option}")
    raise InputError(f"{picture}: was made with {plain!r}, which is not beside it", f"name it with {option}")


def _others(field: str, given: Any, all_named: tuple[Named, ...]) -> list[Remark]:
    """What is to be said of files given by option that are not those of the picture."""
    paths = [REPEATED[field](text).path for text in given] if field in REPEATED else [given]
    hashes = {sha256(path, max_bytes=MAX_BYTES) for path in paths}
    option = OPTIONS[field]
    return [
        Remark(field, f"{option}: is another file than {named.name}, with which it was made (SHA-256)")
        for named in all_named
        if named.sha256 is not None and named.sha256 not in hashes
    ]


def _spelled(path: Path, tail: str | None) -> str:
    """FILE:TOKEN or FILE:SCALE, but for a token with a colon, which can only be the file's own."""
    return f"{path}:{tail}" if tail and ":" not in tail else str(path)
