"""A contact sheet shows every picture in its place, over its caption."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image

from sdcli.pipeline.sheets import LINE, MARGIN, MAX_TILE, PAPER, columns, contact_sheet, tile

COLOURS = [(200, 30 * i, 10 * i) for i in range(8)]


@pytest.mark.parametrize(
    ("count", "across"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3), (12, 4), (100, 10)]
)
def test_rows_are_about_as_many_as_columns_and_well_filled(count: int, across: int) -> None:
    assert columns(count, 100, 100) == across


def test_wide_pictures_stand_in_fewer_columns() -> None:
    assert columns(6, 300, 100) == 2
    assert columns(6, 100, 300) == 6


def test_every_picture_is_whole_in_its_place() -> None:
    tiles = [tile(Image.new("RGB", (32, 32), colour), 8) for colour in COLOURS]
    sheet = np.asarray(contact_sheet(tiles, [f"seed {i}" for i in range(8)]))
    side = tiles[0].width
    assert sheet.shape == (MARGIN + 2 * (side + LINE + MARGIN), MARGIN + 4 * (side + MARGIN), 3)
    for number, colour in enumerate(COLOURS):
        top = MARGIN + number // 4 * (side + LINE + MARGIN)
        left = MARGIN + number % 4 * (side + MARGIN)
        assert (sheet[top : top + side, left : left + side] == colour).all()
        caption = sheet[top + side : top + side + LINE, left : left + side]
        assert caption.min() < 128  # ink
    assert (sheet[:, :MARGIN] == PAPER).all() and (sheet[:, -MARGIN:] == PAPER).all()


def test_a_small_picture_is_enlarged_by_a_whole_factor_and_a_large_one_scaled_down() -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    assert tile(small, 4).size == (240, 160)
    assert np.array_equal(np.asarray(tile(small, 4))[::5, ::5], np.asarray(small))
    assert tile(Image.new("RGB", (1024, 512)), 4).size == (MAX_TILE, MAX_TILE // 2)
    assert tile(Image.new("RGB", (512, 384)), 4).size == (512, 384)
    assert max(tile(Image.new("RGB", (512, 512)), 10_000).size) == 80
    assert tile(Image.new("RGB", (4096, 1)), 4).size == (512, 1)


@pytest.mark.parametrize("text", ["", "x" * 10_000, "word " * 10_000, "ü 😀 \0\x1b[31m", "a\nb"])
def test_whatever_the_words_the_sheet_keeps_its_width(text: str) -> None:
    tiles = [Image.new("RGB", (160, 160))] * 2
    sheet = contact_sheet(tiles, [text.replace("\n", " "), "b"], text)
    assert sheet.width == MARGIN + 2 * (160 + MARGIN)
    assert sheet.height <= 2 * MARGIN + 3 * LINE + 160 + 3 * LINE + MARGIN
    assert (np.asarray(sheet)[:, -MARGIN:] == PAPER).all()  # nothing runs over the edge


def test_a_heading_without_end_is_cut_in_no_time() -> None:
    tiles = [Image.new("RGB", (160, 160))] * 64
    began = time.process_time()
    contact_sheet(tiles, ["é" * 10_000] * 64, "é 😀" * 10_000)
    assert time.process_time() - began < 3


def test_lines_of_a_caption_stand_below_each_other() -> None:
    tiles = [Image.new("RGB", (160, 160))]
    one, two = (contact_sheet(tiles, [caption]).height for caption in ("seed 7", "seed 7\na red apple"))
    assert two == one + LINE
    assert contact_sheet(tiles, ["seed 7\n\na red apple"]).height == two + LINE  # an empty one, too
    many = contact_sheet(tiles, ["seed 7\n" + "a green turtle on a pink background " * 10]).height
    assert many == one + 3 * LINE  # of words as many lines as a heading may have
