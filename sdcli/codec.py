"""STORY: pictures <-> latent files, and what a picture keeps on the way there and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sdcli import latent_files, layout, schedulers, store
from sdcli.checks import parse_size
from sdcli.drawing import read_adapters
from sdcli.errors import NumericalError, SdcliWarning, UsageError
from sdcli.files import place
from sdcli.inputs import files_of, targets_of
from sdcli.lab.specs import RoundtripSpec
from sdcli.pipeline import features, images, measures, prompt, sampling, text, vae, vocabulary
from sdcli.pipeline.bundle import load_conditioner, load_unet, load_vae
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.context import Context
from sdcli.pipeline.contexts import Condition, contexts
from sdcli.pipeline.device import computing_device, computing_dtype, pick_device, pick_dtype
from sdcli.pipeline.inversion import invert
from sdcli.pipeline.lora import merged_conditioner, with_adapters
from sdcli.pipeline.metadata import picture_bytes
from sdcli.plan import DEFAULT_STEPS, own_settings, scheduler_config
from sdcli.plan.conditioning import Label, inverted_label
from sdcli.plan.lora_files import LoraFile, check_fit, lora_facts, lora_file
from sdcli.plan.naming import check_quality, is_output_folder, picture_format
from sdcli.plan.parts import check_clip_skip, check_multiple, parts_shape, prediction_word, vae_factor
from sdcli.plan.words import check_no_wildcards, check_text, warn_of_networks
from sdcli.specs import CodecSpec

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from sdcli.pipeline.bundle import Vae
    from sdcli.pipeline.features import Perceptual


@dataclass(frozen=True)
class CodecRecord:
    """One file made from another."""

    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where the inversion of all pictures stands, in steps."""

    done: int
    total: int


@dataclass(frozen=True)
class _Inversion:
    """How pictures are inverted, decided before any weights are read."""

    scheduler: schedulers.Scheduler
    scheduler_config: dict[str, Any]
    steps: int
    label: Label | None
    loras: tuple[LoraFile, ...]


def encode(spec: CodecSpec) -> Iterator[Progress | CodecRecord]:
    """Pictures -> latent files: the posterior's mean, or with `sample` a draw from it, or with `invert` the noise from
    which DDIM draws the mean again.

    The metadata of a draw has its seed, of noise what it was inverted with. Every picture is read once before the first
    is encoded.
    Raises InputError for what is no picture, OutputError when a file cannot be written.
    """
    sources = files_of(spec.inputs, images.SUFFIXES)
    targets = targets_of(sources, spec.output, latent_files.SUFFIX, spec.if_exists)
    needs = ("vae",) if spec.invert is None else store.PARTS_OF_A_WHOLE
    model = store.resolve(spec.model, offline=spec.offline, needs=needs)
    factor = _check_encoding(spec, model)
    inversion = _plan_inversion(spec, model) if spec.invert is not None else None
    _read_all(sources)
    coder = _load(spec, model)
    network = _load_network(spec, inversion, model) if inversion is not None else None
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if spec.if_exists == "skip" and target.exists():
            yield _skipped(source, target)
            continue
        pixels = images.to_pixels(_sized(images.load_image(source), source, spec, factor))
        latents = _encoded(coder, pixels, source, spec)
        if inversion is not None and network is not None:
            size = pixels.shape[-1], pixels.shape[-2]
            for step in _invert(latents, spec, inversion, network, size=size):
                latents = step.latents.cpu()
                yield Progress(number * step.total + step.index, len(sources) * step.total)
        facts = {
            "model": model.ref,
            "scaling_factor": float(coder.config["scaling_factor"]),
            "height": pixels.shape[-2],
            "width": pixels.shape[-1],
            "mode": "sample" if spec.sample else "mean",
            "seed": spec.seed if spec.sample else None,
        }
        if inversion is not None:
            facts |= _inversion_facts(spec, inversion)
        path = place(latent_files.file_bytes(latents, facts), target, spec.if_exists, ending=latent_files.SUFFIX)
        yield CodecRecord(path, {"path": str(path), "source": str(source), "shape": list(latents.shape), **facts})


def decode(spec: CodecSpec) -> Iterator[CodecRecord]:
    """Latent files -> pictures. Every file is read once before the first is decoded.

    Raises InputError for a file that is no latent file or belongs to another model's VAE.
    """
    sources = files_of(spec.inputs, frozenset({".safetensors"}))
    many = is_output_folder(spec.output)
    form = picture_format(Path() if many else spec.output, spec.format)
    check_quality(form, spec.quality)
    targets = targets_of(sources, spec.output, f".{form}" if many else spec.output.suffix, spec.if_exists)
    model = store.resolve(spec.model, offline=spec.offline, needs=("vae",))
    coder = _load(spec, model)
    for source in sources:
        latent_files.read(source, coder.config)
    for source, target in zip(sources, targets, strict=True):
        if spec.if_exists == "skip" and target.exists():
            yield _skipped(source, target)
            continue
        latents = latent_files.read(source, coder.config)
        (image,) = images.to_images(vae.decode_finite(coder, latents))
        path = place(picture_bytes(image, None, form, spec.quality), target, spec.if_exists)
        facts = {"path": str(path), "source": str(source), "width": image.width, "height": image.height}
        yield CodecRecord(path, facts | {"model": model.ref})


def roundtrip(spec: RoundtripSpec) -> Iterator[CodecRecord]:
    """Pictures -> what the VAE gives back of them: how near it is and how small the latents are, in figures.

    With an output each picture is written, too, its reconstruction to the right. Compared is what a file would hold, at
    8 bits a channel. Every picture is read once before the first is encoded. Errors as `encode`.
    """
    sources = files_of(spec.inputs, images.SUFFIXES)
    targets = _pair_targets(spec, sources)
    model = store.resolve(spec.model, offline=spec.offline)
    factor = _check_encoding(spec, model)
    _read_all(sources)
    coder, judge = _load(spec, model), features.perceptual()
    for source, target in zip(sources, targets, strict=True):
        if target is not None and spec.if_exists == "skip" and target.exists():
            yield _skipped(source, target)
            continue
        image = _sized(images.load_image(source), source, spec, factor)
        pixels = images.to_pixels(image)
        latents = _encoded(coder, pixels, source, spec)
        (back,) = images.to_images(vae.decode_finite(coder, latents))
        facts = {
            "source": str(source),
            "model": model.ref,
            "width": image.width,
            "height": image.height,
            "mode": "sample" if spec.sample else "mean",
            **({"seed": spec.seed} if spec.sample else {}),
            **_nearness(pixels, images.to_pixels(back), judge),
            **_sizes(pixels, latents),
        }
        if target is not None:
            form = picture_format(target, None)
            path = place(picture_bytes(_side_by_side(image, back), None, form), target, spec.if_exists)
            facts = {"path": str(path), **facts}
        yield CodecRecord(source, facts)


def _nearness(pixels: Tensor, back: Tensor, judge: Perceptual) -> dict[str, Any]:
    """How near a reconstruction (1, 3, H, W) is; no perceptual distance of pictures that are too small for one."""
    facts: dict[str, Any] = {"psnr": round(measures.psnr(pixels, back).item(), 2)}
    facts["ssim"] = round(measures.ssim(pixels, back).item(), 4)
    if min(pixels.shape[-2:]) >= judge.least_side:
        with torch.no_grad():
            facts |= {"perceptual": round(judge(pixels, back).item(), 4), "network": judge.name}
    return facts


def _sizes(pixels: Tensor, latents: Tensor) -> dict[str, Any]:
    """What a picture takes at 8 bits a channel and its latents in float32, as in a latent file, without any packing."""
    before, after = pixels.numel(), latents.numel() * 4
    return {
        "pixels": {"shape": list(pixels.shape[1:]), "bytes": before},
        "latents": {"shape": list(latents.shape[1:]), "bytes": after},
        "ratio": round(before / after, 3),
    }


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    pair = Image.new("RGB", (left.width + right.width, left.height))
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width, 0))
    return pair


def _pair_targets(spec: RoundtripSpec, sources: list[Path]) -> list[Path] | list[None]:
    """Where each pair goes; None where only figures are asked for. Errors as `targets_of`."""
    if spec.output is None:
        return [None] * len(sources)
    form = picture_format(Path() if is_output_folder(spec.output) else spec.output, None)
    suffix = f".{form}" if is_output_folder(spec.output) else spec.output.suffix
    return targets_of(sources, spec.output, suffix, spec.if_exists)


def _plan_inversion(spec: CodecSpec, model: store.Model) -> _Inversion:
    """Raises UsageError for what the model cannot do, InputError for a model whose parts do not fit together."""
    for option, words in (("--invert", spec.invert or ""), ("--negative", spec.negative)):
        check_text(words)
        check_no_wildcards(words, option)
        prompt.check(words)
    warn_of_networks(prompt.networks(spec.invert or "", spec.negative))
    loras = tuple(lora_file(text) for text in spec.lora)
    label = inverted_label(spec, layout.classes(model.folder))
    check_clip_skip(model.folder, spec.clip_skip)
    config = scheduler_config(model, spec.prediction)
    parts_shape(model.folder, config)
    check_fit(loras, model.folder)
    steps = spec.steps if spec.steps is not None else int(own_settings(model).get("steps", DEFAULT_STEPS))
    scheduler = schedulers.find("ddim")
    schedulers.check_steps(scheduler, steps, config)
    return _Inversion(scheduler, config, steps, label, loras)


@dataclass(frozen=True)
class _Network:
    """The UNet, and what it is told of the one picture."""

    unet: UNet2DConditionModel
    context: Context
    negative: Context | None


def _load_network(spec: CodecSpec, inversion: _Inversion, model: store.Model) -> _Network:
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    adapters = read_adapters(inversion.loras, model.folder)
    conditioner = merged_conditioner(load_conditioner(model.folder, device=device, dtype=dtype), adapters)
    if isinstance(conditioner, ClassEmbedder):
        shown: Condition = inversion.label.index if inversion.label is not None else conditioner.null
        away: Condition = conditioner.null
    else:
        conditioner = text.without_last_layers(conditioner, spec.clip_skip)
        shown, away = spec.invert or "", spec.negative
        vocabulary.warn_of_cut(text.read(conditioner, shown), "prompt of --invert")
    context, negative = contexts(conditioner, [shown], away if spec.guidance > 1 else None)
    unet = with_adapters(load_unet(model.folder, device=device, dtype=dtype), "unet", adapters)
    return _Network(unet, context, negative)


def _invert(
    latents: Tensor, spec: CodecSpec, inversion: _Inversion, network: _Network, *, size: tuple[int, int]
) -> Iterator[sampling.Step]:
    """size: width and height of the picture in px."""
    device = str(network.unet.device)
    solver = schedulers.create(inversion.scheduler, inversion.scheduler_config, inversion.steps, device=device)
    negative = network.negative.of_size(*size) if network.negative is not None else None
    context = network.context.of_size(*size)
    return invert(network.unet, solver, latents, context, negative=negative, guidance=spec.guidance)


def _inversion_facts(spec: CodecSpec, inversion: _Inversion) -> dict[str, Any]:
    shown: dict[str, Any] = {"prompt": spec.invert} if inversion.label is None else {"class": inversion.label.name}
    if spec.guidance > 1 and inversion.label is None:
        shown["negative"] = spec.negative
    how: dict[str, Any] = {"clip_skip": spec.clip_skip} if spec.clip_skip else {}
    how |= {"mode": "invert", "scheduler": inversion.scheduler.name, "steps": inversion.steps}
    how |= {"prediction": prediction_word(inversion.scheduler_config)}
    if inversion.loras:
        shown["loras"] = lora_facts(inversion.loras)
    return {**how, "guidance": spec.guidance, **shown}


def _check_encoding(spec: CodecSpec | RoundtripSpec, model: store.Model) -> int:
    """The VAE's factor, pixels per latent along a side. Raises UsageError for options that do not fit the model."""
    factor = vae_factor(model.folder)
    if spec.sample and layout.config(model.folder, "vae").get("_class_name") == "VQModel":
        raise UsageError("--sample: this model's VAE has a codebook and no posterior to draw from", "leave it out")
    if spec.size is not None:
        check_multiple(parse_size(spec.size), factor)
    return factor


def _read_all(sources: list[Path]) -> None:
    """Read every picture once, so that a bad one is told of before the first is encoded. Raises InputError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdcliWarning)  # told when the picture is encoded
        for source in sources:
            images.load_image(source)


def _encoded(coder: Vae, pixels: Tensor, source: Path, spec: CodecSpec | RoundtripSpec) -> Tensor:
    """Latents (1, C, h, w) in float32 of a picture (1, 3, H, W): the posterior's mean, or with `sample` a draw."""
    chance = sampling.generators([spec.seed]) if spec.sample else None
    with torch.no_grad():
        latents = vae.encode(coder, pixels.to(computing_device(coder), computing_dtype(coder)), chance).float().cpu()
    if not latents.isfinite().all():
        raise NumericalError(f"{source}: gives values that are not finite", "try --dtype float32")
    return latents


def _skipped(source: Path, target: Path) -> CodecRecord:
    return CodecRecord(target, {"path": str(target), "source": str(source), "skipped": True})


def _load(spec: CodecSpec | RoundtripSpec, model: store.Model) -> Vae:
    device = pick_device(spec.device)
    coder = load_vae(model.folder, device=device, dtype=pick_dtype(spec.dtype, device), is_lean=True)
    return vae.tiled(coder) if isinstance(spec, CodecSpec) and spec.tiling else coder


def _sized(image: Image.Image, source: Path, spec: CodecSpec | RoundtripSpec, factor: int) -> Image.Image:
    """The picture at the size asked for, else cut at its edges to the next multiple of the VAE factor."""
    return images.fit(image, *parse_size(spec.size)) if spec.size is not None else images.cut(image, factor, source)
