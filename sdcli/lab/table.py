"""Rows of `sdcli bench` -> a CSV file and a figure. No torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sdcli.lab import plots

Row = Mapping[str, Any]

NUMBER, COUNT, WORD, NONE = (int, float), int, str, type(None)
COLUMNS: Mapping[str, tuple[type, ...]] = {  # of what types; None is what was not measured
    "scheduler": (WORD,),
    "steps": (COUNT,),
    "status": (WORD,),
    "evaluations": (COUNT, NONE),
    "seconds_per_step": (*NUMBER, NONE),
    "seconds_per_image": (*NUMBER, NONE),
    "latent_rmse": (*NUMBER, NONE),
    "psnr_db": (*NUMBER, NONE),
    "frechet_distance": (*NUMBER, NONE),
    "features": (WORD, NONE),
    "feature_dimensions": (COUNT, NONE),
    "pictures": (COUNT, NONE),
    "data_pictures": (COUNT, NONE),
    "memory_bytes": (COUNT, NONE),
    "memory": (WORD, NONE),
    "note": (WORD,),
}
DONE = "done"  # status of a row that was measured
QUALITIES = {  # column, label
    "rmse": ("latent_rmse", "RMSE of the latents to the reference"),
    "psnr": ("psnr_db", "PSNR of the pictures to the reference, dB"),
    "frechet": ("frechet_distance", "Frechet distance"),
}
COSTS = {
    "seconds": ("seconds_per_image", "seconds an image"),
    "evaluations": ("evaluations", "evaluations of the UNet"),
    "steps": ("steps", "steps"),
}


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """The table as a CSV file; what was not measured is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode(errors="surrogateescape")


def figure(rows: Sequence[Row], *, title: str, quality: str, over: str) -> bytes:
    """A PNG of quality over cost, a curve a scheduler; `quality` is a key of QUALITIES, `over` one of COSTS."""
    (column, y_label), (cost, x_label) = QUALITIES[quality], COSTS[over]
    curves = []
    for name in dict.fromkeys(row["scheduler"] for row in rows):
        known = [r for r in rows if r["scheduler"] == name and None not in (r[cost], r[column])]
        points = sorted((r[cost], r[column]) for r in known)
        if points:
            curves.append(plots.Curve(name, [x for x, _ in points], [y for _, y in points]))
    # Few values would each be a tick of a logarithmic axis: fine for steps, crowded for all else.
    is_spread = over == "steps" or len({x for curve in curves for x in curve.xs}) > plots.MAX_OWN_TICKS
    return plots.line_chart(
        curves, title=title, x_label=x_label, y_label=y_label, log_x=is_spread, log_y=quality == "rmse"
    )
