"""The layers of a model, and the names that LoRA files have for them. No torch.

kohya's scripts write a layer's name with `_` in place of dots, from which it cannot be had back: every name is made
from the model's own layers and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping
from pathlib import Path

from sdcli.layout import safetensors_header, single_file, weight_files

Shape = tuple[int, ...]
Layers = Mapping[str, Mapping[str, Shape]]  # part of the model -> layer -> shape of its weight
Layer = tuple[str, str]  # part, layer

ADAPTED_PARTS = ("unet", "text_encoder")
TEXT_PREFIX = "text_model."
# Blocks of a UNet in diffusers' naming; what follows them in a name is a layer's own.
IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions)\.(\d{1,3})\.(.+)")
IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d{1,3})\.(.+)")
RESAMPLER = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(?:down|up)samplers\.0\.conv")
# The same in the original naming of Stable Diffusion (Rombach et al., `ldm/modules/diffusionmodules/openaimodel.py`).
IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ALONE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_out": "out.2",
}


def model_layers(folder: Path) -> dict[str, dict[str, Shape]]:
    """The layers that an adapter may change, from the headers of a model's weights. Raises InputError."""
    checkpoint = single_file(folder)
    if checkpoint is not None:
        sources = checkpoint.sources
        shapes_of = {part: {key: source.shape for key, source in sources[part].items()} for part in sources}
        return {part: layers_of(shapes_of[part]) for part in ADAPTED_PARTS if part in sources}
    found = {}
    for part in ADAPTED_PARTS:
        if (folder / part).is_dir():
            shapes = [header_shapes(path) for path in weight_files(folder, part)]
            found[part] = layers_of({key: shape for one in shapes for key, shape in one.items()})
    return found


def header_shapes(path: Path) -> dict[str, Shape]:
    """The shapes of a safetensors file by their keys. Raises InputError for a malformed one."""
    return {key: tuple(one["shape"]) for key, one in safetensors_header(path).items()}


def layers_of(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The linear layers and convolutions among the tensors of a part, by name, with the shape of their weight."""
    weights = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight")}
    named = {key.removeprefix(TEXT_PREFIX): shape for key, shape in weights.items()}
    return {key: shape for key, shape in named.items() if len(shape) in (2, 4) and not key.endswith("_embedding")}


def known_names(layers: Layers) -> dict[str, Layer]:
    """Every name that a file may have for a layer."""
    return {name: (part, layer) for part, all_of_it in layers.items() for layer, name in _names(part, all_of_it)}


def original_names(layers: Collection[str]) -> dict[str, str]:
    """The layers of a UNet in Stable Diffusion's original naming, but for those that it does not have."""
    blocks = [match for match in map(IN_BLOCK.fullmatch, layers) if match]
    per_block = 1 + max((int(match[4]) for match in blocks if match[1] == "down"), default=0)
    attentive = {match[2] for match in blocks if match[1] == "up" and match[3] == "attentions"}
    names = ((layer, _original_name(layer, per_block, attentive)) for layer in layers)
    return {layer: name for layer, name in names if name is not None}


def _original_name(layer: str, per_block: int, attentive: Container[str]) -> str | None:
    """per_block: resnets of a block on the way down; attentive: the numbers of blocks on the way up with attention."""
    if match := IN_BLOCK.fullmatch(layer):
        side, block, kind, number, rest = match.groups()
        index = int(block) * (per_block + 1) + int(number) + (side == "down")  # after the first convolution
        stack = "input_blocks" if side == "down" else "output_blocks"
        return f"{stack}.{index}.{_inner(kind, rest, 0)}"
    if match := IN_MIDDLE.fullmatch(layer):
        kind, number, rest = match.groups()
        return f"middle_block.{_inner(kind, rest, 2 * int(number))}"
    if match := RESAMPLER.fullmatch(layer):
        last = (int(match[2]) + 1) * (per_block + 1)
        if match[1] == "down":
            return f"input_blocks.{last}.0.op"
        return f"output_blocks.{last - 1}.{2 if match[2] in attentive else 1}.conv"
    return ALONE.get(layer)


def _inner(kind: str, rest: str, resnet: int) -> str:
    """The end of a name: the place in its block, the attention's being 1, and the layer."""
    return f"{resnet}.{IN_RESNET.get(rest, rest)}" if kind == "resnets" else f"1.{rest}"


def _names(part: str, layers: Mapping[str, Shape]) -> Iterator[tuple[str, str]]:
    """Pairs of layer and name."""
    original = original_names(layers) if part == "unet" else {}
    for layer in layers:
        flat = layer.replace(".", "_")
        if part == "text_encoder":
            for prefix in (TEXT_PREFIX, ""):  # transformers 5 has dropped it from its own names
                yield layer, f"text_encoder.{prefix}{layer}"
                yield layer, f"lora_te_{prefix.replace('.', '_')}{flat}"
            continue
        yield layer, f"unet.{layer}"
        yield layer, layer  # diffusers' attention processors, saved alone
        yield layer, f"lora_unet_{flat}"
        yield layer, f"lycoris_{flat}"
        if layer in original:
            yield layer, f"lora_unet_{original[layer].replace('.', '_')}"
