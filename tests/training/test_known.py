"""What one start found out about pictures saves the next one the work, and is never believed of another file."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sdcli.errors import InputError
from sdcli.training import data, known
from sdcli.training.samples import Sample

Start = Callable[[Path], list[str]]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED_AFTER", -1.0)  # the tests' own pictures are just drawn
    return tmp_path / "cache"


@pytest.fixture
def start(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Find and check a dataset as a run does; the names of the pictures that were decoded for it."""
    decoded: list[str] = []
    load = data.load_image

    def noted(sample: Sample) -> Image.Image:
        decoded.append(sample.place.name)
        return load(sample)

    monkeypatch.setattr(data, "load_image", noted)

    def begin(root: Path) -> list[str]:
        decoded.clear()
        list(data.check(data.find(root), workers=1))
        return sorted(decoded)

    return begin


def cache_file(own_cache: Path) -> Path:
    (path,) = (own_cache / "datasets").iterdir()
    return path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*.png"))


def test_a_second_start_decodes_nothing_and_finds_the_same_manifest(own_pictures: Path, start: Start) -> None:
    manifest = data.find(own_pictures).manifest_hash
    assert start(own_pictures) == names(own_pictures)
    assert start(own_pictures) == []
    assert data.find(own_pictures).manifest_hash == manifest


def test_a_picture_in_the_place_of_another_of_the_same_size_and_time_is_looked_at(
    own_pictures: Path, start: Start
) -> None:
    path = own_pictures / "dot.png"
    manifest, before, whole = data.find(own_pictures).manifest_hash, path.stat(), path.read_bytes()
    start(own_pictures)
    path.write_bytes(whole[:-40] + b"x" * 40)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"1 pictures cannot be read: .*dot\.png"):
        start(own_pictures)
    assert data.find(own_pictures).manifest_hash != manifest


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_picture_that_changed_in_size_or_time_alone_is_decoded_again(
    own_pictures: Path, start: Start, change: str
) -> None:
    start(own_pictures)
    path = own_pictures / "dot.png"
    status = path.stat()
    if change == "size":
        path.write_bytes(path.read_bytes() + b"\0")  # after a PNG's end, where no decoder looks
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert start(own_pictures) == ["dot.png"]


def test_a_picture_just_written_is_not_taken_for_settled(
    own_pictures: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "SETTLED_AFTER", 3600.0)
    start(own_pictures)
    assert start(own_pictures) == names(own_pictures)


def test_a_broken_picture_is_named_at_every_start(own_pictures: Path, start: Start) -> None:
    (own_pictures / "dot.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 pictures cannot be read: .*dot\.png"):
            start(own_pictures)


def test_pictures_that_are_gone_are_forgotten_and_new_ones_looked_at(
    own_pictures: Path, own_cache: Path, start: Start
) -> None:
    start(own_pictures)
    (own_pictures / "dot.png").rename(own_pictures / "spot.png")
    (own_pictures / "dot.txt").rename(own_pictures / "spot.txt")
    assert start(own_pictures) == ["spot.png"]
    assert b'"dot.png"' not in cache_file(own_cache).read_bytes()


def test_members_of_a_tar_are_known_by_their_place_in_it(own_pictures: Path, tmp_path: Path, start: Start) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as tar:
        for path in sorted(own_pictures.iterdir()):
            tar.add(path, path.name)
    assert start(root) == names(own_pictures)
    assert start(root) == []
    os.utime(root / "a.tar")
    assert start(root) == names(own_pictures)


def test_another_version_decodes_again(own_pictures: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start(own_pictures)
    monkeypatch.setattr(known, "READER", "sdcli 9, Pillow 99")
    assert start(own_pictures) == names(own_pictures)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data.replace(b"true", b"null", 1),
        lambda data: b"",
        lambda data: b"\xff" * 100,
        lambda data: b"[" * 100_000,
    ],
    ids=["cut", "changed", "emptied", "no text", "no lines"],
)
def test_a_damaged_cache_is_as_none(
    own_pictures: Path, own_cache: Path, start: Start, damage: Callable[[bytes], bytes]
) -> None:
    start(own_pictures)
    path = cache_file(own_cache)
    path.write_bytes(damage(path.read_bytes()))
    assert start(own_pictures) == names(own_pictures)
    assert start(own_pictures) == []


def test_a_cache_that_cannot_be_written_costs_time_alone(own_pictures: Path, own_cache: Path, start: Start) -> None:
    own_cache.write_text("in the way", encoding="utf-8")
    assert start(own_pictures) == names(own_pictures)
    assert start(own_pictures) == names(own_pictures)


def test_a_start_that_is_stopped_goes_on_where_it_was(own_pictures: Path, start: Start) -> None:
    stream = data.check(data.find(own_pictures), workers=1)
    next(stream)
    stream.close()
    assert "bar.png" not in start(own_pictures)  # the first one
