"""What a LoRA or textual-inversion file is, is told from its header alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdcli.errors import InputError
from sdcli.pipeline.adapter_facts import describe

TO_K = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(stem: str, rank: int = 4, inputs: int = 768) -> dict[str, Tensor]:
    down, up = torch.ones(rank, inputs), torch.ones(320, rank)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}


def facts(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Any:
    save_file(tensors, path, metadata)
    return describe(path)


def test_a_kohya_file_says_ranks_alphas_parts_family_and_what_it_was_trained_on(tmp_path: Path) -> None:
    tensors = pair(f"lora_unet_{TO_K}") | pair("lora_unet_mid_block", 8, 320) | pair("lora_te_x", 4, 320)
    tensors["lora_te_x.dora_scale"] = torch.ones(320, 1)
    said = {"ss_base_model_version": "sd_v1", "ss_output_name": "my style", "ss_network_module": "networks.lora"}
    assert facts(tmp_path / "a", tensors, said) == {
        "kind": "LoRA",
        "dialects": ["kohya"],
        "forms": ["LoRA", "DoRA"],
        "ranks": {"4": 2, "8": 1},
        "alphas": {"2": 3},
        "layers": {"unet": 2, "text_encoder": 1},
        "tensors": 10,
        "family": "Stable Diffusion 1.x",
        "base_model": "sd_v1",
        "title": "my style",
        "trigger": None,
        "trained_by": "networks.lora",
    }


@pytest.mark.parametrize(
    ("key", "dialect", "part"),
    [
        ("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", "kohya, in the original naming", "unet"),
        ("unet.conv_in.lora_A.weight", "diffusers", "unet"),
        ("conv_in.lora_A.weight", "diffusers", "unet"),
        ("lora_te2_x.lora_up.weight", "kohya", "text_encoder_2"),
        ("lora_te1_x.lora_up.weight", "kohya", "text_encoder"),
        ("lycoris_conv_in.lokr_w1", "LyCORIS", "unet"),
        ("diffusion_model.out.2.lora_up.weight", "ComfyUI", "unet"),
        ("text_encoders.clip_l.transformer.text_model.x.lora_up.weight", "ComfyUI", "text_encoder"),
        ("text_encoders.clip_g.transformer.text_model.x.lora_up.weight", "ComfyUI", "text_encoder_2"),
    ],
)
def test_each_dialect_is_known_by_its_keys(tmp_path: Path, key: str, dialect: str, part: str) -> None:
    found = facts(tmp_path / "a", {key: torch.ones(2, 2)})
    assert (found["dialects"], found["layers"]) == ([dialect], {part: 1})


@pytest.mark.parametrize(
    ("key", "width", "family"),
    [
        (f"lora_unet_{TO_K}", 2048, "Stable Diffusion XL"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", 1280, "Stable Diffusion XL"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 1280, "Stable Diffusion XL"),
        ("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q", 1280, "Stable Diffusion XL"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1024, "Stable Diffusion 2.x"),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.0.self_attn.q_proj", 1024, "Stable Diffusion 2.x"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj", 1280, "Stable Diffusion XL"),
        (f"lora_unet_{TO_K}", 40, None),
    ],
)
def test_the_family_is_told_by_widths_and_names(tmp_path: Path, key: str, width: int, family: str | None) -> None:
    assert facts(tmp_path / "a", pair(key, 4, width))["family"] == family


def test_diffusers_metadata_and_modelspec_are_told(tmp_path: Path) -> None:
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 4}), "modelspec.title": "x" * 999}
    said["modelspec.trigger_phrase"] = "my cat"
    found = facts(tmp_path / "a", {"unet.conv_in.lora_A.weight": torch.ones(4, 2)}, said)
    assert (found["alphas"], found["title"], found["trigger"]) == ({"8": 1}, "x" * 200, "my cat")


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"<cat>": torch.ones(3, 768)}, (["diffusers"], 3, 768, "Stable Diffusion 1.x", "<cat>")),
        ({"<cat>": torch.ones(1024)}, (["diffusers"], 1, 1024, "Stable Diffusion 2.x", "<cat>")),
        ({"emb_params": torch.ones(2, 77)}, (["kohya"], 2, 77, None, None)),
        (
            {"text_encoders_0": torch.ones(2, 768), "text_encoders_1": torch.ones(2, 1280)},
            (["a pair for two text encoders"], 2, [768, 1280], "Stable Diffusion XL", None),
        ),
        (
            {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)},
            (["a pair for two text encoders"], 2, [768, 1280], "Stable Diffusion XL", None),
        ),
    ],
)
def test_textual_inversions_of_every_dialect_are_told(
    tmp_path: Path, tensors: dict[str, Tensor], expected: tuple[Any, ...]
) -> None:
    found = facts(tmp_path / "a", tensors)
    assert found["kind"] == "textual inversion"
    assert (*(found[key] for key in ("dialects", "vectors", "width", "family")), found.get("token")) == expected


def test_other_files_are_neither(tmp_path: Path) -> None:
    assert facts(tmp_path / "a", {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}) is None
    assert facts(tmp_path / "b", {"a.weight": torch.ones(2, 2, 2)}) is None
    (tmp_path / "c").write_bytes(b"PK\3\4 and more")
    assert describe(tmp_path / "c") is None


@pytest.mark.parametrize("place", [1 << 62, 40_000, -4, 1.5, None])
def test_an_alpha_that_lies_nowhere_is_refused(tmp_path: Path, place: Any) -> None:
    header = {"x.lora_up.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header["x.alpha"] = {"dtype": "F32", "shape": [], "data_offsets": [place, 4]}
    data = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with pytest.raises(InputError, match=r"its safetensors header makes no sense: x\.alpha"):
        describe(tmp_path / "a")


def test_a_header_spoiled_anywhere_is_told_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    facts(path, pair(f"lora_unet_{TO_K}"), {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'})
    whole, chance, refused = path.read_bytes(), random.Random(7), 0
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(8, end)] = chance.choice(b'0123456789"{}[],:-.eatn') if chance.random() < 0.7 else 200
        path.write_bytes(data)
        try:
            describe(path)
        except InputError:
            refused += 1
    assert 100 < refused < 400
