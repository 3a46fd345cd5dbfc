"""Pictures tell how they were made, or are rid of what they tell."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdcli.errors import OutputError
from sdcli.meta import Failed, MetaRecord, run
from sdcli.pipeline.metadata import picture_bytes
from sdcli.specs import MetaSpec
from tests.pipeline.test_metadata import RECORD


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def told(path: Path, **texts: str) -> dict[str, Any]:
    """What is said of a picture with these texts."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return looked_at(path).facts


def looked_at(path: Path) -> MetaRecord:
    (record,) = run(MetaSpec(inputs=(path,)))
    assert isinstance(record, MetaRecord)
    return record


def strip(*paths: Path) -> list[MetaRecord]:
    return [one for one in run(MetaSpec(inputs=paths, strip=True)) if isinstance(one, MetaRecord)]


@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_our_own_record_comes_back_whole(picture: Image.Image, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"x.{form}"
    path.write_bytes(picture_bytes(picture, RECORD | {"prompt": "naïve 小狗 🐶"}, form))
    record = looked_at(path)
    expected = {key: value for key, value in RECORD.items() if key not in ("path", "seconds")}
    assert record.source == "sdcli"
    assert {k: v for k, v in record.facts.items() if k not in ("path", "source", "raw")} == expected | {
        "prompt": "naïve 小狗 🐶"
    }
    assert any(text.startswith("naïve 小狗 🐶\nNegative prompt: ") for text in record.facts["raw"].values())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("Sampler: DPM++ 2M Karras", {"scheduler": "dpm", "sigmas": "karras", "sampler": "DPM++ 2M Karras"}),
        (
            "Sampler: DPM++ 2M, Schedule type: Karras",
            {"scheduler": "dpm", "sigmas": "karras", "sampler": "DPM++ 2M Karras"},
        ),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", {"scheduler": "dpm", "sampler": "DPM++ 2M"}),
        ("Sampler: Euler a", {"scheduler": "euler-a", "sampler": "Euler a"}),
        ("Sampler: euler_a karras", {"scheduler": "euler-a", "sampler": "euler_a karras"}),
        ("Sampler: euler_a sgm_uniform", {"scheduler": "euler-a", "sampler": "euler_a sgm_uniform"}),
        ("Sampler: dpm++2m smoothstep", {"scheduler": "dpm", "sampler": "dpm++2m smoothstep"}),
        ("Sampler: DPM adaptive", {"scheduler": None, "sampler": "DPM adaptive"}),
        ("Sampler: DPM++ 3M SDE", {"scheduler": "dpm-sde", "order": 3, "sampler": "DPM++ 3M SDE"}),
        ("Sampler: Euler, Schedule type: Turbo", {"scheduler": "euler", "sampler": "Euler Turbo"}),
        ("Sampler: Restart", {"scheduler": None, "sampler": "Restart"}),
        ("Sampler: " + "x" * 100_000, {"scheduler": None, "sampler": "x" * 100_000}),
    ],
)
def test_a_sampler_is_our_scheduler_where_there_is_one(tmp_path: Path, settings: str, expected: dict[str, Any]) -> None:
    facts = told(tmp_path / "x.png", parameters=f"a dog\nSteps: 9, Seed: 3, {settings}")
    assert {key: facts[key] for key in ("scheduler", "sigmas", "order", "sampler") if key in facts} == expected


def test_what_a_file_calls_path_source_or_raw_is_not_taken_for_ours(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "x", "path": "/etc/passwd", "source": "me", "raw": 1})
    facts = told(tmp_path / "x.png", sdcli=text)
    assert (facts["path"], facts["source"], facts["raw"]) == (str(tmp_path / "x.png"), "sdcli", {"sdcli": text})


def test_a_picture_that_says_nothing_has_no_source(tmp_path: Path) -> None:
    assert told(tmp_path / "x.png", Software="GIMP") == {
        "path": str(tmp_path / "x.png"),
        "source": None,
        "raw": {"Software": "GIMP"},
    }


@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_stripping_rewrites_the_file_with_the_same_pixels_and_nothing_else(
    picture: Image.Image, tmp_path: Path, form: str
) -> None:
    path = tmp_path / f"x.{form}"
    path.write_bytes(picture_bytes(picture, RECORD, form))
    before, size = np.asarray(Image.open(path).convert("RGB")), path.stat().st_size
    (record,) = strip(path)
    assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), before)
    assert record.facts == {"path": str(path), "bytes": path.stat().st_size, "removed": size - path.stat().st_size}
    assert record.facts["removed"] > 0 and b"puppy" not in path.read_bytes()
    looked = looked_at(path)
    assert (looked.source, looked.facts["raw"]) == (None, {})
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_stripping_again_leaves_the_file_alone(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(picture_bytes(picture, RECORD))
    strip(path)
    stamp = path.stat().st_ino
    assert strip(path)[0].facts["removed"] == 0
    assert path.stat().st_ino == stamp


def test_stripping_keeps_the_mode_and_goes_through_a_link(picture: Image.Image, tmp_path: Path) -> None:
    path, link = tmp_path / "x.png", tmp_path / "link.png"
    path.write_bytes(picture_bytes(picture, RECORD))
    path.chmod(0o600)
    link.symlink_to(path)
    strip(link)
    assert link.is_symlink() and b"puppy" not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_file_is_rewritten_before_all_are_found_good(picture: Image.Image, tmp_path: Path) -> None:
    good, *bad = (tmp_path / f"{name}.png" for name in ("good", "bad", "worse"))
    good.write_bytes(picture_bytes(picture, RECORD))
    before = good.read_bytes()
    for path in bad:
        path.write_bytes(before[:-1])
    failed = list(run(MetaSpec(inputs=(good, *bad), strip=True)))
    assert [str(one.error) for one in failed if isinstance(one, Failed)] == [
        f"{path}: is cut short; the file is damaged; save it again" for path in bad
    ]
    assert len(failed) == 2 and good.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="a path of a file that has no other")
def test_no_file_is_rewritten_before_all_have_a_place_to_be_rewritten_at(picture: Image.Image, tmp_path: Path) -> None:
    good, other = tmp_path / "good.png", tmp_path / "other.png"
    for path in (good, other):
        path.write_bytes(picture_bytes(picture, RECORD))
    with other.open("rb") as stream:
        other.unlink()
        (failed,) = run(MetaSpec(inputs=(good, Path(f"/proc/self/fd/{stream.fileno()}")), strip=True))
    assert isinstance(failed, Failed) and isinstance(failed.error, OutputError)
    assert b"puppy" in good.read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_no_file_is_rewritten_before_all_can_be(picture: Image.Image, tmp_path: Path) -> None:
    good, other = tmp_path / "good.png", tmp_path / "closed" / "other.png"
    other.parent.mkdir()
    for path in (good, other):
        path.write_bytes(picture_bytes(picture, RECORD))
    other.parent.chmod(0o500)
    (failed,) = run(MetaSpec(inputs=(good, other), strip=True))
    other.parent.chmod(0o700)
    assert isinstance(failed, Failed) and isinstance(failed.error, OutputError)
    assert b"puppy" in good.read_bytes()


def test_a_picture_that_cannot_be_read_leaves_the_others_to_be_told(picture: Image.Image, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(picture_bytes(picture, RECORD))
    first, second, third = run(MetaSpec(inputs=(tmp_path / "gone.png", good, tmp_path / "none.png")))
    assert isinstance(first, Failed) and isinstance(second, MetaRecord) and isinstance(third, Failed)
    assert "gone.png: no such file" in str(first.error) and second.source == "sdcli"
