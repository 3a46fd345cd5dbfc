"""Files that list pictures: metadata.jsonl, metadata.csv, kohya's JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdcli.errors import InputError
from sdcli.training import data, layouts
from sdcli.training.samples import Fault


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    found = layouts.read(folder)
    assert found.faults == []
    return {sample.name(folder): sample.captions for sample in found.samples}


def write(folder: Path, name: str, value: object) -> Path:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder / name


def only_fault(folder: Path) -> Fault:
    (fault,) = layouts.read(folder).faults
    return fault


# metadata.csv


def test_a_table_says_what_the_pictures_show(own_pictures: Path) -> None:
    (own_pictures / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,text\r\ndot.png,"a dot, black"\r\nbar.png,\r\n')
    assert layouts.read(own_pictures).name == "metadata.csv"
    assert captions(own_pictures) == {"dot.png": ("a dot, black",), "bar.png": ("",)}
    with pytest.raises(InputError, match=r"1 of 2 pictures have no caption: bar\.png"):
        data.check_captions(data.find(own_pictures))


def test_a_wrong_line_of_a_table_is_named_by_its_number(own_pictures: Path) -> None:
    (own_pictures / "metadata.csv").write_text("file_name,text\ndot.png,a dot\nnone.png,a bar\n", encoding="utf-8")
    fault = only_fault(own_pictures)
    assert (fault.path, fault.problem) == (f"{own_pictures}/metadata.csv:3", "'none.png' does not exist")


@pytest.mark.parametrize("table", [b"name,text\ndot.png,a dot\n", b"\xff\xfe\x00"])
def test_a_table_without_file_names_or_in_another_encoding_is_refused(own_pictures: Path, table: bytes) -> None:
    (own_pictures / "metadata.csv").write_bytes(table)
    with pytest.raises(InputError, match=r"metadata\.csv"):
        data.find(own_pictures)


# metadata.jsonl; most of it is in test_data.py


def test_a_column_of_labels_names_the_classes(own_pictures: Path) -> None:
    (own_pictures / "metadata.csv").write_text("file_name,label\ndot.png,round\nbar.png,long\nring.png,round\n")
    dataset = data.find(own_pictures)
    assert dataset.classes == ("long", "round")
    assert [(s.label, s.captions) for s in dataset.samples] == [(c, (c,)) for c in ("round", "long", "round")]


@pytest.mark.parametrize("label", [1.5, True, ["round"], "two\nlines", " "])
def test_a_label_that_is_no_name_is_a_fault(own_pictures: Path, label: object) -> None:
    write(own_pictures, "metadata.jsonl", {"file_name": "dot.png", "label": label})
    assert "neither a name nor a number" in only_fault(own_pictures).problem


def test_an_absolute_name_in_the_folder_is_that_picture_however_the_folder_is_called(
    own_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(own_pictures, "metadata.jsonl", {"file_name": str(own_pictures / "dot.png"), "text": "a dot"})
    monkeypatch.chdir(own_pictures.parent)
    Path("link").symlink_to("pictures")
    hashes = set()
    for folder in (own_pictures, Path("pictures"), Path("link"), Path("link").absolute()):
        dataset = data.find(folder)
        assert [sample.name(folder) for sample in dataset.samples] == ["dot.png"]
        hashes.add(dataset.manifest_hash)
    assert len(hashes) == 1


# metadata.parquet


def test_parquet_is_refused_by_name_with_the_way_out(own_pictures: Path) -> None:
    (own_pictures / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"metadata\.parquet: is not read; convert it to metadata\.jsonl"):
        data.find(own_pictures)
    write(own_pictures, "metadata.jsonl", {"file_name": "dot.png", "text": "a dot"})  # as it said
    assert captions(own_pictures) == {"dot.png": ("a dot",)}


# kohya's JSON


def test_kohyas_json_gives_the_caption_and_without_one_the_tags(own_pictures: Path) -> None:
    (own_pictures / "more").mkdir()
    (own_pictures / "ring.png").rename(own_pictures / "more" / "ring.PNG")
    entries = {
        "dot.png": {"caption": "a dot", "tags": "dot, black"},
        "bar": {"tags": "bar, long", "train_resolution": [64, 64]},
        "more/ring": {"caption": "", "tags": "round"},
        str(own_pictures / "disc.png"): {"caption": "a disc"},
        "cross.png": {},
    }
    write(own_pictures, "meta_cap.json", entries)
    assert layouts.read(own_pictures).name == "meta_cap.json"
    assert captions(own_pictures) == {
        "dot.png": ("a dot",),
        "bar.png": ("bar, long",),
        "more/ring.PNG": ("round",),
        "disc.png": ("a disc",),
        "cross.png": (),
    }


def test_of_kohyas_files_that_of_the_last_step_counts(own_pictures: Path) -> None:
    for name in ("meta.json", "meta_cap.json", "meta_lat.json"):
        write(own_pictures, name, {"dot": {"caption": f"by {name}"}})
        assert captions(own_pictures) == {"dot.png": (f"by {name}",)}


def test_json_under_kohyas_name_that_is_something_else_is_no_table(own_pictures: Path) -> None:
    for value in ({"name": "shapes", "version": 1}, ["dot.png"], {"author": {"name": "anybody"}}):
        write(own_pictures, "meta.json", value)
        assert layouts.read(own_pictures).name == "captions beside the pictures"


def test_a_key_that_stands_for_two_pictures_or_none_is_a_fault(own_pictures: Path) -> None:
    (own_pictures / "dot.jpg").write_bytes((own_pictures / "dot.png").read_bytes())
    entries = {
        "dot": {"caption": "a dot"},
        "none": {"caption": "nothing"},
        "n" * 300: {"caption": "nothing"},
        "../pictures/../secret": {"caption": "outside"},
        "bar": "a bar",
        "disc": {"caption": 7},
    }
    path = write(own_pictures, "meta.json", entries)
    Path(own_pictures.parent / "secret.png").write_bytes(b"")
    problems = {fault.path.removeprefix(f"{path}:"): fault.problem for fault in layouts.read(own_pictures).faults}
    assert problems.pop("n" * 300).endswith("file name too long")
    assert problems == {
        "dot": "stands for dot.jpg and dot.png",
        "none": "'none' does not exist",
        "../pictures/../secret": "'../pictures/../secret.png' leads outside the folder",
        "bar": "says 'a bar', no object",
        "disc": "caption is 7, neither a string nor a list of strings",
    }


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff\xfe"], ids=["cut", "nested", "not UTF-8"])
def test_kohyas_json_that_is_none_is_refused_by_name(own_pictures: Path, content: bytes) -> None:
    (own_pictures / "meta.json").write_bytes(content)
    with pytest.raises(InputError, match=r"meta\.json: is no JSON"):
        data.find(own_pictures)


# What no table needs.


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_line_that_no_caption_fills_is_refused_by_its_number(own_pictures: Path, name: str) -> None:
    lines = (
        [b"file_name,text", b"dot.png,a dot"] if name.endswith("csv") else [b'{"file_name": "dot.png", "text": ""}'] * 2
    )
    (own_pictures / name).write_bytes(b"\n".join([*lines, b"dot.png," + b"a" * (1 << 20)]))
    with pytest.raises(InputError, match=rf"{name}:3: has over 1,048,576 characters"):
        layouts.read(own_pictures)


def test_kohyas_json_of_lists_of_nothing_is_refused_unread(own_pictures: Path) -> None:
    """As read they would take twenty times the memory."""
    (own_pictures / "meta.json").write_bytes(b'{"dot.png": {"caption": "a", "x": [' + b"[]," * (1 << 20) + b"[]]}}")
    with pytest.raises(InputError, match=r"meta\.json: is no JSON \(it holds lists of nothing\)"):
        layouts.read(own_pictures)


def test_what_a_row_holds_is_told_in_short(own_pictures: Path) -> None:
    write(own_pictures, "metadata.jsonl", {"file_name": ["x" * 10_000], "text": "a"})
    assert len(only_fault(own_pictures).problem) < 200
