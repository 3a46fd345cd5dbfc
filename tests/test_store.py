"""A model reference leads to a model on this machine, without a socket where none is needed; others are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdcli import layout, store
from sdcli.errors import ExitCode, InputError
from sdcli.facts import facts_of
from tests import models

# Runs code in a fresh interpreter in which every use of the network ends the process with 99.
NO_SOCKETS = """
import os, sys
def audit(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname",):
        os.write(2, f"SOCKET {event}".encode())
        os._exit(99)
sys.addaudithook(audit)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def isolated(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run code without a network, with its own Hub cache and with huggingface_hub free to use one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(home)}
    command = [sys.executable, "-c", NO_SOCKETS + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("ref", [None, "builtin"])
def test_the_embedded_model_is_the_default(ref: str | None) -> None:
    found = store.resolve(ref)
    assert found == store.Model("builtin", Path(store.__file__).parent / "builtin" / "model")


def test_a_folder_is_named_by_its_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.resolve(str(model)) == store.Model(str(model), model)
    monkeypatch.chdir(model.parent)
    assert store.resolve("model").folder == Path("model")
    monkeypatch.chdir(model)
    assert store.resolve(".").folder == Path()
    monkeypatch.setenv("HOME", str(model.parent))
    assert store.resolve("~/model").folder == model


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_refused_by_the_name_of_the_part(model: Path, part: str) -> None:
    shutil.rmtree(model / part)
    assert f"model: has no {part}/" in refused(str(model))


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_the_pipelines_of_pictures_and_masks_have_the_parts_of_that_of_words(model: Path, kind: str) -> None:
    models.edit_json(model / "model_index.json", _class_name=kind)
    assert store.resolve(str(model)).folder == model


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"])
def test_a_model_of_stable_diffusion_xl_has_two_text_encoders_with_a_tokenizer_each(
    sdxl: Path, tmp_path: Path, kind: str
) -> None:
    folder = models.copy(sdxl, tmp_path / "model")
    models.edit_json(folder / "model_index.json", _class_name=kind)
    assert store.resolve(str(folder)).folder == folder
    assert layout.parts(folder) == ("vae", "unet", "text_encoder", "text_encoder_2")
    for part in ("tokenizer_2", "text_encoder_2"):
        shutil.rmtree(folder / part)
        assert f"model: has no {part}/" in refused(str(folder))


def test_a_refiner_is_refused_by_name(sdxl: Path, tmp_path: Path) -> None:
    folder = models.copy(sdxl, tmp_path / "model")
    for part in ("tokenizer", "text_encoder"):
        shutil.rmtree(folder / part)
    assert "model: is a Stable Diffusion XL refiner; only whole models are supported" in refused(str(folder))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "has no model_index.json" in refused(str(tmp_path))


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "os.system", None, 5, ["x"]])
def test_another_kind_of_pipeline_is_refused_by_name(model: Path, name: Any) -> None:
    models.edit_json(model / "model_index.json", _class_name=name)
    assert f"is a {name!r}" in refused(str(model))


@pytest.mark.parametrize(
    "ref",
    [
        "none",
        "./none",
        "/none/at/all",
        "a/b/c",
        "../a",
        ".a/b",
        "owner/",
        "/name",
        "a b/c",
        "owner/name@",
        "",
        "a\x00b",
        "x" * 5000,
        "https://example.com/model",
        "owner/na me",
        "~nobody-of-that-name/model",
    ],
)
def test_what_is_no_reference_is_refused(ref: str) -> None:
    refused(ref, offline=True)
    with pytest.raises(InputError):
        store.place_of(ref, "vae", offline=True)


@pytest.mark.parametrize("ref", ["owner/na--me", "owner/name..git", "-/-", "owner/.."])
def test_what_only_looks_like_a_hub_id_is_refused(ref: str) -> None:
    refused(ref, offline=True)


def test_a_part_lies_in_a_folder_of_it_alone_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model_index.json").unlink()
    monkeypatch.setenv("HOME", str(model.parent))
    assert store.place_of(str(model), "vae") == store.place_of("~/model", "vae") == model
    shutil.rmtree(model / "unet")
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        store.place_of(str(model), "unet")


def test_no_folder_takes_the_place_of_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin" / "vae").mkdir(parents=True)
    assert store.place_of("builtin", "vae") == store.place_of(None, "vae") == store.BUILTIN_FOLDER


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "is no whole safetensors file" in refused(str(tmp_path / "model.safetensors"))


def test_a_name_that_no_library_opens_is_told(model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    assert "is no UTF-8" in refused(str(tmp_path / os.fsdecode(b"caf\xe9")))


# The Hub.


def test_offline_and_not_in_the_cache_is_refused_at_once_without_a_socket(tmp_path: Path) -> None:
    code = "from sdcli.cli.app import main; main(['generate', 'a dog', '--model', 'owner/none', '--offline'])"
    began = time.monotonic()
    ended = isolated(code, tmp_path)
    assert (ended.returncode, ended.stdout) == (ExitCode.INPUT, "")
    assert ended.stderr == (
        "sdcli: error: owner/none: is not in the local cache, or not whole; sdcli models pull owner/none fetches it\n"
    )
    assert time.monotonic() - began < 20  # a second on a machine that does nothing else


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_model_in_the_hub_cache_is_found_without_a_socket(sd1: Path, tmp_path: Path, is_offline: bool) -> None:
    snapshot = models.hub_cache(sd1, tmp_path / "home" / "hub", "owner/tiny", revision="v2")
    code = f"from sdcli import store; print(store.resolve('owner/tiny@v2', offline={is_offline}).folder)"
    ended = isolated(code, tmp_path / "home")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{snapshot}\n", "")


def test_a_download_that_was_broken_off_is_not_taken_for_a_model(sd1: Path, tmp_path: Path) -> None:
    snapshot = models.hub_cache(sd1, tmp_path / "home" / "hub", "owner/tiny")
    models.weight_file(snapshot / "unet").unlink()
    code = "from sdcli.cli.app import main; main(['models', 'show', 'owner/tiny', '--offline'])"
    ended = isolated(code, tmp_path / "home")
    assert ended.returncode == ExitCode.INPUT
    assert "owner/tiny: is not in the local cache, or not whole" in ended.stderr


def test_a_path_with_a_slip_in_it_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for ref in ("models/sd/v1.safetensors", "models/sd15.safetensors"):
        assert f"{ref}: no such model; use builtin, a folder" in refused(ref)


def test_a_folder_of_the_hub_cache_may_share_its_contents_with_others(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As newer versions of huggingface_hub keep them: a blob is a link in turn, to a store beside the repositories."""
    snapshot = models.hub_cache(sd1, tmp_path / "hub", "owner/tiny")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    shared = models.share(models.weight_file(snapshot / "unet"))
    found = store.resolve("owner/tiny", offline=True)
    assert (found.folder, found.revision) == (snapshot, snapshot.name)
    (shared.parents[1] / layout.SHARED_MARK).unlink()  # a folder of that name is anybody's
    assert "is not in the local cache, or not whole" in refused("owner/tiny", offline=True)
    with pytest.raises(InputError, match="leads outside"):
        layout.weight_files(snapshot, "unet")


# What is told of a model without its weights.


def test_settings_are_those_of_the_models_own_file(model: Path) -> None:
    assert store.settings(store.Model("m", model)) == {}
    (model / "sdcli.json").write_text('{"steps": 9}')
    assert store.settings(store.Model("m", model)) == {"steps": 9}


def test_facts_come_from_configs_and_headers(sd1: Path) -> None:
    facts = facts_of(store.Model("tiny", sd1))
    counted = {
        part: sum(t.numel() for t in load_file(models.weight_file(sd1 / part)).values()) for part in layout.parts(sd1)
    }
    total = sum(counted.values())
    assert facts == {
        "model": "tiny",
        "folder": str(sd1),
        "family": "Stable Diffusion of its own size",
        "conditioning": {"kind": "text"},
        "size": "32x32",
        "vae_factor": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "prediction_type": "epsilon",
        "scheduler": "PNDMScheduler",
        "parameters": counted | {"total": total},
        "dtypes": ["F32"],
        "weights_bytes": {"float32": 4 * total, "float16": 2 * total},
        "settings": {},
    }


@pytest.mark.parametrize(
    ("names", "conditioning"),
    [
        (models.CLASSES, {"kind": "class", "classes": 4, "first": list(models.CLASSES)}),
        ([f"n{i}" for i in range(1000)], {"kind": "class", "classes": 1000, "first": [f"n{i}" for i in range(10)]}),
        ([], {"kind": "none"}),
    ],
)
def test_facts_tell_what_a_model_without_text_draws_from(
    tmp_path: Path, names: list[str], conditioning: dict[str, Any]
) -> None:
    facts = facts_of(store.resolve(str(models.write_classes(tmp_path / "model", names=names))))
    assert facts["conditioning"] == conditioning
    assert facts["family"] == "latent diffusion"
    assert facts["parameters"].keys() == {"vae", "unet", "class_embedder", "total"}
    assert facts["parameters"]["class_embedder"] == (len(names) + 1) * models.CONTEXT


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler"])
def test_a_class_model_without_a_part_is_refused_and_needs_no_tokenizer(
    classed: Path, tmp_path: Path, part: str
) -> None:
    folder = models.copy(classed, tmp_path / "model")
    assert store.resolve(str(folder)).folder == folder
    shutil.rmtree(folder / part)
    assert f"model: has no {part}/" in refused(str(folder))


def test_facts_of_a_class_model_whose_names_make_no_sense_are_refused(classed: Path, tmp_path: Path) -> None:
    folder = models.copy(classed, tmp_path / "model")
    models.edit_json(folder / "class_embedder" / "config.json", names=[5])
    with pytest.raises(InputError, match=r"class_embedder/config\.json:names: is 5"):
        facts_of(store.Model("m", folder))


@pytest.mark.parametrize(
    ("width", "channels", "family"),
    [
        (768, 4, "Stable Diffusion 1.x"),
        (1024, 4, "Stable Diffusion 2.x"),
        (768, 9, "Stable Diffusion 1.x inpainting"),
        (2048, 4, "Stable Diffusion of its own size"),
    ],
)
def test_the_family_is_known_by_its_width(model: Path, width: int, channels: int, family: str) -> None:
    models.edit_json(model / "unet" / "config.json", cross_attention_dim=width, in_channels=channels)
    assert facts_of(store.Model("m", model))["family"] == family


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"sample_size": [64, 64]}),
        ("unet", {"sample_size": "big"}),
        ("unet", {"cross_attention_dim": [768]}),
        ("vae", {"block_out_channels": 7}),
    ],
)
def test_facts_of_a_malformed_model_are_refused(model: Path, part: str, changes: dict[str, Any]) -> None:
    models.edit_json(model / part / "config.json", **changes)
    with pytest.raises(InputError, match="its configs make no sense"):
        facts_of(store.Model("m", model))


@pytest.mark.parametrize("row", [{}, {"dtype": "F32", "shape": ["x"]}])
def test_facts_of_a_senseless_header_are_refused(model: Path, row: dict[str, Any]) -> None:
    text = json.dumps({"a": {"data_offsets": [0, 4], **row}}).encode()
    models.weight_file(model / "unet").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(InputError, match="no sense"):
        facts_of(store.Model("m", model))


def test_facts_and_hash_are_of_the_weights_that_are_read(model: Path) -> None:
    before = (facts_of(store.Model("m", model)), store.model_hash(store.Model("m", model)))
    path = models.weight_file(model / "unet")
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copy(path, path.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    assert (facts_of(store.Model("m", model)), store.model_hash(store.Model("m", model))) == before


# The hash of a model.


def test_the_hash_is_over_the_sorted_names_and_hashes_of_the_weight_files(sd1: Path) -> None:
    digest = hashlib.sha256()
    for part in ("text_encoder", "unet", "vae"):
        path = models.weight_file(sd1 / part)
        digest.update(f"{part}/{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    assert store.model_hash(store.Model("m", sd1)) == digest.hexdigest()


def test_the_hash_of_a_class_model_covers_its_embedder(classed: Path, tmp_path: Path) -> None:
    folder = models.copy(classed, tmp_path / "model")
    before = store.model_hash(store.Model("m", folder))
    models.edit_weights(folder / "class_embedder", lambda w: {key: value + 1 for key, value in w.items()})
    assert store.model_hash(store.Model("m", folder)) != before


def test_the_hash_follows_the_weights_and_not_the_place(sd1: Path, model: Path) -> None:
    before = store.model_hash(store.Model("m", sd1))
    assert store.model_hash(store.Model("other", model)) == before
    models.edit_weights(model / "unet", lambda weights: weights | {"conv_in.bias": torch.ones(4)})
    assert store.model_hash(store.Model("m", model)) != before


def test_the_hashes_of_files_are_read_from_the_cache_until_a_file_changes(model: Path, own_cache: Path) -> None:
    before = store.model_hash(store.Model("m", model))
    rows = json.loads((own_cache / "hashes.json").read_text())
    assert len(rows) == 3
    (own_cache / "hashes.json").write_text(json.dumps({path: [known, "0" * 64] for path, (known, _) in rows.items()}))
    cached = store.model_hash(store.Model("m", model))
    assert cached != before  # the cache is believed ...
    for part in layout.parts(model):
        os.utime(models.weight_file(model / part), ns=(1, 1))
    assert store.model_hash(store.Model("m", model)) == before  # ... for this file alone


def test_a_file_replaced_by_one_of_its_size_and_time_has_its_own_hash(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    before, status = store.file_hash(path), path.stat()
    other.write_bytes(b"two")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert store.file_hash(path) == hashlib.sha256(b"two").hexdigest() != before


def test_the_cache_of_hashes_has_one_row_for_each_file_there_is(tmp_path: Path, own_cache: Path) -> None:
    for number in range(4):
        (tmp_path / "gone").write_bytes(b"a file " * number)
        (tmp_path / "there").write_bytes(b"another" * number)
        store.file_hash(tmp_path / "gone")
        store.file_hash(tmp_path / "there")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").write_bytes(b"")
    store.file_hash(tmp_path / "new")
    assert set(json.loads((own_cache / "hashes.json").read_text())) == {str(tmp_path / "there"), str(tmp_path / "new")}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 5}', '{"\\u0000": 5}'])
def test_a_damaged_cache_costs_time_and_nothing_else(model: Path, own_cache: Path, content: str) -> None:
    before = store.model_hash(store.Model("m", model))
    (own_cache / "hashes.json").write_text(content)
    assert store.model_hash(store.Model("m", model)) == before


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(model: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    store.model_hash(store.Model("m", model))
    assert own_cache.read_text() == "a file where the folder should be"


def refused(ref: str, *, offline: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        store.resolve(ref, offline=offline)
    assert caught.value.exit_code == ExitCode.INPUT
    assert caught.value.hint
    return str(caught.value)
