"""A single-file checkpoint: what model it is, from the names and shapes of its tensors alone.

A file that `sdcli models convert` wrote carries its configs in its metadata, under CONFIGS: they are taken as those of
a folder are, and checked against the tensors as those are.
"""

from __future__ import annotations

import functools
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdcli.errors import InputError
from sdcli.files import exists, open_regular, stamp
from sdcli.headers import Entry, Header, parse_said, read_header
from sdcli.original import names
from sdcli.original.names import CLIP, CLIP_XL, OPEN_CLIP, OPEN_CLIPS, PREFIXES, REFINER, SD1, SD2, SDXL, VAE
from sdcli.original.parts import DROPPED_LAYER, Config, Part, Source
from sdcli.original.prediction import Prediction, V, find_prediction

CONFIGS = "sdcli.configs"  # metadata: the JSON files of a model folder, by part, and `scheduler` and `settings`
INPAINTING = " inpainting"
SDXL_REFINER = f"{SDXL} refiner"
REFINER_HINT = "only whole models are supported; use the base"
XL_SIZES = 6  # height and width, top and left of the cut, height and width: told to XL's UNet besides the words
REFINER_WIDTH = 1280 + 5 * 256  # what the refiner's is told: one summary of the words, and five numbers
NORM_GROUPS = 32
SECOND = "text_encoder_2"  # of XL
CLIP_PAD, OPEN_CLIP_PAD = "<|endoftext|>", "!"  # what fills a chunk of a prompt: piece 49407, and piece 0
SIDES = {SD1: 512, SD2: 512, SDXL: 1024}  # px; 768 of those 2.x that predict v
SCALES = {SD1: 0.18215, SD2: 0.18215, SDXL: 0.13025}  # of latents
MIN_SIDE, MAX_SIDE = 64, 4096  # px, of the size that metadata name
PART_NAMES = {"vae": "VAE", "unet": "UNet", "text_encoder": "text encoder", SECOND: "second text encoder"}
UNCLIP = ("cond_stage_model.", "embedder.", "noise_augmentor.")  # its text encoder, that of pictures, its noise
KEYS = {  # a tensor that a part has under its prefix, and nothing else
    "unet": ("input_blocks.0.0.weight",),
    "vae": ("decoder.mid.block_1.conv1.weight",),
    "text_encoder": ("embeddings.token_embedding.weight", "token_embedding.weight"),
    SECOND: ("token_embedding.weight",),
}
# What no model of ours has in its names, who has it, and what to do with such a file.
STRANGERS = (
    ("joint_blocks.", "is a Stable Diffusion 3", "Stable Diffusion 1.x, 2.x and XL are read"),
    ("double_blocks.", "is a Flux model", "Stable Diffusion 1.x, 2.x and XL are read"),
    ("control_model.", "is a ControlNet", "Stable Diffusion 1.x, 2.x and XL are read"),
    ("lora_", "is a LoRA, no model", "a LoRA is added to a model"),
    (".lora", "is a LoRA, no model", "a LoRA is added to a model"),
    ("emb_params", "is a learned word, no model", "give it with --embedding"),
    ("string_to_param", "is a learned word, no model", "give it with --embedding"),
    ("down_blocks.", "is a part of a model in diffusers' naming", "name the folder of the whole model"),
    ("latents", "is a file of latents, no model", "sdcli decode makes a picture of it"),
)
TEXT_LEFTOVERS = ("logit_scale", "text_projection", "attn_mask")
# What training left, and what tells other programs what the file is: nothing of it is of use in drawing.
USELESS_NAMES = frozenset(
    {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}
    | {"log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}
    | {"posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"}
    | {"lvlb_weights", "logvar", "scale_factor", "global_step", "v_pred", "ztsnr", "denoiser.sigmas"}
    | {f"{at}{name}embeddings.position_ids" for at in (CLIP, CLIP_XL) for name in ("", "text_model.")}
    | {f"{at}{name}" for at in (*OPEN_CLIPS, CLIP_XL, "cond_stage_model.") for name in TEXT_LEFTOVERS}
    | {f"{CLIP_XL}text_projection.weight"}
)
USELESS_PREFIXES = ("model_ema.", "loss.", f"{VAE}loss.", f"{OPEN_CLIP}transformer.resblocks.{DROPPED_LAYER}.")
SCHEDULER: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


@dataclass(frozen=True)
class Checkpoint:
    """A single file, recognised."""

    path: Path
    header: Header
    family: str
    configs: Mapping[str, Config]  # part -> its config.json
    scheduler: Config
    settings: Config  # its sdcli.json
    prediction: Prediction
    sources: Mapping[str, Mapping[str, Source]]  # part -> tensor in the diffusers layout -> where it is
    averages: Mapping[str, Source] = field(default_factory=dict)  # of the UNet's weights, likewise (EMA)
    pad_tokens: Mapping[str, str] = field(default_factory=dict)  # text encoder -> what its chunks are filled with
    index: Config = field(default_factory=dict)  # of what a folder's model_index.json says, that a drawing hangs on
    strangers: tuple[str, ...] = ()  # tensors that nothing reads

    @property
    def is_supported(self) -> bool:
        """Whether pictures can be drawn with it, if it is whole."""
        return not self.family.startswith(SDXL_REFINER)

    @property
    def rest(self) -> list[str]:
        """The tensors that no part of its model is made of; without buffers of code, in which Inf may be right."""
        read = {source.name for part in self.sources.values() for source in part.values()}
        return sorted(self.header.entries.keys() - read - USELESS_NAMES)

    @property
    def lacks(self) -> tuple[str, ...]:
        """The parts of a model that it does not hold."""
        needed = PART_NAMES if self.family.startswith(SDXL) else PART_NAMES.keys() - {SECOND}
        return tuple(part for part in PART_NAMES if part in needed and part not in self.sources)


def read_checkpoint(path: Path, prediction: str | None = None) -> Checkpoint:
    """What a single-file checkpoint is.

    prediction: what its UNet predicts, in diffusers' words; None finds out.
    Raises InputError for a file that is none, or of a kind that is not read.
    """
    with open_regular(path) as stream:
        known = stamp(os.fstat(stream.fileno()))
    beside = path.with_suffix(".yaml")  # it may say what the UNet predicts
    return _read(path.absolute(), path, (known, stamp(beside.stat()) if exists(beside) else ()), prediction)


@functools.lru_cache(maxsize=8)
def _read(place: Path, path: Path, known: tuple[object, ...], prediction: str | None) -> Checkpoint:
    return recognise(path, read_header(path), prediction)


def recognise(path: Path, header: Header, asked: str | None = None) -> Checkpoint:
    """What the tensors of a header make; errors as `read_checkpoint`."""
    tensors = header.entries
    if any(name.startswith("edm_") for name in tensors):
        what = f"{path}: is made for the noise levels of EDM, as Playground 2.5 and CosXL are"
        raise InputError(what, "Stable Diffusion 1.x, 2.x and XL are read")
    prefixes = {part: found for part in PREFIXES if (found := _prefix(part, tensors)) is not None}
    if not prefixes and not _is_xl(tensors):
        raise _stranger(path, tensors)
    if _is_unclip(prefixes, tensors):
        what = f"{path}: is an unCLIP model, drawn from the summary of a picture"
        raise InputError(what, "Stable Diffusion 1.x, 2.x and XL are read")
    configs, sources = {}, {}
    for part, prefix in prefixes.items():
        inside = Part(path, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, prefix)
        configs[part], sources[part] = inside.read(part)
    family = _family(prefixes, configs, tensors)
    is_inpainting = configs.get("unet", {}).get("in_channels") == 2 * _latent_channels(configs) + 1
    prediction = find_prediction(path, header, is_sd2=family == SD2 and not is_inpainting)
    if asked is not None:
        prediction = Prediction(asked, "--prediction", prediction.ends_in_noise)
    said = _said(path, header)
    _fill(configs, family, prediction, header)
    configs = {part: said.get(part, config) for part, config in configs.items()}
    _check_groups(path, {part: config for part, config in configs.items() if part not in said})
    return Checkpoint(
        path=path,
        header=header,
        family=family + (INPAINTING if is_inpainting else ""),
        configs=configs,
        scheduler=_told(said.get("scheduler"), asked) or _scheduler(family, prediction),
        settings=said.get("settings", {}),
        prediction=prediction,
        sources=sources,
        averages=_averages(prefixes.get("unet", ""), sources.get("unet", {}), tensors),
        pad_tokens=_pad_tokens(path, said, family),
        index=said.get("index", {}),
        strangers=_strangers(tensors, sources),
    )


def _prefix(part: str, tensors: Mapping[str, Entry]) -> str | None:
    return next((p for p in PREFIXES[part] for key in KEYS[part] if _is_at(p, key) and p + key in tensors), None)


def _is_at(prefix: str, key: str) -> bool:
    """Whether a text encoder's table is looked for where its naming has it; other parts have one naming."""
    return not key.endswith("token_embedding.weight") or key.startswith("token") == (prefix in OPEN_CLIPS)


def _is_xl(tensors: Mapping[str, Entry]) -> bool:
    return any(name.startswith("conditioner.embedders.") for name in tensors)


def _is_unclip(prefixes: Mapping[str, str], tensors: Mapping[str, Entry]) -> bool:
    """Whether a UNet is told a summary, as XL's is, in a file whose encoders lie where 2.x has its own."""
    is_told = "unet" in prefixes and f"{prefixes['unet']}label_emb.0.0.weight" in tensors
    return is_told and not _is_xl(tensors) and any(name.startswith(UNCLIP) for name in tensors)


def _family(prefixes: Mapping[str, str], configs: Mapping[str, Config], tensors: Mapping[str, Entry]) -> str:
    """1.x has convolutions before its transformers and OpenAI's CLIP, 2.x matrices and open_clip's, XL two encoders."""
    unet = configs.get("unet", {})
    if any(name.startswith(REFINER) for name in tensors):
        return SDXL_REFINER
    if _is_xl(tensors) or "addition_embed_type" in unet:
        is_refiner = SECOND not in configs and unet.get("projection_class_embeddings_input_dim") == REFINER_WIDTH
        return SDXL_REFINER if is_refiner else SDXL
    is_sd2 = unet["use_linear_projection"] if unet else prefixes.get("text_encoder") == OPEN_CLIP
    return SD2 if is_sd2 else SD1


def _latent_channels(configs: Mapping[str, Config]) -> int:
    return int(configs.get("vae", {}).get("latent_channels", 4))


def _fill(configs: Mapping[str, Config], family: str, prediction: Prediction, header: Header) -> None:
    """Add what the family decides to the configs of its parts."""
    family = SDXL if family == SDXL_REFINER else family
    side = 768 if family == SD2 and prediction.kind == V else SIDES[family]
    width, _, height = header.metadata.get("modelspec.resolution", "").partition("x")
    if (
        width == height
        and width.isascii()
        and width.isdigit()
        and len(width) <= 4
        and MIN_SIDE <= int(width) <= MAX_SIDE
    ):
        side = int(width)
    factor = 8
    if "vae" in configs:
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        configs["vae"] |= {"scaling_factor": SCALES[family], "sample_size": side}
        configs["vae"] |= {"force_upcast": True} if family == SDXL else {}
    if "unet" in configs:
        configs["unet"] |= {"sample_size": side // factor}
    if family == SDXL and "unet" in configs and SECOND in configs:
        of_sizes = configs["unet"].get("projection_class_embeddings_input_dim", 0) - configs[SECOND]["projection_dim"]
        if of_sizes > 0 and of_sizes % XL_SIZES == 0:
            configs["unet"]["addition_time_embed_dim"] = of_sizes // XL_SIZES


def _scheduler(family: str, prediction: Prediction) -> Config:
    """The scheduler that the authors published with a family: PNDM for 1.x, DDIM for 2.x, Euler's for XL."""
    config = SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    if family.startswith(SDXL):
        config = SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    elif family != SD1 or prediction.kind == V or prediction.ends_in_noise:
        config = SCHEDULER | {"_class_name": "DDIMScheduler"}
    config["prediction_type"] = prediction.kind
    if prediction.ends_in_noise:  # and then the steps must begin at the last timestep
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _told(scheduler: Config | None, asked: str | None) -> Config | None:
    """The scheduler that our own writer put into the metadata, with what is asked for in its place."""
    return scheduler | {"prediction_type": asked} if scheduler is not None and asked is not None else scheduler


def _said(path: Path, header: Header) -> dict[str, Config]:
    """The configs that our own writer put into the metadata; none of other programs' files."""
    text = header.metadata.get(CONFIGS)
    if text is None:
        return {}
    try:
        said = parse_said(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata {CONFIGS} are no JSON ({error})", "get the file again") from error
    if not isinstance(said, dict) or not all(isinstance(config, dict) for config in said.values()):
        raise InputError(f"{path}: its metadata {CONFIGS} hold no configs", "get the file again")
    return said


def _pad_tokens(path: Path, said: Mapping[str, Config], family: str) -> dict[str, str]:
    """What fills the chunks of each text encoder: of 2.x, and of the second of XL, what open_clip was trained with."""
    usual = {"text_encoder": OPEN_CLIP_PAD if family == SD2 else CLIP_PAD, SECOND: OPEN_CLIP_PAD}
    found = {}
    for encoder, token in usual.items():
        token = said.get(encoder.replace("text_encoder", "tokenizer"), {}).get("pad_token", token)
        if token not in (CLIP_PAD, OPEN_CLIP_PAD):
            what = f"{path}: its metadata name the padding {reprlib.repr(token)}"
            raise InputError(what, f"expected is {CLIP_PAD} or {OPEN_CLIP_PAD}")
        found[encoder] = str(token)
    return found


def _check_groups(path: Path, configs: Mapping[str, Config]) -> None:
    """Raise InputError for channels that the families' 32 groups do not divide: shapes do not show others."""
    for part in ("unet", "vae"):
        config = configs.get(part, {})
        for count in config.get("block_out_channels", ()):
            if count % NORM_GROUPS:
                what = f"{path}: its {PART_NAMES[part]} has {count} channels, no multiple of {NORM_GROUPS}"
                raise InputError(what, "name its folder in the diffusers layout, whose configs say more")


def _averages(prefix: str, unet: Mapping[str, Source], tensors: Mapping[str, Entry]) -> dict[str, Source]:
    """Where the averages of the UNet's weights are; none unless there is one for each."""
    found = {}
    for key, source in unet.items():
        name = names.flat_ema(source.name.removeprefix(prefix))
        if name not in tensors:
            return {}
        found[key] = Source(name, tensors[name], tensors[name].shape)
    return found


def _strangers(tensors: Mapping[str, Entry], sources: Mapping[str, Mapping[str, Source]]) -> tuple[str, ...]:
    read = {source.name for part in sources.values() for source in part.values()}
    return tuple(
        name
        for name in tensors
        if name not in read and name not in USELESS_NAMES and not name.startswith(USELESS_PREFIXES)
    )


def _stranger(path: Path, tensors: Mapping[str, Entry]) -> InputError:
    for mark, what, hint in STRANGERS:
        if any(mark in name for name in tensors):
            return InputError(f"{path}: {what}", hint)
    what = f"{path}: none of its {len(tensors):,} tensors is one of Stable Diffusion"
    return InputError(what, "name a checkpoint of Stable Diffusion 1.x, 2.x or XL")
