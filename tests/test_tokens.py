"""The tokens story: what is told and written of a prompt is what the text encoder makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sdcli import tokens
from sdcli.errors import InputError, OutputError, SdcliWarning, UsageError
from sdcli.lab.specs import TokensSpec
from sdcli.pipeline.adapters import Embedding, write_embedding
from tests import models

PROMPT = "A picture of a puppy"
IDS = [49406, 320, 1674, 539, 320, 6829, 49407, *[49407] * 70]


@pytest.fixture
def asked(sd1: Path) -> Any:
    def spec(prompt: str = PROMPT, **values: Any) -> TokensSpec:
        return TokensSpec(prompt=prompt, model=str(sd1), **values)

    return spec


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    """A textual-inversion file of two vectors for `<my-cat>`."""
    vectors = torch.randn(2, models.CONTEXT, generator=torch.Generator().manual_seed(1))
    return write_embedding(tmp_path, Embedding("<my-cat>", vectors))[0]


def written(spec: TokensSpec, path: Path) -> dict[str, Tensor]:
    assert tokens.walk(replace(spec, embeddings=(path,), if_exists="overwrite")).files == (path,)
    return load_file(path)


def test_the_articles_prompt_gives_the_articles_ids_and_mask(asked: Any) -> None:
    found = tokens.walk(asked())
    (chunk,) = found.facts["chunks"]
    assert chunk["ids"] == IDS
    assert chunk["attention_mask"] == [1] * 7 + [0] * 70
    assert chunk["weights"] == [1.0] * 77
    assert [row.piece for row in found.rows[1:6]] == ["a</w>", "picture</w>", "of</w>", "a</w>", "puppy</w>"]
    assert [row.state for row in found.rows] == ["mark", *["kept"] * 5, "mark", *["padding"] * 70]
    assert [row.position for row in found.rows] == list(range(77))
    assert found.facts["tokens"] == {"kept": 5, "cut": 0, "chunks": 1}
    assert (found.facts["length"], found.facts["vocabulary"]) == (77, 49408)
    assert "tensors" not in found.facts
    json.dumps(found.facts)


def test_rows_tell_weight_and_chunk(asked: Any) -> None:
    found = tokens.walk(asked("a (dog:1.5) BREAK [cat]"))
    dog, begin, cat = found.rows[2], found.rows[77], found.rows[78]
    assert (dog.piece, dog.weight, dog.chunk, dog.position) == ("dog</w>", 1.5, 1, 2)
    assert (begin.piece, begin.weight, begin.chunk, begin.position) == ("<|startoftext|>", 1.0, 2, 0)
    assert (cat.piece, cat.weight, cat.chunk, cat.position) == ("cat</w>", pytest.approx(1 / 1.1), 2, 1)


def test_what_is_cut_has_no_position(asked: Any) -> None:
    with pytest.warns(SdcliWarning, match="the last 2 of 1202 tokens"):
        found = tokens.walk(asked("dog " * 1200 + "(puppy:1.2) cat"))
    assert [(row.piece, row.state, row.weight, row.chunk, row.position) for row in found.rows[-2:]] == [
        ("puppy</w>", "cut", 1.2, None, None),
        ("cat</w>", "cut", 1.0, None, None),
    ]
    assert len(found.rows) == 16 * 77 + 2
    assert "position" not in found.facts["rows"][-1]


def test_a_swapped_word_tells_what_is_fed(asked: Any) -> None:
    found = tokens.walk(asked(replace=("picture=photo",), mix=("puppy=0.5,cat=0.5",)))
    fed = {row.piece: (row.id, row.fed) for row in found.rows if row.fed is not None}
    assert fed == {"picture</w>": (1125, "photo</w>"), "puppy</w>": (49408, "0.5 puppy</w> + 0.5 cat</w>")}
    assert (found.facts["mix"], found.facts["vocabulary"]) == (["puppy=0.5,cat=0.5"], 49409)


def test_a_learned_token_has_a_row_a_vector(asked: Any, cat: Path) -> None:
    found = tokens.walk(asked("a <my-cat>", embedding=(str(cat),)))
    assert [(row.id, row.piece) for row in found.rows[1:4]] == [
        (320, "a</w>"),
        (49408, "<my-cat>"),
        (49409, "<my-cat>_1"),
    ]


def test_the_tensors_are_the_encoders_own(asked: Any, sd1: Path, tmp_path: Path) -> None:
    found = written(asked(), tmp_path / "e.safetensors")
    encoder = models.pipeline(sd1).text_encoder
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(found["input_embedding"], encoder.embeddings(ids))
        assert torch.equal(found["token_embedding"], encoder.embeddings.token_embedding(ids))
        assert torch.equal(found["position_embedding"], encoder.embeddings.position_embedding.weight)
        assert torch.allclose(found["context"], encoder(ids).last_hidden_state, rtol=0, atol=1e-6)
    assert torch.equal(found["ids"], ids)
    assert found["attention_mask"].sum() == 7
    assert found["causal_mask"].shape == (77, 77)
    assert torch.equal(found["weights"], torch.ones(1, 77))


def test_the_output_is_that_of_the_layers_that_are_not_left_out(asked: Any, sd1: Path, tmp_path: Path) -> None:
    found = written(asked(clip_skip=1, embeddings=(tmp_path / "e.safetensors",)), tmp_path / "e.safetensors")
    encoder = models.pipeline(sd1).text_encoder
    with torch.no_grad():
        states = encoder(torch.tensor([IDS]), output_hidden_states=True).hidden_states
        assert torch.allclose(found["context"], encoder.final_layer_norm(states[1]), rtol=0, atol=1e-6)
    assert tokens.walk(asked(clip_skip=1, embeddings=(tmp_path / "f.safetensors",))).facts["clip_skip"] == 1


def test_a_word_replaced_by_itself_changes_no_bit(asked: Any, tmp_path: Path) -> None:
    plain = written(asked(), tmp_path / "plain.safetensors")
    for swap in ({"replace": ("puppy=puppy",)}, {"mix": ("puppy=1,cat=0",)}):
        same = written(asked(**swap), tmp_path / "same.safetensors")
        assert torch.equal(same["context"], plain["context"])
        assert torch.equal(same["input_embedding"], plain["input_embedding"])
    other = written(asked(replace=("puppy=cat",)), tmp_path / "other.safetensors")
    assert not torch.equal(other["context"], plain["context"])
    assert torch.equal(other["context"], written(asked("a picture of a cat"), tmp_path / "cat.safetensors")["context"])


def test_statistics_are_those_of_the_tensors(asked: Any, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    told = {one["name"]: one for one in tokens.walk(asked("a dog BREAK a cat", embeddings=(path,))).facts["tensors"]}
    found = load_file(path)
    assert list(told) == ["token_embedding", "position_embedding", "input_embedding", "context", "causal_mask"]
    assert told["context"]["shape"] == [1, 154, 16]
    for name, one in told.items():
        values = found[name].double()
        assert one["shape"] == list(values.shape)
        assert one["mean"] == pytest.approx(float(values.mean()))
        assert one["std"] == pytest.approx(float(values.std(correction=0)))
        assert (one["min"], one["max"]) == (float(values.min()), float(values.max()))
        assert one["first"] == values.flatten()[:4].tolist()
    json.dumps(told, allow_nan=False)


def test_the_mask_alone_reads_no_weights(asked: Any, model: Path, tmp_path: Path) -> None:
    models.weight_file(model / "text_encoder").write_bytes(b"no weights")
    spec = TokensSpec(prompt=PROMPT, model=str(model), mask=(tmp_path / "m.safetensors",))
    tokens.walk(spec)
    mask = load_file(tmp_path / "m.safetensors")
    assert list(mask) == ["causal_mask"]
    assert mask["causal_mask"][0, 1] == torch.finfo(torch.float32).min
    assert mask["causal_mask"].tril().abs().max() == 0


def test_unet_and_vae_are_not_read(model: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        models.weight_file(model / part).write_bytes(b"no weights")
    tokens.walk(TokensSpec(prompt=PROMPT, model=str(model), embeddings=(tmp_path / "e.safetensors",)))
    assert (tmp_path / "e.safetensors").exists()


def test_the_same_call_gives_the_same_bytes(asked: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "a.png", "b.png")]
    tokens.walk(asked(embeddings=tuple(files)))
    data = [path.read_bytes() for path in files]
    assert (data[0], data[2]) == (data[1], data[3])


def test_the_picture_has_a_row_of_panels_for_each_chunk(asked: Any, tmp_path: Path) -> None:
    one, two, mask = (tmp_path / name for name in ("one.png", "two.png", "mask.png"))
    tokens.walk(asked(embeddings=(one,), mask=(mask,)))
    tokens.walk(asked("a BREAK b", embeddings=(two,)))
    sizes = [Image.open(path).size for path in (one, two, mask)]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 1.9 * sizes[0][1] > 1.9 * 77 * 10
    assert sizes[2][0] < sizes[0][0]


def test_files_that_are_there_are_numbered_kept_or_replaced(asked: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"mine")
    assert tokens.walk(asked(mask=(path,))).files == (tmp_path / "m-2.safetensors",)
    tokens.walk(asked(mask=(path,), if_exists="skip"))
    assert path.read_bytes() == b"mine"
    with pytest.raises(OutputError, match="exists"):
        tokens.walk(asked(mask=(path,), if_exists="error"))
    tokens.walk(asked(mask=(path,), if_exists="overwrite"))
    assert load_file(path)["causal_mask"].shape == (77, 77)


def test_a_model_that_reads_no_prompts_is_refused(classed: Path, unconditional: Path) -> None:
    for folder in (classed, unconditional):
        with pytest.raises(UsageError, match="--model: this one reads no prompts"):
            tokens.walk(TokensSpec(prompt=PROMPT, model=str(folder)))


def test_other_files_than_tensors_and_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--embeddings .*e\.npz: of no known kind; name a \.safetensors or a \.png"):
        TokensSpec(prompt=PROMPT, embeddings=(tmp_path / "e.npz",))


def test_an_embedding_for_another_model_is_refused(asked: Any, tmp_path: Path) -> None:
    wide = write_embedding(tmp_path, Embedding("<wide>", torch.ones(1, 768)))[0]
    with pytest.raises(InputError, match=r"its vectors are 768 wide"):
        tokens.walk(asked("<wide>", embedding=(str(wide),)))
