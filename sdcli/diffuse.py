"""STORY: a picture -> itself at chosen steps into the noise, q(x_t | x_0), in pixels and in latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdcli import latent_files, layout, store
from sdcli.checks import parse_size
from sdcli.errors import NumericalError, UsageError
from sdcli.files import place
from sdcli.lab.specs import DiffuseSpec, parse_timesteps
from sdcli.pipeline import images, noise, sampling, vae
from sdcli.pipeline.bundle import load_vae
from sdcli.pipeline.device import pick_device, pick_dtype
from sdcli.pipeline.metadata import png_bytes
from sdcli.plan.naming import check_targets, is_output_folder
from sdcli.plan.parts import check_multiple, vae_factor
from sdcli.schedulers.config import check_config

MIN_TILE = 128  # px; what is smaller is enlarged by a whole factor in a strip
MARGIN, LABEL = 8, 22  # px, between the tiles of a strip and above them
NAMES = 72  # px, for what the rows of a strip are called
INK, PAPER = "#262626", "#ffffff"


@dataclass(frozen=True)
class Level:
    """How much of a picture is left at one step."""

    t: int
    alpha_bar: float

    def facts(self) -> dict[str, Any]:
        """As plain values; the ratio of signal to noise in decibels is None where no signal is left."""
        snr = self.alpha_bar / (1.0 - self.alpha_bar)
        decibels = round(10.0 * math.log10(snr), 3) if snr > 0 else None
        return {"t": self.t, "alpha_bar": self.alpha_bar, "snr": snr, "snr_db": decibels}


@dataclass(frozen=True)
class DiffuseRecord:
    """One file: a strip of all steps, or one step."""

    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Noised:
    """A picture at one step in one space, and its latents where that is latents: (1, C, h, w) float32."""

    level: Level
    space: str
    image: Image.Image
    latents: Tensor | None


@dataclass(frozen=True)
class _Targets:
    """Where the results go: a strip, or a picture a step and space; and the latents of each step."""

    strip: Path | None
    pictures: dict[tuple[int, str], Path]
    latents: dict[int, Path]


def run(spec: DiffuseSpec) -> Iterator[DiffuseRecord]:
    """Noise a picture to every step asked for: one strip, or, into a folder, a PNG a step and space.

    One draw of noise a space, the same at all steps, so that they differ in its share alone. Pixels are clipped to what
    a picture can show; latents are decoded.
    Raises InputError for what is no picture or a model's malformed config, UsageError for a step the model has not,
    OutputError when a file cannot be written.
    """
    image = images.load_image(spec.input)
    model = store.resolve(spec.model, offline=spec.offline)
    levels = _levels(spec, model.folder)
    image = _sized(spec, image, model.folder)
    targets = _targets(spec, levels, image.size)
    known: dict[str, Any] = {"source": str(spec.input), "model": model.ref, "seed": spec.seed}
    done: list[_Noised] = []
    for one in _noised(spec, levels, image, model.folder):
        if one.latents is not None and spec.save_latents is not None:
            yield _save(one, spec, targets.latents[one.level.t], model, known)
        if targets.strip is not None:
            done.append(one)
            continue
        path = place(png_bytes(one.image, None), targets.pictures[one.level.t, one.space], spec.if_exists)
        yield DiffuseRecord(path, {"path": str(path), "space": one.space, **one.level.facts(), **known})
    if targets.strip is not None:
        path = place(png_bytes(strip(done), None), targets.strip, spec.if_exists)
        steps = [level.facts() for level in levels]
        yield DiffuseRecord(path, {"path": str(path), "space": spec.space, "levels": steps, **known})


def strip(done: Sequence[_Noised]) -> Image.Image:
    """A row a space, a column a step, labelled; small pictures enlarged by a whole factor."""
    spaces = list(dict.fromkeys(one.space for one in done))
    levels = list(dict.fromkeys(one.level for one in done))
    first = done[0].image
    factor = max(1, math.ceil(MIN_TILE / min(first.size)))
    width, height = factor * first.width, factor * first.height
    size = NAMES + len(levels) * (width + MARGIN), LABEL + len(spaces) * (height + MARGIN)
    canvas = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, level in enumerate(levels):
        middle = NAMES + column * (width + MARGIN) + width // 2
        draw.text((middle, LABEL // 2), f"t = {level.t}", fill=INK, font=font, anchor="mm")
    for row, space in enumerate(spaces):
        draw.text((MARGIN, LABEL + row * (height + MARGIN) + height // 2), space, fill=INK, font=font, anchor="lm")
    for one in done:
        tile = one.image.resize((width, height), Image.Resampling.NEAREST)
        left = NAMES + levels.index(one.level) * (width + MARGIN)
        canvas.paste(tile, (left, LABEL + spaces.index(one.space) * (height + MARGIN)))
    return canvas


def _levels(spec: DiffuseSpec, folder: Path) -> list[Level]:
    """The steps asked for, by default five from the first to the last. Raises UsageError for one there is not."""
    config = layout.config(folder, "scheduler")
    check_config(config)
    alpha_bar = noise.alpha_bars(config)
    last = len(alpha_bar) - 1
    asked = (
        parse_timesteps(spec.t) if spec.t is not None else tuple(dict.fromkeys(round(last * i / 4) for i in range(5)))
    )
    for t in asked:
        if t > last:
            raise UsageError(f"--t {t}: out of range", f"this model has the steps 0 to {last}")
    return [Level(t, float(alpha_bar[t])) for t in asked]


def _sized(spec: DiffuseSpec, image: Image.Image, folder: Path) -> Image.Image:
    """The picture at the size asked for; where it becomes latents, else cut to multiples of the VAE factor."""
    factor = vae_factor(folder) if spec.space != "pixels" else 1
    if spec.size is not None:
        check_multiple(parse_size(spec.size), factor)
        return images.fit(image, *parse_size(spec.size))
    return images.cut(image, factor, spec.input)


def _targets(spec: DiffuseSpec, levels: Sequence[Level], size: tuple[int, int]) -> _Targets:
    """The path of every result.

    Raises UsageError or OutputError now if one could not be written, or would be too large to be read.
    """
    many, count = is_output_folder(spec.output), len(levels)
    if not many and spec.output.suffix.lower() != ".png":
        raise UsageError(f"--output {spec.output}: pictures are written as PNG", "name a .png file or a folder")
    if spec.save_latents is not None and not is_output_folder(spec.save_latents):
        raise UsageError(f"--save-latents {spec.save_latents}: is no folder", "name one, for a file a step")
    if not many and count * len(spec.spaces) * size[0] * size[1] > images.MAX_PIXELS:
        what = f"a strip of {count} steps of {size[0]} x {size[1]} px is larger than can be read again"
        raise UsageError(what, "give a smaller --size or fewer steps, or a folder as --output")
    stems = {level.t: f"{spec.input.stem}-{level.t:04d}" for level in levels}
    spaces, folder = spec.spaces if many else (), spec.save_latents
    targets = _Targets(
        strip=None if many else spec.output,
        pictures={(t, space): spec.output / f"{stem}-{space}.png" for t, stem in stems.items() for space in spaces},
        latents={t: folder / f"{stem}{latent_files.SUFFIX}" for t, stem in stems.items()} if folder is not None else {},
    )
    paths = [*([targets.strip] if targets.strip is not None else []), *targets.pictures.values()]
    paths += targets.latents.values()
    check_targets(paths, spec.if_exists)
    return targets


def _noised(spec: DiffuseSpec, levels: Sequence[Level], image: Image.Image, folder: Path) -> Iterator[_Noised]:
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    # What is wrong with the device or the model is told before the first file is written.
    coder = load_vae(folder, device=device, dtype=dtype) if "latents" in spec.spaces else None
    pixels = images.to_pixels(image)  # (1, 3, H, W)
    if "pixels" in spec.spaces:
        for level, x_t in _q_samples(pixels, levels, spec.seed):
            yield _Noised(level, "pixels", images.to_images(x_t)[0], None)
    if coder is not None:
        with torch.no_grad():
            x_0 = vae.encode(coder, pixels.to(coder.device, coder.dtype)).float().cpu()  # (1, C, h, w)
        if not x_0.isfinite().all():
            raise NumericalError(f"{spec.input}: gives latents that are not finite", "try --dtype float32")
        for level, x_t in _q_samples(x_0, levels, spec.seed):
            (decoded,) = images.to_images(vae.decode_finite(coder, x_t))
            yield _Noised(level, "latents", decoded, x_t)


def _q_samples(x_0: Tensor, levels: Sequence[Level], seed: int) -> Iterator[tuple[Level, Tensor]]:
    """x_t at every level, with one draw of noise."""
    _, channels, height, width = x_0.shape
    eps = sampling.initial_noise((channels, height, width), sampling.generators([seed]))
    table = torch.tensor([level.alpha_bar for level in levels], dtype=torch.float64)
    for row, level in enumerate(levels):
        yield level, noise.q_sample(x_0, torch.tensor([row]), eps, table)


def _save(one: _Noised, spec: DiffuseSpec, target: Path, model: store.Model, known: dict[str, Any]) -> DiffuseRecord:
    assert one.latents is not None
    config = layout.config(model.folder, "vae")
    facts = {
        **known,
        "scaling_factor": config.get("scaling_factor", latent_files.SCALING_FACTOR),
        "height": one.image.height,
        "width": one.image.width,
        "mode": "diffuse",
        **one.level.facts(),
    }
    data = latent_files.file_bytes(one.latents, {k: v for k, v in facts.items() if k != "source"})
    path = place(data, target, spec.if_exists, ending=latent_files.SUFFIX)
    return DiffuseRecord(path, {"path": str(path), "space": "latents", **facts})
