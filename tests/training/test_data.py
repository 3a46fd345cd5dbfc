"""Folders of pictures, their captions, and the order in which training sees them."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdcli.errors import InputError, SdcliWarning
from sdcli.training import data


def write_metadata(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def captions(folder: Path, caption: str | None = None) -> dict[str, tuple[str, ...]]:
    return {sample.path.name: sample.captions for sample in data.find(folder, caption).samples}


def remove_captions(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()


# What a folder holds


def test_captions_beside_the_pictures_are_found(pictures: Path) -> None:
    dataset = data.find(pictures)
    assert dataset.layout == "captions beside the pictures"
    assert [sample.path.name for sample in dataset.samples] == sorted(path.name for path in pictures.glob("*.png"))
    assert all(sample.captions == (f"a picture of a {sample.path.stem}",) for sample in dataset.samples)


def test_a_caption_file_may_have_a_byte_order_mark_and_line_breaks(own_pictures: Path) -> None:
    (own_pictures / "dot.txt").write_bytes(b"\xef\xbb\xbfa picture\r\nof a  dot\r\n")
    assert captions(own_pictures)["dot.png"] == ("a picture of a dot",)


def test_a_caption_file_may_end_in_caption(own_pictures: Path) -> None:
    (own_pictures / "dot.txt").rename(own_pictures / "dot.caption")
    assert captions(own_pictures)["dot.png"] == ("a picture of a dot",)


def test_a_caption_that_is_not_utf_8_is_refused_by_name(own_pictures: Path) -> None:
    (own_pictures / "dot.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"dot\.txt: is not UTF-8"):
        data.find(own_pictures)


def test_pictures_in_folders_are_found_and_hidden_ones_are_not(own_pictures: Path) -> None:
    (own_pictures / "more").mkdir()
    (own_pictures / "dot.png").rename(own_pictures / "more" / "dot.PNG")
    (own_pictures / "bar.png").rename(own_pictures / ".bar.png")
    assert sorted(captions(own_pictures)) == ["cross.png", "disc.png", "dot.PNG", "ring.png", "square.png"]


def test_metadata_gives_one_caption_or_several(own_pictures: Path) -> None:
    rows = [
        {"file_name": "dot.png", "text": "a dot"},
        {"file_name": "bar.png", "text": ["a bar", "a stripe"]},
        {"file_name": "ring.png"},
    ]
    write_metadata(own_pictures, rows)
    dataset = data.find(own_pictures)
    assert dataset.layout == "metadata.jsonl"
    assert captions(own_pictures) == {"dot.png": ("a dot",), "bar.png": ("a bar", "a stripe"), "ring.png": ()}


def test_metadata_may_have_a_byte_order_mark_windows_line_ends_and_empty_lines(own_pictures: Path) -> None:
    line = b'{"file_name": "dot.png", "text": "a dot"}'
    (own_pictures / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert len(data.find(own_pictures).samples) == 2


@pytest.mark.parametrize(
    "row",
    [
        "no object",
        {"text": "no file"},
        {"file_name": "dot.png", "text": 7},
        {"file_name": "dot.png", "text": ["a dot", 7]},
        {"file_name": "dot.png", "text": {"a": "dot"}},
        {"file_name": 7, "text": "a dot"},
        {"file_name": "missing.png", "text": "a dot"},
        {"file_name": "../secret.png", "text": "a dot"},
        {"file_name": "/etc/hostname", "text": "a dot"},
        {"file_name": "link.png", "text": "a dot"},
        {"file_name": "a\0b.png", "text": "a dot"},
        {"file_name": "a" * 300, "text": "a dot"},
        {"file_name": "", "text": "a dot"},
    ],
    ids=lambda row: json.dumps(row)[:40],
)
def test_a_wrong_metadata_line_is_refused_by_its_number(own_pictures: Path, row: object) -> None:
    Image.new("RGB", (8, 8)).save(own_pictures.parent / "secret.png")
    (own_pictures / "link.png").symlink_to("../secret.png")
    write_metadata(own_pictures, [{"file_name": "bar.png", "text": "a bar"}, row])
    with pytest.raises(InputError, match=r"metadata\.jsonl:2: "):
        data.find(own_pictures)


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["cut", "not UTF-8", "nested"])
def test_a_metadata_line_that_is_no_json_is_refused_by_its_number(own_pictures: Path, line: bytes) -> None:
    (own_pictures / "metadata.jsonl").write_bytes(b'{"file_name": "bar.png"}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"metadata\.jsonl:2: "):
        data.find(own_pictures)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no picture"):
        data.find(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        data.find(tmp_path / "none")


# Captions: all, some, none


def test_a_caption_for_all_fills_the_gaps_alone(own_pictures: Path) -> None:
    (own_pictures / "dot.txt").unlink()
    found = captions(own_pictures, "a shape")
    assert found["dot.png"] == ("a shape",)
    assert found["bar.png"] == ("a picture of a bar",)


def test_missing_captions_are_refused_with_the_names_of_the_pictures(own_pictures: Path) -> None:
    (own_pictures / "dot.txt").unlink()
    (own_pictures / "bar.txt").unlink()
    with pytest.raises(InputError, match=r"2 of 6 pictures have no caption: bar\.png, dot\.png; .*--caption"):
        data.check_captions(data.find(own_pictures))


def test_a_blank_caption_is_a_missing_one(own_pictures: Path) -> None:
    (own_pictures / "dot.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(InputError, match=r"1 of 6 pictures have no caption: dot\.png"):
        data.check_captions(data.find(own_pictures))
    write_metadata(own_pictures, [{"file_name": "dot.png", "text": ""}, {"file_name": "bar.png", "text": "a bar"}])
    with pytest.raises(InputError, match=r"1 of 2 pictures have no caption: dot\.png"):
        data.check_captions(data.find(own_pictures))


def test_no_caption_at_all_is_one_warning_that_tells_how_to_add_them(own_pictures: Path) -> None:
    remove_captions(own_pictures)
    with pytest.warns(SdcliWarning) as caught:
        data.check_captions(data.find(own_pictures))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert all(way in text for way in ("without text", ".txt", "metadata.jsonl", "--caption"))


def test_captions_for_all_pictures_are_no_matter_to_speak_of(pictures: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.check_captions(data.find(pictures))


# Broken pictures


def test_all_broken_pictures_are_named_together(own_pictures: Path) -> None:
    whole = (own_pictures / "bar.png").read_bytes()
    (own_pictures / "bar.png").write_bytes(whole[: len(whole) // 2])
    (own_pictures / "dot.png").write_bytes(b"no picture")
    (own_pictures / "ring.png").write_bytes(b"")
    with pytest.raises(InputError, match="3 pictures cannot be read") as refusal:
        list(data.check(data.find(own_pictures)))
    assert all(name in str(refusal.value) for name in ("bar.png", "dot.png", "ring.png"))
    assert "disc.png" not in str(refusal.value)


def test_a_link_to_nothing_a_fifo_and_a_folder_are_named_as_broken_pictures(own_pictures: Path) -> None:
    (own_pictures / "nothing.png").symlink_to("missing")
    os.mkfifo(own_pictures / "pipe.png")
    (own_pictures / "folder.png").mkdir()
    with pytest.raises(InputError, match="3 pictures cannot be read") as refusal:
        list(data.check(data.find(own_pictures)))
    assert all(name in str(refusal.value) for name in ("nothing.png", "pipe.png", "folder.png"))


def test_checking_counts_every_picture(pictures: Path) -> None:
    assert list(data.check(data.find(pictures))) == [1, 2, 3, 4, 5, 6]


def test_reading_in_threads_loses_no_warning(pictures: Path) -> None:
    dataset = data.find(pictures)
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # what a thread leaves behind in the interpreter's state shows at once
    try:
        for _ in range(20):
            list(data.check(dataset, workers=8))
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


# Whether the data changed


def test_the_manifest_is_the_same_wherever_the_folder_lies(pictures: Path, own_pictures: Path) -> None:
    assert data.find(pictures).manifest_hash == data.find(own_pictures).manifest_hash


@pytest.mark.parametrize("change", ["caption", "picture", "name", "removal"])
def test_the_manifest_notices_a_change(pictures: Path, own_pictures: Path, change: str) -> None:
    if change == "caption":
        (own_pictures / "dot.txt").write_text("a picture of a spot", encoding="utf-8")
    elif change == "picture":  # of the same size in bytes, as an edited BMP is
        path = own_pictures / "dot.png"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif change == "name":
        (own_pictures / "dot.png").rename(own_pictures / "spot.png")
    else:
        (own_pictures / "dot.png").unlink()
    assert data.find(pictures).manifest_hash != data.find(own_pictures).manifest_hash


# Pixels


def test_a_picture_is_scaled_and_its_middle_cut(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (16, 0, 48, 32))
    image.save(tmp_path / "wide.png")
    pixels = data.load_pixels(data.Sample(tmp_path / "wide.png", ()), (16, 16))
    assert pixels.shape == (1, 3, 16, 16)
    middle = pixels[..., 2:-2]  # beside the cut the filter still sees white
    torch.testing.assert_close(middle, torch.full_like(middle, -1.0), rtol=0, atol=0.02)


def test_a_random_crop_is_any_square_of_the_picture_at_its_own_scale(tmp_path: Path) -> None:
    noise = Image.effect_noise((10, 9), 80)
    noise.convert("RGB").save(tmp_path / "a.png")
    sample = data.Sample(tmp_path / "a.png", ())
    whole = torch.from_numpy(np.array(noise, dtype=np.float32)) / 127.5 - 1  # (9, 10)
    places = [(y, x) for y in range(2) for x in range(3)]
    seen = set()
    for number in range(60):
        crop = data.load_pixels(sample, (8, 8), torch.Generator().manual_seed(number))[0, 0]
        (place,) = [(y, x) for y, x in places if torch.equal(crop, whole[y : y + 8, x : x + 8])]
        seen.add(place)
    assert seen == set(places)


def test_a_picture_smaller_than_the_crop_is_enlarged(pictures: Path) -> None:
    sample = data.Sample(pictures / "dot.png", ())
    assert data.load_pixels(sample, (48, 48), torch.Generator()).shape == (1, 3, 48, 48)


def test_threads_that_read_have_one_core_each_and_the_one_that_computes_keeps_its_own() -> None:
    before = torch.get_num_threads()
    with data.readers(2) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == before
