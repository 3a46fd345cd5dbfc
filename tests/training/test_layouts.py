"""The layouts that people keep their training pictures in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sdcli.errors import InputError
from sdcli.training import data, layouts


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    return {sample.path.name: sample.captions for sample in layouts.read(folder).samples}


def test_a_table_says_what_the_pictures_show(own_pictures: Path) -> None:
    (own_pictures / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,text\r\ndot.png,"a dot, black"\r\nbar.png,\r\n')
    assert layouts.read(own_pictures).name == "metadata.csv"
    assert captions(own_pictures) == {"dot.png": ("a dot, black",), "bar.png": ("",)}
    with pytest.raises(InputError, match=r"1 of 2 pictures have no caption: bar\.png"):
        data.check_captions(data.find(own_pictures))


def test_a_wrong_line_of_a_table_is_named_by_its_number(own_pictures: Path) -> None:
    (own_pictures / "metadata.csv").write_text("file_name,text\ndot.png,a dot\nnone.png,a bar\n", encoding="utf-8")
    (fault,) = layouts.read(own_pictures).faults
    assert (fault.path, fault.problem) == (f"{own_pictures}/metadata.csv:3", "'none.png' does not exist")


@pytest.mark.parametrize("table", [b"name,text\ndot.png,a dot\n", b"\xff\xfe\x00"])
def test_a_table_without_file_names_or_in_another_encoding_is_refused(own_pictures: Path, table: bytes) -> None:
    (own_pictures / "metadata.csv").write_bytes(table)
    with pytest.raises(InputError, match=r"metadata\.csv"):
        data.find(own_pictures)


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
