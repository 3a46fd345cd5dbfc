"""Model folders of every writer load with the tensors they hold; spoilt ones are refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdcli.errors import ExitCode, InputError, NumericalError
from sdcli.pipeline import bundle, text
from sdcli.pipeline.bundle import (
    ModelBundle,
    TextEncoder,
    TextPair,
    load_bundle,
    load_text,
    load_unet,
    load_vae,
    save_bundle,
)
from sdcli.pipeline.classes import ClassEmbedder
from tests import models

CPU = torch.device("cpu")
PARTS = ("vae", "unet", "text_encoder")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelBundle:
    return load_bundle(folder, device=CPU, dtype=dtype)


def tensors(loaded: ModelBundle) -> dict[str, Tensor]:
    assert isinstance(loaded.conditioner, TextEncoder)
    parts: dict[str, nn.Module] = {"vae": loaded.vae, "unet": loaded.unet, "text_encoder": loaded.conditioner.model}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def assert_equal(ours: ModelBundle, theirs: dict[str, nn.Module]) -> None:
    expected = {f"{name}.{key}": value for name, part in theirs.items() for key, value in part.state_dict().items()}
    found = tensors(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def by_diffusers(folder: Path, **how: Any) -> dict[str, nn.Module]:
    return {
        "vae": AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, **how),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True, **how),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, **how),
    }


@pytest.mark.parametrize("write", [models.write_sd1, models.write_sd2])
def test_a_folder_written_by_diffusers_loads_with_equal_tensors(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path)
    assert_equal(load(folder), by_diffusers(folder))


def test_a_folder_of_stable_diffusion_xl_loads_with_equal_tensors(sdxl: Path) -> None:
    loaded, theirs = load(sdxl), models.pipeline_xl(sdxl)
    assert isinstance(loaded.conditioner, TextPair)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (loaded.vae, theirs.vae),
        (loaded.unet, theirs.unet),
        (loaded.conditioner.first.model, theirs.text_encoder),
        (loaded.conditioner.second.model, theirs.text_encoder_2.text_model),
        (loaded.conditioner.projection, theirs.text_encoder_2.text_projection),
    ]
    for ours, other in pairs:
        assert ours.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in ours.state_dict().items())
        assert all(not p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize(
    ("changes", "dtype", "kept"),
    [
        ({}, torch.float16, torch.float32),
        ({"force_upcast": ...}, torch.float16, torch.float32),  # where it is not said, it is so in diffusers
        ({"force_upcast": False}, torch.float16, torch.float16),
        ({}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_vae_of_stable_diffusion_xl_stays_float32_where_float16_overflows(
    sdxl: Path, tmp_path: Path, changes: dict[str, object], dtype: torch.dtype, kept: torch.dtype
) -> None:
    folder = models.copy(sdxl, tmp_path / "model", without="model.safetensors")
    models.edit_json(folder / "vae" / "config.json", **changes)
    assert load_vae(folder, device=CPU, dtype=dtype).dtype == kept


def test_the_vae_of_other_models_is_of_their_type_whatever_its_config_says(sd1: Path) -> None:
    assert load_vae(sd1, device=CPU, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("tokenizer_2/vocab.json", {"cat</w>": 1929, "dog</w>": 2368}, "do not know the same pieces"),
        ("text_encoder_2/config.json", {"vocab_size": 49000}, "the config says (49000, 24)"),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}, "is a 'CLIPTextModel'"),
        ("text_encoder_2/config.json", {"projection_dim": 7}, "text_projection.weight has shape"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "yes"}, "force_zeros_for_empty_prompt: is 'yes'"),
    ],
)
def test_a_second_text_encoder_that_does_not_go_with_the_first_is_refused(
    sdxl: Path, tmp_path: Path, file: str, changes: dict[str, object], what: str
) -> None:
    folder = models.copy(sdxl, tmp_path / "model", without="diffusion*")
    models.edit_json(folder / file, **changes)
    with pytest.raises(InputError, match=re.escape(what)):
        load_text(folder, device=CPU, dtype=torch.float32)


def test_the_tokenizer_as_transformers_5_writes_it_loads(model: Path, tmp_path: Path) -> None:
    pipe = models.pipeline(model)
    pipe.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again" / "tokenizer").glob("vocab.json")] == []
    encoder = load_text(tmp_path / "again", device=CPU, dtype=torch.float32)
    before = load_text(model, device=CPU, dtype=torch.float32)
    assert text.tokenize(encoder, "a picture of a puppy") == text.tokenize(before, "a picture of a puppy")


def test_everything_is_ready_for_inference(sd1: Path) -> None:
    loaded = load(sd1, torch.bfloat16)
    assert isinstance(loaded.conditioner, TextEncoder)
    for part in (loaded.vae, loaded.unet, loaded.conditioner.model):
        assert not part.training
        assert all(not p.requires_grad and p.dtype == torch.bfloat16 and p.device == CPU for p in part.parameters())


def test_weights_that_are_loaded_do_not_hold_their_file(model: Path) -> None:
    """A model in use survives its folder being replaced by an update."""
    loaded = load(model)
    before = {key: value.clone() for key, value in tensors(loaded).items()}
    for part in PARTS:
        path = models.weight_file(model / part)
        path.unlink()
        path.write_bytes(b"gone")
    assert all(torch.equal(value, before[key]) for key, value in tensors(loaded).items())


# What other writers do.


def test_a_float16_variant_loads_where_there_is_no_other(model: Path) -> None:
    pipe = models.pipeline(model).to(torch.float16)
    for part in PARTS:
        models.weight_file(model / part).unlink()
        getattr(pipe, part).save_pretrained(model / part, variant="fp16")
        assert [path.suffixes[0] for path in (model / part).glob("*.safetensors")] == [".fp16"]
    assert_equal(load(model), by_diffusers(model, variant="fp16", torch_dtype=torch.float32))


def test_full_weights_win_over_their_float16_variant(model: Path) -> None:
    full = models.weight_file(model / "unet")
    half = {key: torch.zeros_like(value, dtype=torch.float16) for key, value in load_file(full).items()}
    save_file(half, full.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_unet(model, device=CPU, dtype=torch.float32).conv_in.weight.abs().sum() > 0


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_shards_with_an_index_load(model: Path, part: str) -> None:
    shard(model, part)
    assert_equal(load(model), by_diffusers(model))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_shards_of_a_float16_variant_load(model: Path, sd1: Path, part: str) -> None:
    shard(model, part, variant="fp16")
    assert_equal(load(model), by_diffusers(sd1))


def shard(model: Path, part: str, **how: Any) -> None:
    """Let the library that owns a part write it again, in several files."""
    whole = models.pipeline(model)
    path = models.weight_file(model / part)
    size = path.stat().st_size
    path.unlink()
    getattr(whole, part).save_pretrained(model / part, max_shard_size=f"{size // 3000}KB", **how)
    assert len(list((model / part).glob("*.safetensors"))) > 1


def test_a_vae_with_the_old_attention_names_loads(model: Path, sd1: Path) -> None:
    """As in every checkpoint before diffusers 0.12, those of Stable Diffusion 1.5 and 2.1 among them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for new, name in old.items():
            weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for key, v in weights.items()}
        return weights

    models.edit_weights(model / "vae", rename)
    assert any(".proj_attn." in key for key in load_file(models.weight_file(model / "vae")))
    assert_equal(load(model), by_diffusers(sd1))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_loads_with_and_without_its_prefix(model: Path, sd1: Path, prefix: str) -> None:
    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + key.removeprefix("text_model."): value for key, value in weights.items()}

    models.edit_weights(model / "text_encoder", rename)
    assert {key.startswith("text_model.") for key in load_file(models.weight_file(model / "text_encoder"))} == {
        bool(prefix)
    }
    assert_equal(load(model), by_diffusers(sd1))


def test_position_ids_of_older_transformers_are_no_weights(model: Path, sd1: Path) -> None:
    ids = {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}
    models.edit_weights(model / "text_encoder", lambda weights: weights | ids)
    assert_equal(load(model), by_diffusers(sd1))


def test_our_own_writer_is_read_by_diffusers_with_the_key_names_of_the_published_models(
    sd1: Path, tmp_path: Path
) -> None:
    loaded = load(sd1)
    save_bundle(tmp_path, loaded, sd1 / "tokenizer", {"steps": 9})
    assert_equal(loaded, by_diffusers(tmp_path))
    assert all(key.startswith("text_model.") for key in load_file(models.weight_file(tmp_path / "text_encoder")))
    assert isinstance(models.pipeline(tmp_path), StableDiffusionPipeline)
    assert_equal(load(tmp_path), by_diffusers(sd1))
    assert json.loads((tmp_path / "sdcli.json").read_text()) == {"steps": 9}
    assert not [path for path in tmp_path.rglob("*.json") if str(sd1) in path.read_text(encoding="utf-8")]


# A class embedder in place of the text encoder.


@pytest.fixture
def labelled(classed: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that draws classes, which a test may spoil."""
    return models.copy(classed, tmp_path / "labelled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_embedder_loads_ready_for_inference(classed: Path, dtype: torch.dtype) -> None:
    embedder = load(classed, dtype).conditioner
    assert isinstance(embedder, ClassEmbedder)
    (table,) = load_file(models.weight_file(classed / "class_embedder")).values()
    assert torch.equal(embedder.embedding.weight, table.to(dtype))
    assert (embedder.names, embedder.null) == (models.CLASSES, len(models.CLASSES))
    assert not embedder.training and not embedder.embedding.weight.requires_grad


@pytest.mark.parametrize("names", [models.CLASSES, ()])
def test_a_model_with_a_class_embedder_comes_back_as_it_was_written(tmp_path: Path, names: tuple[str, ...]) -> None:
    written = models.write_classes(tmp_path / "written", names=names)
    save_bundle(tmp_path / "again", load(written), None, {"steps": 9})
    for part in ("vae", "unet", "class_embedder"):
        before, after = (load_file(models.weight_file(folder / part)) for folder in (written, tmp_path / "again"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    read = [
        {name: json.loads((folder / name).read_text()) for name in ("model_index.json", "class_embedder/config.json")}
        for folder in (written, tmp_path / "again")
    ]
    assert read[0]["class_embedder/config.json"] == read[1]["class_embedder/config.json"]
    parts = [{k: v for k, v in one["model_index.json"].items() if isinstance(v, list) and v[0]} for one in read]
    assert parts[0] == parts[1]
    assert parts[1]["class_embedder"] == ["sdcli", "ClassEmbedder"]
    assert not {"text_encoder", "tokenizer"} & parts[1].keys()
    assert load(tmp_path / "again").conditioner.names == names


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"width": 24}, r"embedding\.weight has shape \(5, 16\), the config says \(5, 24\)"),
        ({"names": ["cat", "dog", "bird"]}, r"embedding\.weight has shape \(5, 16\), the config says \(4, 16\)"),
        ({"names": [*models.CLASSES, "bird"]}, r"has shape \(5, 16\), the config says \(6, 16\)"),
        ({"width": 0}, "config.json:width: is 0; expected is an integer from 1 to 16384"),
        ({"width": 10**9}, "config.json:width: is 1000000000"),
        ({"width": 16.0}, "config.json:width: is 16.0"),
        ({"width": True}, "config.json:width: is True"),
        ({"width": ...}, "config.json:width: is None"),
        ({"names": ...}, "config.json:names: is None; expected is a list of up to 100,000 names"),
        ({"names": "catdog"}, "config.json:names: is 'catdog'"),
        ({"names": {"cat": 0}}, "config.json:names: is {'cat': 0}"),
        ({"names": ["x"] * 100_001}, "config.json:names: is .*; expected is a list of up to 100,000"),
        ({"names": ["a", "b", "c", 4]}, "config.json:names: is 4; expected is text of 1 to 255 characters"),
        ({"names": ["a", "b", "c", ""]}, "config.json:names: is ''"),
        ({"names": ["a", "b", "c", "d" * 256]}, "config.json:names: is 'd"),
        ({"names": ["a", "b", "c", "d\n"]}, r"config.json:names: is 'd\\n'"),
        ({"names": ["a", "b", "c", "\udcff"]}, r"config.json:names: is '\\udcff'"),
        ({"names": ["a", "b", "c", "a"]}, "config.json:names: is 'a'; expected is a name of one class alone"),
        ({"_class_name": "CLIPTextModel"}, "class_embedder: is a 'CLIPTextModel'; class_embedder must be a ClassEm"),
    ],
)
def test_a_class_embedder_that_makes_no_sense_is_refused(labelled: Path, changes: dict[str, Any], what: str) -> None:
    models.edit_json(labelled / "class_embedder" / "config.json", **changes)
    refuse(labelled, what)


def test_a_class_embedder_with_other_tensors_is_refused(labelled: Path) -> None:
    models.edit_weights(labelled / "class_embedder", lambda w: {"embedding.bias": w["embedding.weight"]})
    refuse(labelled, r"class_embedder: 1 tensors are missing and 1 unexpected \(embedding\.weight, for one\)")


def test_a_class_embedder_that_is_not_finite_is_refused(labelled: Path) -> None:
    models.edit_weights(labelled / "class_embedder", lambda w: {key: value / 0 for key, value in w.items()})
    with pytest.raises(NumericalError, match=r"class_embedder: embedding\.weight holds NaN or Inf"):
        load(labelled)


def test_a_model_with_two_conditioners_is_refused(labelled: Path, sd1: Path) -> None:
    shutil.copytree(sd1 / "text_encoder", labelled / "text_encoder")
    refuse(labelled, "has both text_encoder/ and class_embedder/; remove one of them")


# Where the files lie.


def test_a_model_in_the_current_folder_loads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert_equal(load(Path()), by_diffusers(model))


def test_a_float16_model_draws_in_plain_diffusers_without_a_word_about_types(sd1: Path, tmp_path: Path) -> None:
    save_bundle(tmp_path, replace(load(sd1), dtype=torch.float16), sd1 / "tokenizer", {})
    assert next(iter(load_file(models.weight_file(tmp_path / "text_encoder")).values())).dtype == torch.float16
    whole = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert {part.dtype for part in (whole.vae, whole.unet, whole.text_encoder)} == {torch.float32}


def test_a_folder_that_is_a_link_loads(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    assert_equal(load(tmp_path / "link"), by_diffusers(model))


@pytest.mark.parametrize("is_linked", [False, True])
def test_the_hub_cache_with_its_links_loads(model: Path, tmp_path: Path, is_linked: bool) -> None:
    snapshot = models.hub_cache(model, tmp_path / "hub", "owner/tiny")
    assert (snapshot / "unet" / "config.json").is_symlink()
    if is_linked:
        (tmp_path / "link").symlink_to(snapshot)
        snapshot = tmp_path / "link"
    assert_equal(load(snapshot), by_diffusers(model))


@pytest.mark.parametrize("kind", ["link", "folder link", "shard"])
def test_weights_that_lead_outside_the_model_are_refused(model: Path, sd1: Path, kind: str) -> None:
    path = models.weight_file(model / "unet")
    if kind == "link":
        path.unlink()
        path.symlink_to(models.weight_file(sd1 / "unet"))
    elif kind == "folder link":
        shutil.rmtree(model / "unet")
        (model / "unet").symlink_to(sd1 / "unet")
    else:
        outside = os.path.relpath(models.weight_file(sd1 / "unet"), model / "unet")
        path.unlink()
        path.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": outside}}))
    with pytest.raises(InputError, match=r"unet.*leads outside"):
        load(model)


def test_a_link_out_of_a_folder_that_only_looks_like_a_hub_cache_is_refused(
    model: Path, sd1: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "attic" / "snapshots" / "main"
    shutil.copytree(model, folder)
    secret = shutil.copy(models.weight_file(sd1 / "unet"), tmp_path / "attic" / "weights")
    models.weight_file(folder / "unet").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(secret)
    with pytest.raises(InputError, match="leads outside"):
        load(folder)


# What is spoilt.


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(model: Path, part: str) -> None:
    shutil.rmtree(model / part)
    refuse(model, f"has no {part}/")


@pytest.mark.parametrize("part", PARTS)
def test_missing_weights_are_named(model: Path, part: str) -> None:
    models.weight_file(model / part).unlink()
    refuse(model, f"{part}: has no ")


@pytest.mark.parametrize(
    "file",
    [
        "vae/config.json",
        "unet/config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(model: Path, file: str) -> None:
    (model / file).unlink()
    refuse(model, file)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"x"', "\x80", '{"a": 1', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(model: Path, content: str) -> None:
    (model / "unet" / "config.json").write_bytes(content.encode("latin-1"))
    refuse(model, "unet/config.json")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -4096])
def test_weights_cut_short_are_named(model: Path, part: str, keep: int) -> None:
    path = models.weight_file(model / part)
    path.write_bytes(path.read_bytes()[:keep])
    refuse(model, f"{part}/{path.name}: is no whole safetensors file")


def test_weights_with_bytes_behind_them_are_named(model: Path) -> None:
    path = models.weight_file(model / "unet")
    path.write_bytes(path.read_bytes() + b"more")
    refuse(model, f"unet/{path.name}: is no whole safetensors file")


def test_pickled_weights_are_not_read(model: Path) -> None:
    path = models.weight_file(model / "unet")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    refuse(model, "unet: has no diffusion_pytorch_model.safetensors; pickled weights are not read")


@pytest.mark.parametrize("name", ["UNet2DModel", "os.system", "", None, 5, ["UNet2DConditionModel"]])
def test_a_class_outside_the_table_is_named(model: Path, name: Any) -> None:
    models.edit_json(model / "unet" / "config.json", _class_name=name)
    refuse(model, f"unet: is a {re.escape(repr(name))}; unet must be a UNet2DConditionModel")


@pytest.mark.parametrize("names", [["T5EncoderModel"], [], None, "CLIPTextModel"])
def test_another_text_encoder_is_named(model: Path, names: Any) -> None:
    models.edit_json(model / "text_encoder" / "config.json", architectures=names)
    refuse(model, "text_encoder: is a ")


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_shape_is_named_with_both_shapes(model: Path, part: str) -> None:
    key = {"vae": "encoder.conv_in.bias", "unet": "conv_in.bias", "text_encoder": "final_layer_norm.bias"}[part]
    models.edit_weights(model / part, lambda weights: weights | {key: torch.zeros(3)})
    refuse(model, rf"{part}: {key} has shape \(3,\), the config says \(\d+,\)")


@pytest.mark.parametrize("part", PARTS)
def test_missing_and_unexpected_tensors_are_counted_and_one_is_named(model: Path, part: str) -> None:
    first = min(load_file(models.weight_file(model / part)))
    models.edit_weights(model / part, lambda weights: {k: v for k, v in weights.items() if k != first})
    refuse(model, rf"{part}: 1 tensors are missing and 0 unexpected \({first}, for one\)")
    models.edit_weights(model / part, lambda weights: weights | {first: torch.zeros(1), "lora.down": torch.zeros(1)})
    refuse(model, rf"{part}: 0 tensors are missing and 1 unexpected \(lora.down, for one\)")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_not_finite_are_named(model: Path, part: str, bad: float) -> None:
    def spoil(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights[max(weights)].view(-1)[0] = bad
        return weights

    models.edit_weights(model / part, spoil)
    with pytest.raises(NumericalError, match=rf"{part}: .* holds NaN or Inf") as caught:
        load(model)
    assert caught.value.exit_code == ExitCode.NUMERICAL


@pytest.mark.parametrize(
    "index", ['{"weight_map": []}', '{"weight_map": 5}', "{}", '{"weight_map": {"conv_in.weight": 5}}', "[]", "{"]
)
def test_a_malformed_index_of_shards_is_refused(model: Path, index: str) -> None:
    path = models.weight_file(model / "unet")
    path.unlink()
    path.with_suffix(".safetensors.index.json").write_text(index)
    refuse(model, "unet")


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": 7},
        {"norm_num_groups": 3},
        {"down_block_types": ["Evil"] * 2},
        {"layers_per_block": 10**9},
        {"layers_per_block": [1, [10**9]]},
        {"block_out_channels": [10**9, 10**9]},
        {"act_fn": {}},
        {"conv_in_kernel": "x"},
    ],
)
def test_a_config_that_cannot_be_built_is_refused_without_the_memory_it_asks_for(
    model: Path, changes: dict[str, Any]
) -> None:
    models.edit_json(model / "unet" / "config.json", **changes)
    refuse(model, "UNet2DConditionModel|unet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{}"),
        ("vocab.json", "[]"),
        ("vocab.json", "{"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", "\0\0\0"),
        ("merges.txt", "#version: 0.2\nnothing like that\n"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "["),
        ("tokenizer_config.json", "["),
        ("special_tokens_map.json", "["),
    ],
)
def test_a_malformed_tokenizer_is_refused(model: Path, name: str, content: str) -> None:
    (model / "tokenizer" / name).write_text(content)
    refuse(model, "tokenizer")


def test_a_tokenizer_with_more_pieces_than_the_encoder_knows_is_refused(model: Path) -> None:
    key = "embeddings.token_embedding.weight"
    models.edit_weights(model / "text_encoder", lambda weights: weights | {key: weights[key][:1000]})
    models.edit_json(model / "text_encoder" / "config.json", vocab_size=1000)
    refuse(model, r"tokenizer: has 49,408 pieces, the text encoder knows 1,000")


def test_a_tokenizer_that_asks_for_code_runs_none(model: Path) -> None:
    trap = model / "trap"
    (model / "tokenizer" / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    auto = {"AutoTokenizer": ["evil.Evil", None]}
    models.edit_json(model / "tokenizer" / "tokenizer_config.json", auto_map=auto, tokenizer_class="Evil")
    refuse(model, r"tokenizer_config\.json: asks for code with auto_map")
    assert not trap.exists()


def test_a_part_of_the_wrong_kind_is_no_vae(model: Path) -> None:
    shutil.rmtree(model / "vae")
    shutil.copytree(model / "unet", model / "vae")
    with pytest.raises(InputError, match="vae must be a AutoencoderKL"):
        load_vae(model, device=CPU, dtype=torch.float32)


def test_saving_weights_that_overflow_their_type_writes_no_weights(sd1: Path, tmp_path: Path) -> None:
    unet = load_unet(sd1, device=CPU, dtype=torch.float32)
    unet.conv_in.weight.mul_(1e9)
    with pytest.raises(NumericalError, match=r"unet/.*: conv_in\.weight is not finite in torch\.float16"):
        bundle.save_part(tmp_path / "unet", unet, torch.float16)
    assert list(tmp_path.rglob("*.safetensors")) == []


def refuse(folder: Path, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        load(folder)
    assert caught.value.exit_code == ExitCode.INPUT
    assert "\n" not in str(caught.value)
