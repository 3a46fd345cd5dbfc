"""The names of Stable Diffusion's tensors in its authors' code and in the diffusers layout. Strings alone.

A table gives for every module of one naming that of the other; what follows a module's name (`weight`, or the inside of
a transformer block) is the same in both. Source: the modules of CompVis/latent-diffusion (openaimodel.py, model.py) and
of open_clip (transformer.py), beside diffusers' UNet2DConditionModel and AutoencoderKL and transformers' CLIPTextModel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SD1, SD2, SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
FAMILIES = {768: SD1, 1024: SD2}  # by the width of the context that the UNet reads
MAX_NAME = 200  # characters of a module's name
Names = dict[str, str]  # module in the authors' naming -> module in diffusers'

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIX = "text_model."  # of transformers' CLIP, up to its version 4
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
OPEN_CLIPS = (OPEN_CLIP, OPEN_CLIP_XL)
REFINER = "conditioner.embedders.0.model."  # the one text encoder of Stable Diffusion XL's refiner, open_clip's
# Where the parts of a whole checkpoint lie, the usual place first, and how a file of that part alone names it.
PREFIXES = {
    "unet": (UNET, "diffusion_model.", ""),
    "vae": (VAE, "vae.", ""),
    "text_encoder": (f"{CLIP}{TEXT_PREFIX}", CLIP, OPEN_CLIP, TEXT_PREFIX, f"{CLIP_XL}{TEXT_PREFIX}", CLIP_XL),
    "text_encoder_2": (OPEN_CLIP_XL,),
}
# What the summary of XL's second text encoder goes through: a layer in transformers, in open_clip a matrix, transposed.
PROJECTION = "text_projection"
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
LAYER = {  # of open_clip's transformer; its fused `attn.in_proj_` is three of transformers' modules
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
FUSED = ("q_proj", "k_proj", "v_proj")  # in the order in which `in_proj_` holds them


@dataclass(frozen=True)
class UnetShape:
    """Which blocks a UNet has, the outermost level first."""

    layers: int  # ResNets a level on the way down; one more on the way up
    attends: tuple[bool, ...]  # whether the level's ResNets are followed by attention


def unet_names(shape: UnetShape) -> Names:
    """The modules of a UNet."""
    names: Names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}  # SDXL's
    names |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    names |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    names["middle_block.1"] = "mid_block.attentions.0"
    levels, a_level = len(shape.attends), shape.layers + 1
    for level, attends in enumerate(shape.attends):
        for layer in range(shape.layers):
            block = f"input_blocks.{1 + level * a_level + layer}"
            names |= _resnet(f"{block}.0", f"down_blocks.{level}.resnets.{layer}")
            if attends:
                names[f"{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
        if level < levels - 1:
            names[f"input_blocks.{(level + 1) * a_level}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, attends in enumerate(reversed(shape.attends)):
        for layer in range(a_level):
            block = f"output_blocks.{level * a_level + layer}"
            names |= _resnet(f"{block}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                names[f"{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
        if level < levels - 1:  # behind the last ResNet, or behind its attention
            last = f"output_blocks.{level * a_level + shape.layers}.{2 if attends else 1}.conv"
            names[last] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def vae_names(levels: int, layers: int) -> Names:
    """The modules of a VAE. layers: ResNets a level of the encoder; the decoder has one more."""
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for number in (1, 2):
            inside = {f"{half}.mid.block_{number}": f"{half}.mid_block.resnets.{number - 1}"}
            names |= _inside(inside, VAE_RESNET)
        names |= _inside({f"{half}.mid.attn_1": f"{half}.mid_block.attentions.0"}, VAE_ATTENTION)
    for level in range(levels):
        up = levels - 1 - level  # diffusers counts the decoder's levels from the middle
        for layer in range(layers):
            names |= _inside({f"encoder.down.{level}.block.{layer}": _down(level, layer)}, VAE_RESNET)
        for layer in range(layers + 1):
            names |= _inside({f"decoder.up.{level}.block.{layer}": _up(up, layer)}, VAE_RESNET)
        if level < levels - 1:
            names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        if level > 0:
            names[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return names


def open_clip_names(layers: int) -> Names:
    """The modules of open_clip's text encoder but for `attn.in_proj_`, each as transformers' CLIPTextModel has it."""
    names = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    for layer in range(layers):
        names |= _inside({f"transformer.resblocks.{layer}": f"encoder.layers.{layer}"}, LAYER)
    return names


def renamed(key: str, names: Names) -> str | None:
    """A tensor's name in the other naming; None where the table has no module that it could belong to."""
    end = key.rfind(".", 0, MAX_NAME)  # no module of a table has a longer name
    while end > 0:
        if key[:end] in names:
            return names[key[:end]] + key[end:]
        end = key.rfind(".", 0, end)
    return None


def inverse(names: Names) -> Names:
    """The table of the other direction."""
    return {there: here for here, there in names.items()}


def flat_ema(key: str) -> str:
    """What the average of a UNet's weight is called: `model_ema.` and its name without dots (ldm/modules/ema.py)."""
    return "model_ema." + f"{UNET.removeprefix('model.')}{key}".replace(".", "")


def down_types(attends: Sequence[bool]) -> list[str]:
    """diffusers' names for the levels of a UNet on the way down."""
    return ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends]


def up_types(attends: Sequence[bool]) -> list[str]:
    """diffusers' names for the levels of a UNet on the way up."""
    return ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)]


def _resnet(here: str, there: str) -> Names:
    return _inside({here: there}, RESNET)


def _inside(modules: Names, parts: Names) -> Names:
    return {f"{here}.{a}": f"{there}.{b}" for here, there in modules.items() for a, b in parts.items()}


def _down(level: int, layer: int) -> str:
    return f"encoder.down_blocks.{level}.resnets.{layer}"


def _up(level: int, layer: int) -> str:
    return f"decoder.up_blocks.{level}.resnets.{layer}"
