"""A single file is named as what it is, from its header alone; what is said of it agrees with the published configs."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import save_file
from torch import Tensor

from sdcli.errors import InputError
from sdcli.headers import Entry, Header
from sdcli.original.checkpoint import Checkpoint, read_checkpoint, recognise
from tests import originals

# As published with Stable Diffusion 1.5 and 2.1 in the diffusers layout, where they differ from diffusers' defaults.
SD15_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
    "in_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "use_linear_projection": False,
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "use_linear_projection": True,
}
SDXL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "sample_size": 128,
    "in_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_TEXT_2 = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "pad_token_id": 0,
}
SD_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
SD21_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
V = {"modelspec.prediction_type": "v"}


def header(shapes: originals.Shapes, metadata: dict[str, str] | None = None) -> Header:
    return Header({key: Entry("F16", shape, 0, 0) for key, shape in shapes.items()}, metadata or {})


def recognised(shapes: originals.Shapes, metadata: dict[str, str] | None = None) -> Checkpoint:
    return recognise(Path("none.safetensors"), header(shapes, metadata))


@pytest.mark.parametrize(
    ("kind", "family", "unet", "text"),
    [
        (originals.REAL_SD1, "Stable Diffusion 1.x", SD15_UNET, SD15_TEXT),
        (originals.REAL_SD2, "Stable Diffusion 2.x", SD21_UNET, SD21_TEXT),
        (
            replace(originals.REAL_SD1, in_channels=9),
            "Stable Diffusion 1.x inpainting",
            SD15_UNET | {"in_channels": 9},
            SD15_TEXT,
        ),
        (
            replace(originals.REAL_SD2, in_channels=9),
            "Stable Diffusion 2.x inpainting",
            SD21_UNET | {"in_channels": 9},
            SD21_TEXT,
        ),
    ],
)
def test_the_published_configs_come_from_names_and_shapes(
    kind: originals.Kind, family: str, unet: dict[str, Any], text: dict[str, Any]
) -> None:
    found = recognised(originals.shapes(kind), V if kind.version == 2 else None)
    assert (found.family, found.lacks, found.strangers) == (family, (), ())
    for part, expected in (("unet", unet), ("vae", SD_VAE), ("text_encoder", text)):
        assert {key: found.configs[part][key] for key in expected} == expected
    assert found.scheduler["prediction_type"] == ("v_prediction" if kind.version == 2 else "epsilon")


def test_the_published_configs_of_xl_come_from_names_and_shapes() -> None:
    found = recognised(originals.shapes(originals.REAL_SDXL) | dict.fromkeys(originals.leftovers(originals.SDXL), (1,)))
    assert (found.family, found.lacks, found.strangers) == ("Stable Diffusion XL", (), ())
    vae = SD_VAE | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}
    parts = {"unet": SDXL_UNET, "vae": vae, "text_encoder": SD15_TEXT, "text_encoder_2": SDXL_TEXT_2}
    for part, expected in parts.items():
        assert {key: found.configs[part][key] for key in expected} == expected
    assert found.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert (found.scheduler["timestep_spacing"], found.scheduler["prediction_type"]) == ("leading", "epsilon")
    assert found.pad_tokens == {"text_encoder": "<|endoftext|>", "text_encoder_2": "!"}


def test_marks_of_v_and_of_zero_terminal_snr_are_those_of_xl_too() -> None:
    found = recognised(originals.shapes(originals.REAL_SDXL) | {"v_pred": (0,), "ztsnr": (0,)})
    assert (found.prediction.kind, found.configs["unet"]["sample_size"]) == ("v_prediction", 128)
    assert (found.scheduler["rescale_betas_zero_snr"], found.scheduler["timestep_spacing"]) == (True, "trailing")


def test_parts_of_xl_alone_are_known_as_such() -> None:
    whole = originals.shapes(originals.SDXL)
    for prefix, lacks in (
        ("model.diffusion_model.", ("vae", "text_encoder", "text_encoder_2")),
        ("conditioner.", ("vae", "unet")),
        (originals.OPEN_CLIP_XL, ("vae", "unet", "text_encoder")),
    ):
        found = recognised({key: shape for key, shape in whole.items() if key.startswith(prefix)})
        assert (found.family, set(found.lacks), found.strangers) == ("Stable Diffusion XL", set(lacks), ())


@pytest.mark.parametrize("kind", [originals.REAL_SD1, originals.REAL_SD2, originals.REAL_SDXL])
def test_every_tensor_has_the_name_and_the_shape_that_diffusers_gives_it(kind: originals.Kind) -> None:
    found = recognised(originals.shapes(kind), V)
    whole = {key: torch.empty(shape, device="meta") for key, shape in originals.shapes(kind).items()}
    expected = oracle.convert_ldm_unet_checkpoint(dict(whole), dict(found.configs["unet"]))
    assert shapes_of(found.sources["unet"]) == {key: tuple(value.shape) for key, value in expected.items()}
    expected = oracle.convert_ldm_vae_checkpoint(dict(whole), dict(found.configs["vae"]))
    assert shapes_of(found.sources["vae"]) == {key: tuple(value.shape) for key, value in expected.items()}
    if kind.version == 3:
        prefix, second = originals.OPEN_CLIP_XL, found.sources["text_encoder_2"]
        expected = oracle.convert_open_clip_checkpoint(None, dict(whole), prefix=prefix)
        assert shapes_of(second) == {key: tuple(value.shape) for key, value in expected.items()}
    if kind.version != 2:
        expected = oracle.convert_ldm_clip_checkpoint(dict(whole))
    else:
        whole["cond_stage_model.model.text_projection"] = torch.empty(1024, 1024, device="meta")
        expected = oracle.convert_open_clip_checkpoint(None, dict(whole))
        expected = {key: value for key, value in expected.items() if "text_projection" not in key}
    expected = {key.removeprefix("text_model."): tuple(value.shape) for key, value in expected.items()}
    assert shapes_of(found.sources["text_encoder"]) == expected


def shapes_of(sources: Any) -> dict[str, tuple[int, ...]]:
    return {key: source.shape for key, source in sources.items()}


@pytest.mark.parametrize(
    ("prefixes", "lacks"),
    [
        ({"model.diffusion_model.": "model.diffusion_model."}, ("vae", "text_encoder")),
        ({"model.diffusion_model.": ""}, ("vae", "text_encoder")),
        ({"first_stage_model.": "first_stage_model."}, ("unet", "text_encoder")),
        ({"first_stage_model.": ""}, ("unet", "text_encoder")),
        ({"cond_stage_model.": "cond_stage_model."}, ("unet", "vae")),
        ({"model.": "model.", "cond_stage_model.": "cond_stage_model."}, ("vae",)),
        ({"": "", "cond_stage_model.transformer.text_model.": "cond_stage_model.transformer."}, ()),
    ],
)
def test_a_part_alone_is_known_as_that_part(prefixes: dict[str, str], lacks: tuple[str, ...]) -> None:
    kept = {}
    for key, shape in originals.shapes(originals.SD1).items():
        for before, after in sorted(prefixes.items(), key=lambda pair: -len(pair[0])):
            if key.startswith(before):
                kept[after + key.removeprefix(before)] = shape
                break
    found = recognised(kept)
    assert set(found.lacks) == set(lacks)
    assert found.strangers == ()


@pytest.mark.parametrize("encoder", ["cond_stage_model.model.", "embedder.model.", "noise_augmentor."])
def test_an_unclip_model_is_refused_by_name(encoder: str) -> None:
    """Its UNet has the label_emb of Stable Diffusion XL's, its text encoder the names of 2.x."""
    shapes = originals.shapes(originals.SD2) | {f"{encoder}x": (1,)}
    shapes = {key: shape for key, shape in shapes.items() if encoder in key or not key.startswith("cond_stage_model")}
    for name, shape in originals.shapes(originals.SDXL).items():
        if "label_emb" in name:
            shapes[name] = shape
    with pytest.raises(InputError, match="is an unCLIP model"):
        recognised(shapes)


def refiner(shapes: originals.Shapes) -> originals.Shapes:
    """The keys of Stable Diffusion XL with one text encoder, open_clip's, where it has OpenAI's."""
    return {
        key.replace("embedders.1.", "embedders.0."): shape
        for key, shape in shapes.items()
        if not key.startswith(originals.CLIP_XL)
    }


def test_a_refiner_is_known_and_not_supported() -> None:
    whole = originals.shapes(originals.SDXL)
    unet = {key: shape for key, shape in originals.shapes(originals.REAL_SDXL).items() if "diffusion_model." in key}
    unet["model.diffusion_model.label_emb.0.0.weight"] = (1280, 2560)
    for shapes in (refiner(whole), unet):
        found = recognised(shapes)
        assert (found.family, found.is_supported) == ("Stable Diffusion XL refiner", False)
    assert (recognised(whole).family, recognised(whole).is_supported) == ("Stable Diffusion XL", True)
    assert not recognised(refiner(originals.shapes(replace(originals.SDXL, in_channels=9)))).is_supported


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.diffusion_model.joint_blocks.0.x", "is a Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "is a Flux model"),
        ("control_model.time_embed.0.weight", "is a ControlNet"),
        ("lora_unet_down_blocks_0_x.lora_down.weight", "is a LoRA"),
        ("unet.down_blocks.0.to_q.lora_A.weight", "is a LoRA"),
        ("emb_params", "is a learned word"),
        ("down_blocks.0.resnets.0.conv1.weight", "is a part of a model in diffusers' naming"),
        ("latents", "is a file of latents"),
        ("edm_mean", "is made for the noise levels of EDM"),
        ("weight", "none of its 1 tensors is one of Stable Diffusion"),
    ],
)
def test_what_is_no_checkpoint_is_told_by_what_it_is(key: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        recognised({key: (1, 1)})


def test_tensors_that_nothing_reads_are_named_and_those_of_training_are_not() -> None:
    shapes = originals.shapes(originals.SD1) | dict.fromkeys(originals.leftovers(originals.SD1), (1,))
    shapes |= {"model_ema.decay": (), "first_stage_model.loss.logvar": (), "v_pred": (), "odd.weight": (2,)}
    assert recognised(shapes).strangers == ("odd.weight",)


# What the UNet predicts.


def sd2(bias: Tensor | None = None, **metadata: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A header's worth of Stable Diffusion 2.x: the shapes with next to no data, and one bias that is real."""
    whole = originals.weights(replace(originals.SD2, vocabulary=10))
    if bias is not None:
        whole["model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"] = bias
    return whole, {key.replace("__", "."): value for key, value in metadata.items()}


WIDE, NARROW = torch.linspace(-0.2, 0.2, 32), torch.linspace(-0.01, 0.01, 32)


@pytest.mark.parametrize(
    ("bias", "metadata", "extra", "kind", "told_by"),
    [
        (WIDE, {}, {}, "v_prediction", "spreads"),
        (NARROW, {}, {}, "epsilon", "spreads"),
        (WIDE.half(), {}, {}, "v_prediction", "spreads"),
        (WIDE.bfloat16(), {}, {}, "v_prediction", "spreads"),
        (WIDE.double(), {}, {}, "v_prediction", "spreads"),
        (WIDE * torch.nan, {}, {}, "epsilon", "default"),
        (NARROW, {"modelspec__prediction_type": "v"}, {}, "v_prediction", "modelspec.prediction_type"),
        (WIDE, {"modelspec__prediction_type": "epsilon"}, {}, "epsilon", "modelspec.prediction_type"),
        (NARROW, {"modelspec__architecture": "stable-diffusion-v2-768-v"}, {}, "v_prediction", "architecture"),
        (WIDE, {"modelspec__architecture": "stable-diffusion-v2-512"}, {}, "epsilon", "architecture"),
        (WIDE, {"global_step": "875000"}, {}, "epsilon", "global_step"),
        (NARROW, {}, {"v_pred": torch.zeros(0)}, "v_prediction", "v_pred"),
    ],
)
def test_what_a_model_predicts_is_told_by_what_may_know(
    tmp_path: Path, bias: Tensor, metadata: dict[str, str], extra: dict[str, Tensor], kind: str, told_by: str
) -> None:
    whole, said = sd2(bias, **metadata)
    save_file(whole | extra, tmp_path / "a.safetensors", metadata=said)
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert found.prediction.kind == found.scheduler["prediction_type"] == kind
    assert told_by in found.prediction.told_by
    assert found.configs["unet"]["sample_size"] == (96 if kind == "v_prediction" else 64)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\n  params:\n    linear_start: 0.00085\n", "epsilon"),
    ],
)
def test_a_yaml_beside_the_file_says_what_it_predicts(tmp_path: Path, text: str, kind: str) -> None:
    whole, _ = sd2(NARROW if kind == "v_prediction" else WIDE)
    save_file(whole, tmp_path / "a.safetensors")
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read_checkpoint(tmp_path / "a.safetensors").prediction.kind == kind


def test_a_mark_of_zero_terminal_snr_changes_the_schedule() -> None:
    found = recognised(originals.shapes(originals.SD1) | {"ztsnr": (0,), "v_pred": (0,)})
    assert found.scheduler["rescale_betas_zero_snr"] is True
    assert (found.scheduler["timestep_spacing"], found.scheduler["prediction_type"]) == ("trailing", "v_prediction")


def test_the_size_that_metadata_name_is_taken_where_it_can_be() -> None:
    def side(resolution: str) -> int:
        return int(
            recognised(originals.shapes(originals.SD1), {"modelspec.resolution": resolution}).configs["unet"][
                "sample_size"
            ]
        )

    assert (side("768x768"), side("512x768"), side("9x9"), side("9" * 5000), side("-1x-1")) == (96, 64, 64, 64, 64)


# Untrusted.


@pytest.mark.parametrize(
    "change",
    [
        {
            "model.diffusion_model.input_blocks.3.0.op.weight": None,
            "model.diffusion_model.input_blocks.3.0.op.bias": None,
        },
        {"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (5,)},
        {"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (0, 0, 0, 0)},
        {"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (33, 32, 3, 3)},
        {"model.diffusion_model.out.2.weight": None},
        {"first_stage_model.encoder.conv_in.weight": (1,)},
        {"first_stage_model.encoder.down.0.block.0.conv2.weight": (16, 16)},
        {"first_stage_model.encoder.down.0.block.0.conv2.weight": None},
        {"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 16, 1)},
    ],
)
def test_shapes_that_make_no_model_are_refused_by_name(change: dict[str, tuple[int, ...] | None]) -> None:
    shapes = {**originals.shapes(originals.SD1), **change}
    with pytest.raises(InputError, match=r"none\.safetensors: "):
        recognised({key: shape for key, shape in shapes.items() if shape is not None})


@pytest.mark.parametrize("number", ["9" * 5000, "²", "023", "-1", "", "23", "1.0"])
def test_a_layer_of_another_number_is_no_layer(number: str) -> None:
    odd = f"cond_stage_model.model.transformer.resblocks.{number}.attn.in_proj_weight"
    found = recognised(originals.shapes(originals.SD2) | {odd: (48, 16)}, V)
    assert found.strangers == (() if number == "23" else (odd,))
    assert len(found.sources["text_encoder"]) == 23 * 16 + 4


def test_names_of_many_dots_are_strangers() -> None:
    shapes = originals.shapes(originals.SD1) | {
        "model.diffusion_model." + "a." * 20_000 + str(n): (1,) for n in range(50)
    }
    assert len(recognised(shapes).strangers) == 50


def test_a_count_of_blocks_without_end_is_refused() -> None:
    shapes = originals.shapes(originals.SD1)
    shapes |= {f"model.diffusion_model.input_blocks.{n}.0.x.weight": (1,) for n in range(1000)}
    with pytest.raises(InputError, match="has more than 100"):
        recognised(shapes)


ODD_CONFIGS = ("{", "[]", '{"unet": 5}', "[" * 100_000, '{"tokenizer": {"pad_token": "x"}}')
DEEP = '{"scheduler": {"a": ' + "[" * 600 + "]" * 600 + "}}"


@pytest.mark.parametrize(
    "text", [*ODD_CONFIGS, DEEP, '{"vae": {"scaling_factor": NaN}}', '{"unet": {}, "unet": {"sample_size": 8}}']
)
def test_configs_in_the_metadata_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="metadata"):
        recognised(originals.shapes(originals.SD1), {"sdcli.configs": text})


def test_configs_in_the_metadata_without_end_are_refused_unread() -> None:
    text = f'{{"unet": [{"[]," * 400_000}1]}}'  # would take 72 bytes for each 3
    with pytest.raises(InputError, match=r"sdcli\.configs are no JSON \(it has 1,200,013 characters\)"):
        recognised(originals.shapes(originals.SD1), {"sdcli.configs": text})


@pytest.mark.parametrize(("kind", "least"), [(originals.REAL_SD1, 4.2e9), (originals.REAL_SDXL, 13.8e9)])
def test_facts_of_a_header_cost_no_reading_of_tensors(tmp_path: Path, kind: originals.Kind, least: float) -> None:
    shapes = originals.shapes(kind)
    text, end = {}, 0
    for key, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        text[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(text).encode()
    with (tmp_path / "big.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(data)) + data)
        stream.truncate(8 + len(data) + end)  # of which the disk holds the header
    assert end > least
    found = read_checkpoint(tmp_path / "big.safetensors")
    assert found.lacks == ()
    assert found is read_checkpoint(tmp_path / "big.safetensors")  # and is not read twice
