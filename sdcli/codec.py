"""STORY: pictures <-> latent files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdcli import store
from sdcli.errors import InputError, NumericalError, SdcliWarning
from sdcli.files import open_regular, place
from sdcli.pipeline import images, sampling, vae
from sdcli.pipeline.bundle import load_vae
from sdcli.pipeline.device import pick_device, pick_dtype
from sdcli.pipeline.metadata import png_bytes
from sdcli.specs import CodecSpec, parse_size

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

LATENTS_SUFFIX = ".latents.safetensors"
KEY = "latents"
MAX_LATENTS_BYTES = 1 << 30


@dataclass(frozen=True)
class CodecRecord:
    """One file made from another."""

    path: Path
    facts: dict[str, Any]


def encode(spec: CodecSpec) -> Iterator[CodecRecord]:
    """Pictures -> latent files: the posterior's mean, or with `sample` a draw from it.

    A latent file is safetensors with `latents` (1, C, h, w) float32 and, as metadata, model, scaling_factor,
    height and width in px, mode and seed. Every picture is read once before the first is encoded.
    Raises InputError for what is no picture, OutputError when a file cannot be written.
    """
    sources = _sources(spec, images.SUFFIXES)
    for source in sources:
        images.load_image(source)
    model = store.resolve(spec.model, offline=spec.offline)
    coder = _load(spec, model)
    for source in sources:
        pixels = images.to_pixels(_sized(images.load_image(source), source, spec, vae.factor(coder)))
        chance = sampling.generators([spec.seed]) if spec.sample else None
        with torch.no_grad():
            latents = vae.encode(coder, pixels.to(coder.device, coder.dtype), chance).float().cpu()
        _refuse_non_finite(latents, source)
        facts = {
            "model": model.ref,
            "scaling_factor": float(coder.config["scaling_factor"]),
            "height": pixels.shape[-2],
            "width": pixels.shape[-1],
            "mode": "sample" if spec.sample else "mean",
            "seed": spec.seed if spec.sample else None,
        }
        data = save({KEY: latents.contiguous()}, {key: str(value) for key, value in facts.items()})
        path = place(data, _target(spec, source, LATENTS_SUFFIX, len(sources)), spec.if_exists)
        yield CodecRecord(path, {"path": str(path), "source": str(source), "shape": list(latents.shape), **facts})


def decode(spec: CodecSpec) -> Iterator[CodecRecord]:
    """Latent files -> PNG pictures.

    Raises InputError for a file that is no latent file or belongs to another model's VAE.
    """
    sources = _sources(spec, frozenset({".safetensors"}))
    model = store.resolve(spec.model, offline=spec.offline)
    coder = _load(spec, model)
    rows = [_read_latents(source, coder) for source in sources]
    for source, latents in zip(sources, rows, strict=True):
        with torch.no_grad():
            pixels = vae.decode(coder, latents.to(coder.device, coder.dtype))
        _refuse_non_finite(pixels, source)
        (image,) = images.to_images(pixels)
        path = place(png_bytes(image, None), _target(spec, source, ".png", len(sources)), spec.if_exists)
        facts = {"path": str(path), "source": str(source), "width": image.width, "height": image.height}
        yield CodecRecord(path, facts | {"model": model.ref})


def _sources(spec: CodecSpec, suffixes: frozenset[str]) -> list[Path]:
    """The files named, and those of the folders named. Raises InputError when there is none."""
    found: list[Path] = []
    for path in spec.inputs:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
            if not inside:
                raise InputError(f"{path}: holds no file to read", f"accepted are {', '.join(sorted(suffixes))}")
            found += inside
        else:
            open_regular(path).close()
            found.append(path)
    return found


def _target(spec: CodecSpec, source: Path, suffix: str, count: int) -> Path:
    """Where the result goes: the file named, or the source's stem in the folder named."""
    if count == 1 and spec.output.suffix in (".png", ".safetensors") and not spec.output.is_dir():
        return spec.output
    name = source.name.removesuffix(LATENTS_SUFFIX) if source.name.endswith(LATENTS_SUFFIX) else source.stem
    return spec.output / f"{name}{suffix}"


def _load(spec: CodecSpec, model: store.Model) -> AutoencoderKL:
    device = pick_device(spec.device)
    return load_vae(model.folder, device=device, dtype=pick_dtype(spec.dtype, device))


def _sized(image: Image.Image, source: Path, spec: CodecSpec, factor: int) -> Image.Image:
    """The picture at the size asked for, else cut at its edges to the next multiple of the VAE factor."""
    if spec.size is not None:
        return images.fit(image, *parse_size(spec.size))
    width, height = (side // factor * factor for side in image.size)
    if not width or not height:
        raise InputError(f"{source}: is {image.width} x {image.height} px", f"at least {factor} x {factor} are needed")
    if (width, height) != image.size:
        text = f"{source}: {image.width} x {image.height} px cut to {width} x {height}, multiples of {factor}"
        warnings.warn(text, SdcliWarning, stacklevel=2)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    return image


def _read_latents(path: Path, coder: AutoencoderKL) -> Tensor:
    open_regular(path, max_bytes=MAX_LATENTS_BYTES).close()
    try:
        with safe_open(path, framework="pt") as file:
            metadata, latents = file.metadata() or {}, file.get_tensor(KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: is no latent file ({error})", "make one with sdcli encode") from error
    channels = int(coder.config["latent_channels"])
    if latents.ndim != 4 or latents.shape[0] != 1 or latents.shape[1] != channels or not latents.is_floating_point():
        shape = tuple(latents.shape)
        raise InputError(f"{path}: latents of shape {shape}", f"this model needs (1, {channels}, h, w)")
    factor = float(coder.config["scaling_factor"])
    if "scaling_factor" in metadata and metadata["scaling_factor"] != str(factor):
        raise InputError(
            f"{path}: was encoded with scaling factor {metadata['scaling_factor']}, this model has {factor}",
            f"decode it with --model {metadata.get('model', 'REF')}",
        )
    _refuse_non_finite(latents, path)
    return cast("Tensor", latents)


def _refuse_non_finite(values: Tensor, source: Path) -> None:
    if not values.isfinite().all():
        raise NumericalError(f"{source}: gives values that are not finite", "try --dtype float32")
