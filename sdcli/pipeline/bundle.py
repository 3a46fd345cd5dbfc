"""A Stable Diffusion: folder in the diffusers layout, or single file -> modules, and modules -> folder.

Nothing is imported by a name found in a file: class names go through `_CLASSES`. Weights are safetensors alone,
mapped from disk onto modules that were built without memory of their own.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sdcli import layout
from sdcli.errors import InputError
from sdcli.files import read_bytes, reason
from sdcli.layout import ENCODERS, PARTS, STEMS, class_names, conditioner, root, write_json
from sdcli.original.names import TEXT_PREFIX
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.narrow import stay_narrow, widen_in_use
from sdcli.pipeline.part_configs import check_kinds, checked
from sdcli.pipeline.tokenizer_files import MAX_TOKENIZER_BYTES
from sdcli.pipeline.vocabulary import Swap, Vocabulary, check_alike, check_fit, load_tokenizer
from sdcli.pipeline.weights import check_numbers, check_shapes, read_state, shapes, write_tensors

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    Vae = AutoencoderKL | VQModel

Config = dict[str, Any]

TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
TOKENIZER = "CLIPTokenizer"
PADDING_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # which say what a prompt is filled with
POSITIONS = "position_embedding.weight"


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer with the model that reads its ids, and the tokens learned besides its vocabulary."""

    tokenizer: CLIPTokenizer
    model: CLIPTextModel
    learned: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # tokenizer's id -> rows of the token table
    swaps: tuple[Swap, ...] = ()  # other rows in place of a word's own

    @property
    def vocabulary(self) -> Vocabulary:
        """All of it that needs no weights."""
        config = self.model.config
        length, rows = int(config.max_position_embeddings), int(config.vocab_size)
        return Vocabulary(self.tokenizer, length, rows, self.learned, self.swaps)


@dataclass(frozen=True)
class TextPair:
    """The two text encoders of Stable Diffusion XL: of the same pieces, each with rows and vectors of its own for them.

    Of what it is asked for as a reader of words the first one tells; the second, alike in all that, reads along.
    """

    first: TextEncoder
    second: TextEncoder
    projection: nn.Module  # (N, D) of the second's end mark -> (N, P), the summary of a prompt
    skip: int = 0  # layers of both that are left out besides the last
    is_empty_zero: bool = True  # whether an empty negative prompt is all zeros

    @property
    def vocabulary(self) -> Vocabulary:
        """The first one's, with the second's beside it."""
        return replace(self.first.vocabulary, beside=self.second.vocabulary)

    @property
    def swaps(self) -> tuple[Swap, ...]:
        """Other rows in place of a word's own, alike in both."""
        return self.first.swaps


Encoders = TextEncoder | TextPair  # what reads prompts
Conditioner = Encoders | ClassEmbedder  # what gives the UNet its context; without classes, one context for all


@dataclass(frozen=True)
class ModelBundle:
    """All parts of one latent diffusion model, on one device."""

    vae: Vae
    unet: UNet2DConditionModel
    conditioner: Conditioner
    scheduler_config: Config
    device: torch.device
    dtype: torch.dtype
    is_sliced: bool = False  # the UNet works on one row of a batch after the other


def load_bundle(folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool = False) -> ModelBundle:
    """Load every part of a model folder, ready for inference.

    is_lean: on a CPU, weights that the file has in half precision may stay so and be widened as they compute; they can
    be drawn with, but not trained.
    Raises InputError when a part is missing or malformed, NumericalError when weights are not finite.
    """
    return ModelBundle(
        vae=load_vae(folder, device=device, dtype=dtype, is_lean=is_lean),
        unet=load_unet(folder, device=device, dtype=dtype, is_lean=is_lean),
        conditioner=load_conditioner(folder, device=device, dtype=dtype, is_lean=is_lean),
        scheduler_config=layout.config(folder, "scheduler"),
        device=device,
        dtype=dtype,
    )


def load_vae(folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool = False) -> Vae:
    """The VAE of a model folder, of Stable Diffusion XL in float32 where it overflows in float16 and its config says so
    (force_upcast); errors as in `load_bundle`."""
    if dtype == torch.float16 and layout.encoders(folder) == ENCODERS:
        dtype = torch.float32 if layout.config(folder, "vae").get("force_upcast", True) else dtype
    return cast("Vae", _load(folder, "vae", device, dtype, is_lean))


def load_unet(folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool = False) -> UNet2DConditionModel:
    """The UNet of a model folder; errors as in `load_bundle`."""
    return cast("UNet2DConditionModel", _load(folder, "unet", device, dtype, is_lean))


def load_conditioner(folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool = False) -> Conditioner:
    """The text encoder, both of them, or the class embedder of a model folder; errors as in `load_bundle`."""
    if conditioner(folder) == "text_encoder":
        return load_text(folder, device=device, dtype=dtype, is_lean=is_lean)
    return cast("ClassEmbedder", _load(folder, "class_embedder", device, dtype, is_lean))


def load_text(folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool = False) -> Encoders:
    """What reads the prompts of a model folder; errors as in `load_bundle`."""
    first = _encoder(folder, ENCODERS[0], cast("CLIPTextModel", _load(folder, ENCODERS[0], device, dtype, is_lean)))
    if layout.encoders(folder) != ENCODERS:
        return first
    projected = cast("CLIPTextModelWithProjection", _load(folder, ENCODERS[1], device, dtype, is_lean))
    second = _encoder(folder, ENCODERS[1], projected.text_model)
    check_alike(folder, first.vocabulary, second.vocabulary)
    return TextPair(first, second, projected.text_projection, is_empty_zero=layout.is_empty_zero(folder))


def _encoder(folder: Path, part: str, model: CLIPTextModel) -> TextEncoder:
    tokenizer = load_tokenizer(layout.tokenizer(folder, part), part)
    check_fit(folder, tokenizer, int(model.config.vocab_size), part)
    return TextEncoder(tokenizer, model)


def build(config: Config) -> nn.Module:
    """An untrained part of a model with fresh weights, by its config and `_class_name`."""
    name = config.get("_class_name", "CLIPTextModel" if config.get("model_type") == "clip_text_model" else "")
    if name not in _CLASSES:
        raise InputError(f"_class_name: {reprlib.repr(name)} is not supported", f"supported are {', '.join(_CLASSES)}")
    sizes = checked(name, config)
    try:
        return _CLASSES[name](sizes)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the libraries raise a dozen types on a malformed config
        raise InputError(f"{name}: its config cannot be built ({reason(error)})", "mend config.json") from error


def build_part(place: Path, name: str, config: Config | None = None) -> nn.Module:
    """A part of a model without memory, which has shapes alone: the weights that are read become its memory.

    config: in place of its own. Raises InputError when there is none, or it is not that of such a part.
    """
    if not place.is_file() and not (place / name).is_dir():
        raise InputError(f"{place}: has no {name}/", "name the folder of a whole model in the diffusers layout")
    config = dict(config) if config is not None else layout.config(place, name)
    if name in ENCODERS:  # transformers writes `architectures` where diffusers writes `_class_name`
        kinds = config.get("architectures")
        config["_class_name"] = kinds[0] if isinstance(kinds, list) and kinds else ""
    if config.get("_class_name") not in PARTS[name]:
        what = f"{place if place.is_file() else place / name}: is a {reprlib.repr(config.get('_class_name'))}"
        raise InputError(what, f"{name} must be a {' or '.join(PARTS[name])}")
    with torch.device("meta"):
        return build(config)


def save_bundle(folder: Path, bundle: ModelBundle, tokenizer: Path | None, settings: Config) -> None:
    """Write a whole model into an empty folder in the diffusers layout, weights in `bundle.dtype`.

    tokenizer: what to copy, as `layout.tokenizer` gives it; None for a model without a text encoder.
    settings: the model's own defaults, for `sdcli.json`.
    """
    save_part(folder / "vae", bundle.vae, bundle.dtype)
    save_part(folder / "unet", bundle.unet, bundle.dtype)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", bundle.scheduler_config)
    if isinstance(bundle.conditioner, ClassEmbedder):
        save_part(folder / "class_embedder", bundle.conditioner, bundle.dtype)
    else:
        assert tokenizer is not None and isinstance(bundle.conditioner, TextEncoder)  # none of XL is trained
        save_part(folder / "text_encoder", bundle.conditioner.model, bundle.dtype)
        copy_tokenizer(tokenizer, folder / "tokenizer")
    write_index(folder, type(bundle.vae).__name__, bundle.scheduler_config["_class_name"])
    write_json(folder / "sdcli.json", settings)


def write_index(folder: Path, vae: str, scheduler: str, *, is_empty_zero: bool = True) -> None:
    """Write the model_index.json of a model whose parts are there. vae, scheduler: their classes in diffusers.

    is_empty_zero: of Stable Diffusion XL, as `layout.is_empty_zero` tells.
    """
    index: Config = {"_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None]}
    if layout.encoders(folder) == ENCODERS:
        index |= {"_class_name": "StableDiffusionXLPipeline", "image_encoder": [None, None]}
        index |= {"force_zeros_for_empty_prompt": is_empty_zero}
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    index |= {"scheduler": ["diffusers", scheduler]}
    if conditioner(folder) == "class_embedder":
        index |= {"class_embedder": ["sdcli", "ClassEmbedder"]}
    for encoder in layout.encoders(folder):
        index |= {encoder: ["transformers", *PARTS[encoder]], layout.TOKENIZERS[encoder]: ["transformers", TOKENIZER]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", vae]}
    write_json(folder / "model_index.json", index)


def copy_tokenizer(source: Path, target: Path, encoder: str = "text_encoder") -> None:
    """Copy what a CLIP tokenizer is made of, and nothing else that lies or is linked there.

    source: as `layout.tokenizer` gives it; of a single file CLIP's own is written, padded as that encoder's is.
    """
    target.mkdir()
    checkpoint = layout.single_file(source)
    folder = source if checkpoint is None else layout.TOKENIZER_FOLDER
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            within = root(folder.parent, folder / name)
            (target / name).write_bytes(read_bytes(folder / name, max_bytes=MAX_TOKENIZER_BYTES, within=within))
    if checkpoint is not None:
        for name in PADDING_FILES:
            write_json(target / name, layout.read_json(target / name) | {"pad_token": checkpoint.pad_tokens[encoder]})


def save_part(folder: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """Write one part (config.json and weights) under the key names every program knows."""
    folder.mkdir(parents=True)
    write_part(folder, part_config(module), module.state_dict(), dtype)


def write_part(folder: Path, config: Config, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write config.json and weights of one part into its folder, which is there; dtype as in `write_tensors`."""
    if folder.name == "text_encoder":
        state = {TEXT_PREFIX + key: value for key, value in state.items()}
    write_tensors(folder / f"{STEMS[folder.name]}.safetensors", state, {"format": "pt"}, dtype)
    write_json(folder / "config.json", config)


def part_config(module: nn.Module) -> Config:
    """The config of a part as its config.json holds it, without paths of the machine it came from."""
    name = type(module).__name__
    if name in (*PARTS["text_encoder"], *PARTS["text_encoder_2"]):
        config = cast("CLIPTextModel", module).config.to_dict()
        config |= {"architectures": [name], "model_type": "clip_text_model"}
        config["dtype"] = "float32"  # else transformers takes the file's, and diffusers float32 for the rest
    else:
        config = {"_class_name": name, **cast("UNet2DConditionModel", module).config}
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def _load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, is_lean: bool) -> nn.Module:
    module = build_part(folder, name)
    state = read_state(folder, name)
    check_shapes(folder, name, shapes(module.state_dict()), shapes(state))
    check_numbers(folder, name, state)
    narrow = stay_narrow(module, state, dtype) if is_lean and device.type == "cpu" else frozenset()
    loaded = {key: value if key in narrow else value.to(device, dtype) for key, value in state.items()}
    module.load_state_dict(loaded, assign=True)
    widen_in_use(module, narrow)
    for key in state:
        if name in ENCODERS and key.endswith(POSITIONS):  # beside them is the one buffer no checkpoint carries
            positions = torch.arange(len(state[key]), device=device).expand((1, -1))
            inner = module.get_submodule(key.removesuffix(f".{POSITIONS}"))
            inner.register_buffer("position_ids", positions, persistent=False)
    return module.eval().requires_grad_(False)


def _build_vae(config: Config) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # deferred, as below: 3 s of imports

    return _from_config(AutoencoderKL, config)


def _build_vq(config: Config) -> nn.Module:
    from diffusers.models.autoencoders.vq_model import VQModel

    return _from_config(VQModel, config)


def _build_unet(config: Config) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _from_config(UNet2DConditionModel, config)


def _from_config(kind: type[Any], config: Config) -> nn.Module:
    arguments = inspect.signature(kind.__init__, eval_str=True).parameters
    check_kinds(kind.__name__, config, arguments)
    return cast("nn.Module", kind.from_config({key: value for key, value in config.items() if key in arguments}))


def _build_text(config: Config) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def _build_projected_text(config: Config) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def _build_classes(config: Config) -> nn.Module:
    return ClassEmbedder(class_names(config), config["width"])


_CLASSES: dict[str, Callable[[Config], nn.Module]] = {
    "AutoencoderKL": _build_vae,
    "VQModel": _build_vq,
    "UNet2DConditionModel": _build_unet,
    "CLIPTextModel": _build_text,
    "CLIPTextModelWithProjection": _build_projected_text,
    "ClassEmbedder": _build_classes,
}
