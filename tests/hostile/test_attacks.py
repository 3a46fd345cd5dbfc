"""Hostile files at every door: one line, the right exit code, nothing run, nothing written, little time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdcli.errors import ExitCode
from tests.commands import Shell
from tests.forks import Forks
from tests.hostile.attacks import CANARY, Attack, attacks
from tests.hostile.trial import names, tried

# A model is needed only when an attack is prepared: what there is to try is known without one.
KNOWN = tuple(attacks(Path("/nowhere")))
DOORS = sorted({attack.door for attack in KNOWN})


def one_a_door() -> Iterator[str]:
    """One attack at each door, another at each as far as there are others, and none that takes seconds."""
    for number, door in enumerate(DOORS):
        here = [one for one in KNOWN if one.door == door and one.code != ExitCode.OK]
        cheap = [one for one in here if not one.starts_child and "300 MB" not in one.name]
        if cheap:
            yield str(cheap[number * 7 % len(cheap)])


@pytest.fixture(scope="module")
def prepared(sd1: Path) -> dict[str, Attack]:
    """All attacks by name, on a model that is there."""
    return {str(attack): attack for attack in attacks(sd1)}


@pytest.mark.parametrize("name", list(one_a_door()))
def test_a_hostile_file_is_refused_in_a_line_and_leaves_nothing(
    shell: Shell, prepared: dict[str, Attack], name: str
) -> None:
    attack = prepared[name]
    command = attack.prepare()
    before = names(Path())
    outcome = shell(*command)
    assert (outcome.code, outcome.data) == (attack.code, b""), outcome.stderr
    assert outcome.stderr.startswith("sdcli: error: ") and outcome.stderr.count("\n") == 1
    assert outcome.stderr.rstrip("\n").isprintable()
    assert names(Path()) == before
    assert not Path(CANARY).exists()


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_every_hostile_file_is_refused_at_little_cost(
    door: str, prepared: dict[str, Attack], tmp_path: Path, forks: Forks
) -> None:
    here = [attack for attack in prepared.values() if attack.door == door]
    trials = (tried(attack, tmp_path / "tried", forks) for attack in here)
    assert [f"{one.attack}: {', '.join(one.faults())}" for one in trials if one.faults()] == []
