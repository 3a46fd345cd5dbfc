"""The layers of a model, and the names that LoRA files have for them. No torch.

kohya's scripts write a layer's name with `_` in place of dots, from which it cannot be had back: every name is made
from the model's own layers and looked up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from sdcli.layout import ENCODERS, safetensors_header, single_file, weight_files
from sdcli.original.names import FAMILIES, TEXT_PREFIX, UnetShape, inverse, renamed, unet_names

Shape = tuple[int, ...]
Layers = Mapping[str, Mapping[str, Shape]]  # part of the model -> layer -> shape of its weight
Layer = tuple[str, str]  # part, layer

ADAPTED_PARTS = ("unet", *ENCODERS)
COMFY_ENCODERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}  # of 1.x and XL, of 2.x; of XL
WEIGHT = ".weight"
WIDTHS = {192: "the embedded model"} | FAMILIES  # of what a text encoder gives and a UNet reads
MAX_PLACES = 20  # levels of a UNet, and ResNets of a level; Stable Diffusion's have four and three


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
    weights = {key.removesuffix(WEIGHT): shape for key, shape in shapes.items() if key.endswith(WEIGHT)}
    named = {key.removeprefix(TEXT_PREFIX): shape for key, shape in weights.items()}
    return {key: shape for key, shape in named.items() if len(shape) in (2, 4) and not key.endswith("_embedding")}


def known_names(layers: Layers) -> dict[str, Layer]:
    """Every name that a file may have for a layer."""
    return {name: (part, layer) for part in layers for layer, name in _names(part, layers)}


def is_xl(layers: Layers) -> bool:
    """Whether a model has two text encoders, as Stable Diffusion XL has."""
    return ENCODERS[1] in layers


def original_names(layers: Collection[str]) -> dict[str, str]:
    """The layers of a UNet in Stable Diffusion's original naming, but for those that it does not have."""
    there = inverse(unet_names(_unet_shape(layers)))
    names = ((layer, renamed(layer + WEIGHT, there)) for layer in layers)
    return {layer: name.removesuffix(WEIGHT) for layer, name in names if name is not None}


def _unet_shape(layers: Collection[str]) -> UnetShape:
    """The blocks of a UNet, by which of them have layers."""
    conv1, proj_in = "down_blocks.{}.resnets.{}.conv1", "down_blocks.{}.attentions.0.proj_in"
    levels = [level for level in range(MAX_PLACES) if conv1.format(level, 0) in layers]
    deep = max((i + 1 for level in levels for i in range(MAX_PLACES) if conv1.format(level, i) in layers), default=0)
    return UnetShape(deep, tuple(proj_in.format(level) in layers for level in levels))


def _names(part: str, layers: Layers) -> Iterator[tuple[str, str]]:
    """Pairs of layer and name."""
    original = original_names(layers[part]) if part == "unet" else {}
    comfy = COMFY_ENCODERS.get(part, ())
    # kohya counts the text encoders where there are two.
    kohya = f"lora_te{ENCODERS.index(part) + 1 if is_xl(layers) else ''}_" if part in ENCODERS else "lora_unet_"
    for layer in layers[part]:
        flat = layer.replace(".", "_")
        if part in ENCODERS:
            for prefix in (TEXT_PREFIX, ""):  # transformers 5 has dropped it from its own names
                yield layer, f"{part}.{prefix}{layer}"
                yield layer, f"{kohya}{prefix.replace('.', '_')}{flat}"
                yield from ((layer, f"text_encoders.{one}.transformer.{prefix}{layer}") for one in comfy)
            continue
        yield layer, f"unet.{layer}"
        yield layer, layer  # diffusers' attention processors, saved alone
        yield layer, f"{kohya}{flat}"
        yield layer, f"lycoris_{flat}"
        if layer in original:
            yield layer, f"{kohya}{original[layer].replace('.', '_')}"
            yield layer, f"diffusion_model.{original[layer]}"  # ComfyUI's
