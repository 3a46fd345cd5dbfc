"""Files that list pictures: metadata.jsonl, metadata.csv."""

from __future__ import annotations

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
