"""The parts of a model as their configs describe them, before weights are read: whether they fit, and their sizes."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcli import layout
from sdcli.checks import MAX_SIDE, PREDICTIONS
from sdcli.errors import InputError, UsageError
from sdcli.original.checkpoint import REFINER_HINT, SDXL_REFINER, XL_SIZES
from sdcli.pipeline.part_configs import checked
from sdcli.schedulers.config import has_learned_variance, prediction_type

MAX_LEVELS = 8  # of a VAE: Stable Diffusion's have 4
DEFAULT_SAMPLE_SIZE = 64  # of Stable Diffusion 1.x, in latents
# Further inputs of the UNet, which Stable Diffusion does without: class labels, other encoders, distilled guidance.
UNSUPPORTED_UNET_KEYS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim")


def parts_shape(folder: Path, scheduler: Mapping[str, object], *, may_read_mask: bool = False) -> tuple[int, int]:
    """The VAE factor and the native side in px.

    scheduler: its config, which says what the UNet is taken to predict.
    may_read_mask: whether the UNet may be one for inpainting.
    Raises InputError unless the parts of the model fit together.
    """
    said = prediction_type(scheduler)
    configs = {part: layout.config(folder, part, said) for part in layout.parts(folder)}
    if layout.ENCODERS[1] in configs:
        layout.is_empty_zero(folder)  # what is drawn hangs on it
    return configs_shape(folder, configs, scheduler, may_read_mask=may_read_mask)


def configs_shape(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, object], *, may_read_mask: bool
) -> tuple[int, int]:
    """The same of a model by the configs of its parts. folder: what errors call it."""
    vae, unet = configs["vae"], configs["unet"]
    for part in (part for part in layout.PARTS if part in configs):
        checked(layout.PARTS[part][0], configs[part])
    for key in UNSUPPORTED_UNET_KEYS:
        if unet.get(key) is not None:
            raise InputError(f"{folder}/unet: is conditioned by {key}", "use a Stable Diffusion 1.x, 2.x or XL model")
    is_for_inpainting = may_read_mask and _reads_mask(vae, unet)
    _check_channels(folder, vae.get("latent_channels", 4), unet, scheduler, reads_mask=is_for_inpainting)
    _check_further(folder, configs)
    # 1280 is the default of diffusers, which does not write what equals it.
    wanted, given = unet.get("cross_attention_dim", 1280), _context_width(folder, configs)
    if wanted != given:
        (conditioner,) = (part for part in layout.CONDITIONERS if part in configs)
        giver = f"{conditioner.replace('_', ' ')} gives" if layout.ENCODERS[1] not in configs else "text encoders give"
        what = f"reads context of width {reprlib.repr(wanted)}, the {giver} {reprlib.repr(given)}"
        raise InputError(f"{folder}/unet: {what}", "its parts belong to different models")
    factor, side = _factor(folder, vae), unet.get("sample_size") or DEFAULT_SAMPLE_SIZE
    if type(side) is not int or not 1 <= side * factor <= MAX_SIDE:
        what = f"{folder}/unet: sample_size is {reprlib.repr(side)}"
        raise InputError(what, f"expected is an integer that gives pictures of up to {MAX_SIDE:,} px")
    return factor, side * factor


def prediction_word(scheduler: Mapping[str, object]) -> str:
    """What the UNet predicts by the scheduler's config, in the words of `--prediction`."""
    return {said: word for word, said in PREDICTIONS.items()}[prediction_type(scheduler)]


def reads_mask(folder: Path) -> bool:
    """Whether the UNet is for inpainting: it reads a mask and the masked picture's latents in channels of their own."""
    return _reads_mask(layout.config(folder, "vae"), layout.config(folder, "unet"))


def vae_factor(folder: Path) -> int:
    """Pixels per latent along a side, from the config of a model's VAE. Raises InputError."""
    return _factor(folder, layout.config(folder, "vae"))


def text_widths(folder: Path) -> tuple[int, int | None]:
    """Numbers in a vector of a model's text encoder and of its second one, if any, from the configs.

    Raises InputError.
    """
    first, *others = (_text_width(folder, layout.config(folder, part), part) for part in layout.encoders(folder))
    return first, others[0] if others else None


def check_clip_skip(folder: Path, skip: int) -> None:
    """Raise UsageError for as many layers to leave out as a model's text encoder has, or where it has none."""
    if skip == 0:
        return
    encoders = layout.encoders(folder)
    if not encoders:
        raise UsageError(f"--clip-skip {skip}: this model reads no prompts", "leave it out, or name another model")
    # 12 is the default of transformers, which does not write what equals it.
    counts = {encoder: layout.config(folder, encoder).get("num_hidden_layers", 12) for encoder in encoders}
    for encoder, layers in counts.items():
        if type(layers) is not int or layers < len(encoders):  # of Stable Diffusion XL the last one is never read
            raise InputError(f"{folder}/{encoder}: num_hidden_layers is {reprlib.repr(layers)}", "mend its config.json")
    layers = min(counts.values())
    most = layers - len(encoders)
    if skip > most:
        whose = "text encoder has" if len(encoders) == 1 else "smaller text encoder has"
        raise UsageError(f"--clip-skip {skip}: this model's {whose} {layers} layers", f"it must lie in 0..{most}")


def check_multiple(size: tuple[int, int], factor: int) -> None:
    """Raise UsageError unless width and height in px are multiples of the VAE factor."""
    for name, value in zip(("width", "height"), size, strict=True):
        if value % factor:
            below = max(factor, value // factor * factor)
            what = f"{name} {value} px: is no multiple of {factor}, which this model needs"
            raise UsageError(what, f"use {below} or {below + factor}")


def _reads_mask(vae: Mapping[str, Any], unet: Mapping[str, Any]) -> bool:
    channels = vae.get("latent_channels", 4)
    return type(channels) is int and unet.get("in_channels", 4) == 2 * channels + 1


def _factor(folder: Path, vae: Mapping[str, Any]) -> int:
    levels = vae.get("block_out_channels")
    if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= MAX_LEVELS:
        raise InputError(
            f"{folder}/vae: block_out_channels is {reprlib.repr(levels)}", f"expected are up to {MAX_LEVELS} numbers"
        )
    return int(2 ** (len(levels) - 1))


def _context_width(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> object:
    """What the UNet is to read: the width of the text encoder, of both together, or of the class embedder."""
    if "class_embedder" in configs:
        return configs["class_embedder"].get("width")
    return sum(_text_width(folder, configs[part], part) for part in layout.ENCODERS if part in configs)


def _check_further(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError unless the UNet reads nothing besides the context, or what Stable Diffusion XL tells it."""
    unet, second = configs["unet"], configs.get(layout.ENCODERS[1])
    kind = unet.get("addition_embed_type")
    if second is None and kind is None:
        return
    if second is None or kind != layout.XL_EMBEDDING:
        has = "two text encoders" if second is not None else "one text encoder"
        what = f"{folder}/unet: addition_embed_type is {reprlib.repr(kind)}, of a model with {has}"
        raise InputError(what, "use a Stable Diffusion 1.x, 2.x or XL model")
    # 512 is the default of transformers, which does not write what equals it.
    pooled, of_size = second.get("projection_dim", 512), unet.get("addition_time_embed_dim")
    read = unet.get("projection_class_embeddings_input_dim")
    if type(pooled) is not int or type(of_size) is not int or of_size < 1 or type(read) is not int:
        shown, of_size_shown = reprlib.repr(read), reprlib.repr(of_size)
        what = f"projection_class_embeddings_input_dim is {shown} and addition_time_embed_dim {of_size_shown}"
        raise InputError(f"{folder}/unet: {what}", "mend the configs of its unet and text_encoder_2")
    if read == (XL_SIZES - 1) * of_size + pooled:
        raise InputError(f"{folder}: is a {SDXL_REFINER}", REFINER_HINT)
    if read != XL_SIZES * of_size + pooled:
        what = f"is told of {read} numbers, the text encoder gives {pooled} and the sizes {XL_SIZES} x {of_size}"
        raise InputError(f"{folder}/unet: {what}", "its parts belong to different models")


def _text_width(folder: Path, config: Mapping[str, Any], part: str = "text_encoder") -> int:
    # 512 is the default of transformers, which does not write what equals it.
    width = config.get("hidden_size", 512)
    if type(width) is not int:
        raise InputError(f"{folder}/{part}: hidden_size is {reprlib.repr(width)}", "mend its config.json")
    return width


def _check_channels(
    folder: Path, channels: object, unet: Mapping[str, Any], scheduler: Mapping[str, object], *, reads_mask: bool
) -> None:
    """Raise InputError unless the UNet reads the VAE's channels, and predicts as many, or twice if variances too.

    reads_mask: whether it reads a mask and as many channels again.
    """
    if type(channels) is not int:
        raise InputError(f"{folder}/vae: latent_channels is {reprlib.repr(channels)}", "mend its config.json")
    given, predicted = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if given != (2 * channels + 1 if reads_mask else channels):
        is_other = given == 2 * channels + 1
        hint = "an inpainting model can but generate, with --mask" if is_other else "mend its config.json"
        raise InputError(f"{folder}/unet: in_channels is {reprlib.repr(given)}, the VAE has {channels} channels", hint)
    expected = 2 * channels if has_learned_variance(scheduler) else channels
    if predicted != expected:
        hint = f"the VAE has {channels} channels; a learned variance_type asks for twice as many"
        raise InputError(f"{folder}/unet: out_channels is {reprlib.repr(predicted)}, expected are {expected}", hint)
