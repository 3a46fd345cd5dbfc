"""Of a repository is fetched what is read, and of two copies of weights one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from sdcli.errors import InputError
from sdcli.hub import HubId, choosing
from sdcli.hub.choosing import Remote, Repository, configs, index, single, weights
from sdcli.layout import MAX_JSON_BYTES
from sdcli.pipeline import tokenizer_files
from tests.hubs import digest, model_files

COMMIT = "c" * 40
TINY = HubId("owner/name")
UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> None:
    """Keep the cache of whoever runs the tests out of what is chosen."""


def repository(names: dict[str, bytes], hub_id: HubId = TINY) -> Repository:
    files = {name: Remote(name, len(data), digest(name, data)) for name, data in names.items()}
    return Repository(hub_id, COMMIT, files)


def put(where: Repository, name: str, data: bytes = b"") -> None:
    """Have a file of a repository in the cache."""
    path = where.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def names(files: list[Remote]) -> list[str]:
    return [one.name for one in files]


def test_a_folder_is_fetched_without_what_nothing_reads() -> None:
    there = repository(model_files())
    assert single(there) is None
    assert names(index(there)) == ["model_index.json"]
    assert sorted(names(configs(there, "auto"))) == [
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        *(f"tokenizer/{name}" for name in ("merges.txt", "tokenizer_config.json", "vocab.json")),
        "unet/config.json",
        "vae/config.json",
    ]
    assert sorted(names(weights(there, "auto"))) == [
        "text_encoder/model.safetensors",
        f"{UNET}.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_of_xl_both_text_encoders_are_fetched_with_their_tokenizers() -> None:
    there = repository(model_files("StableDiffusionXLPipeline"))
    second = {"text_encoder_2/config.json", *(f"tokenizer_2/{name}" for name in ("vocab.json", "merges.txt"))}
    xl = repository(dict.fromkeys((*there.files, *second, "text_encoder_2/model.safetensors"), b""))
    assert set(names(configs(xl, "auto"))) - set(names(configs(there, "auto"))) == second
    assert set(names(weights(xl, "auto"))) - set(names(weights(there, "auto"))) == {"text_encoder_2/model.safetensors"}


@pytest.mark.parametrize(
    ("dtype", "here", "expected"),
    [
        ("auto", "", ".safetensors"),
        ("float32", "", ".safetensors"),
        ("float16", "", ".fp16.safetensors"),
        ("auto", ".fp16.safetensors", ".fp16.safetensors"),
        ("float32", ".fp16.safetensors", ".safetensors"),
        ("float16", ".safetensors", ".safetensors"),  # which is what would be read all the same
    ],
)
def test_of_two_copies_of_weights_one_is_fetched(dtype: str, here: str, expected: str) -> None:
    there = repository(model_files())
    if here:
        put(there, UNET + here)
    assert [name for name in names(weights(there, dtype)) if name.startswith("unet/")] == [UNET + expected]


def test_of_a_new_commit_the_copy_is_fetched_that_the_cache_has_of_another() -> None:
    there = repository(model_files())
    put(Repository(TINY, "d" * 40, {}), f"{UNET}.fp16.safetensors")
    assert f"{UNET}.fp16.safetensors" in names(weights(there, "auto"))
    assert f"{UNET}.safetensors" in names(weights(there, "float32"))
    put(Repository(TINY, "e" * 40, {}), f"{UNET}.safetensors")
    assert f"{UNET}.safetensors" in names(weights(there, "auto"))
    assert f"{UNET}.fp16.safetensors" in names(weights(there, "float16"))
    put(there, f"{UNET}.fp16.safetensors")
    assert f"{UNET}.fp16.safetensors" in names(weights(there, "auto"))


def test_the_only_copy_there_is_is_taken_whatever_its_precision() -> None:
    files = {name: data for name, data in model_files().items() if name != f"{UNET}.safetensors"}
    assert f"{UNET}.fp16.safetensors" in names(weights(repository(files), "float32"))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_those_of_their_index(variant: str) -> None:
    files = {name: data for name, data in model_files().items() if not name.startswith(UNET)}
    shards = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    name = f"{UNET}.safetensors.index{variant}.json"
    files |= {f"unet/{shard}": b"x" for shard in shards} | {name: b"{}", "unet/other.safetensors": b"x"}
    there = repository(files)
    assert name in names(configs(there, "auto"))
    put(there, name, json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}).encode())
    assert [one for one in names(weights(there, "auto")) if "unet" in one] == [f"unet/{shard}" for shard in shards]


@pytest.mark.parametrize("shard", ["../vae/config.json", "/etc/passwd", "none.safetensors", "a/b", 5, ["x"]])
def test_an_index_that_names_what_is_not_beside_it_is_refused(shard: object) -> None:
    files = {name: data for name, data in model_files().items() if not name.startswith(UNET)}
    there = repository(files | {f"{UNET}.safetensors.index.json": b"{}"})
    put(there, f"{UNET}.safetensors.index.json", json.dumps({"weight_map": {"a": shard}}).encode())
    with pytest.raises(InputError, match="which it does not have"):
        weights(there, "auto")


def test_weights_that_are_pickled_alone_are_refused_by_name() -> None:
    files = {name: data for name, data in model_files().items() if "unet/" not in name or not name.endswith("tensors")}
    with pytest.raises(
        InputError, match=r"its unet that are read, only pickled ones \(unet/diffusion_pytorch_model.bin"
    ):
        configs(repository(files), "auto")


def test_a_config_beyond_all_measure_is_refused() -> None:
    there = repository(model_files())
    large = Remote("unet/config.json", MAX_JSON_BYTES + 1, "0" * 40)
    with pytest.raises(InputError, match=rf"unet/config.json has {MAX_JSON_BYTES + 1:,} bytes"):
        configs(Repository(there.hub_id, COMMIT, {**there.files, large.name: large}), "auto")


def test_a_tokenizer_json_may_be_as_long_as_its_reader_takes() -> None:
    assert choosing.MAX_TOKENIZER_BYTES == tokenizer_files.MAX_TOKENIZER_BYTES > MAX_JSON_BYTES
    there = repository(model_files())
    for more in (0, 1):
        large = Remote("tokenizer/tokenizer.json", choosing.MAX_TOKENIZER_BYTES + more, "0" * 40)
        files = Repository(there.hub_id, COMMIT, {**there.files, large.name: large})
        with nullcontext() if not more else pytest.raises(InputError, match="at most 5,242,880 are accepted"):
            assert large in configs(files, "auto")


def test_the_one_single_file_is_meant_by_its_repository_and_others_are_named() -> None:
    one = repository({"model.safetensors": b"", "README.md": b"", "sub/other.safetensors": b"", "old.ckpt": b""})
    assert single(one) == one.files["model.safetensors"]
    two = repository({"a.safetensors": b"", "b.safetensors": b""})
    with pytest.raises(InputError, match=r"has 2 single files; name one: owner/name/FILE, of a.safetensors, b.safeten"):
        single(two)
    named = repository(dict.fromkeys(two.files, b""), HubId("owner/name", "b.safetensors"))
    assert single(named) == named.files["b.safetensors"]
    with pytest.raises(InputError, match=r"c.ckpt: there is no such file; owner/name has a.safetensors, b.safetensors"):
        single(repository(dict.fromkeys(two.files, b""), HubId("owner/name", "c.ckpt")))
    with pytest.raises(InputError, match="is no model: it has neither"):
        single(repository({"config.json": b""}))
