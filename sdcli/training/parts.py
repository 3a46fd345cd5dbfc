"""The parts of a model that a run trains or stands on: those of a model, or fresh ones by a preset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator

from sdcli import layout, store
from sdcli.errors import InputError, UsageError
from sdcli.layout import read_json
from sdcli.pipeline import known_words, noise
from sdcli.pipeline.bundle import (
    Conditioner,
    Config,
    ModelBundle,
    TextEncoder,
    TextPair,
    build,
    load_bundle,
    load_vae,
)
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.vae import is_vq
from sdcli.pipeline.vocabulary import load_tokenizer
from sdcli.schedulers.config import check_config, has_zero_terminal_snr, prediction_type
from sdcli.train_specs import TrainSpec, TrainUnetSpec, TrainVaeSpec
from sdcli.training import caches, conditions, data
from sdcli.training.loop import Preparing

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    from sdcli.pipeline.bundle import Vae

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
PRESETS = Path(__file__).with_name("presets")
VQ_KEYS = {  # what the configs of AutoencoderKL and VQModel share
    *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
    *("act_fn", "latent_channels", "sample_size", "norm_num_groups", "scaling_factor", "mid_block_add_attention"),
}


@dataclass(frozen=True)
class ModelParts:
    """All parts train-unet works with, and what its export inherits."""

    bundle: ModelBundle
    tokenizer: Path | None  # as `save_bundle` takes it; None without a text encoder
    settings: Config
    origin: str
    words: frozenset[str] | None = None  # that it saw so far; None where it does not say


@dataclass(frozen=True)
class VaePart:
    """The VAE a run trains or stands on."""

    model: Vae
    is_fresh: bool
    origin: str  # what it came from, for the run's identity


def preset(name: str) -> Config:
    """The configs of a model to be trained from scratch: a preset's, or those of a JSON file of the same form."""
    known = sorted(path.stem for path in PRESETS.glob("*.json"))
    path = PRESETS / f"{name}.json" if name in known else Path(name)
    if not path.is_file():
        raise UsageError(f"--init {name}: no such preset or file", f"use {', '.join(known)}, or a JSON file of configs")
    configs = read_json(path)
    parts = {name for name, config in configs.items() if isinstance(config, dict)}
    missing = {"vae", "unet", "text_encoder", "scheduler"} - parts
    if missing:
        raise InputError(f"{path}: has no {min(missing)!r}", f"write it as in the presets {', '.join(known)}")
    return configs


def vae(spec: TrainVaeSpec, device: torch.device) -> VaePart:
    """The VAE to train: fresh by `spec.init`, else the model's."""
    if spec.init is not None:
        configs = preset(spec.init)
        torch.manual_seed(spec.seed)
        model = cast("Vae", build(_with_codebook(configs["vae"], spec) if spec.regularizer == "vq" else configs["vae"]))
        return VaePart(model, is_fresh=True, origin=_origin(spec.init, configs))
    model = _named_vae(spec.model, device, spec.offline).requires_grad_(True)
    own = "vq" if is_vq(model) else "kl"
    if spec.regularizer not in (None, own):
        raise UsageError(
            f"--regularizer {spec.regularizer}: this model's VAE has {own}", "leave it out, or start afresh with --init"
        )
    return VaePart(model, is_fresh=False, origin=weights_hash(model))


def _with_codebook(config: Config, spec: TrainVaeSpec) -> Config:
    """The config of a VAE with a posterior, as that of one with a codebook and the same layers."""
    if not isinstance(config.get("latent_channels"), int):
        raise InputError("vae: latent_channels is no number", "mend the configs")
    kept = {key: value for key, value in config.items() if key in VQ_KEYS}
    codes = {"num_vq_embeddings": spec.codebook_size, "vq_embed_dim": config["latent_channels"]}
    return {"_class_name": "VQModel", **kept, **codes}


def model(spec: TrainUnetSpec, device: torch.device, dataset: data.Dataset) -> ModelParts:
    """All parts that train-unet needs: those of a model, or fresh ones by `spec.init` around the VAE named.

    Raises UsageError and InputError where the settings, the parts and the data cannot be trained together.
    """
    parts = _from_scratch(spec, device, dataset) if spec.init is not None else _from_model(spec, device)
    config = parts.bundle.scheduler_config
    own = dict(config)
    if spec.prediction is not None:
        config["prediction_type"] = PREDICTION_TYPES[spec.prediction]
    if spec.zero_terminal_snr:  # arXiv:2305.08891, sections 3.1 and 3.3
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if has_zero_terminal_snr(config) and prediction_type(config) == "epsilon":
        raise UsageError("--zero-terminal-snr: this model predicts epsilon", "use --prediction v")
    if spec.lora_rank is not None and _noising(config) != _noising(own):
        raise UsageError(
            "--lora-rank with another --prediction or --zero-terminal-snr than the model's: an adapter cannot carry it",
            "leave it out",
        )
    if spec.loss == "hybrid":
        config["variance_type"] = "learned_range"
        _with_variances(parts.bundle.unet)
    if isinstance(parts.bundle.conditioner, ClassEmbedder):
        if spec.train_text_encoder:
            raise UsageError("--train-text-encoder: this model has none", "leave it out")
        if parts.bundle.conditioner.names:
            conditions.check_classes(parts.bundle.conditioner.names, dataset.samples)
    else:
        data.check_captions(dataset)
    _check_fit(parts.bundle)
    return parts


def model_as_it_is(spec: TrainSpec, device: torch.device) -> ModelParts:
    """All parts of a model, none of them changed; InputError where they cannot be trained together."""
    found = _trainable(spec)
    bundle = load_bundle(found.folder, device=device, dtype=torch.float32)
    _check_fit(bundle)
    return ModelParts(bundle, None, store.settings(found), store.model_hash(found))


def condition(
    spec: TrainUnetSpec, bundle: ModelBundle, dataset: data.Dataset, cache: Path, accelerator: Accelerator
) -> Generator[Preparing, None, conditions.Condition]:
    """What the UNet is told of each sample; captions are encoded now where the text encoder stays as it is."""
    conditioner = single(bundle)
    if isinstance(conditioner, ClassEmbedder):
        accelerator.wait_for_everyone()
        return conditions.Classes(conditioner, spec.caption_dropout)
    conditioner.model.requires_grad_(spec.train_text_encoder)
    texts = conditions.Texts(conditioner, spec.caption_dropout, is_trained=spec.train_text_encoder)
    captions = conditions.captions(dataset.samples)
    conditions.warn_of_cut(conditioner, captions)
    is_cached = caches.context_bytes(conditioner, len(captions)) <= caches.MAX_CONTEXT_BYTES
    if is_cached and not spec.train_text_encoder and accelerator.is_main_process:
        yield from texts.cache(cache, captions, spec.batch_size)
    accelerator.wait_for_everyone()
    if is_cached and not spec.train_text_encoder:
        texts.use_cache(cache, captions)
    return texts


def single(bundle: ModelBundle) -> TextEncoder | ClassEmbedder:
    """What conditions a model that is trained: none of those has two text encoders."""
    assert not isinstance(bundle.conditioner, TextPair)
    return bundle.conditioner


def deepest(unet: UNet2DConditionModel) -> int:
    """Latents a UNet's innermost features stand for along a side: what its latents' sides are multiples of."""
    return int(2 ** (len(unet.config["block_out_channels"]) - 1))


def _check_fit(bundle: ModelBundle) -> None:
    """Raise InputError unless the parts can be trained together."""
    check_config(bundle.scheduler_config)
    noise.alpha_bars(bundle.scheduler_config)
    channels, unet = int(bundle.vae.config["latent_channels"]), bundle.unet.config
    outputs = (channels, 2 * channels) if "variance_type" in bundle.scheduler_config else (channels,)
    for key, expected in (("in_channels", (channels,)), ("out_channels", outputs)):
        if unet[key] not in expected:
            raise InputError(
                f"unet: {key} is {unet[key]}, the VAE has {channels} channels", "use another --vae or model"
            )
    conditioner, given = single(bundle), unet["cross_attention_dim"]
    if isinstance(conditioner, ClassEmbedder):
        width = conditioner.embedding.embedding_dim
    else:
        width = int(conditioner.model.config.hidden_size)
        pieces, known = len(conditioner.tokenizer), int(conditioner.model.config.vocab_size)
        if pieces > known:
            raise InputError(f"text_encoder: knows {known:,} tokens, the tokenizer has {pieces:,}", "mend the configs")
    if width != given:
        raise InputError(f"unet: reads context of width {given}, the conditioner gives {width}", "mend the configs")


def _trainable(spec: TrainSpec) -> store.Model:
    """The model of a spec. Raises InputError for one of Stable Diffusion XL."""
    found = store.resolve(spec.model, offline=spec.offline)
    if layout.encoders(found.folder) == layout.ENCODERS:
        what = f"{found.ref}: is a Stable Diffusion XL, of which the VAE alone can be trained"
        raise InputError(what, "name a model of Stable Diffusion 1.x or 2.x")
    return found


def _from_model(spec: TrainUnetSpec, device: torch.device) -> ModelParts:
    found = _trainable(spec)
    bundle = load_bundle(found.folder, device=device, dtype=torch.float32)
    own = _kind(single(bundle))
    if spec.condition not in (None, own):
        raise UsageError(f"--condition {spec.condition}: this model's is {own}", "leave it out, or use --init")
    origin = store.model_hash(found)
    if spec.vae is not None:
        bundle = replace(bundle, vae=_named_vae(spec.vae, device, spec.offline))
        origin += weights_hash(bundle.vae)
    tokenizer = layout.tokenizer(found.folder) if own == "text" else None
    return ModelParts(bundle, tokenizer, store.settings(found), origin, known_words.read(found.folder))


def _from_scratch(spec: TrainUnetSpec, device: torch.device, dataset: data.Dataset) -> ModelParts:
    assert spec.init is not None and spec.vae is not None  # TrainUnetSpec refuses one without the other
    configs = preset(spec.init)
    torch.manual_seed(spec.seed)
    unet = cast("UNet2DConditionModel", build(configs["unet"]).to(device))
    conditioner: Conditioner
    if spec.condition in (None, "text"):
        text_model = cast("CLIPTextModel", build(configs["text_encoder"]))
        torch.nn.Module.to(text_model, device)  # transformers wraps `to` in a way that loses its type
        conditioner = TextEncoder(load_tokenizer(layout.TOKENIZER_FOLDER), text_model)
    else:
        names = dataset.classes if spec.condition == "class" else ()
        if spec.condition == "class" and not names:
            raise InputError(f"{dataset.root}: has no classes", "sort the pictures into one folder a class")
        conditioner = ClassEmbedder(names, int(unet.config["cross_attention_dim"])).to(device)
    vae = _named_vae(spec.vae, device, spec.offline)
    bundle = ModelBundle(vae, unet, conditioner, configs["scheduler"], device, torch.float32)
    tokenizer = layout.TOKENIZER_FOLDER if isinstance(conditioner, TextEncoder) else None
    origin = f"{_origin(spec.init, configs)} {weights_hash(vae)}"
    return ModelParts(bundle, tokenizer, configs.get("settings", {}), origin, frozenset() if tokenizer else None)


def _noising(config: Config) -> tuple[str, bool]:
    return prediction_type(config), has_zero_terminal_snr(config)


def _kind(conditioner: TextEncoder | ClassEmbedder) -> str:
    """What `--condition` calls it."""
    if isinstance(conditioner, TextEncoder):
        return "text"
    return "class" if conditioner.names else "none"


def _with_variances(unet: UNet2DConditionModel) -> None:
    """Double a UNet's output channels, unless it has them: the second half, at first 0, is to tell the variance."""
    channels, old = int(unet.config["in_channels"]), unet.conv_out
    if old.out_channels != channels:
        return
    new = torch.nn.Conv2d(old.in_channels, 2 * channels, 3, padding=1).to(old.weight)  # as every UNet's last layer
    with torch.no_grad():
        for ours, theirs in ((new.weight, old.weight), (new.bias, old.bias)):
            assert ours is not None and theirs is not None
            ours.zero_()
            ours[:channels] = theirs
    unet.conv_out = new
    unet.register_to_config(out_channels=2 * channels)


def _named_vae(ref: str | None, device: torch.device, offline: bool) -> Vae:
    return load_vae(store.place_of(ref, "vae", offline=offline), device=device, dtype=torch.float32)


def _origin(init: str, configs: Config) -> str:
    """What a run from scratch came from: a preset by its name, a file of configs by what it says, too."""
    if (PRESETS / f"{init}.json").is_file():
        return init
    return f"{init} {hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()}"


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over a module's tensors, in hex."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
