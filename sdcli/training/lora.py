"""Low-rank adapters (LoRA): put beside the frozen layers of a model, and written in the dialects other programs read.

Source: Hu et al. 2021, arXiv:2106.09685: W x + alpha / rank * B A x.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sdcli.files import atomic_write
from sdcli.layout import with_sorted_header
from sdcli.original.names import TEXT_PREFIX

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
KOHYA_FILE = "lora-kohya.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps what the keys do not say


def adapt(module: nn.Module, targets: list[str], *, rank: int, alpha: float, seed: int) -> None:
    """Freeze a module and put adapters, which alone learn, beside its attention layers; at first they add nothing."""
    from peft import LoraConfig, inject_adapter_in_model  # deferred: 1.3 s, and only this trainer needs it

    module.requires_grad_(False)
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=cast("int", alpha), target_modules=targets), module)


def write(
    folder: Path, unet: nn.Module, text: nn.Module | None, *, rank: int, alpha: float, dtype: torch.dtype
) -> None:
    """Write the adapters into a folder twice: as diffusers reads them and as kohya's scripts and most programs do.

    text: the text encoder, if it has adapters too.
    """
    diffusers: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    metadata: dict[str, object] = {}
    parts = [("unet", "lora_unet", "", unet, UNET_TARGETS)]
    if text is not None:
        parts.append(("text_encoder", "lora_te", TEXT_PREFIX, text, TEXT_TARGETS))
    for part, kohya_part, prefix, module, targets in parts:
        facts = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        metadata |= {f"{part}.{key}": value for key, value in facts.items()}
        for name, down, up in _adapters(module, dtype):
            diffusers[f"{part}.{prefix}{name}.lora_A.weight"] = down
            diffusers[f"{part}.{prefix}{name}.lora_B.weight"] = up
            key = f"{kohya_part}_{(prefix + name).replace('.', '_')}"
            kohya |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            kohya[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    said = {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    with atomic_write(folder / DIFFUSERS_FILE) as path:
        path.write_bytes(with_sorted_header(save(diffusers, said)))
    said = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
    with atomic_write(folder / KOHYA_FILE) as path:
        path.write_bytes(with_sorted_header(save(kohya, {**said, "ss_network_alpha": str(alpha)})))


def _adapters(module: nn.Module, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    """Every adapted layer's name with its A (rank, in) and B (out, rank)."""
    learned = {name: value for name, value in module.named_parameters() if ".lora_" in name}
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in learned.items()}
    ending = ".lora_A.default.weight"
    names = [name.removesuffix(ending) for name in weights if name.endswith(ending)]
    return [(name, weights[name + ending], weights[f"{name}.lora_B.default.weight"]) for name in names]
