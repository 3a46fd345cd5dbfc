"""What lies beside the pictures says what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.drawing.extras import Sheet
from sdcli.pipeline.sheets import contact_sheet, tile
from sdcli.specs import GenerateSpec


@pytest.mark.parametrize(
    ("shown", "captions", "heading"),
    [
        (["a red bee", "a blue bee"], ["seed 7\na red bee", "seed 8\na blue bee"], ""),
        (["a red bee", "a red bee"], ["seed 7", "seed 8"], "a red bee"),
        (["a red bee"], ["seed 7"], "a red bee"),
        ([""], ["seed 7"], ""),
    ],
)
def test_a_sheet_says_over_all_what_they_all_show_else_under_each_what_it_shows(
    tmp_path: Path, shown: list[str], captions: list[str], heading: str
) -> None:
    images = [Image.new("RGB", (32, 32), (90 * i, 200, 40)) for i in range(len(shown))]
    sheet = Sheet(tmp_path / "sheet.png", len(shown))
    for i, (image, words) in enumerate(zip(images, shown, strict=True)):
        sheet.add(image, 7 + i, words)
    path, facts = sheet.write(GenerateSpec())
    assert facts == {"grid": [7 + i for i in range(len(shown))]}
    expected = contact_sheet([tile(image, len(shown)) for image in images], captions, heading)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))
