"""What a picture says about its making -> settings of `generate`, the files it needs, and what cannot be honoured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcli.archive.foreign import Remark, others, shown
from sdcli.errors import InputError
from sdcli.pipeline.provenance import Provenance
from sdcli.specs import BatchSpec, GenerateSpec

# Of our own record what is no setting, or is looked up elsewhere.
NO_SETTINGS = frozenset({
    *("model", "model_hash", "model_revision", "evaluations", "tokens", "sdcli", "job", "id", "seconds", "path"),
    *("saved_latents", "class", "source", "raw", "negative_tokens", "prompt_template", "negative_template"),
    *("unknown_words", "negative_unknown_words", "saved_memory"),
})  # fmt: skip
# Where a record tells of files, by their field of GenerateSpec and what stands behind the name in its option.
FILES = {
    "init_image": ("init_image", ""),
    "mask": ("mask", ""),
    "latents": ("latents", ""),
    "embeddings": ("embedding", "token"),
    "loras": ("lora", "scale"),
}


@dataclass(frozen=True)
class Named:
    """A file that a picture was made with, or None where it is not told. tail: what follows it, as a token."""

    name: str | None
    sha256: str | None = None
    tail: str | None = None


@dataclass(frozen=True)
class Heard:
    """settings: by GenerateSpec's fields; files: by its fields, too; remarks: what is not honoured."""

    settings: dict[str, Any]
    files: Mapping[str, tuple[Named, ...]] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()


def hear(said: Provenance, path: Path, given: frozenset[str]) -> Heard:
    """What a picture asks for.

    given: GenerateSpec's fields that the user says in place of the picture.
    Raises InputError for a picture that says nothing, or makes no sense.
    """
    if said.source is None:
        hint = "only one that has kept its metadata can be drawn again"
        raise InputError(f"{path}: says nothing about its making", hint)
    if is_own(said):
        return _own(said.facts, path)
    settings, init_image, remarks = others(said, given)
    if not settings.get("prompt") and "class_name" not in settings and "prompt" not in given:
        raise InputError(f"{path}: {said.source} tells no prompt in it", "say what it shows with --prompt")
    files = {"init_image": (Named(init_image),)} if "strength" in settings else {}
    return Heard(settings, files, tuple(remarks))


def is_own(said: Provenance) -> bool:
    """Whether the picture has our record, which is exact, and not just our text for other programs."""
    return said.source == "sdcli" and "Version" not in said.rest


def _own(facts: Mapping[str, Any], path: Path) -> Heard:
    settings: dict[str, Any] = {}
    remarks: list[Remark] = []
    kinds = _kinds()
    for name, value in facts.items():
        if name in NO_SETTINGS or name in FILES or value is None:
            continue
        if name not in kinds:
            remarks.append(Remark(name, f"{name} {shown(value)}: this sdcli knows no such setting"))
        elif not _fits(value, kinds[name]):
            raise InputError(f"{path}: its record has {name} {shown(value)}", "the record was changed by hand")
        else:
            settings[name] = tuple(value) if isinstance(value, list) else value
    label = facts.get("class")
    if isinstance(label, dict) and isinstance(label.get("name"), str):
        settings["class_name"] = label["name"]
    files = {
        field: tuple(_files(facts[name], name, tail, path))
        for name, (field, tail) in FILES.items()
        if facts.get(name) is not None
    }
    return Heard(settings, files, tuple(remarks))


def _kinds() -> dict[str, str]:
    """The type of each of GenerateSpec's fields that a record may tell."""
    fields = {one.name: str(one.type).removesuffix(" | None") for one in dataclasses.fields(GenerateSpec)}
    never = BatchSpec.OF_THE_RUN - {"dtype", "tiling"}
    return {name: kind for name, kind in fields.items() if name not in never and "Path" not in kind}


def _fits(value: object, kind: str) -> bool:
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(float(str(value)))
    if kind.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return type(value) is {"str": str, "int": int, "bool": bool}[kind]


def _files(told: object, name: str, tail: str, path: Path) -> Iterator[Named]:
    """One file, or those of a list. Raises InputError where they are not told as we tell them."""
    for one in told if isinstance(told, list) else [told]:
        record = one if isinstance(one, dict) else {}
        file, digest, behind = record.get("file"), record.get("sha256"), record.get(tail)
        if not isinstance(file, str) or not isinstance(digest, str) or not isinstance(behind, str | int | float | None):
            raise InputError(f"{path}: its record has {name} {shown(one)}", "the record was changed by hand")
        yield Named(file, digest, None if behind is None else str(behind))
