"""`sdcli schedulers` with figures and with schedulers of other packages; test_schedulers.py has the list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdcli.errors import ExitCode
from tests.commands import Shell, tree


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


PLUG_IN = """
import dataclasses
from sdcli.schedulers import find
GENTLE = dataclasses.replace(find("heun"), summary="Heun, gently.")
BROKEN = dataclasses.replace(find("heun"), module="nowhere_at_all")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small package as pip leaves it, with one scheduler that works, one that cannot be made and one that is not."""
    info = tmp_path / "site" / "walking_sampler-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: walking-sampler\nVersion: 1.0\n", encoding="utf-8")
    names = {"gentle-walk": "GENTLE", "broken-walk": "BROKEN", "no-walk": "MISSING"}
    lines = [f"{name} = walking_sampler:{target}" for name, target in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[sdcli.schedulers.v1]", *lines]), encoding="utf-8")
    (tmp_path / "site" / "walking_sampler.py").write_text(PLUG_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


@pytest.mark.usefixtures("package")
def test_a_scheduler_of_another_package_works_wherever_one_is_named(shell: Shell) -> None:
    command = ("generate", "a cat", "--seed", 1, "--steps", 4, "--json")
    theirs = json.loads(shell(*command, "--scheduler", "Gentle_Walk", "-o", "theirs.png").stdout)
    ours = json.loads(shell(*command, "--scheduler", "heun", "-o", "ours.png").stdout)
    assert (theirs["scheduler"], theirs["evaluations"], ours["evaluations"]) == ("gentle-walk", 7, 7)
    assert Image.open("theirs.png").tobytes() == Image.open("ours.png").tobytes()
    listed = shell("schedulers")
    assert "gentle-walk" in listed.stdout and "Heun, gently." in listed.stdout
    assert listed.stderr.splitlines()[0].startswith("sdcli: warning: scheduler no-walk: ")
    assert json.loads(shell("schedulers", "gentle-walk", "--json").stdout)["evaluations"]["25"] == 49
    bench = shell(
        "bench",
        "--schedulers",
        "gentle-walk,heun",
        "--steps",
        "2,4",
        "--prompt",
        "a cat",
        "--reference-steps",
        8,
        "--json",
    )
    assert bench.code == 0, bench.stderr
    rows = [json.loads(line) for line in bench.lines]
    distances = {(row["scheduler"], row["steps"]): row["latent_rmse"] for row in rows if "latent_rmse" in row}
    assert distances["gentle-walk", 4] == distances["heun", 4] > 0


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "said"), [("broken-walk", "cannot be imported"), ("no-walk", "its plug-in does not load")]
)
def test_a_broken_scheduler_of_another_package_is_an_error_when_it_is_chosen(
    shell: Shell, name: str, said: str
) -> None:
    assert shell("generate", "a cat", "--steps", 2, "--seed", 1, "-o", "a.png").stderr == ""
    outcome = shell("generate", "a cat", "--steps", 2, "--scheduler", name, "-o", "b.png")
    assert (outcome.code, said in outcome.stderr, outcome.data) == (ExitCode.USAGE, True, b"")
    assert len(outcome.stderr.splitlines()) == 1
    assert not Path("b.png").exists()
