"""What stands in a file besides its pixels is found, and taken out without touching them."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from sdcli.errors import InputError
from sdcli.pipeline import containers
from sdcli.pipeline.containers import MAX_TEXT_BYTES, PNG_HEAD, look_inside, without_metadata
from sdcli.pipeline.exif import orientation

PATH = Path("x.png")
FORMS = ("PNG", "JPEG", "WEBP")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">secret</x:xmpmeta>'


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values if channels > 1 else values[..., 0])


def saved(form: str, image: Image.Image | None = None, *, turned: int = 1, **options: Any) -> bytes:
    """A picture with every kind of metadata that its format has, the word `secret` in each."""
    exif = Image.Exif()
    exif[0x010E] = "secret description"
    exif[0x0112] = turned
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the second it was made in, which packs into more or fewer bytes
    given: dict[str, Any] = {"exif": exif, "icc_profile": bytes(profile)}
    if form == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("parameters", "secret plain")
        texts.add_text("packed", "secret packed", zip=True)
        texts.add_itxt("other", "secret 小狗")
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        texts.add(b"tIME", b"secret!")
        given["pnginfo"] = texts
    elif form == "JPEG":
        given |= {"comment": "secret comment", "xmp": XMP}
    else:
        given |= {"xmp": XMP, "lossless": True}
    stream = io.BytesIO()
    (image if image is not None else picture()).save(stream, format=form, **given, **options)
    return stream.getvalue()


def frames(data: bytes) -> list[np.ndarray]:
    found = []
    with Image.open(io.BytesIO(data)) as opened:
        for number in range(getattr(opened, "n_frames", 1)):
            opened.seek(number)
            found.append(np.asarray(opened.convert("RGBA")))
    return found


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(*chunks: bytes) -> bytes:
    """A whole small PNG with chunks before its end."""
    stream = io.BytesIO()
    picture().save(stream, format="PNG")
    data = stream.getvalue()
    return data[:-12] + b"".join(chunks) + data[-12:]


@pytest.mark.parametrize("form", FORMS)
def test_every_text_is_found(form: str) -> None:
    inside = look_inside(saved(form), PATH)
    assert inside.xmp == XMP.decode()
    assert inside.exif[:2] in (b"MM", b"II") and b"secret description" in inside.exif
    expected = {
        "PNG": {"parameters": "secret plain", "packed": "secret packed", "other": "secret 小狗"},
        "JPEG": {"COM": "secret comment"},
        "WEBP": {},
    }
    assert inside.texts == expected[form]


def test_texts_behind_the_pixels_and_packed_international_ones_are_found() -> None:
    packed = b"parameters\0\1\0en\0\0" + zlib.compress("小狗".encode())
    assert look_inside(png_with(chunk(b"iTXt", packed)), PATH).texts == {"parameters": "小狗"}


@pytest.mark.parametrize(("text", "words"), [("naïve".encode(), "naïve"), ("naïve".encode("latin-1"), "naïve")])
def test_text_chunks_are_read_as_utf_8_where_they_are_that_else_as_latin_1(text: bytes, words: str) -> None:
    assert look_inside(png_with(chunk(b"tEXt", b"parameters\0" + text)), PATH).texts["parameters"] == words


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_without_metadata_the_pixels_are_the_same_and_no_word_is_left(form: str, mode: str) -> None:
    if form == "JPEG" and mode == "RGBA":
        mode = "RGB"
    data = saved(form, picture(mode))
    bare = without_metadata(data, PATH)
    assert b"secret" not in bare and len(bare) < len(data)
    assert all(np.array_equal(a, b) for a, b in zip(frames(data), frames(bare), strict=True))
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(bare)) as after:
        assert (after.mode, after.size) == (before.mode, before.size)
        assert after.info.get("icc_profile") == before.info["icc_profile"]
        assert "exif" not in after.info and "xmp" not in after.info and "comment" not in after.info
    assert without_metadata(bare, PATH) == bare
    inside = look_inside(bare, PATH)
    assert (inside.texts, inside.exif, inside.xmp) == ({}, b"", "")


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"restart_marker_blocks": 1}, {"subsampling": 0, "quality": 5}]
)
def test_a_jpeg_of_any_coding_is_taken_apart_at_the_right_places(options: dict[str, Any]) -> None:
    data = saved("JPEG", picture(size=(200, 120)), **options)
    bare = without_metadata(data + b"secret behind the end", PATH)
    assert b"secret" not in bare
    assert np.array_equal(frames(data)[0], frames(bare)[0])


@pytest.mark.parametrize("extra", [b"", b"secret"])
def test_the_thumbnail_in_the_head_of_a_jpeg_goes_and_its_density_stays(extra: bytes) -> None:
    stream = io.BytesIO()
    picture().save(stream, format="JPEG", dpi=(72, 36))
    data = stream.getvalue()
    head = data[4:20]
    assert data[:4] == b"\xff\xd8\xff\xe0" and head[:7] == b"\0\x10JFIF\0"
    thumbnail = b"secret" * 2  # of 4 x 1 px
    segment = struct.pack(">H", 16 + len(thumbnail + extra)) + head[2:14] + b"\4\1" + thumbnail + extra
    bare = without_metadata(data[:4] + segment + data[20:], PATH)
    assert b"secret" not in bare and bare == without_metadata(data, PATH)
    with Image.open(io.BytesIO(bare)) as opened:
        assert opened.info["dpi"] == (72, 36)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_keeps_its_frames(form: str) -> None:
    others = [Image.new("RGB", (24, 16), colour) for colour in ("red", "green")]
    data = saved(form, picture(), save_all=True, append_images=others, duration=100)
    bare = without_metadata(data, PATH)
    assert len(frames(bare)) == 3
    assert all(np.array_equal(a, b) for a, b in zip(frames(data), frames(bare), strict=True))
    assert b"secret" not in bare


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_a_picture_that_lies_down_stays_upright(form: str, turned: int) -> None:
    data = saved(form, turned=turned)
    bare = without_metadata(data, PATH, orientation(containers.exif(data, PATH)))
    with Image.open(io.BytesIO(bare)) as opened:
        assert opened.getexif().get(0x0112, 1) == turned
        assert dict(opened.getexif()).keys() <= {0x0112}
    assert b"secret" not in bare
    assert np.array_equal(frames(data)[0], frames(bare)[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_short_anywhere_is_refused_by_its_name(form: str) -> None:
    data = saved(form)
    for end in range(len(data)):
        with pytest.raises(InputError, match=r"^x\.png: "):
            without_metadata(data[:end], PATH)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8", b"RIFF\0\0\0\0WAVE", b"RIFF\4\0\0\0WEBP", PNG_HEAD])
def test_what_is_none_of_the_three_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"x\.png: (is no PNG, JPEG or WebP picture|is cut short)"):
        look_inside(data, PATH)


def without_blocks(data: bytes, *names: bytes) -> bytes:
    """A file whose blocks of these names are cut out, lengths put right."""
    found = list(containers._blocks(data, PATH))
    rest = data[: found[0].start] + b"".join(data[b.start : b.end] for b in found if b.name not in names)
    return rest[:4] + struct.pack("<I", len(rest) - 8) + rest[8:] if rest.startswith(b"RIFF") else rest


@pytest.mark.parametrize(
    ("form", "names"),
    [("PNG", [b"IDAT"]), ("JPEG", [b"\xda"]), ("JPEG", [b"\xc0"]), ("WEBP", [b"VP8L"]), ("WEBP", [b"VP8L", b"VP8X"])],
)
def test_a_file_without_pixels_is_read_but_not_rewritten(form: str, names: list[bytes]) -> None:
    data = saved(form)
    assert without_metadata(without_blocks(data), PATH) == without_metadata(data, PATH)
    empty = without_blocks(data, *names)
    assert look_inside(empty, PATH) == look_inside(data, PATH)
    with pytest.raises(InputError, match=r"^x\.png: has no pixels; "):
        without_metadata(empty, PATH)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_damage_is_read_or_refused_and_never_anything_else(form: str, data: st.DataObject) -> None:
    whole = bytearray(saved(form))
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for work in (look_inside, without_metadata):
        with suppress(InputError):
            work(bytes(whole), PATH)


def test_a_text_that_unpacks_to_gigabytes_is_refused_at_once() -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(b"\0" * (1 << 24)) for _ in range(16)) + packer.flush()
    assert len(bomb) < 300_000
    for name, head in ((b"zTXt", b"parameters\0\0"), (b"iTXt", b"parameters\0\1\0\0\0")):
        data = png_with(chunk(name, head + bomb))
        began = time.process_time()
        with pytest.raises(InputError, match=r"its text parameters has over 16 MiB"):
            look_inside(data, PATH)
        assert time.process_time() - began < 1
        assert frames(without_metadata(data, PATH))[0].shape == (16, 24, 4)  # it can be rid of it all the same


def test_many_texts_together_have_a_limit_too() -> None:
    packed = zlib.compress(b" " * MAX_TEXT_BYTES)
    texts = [chunk(b"zTXt", b"text%d\0\0" % number + packed) for number in range(5)]
    with pytest.raises(InputError, match="its texts have over 64 MiB"):
        look_inside(png_with(*texts), PATH)


@pytest.mark.parametrize("packed", [b"no zlib", zlib.compress(b"x" * 999)[:-9]])
def test_packed_text_that_is_damaged_is_refused(packed: bytes) -> None:
    with pytest.raises(InputError, match=r"cannot be unpacked|is cut short"):
        look_inside(png_with(chunk(b"zTXt", b"parameters\0\0" + packed)), PATH)


def test_a_hundred_thousand_small_texts_are_read_in_no_time() -> None:
    data = png_with(*[chunk(b"tEXt", b"k%d\0v" % number) for number in range(100_000)])
    began = time.process_time()
    assert len(look_inside(data, PATH).texts) == 100_000
    assert time.process_time() - began < 5
