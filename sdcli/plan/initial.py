"""What a drawing starts from in place of its own noise: a picture, perhaps with a mask, or a latent file. No torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli import latent_files, layout, store
from sdcli.checks import MAX_SIDE, MIN_SIDE, parse_size
from sdcli.errors import InputError, SdcliWarning, UsageError
from sdcli.files import open_regular
from sdcli.plan.lora_files import LoraFile, content
from sdcli.plan.parts import reads_mask, vae_factor
from sdcli.schedulers.config import train_timesteps
from sdcli.specs import GenerateSpec

if TYPE_CHECKING:
    from sdcli.schedulers import Scheduler

DEFAULT_STRENGTH = 0.75
INPAINTING_STRENGTH = 1.0  # of a UNet for inpainting, which knows the rest of the picture at any
LARGE = 4  # times the area that a model draws by itself: from there on a picture is worth a warning


@dataclass(frozen=True)
class InitialPicture:
    """The picture that a drawing starts from.

    strength: share of the steps that are made, from 0 (none: the picture as the VAE gives it back) to 1.
    steps: how many that are. size: what it is scaled and cropped to, in px; None: its own, cut.
    is_for_unet: whether the UNet itself reads the mask.
    """

    path: Path
    strength: float
    steps: int
    mask: Path | None
    size: tuple[int, int] | None
    is_for_unet: bool

    def describe(self) -> dict[str, Any]:
        """The decisions as plain values, for --dry-run."""
        mask = {"mask": str(self.mask)} if self.mask is not None else {}
        return {"init_image": str(self.path), **mask, "strength": self.strength, "steps_made": self.steps}


def initial_picture(spec: GenerateSpec, folder: Path, scheduler: Scheduler, steps: int) -> InitialPicture | None:
    """What is decided of `--init-image`, `--strength` and `--mask`, or None without them.

    Raises UsageError for a strength that leaves too few steps, and for an inpainting model that is given no mask.
    """
    is_for_unet = reads_mask(folder)
    if is_for_unet and spec.mask is None:
        what = f"{folder}/unet: is for inpainting and draws in a picture alone"
        raise UsageError(what, "name the picture with --init-image and, white on black, where to draw with --mask")
    if spec.init_image is None:
        return None
    default = INPAINTING_STRENGTH if is_for_unet else DEFAULT_STRENGTH
    strength = spec.strength if spec.strength is not None else default
    made = min(int(steps * strength), steps)  # as in diffusers' StableDiffusionImg2ImgPipeline.get_timesteps
    least = max(1, scheduler.least_steps)
    if made < least and strength > 0:
        what = f"--strength {strength:g}: leaves {made} of {steps} steps, scheduler {scheduler.name} needs {least}"
        enough = next(share / 100 for share in range(1, 101) if int(steps * share / 100) >= least)
        raise UsageError(what, f"use more steps, or a strength from {enough:g} on")
    is_sized = spec.size is not None or spec.width is not None or spec.height is not None
    size = _asked_size(spec, own_size(spec.init_image, folder)) if is_sized else None
    return InitialPicture(spec.init_image, strength, made, spec.mask, size, is_for_unet)


def size_of_picture(spec: GenerateSpec, path: Path, folder: Path, native: int) -> tuple[int, int]:
    """Width and height in px that are drawn from a picture: those asked for, else its own.

    native: the side in px that the model draws by itself. Warns of a picture that is much larger.
    """
    own = own_size(path, folder)
    width, height = _asked_size(spec, own)
    if (width, height) == own and width * height > LARGE * native**2:
        note = f"{path}: is drawn at its own {width} x {height} px, this model draws {native} x {native}"
        warnings.warn(f"{note}; --size makes it smaller", SdcliWarning, stacklevel=2)
    return width, height


def own_size(path: Path, folder: Path) -> tuple[int, int]:
    """Width and height in px of a picture, cut to multiples of the VAE factor.

    Raises InputError for what is no picture, or too small or too large to be drawn.
    """
    from sdcli.pipeline import images  # deferred: 0.1 s that only pictures need; it brings no torch

    with open_regular(path, max_bytes=images.MAX_FILE_BYTES) as stream:
        whole = images.read_size(stream, path)
    factor = vae_factor(folder)
    width, height = (side // factor * factor for side in whole)
    if min(width, height) < max(MIN_SIDE, factor) or max(width, height) > MAX_SIDE:
        what = f"{path}: is {whole[0]} x {whole[1]} px"
        raise InputError(what, f"sides of {max(MIN_SIDE, factor)} to {MAX_SIDE} px can be drawn; scale it first")
    return width, height


def size_of_latents(spec: GenerateSpec, path: Path, model: store.Model) -> tuple[int, int]:
    """Width and height in px of the picture that initial noise gives.

    Raises InputError for a file that is no latent file or belongs to another model, UsageError for another size asked.
    """
    vae = layout.config(model.folder, "vae")
    file = latent_files.look(path)
    latent_files.check_fits(file, vae)
    width, height = (side * latent_files.factor(vae) for side in file.shape[:1:-1])
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
        what = f"latents of shape {file.shape} give {width} x {height} px"
        raise InputError(f"{path}: {what}", f"sides of {MIN_SIDE} to {MAX_SIDE} px can be drawn")
    asked = _asked_size(spec, (width, height))
    if asked != (width, height):
        what = f"--latents {path}: gives {width} x {height} px, asked for are {asked[0]} x {asked[1]}"
        raise UsageError(what, "leave the size out")
    if file.metadata.get("mode") in latent_files.PICTURES:
        note = f"{path}: holds a picture, not noise: what is drawn from it will look like neither"
        warnings.warn(note, SdcliWarning, stacklevel=2)
    return width, height


def warn_of_latents(path: Path, settings: dict[str, object], scheduler: Scheduler, config: dict[str, Any]) -> None:
    """Warn of a latent file from which these settings will not draw what it was made for."""
    usual = {"eta": 0, "timestep_spacing": "leading"} | config  # diffusers' defaults for DDIM, which inverts
    chosen = {key: value for key, value in scheduler.choices.items() if value != usual.get(key)}
    clip_skip, prediction = settings["clip_skip"], settings["prediction"]
    settings = {key: settings[key] for key in ("scheduler", "steps", "guidance")} | chosen
    file = latent_files.look(path)
    if clip_skip or "clip_skip" in file.metadata:
        settings["clip_skip"] = clip_skip
    if "prediction" in file.metadata:
        settings["prediction"] = prediction
    note = latent_files.doubt(file, settings, train_timesteps(config) - 1)
    if note is not None:
        warnings.warn(note, SdcliWarning, stacklevel=3)


def warn_of_other_loras(path: Path, loras: Sequence[LoraFile]) -> None:
    """Warn of the noise of an inversion that was made with other LoRAs than the picture is to be drawn with."""
    said = latent_files.look(path).metadata
    try:
        made = [[one["sha256"], one["scale"]] for one in json.loads(said.get("loras", "[]"))]
    except (ValueError, KeyError, TypeError, RecursionError):  # no file of ours
        made = []
    if said.get("mode") == "invert" and made != [content(one) for one in loras]:
        note = f"{path}: is the noise of an inversion with other LoRAs (--lora); with these it draws another picture"
        warnings.warn(note, SdcliWarning, stacklevel=3)


def _asked_size(spec: GenerateSpec, own: tuple[int, int]) -> tuple[int, int]:
    """Width and height in px as asked for, what was not asked for as it is."""
    if spec.size is not None:
        return parse_size(spec.size)
    return spec.width if spec.width is not None else own[0], spec.height if spec.height is not None else own[1]
