"""A whole model -> the tensors of one file in its authors' naming, as every program reads it. The way back: weights.py.

Source of the names: sdcli/original/names.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdcli import layout
from sdcli.errors import InputError
from sdcli.original import names
from sdcli.original.checkpoint import CLIP_PAD, CONFIGS, OPEN_CLIP_PAD, SECOND
from sdcli.original.names import (
    CLIP,
    CLIP_XL,
    FUSED,
    OPEN_CLIP,
    OPEN_CLIP_XL,
    PROJECTION,
    TEXT_PREFIX,
    UNET,
    VAE,
    Names,
    UnetShape,
)
from sdcli.original.parts import DROPPED_LAYER
from sdcli.pipeline.vocabulary import load_tokenizer
from sdcli.pipeline.weights import State

Config = dict[str, Any]

ATTENTION = ".mid.attn_1."  # of the VAE, whose matrices are 1 x 1 convolutions there
IMPLEMENTATION = "https://github.com/CompVis/latent-diffusion"


def original_state(configs: Mapping[str, Config], states: Mapping[str, State]) -> State:
    """The tensors of a model under its authors' names; what is one there and several here is joined.

    configs: of the parts and the scheduler.
    Of 24 layers Stable Diffusion 2.x reads 23, and diffusers keeps those: the last is not written.
    Raises InputError for a part that the authors' code could not hold.
    """
    unet, vae = configs["unet"], configs["vae"]
    state = _renamed(states["unet"], names.inverse(names.unet_names(_unet_shape(unet))), UNET)
    if vae.get("_class_name") != "AutoencoderKL":
        raise InputError(f"vae: is a {vae.get('_class_name')!r}", "a single file holds an AutoencoderKL")
    levels = len(vae["block_out_channels"])
    for key, value in _renamed(
        states["vae"], names.inverse(names.vae_names(levels, vae["layers_per_block"])), VAE
    ).items():
        is_matrix = ATTENTION in key and value.dim() == 2
        state[key] = value[:, :, None, None] if is_matrix else value
    text, config = states["text_encoder"], configs["text_encoder"]
    if SECOND in states:
        state |= {f"{CLIP_XL}{TEXT_PREFIX}{key}": value for key, value in text.items()}
        return state | _second(states[SECOND], configs[SECOND]) | _marks(configs["scheduler"])
    if config.get("hidden_act") == "gelu":
        layers = int(config["num_hidden_layers"])
        if layers > DROPPED_LAYER:
            raise InputError(f"text_encoder: has {layers} layers", f"Stable Diffusion 2.x has {DROPPED_LAYER}")
        return state | _open_clip(text, layers, OPEN_CLIP)
    return state | {f"{CLIP}{TEXT_PREFIX}{key}": value for key, value in text.items()}


def metadata(configs: Mapping[str, Config], said: Mapping[str, Config], title: str) -> dict[str, str]:
    """What the header says besides the tensors: our configs, and what Stability's specification has words for.

    configs: of the parts and the scheduler; said: other files of the model, as `original.checkpoint` reads them.
    Source of the keys: github.com/Stability-AI/ModelSpec.
    """
    unet, kind = configs["unet"], configs["scheduler"].get("prediction_type", "epsilon")
    factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    side = int(unet.get("sample_size") or 64) * factor
    found = {"format": "pt", CONFIGS: json.dumps({**configs, **said}, sort_keys=True)}
    found |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title}
    found |= {"modelspec.implementation": IMPLEMENTATION, "modelspec.resolution": f"{side}x{side}"}
    if kind in ("epsilon", "v_prediction"):
        found["modelspec.prediction_type"] = "v" if kind == "v_prediction" else "epsilon"
    architecture = {768: "v1", 1024: "v2-768-v" if kind == "v_prediction" else "v2-512", 2048: "xl-v1-base"}
    width = unet.get("cross_attention_dim")
    if width in architecture and unet.get("in_channels") == 4 and next(iter(unet["block_out_channels"])) == 320:
        found["modelspec.architecture"] = f"stable-diffusion-{architecture[width]}"
    return found


def pad_token(place: Path, encoder: str) -> str:
    """What the tokenizer of a text encoder fills prompts with. Raises InputError for a tokenizer that is not CLIP's."""
    own = load_tokenizer(layout.tokenizer(place, encoder), encoder)
    if own.get_vocab() != load_tokenizer(layout.TOKENIZER_FOLDER).get_vocab():
        raise InputError(f"{place}: its tokenizer is not CLIP's", "a single file has no place for it; keep the folder")
    if own.pad_token not in (CLIP_PAD, OPEN_CLIP_PAD):
        hint = f"a single file's readers expect {CLIP_PAD} or {OPEN_CLIP_PAD}"
        raise InputError(f"{place}: its tokenizer pads with {own.pad_token!r}", hint)
    return str(own.pad_token)


def _unet_shape(config: Config) -> UnetShape:
    """Which blocks a UNet has. Raises InputError for blocks of other kinds than the authors' code has."""
    kinds, layers = list(config["down_block_types"]), config["layers_per_block"]
    attends = tuple(kind == "CrossAttnDownBlock2D" for kind in kinds)
    is_like = kinds == names.down_types(attends) and list(config["up_block_types"]) == names.up_types(attends)
    if not is_like or not isinstance(layers, int) or config.get("mid_block_type") != "UNetMidBlock2DCrossAttn":
        raise InputError("unet: its blocks are not those of the original code", "keep the folder")
    return UnetShape(layers, attends)


def _renamed(state: State, table: Names, prefix: str) -> State:
    found: State = {}
    for key, value in state.items():
        name = names.renamed(key, table)
        if name is None:
            raise InputError(f"{key}: has no place in a single file", "keep the folder")
        found[prefix + name] = value
    return found


def _second(state: State, config: Config) -> State:
    """The second text encoder of XL, all of its layers, and its projection turned as open_clip has it."""
    rest = {key.removeprefix(TEXT_PREFIX): value for key, value in state.items()}
    turned = rest.pop(f"{PROJECTION}.weight").T
    return _open_clip(rest, int(config["num_hidden_layers"]), OPEN_CLIP_XL) | {f"{OPEN_CLIP_XL}{PROJECTION}": turned}


def _marks(scheduler: Config) -> State:
    """Empty tensors by whose names readers of XL's files know what its UNet predicts, and how its noise ends."""
    if scheduler.get("prediction_type") != "v_prediction":
        return {}
    names = ("v_pred", "ztsnr") if scheduler.get("rescale_betas_zero_snr") is True else ("v_pred",)
    return {name: torch.zeros(0) for name in names}


def _open_clip(state: State, layers: int, prefix: str) -> State:
    """A text encoder in open_clip's naming, queries, keys and values in one."""
    table = names.inverse(names.open_clip_names(layers))
    rest = {key: value for key, value in state.items() if not any(f".{one}." in key for one in FUSED)}
    positions = rest.pop("embeddings.position_embedding.weight")
    found = _renamed(rest, table, prefix) | {f"{prefix}positional_embedding": positions}
    for layer in range(layers):
        for kind in ("weight", "bias"):
            thirds = [state[f"encoder.layers.{layer}.self_attn.{one}.{kind}"] for one in FUSED]
            found[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(thirds)
    return found
