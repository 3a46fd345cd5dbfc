"""The layouts that people keep their training pictures in, and which of them a folder is taken for."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest

from sdcli.errors import InputError, SdcliWarning
from sdcli.training import data, layouts
from tests.tars import pack_folder

CLASSES = {"long": ("bar", "cross", "square"), "round": ("disc", "dot", "ring")}


def names(folder: Path) -> list[str]:
    return [sample.name(folder) for sample in layouts.read(folder).samples]


def move(folder: Path, places: dict[str, str]) -> None:
    """Move files of a folder below it."""
    for name, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder / place)


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


@pytest.fixture
def classes(own_pictures: Path) -> Path:
    """Six pictures in two folders, without captions."""
    remove(own_pictures, "*.txt")
    for name, shapes in CLASSES.items():
        move(own_pictures, {f"{shape}.png": f"{name}/{shape}.png" for shape in shapes})
    return own_pictures


# kohya's folders


def test_kohyas_folders_give_repeats_and_a_caption(own_pictures: Path) -> None:
    places = {"dot.png": "3_sks dot/dot.png", "bar.png": "1_a bar/bar.png", "bar.txt": "1_a bar/bar.txt"}
    move(own_pictures, places)
    remove(own_pictures, "*.png")
    found = data.find(own_pictures)
    assert found.layout == "folders of repeats"
    assert Counter((s.path.name, *s.captions) for s in found.samples) == {
        ("dot.png", "sks dot"): 3,
        ("bar.png", "a picture of a bar"): 1,  # what stands beside a picture goes before its folder's name
    }
    assert [sample.path.name for sample in found.pictures] == ["bar.png", "dot.png"]


def test_a_folder_with_pictures_beside_kohyas_is_left_out_with_a_warning(own_pictures: Path) -> None:
    move(own_pictures, {"dot.png": "3_sks dot/dot.png", "ring.png": "others/ring.png", "ring.txt": "notes/ring.txt"})
    remove(own_pictures, "*.png")
    with pytest.warns(SdcliWarning, match="others left out: what is read is folders of repeats") as caught:
        assert set(names(own_pictures)) == {"3_sks dot/dot.png"}
    assert len(caught) == 1


@pytest.mark.parametrize("repeats", ["0", "10001", "9" * 5000])
def test_a_folder_that_cannot_be_repeated_is_a_fault(tmp_path: Path, repeats: str) -> None:
    name = f"{repeats[:200]}_a dot"
    (tmp_path / name).mkdir()
    (fault,) = layouts.read(tmp_path).faults
    assert fault.kind == "folder" and "1 to 10,000" in fault.hint


# Class folders


def test_a_class_is_the_name_of_its_folder_and_of_all_below_it(classes: Path) -> None:
    move(classes, {"round/dot.png": "round/small/dot.png"})
    dataset = data.find(classes)
    assert dataset.layout == "class folders"
    assert dataset.classes == ("long", "round")
    assert {sample.name(classes): sample.label for sample in dataset.samples} == {
        "long/bar.png": "long",
        "long/cross.png": "long",
        "long/square.png": "long",
        "round/disc.png": "round",
        "round/ring.png": "round",
        "round/small/dot.png": "round",
    }


def test_for_text_the_class_is_the_caption_unless_one_is_given(classes: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = data.find(classes)
        data.check_captions(dataset)
    assert all(sample.captions == (sample.label,) for sample in dataset.samples)
    assert {sample.captions for sample in data.find(classes, "a shape").samples} == {("a shape",)}


def test_one_caption_beside_a_picture_and_folders_are_no_classes(classes: Path) -> None:
    (classes / "round" / "dot.txt").write_text("a dot", encoding="utf-8")
    found = layouts.read(classes)
    assert found.name == "captions beside the pictures"
    assert all(sample.label is None for sample in found.samples)


def test_one_folder_alone_is_no_class(classes: Path) -> None:
    shutil.rmtree(classes / "long")
    (classes / "empty").mkdir()
    found = layouts.read(classes)
    assert (found.name, found.samples[0].label) == ("captions beside the pictures", None)


def test_hidden_folders_are_no_classes_and_hold_no_pictures(classes: Path) -> None:
    shutil.copytree(classes / "long", classes / ".cache")
    shutil.copytree(classes / "long", classes / "long" / ".ipynb_checkpoints")
    shutil.copy(classes / "long" / "bar.png", classes / ".thumbnail.png")
    assert len(names(classes)) == 6
    assert data.find(classes).classes == ("long", "round")


def test_a_folder_whose_name_no_terminal_can_show_is_a_fault(classes: Path) -> None:
    (classes / "long").rename(classes / "lo\x1bng")
    (fault,) = layouts.read(classes).faults
    assert fault.path == f"{classes}/lo\x1bng" and fault.kind == "folder"


# train/ of a folder in parts


@pytest.mark.parametrize("others", [(), ("test",), ("test", "validation")])
def test_of_a_folder_in_parts_the_train_part_is_read_in_its_own_layout(classes: Path, others: tuple[str, ...]) -> None:
    root = classes.parent / "parts"
    root.mkdir()
    classes.rename(root / "train")
    for other in others:
        shutil.copytree(root / "train", root / other)
    dataset = data.find(root)
    assert (dataset.layout, dataset.classes) == ("class folders in train/", ("long", "round"))
    assert len(dataset.samples) == 6 and dataset.samples[0].name(root) == "train/long/bar.png"


def test_metadata_in_train_is_read_with_names_below_train(own_pictures: Path, tmp_path: Path) -> None:
    row = {"file_name": "dot.png", "text": "a dot"}
    (own_pictures / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    own_pictures.rename(tmp_path / "train")
    dataset = data.find(tmp_path)
    assert dataset.layout == "metadata.jsonl in train/"
    assert [(s.name(tmp_path), s.captions) for s in dataset.samples] == [("train/dot.png", ("a dot",))]
    (tmp_path / "extra").mkdir()
    shutil.copy(tmp_path / "train" / "bar.png", tmp_path / "extra")
    with pytest.warns(SdcliWarning, match=r"extra left out: what is read is metadata\.jsonl in train/"):
        assert names(tmp_path) == ["train/dot.png"]


def test_pictures_of_trains_are_a_class_like_others(classes: Path) -> None:
    (classes / "long").rename(classes / "train")
    assert data.find(classes).classes == ("round", "train")


def test_a_train_in_a_train_is_no_endless_way(tmp_path: Path, pictures: Path) -> None:
    shutil.copytree(pictures, tmp_path / "train" / "train" / "train")
    assert names(tmp_path)[0] == "train/train/train/bar.png"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads anywhere")
def test_a_folder_that_may_not_be_read_is_told(classes: Path) -> None:
    (classes / "long").chmod(0)
    with pytest.warns(SdcliWarning, match="long: left out: permission denied"):
        assert len(names(classes)) == 3
    classes.chmod(0)
    with pytest.raises(InputError, match="permission denied"):
        layouts.read(classes)


# Several layouts at once


def test_the_first_layout_in_the_order_of_the_docstring_wins(own_pictures: Path) -> None:
    """Built from the last to the first: each goes before all that were there already."""
    root = own_pictures.parent / "root"
    shutil.copytree(own_pictures, root / "shapes")

    def adds(expected: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SdcliWarning)
            assert layouts.read(root).name == expected

    adds("captions beside the pictures")
    remove(root / "shapes", "*.txt")
    shutil.copytree(root / "shapes", root / "more")
    adds("class folders")
    shutil.copytree(own_pictures, root / "train")
    (root / "train" / "metadata.csv").write_text("file_name,text\ndot.png,a dot\n", encoding="utf-8")
    adds("metadata.csv in train/")
    shutil.copytree(own_pictures, root / "2_a shape")
    adds("folders of repeats")
    pack_folder(own_pictures, root / "a.tar")
    adds("tars")
    shutil.copy(own_pictures / "dot.png", root)
    adds("captions beside the pictures")
    for name in ("meta.json", "meta_cap.json", "meta_lat.json"):
        (root / name).write_text('{"dot": {"caption": "a dot"}}', encoding="utf-8")
        adds(name)
    (root / "metadata.parquet").write_bytes(b"PAR1")
    adds("metadata.parquet")
    (root / "metadata.csv").write_text("file_name,text\ndot.png,a dot\n", encoding="utf-8")
    adds("metadata.csv")
    (root / "metadata.jsonl").write_text('{"file_name": "dot.png", "text": "a dot"}', encoding="utf-8")
    adds("metadata.jsonl")


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
        assert data.load_pixels(file, (16, 16)).equal(data.load_pixels(member, (16, 16)))
    assert files.manifest_hash != members.manifest_hash  # by the names: a run goes on with what it began with
