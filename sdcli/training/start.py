"""Where a run begins: the parts it trains, by model or by preset, and the run folder it owns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sdcli import store
from sdcli.errors import InputError, UsageError
from sdcli.layout import read_json
from sdcli.pipeline import noise
from sdcli.pipeline.bundle import (
    Config,
    ModelBundle,
    TextEncoder,
    build,
    load_bundle,
    load_tokenizer,
    load_vae,
)
from sdcli.pipeline.device import pick_device
from sdcli.scheduler_config import check_config, prediction_type
from sdcli.specs import TrainSpec, TrainUnetSpec
from sdcli.training import checkpoint, data
from sdcli.training.loop import Preparing
from sdcli.training.order import Order

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}

PRESETS = Path(__file__).with_name("presets")
HASH_LENGTH = 12
PATIENCE = timedelta(days=1)  # of the other processes, while the first one reads pictures and fills caches


@dataclass(frozen=True)
class ModelParts:
    """All parts train-unet works with, and what its export inherits."""

    bundle: ModelBundle
    tokenizer: Path
    settings: Config
    origin: str


@dataclass(frozen=True)
class VaePart:
    """The VAE a run trains or stands on."""

    model: AutoencoderKL
    is_fresh: bool
    origin: str  # what it came from, for the run's identity


def accelerator_for(spec: TrainSpec) -> Accelerator:
    """The device, the precision and the processes of a run, as `accelerate launch` set them up.

    Raises UsageError where the device cannot do the precision, and as `pick_device`.
    """
    device = pick_device(spec.device)
    if device.type == "cpu" and spec.mixed_precision == "fp16":
        raise UsageError("--mixed-precision fp16: a CPU cannot train in it", "use bf16 or no")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(mixed_precision=spec.mixed_precision, cpu=device.type == "cpu", kwargs_handlers=[patience])


def preset(name: str) -> Config:
    """The configs of a model to be trained from scratch: a preset's, or those of a JSON file of the same form."""
    known = sorted(path.stem for path in PRESETS.glob("*.json"))
    path = PRESETS / f"{name}.json" if name in known else Path(name)
    if not path.is_file():
        raise UsageError(f"--init {name}: no such preset or file", f"use {', '.join(known)}, or a JSON file of configs")
    configs = read_json(path)
    missing = {"vae", "unet", "text_encoder", "scheduler"} - configs.keys()
    if missing:
        raise InputError(f"{path}: has no {min(missing)!r}", f"write it as in the presets {', '.join(known)}")
    return configs


def vae(spec: TrainSpec, device: torch.device) -> VaePart:
    """The VAE to train: fresh by `spec.init`, else the model's."""
    if spec.init is not None:
        configs = preset(spec.init)
        torch.manual_seed(spec.seed)
        model = cast("AutoencoderKL", build(configs["vae"]))
        return VaePart(model, is_fresh=True, origin=_origin(spec.init, configs))
    found = store.resolve(spec.model, offline=spec.offline)
    model = load_vae(found.folder, device=device, dtype=torch.float32).requires_grad_(True)
    return VaePart(model, is_fresh=False, origin=store.model_hash(found))


def model(spec: TrainUnetSpec, device: torch.device) -> ModelParts:
    """All parts that train-unet needs: those of a model, or fresh ones by `spec.init` around the VAE named."""
    parts = _from_scratch(spec, device) if spec.init is not None else _from_model(spec, device)
    if spec.prediction is not None:
        parts.bundle.scheduler_config["prediction_type"] = PREDICTION_TYPES[spec.prediction]
    _check_fit(parts.bundle)
    return parts


def resolution(spec: TrainSpec, native: object, factor: int) -> int:
    """The side of the training pictures in px: `spec.resolution`, else `native`, the model's own.

    Raises UsageError unless it is a multiple of the VAE factor, or where the model does not say its own.
    """
    side = spec.resolution if spec.resolution is not None else native
    if type(side) is not int or side < 1:
        raise UsageError(f"the model's own size is {native!r}", "say --resolution, in pixels")
    if side % factor:
        below = max(factor, side // factor * factor)
        raise UsageError(
            f"--resolution {side}: is no multiple of {factor}, which this VAE needs", f"use {below} or {below + factor}"
        )
    return side


@contextmanager
def opened(
    spec: TrainSpec, kind: str, dataset: data.Dataset, origin: str, accelerator: Accelerator
) -> Iterator[tuple[Path, str]]:
    """Own the run folder of these settings and this data; gives the folder and the hash its checkpoints carry.

    The first process owns it for all.
    """
    identity: dict[str, Any] = {**spec.identity(), "kind": kind, "data_hash": dataset.manifest_hash, "origin": origin}
    identity["processes"] = accelerator.num_processes
    config_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = spec.run if spec.run is not None else Path("runs") / f"{kind}-{config_hash[:HASH_LENGTH]}"
    with checkpoint.owned(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            checkpoint.open_run(folder, identity)
        accelerator.wait_for_everyone()
        yield folder, config_hash


def checked(dataset: data.Dataset, spec: TrainSpec, accelerator: Accelerator) -> Iterator[Preparing]:
    """Decode every picture once, in the first process, while the others wait. Raises InputError naming the bad ones."""
    if accelerator.is_main_process:
        for done in data.check(dataset, spec.workers):
            yield Preparing("reading pictures", done, len(dataset.pictures))
    accelerator.wait_for_everyone()


def order(spec: TrainSpec, accelerator: Accelerator, groups: Sequence[Sequence[int]]) -> Order:
    """The order of the batches of all processes together."""
    return Order(groups, batch_size=spec.batch_size * spec.accumulate * accelerator.num_processes, seed=spec.seed)


def _check_fit(bundle: ModelBundle) -> None:
    """Raise InputError unless the parts can be trained together."""
    check_config(bundle.scheduler_config)
    noise.alpha_bars(bundle.scheduler_config)
    if prediction_type(bundle.scheduler_config) not in PREDICTION_TYPES.values():
        raise InputError(
            f"prediction_type: {prediction_type(bundle.scheduler_config)!r} cannot be trained", "use --prediction"
        )
    channels, unet = int(bundle.vae.config["latent_channels"]), bundle.unet.config
    for key in ("in_channels", "out_channels"):
        if unet[key] != channels:
            raise InputError(
                f"unet: {key} is {unet[key]}, the VAE has {channels} channels", "use another --vae or model"
            )
    text = bundle.conditioner
    if not isinstance(text, TextEncoder):
        raise InputError("class_embedder: train-unet trains with captions", "start from a model with a text encoder")
    width, given = int(text.model.config.hidden_size), unet["cross_attention_dim"]
    if width != given:
        raise InputError(f"unet: reads context of width {given}, the text encoder gives {width}", "mend the configs")
    pieces, known = len(text.tokenizer), int(text.model.config.vocab_size)
    if pieces > known:
        raise InputError(f"text_encoder: knows {known:,} tokens, the tokenizer has {pieces:,}", "mend the configs")


def _from_model(spec: TrainUnetSpec, device: torch.device) -> ModelParts:
    found = store.resolve(spec.model, offline=spec.offline)
    bundle = load_bundle(found.folder, device=device, dtype=torch.float32)
    origin = store.model_hash(found)
    if spec.vae is not None:
        bundle = replace(bundle, vae=_named_vae(spec.vae, device, spec.offline))
        origin += weights_hash(bundle.vae)
    return ModelParts(bundle, found.folder / "tokenizer", store.settings(found), origin)


def _from_scratch(spec: TrainUnetSpec, device: torch.device) -> ModelParts:
    assert spec.init is not None and spec.vae is not None  # TrainUnetSpec refuses one without the other
    configs = preset(spec.init)
    torch.manual_seed(spec.seed)
    unet = cast("UNet2DConditionModel", build(configs["unet"]).to(device))
    text = TextEncoder(load_tokenizer(store.TOKENIZER_FOLDER), cast("CLIPTextModel", build(configs["text_encoder"])))
    torch.nn.Module.to(text.model, device)  # transformers wraps `to` in a way that loses its type
    vae = _named_vae(spec.vae, device, spec.offline)
    bundle = ModelBundle(vae, unet, text, configs["scheduler"], device, torch.float32)
    return ModelParts(
        bundle,
        store.TOKENIZER_FOLDER,
        configs.get("settings", {}),
        f"{_origin(spec.init, configs)} {weights_hash(vae)}",
    )


def _named_vae(ref: str, device: torch.device, offline: bool) -> AutoencoderKL:
    """A VAE by a folder that holds `vae/` (a model, or the export of train-vae), or by a model reference."""
    folder = Path(ref) if (Path(ref) / "vae").is_dir() else store.resolve(ref, offline=offline).folder
    return load_vae(folder, device=device, dtype=torch.float32)


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
