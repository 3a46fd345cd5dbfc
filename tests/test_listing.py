"""Which models work without a network, and which downloads are not whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcli import layout, listing
from tests import models, originals
from tests.hubs import small_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def names() -> list[str]:
    return [row["model"] for row in listing.listed()]


def broken() -> list[tuple[str, int]]:
    return [(str(hub_id), size) for hub_id, size in listing.broken_off()]


def test_models_in_the_hub_cache_are_listed_and_others_are_not(sd1: Path, cache: Path) -> None:
    snapshot = models.hub_cache(sd1, cache, "owner/tiny")
    other = models.hub_cache(sd1, cache, "owner/other-kind")
    (other / "model_index.json").unlink()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (cache / "models--owner--no--id" / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cache / "models--owner--empty").mkdir()
    rows = list(listing.listed())
    weights = [models.weight_file(sd1 / part).stat().st_size for part in layout.parts(sd1)]
    assert [row["model"] for row in rows] == ["builtin", "owner/tiny"]
    assert rows[1] == {
        "model": "owner/tiny",
        "model_revision": snapshot.name,
        "folder": str(snapshot),
        "bytes": sum(weights),
    }
    assert broken() == []


def test_each_commit_is_listed_by_the_name_that_means_it(sd1: Path, cache: Path) -> None:
    models.hub_cache(sd1, cache, "owner/tiny")
    models.hub_cache(sd1, cache, "owner/tiny", revision="v1")
    unnamed = models.hub_cache(sd1, cache, "owner/tiny", revision="v2")
    (unnamed.parents[1] / "refs" / "v2").unlink()
    assert sorted(names()) == sorted(["builtin", "owner/tiny", "owner/tiny@v1", f"owner/tiny@{unnamed.name}"])


def test_single_files_are_listed_by_their_names_and_adapters_are_not(cache: Path) -> None:
    snapshot = cache / "models--owner--files" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    originals.write(snapshot / "sd.safetensors", originals.Kind(vocabulary=10))
    (snapshot / "lora.safetensors").write_bytes(small_file("lora_unet_a.lora_down.weight"))
    (snapshot / "old.ckpt").write_bytes(b"PK")
    (snapshot / "od\x1b[2Jd.ckpt").write_bytes(b"PK")
    (snapshot / "gone.ckpt").symlink_to("none")
    assert names() == ["builtin", *(f"owner/files/{name}@{'a' * 40}" for name in ("old.ckpt", "sd.safetensors"))]


def test_a_download_that_is_not_whole_is_told_with_what_there_is_of_it(sd1: Path, cache: Path) -> None:
    snapshot = models.hub_cache(sd1, cache, "owner/tiny")
    models.weight_file(snapshot / "unet").unlink()
    rest = sum(models.weight_file(snapshot / part).stat().st_size for part in ("vae", "text_encoder"))
    assert (names(), broken()) == (["builtin"], [("owner/tiny", rest)])
    language = cache / "models--owner--language"  # of another program, whose download broke off as well
    (language / "snapshots" / ("a" * 40)).mkdir(parents=True)
    for folder in (snapshot.parents[1], language):
        (folder / "blobs").mkdir(exist_ok=True)
        (folder / "blobs" / "abc.incomplete").write_bytes(b"12345")
    assert broken() == [("owner/tiny", rest + 5)]
    (language / "snapshots" / ("a" * 40)).rmdir()  # nothing says what it is
    assert broken() == [("owner/language", 5), ("owner/tiny", rest + 5)]
