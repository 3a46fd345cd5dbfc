"""Tiny Stable Diffusions with random weights, written by diffusers' and transformers' own `save_pretrained`.

Nothing here goes through our reader or writer, so that what the tests compare with is independent of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Weights = dict[str, Tensor]

TOKENIZER = Path(__file__).parents[1] / "sdcli" / "builtin" / "model" / "tokenizer"
SIZE = 32  # px
FACTOR = 2  # pixels per latent along a side
LATENTS = (4, 16, 16)
CONTEXT = 16  # width of the text encoder, or of the class embedder
CONTEXT_2, POOLED = 24, 20  # of Stable Diffusion XL's second text encoder: its width, and that of its projection
TIME_WIDTH = 8  # of the embedding of each of Stable Diffusion XL's six numbers about sizes
CLASSES = ("cat", "dog", "0", "sea urchin, echinoid")

# As published with Stable Diffusion 1.5 and 2.1, keys that their own class does not know included.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STEPPING = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD1_SCHEDULER = {"_class_name": "PNDMScheduler", **BETAS, **STEPPING}
LEARNED_SCHEDULER = {"_class_name": "DDPMScheduler", **BETAS, **STEPPING, "variance_type": "learned_range"}
SD2_SCHEDULER = {"_class_name": "DDIMScheduler", **BETAS, **STEPPING, "prediction_type": "v_prediction"}
SDXL_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", **BETAS, **STEPPING, "timestep_spacing": "leading"}


def write_sd1(folder: Path, *, seed: int = 0, scaling_factor: float = 0.18215) -> Path:
    """A model shaped like Stable Diffusion 1.x: epsilon prediction, one number of heads, padded with its end mark."""
    torch.manual_seed(seed)
    unet = _unet(attention_head_dim=2)
    return _write(folder, unet, _vae(scaling_factor), _text_encoder("quick_gelu"), SD1_SCHEDULER)


def write_sd2(folder: Path, *, seed: int = 0) -> Path:
    """A model shaped like Stable Diffusion 2.x: v prediction, heads per level, linear projections, "!" as padding."""
    torch.manual_seed(seed)
    unet = _unet(attention_head_dim=[1, 2], use_linear_projection=True)
    _write(folder, unet, _vae(0.18215), _text_encoder("gelu"), SD2_SCHEDULER)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder / "tokenizer" / name, pad_token="!")
    return folder


def write_sdxl(folder: Path, *, seed: int = 0, in_channels: int = LATENTS[0]) -> Path:
    """A model shaped like Stable Diffusion XL: two text encoders, the UNet told of their summary and of sizes, too.

    in_channels: of the UNet; 9 make a model for inpainting.
    """
    torch.manual_seed(seed)
    whole = StableDiffusionXLPipeline(
        vae=_vae(0.13025),  # its config says force_upcast, too
        text_encoder=_text_encoder("quick_gelu", layers=4),
        text_encoder_2=_text_encoder_2(),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=_unet_xl(in_channels),
        scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    _save(whole, folder, SDXL_SCHEDULER)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder / "tokenizer_2" / name, pad_token="!")
    return folder


def write_learned(folder: Path, *, seed: int = 0) -> Path:
    """A model like that of `write_sd1` whose UNet predicts variances, too, in channels of their own."""
    torch.manual_seed(seed)
    unet = _unet(attention_head_dim=2, out_channels=2 * LATENTS[0])
    return _write(folder, unet, _vae(0.18215), _text_encoder("quick_gelu"), LEARNED_SCHEDULER)


def write_inpainting(folder: Path, *, seed: int = 0) -> Path:
    """A model like that of `write_sd1` whose UNet reads a mask and a masked picture beside the latents."""
    torch.manual_seed(seed)
    unet = _unet(attention_head_dim=2, in_channels=2 * LATENTS[0] + 1)
    return _write(folder, unet, _vae(0.18215), _text_encoder("quick_gelu"), SD1_SCHEDULER)


def write_classes(folder: Path, *, names: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """The model of `write_sd1` with a class embedder in place of its text encoder; without names, unconditional."""
    write_sd1(folder, seed=seed)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    table = torch.randn(len(names) + 1, CONTEXT, generator=torch.Generator().manual_seed(seed))
    config = {"_class_name": "ClassEmbedder", "width": CONTEXT, "names": list(names)}
    (folder / "class_embedder").mkdir()
    save_file({"embedding.weight": table}, folder / "class_embedder" / "diffusion_pytorch_model.safetensors")
    (folder / "class_embedder" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {"text_encoder": ..., "tokenizer": ..., "class_embedder": ["sdcli", "ClassEmbedder"]}
    edit_json(folder / "model_index.json", **index)
    return folder


def write_lora(path: Path, folder: Path, *, gain: float = 1.0, alpha: float = 2.0) -> Path:
    """A LoRA of rank 4 in kohya's form for the attention of a model's UNet and of its text encoders, if it has any."""
    chance, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    is_xl = (folder / "text_encoder_2").is_dir()
    for part, prefix, ends in (
        ("unet", "lora_unet_", ("to_q", "to_v")),
        ("text_encoder", "lora_te1_" if is_xl else "lora_te_", ("q_proj", "out_proj")),
        ("text_encoder_2", "lora_te2_", ("q_proj", "out_proj")),
    ):
        weights = load_file(weight_file(folder / part)) if (folder / part).is_dir() else {}
        for key, weight in weights.items():
            name = key.removesuffix(".weight")
            if not name.endswith(ends):
                continue
            text = "text_model." if part != "unet" and not name.startswith("text_model.") else ""
            stem = prefix + (text + name).replace(".", "_")
            out, inputs = weight.shape
            tensors[f"{stem}.lora_down.weight"] = torch.randn(4, inputs, generator=chance)
            tensors[f"{stem}.lora_up.weight"] = gain * torch.randn(out, 4, generator=chance)
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of `...` removes its key."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Rewrite the weight file of one part of a model."""
    path = weight_file(folder)
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


def weight_file(folder: Path) -> Path:
    """The one weight file of a part."""
    (path,) = folder.glob("*.safetensors")
    return path


def copy(folder: Path, target: Path, *, without: str = "") -> Path:
    """A copy of a model that a test may spoil. without: a pattern of names that are left out."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns(without)))


def hub_cache(folder: Path, cache: Path, repo: str, *, revision: str = "main") -> Path:
    """Lay a model out as huggingface_hub's cache does: blobs, and a snapshot of links to them. Returns the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, blob)
        link = root / "snapshots" / commit / source.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit, encoding="utf-8")
    return root / "snapshots" / commit


def share(link: Path) -> Path:
    """Have the content that a link of a snapshot leads to in the store that all repositories of the cache share."""
    blob = link.resolve()
    store = blob.parents[2] / "blobs"
    content = store / "ab" / ("ab" * 32)
    content.parent.mkdir(parents=True, exist_ok=True)
    (store / ".huggingface-shared-blobs").write_text("1\n", encoding="utf-8")
    content.with_name(f"{content.name}.refs").write_text(f"{blob.relative_to(store.parent)}\n", encoding="utf-8")
    blob.rename(content)
    blob.symlink_to(os.path.relpath(content, blob.parent))
    return content


def pipeline(folder: Path | str, **how: Path | None) -> StableDiffusionPipeline:
    """diffusers' own pipeline over a folder or a Hub id in `cache_dir`, without the parts that are None: the oracle."""
    loaded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True, **how)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def pipeline_xl(
    folder: Path, kind: type[DiffusionPipeline] = StableDiffusionXLPipeline, **parts: None
) -> DiffusionPipeline:
    """The same over a folder of Stable Diffusion XL. kind: which of diffusers' pipelines for it."""
    loaded = kind.from_pretrained(folder, local_files_only=True, add_watermarker=False, **parts)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _unet(**kind: Any) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        norm_num_groups=2,
        **kind,
    )
    return _listening(unet)


def _unet_xl(in_channels: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        in_channels=in_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[1, 2],
        cross_attention_dim=CONTEXT + CONTEXT_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + POOLED,
        norm_num_groups=2,
    )
    for module in (unet.add_embedding.linear_1, unet.add_embedding.linear_2):
        _scale(module, 3.0)
    return _listening(unet)


def _listening(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    # As drawn, the weights hardly listen to the prompt: no wrong guidance or solver would show in the picture.
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
            _scale(module, 3.0)
    _scale(unet.conv_out, 2.0)
    return unet


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=LATENTS[0],
        norm_num_groups=2,
        sample_size=SIZE,
        scaling_factor=scaling_factor,
    )


def _text_encoder(activation: str, *, layers: int = 2) -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=CONTEXT,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModel(config)


def _text_encoder_2() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=CONTEXT_2,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=POOLED,
        hidden_act="gelu",
        bos_token_id=0,  # as published: these three are wrong, and nothing may hang on them
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


@torch.no_grad()
def _scale(module: nn.Module, gain: float) -> None:
    for parameter in module.parameters():
        parameter.mul_(gain)


def _write(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    scheduler_config: dict[str, Any],
) -> Path:
    whole = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet,
        scheduler=PNDMScheduler.from_config(scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(whole, folder, scheduler_config)


def _save(
    whole: StableDiffusionPipeline | StableDiffusionXLPipeline, folder: Path, scheduler_config: dict[str, Any]
) -> Path:
    whole.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config), encoding="utf-8")
    edit_json(folder / "model_index.json", scheduler=["diffusers", scheduler_config["_class_name"]])
    # transformers 5 writes one tokenizer.json; the published models carry the vocabulary and the merges.
    for tokenizer in folder.glob("tokenizer*"):
        shutil.rmtree(tokenizer)
        shutil.copytree(TOKENIZER, tokenizer)
    return folder
