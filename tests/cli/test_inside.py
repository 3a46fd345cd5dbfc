"""`sdcli schedulers --plot` as a script sees it; test_schedulers.py has the list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdcli.errors import ExitCode
from tests.commands import Shell, tree


@pytest.fixture
def shell(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd1: Path
) -> Shell:
    """Commands in an empty folder, with the tiny model as the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDCLI_MODEL", str(sd1))
    return Shell(capfdbinary, monkeypatch)


def test_a_figure_is_one_path_and_the_numbers_are_in_the_json(shell: Shell) -> None:
    outcome = shell("schedulers", "k-euler", "--plot", "sigmas", "--steps", 5)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "euler-sigmas.png\n", "")
    assert Image.open("euler-sigmas.png").format == "PNG"
    row = json.loads(shell("schedulers", "euler", "--plot", "sigmas", "--steps", 5, "-o", "a.png", "--json").stdout)
    assert (row["path"], row["plot"], row["steps"]) == ("a.png", "sigmas", 5)
    assert [len(one["sigmas"]) for one in row["schedulers"]] == [5]
    values = json.loads(shell("schedulers", "--plot", "betas", "--json").stdout)["values"]
    assert len(values) == 1000 and values[0] == pytest.approx(0.00085)


def test_what_is_chosen_of_a_scheduler_shows_in_its_figure_and_its_description(shell: Shell) -> None:
    figure = ("--plot", "sigmas", "--steps", 5, "--json")
    plain = json.loads(shell("schedulers", "dpm", *figure, "-o", "a.png").stdout)
    named = json.loads(shell("schedulers", "DPM++ 2M Karras", *figure).stdout)
    asked = json.loads(shell("schedulers", "dpm", "--sigmas", "karras", *figure, "-o", "c.png").stdout)
    assert named["path"] == "dpm-sigmas.png"
    assert named["sigmas"] == asked["sigmas"] == "karras"
    assert named["schedulers"] == asked["schedulers"] != plain["schedulers"]
    assert named["schedulers"][0]["scheduler"] == "dpm karras"
    row = json.loads(shell("schedulers", "dpm", "--order", 3, "--json").stdout)
    assert (row["order"], row["choices"], row["overrides"]["solver_order"]) == (3, {"order": 3}, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sigmas", "karras"], "--sigmas, --order and --timestep-spacing are of one scheduler; say which"),
        (["euler-a", "--plot", "sigmas", "--sigmas", "karras"], "scheduler euler-a takes no --sigmas"),
        (["--plot", "time"], "--plot time: unknown"),
        (["eular", "--plot", "sigmas"], "scheduler 'eular' is unknown; did you mean euler"),
        (["euler", "--plot", "betas"], "--plot betas of euler"),
        (["euler", "--steps", "5"], "--output, --steps and --if-exists are of a figure; say which with --plot"),
        (["-o", "a.png"], "are of a figure"),
        (["--if-exists", "bogus"], "are of a figure"),
        (["--plot", "betas", "-o", "a.jpg"], "figures are written as PNG"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(shell: Shell, arguments: list[str], said: str) -> None:
    outcome = shell("schedulers", *arguments)
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (ExitCode.USAGE, "", 1)
    assert said in outcome.stderr
    assert tree(Path()) == {}
