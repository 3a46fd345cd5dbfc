"""The pickled bombs are what they are called: each is refused for what it holds, and not for being broken."""

from __future__ import annotations

import io

import pytest

from sdcli.errors import InputError
from sdcli.pipeline import pickles
from tests.hostile.attacks import pickled_bombs


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a storage of 1e9", r"record size \(32 bytes\) does not match expected size \(8589934588 bytes"),
        ("100,000 times a megabyte", "holds more text than it has bytes for"),
    ],
)
def test_a_bomb_is_refused_for_what_it_holds(name: str, said: str) -> None:
    content = pickled_bombs()[name]
    assert isinstance(content, bytes)
    with pytest.raises(InputError, match=said):
        pickles.parse(io.BytesIO(content), len(content))
