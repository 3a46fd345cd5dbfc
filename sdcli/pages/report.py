"""The report of a training run: one HTML file to look at and to hand on."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.files import atomic_write
from sdcli.layout import read_json
from sdcli.pages import charts
from sdcli.pages.charts import Chart, Line, number
from sdcli.pages.curves import MAX_STEP, Curve, Metrics, measured, read_metrics
from sdcli.pages.page import Picture, Setting, as_text, as_title, in_words, picture, render
from sdcli.train_specs import TrainEmbeddingSpec, TrainSpec, TrainUnetSpec, TrainVaeSpec

REPORT = "report.html"

KINDS: dict[str, tuple[str, type[TrainSpec]]] = {
    "vae": ("VAE", TrainVaeSpec),
    "unet": ("UNet", TrainUnetSpec),
    "embedding": ("Embedding", TrainEmbeddingSpec),
}
STEP_FOLDER = re.compile(r"(?:step|checkpoint)-(\d{1,12})")
SAMPLE_SUFFIXES = (".png", ".webp")
MAX_SAMPLE_ROWS = 24
MAX_SAMPLE_BYTES = 1_500_000  # of all pictures of a page, as embedded
MAX_COLUMNS = 8
THUMBNAIL_SIDE = 256  # px
MAX_MARKS = 100

# Groups of terms, in the order of their charts; what matches none is a term of the loss.
LOSS, TERMS, SIGNED = "Loss", "Loss terms", "Terms of either sign"
BANDS, GRADIENT, RATE = "Loss by timestep band", "Gradient norm", "Learning rate"
GROUPS = (
    (BANDS, re.compile(r"loss_t\d+")),
    ("Adaptive weight", re.compile(r"d_weight")),
    (GRADIENT, re.compile(r"(.*_)?grad_norm")),
    (RATE, re.compile(r"(.*_)?lr")),
    ("Images per second", re.compile(r"images_per_second")),
)
NOTES = {BANDS: "t0 is the band of the least noise"}
SCHEDULES = frozenset({RATE})  # drawn as they are: neither smoothed nor on a logarithmic axis


@dataclass(frozen=True)
class Figure:
    """A key figure: what it is, its value, and what to know of it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class SampleRow:
    """The pictures drawn at one step, and how many more the page has no room for, where one step's fill it."""

    step: int
    pictures: list[Picture]
    left_out: int

    @property
    def captions(self) -> list[str]:
        """What the pictures are called."""
        return [one.caption for one in self.pictures]

    @property
    def columns(self) -> int:
        """How many pictures stand beside each other where there is room, so that all lines are about equally long."""
        count = len(self.pictures)
        return math.ceil(count / math.ceil(count / MAX_COLUMNS))


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a training run, from what lies there, and return its path.

    The run may be going on, and be at any step. The same contents give the same bytes.
    Raises InputError when config.json is missing or damaged, OutputError when the page cannot be written.
    """
    config = read_json(folder / "config.json")
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    metrics = read_metrics(folder / "metrics.jsonl")
    rows, steps_sampled = _samples(folder)
    kind = str(config.get("kind", ""))
    name, spec = KINDS.get(kind, (kind, TrainSpec))
    chosen, defaults = _settings(config, spec)
    page = render(
        "report",
        number=number,
        heading=f"{name} training".strip(),
        run=folder.resolve().name,
        figures=list(_figures(folder, config, summary, metrics)),
        steps_done=metrics.last_step,
        steps=_steps(config),
        is_finished=(folder / "export").is_dir(),
        charts=_charts(metrics),
        metrics=metrics,
        rows=rows,
        steps_sampled=steps_sampled,
        chosen=chosen,
        defaults=defaults,
        checkpoints=[step for step, _ in _step_folders(folder / "checkpoints")],
    )
    with atomic_write(folder / REPORT) as part:
        part.write_bytes(b"".join(page))
    return folder / REPORT


def _charts(metrics: Metrics) -> list[Chart]:
    groups: dict[str, list[str]] = {}
    for name in metrics.curves:
        groups.setdefault(_group(name, metrics.curves), []).append(name)
    known = [LOSS, TERMS, SIGNED]
    last = [title for title, _ in GROUPS]
    between = [title for title in groups if title not in (*known, *last)]
    return [_chart(title, groups[title], metrics) for title in (*known, *between, *last) if title in groups]


def _group(name: str, curves: Mapping[str, Curve]) -> str:
    """The title of the chart that a term is drawn in."""
    term = _validated(name, curves)
    if term == "loss":
        return LOSS
    for title, pattern in GROUPS:
        if pattern.fullmatch(term):
            return title
    if " " in term:
        return as_title(term)
    # What learns beside the model logs its terms under a prefix, its gradient norm among them.
    prefixes = (term[:i] for i, letter in enumerate(term) if letter == "_")
    player = next((prefix for prefix in prefixes if f"{prefix}_grad_norm" in curves), None)
    if player is not None:
        return as_title(player)
    return TERMS if curves[term].lowest[1] >= 0 else SIGNED


def _validated(name: str, curves: Mapping[str, Curve]) -> str:
    """The term that `validation <term>` stands beside, where there is one; every other term is its own."""
    inner = name.partition(" ")[2]
    return inner if inner in curves else name


def _chart(title: str, names: list[str], metrics: Metrics) -> Chart:
    terms = list(dict.fromkeys(_validated(name, metrics.curves) for name in names))
    # A validation has the colour of its term, among several; beside a single one it has its own.
    colours = {term: i for i, term in enumerate(terms)} if len(terms) > 1 else {}
    lines = [
        Line(
            name,
            metrics.curves[name],
            colour=colours.get(_validated(name, metrics.curves), position),
            is_exact=title in SCHEDULES,
            is_dotted=" " in name,
        )
        for position, name in enumerate(names)
    ]
    return charts.draw(
        title,
        lines,
        last_step=metrics.last_step,
        note=NOTES.get(title, ""),
        is_wide=title == LOSS,
        may_be_log=title not in SCHEDULES,
        marks=metrics.bad_steps[:MAX_MARKS] if title in (LOSS, GRADIENT) else (),
    )


def _figures(folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Metrics) -> Iterator[Figure]:
    curves, total = metrics.curves, _steps(config)
    yield Figure("Steps", number(metrics.last_step), f"of {number(total)}" if total is not None else "")
    if "loss" in curves:
        yield Figure("Last loss", number(curves["loss"].last), f"smoothed {number(curves['loss'].smoothed()[-1][1])}")
    if "validation loss" in curves:
        step, value = curves["validation loss"].lowest
        yield Figure("Best validation loss", number(value), f"at step {number(step)}")
    if "images_per_second" in curves:
        yield Figure("Images per second", number(curves["images_per_second"].smoothed()[-1][1], 3), "smoothed")
    if metrics.bad_steps:
        shown = ", ".join(map(number, metrics.bad_steps[:3])) + (" …" if len(metrics.bad_steps) > 3 else "")
        yield Figure("Steps not finite", number(len(metrics.bad_steps)), f"at {shown}")
    words = []
    for name, value in summary.items():
        count = measured(value)
        if count is not None:
            yield Figure(as_title(name), number(count))
        else:
            words.append(f"{in_words(name)} {as_text(value)}")
    if (folder / "export").is_dir():
        yield Figure("Export", "export/", ", ".join(words))


def _settings(config: Mapping[str, Any], spec: type[TrainSpec]) -> tuple[list[Setting], list[Setting]]:
    """The settings of a run that differ from the defaults of its command, and those that do not."""
    defaults = {field.name: field.default for field in dataclasses.fields(spec)} | {"lr": spec.DEFAULT_LR}
    chosen: list[Setting] = []
    others: list[Setting] = []
    for name, value in config.items():
        is_default = name in defaults and as_text(value) == as_text(defaults[name])
        (others if is_default else chosen).append(Setting(in_words(name), as_text(value)))
    return chosen, others


def _steps(config: Mapping[str, Any]) -> int | None:
    steps = config.get("steps")
    return steps if type(steps) is int and 0 < steps <= MAX_STEP else None


def _samples(folder: Path) -> tuple[list[SampleRow], int]:
    """Whole rows of samples, the newest first, as many as a page has room for; and the number of steps sampled."""
    found = _step_folders(folder / "samples")[::-1]
    rows: list[SampleRow] = []
    room = MAX_SAMPLE_BYTES
    for step, place in (found[i] for i in _spread(len(found))[:MAX_SAMPLE_ROWS]):
        paths = sorted(p for p in place.iterdir() if p.suffix in SAMPLE_SUFFIXES)
        pictures = []
        for path in paths:
            small = picture(path, folder, THUMBNAIL_SIDE)
            if len(small.uri) > room:
                break
            room -= len(small.uri)
            pictures.append(small)
        is_whole = len(pictures) == len(paths)
        if pictures and (is_whole or not rows):
            rows.append(SampleRow(step, pictures, len(paths) - len(pictures)))
        if not is_whole:
            break
    return sorted(rows, key=lambda row: -row.step), len(found)


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """The folders of steps in a folder that may not be there, in the order of the steps."""
    if not folder.is_dir():
        return []
    found = ((STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match is not None)


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order of which every beginning covers the whole: both ends, then ever finer strides."""
    return sorted(range(count), key=lambda i: -(i & -i) if 0 < i < count - 1 else -count)
