"""What a LoRA file changes is told by its keys and shapes alone, and nothing in it is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdcli.errors import InputError
from sdcli.pipeline.lora_keys import changes, read_header
from sdcli.pipeline.lora_names import known_names, layers_of, original_names

Shapes = dict[str, tuple[int, ...]]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
FLAT = f"lora_unet_{BLOCK.replace('.', '_')}"
LAYERS: dict[str, Shapes] = {
    "unet": {f"{BLOCK}.attn2.to_k": (320, 768), f"{BLOCK}.attn1.to_q": (320, 320), "conv_in": (320, 4, 3, 3)},
    "text_encoder": {"encoder.layers.0.self_attn.q_proj": (768, 768)},
}


def pair(stem: str, inputs: int = 320, outputs: int = 320, rank: int = 4) -> Shapes:
    return {f"{stem}.lora_down.weight": (rank, inputs), f"{stem}.lora_up.weight": (outputs, rank)}


def refused(shapes: Shapes, metadata: dict[str, str] | None = None, layers: Any = None) -> InputError:
    with pytest.raises(InputError) as caught:
        changes("a.safetensors", shapes, metadata or {}, layers or LAYERS)
    assert str(caught.value).startswith("a.safetensors: ") and caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        (
            pair(f"{FLAT}_attn2_to_k", 1024),
            "for a context 1024 wide (Stable Diffusion 2.x), the model's is 768 wide (St",
        ),
        (pair(f"{FLAT}_attn2_to_k", 2048), "for a context 2048 wide (Stable Diffusion XL), the model's is 768"),
        (pair(f"unet.{BLOCK}.attn2.to_k", 192), "for a context 192 wide (the embedded model), the model's is"),
        (pair("lora_te_text_model_encoder_layers_22_self_attn_q_proj", 1024), "for a context 1024 wide (Stable Diff"),
        (pair("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"), "it is for Stable Diffusion XL"),
        (pair("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"), "it is for Stable Diffusion XL"),
        (pair("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"), "it is for Stable Diffusion XL"),
        (pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"), "it is for Stable Diffusion XL"),
        (pair("lora_unet_joint_blocks_0_x_block_attn_qkv"), "it is for Stable Diffusion 3"),
        (pair("lora_unet_double_blocks_0_img_attn_proj"), "it is for a transformer such as Flux"),
        (pair("transformer.single_transformer_blocks.0.attn.to_q"), "it is for a transformer such as Flux"),
    ],
)
def test_a_file_for_another_family_is_refused_naming_it(shapes: Shapes, family: str) -> None:
    assert family in str(refused(shapes))


XL_BLOCK = "down_blocks.1.attentions.0.transformer_blocks.1"
XL_LAYERS: dict[str, Shapes] = {
    "unet": {f"{XL_BLOCK}.attn2.to_k": (640, 2048), f"{XL_BLOCK}.attn1.to_q": (640, 640)},
    "text_encoder": {"encoder.layers.0.self_attn.q_proj": (768, 768)},
    "text_encoder_2": {"encoder.layers.0.self_attn.q_proj": (1280, 1280), "text_projection": (1280, 1280)},
}


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        (
            pair(f"unet.{BLOCK}.attn2.to_k", 768),
            "context 768 wide (Stable Diffusion 1.x), the model's is 2048 wide (Stable Diffusion XL); use one that",
        ),
        (pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768), "it is for Stable Diffusion 1.x; use"),
        (pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 768), "it is for Stable Diffusion 1.x or 2.x"),
        (
            pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1024),
            "is for a context 1024 wide (Stable Diffusion 2.x), the model's is 768 wide (Stable Diffusion XL)",
        ),
        (pair(f"{FLAT}_attn1_to_q"), "it is for Stable Diffusion 1.x or 2.x"),
        (pair("lora_unet_input_blocks_1_1_proj_in"), "it is for Stable Diffusion 1.x or 2.x"),
        (pair("lora_unet_output_blocks_9_1_proj_in"), "it is for Stable Diffusion 1.x or 2.x"),
        (pair("lora_te3_encoder_block_0"), "it is for Stable Diffusion 3"),
        (
            pair("lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_q"),
            "attn1_to_q.lora_up.weight); use",
        ),
    ],
)
def test_a_file_for_another_family_than_xl_is_refused_naming_it(shapes: Shapes, family: str) -> None:
    assert family in str(refused(shapes, layers=XL_LAYERS))


@pytest.mark.parametrize(
    ("stem", "part", "layer"),
    [
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder", "encoder.layers.0.self_attn.q_proj"),
        (
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
            "text_encoder_2",
            "encoder.layers.0.self_attn.q_proj",
        ),
        ("lora_te2_text_projection", "text_encoder_2", "text_projection"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder",
            "encoder.layers.0.self_attn.q_proj",
        ),
        ("text_encoder_2.text_projection", "text_encoder_2", "text_projection"),
        (f"unet.{XL_BLOCK}.attn1.to_q", "unet", f"{XL_BLOCK}.attn1.to_q"),
    ],
)
def test_each_encoder_of_xl_has_names_of_its_own(stem: str, part: str, layer: str) -> None:
    outputs, inputs = XL_LAYERS[part][layer]
    (change,) = changes("a", pair(stem, inputs, outputs), {}, XL_LAYERS)
    assert (change.part, change.layer) == (part, layer)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{FLAT}_attn1_to_q.oft_blocks", "OFT"),
        (f"{FLAT}_attn1_to_q.oft_diag", "OFT"),
        (f"{FLAT}_attn1_to_q.boft_R", "BOFT"),
        (f"{FLAT}_attn1_to_q.on_input", "IA3"),
        (f"{FLAT}_attn1_to_q.a1.weight", "GLoRA"),
        (f"{FLAT}_attn1_to_q.diff", "full differences of weights"),
        (f"{FLAT}_attn1_to_q.diff_b", "full differences of weights"),
        (f"{FLAT}_norm1.w_norm", "norms"),
        (f"unet.{BLOCK}.attn1.to_q.lora_B.bias", "biases beside LoRA"),
        ("bundle_emb.cat.string_to_param.*", "textual inversions in a bundle"),
        (f"base_model.model.{BLOCK}.attn1.to_q.lora_A.weight", "peft's own naming, whose alpha is in another file"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(key: str, kind: str) -> None:
    error = refused({key: (4, 4), **pair(f"{FLAT}_attn1_to_q")})
    assert f"holds {kind}, in 1 of 3 tensors ({key})" in error.message
    assert error.hint == "read are LoRA, LoCon, DoRA, LoHa and LoKr"


def test_what_belongs_to_no_layer_is_counted_with_examples() -> None:
    lost = {f"lora_unet_up_{number}.alpha": () for number in range(5)}
    said = refused({**pair(f"{FLAT}_attn1_to_q"), **lost}).message
    assert "5 of 7 tensors belong to no layer of the model (lora_unet_up_0.alpha, lora_unet_up_1.alpha, lor" in said
    assert said.endswith("lora_unet_up_2.alpha, ...)")


def test_what_a_file_says_of_its_model_is_told_where_nothing_else_tells() -> None:
    said = refused(pair("lora_unet_strange"), {"ss_base_model_version": "sd_v2_v\n"}).message
    assert said.endswith("it says that it is for 'sd_v2_v\\n'")


def test_a_model_of_classes_has_no_text_encoder_to_change() -> None:
    shapes = pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768)
    assert "the model has no text encoder" in str(refused(shapes, layers={"unet": {"conv_in": (320, 4, 3, 3)}}))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({}, "is no LoRA file: it holds nothing"),
        ({"emb_params": (2, 768)}, "is no LoRA file: it holds emb_params; give a textual inversion to --embedding"),
        (dict.fromkeys((f"{i}.weight" for i in range(9)), (1,)), "0.weight, 1.weight, 2.weight, ...; name a LoRA"),
        (pair(f"{FLAT}_attn1_to_q", rank=0), "down (0, 320), up (320, 0) make no change of (320, 320)"),
        (pair(f"{FLAT}_attn1_to_q", rank=5000), "has rank 5,000; at most 4,096 is read"),
        (pair(f"{FLAT}_attn1_to_q", 640), "down (4, 640), up (320, 4) make no change of (320, 320)"),
        (pair(f"{FLAT}_attn1_to_q", outputs=321), "make no change of (320, 320)"),
        ({f"{FLAT}_attn1_to_q.lora_down.weight": (4, 320)}, "attn1.to_q: down make no whole change"),
        ({f"{FLAT}_attn1_to_q.alpha": ()}, "attn1.to_q: alpha make no whole change"),
        ({**pair(f"{FLAT}_attn1_to_q"), f"{FLAT}_attn1_to_q.alpha": (2,)}, "alpha has shape (2,); expected is one nu"),
        (
            {**pair(f"{FLAT}_attn1_to_q"), f"{FLAT}_attn1_to_q.dora_scale": (3, 1)},
            "DoRA's magnitudes have shape (3, 1)",
        ),
        ({**pair(f"{FLAT}_attn1_to_q"), **pair(f"unet.{BLOCK}.attn1.to_q")}, "changes the layer " + BLOCK),
        ({**pair(f"{FLAT}_attn1_to_q"), f"{FLAT}_attn1_to_q.lokr_w1": (3, 1)}, "changes the layer " + BLOCK),
        ({f"{FLAT}_attn1_to_q.lokr_w1": (3, 4), f"{FLAT}_attn1_to_q.lokr_w2": (80, 80)}, "make no change of (320, 320"),
        ({f"{FLAT}_attn1_to_q.hada_w1_a": (3, 4)}, "w1_a make no whole change"),
        ({f"{i}.alpha": () for i in range(20_001)}, "holds 20,001 tensors"),
    ],
)
def test_a_malformed_file_is_refused(shapes: Shapes, said: str) -> None:
    assert said in str(refused(shapes))


@pytest.mark.parametrize(
    "said", ["{", "[]", "3", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {".*": 3}}', "[" * 100_000]
)
def test_metadata_that_would_give_another_alpha_are_refused(said: str) -> None:
    error = refused(pair(f"unet.{BLOCK}.attn1.to_q"), {"lora_adapter_metadata": said})
    assert "its lora_adapter_metadata cannot be read" in error.message


@pytest.mark.parametrize(
    ("said", "alpha", "is_root"),
    [
        ({"unet.lora_alpha": 8}, 8, False),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8, True),
        ({"lora_alpha": 8}, 8, False),
        ({"text_encoder.lora_alpha": 8}, None, False),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 2, False),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^attn1.to_q": 2}}, 8, False),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{BLOCK}.attn1.to_q$": 2}}, 2, False),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}}, 8, False),
    ],
)
def test_diffusers_metadata_tell_alpha(said: dict[str, Any], alpha: float | None, is_root: bool) -> None:
    shapes = pair(f"unet.{BLOCK}.attn1.to_q")
    (change,) = changes("a", shapes, {"lora_adapter_metadata": json.dumps(said)}, LAYERS)
    assert (change.alpha, change.is_root, change.rank) == (alpha, is_root, 4)


def test_names_of_sd15_are_those_in_published_files_and_no_two_layers_share_one() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):  # the defaults of diffusers are Stable Diffusion 1.x but for the context's width
        unet = UNet2DConditionModel(cross_attention_dim=768)
    layers = {"unet": layers_of({name: tuple(one.shape) for name, one in unet.named_parameters()})}
    names = known_names(layers)
    block = "transformer_blocks.0"
    for name, layer in {
        f"lora_unet_input_blocks_4_1_{block}_attn1_to_q": f"down_blocks.1.attentions.0.{block}.attn1.to_q",
        "lora_unet_output_blocks_3_1_proj_in": "up_blocks.1.attentions.0.proj_in",
        "lora_unet_output_blocks_8_2_conv": "up_blocks.2.upsamplers.0.conv",
        "lora_unet_output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_input_blocks_9_0_op": "down_blocks.2.downsamplers.0.conv",
        "lora_unet_middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "diffusion_model.middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
        f"lora_unet_up_blocks_3_attentions_2_{block}_ff_net_0_proj": f"up_blocks.3.attentions.2.{block}.ff.net.0.proj",
    }.items():
        assert names[name if name.startswith("diffusion_model") else name.replace(".", "_")] == ("unet", layer)
    assert set(original_names(layers["unet"])) == set(layers["unet"])
    assert len(names) == 6 * len(layers["unet"])  # unet., alone, kohya's, LyCORIS's, and the original in two ways


def test_names_of_sdxl_are_those_in_published_files_and_no_two_layers_share_one() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 3),  # of ten a level, but for the time that takes
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    layers = {"unet": layers_of({name: tuple(one.shape) for name, one in unet.named_parameters()})}
    names = known_names(layers | {"text_encoder": {}, "text_encoder_2": {}})
    for name, layer in {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_input_blocks_8_1_transformer_blocks_2_ff_net_2": (
            "down_blocks.2.attentions.1.transformer_blocks.2.ff.net.2"
        ),
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0": (
            "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0"
        ),
        "lora_unet_output_blocks_0_1_proj_in": "up_blocks.0.attentions.0.proj_in",
        "lora_unet_output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_input_blocks_0_0": "conv_in",
        "lora_unet_label_emb_0_0": "add_embedding.linear_1",
        "lora_unet_label_emb_0_2": "add_embedding.linear_2",
        "lora_unet_time_embed_2": "time_embedding.linear_2",
        "lora_unet_out_2": "conv_out",
    }.items():
        assert names[name] == ("unet", layer)
    assert set(original_names(layers["unet"])) == set(layers["unet"])
    assert len(names) == 6 * len(layers["unet"])


@pytest.mark.parametrize("shape", [None, "x", [-1], [1.5], [True], [1 << 40]])
def test_a_header_with_a_shape_that_is_none_is_refused(tmp_path: Path, shape: Any) -> None:
    header = json.dumps({"a.alpha": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match=r"a: its safetensors header makes no sense: a\.alpha"):
        read_header(tmp_path / "a")


def test_the_header_tells_shapes_and_metadata(tmp_path: Path) -> None:
    save_file({"x.alpha": torch.tensor(1.0), "y": torch.zeros(2, 3)}, tmp_path / "a", {"ss_network_dim": "4"})
    assert read_header(tmp_path / "a") == ({"x.alpha": (), "y": (2, 3)}, {"ss_network_dim": "4"})
