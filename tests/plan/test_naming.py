"""Results have names that fit and stay in their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.checks import parse_output
from sdcli.errors import OutputError, UsageError
from sdcli.plan.naming import fill, is_output_folder, slug, targets
from sdcli.specs import GenerateSpec


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a picture of a puppy", "a-picture-of-a-puppy"),
        ("  A  Dog,\tand: a CAT!  ", "a-dog-and-a-cat"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\con\0.png", "c-con-png"),
        ("\x1b[31mred\x1b[0m", "31mred-0m"),
        ("Ein Hündchen", "ein-hündchen"),
        ("小狗的照片", "小狗的照片"),
        ("!!! ... ???", "image"),
        ("🐶", "image"),
        ("x" * 999, "x" * 60),
        ("-rf --output", "rf-output"),
    ],
)
def test_a_prompt_becomes_a_plain_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@given(st.text(max_size=400))
def test_every_prompt_becomes_a_name_that_fits_and_stays_in_its_folder(prompt: str) -> None:
    name = f"{slug(prompt)}-{2**64 - 1}.png"
    assert len(name.encode()) <= 255
    assert Path("folder", name).parent == Path("folder")
    assert name.isprintable() and " " not in name
    assert not name.startswith(("-", "."))


def test_a_slash_at_the_end_means_a_folder_whatever_its_suffix_and_fields() -> None:
    assert named("out-v1.5/") == ["out-v1.5/a-red-apple-7.png", "out-v1.5/a-red-apple-8.png"]
    assert named("{scheduler}.d/", (7,)) == ["dpm-sde.d/a-red-apple-7.png"]
    with pytest.raises(UsageError, match=r"--output out-v1\.5: is of no kind of picture"):
        named("out-v1.5")
    child = parse_output("out-v1.5/") / "x.png"
    assert (child, is_output_folder(child), parse_output("out")) == (Path("out-v1.5/x.png"), False, Path("out"))


# Templates.

SETTINGS: dict[str, object] = {
    "scheduler": "dpm-sde",
    "steps": 25,
    "guidance": 7.5,
    "width": 512,
    "height": 768,
    "model": "stable-diffusion-v1-5",
}
VALUES = {"index": 3, "seed": 2**64 - 1, "slug": "a-red-apple", **SETTINGS}


def named(
    output: Path | str, seeds: tuple[int, ...] = (7, 8), subject: str = "A red apple!", **values: Any
) -> list[str]:
    """The targets of two images."""
    spec = GenerateSpec(output=parse_output(output), **values)
    return [str(path) for path in targets(spec, seeds, [subject] * len(seeds), SETTINGS)]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{index:04d}-{seed}-{slug}.png", f"0003-{2**64 - 1}-a-red-apple.png"),
        ("{scheduler}_{steps}_{guidance}_{width}x{height}", "dpm-sde_25_7.5_512x768"),
        ("{model}/{guidance:.2f}", "stable-diffusion-v1-5/7.50"),
        ("{slug:.5}|{slug:>15}|{seed:x}", "a-red|a-red-apple|ffffffffffffffff"),
        ("{{seed}}-{seed:d}}}", "{seed}-18446744073709551615}"),
        ("no fields {{}}", "no fields {}"),
    ],
)
def test_fields_are_filled_and_double_braces_are_single_ones(template: str, name: str) -> None:
    assert fill(template, VALUES) == name


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{date}.png",
            "{date} is no field; there are index, seed, slug, scheduler, steps, guidance, width,",
        ),
        ("{}.png", "{} is no field"),
        ("{0}.png", "{0} is no field"),
        ("{slug.__class__}.png", "{slug.__class__} is no field"),
        ("{slug[0]}.png", "{slug[0]} is no field"),
        ("{slug!r}.png", "{slug!r} is in no form for names"),
        ("{seed:/>40}.png", "{seed:/>40} is in no form for names"),
        ("{seed:{index}}.png", "{seed:{index}} is in no form for names"),
        ("{seed:9999999999}.png", "{seed:9999999999} is in no form for names"),
        ("{slug:04d}.png", "{slug:04d}: unknown format code"),
        ("{seed.png", "has a brace without its partner; write {{"),
        ("seed}.png", "has a brace without its partner"),
    ],
)
def test_what_is_no_plain_field_is_refused(template: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        fill(template, VALUES)
    assert said in str(refused.value)


@given(
    st.sampled_from(["{v}", "{v}/{v}", "a/{v}/../b{v}", ".{v}", "{v:.3}", "{v}.png", "..{v}..", "{v:5}/x"]),
    st.text(max_size=30) | st.sampled_from(["..", "/", "/etc/passwd", "../..", "a/../../b", "C:\\x", "~", "\0", ". ."]),
)
def test_no_value_leads_out_of_the_part_of_the_path_where_it_stands(template: str, value: str) -> None:
    plain, filled = fill(template, {"v": "x"}), fill(template, {"v": value})
    assert filled.count("/") == plain.count("/")
    assert all(c.isprintable() for c in filled)
    for before, after in zip(plain.split("/"), filled.split("/"), strict=True):
        assert (after in ("", ".", "..")) == (before in ("", ".", ".."))


def test_every_image_has_its_index_and_its_seed(tmp_path: Path) -> None:
    assert named(tmp_path / "{index:02d}-{seed}-{slug}.webp") == [
        f"{tmp_path}/01-7-a-red-apple.webp",
        f"{tmp_path}/02-8-a-red-apple.webp",
    ]
    assert named(tmp_path / "{scheduler}/{seed}.png")[0] == f"{tmp_path}/dpm-sde/7.png"


@pytest.mark.parametrize(
    ("name", "form", "ending"),
    [("{seed}", None, "7.png"), ("{seed}-{guidance}", "jpg", "7-7.5.jpg"), ("{seed:.1f}", "webp", "7.0.webp")],
)
def test_a_template_without_a_suffix_gets_that_of_the_format(
    tmp_path: Path, name: str, form: str | None, ending: str
) -> None:
    assert named(tmp_path / name, format=form)[0] == f"{tmp_path}/{ending}"


@pytest.mark.parametrize(("name", "said"), [("{seed}.bmp", "of no kind"), ("{seed}.png", "contradict each other")])
def test_the_suffix_of_a_template_is_held_to_what_can_be_written(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        named(tmp_path / name, format="webp")


def test_equal_names_are_numbered_or_refused_as_if_exists_says(tmp_path: Path) -> None:
    seeds = (1, 1, 2, 1)
    assert [Path(one).name for one in named(tmp_path / "x{seed}.png", seeds)] == [
        "x1.png",
        "x1-2.png",
        "x2.png",
        "x1-3.png",
    ]
    assert [Path(one).name for one in named(tmp_path / "{slug}.png", seeds, "x")] == [
        "x.png",
        "x-2.png",
        "x-3.png",
        "x-4.png",
    ]
    for if_exists in ("skip", "overwrite", "error"):
        with pytest.raises(UsageError, match=r"x1\.png: would be the name of two pictures; add {seed} or {index}"):
            named(tmp_path / "x{seed}.png", seeds, if_exists=if_exists)


def test_a_filled_name_that_no_file_system_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="over 255 bytes"):
        named(tmp_path / "{slug}{slug}{slug}.png", subject="小狗" * 60)


def test_webp_is_refused_sides_that_it_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="width 16384 px: WebP takes up to 16383"):
        targets(GenerateSpec(output=tmp_path, format="webp"), (7,), ["x"], SETTINGS | {"width": 16384})


def test_folders_that_are_there_are_no_templates_whatever_their_names(tmp_path: Path) -> None:
    place = tmp_path / "my {seed} {no field} {"
    with pytest.raises(UsageError, match="has a brace without its partner"):
        named(place)
    place.mkdir()
    assert named(place) == [f"{place}/a-red-apple-7.png", f"{place}/a-red-apple-8.png"]
    assert named(place / "x.png") == [f"{place}/x.png", f"{place}/x-2.png"]
    assert named(place / "sub" / "{seed}") == [f"{place}/sub/7.png", f"{place}/sub/8.png"]


@pytest.mark.parametrize("if_exists", ["overwrite", "skip", "error"])
def test_a_folder_in_the_place_of_a_picture_is_refused_before_anything_is_drawn(tmp_path: Path, if_exists: str) -> None:
    for there in ("x-2.png", "8.png"):
        (tmp_path / there).mkdir()
    with pytest.raises(OutputError, match=r"x-2\.png: is a folder; choose another name"):
        named(tmp_path / "x.png", if_exists=if_exists)
    with pytest.raises(OutputError, match=r"8\.png: is a folder; choose another name"):
        named(tmp_path / "{seed}.png", if_exists=if_exists)
    assert named(tmp_path / "{seed}.png")[0] == f"{tmp_path}/7.png"  # and is numbered when it is put in place
