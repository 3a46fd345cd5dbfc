"""Picture files of every odd but legitimate kind are read as they are meant to be seen; malformed ones are refused."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sdcli.errors import InputError, SdcliWarning
from sdcli.pipeline.images import FORMATS, MAX_PIXELS, fit, load_image, to_images, to_pixels

WIDTH, HEIGHT = 12, 8


@pytest.fixture
def picture() -> Image.Image:
    """A picture in which no two pixels are alike and no symmetry hides a rotation."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([20 * x, 30 * y, 10 * x + 10 * y], axis=-1).astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "jpg"])
def test_every_listed_format_is_read(tmp_path: Path, picture: Image.Image, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture.save(path, **({"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}))

    read = load_image(path)

    tolerance = {"jpg": 60, "gif": 20}.get(suffix, 0)  # JPEG halves the colour planes, GIF has 256 colours
    assert (read.mode, read.size) == ("RGB", (WIDTH, HEIGHT))
    assert np.abs(array(read) - array(picture)).max() <= tolerance


def test_the_name_does_not_decide_the_format(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(array(load_image(tmp_path / "a.jpg")), array(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path, picture: Image.Image, orientation: int) -> None:
    # How each orientation is stored: what a viewer must undo (EXIF 2.3, tag 0x0112).
    flip, turn = Image.Transpose, Image.Image.transpose
    stored = {
        1: picture,
        2: turn(picture, flip.FLIP_LEFT_RIGHT),
        3: turn(picture, flip.ROTATE_180),
        4: turn(picture, flip.FLIP_TOP_BOTTOM),
        5: turn(picture, flip.TRANSPOSE),
        6: turn(picture, flip.ROTATE_90),
        7: turn(picture, flip.TRANSVERSE),
        8: turn(picture, flip.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)

    assert np.array_equal(array(load_image(tmp_path / "a.png")), array(picture))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert array(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_sixteen_bit_colour_is_scaled_not_clipped(tmp_path: Path) -> None:
    row = struct.pack(">9H", 0, 256, 65535, 32768, 257, 128, 65280, 300, 1)  # three pixels, R G B each
    (tmp_path / "a.png").write_bytes(png(3, 1, depth=16, colour=2, rows=b"\0" + row))
    expected = np.array([[0, 1, 255], [128, 1, 0], [255, 1, 0]])
    assert np.abs(array(load_image(tmp_path / "a.png"))[0] - expected).max() <= 1


def test_floating_point_values_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: holds floating-point values"):
        load_image(tmp_path / "a.tif")


def test_grey_and_one_bit_pictures_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)
    assert load_image(tmp_path / "bit.png").getpixel((1, 1)) == (255, 255, 255)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png")
    assert array(load_image(tmp_path / "a.png")).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_a_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=0)
    assert array(load_image(tmp_path / "a.png")).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (255, 0, 255, 0)).save(tmp_path / "a.tif")  # full cyan and yellow: green
    red, green, blue = load_image(tmp_path / "a.tif").getpixel((0, 0))
    assert red < 10 and green > 245 and blue < 10


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)])
    image.save(tmp_path / "a.png")
    assert array(load_image(tmp_path / "a.png")).tolist() == [[[200, 0, 0], [255, 255, 255], [127, 127, 127]]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame_and_a_warning(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))

    with pytest.warns(SdcliWarning, match=r"only the first of 3 frames is used"):
        image = load_image(path)

    assert image.getpixel((1, 1)) == (255, 0, 0)


def test_the_frames_of_a_tiff_are_counted_only_as_far_as_is_told(tmp_path: Path) -> None:
    """Each of its directories costs half a millisecond, whatever they hold: 100,000 of them were 40 s."""
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(278, 3, 1, 8), (279, 4, 1, 64)]
    data = bytearray(b"II*\0" + struct.pack("<I", 72) + bytes(64))
    for number in range(20_000):
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        data += struct.pack("<I", len(data) + 4 if number < 19_999 else 0)
    (tmp_path / "a.tif").write_bytes(data)
    began = time.process_time()
    with pytest.warns(SdcliWarning, match="only the first of 100 or more frames is used"):
        assert load_image(tmp_path / "a.tif").size == (8, 8)
    assert time.process_time() - began < 1


def test_a_picture_cut_short_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp", "tif", "gif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(InputError, match=rf"a\.{suffix}"):
            load_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"\0" * 99]
)
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


def test_a_format_outside_the_list_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", format="PPM")
    with pytest.raises(InputError, match="accepted are " + ", ".join(FORMATS)):
        load_image(tmp_path / "a.png")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=path.name):
            load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's, from 89 million
@pytest.mark.parametrize("side", [11_314, 60_000])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, side: int) -> None:
    """1.5 kB that claim up to 3.6 billion pixels: ours refuses from 128 million, Pillow itself from 179 million."""
    assert side * side > MAX_PIXELS
    (tmp_path / "a.png").write_bytes(png(side, side, depth=8, colour=2, rows=b"\0" * 1_000_000))
    with pytest.raises(InputError, match=r"a\.png.*pixels"):
        load_image(tmp_path / "a.png")


def test_a_text_bomb_in_the_metadata_is_refused(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "a" * 80_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(InputError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


def test_an_image_survives_the_way_to_pixels_and_back(picture: Image.Image) -> None:
    pixels = to_pixels(picture)

    (back,) = to_images(pixels)

    assert pixels.shape == (1, 3, HEIGHT, WIDTH) and pixels.dtype == torch.float32
    assert np.array_equal(array(back), array(picture))


def test_black_and_white_are_minus_one_and_one() -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(0, 0, 0), (255, 255, 255)])
    assert to_pixels(image)[0, 0, 0].tolist() == [-1.0, 1.0]


def test_every_level_of_grey_survives() -> None:
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert np.array_equal(array(to_images(to_pixels(levels))[0]), array(levels))


def test_pixels_out_of_range_are_clipped_and_none_wraps() -> None:
    pixels = torch.tensor([-9.0, -1.001, 1.001, 9.0]).expand(1, 3, 1, 4)
    assert array(to_images(pixels)[0])[0, :, 0].tolist() == [0, 0, 255, 255]


def test_a_batch_gives_its_images_in_order() -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert [image.getpixel((0, 0))[0] for image in to_images(pixels)] == [0, 128, 255]


def test_half_precision_pixels_become_images() -> None:
    assert to_images(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16))[0].getpixel((0, 0)) == (255, 255, 255)


def test_fit_fills_the_size_from_the_centre_without_distortion() -> None:
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 10))  # the middle third

    fitted = fit(image, 20, 20)

    assert fitted.size == (20, 20)
    assert fitted.getpixel((10, 10)) == (0, 255, 0)
    assert array(fitted)[:, 3:17, 0].max() < 30  # no red: the outer thirds were cut off, not squeezed in


def test_fit_leaves_an_image_of_the_right_size_alone(picture: Image.Image) -> None:
    assert fit(picture, WIDTH, HEIGHT) is picture


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file put together by hand (PNG specification, section 5)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
