"""Tokenizers of every writer are what transformers makes of them; of other files nothing is taken, nothing opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from sdcli.errors import InputError
from sdcli.pipeline.tokenizer_files import read_tokenizer
from tests import models

TEXTS = (
    *("A picture of a puppy", "a!b ! !! c", "<sks> and <cat> dog sks", "<|endoftext|> x <|startoftext|>"),
    *("Ünï  小 🐶\n\t X", "<new>sksksk a <new> SKSKSK", " ", "l'été it's 12345"),
)
ADDED = {"<sks>": 49408, "<cat> dog": 49409}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers as they were and are written: of 1.x and 2.x, by transformers 5, with words added in either way."""
    place = tmp_path_factory.mktemp("tokenizers")
    found = {name: place / name / "tokenizer" for name in ("1.x", "2.x", "5", "added", "5 added", "json added")}
    for folder in (found["1.x"], found["2.x"], found["added"]):
        shutil.copytree(models.TOKENIZER, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        models.edit_json(found["2.x"] / name, pad_token="!")
    (found["added"] / "added_tokens.json").write_text(json.dumps(ADDED))
    whole = CLIPTokenizer.from_pretrained(found["1.x"])
    whole.save_pretrained(found["5"])
    whole.add_tokens(["<new>", "sksksk"])
    whole.save_pretrained(found["5 added"])
    shutil.copytree(found["5 added"], found["json added"])
    models.edit_json(found["json added"] / "tokenizer_config.json", added_tokens_decoder=...)
    return found


@pytest.mark.parametrize("name", ["1.x", "2.x", "5", "added", "5 added", "json added"])
def test_texts_have_the_ids_that_transformers_gives_them(folders: dict[str, Path], name: str) -> None:
    ours, theirs = read_tokenizer(folders[name]), CLIPTokenizer.from_pretrained(folders[name])
    for marked in (False, True):
        for text in TEXTS:
            ids = [one(text, add_special_tokens=marked)["input_ids"] for one in (ours, theirs)]
            assert ids[0] == ids[1]
            assert ours.decode(ids[0]) == theirs.decode(ids[1])
    assert ours.get_vocab() == theirs.get_vocab()
    for mark in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, mark) == getattr(theirs, mark)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("vocab.json", {"<|endoftext|>": 49408}, "ids are not those from 0 on"),
        ("vocab.json", {"<|endoftext|>": 10**9}, "ids are not those from 0 on"),
        ("vocab.json", {"<|endoftext|>": -1}, "ids are not those from 0 on"),
        ("vocab.json", {"<|endoftext|>": "x"}, "ids are not those from 0 on"),
        ("vocab.json", {"<|endoftext|>": True}, "ids are not those from 0 on"),
        ("vocab.json", {"<|endoftext|>": 5}, "an id twice"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "asks for code with auto_map"),
        ("special_tokens_map.json", {"pad_token": 5}, "has the token 5 for pad_token"),
        ("tokenizer_config.json", {"eos_token": 2**63}, "tokenizer_config.json: has the token 9223372036854775808 for"),
        ("special_tokens_map.json", {"pad_token": {"content": 5}}, "for pad_token"),
        ("special_tokens_map.json", {"pad_token": {"content": "x", "lstrip": "no"}}, "for pad_token"),
        ("special_tokens_map.json", {"pad_token": "x" * 201}, "for pad_token"),
        ("special_tokens_map.json", {"additional_special_tokens": "x"}, "that are no list of tokens"),
        ("special_tokens_map.json", {"additional_special_tokens": ["x"] * 10_001}, "that are no list of tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "an added_tokens_decoder without tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "without a text and an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"49408": {}}}, "without a text and an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"49406": {"content": []}}}, "without a text and an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"²": {"content": "y"}}}, "without a text and an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"4" * 5000: {"content": "y"}}}, "without a text and an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"49408": {"content": "\ud800"}}}, "has the token"),
        ("special_tokens_map.json", {"bos_token": {"content": []}}, "for bos_token"),
        ("special_tokens_map.json", {"bos_token": {"content": {}}}, "for bos_token"),
        ("special_tokens_map.json", {"pad_token": "\ud800"}, "for pad_token"),
        ("added_tokens.json", {"\ud800": 49408}, "has the token"),
        ("added_tokens.json", {"<sks>": 60000}, "gives '<sks>' the id 60000, which does not follow the others"),
        ("added_tokens.json", {"<sks>": None}, "without a text and an id"),
        ("added_tokens.json", {f"<{n}>": 49408 + n for n in range(10_001)}, "has 10,001 tokens besides"),
    ],
)
def test_what_is_no_tokenizer_of_clip_is_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "model" / "tokenizer"))
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    models.edit_json(folder / name, **changes)
    with pytest.raises(InputError, match=said) as refused:
        read_tokenizer(folder)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "has no vocab"),
        ({"model": {"vocab": [1]}}, "has no vocab"),
        ({"model": {"vocab": {"a": 0}}}, "has no merges"),
        ({"model": {"vocab": {"a": 0}, "merges": ["a b c"]}}, "no pairs"),
        ({"model": {"vocab": {"a": 0}, "merges": [5]}}, "no pairs"),
        ({"model": {"vocab": {"a": 0}, "merges": []}}, "has no merges"),
        ({"model": {"vocab": {"a": 0}, "merges": ["a a"]}, "added_tokens": [5]}, "without content and id"),
        ({"model": {"vocab": {"a": 0}, "merges": ["a b"]}}, "is no CLIP tokenizer"),
    ],
)
def test_a_tokenizer_json_that_is_none_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=said):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#version: 0.2\n", b"a b c\n", b"a\n"])
def test_merges_that_are_none_are_refused(folders: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "model" / "tokenizer"))
    (folder / "merges.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"merges\.txt"):
        read_tokenizer(folder)


def test_files_that_a_tokenizer_has_no_use_for_are_not_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    """A template runs as a program, and a FIFO makes whoever opens it wait."""
    folder = Path(shutil.copytree(folders["1.x"], tmp_path / "model" / "tokenizer"))
    os.mkfifo(folder / "chat_template.jinja")
    (folder / "additional_chat_templates").symlink_to("/")
    (folder / "config.json").write_bytes(b"\xff")
    assert read_tokenizer(folder).pad_token == "<|endoftext|>"
