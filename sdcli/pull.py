"""STORY: a Hub id -> the model in huggingface_hub's cache, as the Hub has it now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli import store
from sdcli.hub import pulling
from sdcli.hub.fetching import Arrived as Arrived
from sdcli.model_specs import PullSpec


@dataclass(frozen=True)
class Pulled:
    """The model is there. path: its folder or its file; received: bytes that came for it."""

    path: Path
    commit: str
    received: int
    facts: dict[str, Any]


def run(spec: PullSpec) -> Iterator[Arrived | Pulled]:
    """Fetch what is not in the cache yet, yielding on the way, at the end what is there; errors as `pulling.pull`."""
    received = 0
    for step in pulling.pull(spec.hub_id, spec.dtype):
        received += step.received
        yield step
    model = store.find(spec.model, offline=True)
    path = model.source or model.folder
    root = path if path.is_dir() else path.parent
    files = sorted(one for one in root.rglob("*") if one.is_file()) if path.is_dir() else [path]
    facts: dict[str, Any] = {"model": spec.model, "repo": spec.hub_id.repo, **model.pinned(), "path": str(path)}
    facts |= {"files": [one.relative_to(root).as_posix() for one in files]}
    facts |= {"bytes": sum(one.stat().st_size for one in files), "bytes_fetched": received}
    yield Pulled(path, str(model.revision), received, facts)
