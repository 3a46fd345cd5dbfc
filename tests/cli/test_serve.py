"""What `sdcli serve` refuses, and what tells of it; test_serve.py has it at work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdcli.checks import parse_idle
from sdcli.errors import ExitCode, UsageError
from sdcli.warm import place
from tests.commands import Shell


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capfdbinary, monkeypatch)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("0.1s", 0.1), ("720h", 2.592e6)]
)
def test_idle_times_have_a_unit(text: str, seconds: float) -> None:
    assert parse_idle(text) == pytest.approx(seconds)
    assert parse_idle("never") is None


@pytest.mark.parametrize(
    "text", ["", "10", "m", "0s", "0.0m", "-1m", "721h", "1e3s", "10 m", "10min", "nans", "infs", "٣m"]
)
def test_what_is_no_idle_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--idle {text}: "):
        parse_idle(text)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--idle", "10"), ExitCode.USAGE, "--idle 10: is no time; write it as 90s, 10m, 2h or never"),
        (("--idle", "0s"), ExitCode.USAGE, "--idle 0s: out of range; it must be above 0 and at most 720h, or never"),
        (("--dtype", "int8"), ExitCode.USAGE, "--dtype int8: unknown"),
        (("--device", "abacus"), ExitCode.USAGE, "--device abacus: unknown"),
        (("--device", "cuda:99"), ExitCode.RESOURCES, "this machine has no such device"),
        (("--model", "nowhere"), ExitCode.INPUT, "nowhere: no such model"),
        (("--model", "no/where", "--offline"), ExitCode.INPUT, "no/where: is not in the local cache"),
        (("puppy",), ExitCode.USAGE, "puppy"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_listens(
    shell: Shell, words: tuple[str, ...], code: ExitCode, said: str
) -> None:
    outcome = shell("serve", *words)
    assert (outcome.code, outcome.stdout) == (code, "")
    assert outcome.stderr.count("\n") == 1 and said in outcome.stderr
    assert not place.socket_path().exists()


def test_it_says_where_it_listens_in_both_forms(shell: Shell, sd1: Path) -> None:
    outcome = shell("serve", "--model", sd1, "--idle", "0.05s")
    assert (outcome.code, outcome.stdout) == (0, f"ready: {place.socket_path()}\n")
    assert outcome.stderr == "nothing to draw for 0.05s: ended\n"
    outcome = shell("serve", "--model", sd1, "--idle", "0.05s", "--json")
    assert json.loads(outcome.stdout) == {"ready": str(place.socket_path()), "model": str(sd1)}
    assert outcome.stderr == ""


def test_doctor_tells_whether_there_is_a_warm_process(shell: Shell) -> None:
    assert json.loads(shell("doctor", "--json").stdout)["warm_process"] == "none"
    place.socket_path().parent.mkdir(mode=0o700, exist_ok=True)
    place.socket_path().write_text("")
    told = json.loads(shell("doctor", "--json").stdout)["warm_process"]
    place.socket_path().unlink()
    assert told == f"not used: {place.socket_path()} is no socket"
