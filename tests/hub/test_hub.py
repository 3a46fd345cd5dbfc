"""What is a Hub id, and what the cache says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcli import hub
from sdcli.hub import HubId, Snapshot

A, B = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/name@fp16", HubId("owner/name", revision="fp16")),
        ("owner/name@refs/pr/3", HubId("owner/name", revision="refs/pr/3")),
        (f"o/n_1.5-x@{A}", HubId("o/n_1.5-x", revision=A)),
        ("owner/name/sd v1.5.safetensors", HubId("owner/name", "sd v1.5.safetensors")),
        ("owner/name/a/b.ckpt@v1", HubId("owner/name", "a/b.ckpt", "v1")),
    ],
)
def test_a_hub_id_is_read_and_written(ref: str, expected: HubId) -> None:
    assert hub.parse(ref) == expected
    assert str(expected) == ref


@pytest.mark.parametrize(
    "ref",
    [
        *(
            "name",
            "owner/",
            "/name",
            "a/b/c",
            "a b/c",
            "../a",
            "a/..",
            ".a/b",
            "a/.b",
            "a/b@",
            "a/b@../c",
            "a/b@/c",
            "a/b@c/",
        ),
        *(
            "a/b@c//d",
            "a--b/c",
            "a/b..c",
            "a/b.git",
            "owner/model.safetensors",
            "owner/model.ckpt",
            f"a/{'b' * 95}",
            "a/b\n",
        ),
        *(
            "a/b/../c.safetensors",
            "a/b//c.safetensors",
            "a/b/.c.safetensors",
            "a/b/c.bin",
            "https://a/b",
            "ä/b",
            "a/b@ü",
        ),
    ],
)
def test_what_cannot_be_one_is_none(ref: str) -> None:
    assert hub.parse(ref) is None


def test_the_cache_lies_where_huggingface_hub_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert hub.cache_folder() == Path("/h/.cache/huggingface/hub")
    for name, value, folder in (
        ("XDG_CACHE_HOME", "/x", "/x/huggingface/hub"),
        ("HF_HOME", "~/hf", "/h/hf/hub"),
        ("HUGGINGFACE_HUB_CACHE", "/old", "/old"),
        ("HF_HUB_CACHE", "$HOME/c", "/h/c"),
    ):
        monkeypatch.setenv(name, value)
        assert hub.cache_folder() == Path(folder)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("0", False), ("", False), ("2", False)])
def test_offline_is_what_huggingface_hub_takes_for_it(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    for name, other in (("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), ("TRANSFORMERS_OFFLINE", "HF_HUB_OFFLINE")):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert hub.is_offline() is expected


def test_a_commit_is_called_by_the_shortest_name_that_means_it(cache: Path) -> None:
    folder = cache / "models--owner--name"
    for commit in (A, B, "no commit"):
        (folder / "snapshots" / commit).mkdir(parents=True)
    for name, text in (("v2", B), (".v1.9-0.part", B), ("refs/pr/1", A), ("bad", "no commit"), ("long", A * 50)):
        (folder / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(text, encoding="utf-8")

    def names() -> list[str]:
        return [str(one) for one, _ in hub.snapshots(HubId("owner/name"))]

    assert names() == ["owner/name@refs/pr/1", "owner/name@v2"]
    (folder / "refs" / "main").write_text(B, encoding="utf-8")
    assert names() == ["owner/name@refs/pr/1", "owner/name"]
    assert hub.snapshot(HubId("owner/name")) == Snapshot(B, folder / "snapshots" / B)
    assert hub.snapshot(HubId("owner/name", revision=A)) == Snapshot(A, folder / "snapshots" / A)
    assert [hub.snapshot(HubId("owner/name", revision=one)) for one in ("none", "bad", "long", "f" * 40)] == [None] * 4
    assert [str(one) for one in hub.repositories()] == ["owner/name"]
