"""Tensors as one picture: panels side by side, a row of panels for each group, positions downward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROW_HEIGHT = 12  # px of one position
PANEL_WIDTH = 380  # px that a panel reaches at least
LABEL_WIDTH = 130
LABEL_LENGTH = 18  # characters
MARGIN = 12
TITLE_HEIGHT = 34
PERCENTILE = 99.5  # of the magnitudes: full colour; a few numbers of CLIP's output are far above all others
POSITIVE, NEGATIVE = (178, 24, 43), (33, 102, 172)  # of ColorBrewer's RdBu; zero is white
FRAME = (190, 190, 190)


@dataclass(frozen=True)
class Panel:
    """A matrix to be seen."""

    title: str
    values: Tensor  # (rows, columns)


def picture(groups: Sequence[Sequence[Panel]], labels: Sequence[Sequence[str]]) -> Image.Image:
    """Groups of panels below one another; all panels of a group have as many rows as it has labels.

    Red is above zero, blue below; the number that full colour stands for is in each panel's title.
    """
    drawn = [[_coloured(panel) for panel in group] for group in groups]
    width = max(sum(image.width + MARGIN for image in group) for group in drawn) + LABEL_WIDTH + MARGIN
    heights = [TITLE_HEIGHT + ROW_HEIGHT * len(names) + MARGIN for names in labels]
    canvas = Image.new("RGB", (width, sum(heights) + MARGIN), "white")
    brush, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    top = MARGIN
    for group, images, names, height in zip(groups, drawn, labels, heights, strict=True):
        for row, name in enumerate(names):
            place = (MARGIN, top + TITLE_HEIGHT + ROW_HEIGHT * row)
            brush.text(place, _plain(name), fill="black", font=font)
        left = LABEL_WIDTH
        for panel, image in zip(group, images, strict=True):
            rows, columns = panel.values.shape
            title = f"{panel.title}\n{rows} x {columns}, full colour at {full_colour(panel.values):.3g}"
            brush.multiline_text((left, top), title, fill="black", font=font)
            canvas.paste(image, (left, top + TITLE_HEIGHT))
            frame = (left - 1, top + TITLE_HEIGHT - 1, left + image.width, top + TITLE_HEIGHT + image.height)
            brush.rectangle(frame, outline=FRAME)
            left += image.width + MARGIN
        top += height
    return canvas


def full_colour(values: Tensor) -> float:
    """The magnitude that full colour stands for; 1 where all values are 0."""
    limit = float(np.percentile(np.abs(values.double().numpy()), PERCENTILE))
    return limit if limit > 0 else 1.0


def _coloured(panel: Panel) -> Image.Image:
    strength = (panel.values.double().numpy() / full_colour(panel.values)).clip(-1, 1)[..., None]  # (rows, columns, 1)
    white = np.full(3, 255.0)
    end = np.where(strength >= 0, np.array(POSITIVE, dtype=np.float64), np.array(NEGATIVE, dtype=np.float64))
    colours: NDArray[np.uint8] = (white + np.abs(strength) * (end - white)).round().astype(np.uint8)
    rows, columns = panel.values.shape
    image = Image.fromarray(colours)
    return image.resize((columns * -(-PANEL_WIDTH // columns), rows * ROW_HEIGHT), Image.Resampling.NEAREST)


def _plain(name: str) -> str:
    """A label that any font has: Pillow's own, where it is a bitmap, knows Latin letters alone."""
    short = name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 2] + ".."
    return short.encode("ascii", "replace").decode()
