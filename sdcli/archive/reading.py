"""A picture file -> what it says about its making, the scheduler by our name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sdcli import schedulers
from sdcli.errors import UsageError
from sdcli.files import read_bytes
from sdcli.pipeline import containers, provenance
from sdcli.pipeline.provenance import Provenance

MAX_FILE_BYTES = 1 << 28
MAX_NAME_LENGTH = 100  # of a scheduler in another program's words
# Words for a noise schedule that other programs write behind a sampler's name.
SCHEDULES = frozenset({"automatic", "ays", "beta", "discrete", "exponential", "gits", "karras", "kl_optimal", "normal"})
SCHEDULES |= {"sgm_uniform", "simple", "smoothstep", "uniform"}
USUAL_SCHEDULES = frozenset({"", "automatic", "normal", "discrete", "default", "uniform", "none"})


def read(path: Path) -> Provenance:
    """What a PNG, JPEG or WebP file says: `scheduler` with its options in our words, or None; `sampler` in theirs.

    Raises InputError for what is no whole file of these, or holds texts beyond all measure.
    """
    return said_in(read_bytes(path, max_bytes=MAX_FILE_BYTES), path)


def said_in(data: bytes, path: Path) -> Provenance:
    """The same of a file that is read already; path: what errors call it."""
    said = provenance.find_out(containers.look_inside(data, path), path)
    return replace(said, facts=said.facts | _scheduler(said.facts))


def has_usual_schedule(facts: dict[str, Any]) -> bool:
    """Whether the other program's schedule is the plain one, at the timesteps."""
    return str(facts.get("schedule", "")).casefold() in USUAL_SCHEDULES


def _scheduler(facts: dict[str, Any]) -> dict[str, Any]:
    """The scheduler by our name, with the options that its name there stands for; None where we have no such."""
    if "sampler" not in facts:
        return {}
    sampler, schedule = str(facts["sampler"]), str(facts.get("schedule", ""))
    words = sampler if has_usual_schedule(facts) else f"{sampler} {schedule}"
    before, _, last = sampler.rpartition(" ")  # stable-diffusion.cpp: `euler_a karras`, which ours may not have
    for name in dict.fromkeys((words, sampler, before if last.casefold() in SCHEDULES else sampler)):
        try:
            found = schedulers.find(name[:MAX_NAME_LENGTH])
        except UsageError:
            continue
        return {"scheduler": found.name, **found.choices, "sampler": words}
    return {"scheduler": None, "sampler": words}
