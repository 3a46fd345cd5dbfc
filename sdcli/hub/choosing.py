"""Which files of a repository are fetched: those that are read, as safetensors, and of two copies of weights one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdcli import layout
from sdcli.errors import InputError
from sdcli.hub import INDEX, SUFFIXES, HubId
from sdcli.layout import MAX_JSON_BYTES, PARTS, STEMS, TOKENIZERS, VARIANTS

OF_TOKENIZERS = re.compile(r"\w[\w.-]*\.json|merges\.txt", re.ASCII)
MAX_TOKENIZER_BYTES = 5 << 20  # of tokenizer.json, as its reader has it
MAX_NAMED = 5  # files in an error
GET_ANOTHER = "name a revision or a repository that has them as safetensors"


@dataclass(frozen=True)
class Remote:
    """A file of a repository. digest: its SHA-256 where it is large (LFS), else git's SHA-1."""

    name: str
    size: int  # bytes
    digest: str


@dataclass(frozen=True)
class Repository:
    """What the Hub has under an id: a commit, and its files by name."""

    hub_id: HubId
    commit: str
    files: Mapping[str, Remote]

    @property
    def folder(self) -> Path:
        """Where the cache has the files of this commit, or will have them."""
        return self.hub_id.folder / "snapshots" / self.commit


def single(repository: Repository) -> Remote | None:
    """The file that is the model: the one that is named, or the only one; None where the model is a folder.

    Raises InputError where there is none, or more than one.
    """
    hub_id, files = repository.hub_id, repository.files
    there = sorted(name for name in files if name.endswith(SUFFIXES))
    if hub_id.file is not None:
        if hub_id.file not in files:
            raise InputError(f"{hub_id}: there is no such file", f"{hub_id.repo} has {_some(there)}")
        return files[hub_id.file]
    if INDEX in files:
        return None
    top = [name for name in there if "/" not in name and name.endswith(".safetensors")]
    if len(top) > 1:
        raise InputError(f"{hub_id}: has {len(top)} single files", f"name one: {hub_id.repo}/FILE, of {_some(top)}")
    if not top:
        what = f"{hub_id}: is no model: it has neither a {INDEX} nor a .safetensors file beside it"
        raise InputError(what, f"it has {_some(there or sorted(files))}")
    return files[top[0]]


def index(repository: Repository) -> list[Remote]:
    """The file that says what kind of model a folder is."""
    return [_small(repository, INDEX)]


def configs(repository: Repository, dtype: str) -> list[Remote]:
    """All that is read of a folder but its weights: configs, vocabularies, what says which shards there are.

    Raises InputError where a part has no weights that are read.
    """
    there = parts(repository)
    names = ["sdcli.json", "words.txt", *(f"{part}/config.json" for part in there), "scheduler/scheduler_config.json"]
    for part in there:
        chosen = _weights_of(repository, part, dtype)
        names += [chosen] if chosen.endswith(".json") else []
        if part in TOKENIZERS:
            names += [name for name in repository.files if _is_of_tokenizer(name, TOKENIZERS[part])]
    return [_small(repository, name) for name in names if name in repository.files]


def weights(repository: Repository, dtype: str) -> list[Remote]:
    """The files with the weights of every part; the configs are in the cache.

    Raises InputError where the index of shards names what is no file of that folder.
    """
    return [one for part in parts(repository) for one in _shards(repository, _weights_of(repository, part, dtype))]


def parts(repository: Repository) -> list[str]:
    """The parts that a folder on the Hub has, of those that are read."""
    return [part for part in PARTS if any(name.startswith(f"{part}/") for name in repository.files)]


def _weights_of(repository: Repository, part: str, dtype: str) -> str:
    """The file with a part's weights, or with the index of their shards.

    Of a copy in float16 and what is published besides, only one is fetched: with `float16` that copy, with `auto` one
    that is in the cache, of this commit or else of another, else the other. Where the other is in the cache of this
    commit, which is then what is read, it is that.
    """
    plain, half = VARIANTS
    order = [half, plain] if dtype == "float16" and not _is_here(repository, part, plain) else [plain, half]
    if dtype == "auto" and _is_half_used(repository, part):
        order = [half, plain]
    for variant in order:
        for name in _forms(part, variant):
            if name in repository.files:
                return name
    pickled = [name for name in repository.files if name.startswith(f"{part}/") and name.endswith((".bin", ".ckpt"))]
    what = f"{repository.hub_id}: has no weights of its {part} that are read"
    raise InputError(f"{what}, only pickled ones ({pickled[0]})" if pickled else what, GET_ANOTHER)


def _is_here(repository: Repository, part: str, variant: str) -> bool:
    return any((repository.folder / name).is_file() for name in _forms(part, variant))


def _is_half_used(repository: Repository, part: str) -> bool:
    """Whether it is the copy in float16 that the cache has: of this commit, else of the others."""
    for folders in ([repository.folder], list(repository.folder.parent.glob("*"))):
        has_plain, has_half = (
            any((folder / name).is_file() for folder in folders for name in _forms(part, variant))
            for variant in VARIANTS
        )
        if has_plain or has_half:
            return not has_plain
    return False


def _forms(part: str, variant: str) -> tuple[str, str]:
    """How weights are called: in one file, or in several, by their index."""
    stem = STEMS[part]
    return f"{part}/{stem}{variant}.safetensors", f"{part}/{stem}.safetensors.index{variant}.json"


def _shards(repository: Repository, name: str) -> Iterator[Remote]:
    if not name.endswith(".json"):
        yield repository.files[name]
        return
    folder = name.rpartition("/")[0]
    for shard in layout.shard_names(repository.folder / name):
        if "/" in shard or f"{folder}/{shard}" not in repository.files:
            raise InputError(f"{repository.hub_id}: {name} names {shard!r}, which it does not have", GET_ANOTHER)
        yield repository.files[f"{folder}/{shard}"]


def _small(repository: Repository, name: str) -> Remote:
    found = repository.files[name]
    most = MAX_TOKENIZER_BYTES if name.endswith("/tokenizer.json") else MAX_JSON_BYTES
    if found.size > most:
        what = f"{repository.hub_id}: {name} has {found.size:,} bytes"
        raise InputError(what, f"at most {most:,} are accepted here")
    return found


def _is_of_tokenizer(name: str, folder: str) -> bool:
    head, _, tail = name.rpartition("/")
    return head == folder and OF_TOKENIZERS.fullmatch(tail) is not None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}" if names else "none"
