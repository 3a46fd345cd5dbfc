"""What is written beside the pictures has names of its own, which are looked at before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdcli.checks import parse_output
from sdcli.errors import OutputError, UsageError
from sdcli.plan.beside import Beside, arrange, frame
from sdcli.specs import GenerateSpec

SIZE = {"width": 32, "height": 32}


def arranged(paths: list[str], last: int = 25, **own: Any) -> tuple[list[str], Beside]:
    spec = GenerateSpec(output=Path("out"), count=len(paths), **own)
    pictures, beside = arrange(spec, [Path(path) for path in paths], last, SIZE)
    return [str(path) for path in pictures], beside


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_without_a_wish_there_is_nothing() -> None:
    assert arranged(["x.png"]) == (["x.png"], Beside())
    assert Beside().folders == set() and Beside().describe(25) == {}


def test_frames_are_named_by_their_picture_and_those_of_different_folders_stay_apart() -> None:
    pictures, beside = arranged(["1/pic.png", "2/pic.png", "2/a.b.png"], save_steps=Path("steps"))
    assert pictures == ["1/pic.png", "2/pic.png", "2/a.b.png"]
    assert [str(frame(path, 7)) for path in beside.frames] == [
        "steps/pic-step-0007.png",
        "steps/pic-2-step-0007.png",
        "steps/a.b-step-0007.png",
    ]
    assert beside.folders == {Path("steps")}


def test_a_folder_is_a_folder_whatever_its_suffix() -> None:
    Path("steps.d").mkdir()
    assert arranged(["a.png", "b.png"], save_steps=Path("steps.d"))[1].frames == (Path("steps.d/a"), Path("steps.d/b"))


def test_a_slash_at_its_end_makes_a_folder_of_a_name_that_is_not_there() -> None:
    beside = arranged(["a.png", "b.png"], save_steps=parse_output("steps.d/"))[1]
    assert beside.frames == (Path("steps.d/a"), Path("steps.d/b"))
    with pytest.raises(UsageError, match=r"--save-steps steps\.d: a film is a \.webp file"):
        arranged(["a.png"], save_steps=parse_output("steps.d"))
    with pytest.raises(UsageError, match=r"--grid g\.png: is no name of a picture file"):
        arranged(["a.png"], grid=parse_output("g.png/"))


def test_the_frames_of_a_picture_that_is_numbered_bear_its_number() -> None:
    touch("x.png", "x-2.png")
    pictures, beside = arranged(["x.png", "y.png"], save_steps=Path("steps"))
    assert (pictures, beside.frames) == (["x-3.png", "y.png"], (Path("steps/x-3"), Path("steps/y")))


def test_a_picture_is_numbered_past_the_frames_of_one_that_is_gone_and_past_its_neighbours() -> None:
    touch("steps/x-step-0001.png", "steps/x-3-step-0099.png", "steps/y-step-1.png", "steps/z-step-0001.txt")
    pictures, beside = arranged(["x.png", "x-2.png", "y.png", "z.png"], save_steps=Path("steps"))
    assert pictures == ["x-4.png", "x-2.png", "y.png", "z.png"]
    assert [path.name for path in beside.frames] == ["x-4", "x-2", "y", "z"]
    assert arranged(["x.png"], save_steps=Path("steps"), if_exists="overwrite")[0] == ["x.png"]


def test_frames_that_are_there_are_refused_when_that_was_asked_for() -> None:
    touch("steps/x-step-0003.png")
    with pytest.raises(OutputError, match="steps: has steps of a picture x already; choose another folder, or another"):
        arranged(["x.png"], save_steps=Path("steps"), if_exists="error")
    arranged(["y.png"], save_steps=Path("steps"), if_exists="error")


def test_a_name_that_is_too_long_for_a_frame_is_refused() -> None:
    name = "x" * 245
    arranged([f"{name}.png"])
    with pytest.raises(OutputError, match=r"--save-steps xxx.*: has over 255 bytes"):
        arranged([f"{name}.png"], save_steps=Path("steps"))
    arranged([f"{name[:241]}.png"], save_steps=Path("steps"))


def test_the_paths_are_described() -> None:
    films = arranged(["x.png"], save_steps=Path("film.webp"), grid=Path("all.jpg"))[1]
    assert films.describe(25) == {"grid": "all.jpg", "save_steps": "film.webp"}
    assert films.folders == {Path()}
    frames = arranged(["x.png", "y.png"], save_steps=Path("s"))[1]
    assert frames.describe(25) == {"save_steps": ["s/x-step-{0001..0025}.png", "s/y-step-{0001..0025}.png"]}
    assert frames.describe(1)["save_steps"][0] == "s/x-step-0001.png"
    assert frames.describe(0)["save_steps"][0] == "s/x-step-0000.png"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"grid": Path("-")}, "--grid -: stdout takes a picture alone"),
        ({"save_steps": Path("-")}, "--save-steps -: stdout takes a picture alone"),
        ({"save_latents": Path("-")}, "--save-latents -: stdout takes a picture alone"),
        ({"grid": Path("q{seed}.png")}, r"--grid q{seed}\.png: has braces, and only --output has fields"),
        ({"save_steps": Path("{seed}")}, "--save-steps {seed}: has braces"),
        ({"save_latents": Path("{seed}/x")}, "--save-latents {seed}/x: has braces"),
        ({"grid": Path("g.png"), "quality": 80}, r"--quality 80 with --grid g\.png: a PNG picture loses nothing"),
        ({"save_steps": Path("x.gif")}, r"--save-steps x\.gif: a film is a \.webp file"),
        ({"grid": Path("f.webp"), "save_steps": Path("f.webp")}, "would be the name of a picture, too"),
    ],
)
def test_what_cannot_be_is_refused(own: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        arranged(["x.png"], **own)


def test_braces_of_a_folder_that_is_there_are_part_of_its_name() -> None:
    Path("{a}").mkdir()
    assert arranged(["x.png"], grid=Path("{a}/g.png"), save_steps=Path("{a}"))[1].frames == (Path("{a}/x"),)
