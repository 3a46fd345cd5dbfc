"""Checkpoints in the naming of Stable Diffusion's authors, with random weights.

Names and shapes are written down in the order in which the authors' own constructors make their modules (UNetModel,
AutoencoderKL, and the text encoders of transformers and open_clip), without a look at our tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is of; the defaults are small."""

    version: int = 1  # 3 is XL
    channels: int = 32  # of the UNet's and the VAE's first level
    multiples: tuple[int, ...] = (1, 1, 2, 2)
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks behind each ResNet of a level
    context: int = 16
    text_layers: int = 2
    vocabulary: int = 49408
    in_channels: int = 4
    # Of XL alone: the second text encoder's width and layers, that of its projection, and of the embedding of a size.
    second: int = 0
    second_layers: int = 0
    projection: int = 0
    of_size: int = 0


SD1 = Kind()
SD2 = Kind(version=2, text_layers=24)
INPAINTING = Kind(in_channels=9)
REAL_SD1 = Kind(channels=320, multiples=(1, 2, 4, 4), context=768, text_layers=12)
REAL_SD2 = Kind(version=2, channels=320, multiples=(1, 2, 4, 4), context=1024, text_layers=24)
SDXL = Kind(3, 32, (1, 2, 2), (0, 1, 2), text_layers=4, second=24, second_layers=3, projection=20, of_size=8)
REAL_SDXL = Kind(3, 320, (1, 2, 4), (0, 2, 10), context=768, text_layers=12)
REAL_SDXL = replace(REAL_SDXL, second=1280, second_layers=32, projection=1280, of_size=256)
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."


def shapes(kind: Kind) -> Shapes:
    """Every tensor of a whole checkpoint that a model is drawn with."""
    found = {f"model.diffusion_model.{key}": shape for key, shape in unet(kind).items()}
    found |= {f"first_stage_model.{key}": shape for key, shape in vae(kind).items()}
    if kind.version == 3:
        found |= {CLIP_XL + key: shape for key, shape in clip(kind).items()}
        second = replace(kind, context=kind.second, text_layers=kind.second_layers)
        found |= {OPEN_CLIP_XL + key: shape for key, shape in open_clip(second).items()}
        return found | {f"{OPEN_CLIP_XL}text_projection": (kind.second, kind.projection)}
    prefix = "cond_stage_model.model." if kind.version == 2 else "cond_stage_model.transformer.text_model."
    return found | {prefix + key: shape for key, shape in (open_clip if kind.version == 2 else clip)(kind).items()}


def leftovers(kind: Kind) -> dict[str, Tensor]:
    """What the authors' files hold besides: schedules, positions, the projections of texts."""
    found = {"betas": torch.linspace(0, 1, 10, dtype=torch.float64), "alphas_cumprod": torch.linspace(1, 0, 10)}
    if kind.version == 3:
        found |= {"denoiser.sigmas": torch.linspace(0, 14, 1000), f"{OPEN_CLIP_XL}logit_scale": torch.tensor(4.6)}
        return found | {f"{CLIP_XL}embeddings.position_ids": torch.arange(77)[None]}
    if kind.version == 1:
        return found | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    return found | {
        "cond_stage_model.model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.model.text_projection": torch.zeros(kind.context, kind.context),
    }


def weights(kind: Kind = SD1, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """A whole checkpoint with random weights, mild enough to draw with."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes(kind).items():
        is_norm = len(shape) == 1 and key.endswith("weight")
        found[key] = (torch.randn(shape, generator=source) * 0.05 + float(is_norm)).to(dtype)
    return found | leftovers(kind)


def averages(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averages (EMA) that a trainer keeps beside the UNet's weights, of other values than these."""
    found = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    for key, value in whole.items():
        if key.startswith("model.diffusion_model."):
            found["model_ema." + key.removeprefix("model.").replace(".", "")] = value * 0.5
    return found


def write(path: Path, kind: Kind = SD1, *, metadata: dict[str, str] | None = None, **how: Any) -> Path:
    """Write such a checkpoint as safetensors."""
    save_file(weights(kind, **how), path, metadata=metadata)
    return path


def unet(kind: Kind) -> Shapes:
    """UNetModel of 2 ResNets a level, each with attention behind it where the level has any."""
    made: Shapes = {}
    first, widest = kind.channels, len(kind.multiples) - 1
    embedding = 4 * first
    if kind.version == 3:
        told = kind.projection + 6 * kind.of_size
        made |= _linear("label_emb.0.0", told, embedding) | _linear("label_emb.0.2", embedding, embedding)
    made |= _linear("time_embed.0", first, embedding) | _linear("time_embed.2", embedding, embedding)
    made |= _conv("input_blocks.0.0", kind.in_channels, first)
    widths, width, block = [first], first, 1
    for level, multiple in enumerate(kind.multiples):
        for _ in range(2):
            made |= _resnet(f"input_blocks.{block}.0", width, multiple * first, embedding)
            width = multiple * first
            made |= _transformer(f"input_blocks.{block}.1", width, kind, kind.depths[level])
            widths.append(width)
            block += 1
        if level < widest:
            made |= _conv(f"input_blocks.{block}.0.op", width, width)
            widths.append(width)
            block += 1
    made |= _resnet("middle_block.0", width, width, embedding)
    made |= _transformer("middle_block.1", width, kind, max(1, kind.depths[-1]))
    made |= _resnet("middle_block.2", width, width, embedding)
    block = 0
    for level, multiple in reversed(list(enumerate(kind.multiples))):
        for layer in range(3):
            made |= _resnet(f"output_blocks.{block}.0", width + widths.pop(), multiple * first, embedding)
            width = multiple * first
            made |= _transformer(f"output_blocks.{block}.1", width, kind, kind.depths[level])
            if level > 0 and layer == 2:
                made |= _conv(f"output_blocks.{block}.{2 if kind.depths[level] else 1}.conv", width, width)
            block += 1
    return made | _norm("out.0", width) | _conv("out.2", width, 4)


def vae(kind: Kind) -> Shapes:
    """AutoencoderKL of 2 ResNets a level on the way in and 3 on the way out."""
    first = 128 if kind.channels == 320 else kind.channels
    multiples = (1, 2, 4, 4) if kind.channels == 320 else kind.multiples
    made, width = _conv("encoder.conv_in", 3, first), first
    for level, multiple in enumerate(multiples):
        for layer in range(2):
            made |= _vae_resnet(f"encoder.down.{level}.block.{layer}", width, multiple * first)
            width = multiple * first
        if level < len(multiples) - 1:
            made |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    made |= _middle("encoder", width) | _norm("encoder.norm_out", width) | _conv("encoder.conv_out", width, 8)
    made |= _conv("decoder.conv_in", 4, width) | _middle("decoder", width)
    for level, multiple in reversed(list(enumerate(multiples))):
        for layer in range(3):
            made |= _vae_resnet(f"decoder.up.{level}.block.{layer}", width, multiple * first)
            width = multiple * first
        if level > 0:
            made |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    made |= _norm("decoder.norm_out", width) | _conv("decoder.conv_out", width, 3)
    return made | _conv("quant_conv", 8, 8, 1) | _conv("post_quant_conv", 4, 4, 1)


def clip(kind: Kind) -> Shapes:
    """CLIPTextTransformer, as transformers names it."""
    width = kind.context
    made: Shapes = {"embeddings.token_embedding.weight": (kind.vocabulary, width)}
    made["embeddings.position_embedding.weight"] = (77, width)
    for layer in range(kind.text_layers):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= _linear(f"{name}.self_attn.{part}", width, width)
        made |= _norm(f"{name}.layer_norm1", width) | _norm(f"{name}.layer_norm2", width)
        made |= _linear(f"{name}.mlp.fc1", width, 4 * width) | _linear(f"{name}.mlp.fc2", 4 * width, width)
    return made | _norm("final_layer_norm", width)


def open_clip(kind: Kind) -> Shapes:
    """open_clip's text transformer, whose queries, keys and values are one matrix."""
    width = kind.context
    made: Shapes = {"positional_embedding": (77, width), "token_embedding.weight": (kind.vocabulary, width)}
    for layer in range(kind.text_layers):
        name = f"transformer.resblocks.{layer}"
        made |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
        made |= _linear(f"{name}.attn.out_proj", width, width)
        made |= _norm(f"{name}.ln_1", width) | _norm(f"{name}.ln_2", width)
        made |= _linear(f"{name}.mlp.c_fc", width, 4 * width) | _linear(f"{name}.mlp.c_proj", 4 * width, width)
    return made | _norm("ln_final", width)


def _linear(name: str, given: int, made: int) -> Shapes:
    return {f"{name}.weight": (made, given), f"{name}.bias": (made,)}


def _conv(name: str, given: int, made: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (made, given, side, side), f"{name}.bias": (made,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, given: int, made: int, embedding: int) -> Shapes:
    found = _norm(f"{name}.in_layers.0", given) | _conv(f"{name}.in_layers.2", given, made)
    found |= _linear(f"{name}.emb_layers.1", embedding, made)
    found |= _norm(f"{name}.out_layers.0", made) | _conv(f"{name}.out_layers.3", made, made)
    return found | (_conv(f"{name}.skip_connection", given, made, 1) if given != made else {})


def _transformer(name: str, width: int, kind: Kind, depth: int) -> Shapes:
    """SpatialTransformer, or none: convolutions before and behind in 1.x, matrices in 2.x and XL."""
    if not depth:
        return {}
    found = _norm(f"{name}.norm", width)
    for part in ("proj_in", "proj_out"):
        found |= (
            _conv(f"{name}.{part}", width, width, 1) if kind.version == 1 else _linear(f"{name}.{part}", width, width)
        )
    for number in range(depth):
        found |= _block(f"{name}.transformer_blocks.{number}", width, kind.context + kind.second)
    return found


def _block(block: str, width: int, read: int) -> Shapes:
    """BasicTransformerBlock, which reads a context of width `read`."""
    found: Shapes = {}
    for attention, context in (("attn1", width), ("attn2", read)):
        for part, given in (("to_q", width), ("to_k", context), ("to_v", context)):
            found[f"{block}.{attention}.{part}.weight"] = (width, given)
        found |= _linear(f"{block}.{attention}.to_out.0", width, width)
    found |= _linear(f"{block}.ff.net.0.proj", width, 8 * width) | _linear(f"{block}.ff.net.2", 4 * width, width)
    for number in (1, 2, 3):
        found |= _norm(f"{block}.norm{number}", width)
    return found


def _vae_resnet(name: str, given: int, made: int) -> Shapes:
    found = _norm(f"{name}.norm1", given) | _conv(f"{name}.conv1", given, made)
    found |= _norm(f"{name}.norm2", made) | _conv(f"{name}.conv2", made, made)
    return found | (_conv(f"{name}.nin_shortcut", given, made, 1) if given != made else {})


def _middle(half: str, width: int) -> Shapes:
    found = _vae_resnet(f"{half}.mid.block_1", width, width) | _norm(f"{half}.mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        found |= _conv(f"{half}.mid.attn_1.{part}", width, width, 1)
    return found | _vae_resnet(f"{half}.mid.block_2", width, width)
