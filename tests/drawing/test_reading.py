"""What a model makes of words: each prompt read and encoded once, and as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from sdcli.drawing import reading
from sdcli.drawing.reading import Reader
from sdcli.errors import SdcliWarning
from sdcli.pipeline import text
from sdcli.pipeline.bundle import TextEncoder, load_conditioner, load_text
from sdcli.pipeline.wildcards import Prompts
from sdcli.plan import Plan, plan
from sdcli.specs import GenerateSpec

SHORT, LONG = "a puppy", "cat " * 80


@pytest.fixture(scope="module")
def encoder(sd1: Path) -> TextEncoder:
    return load_text(sd1, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every call of the text encoder."""
    calls: list[int] = []
    forward = CLIPTextModel.forward

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    return calls


def decided(folder: Path, output: Path, **how: Any) -> Plan:
    return plan(GenerateSpec(**{"prompt": "x", "model": str(folder), "output": output, "steps": 3, **how}))


def test_each_context_is_that_of_the_prompt_alone_filled_to_the_longer_of_the_two(
    encoder: TextEncoder, sd1: Path, tmp_path: Path
) -> None:
    reader, guided = Reader(encoder, ()), decided(sd1, tmp_path)
    pairs = [(SHORT, LONG), (LONG, ""), (LONG, "blurry")]
    context, away = reader.contexts([reader.read(Prompts(*pair), guided) for pair in pairs])
    assert away is not None and context.hidden.shape == away.hidden.shape == (3, 2 * 77, 16)
    for row, pair in enumerate(pairs):
        for found, prompt in zip((context.hidden[row], away.hidden[row]), pair, strict=True):
            with torch.no_grad():
                assert torch.equal(found, text.encode_chunks(encoder, [text.read(encoder, prompt).padded(2)])[0])


def test_a_prompt_is_encoded_once_until_it_is_forgotten(
    encoder: TextEncoder, encoded: list[int], sd1: Path, tmp_path: Path
) -> None:
    reader, guided = Reader(encoder, ()), decided(sd1, tmp_path)
    for _ in range(3):
        reader.contexts([reader.read(Prompts(prompt, "blurry"), guided) for prompt in (SHORT, "a cat", SHORT)])
    assert len(encoded) == 3  # two prompts and a negative one
    reader.forget()
    reader.contexts([reader.read(Prompts(SHORT, "blurry"), guided)])
    assert len(encoded) == 5


def test_however_many_prompts_there_are_only_so_many_are_kept_and_none_is_mistaken(
    encoder: TextEncoder, encoded: list[int], sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_KEPT", 2)
    monkeypatch.setattr(reading, "MOST_KEPT_BYTES", 2 * 77 * 16 * 4)
    reader, guided = Reader(encoder, ()), decided(sd1, tmp_path, guidance=1.0)
    prompts = [Prompts(f"a {name}") for name in ("cat", "dog", "cow", "cat")]
    context, away = reader.contexts([reader.read(one, guided) for one in prompts])
    assert away is None and len(encoded) == 4
    assert torch.equal(context.hidden[0], context.hidden[3])
    assert not torch.equal(context.hidden[0], context.hidden[1])


def test_what_is_wrong_is_told_once_a_prompt_and_each_of_a_cause_of_its_own(
    encoder: TextEncoder, sd1: Path, tmp_path: Path
) -> None:
    """Of one cause only the first warnings are shown: many of one kind must not hide another."""
    reader = Reader(encoder, ())
    asked = [
        (Prompts("dog " * 1201, "dog " * 1201), decided(sd1, tmp_path)),
        (Prompts(SHORT, "blurry"), decided(sd1, tmp_path, guidance=1.0)),
    ]
    with pytest.warns(SdcliWarning) as told:
        assert len([reader.read(*one) for one in asked * 2]) == 4
    assert [str(one.message).split(":")[0] for one in told] == [
        "the prompt is too long",
        "the negative prompt is too long",
        "the negative prompt is not used",
    ]
    assert len({(one.filename, one.lineno) for one in told}) == 3


def test_a_class_is_a_row_whatever_else_is_said(classed: Path, tmp_path: Path) -> None:
    embedder = load_conditioner(classed, device=torch.device("cpu"), dtype=torch.float32)
    reader, how = Reader(embedder, ()), {"prompt": "", "class_name": "dog"}
    dog, cat = (decided(classed, tmp_path, **how | {"class_name": name}) for name in ("dog", "cat"))
    found = [reader.read(Prompts(""), one) for one in (dog, cat, dog)]
    assert [one.chunks for one in found] == [None] * 3 and {one.count for one in found} == {1}
    context, away = reader.contexts(found)
    assert away is not None and context.hidden.shape == away.hidden.shape == (3, 1, 16)
    assert torch.equal(context.hidden[0], context.hidden[2])
    assert not torch.equal(context.hidden[0], context.hidden[1])
