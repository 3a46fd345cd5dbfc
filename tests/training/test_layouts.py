"""The layouts that people keep their training pictures in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sdcli.errors import SdcliWarning
from sdcli.training import data, layouts
from tests.tars import pack_folder


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


# Several layouts at once


def test_tars_that_another_layout_leaves_out_are_told(own_pictures: Path) -> None:
    pack_folder(own_pictures, own_pictures.parent / "a.tar")
    (own_pictures.parent / "a.tar").rename(own_pictures / "a.tar")
    with pytest.warns(SdcliWarning, match=r"a\.tar left out: what is read is captions beside the pictures"):
        assert len(layouts.read(own_pictures).samples) == 6


def test_a_training_on_tars_sees_what_one_on_files_sees(own_pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    pack_folder(own_pictures, tmp_path / "tars" / "a.tar")
    files, members = data.find(own_pictures), data.find(tmp_path / "tars")
    assert [sample.captions for sample in files.samples] == [sample.captions for sample in members.samples]
    for file, member in zip(files.samples, members.samples, strict=True):
        assert data.load_pixels(file, 16).equal(data.load_pixels(member, 16))
    assert files.manifest_hash != members.manifest_hash  # by the names: a run goes on with what it began with
