"""Faults of a dataset: all that are there, none that is not."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.training import faults
from sdcli.training.samples import Fault
from tests.commands import Outcome, Shell, tree
from tests.tars import packed

COUNT = 1000
LAYOUTS = ("beside", "jsonl", "csv", "kohya", "classes", "repeats", "tars", "train")


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs commands in this process."""
    return Shell(capfdbinary, monkeypatch)


def png(seed: int, side: int = 16) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png(seed))).save(stream, format="JPEG")
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 100,000 x 100,000 px."""
    whole = png(0)
    header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


# What spoils a picture in any layout, with the kind of its fault.
SPOILT = {
    1: ("picture", png(1)[:-100]),
    2: ("picture", b""),
    3: ("picture", bomb()),
    4: ("suffix", jpeg(4)),
    5: ("size", png(5, side=1)),
    6: ("duplicate", png(0)),
}


def spoil(folder: Path) -> dict[str, str]:
    """Spoil twenty of a thousand pictures or captions; returns the file of each fault with its kind."""
    planted = {}
    for i in range(20):
        picture, caption = folder / f"{i * 50:04}.png", folder / f"{i * 50:04}.txt"
        kind = ("cut", "empty", "suffix", "no caption", "encoding", "duplicate", "bomb", "size")[i % 8]
        if kind == "cut":
            picture.write_bytes(picture.read_bytes()[:-100])
        elif kind == "empty":
            picture.write_bytes(b"")
        elif kind == "suffix":
            picture.write_bytes(jpeg(i))
        elif kind == "no caption":
            caption.unlink()
        elif kind == "encoding":
            caption.write_bytes("a café".encode("latin-1"))
        elif kind == "duplicate":
            picture.write_bytes((folder / "0001.png").read_bytes())
        elif kind == "bomb":
            picture.write_bytes(bomb())
        else:
            picture.write_bytes(png(i, side=1))
        path = caption if kind == "encoding" else picture
        planted[path.name] = {"cut": "picture", "empty": "picture", "bomb": "picture"}.get(kind, kind)
    return planted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A thousand whole pictures with their captions."""
    (tmp_path / "images").mkdir()
    for i in range(COUNT):
        (tmp_path / "images" / f"{i:04}.png").write_bytes(png(i))
        (tmp_path / "images" / f"{i:04}.txt").write_text(f"picture {i}", encoding="utf-8")
    return tmp_path / "images"


def lay_out(root: Path, layout: str, pictures: list[bytes], is_captioned: Callable[[int], bool]) -> None:
    """Write pictures in a layout, each as `N.png` somewhere, and say what they show where the layout has words."""
    names = [f"{i}.png" for i in range(len(pictures))]
    said = {name: f"picture {i}" for i, name in enumerate(names) if is_captioned(i)}
    rows = [{"file_name": name} | ({"text": said[name]} if name in said else {}) for name in names]
    folders = {"classes": ("one", "other"), "repeats": ("3_a cat", "2_a dog"), "train": ("train",)}.get(layout, (".",))
    for i, (name, content) in enumerate(zip(names, pictures, strict=True)):
        place = root / folders[i % len(folders)]
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
        if layout in ("beside", "tars") and name in said:
            (place / name).with_suffix(".txt").write_text(said[name], encoding="utf-8")
    if layout in ("jsonl", "train"):
        (root / folders[0] / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif layout == "csv":
        lines = [f"{row['file_name']},{row.get('text', '')}\n" for row in rows]
        (root / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    elif layout == "kohya":
        entries = {name: {"caption": said[name]} if name in said else {} for name in names}
        (root / "meta_cap.json").write_text(json.dumps(entries))
    elif layout == "tars":
        files = sorted(root.iterdir())
        for number in range(2):
            part = {p.name: p.read_bytes() for p in files if int(p.stem) % 2 == number}
            (root / f"shard-{number}.tar").write_bytes(packed(part))
        for path in files:
            path.unlink()


def found(folder: Path) -> dict[str, str]:
    return {Path(event.path).name: event.kind for event in faults.find(folder) if isinstance(event, Fault)}


def summary(folder: Path) -> faults.Checked:
    *_, checked = faults.find(folder)
    assert isinstance(checked, faults.Checked)
    return checked


def test_twenty_faults_among_a_thousand_pictures_are_named_and_nothing_else(folder: Path) -> None:
    assert found(folder) == {}
    planted = spoil(folder)
    assert len(planted) == 20
    assert found(folder) == planted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout_each_planted_fault_is_named_and_a_clean_set_has_none(tmp_path: Path, layout: str) -> None:
    clean, spoilt = tmp_path / "clean", tmp_path / "spoilt"
    for root in (clean, spoilt):
        root.mkdir()
    has_words = layout not in ("classes", "repeats")  # these two have the words in their folders' names
    lay_out(clean, layout, [png(i) for i in range(10)], is_captioned=lambda i: True)
    pictures = [SPOILT[i][1] if i in SPOILT else png(i) for i in range(10)]
    lay_out(spoilt, layout, pictures, is_captioned=lambda i: i != 7)
    planted = {f"{i}.png": kind for i, (kind, _) in SPOILT.items()} | ({"7.png": "no caption"} if has_words else {})
    assert found(clean) == {}
    assert found(spoilt) == planted


@pytest.mark.parametrize(
    ("layout", "name", "captions", "classes"),
    [
        ("beside", "captions beside the pictures", 3, 0),
        ("csv", "metadata.csv", 3, 0),
        ("classes", "class folders", 0, 2),
        ("repeats", "folders of repeats", 4, 0),
        ("tars", "tars", 3, 0),
        ("train", "metadata.jsonl in train/", 3, 0),
    ],
)
def test_the_summary_counts_each_picture_once(
    tmp_path: Path, layout: str, name: str, captions: int, classes: int
) -> None:
    lay_out(tmp_path, layout, [png(i) for i in range(4)], is_captioned=lambda i: i != 2)
    assert summary(tmp_path) == faults.Checked(name, 4, captions, classes)


def test_a_picture_without_a_class_among_those_that_have_one_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, "jsonl", [png(0), png(1)], is_captioned=lambda i: False)
    rows = [{"file_name": "0.png", "label": "cat"}, {"file_name": "1.png"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found(tmp_path) == {"1.png": "no class"}
    contents = {"0.png": png(0), "0.cls": b"cat", "1.png": png(1)}
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(packed(contents))
    assert found(tmp_path / "tars") == {"1.png": "no class"}


def test_of_a_picture_listed_twice_the_listing_without_a_caption_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, "jsonl", [png(0)], is_captioned=lambda i: True)
    rows = [{"file_name": "0.png", "text": "a"}, {"file_name": "0.png"}, {"file_name": "0.png", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found(tmp_path) == {"0.png": "no caption"}


def test_a_folder_without_pictures_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert found(tmp_path) == {tmp_path.name: "folder"}


# What can be mended


def check(shell: Shell, folder: Path, *options: str) -> tuple[Outcome, dict[str, dict[str, object]]]:
    outcome = shell("dataset", "check", folder, "--json", *options)
    rows = [json.loads(line) for line in outcome.lines]
    return outcome, {Path(row["path"]).name: row for row in rows}


def test_what_can_be_mended_is_and_the_rest_is_told(shell: Shell, own_pictures: Path) -> None:
    Image.new("RGB", (16, 16)).save(own_pictures / "bar.png", format="JPEG")
    (own_pictures / "dot.txt").write_bytes("a café".encode("latin-1"))
    (own_pictures / "ring.png").write_bytes(b"no picture")
    outcome, rows = check(shell, own_pictures)
    assert json.loads(outcome.stderr)["hint"] == "mend what is named; --fix mends 2 of them"
    assert {name: row["is_mendable"] for name, row in rows.items()} == {
        "bar.png": True,
        "dot.txt": True,
        "ring.png": False,
    }
    outcome, rows = check(shell, own_pictures, "--fix")
    assert {name: row["is_mended"] for name, row in rows.items()} == {
        "bar.png": True,
        "dot.txt": True,
        "ring.png": False,
    }
    assert outcome.code == 3
    assert json.loads(outcome.stderr)["error"] == f"{own_pictures}: 1 fault"
    assert (own_pictures / "bar.jpg").is_file() and not (own_pictures / "bar.png").exists()
    assert (own_pictures / "dot.txt").read_text(encoding="utf-8") == "a café"
    (own_pictures / "ring.png").unlink()
    outcome = shell("dataset", "check", own_pictures)
    assert (outcome.code, outcome.stdout) == (0, "")
    assert outcome.stderr == "captions beside the pictures: 5 pictures, 5 with captions\n"


def test_a_caption_in_utf_16_is_mended_without_loss(shell: Shell, own_pictures: Path) -> None:
    (own_pictures / "dot.txt").write_bytes("点 — a dot".encode("utf-16"))
    outcome, rows = check(shell, own_pictures, "--fix")
    assert (outcome.code, rows["dot.txt"]["is_mended"]) == (0, True)
    assert (own_pictures / "dot.txt").read_text(encoding="utf-8") == "点 — a dot"


def test_a_picture_is_not_renamed_onto_another(shell: Shell, own_pictures: Path) -> None:
    Image.new("RGB", (16, 16)).save(own_pictures / "bar.png", format="JPEG")
    (own_pictures / "bar.jpg").write_bytes(jpeg(0))
    before = tree(own_pictures)
    outcome, rows = check(shell, own_pictures, "--fix")
    assert outcome.code == 3 and not rows["bar.png"]["is_mended"]
    assert tree(own_pictures) == before


@pytest.mark.parametrize("layout", ["jsonl", "csv", "kohya"])
def test_a_picture_that_a_table_names_is_not_renamed_behind_its_back(shell: Shell, tmp_path: Path, layout: str) -> None:
    lay_out(tmp_path, layout, [png(0), jpeg(1)], is_captioned=lambda i: True)
    before = tree(tmp_path)
    outcome, rows = check(shell, tmp_path, "--fix")
    assert outcome.code == 3 and not rows["1.png"]["is_mended"]
    table = {"jsonl": "metadata.jsonl", "csv": "metadata.csv", "kohya": "meta_cap.json"}[layout]
    assert rows["1.png"]["hint"] == f"rename it to 1.jpg, in {table} too"
    assert tree(tmp_path) == before


def test_in_a_tar_nothing_is_mended_and_every_hint_says_so(shell: Shell, tmp_path: Path) -> None:
    contents = {"0.png": png(0), "0.txt": b"a cat", "7.png": png(7), "8.png": png(8), "8.txt": b"caf\xe9"}
    for i, (_, content) in SPOILT.items():
        contents |= {f"{i}.png": content, f"{i}.txt": b"a cat"}
    (tmp_path / "a.tar").write_bytes(packed(contents))
    before = tree(tmp_path)
    outcome, rows = check(shell, tmp_path, "--fix")
    assert outcome.code == 3
    assert {row["kind"] for row in rows.values()} == {"no caption", "encoding"} | {kind for kind, _ in SPOILT.values()}
    assert all("--fix changes no tar" in str(row["hint"]) and not row["is_mended"] for row in rows.values())
    assert json.loads(outcome.stderr)["hint"] == "mend what is named"
    assert tree(tmp_path) == before


def test_a_name_in_a_tar_cannot_steer_the_terminal(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed({"\x1b[2Ja.png": b"no picture"}))
    outcome = shell("dataset", "check", tmp_path)
    assert outcome.code == 3
    assert "\x1b" not in outcome.stdout + outcome.stderr
    assert outcome.stdout.startswith(f"{tmp_path}/a.tar/\\x1b[2Ja.png: is no picture; accepted are PNG")


def test_the_summary_of_classes_is_told_on_stderr(shell: Shell, tmp_path: Path) -> None:
    lay_out(tmp_path, "classes", [png(i) for i in range(4)], is_captioned=lambda i: False)
    outcome = shell("dataset", "check", tmp_path)
    assert (outcome.code, outcome.stdout) == (0, "")
    assert outcome.stderr == "class folders: 4 pictures, 0 with captions, 2 classes\n"


def test_a_training_refuses_what_the_check_names_in_a_tar(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed({"a.png": png(0), "../b.png": png(1)}))
    outcome = shell("train-vae", "--data", tmp_path, "--init", "tiny", "--run", tmp_path / "run")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert outcome.stderr.startswith(f"sdcli: error: {tmp_path}/a.tar/../b.png: leads outside the tar; leave it out")
    assert not (tmp_path / "run").exists()
