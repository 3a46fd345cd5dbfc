"""The layouts that people keep their training pictures in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sdcli.training import data, layouts


def test_kohyas_folders_give_repeats_and_a_caption(own_pictures: Path) -> None:
    for name, folder in (("dot.png", "3_sks dot"), ("bar.png", "1_a bar"), ("ring.png", "others")):
        (own_pictures / folder).mkdir()
        (own_pictures / name).rename(own_pictures / folder / name)
    (own_pictures / "bar.txt").rename(own_pictures / "1_a bar" / "bar.txt")
    for path in own_pictures.glob("*.png"):
        path.unlink()
    found = data.find(own_pictures)
    assert found.layout == "folders of repeats"
    assert Counter((s.path.name, *s.captions) for s in found.samples) == {
        ("dot.png", "sks dot"): 3,
        ("bar.png", "a picture of a bar"): 1,  # what stands beside a picture goes before its folder's name
    }
    assert [sample.path.name for sample in found.pictures] == ["bar.png", "dot.png"]


@pytest.mark.parametrize("repeats", ["0", "10001", "9" * 5000])
def test_a_folder_that_cannot_be_repeated_is_a_fault(tmp_path: Path, repeats: str) -> None:
    name = f"{repeats[:200]}_a dot"
    (tmp_path / name).mkdir()
    (fault,) = layouts.read(tmp_path).faults
    assert fault.kind == "folder" and "1 to 10,000" in fault.hint
