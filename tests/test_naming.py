"""Results have names that fit and stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.naming import slug


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
