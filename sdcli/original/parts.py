"""A part of a checkpoint: its config from the shapes of its tensors, and where each tensor of the diffusers layout is.

What shapes do not show (heads, groups, activations) is as Stable Diffusion's authors published it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.errors import InputError
from sdcli.headers import Entry
from sdcli.original import names as naming
from sdcli.original.names import FUSED, OPEN_CLIP, OPEN_CLIP_XL, OPEN_CLIPS, PROJECTION, UnetShape

Config = dict[str, Any]

MAX_BLOCKS = 100  # of one kind in a row; Stable Diffusion's reach 32
LONGEST_NAME, DEEPEST = 200, 6  # of modules that are counted, in characters and in dots
DROPPED_LAYER = 23  # Stable Diffusion 2.x reads the last layer but one of 24, and diffusers keeps no other
HEAD = 64  # numbers of a head in CLIP, and in the UNets of 2.x and XL
SD1_HEADS = 8
SIZE_WIDTH = 256  # of the embedding of each of the numbers about sizes that XL's UNet is told


@dataclass(frozen=True)
class Source:
    """Where a tensor of the diffusers layout is found: under a name, as the `third` third of its rows, in a shape."""

    name: str
    entry: Entry
    shape: tuple[int, ...]
    third: int | None = None
    is_transposed: bool = False


class Part:
    """The tensors of one part, by their names without its prefix."""

    def __init__(self, path: Path, tensors: dict[str, Entry], prefix: str) -> None:
        self.path, self.tensors, self.prefix = path, tensors, prefix
        self.modules: set[str] = set()
        for pieces in (name[:LONGEST_NAME].split(".", DEEPEST) for name in tensors):
            self.modules |= {".".join(pieces[:depth]) for depth in range(1, len(pieces))}

    def read(self, part: str) -> tuple[Config, dict[str, Source]]:
        """The config of the part, but for what its family decides, and where its tensors are. Raises InputError."""
        if part == "unet":
            shape = self.unet_shape()
            return self.unet_config(shape), self.sources(naming.unet_names(shape))
        if part == "vae":
            config = self.vae_config()
            levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
            return config, self.sources(naming.vae_names(levels, layers))
        sources = self.open_clip_sources() if self.prefix in OPEN_CLIPS else self.clip_sources()
        return self.text_config(), sources

    def unet_shape(self) -> UnetShape:
        """Which blocks the UNet has: the first that halves ends the first level, and all levels are alike."""
        blocks = self._count("input_blocks.{}.0") - 1
        halving = [i for i in range(blocks + 1) if f"input_blocks.{i}.0.op.weight" in self.tensors]
        layers, levels = halving[0] - 1 if halving else blocks, len(halving) + 1
        a_level = layers + 1
        is_even = halving == [a_level * (n + 1) for n in range(levels - 1)] and blocks == a_level * levels - 1
        if layers < 1 or not is_even or self._count("output_blocks.{}.0") != blocks + 1:
            raise self._refusal(f"{self.prefix}input_blocks are not those of a Stable Diffusion")
        firsts = [1 + level * a_level for level in range(levels)]
        return UnetShape(layers, tuple(f"input_blocks.{i}.1.proj_in.weight" in self.tensors for i in firsts))

    def unet_config(self, shape: UnetShape) -> Config:
        """The config of a UNet, but for what its family decides."""
        a_level = shape.layers + 1
        firsts = [f"input_blocks.{1 + level * a_level}" for level in range(len(shape.attends))]
        attending = [f"{block}.1" for block, attends in zip(firsts, shape.attends, strict=True) if attends]
        attention = attending[0] if attending else "middle_block.1"
        channels = [self._shape(f"{block}.0.out_layers.3.weight", 4)[0] for block in firsts]
        depths = [self._count(f"{block}.1.transformer_blocks.{{}}") or 1 for block in firsts]
        linear = len(self._shape(f"{attention}.proj_in.weight")) == 2
        width = self._shape(f"{attention}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
        config: Config = {"_class_name": "UNet2DConditionModel"}
        config |= {"in_channels": self._shape("input_blocks.0.0.weight", 4)[1]}
        config |= {"out_channels": self._shape("out.2.weight", 4)[0], "block_out_channels": channels}
        config |= {"layers_per_block": shape.layers, "cross_attention_dim": width, "use_linear_projection": linear}
        config |= {"down_block_types": naming.down_types(shape.attends)}
        config |= {"up_block_types": naming.up_types(shape.attends)}
        config |= {"transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths}
        # The authors' configs: 8 heads in 1.x, heads of 64 numbers in 2.x and XL, as diffusers writes both.
        config |= {"attention_head_dim": [max(1, n // HEAD) for n in channels] if linear else SD1_HEADS}
        if "label_emb.0.0.weight" in self.tensors:
            config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_WIDTH}
            config |= {"projection_class_embeddings_input_dim": self._shape("label_emb.0.0.weight", 2)[1]}
        return config

    def vae_config(self) -> Config:
        """The config of a VAE, but for the scale of its latents."""
        levels = self._count("encoder.down.{}.block.0")
        if not levels:
            raise self._refusal(f"{self.prefix}encoder.down has no levels")
        channels = [self._shape(f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in range(levels)]
        config: Config = {"_class_name": "AutoencoderKL", "in_channels": self._shape("encoder.conv_in.weight", 4)[1]}
        config |= {"out_channels": self._shape("decoder.conv_out.weight", 4)[0], "block_out_channels": channels}
        config |= {"latent_channels": self._shape("decoder.conv_in.weight", 4)[1]}
        config |= {"layers_per_block": self._count("encoder.down.0.block.{}")}
        config |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        for name in ("quant_conv", "post_quant_conv"):
            config[f"use_{name}"] = f"{name}.weight" in self.tensors
        return config

    def text_config(self) -> Config:
        """The config of a text encoder."""
        is_open, is_second = self.prefix in OPEN_CLIPS, self.prefix == OPEN_CLIP_XL
        layer, middle = ("transformer.resblocks.{}", "mlp.c_fc") if is_open else ("encoder.layers.{}", "mlp.fc1")
        table = "token_embedding.weight" if is_open else "embeddings.token_embedding.weight"
        positions = "positional_embedding" if is_open else "embeddings.position_embedding.weight"
        rows, width = self._shape(table, 2)
        layers = self._count(layer)
        kind = "CLIPTextModelWithProjection" if is_second else "CLIPTextModel"
        config: Config = {"architectures": [kind], "model_type": "clip_text_model", "vocab_size": rows}
        config |= {"hidden_size": width, "intermediate_size": self._shape(f"{layer.format(0)}.{middle}.weight", 2)[0]}
        config |= {"num_hidden_layers": min(layers, DROPPED_LAYER) if self.prefix == OPEN_CLIP else layers}
        config |= {"num_attention_heads": max(1, width // HEAD), "hidden_act": "gelu" if is_open else "quick_gelu"}
        projected = self._shape(PROJECTION, 2)[1] if is_second else width
        config |= {"max_position_embeddings": self._shape(positions, 2)[0], "projection_dim": projected}
        config |= {"bos_token_id": rows - 2, "eos_token_id": rows - 1, "pad_token_id": 0 if is_open else rows - 1}
        return config

    def sources(self, names: dict[str, str]) -> dict[str, Source]:
        """Where each tensor of a UNet or VAE is found."""
        found: dict[str, Source] = {}
        for name, entry in self.tensors.items():
            target = naming.renamed(name, names)
            if target is None:
                continue
            shape = entry.shape
            # A VAE's attention is a convolution of 1 x 1 there and a matrix here; newer files have a matrix, too.
            if ".mid.attn_1." in name and len(shape) > 2 and set(shape[2:]) == {1}:
                shape = shape[:2]
            found[target] = Source(self.prefix + name, entry, shape)
        return found

    def clip_sources(self) -> dict[str, Source]:
        """Where each tensor of transformers' text encoder is found; the numbers of the positions are left out."""
        heads = ("embeddings.", "encoder.", "final_layer_norm.")
        return {
            name: Source(self.prefix + name, entry, entry.shape)
            for name, entry in self.tensors.items()
            if name.startswith(heads) and name != "embeddings.position_ids"
        }

    def open_clip_sources(self) -> dict[str, Source]:
        """Where each tensor of the text encoder is found in open_clip's, whose queries, keys and values are one.

        Beside a projection, transformers puts `text_model.` before the names of all else.
        """
        is_second = self.prefix == OPEN_CLIP_XL
        layers = MAX_BLOCKS if is_second else DROPPED_LAYER
        names, numbers = naming.open_clip_names(layers), {str(number) for number in range(layers)}
        inside = "text_model." if is_second else ""
        found: dict[str, Source] = {}
        for name, entry in self.tensors.items():
            block, is_fused, kind = name.partition(".attn.in_proj_")
            number = block.removeprefix("transformer.resblocks.")
            if is_fused and number in numbers and entry.shape and not entry.shape[0] % 3:
                shape = (entry.shape[0] // 3, *entry.shape[1:])
                for third, module in enumerate(FUSED):
                    target = f"{inside}encoder.layers.{number}.self_attn.{module}.{kind}"
                    found[target] = Source(self.prefix + name, entry, shape, third)
            elif name == "positional_embedding":
                found[f"{inside}embeddings.position_embedding.weight"] = Source(self.prefix + name, entry, entry.shape)
            elif name == PROJECTION and is_second:
                turned = Source(self.prefix + name, entry, entry.shape[::-1], is_transposed=True)
                found[f"{PROJECTION}.weight"] = turned
            elif (renamed := naming.renamed(name, names)) is not None:
                found[inside + renamed] = Source(self.prefix + name, entry, entry.shape)
        return found

    def _count(self, pattern: str) -> int:
        """How many of a kind there are, numbered from 0 without a gap. Raises InputError for more than a model has."""
        count = 0
        while pattern.format(count) in self.modules:
            count += 1
            if count > MAX_BLOCKS:
                raise self._refusal(f"has more than {MAX_BLOCKS} of {self.prefix}{pattern.format('N')}")
        return count

    def _shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        entry = self.tensors.get(name)
        if entry is None:
            raise self._refusal(f"{self.prefix}{name} is missing")
        if (dimensions is not None and len(entry.shape) != dimensions) or len(entry.shape) < 2 or 0 in entry.shape:
            raise self._refusal(f"{self.prefix}{name} has shape {entry.shape}")
        return entry.shape

    def _refusal(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}", "it is no whole checkpoint of Stable Diffusion; get the file again")
