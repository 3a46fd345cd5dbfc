"""STORY: pictures <-> latent files."""

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
from sdcli.conditioning import Label, inverted_label
from sdcli.errors import InputError, NumericalError, SdcliWarning, UsageError
from sdcli.files import is_folder, open_regular, place
from sdcli.naming import check_quality, check_targets, is_output_folder, picture_format
from sdcli.parts import check_clip_skip, check_multiple, parts_shape, vae_factor
from sdcli.pipeline import images, prompt, sampling, text, vae, vocabulary
from sdcli.pipeline.bundle import load_conditioner, load_unet, load_vae
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.contexts import Condition, contexts
from sdcli.pipeline.device import pick_device, pick_dtype
from sdcli.pipeline.inversion import invert
from sdcli.pipeline.metadata import picture_bytes
from sdcli.plan import DEFAULT_STEPS, check_no_wildcards, check_text, own_settings
from sdcli.specs import CodecSpec, parse_size

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from sdcli.pipeline.bundle import Vae


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


def encode(spec: CodecSpec) -> Iterator[Progress | CodecRecord]:
    """Pictures -> latent files: the posterior's mean, or with `sample` a draw from it, or with `invert` the noise from
    which DDIM draws the mean again.

    The metadata of a draw has its seed, of noise what it was inverted with. Every picture is read once before the first
    is encoded.
    Raises InputError for what is no picture, OutputError when a file cannot be written.
    """
    sources = _sources(spec, images.SUFFIXES)
    targets = _targets(spec, sources, latent_files.SUFFIX)
    needs = ("vae",) if spec.invert is None else store.PARTS_OF_A_WHOLE
    model = store.resolve(spec.model, offline=spec.offline, needs=needs)
    factor = vae_factor(model.folder)
    if spec.sample and layout.config(model.folder, "vae").get("_class_name") == "VQModel":
        raise UsageError("--sample: this model's VAE has a codebook and no posterior to draw from", "leave it out")
    if spec.size is not None:
        check_multiple(parse_size(spec.size), factor)
    inversion = _plan_inversion(spec, model) if spec.invert is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdcliWarning)  # told when the picture is encoded
        for source in sources:
            images.load_image(source)
    coder = _load(spec, model)
    network = _load_network(spec, inversion, model) if inversion is not None else None
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if spec.if_exists == "skip" and target.exists():
            yield _skipped(source, target)
            continue
        pixels = images.to_pixels(_sized(images.load_image(source), source, spec, factor))
        chance = sampling.generators([spec.seed]) if spec.sample else None
        with torch.no_grad():
            latents = vae.encode(coder, pixels.to(coder.device, coder.dtype), chance).float().cpu()
        _refuse_non_finite(latents, source)
        if inversion is not None and network is not None:
            for step in _invert(latents, spec, inversion, network):
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
    sources = _sources(spec, frozenset({".safetensors"}))
    many = is_output_folder(spec.output)
    form = picture_format(Path() if many else spec.output, spec.format)
    check_quality(form, spec.quality)
    targets = _targets(spec, sources, f".{form}" if many else spec.output.suffix)
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


def _plan_inversion(spec: CodecSpec, model: store.Model) -> _Inversion:
    """Raises UsageError for what the model cannot do, InputError for a model whose parts do not fit together."""
    for option, words in (("--invert", spec.invert or ""), ("--negative", spec.negative)):
        check_text(words)
        check_no_wildcards(words, option)
        prompt.check(words)
    label = inverted_label(spec, layout.classes(model.folder))
    check_clip_skip(model.folder, spec.clip_skip)
    config = layout.config(model.folder, "scheduler")
    parts_shape(model.folder, config)
    steps = spec.steps if spec.steps is not None else int(own_settings(model).get("steps", DEFAULT_STEPS))
    scheduler = schedulers.find("ddim")
    schedulers.check_steps(scheduler, steps, config)
    return _Inversion(scheduler, config, steps, label)


@dataclass(frozen=True)
class _Network:
    """The UNet, and what it is told: (1, 77 k, D), or (1, 1, D) of a class."""

    unet: UNet2DConditionModel
    context: Tensor
    negative: Tensor | None


def _load_network(spec: CodecSpec, inversion: _Inversion, model: store.Model) -> _Network:
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    conditioner = load_conditioner(model.folder, device=device, dtype=dtype)
    if isinstance(conditioner, ClassEmbedder):
        shown: Condition = inversion.label.index if inversion.label is not None else conditioner.null
        away: Condition = conditioner.null
    else:
        conditioner = text.without_last_layers(conditioner, spec.clip_skip)
        shown, away = spec.invert or "", spec.negative
        vocabulary.warn_of_cut(text.read(conditioner, shown), "prompt of --invert")
    context, negative = contexts(conditioner, [shown], away if spec.guidance > 1 else None)
    unet = load_unet(model.folder, device=device, dtype=dtype)
    return _Network(unet, context, negative)


def _invert(latents: Tensor, spec: CodecSpec, inversion: _Inversion, network: _Network) -> Iterator[sampling.Step]:
    device = str(network.unet.device)
    solver = schedulers.create(inversion.scheduler, inversion.scheduler_config, inversion.steps, device=device)
    told: dict[str, Any] = {"negative": network.negative, "guidance": spec.guidance}
    return invert(network.unet, solver, latents, network.context, **told)


def _inversion_facts(spec: CodecSpec, inversion: _Inversion) -> dict[str, Any]:
    shown = {"prompt": spec.invert} if inversion.label is None else {"class": inversion.label.name}
    if spec.guidance > 1 and inversion.label is None:
        shown["negative"] = spec.negative
    how: dict[str, Any] = {"clip_skip": spec.clip_skip} if spec.clip_skip else {}
    how |= {"mode": "invert", "scheduler": inversion.scheduler.name, "steps": inversion.steps}
    return {**how, "guidance": spec.guidance, **shown}


def _sources(spec: CodecSpec, suffixes: frozenset[str]) -> list[Path]:
    """The files named, and those of the folders named. Raises InputError when there is none."""
    found: list[Path] = []
    for path in spec.inputs:
        if is_folder(path):
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
            if not inside:
                raise InputError(f"{path}: holds no file to read", f"accepted are {', '.join(sorted(suffixes))}")
            found += inside
        else:
            open_regular(path).close()
            found.append(path)
    return found


def _targets(spec: CodecSpec, sources: list[Path], suffix: str) -> list[Path]:
    """Where each result goes: the file named, or the source's stem in the folder named.

    Raises UsageError when that is no place for them all, OutputError when it cannot be written.
    """
    ending = "." + suffix.rpartition(".")[2]
    many = is_output_folder(spec.output)
    if not many and spec.output.suffix.lower() != ending.lower():
        raise UsageError(f"--output {spec.output}: the result is a {ending} file", f"name a {ending} file or a folder")
    if not many and len(sources) > 1:
        raise UsageError(f"--output {spec.output}: is one file for {len(sources)} results", "name a folder")
    targets = [spec.output / f"{_stem(source)}{suffix}" for source in sources] if many else [spec.output]
    if spec.if_exists != "number" and len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise UsageError(f"{twice}: would be the result of two inputs", "use --if-exists number, or one at a time")
    check_targets(targets, spec.if_exists)
    return targets


def _stem(source: Path) -> str:
    return source.name.removesuffix(latent_files.SUFFIX) if source.name.endswith(latent_files.SUFFIX) else source.stem


def _skipped(source: Path, target: Path) -> CodecRecord:
    return CodecRecord(target, {"path": str(target), "source": str(source), "skipped": True})


def _load(spec: CodecSpec, model: store.Model) -> Vae:
    device = pick_device(spec.device)
    return load_vae(model.folder, device=device, dtype=pick_dtype(spec.dtype, device))


def _sized(image: Image.Image, source: Path, spec: CodecSpec, factor: int) -> Image.Image:
    """The picture at the size asked for, else cut at its edges to the next multiple of the VAE factor."""
    return images.fit(image, *parse_size(spec.size)) if spec.size is not None else images.cut(image, factor, source)


def _refuse_non_finite(values: Tensor, source: Path) -> None:
    if not values.isfinite().all():
        raise NumericalError(f"{source}: gives values that are not finite", "try --dtype float32")
