"""Textual-inversion files of every dialect give the same token, and what we write is read by diffusers."""

from __future__ import annotations

import base64
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.errors import InputError, NumericalError, OutputError, SdcliError
from sdcli.pipeline import adapters
from sdcli.pipeline.adapter_facts import describe
from sdcli.pipeline.adapters import Embedding, check_token, read_embedding, write_embedding
from tests import models

WIDTH = 16


def vectors(count: int = 2, *, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def safetensors(path: Path, **tensors: Tensor) -> Path:
    save_file(tensors, path)
    return path


def read(path: Path, **how: Any) -> Embedding:
    return read_embedding(path, **{"width": WIDTH, **how})


# Each dialect.


def test_what_is_written_is_read_back_from_every_dialect(tmp_path: Path) -> None:
    paths = write_embedding(tmp_path, Embedding("<my-cat>", vectors(3)), step=7)
    assert [path.name for path in paths] == ["my-cat.safetensors", "my-cat.pt", "my-cat-kohya.safetensors"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path, token in zip(paths, ("<my-cat>", "<my-cat>", "my-cat-kohya"), strict=True):
        found = read(path)
        assert found.token == token
        assert found.vectors.dtype is torch.float32 and torch.equal(found.vectors, vectors(3))


def test_one_vector_may_come_without_a_dimension_for_it(tmp_path: Path) -> None:
    assert torch.equal(read(safetensors(tmp_path / "a.safetensors", cat=vectors(1)[0])).vectors, vectors(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_any_precision_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    found = read(safetensors(tmp_path / "a.safetensors", cat=vectors().to(dtype))).vectors
    assert torch.equal(found, vectors().to(dtype).float())


@pytest.mark.parametrize(
    ("contents", "token"),
    [
        ({"string_to_param": {"*": vectors()}, "name": "cat", "string_to_token": {"*": 265}, "step": 5}, "cat"),
        ({"string_to_param": {"<cat>": vectors()}, "name": "cat"}, "cat"),
        ({"string_to_param": {"_parameters": {"*": vectors()}, "training": True}, "name": "cat"}, "cat"),
        ({"string_to_param": {"*": vectors()}}, "file"),
        ({"string_to_param": {"*": vectors()}, "name": None}, "file"),
        ({"<cat>": vectors()}, "<cat>"),
        ({"emb_params": vectors()}, "file"),
    ],
)
def test_every_shape_of_a_dialect_has_a_token(contents: dict[Any, Any], token: str) -> None:
    found, (value,) = adapters._token_and_values(Path("folder/file.pt"), contents)
    assert found == token
    assert torch.equal(value, vectors())


def picture(path: Path, **texts: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key.replace("_", "-"), text, zip=len(text) > 1000)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_an_embedding_stands_in_the_text_of_a_picture(tmp_path: Path) -> None:
    contents = {"string_to_token": {"*": 265}, "name": "my cat", "step": 5, "sd_checkpoint": None}
    contents |= {"string_to_param": {"*": {"TORCHTENSOR": vectors(3).tolist()}}}
    text = base64.b64encode(json.dumps(contents).encode()).decode()
    found = read(picture(tmp_path / "a.png", sd_ti_embedding=text))
    assert found.token == "my cat" and torch.equal(found.vectors, vectors(3))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "has no embedding in its text; one that is hidden in the pixels is not read; use the .pt"),
        ({"sd_ti_embedding": "!!"}, "its sd-ti-embedding cannot be read"),
        ({"sd_ti_embedding": base64.b64encode(b"{").decode()}, "its sd-ti-embedding cannot be read"),
        ({"sd_ti_embedding": base64.b64encode(b"[" * 100_000).decode()}, "its sd-ti-embedding cannot be read"),
        ({"sd_ti_embedding": base64.b64encode(b"[]").decode()}, "it holds a list"),
        ({"sd_ti_embedding": base64.b64encode(b'{"TORCHTENSOR": [[1], [1, 2]]}').decode()}, "cannot be read"),
        ({"sd_ti_embedding": base64.b64encode(b'{"TORCHTENSOR": ["x"]}').decode()}, "cannot be read"),
        ({"sd_ti_embedding": base64.b64encode(b'{"TORCHTENSOR": [1, 2]}').decode()}, "it holds a Tensor"),
        ({"sd_ti_embedding": base64.b64encode(b'{"string_to_param": {"*": 3}}').decode()}, "it holds int in place of"),
    ],
)
def test_other_pictures_are_refused(tmp_path: Path, texts: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(picture(tmp_path / "a.png", **texts))
    assert said in str(caught.value)


def test_the_content_tells_the_dialect_whatever_the_suffix(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "cat.pt", emb_params=vectors())
    assert (read(path).token, read(path).vectors.tolist()) == ("cat", vectors().tolist())


def test_another_token_may_be_named(tmp_path: Path) -> None:
    assert read(safetensors(tmp_path / "a.safetensors", cat=vectors()), token="<dog>").token == "<dog>"


# What other programs read.


def test_the_a1111_file_holds_what_a1111_writes(tmp_path: Path) -> None:
    write_embedding(tmp_path, Embedding("<my-cat>", vectors()), step=7)
    contents = torch.load(tmp_path / "my-cat.pt", weights_only=True)
    assert torch.equal(contents.pop("string_to_param")["*"], vectors())
    assert contents == {
        "string_to_token": {"*": 265},
        "name": "<my-cat>",
        "step": 7,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


def test_the_kohya_file_holds_what_kohya_writes(tmp_path: Path) -> None:
    write_embedding(tmp_path, Embedding("<my-cat>", vectors()))
    (found,) = load_file(tmp_path / "my-cat-kohya.safetensors").items()
    assert found[0] == "emb_params" and torch.equal(found[1], vectors())


@pytest.mark.parametrize("name", ["my-cat.safetensors", "my-cat.pt"])
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_reads_what_we_write(sd1: Path, tmp_path: Path, name: str, count: int) -> None:
    write_embedding(tmp_path, Embedding("<my-cat>", vectors(count)))
    pipe: StableDiffusionPipeline = models.pipeline(sd1)
    pipe.load_textual_inversion(str(tmp_path), weight_name=name)
    tokens = ["<my-cat>", "<my-cat>_1", "<my-cat>_2"][:count]
    rows = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(tokens)]
    assert torch.equal(rows, vectors(count))


# Writing.


def test_the_same_embedding_gives_the_same_bytes_in_another_process(forks: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    write_embedding(tmp_path / "here", Embedding("<my-cat>", vectors()), step=7)
    code = f"""
import pathlib, torch
from sdcli.pipeline import adapters
from sdcli.pipeline.adapter_facts import describe
from sdcli.pipeline.adapters import Embedding, write_embedding
vectors = torch.randn(2, {WIDTH}, generator=torch.Generator().manual_seed(0))
write_embedding(pathlib.Path(arguments[0]), Embedding("<" + "my-cat>", vectors), step=7)
"""
    assert forks.python(code, [str(tmp_path / "there")]).code == 0
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_a_row_of_a_larger_table_is_written_alone(tmp_path: Path) -> None:
    paths = write_embedding(tmp_path, Embedding("cat", torch.ones(10_000, WIDTH)[7:8]))
    assert max(path.stat().st_size for path in paths) < 3000


@pytest.mark.parametrize(
    ("token", "stem"),
    [
        ("<my-cat>", "my-cat"),
        ("my style v1.5", "my-style-v1.5"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\con", "C-con"),
        (".hidden", "hidden"),
        ("<*>", "embedding"),
        ("小狗" * 50, "小狗" * 33),
    ],
)
def test_a_file_is_named_for_its_token_and_stays_in_its_folder(tmp_path: Path, token: str, stem: str) -> None:
    paths = write_embedding(tmp_path, Embedding(token, vectors()))
    assert [path.name for path in paths] == [f"{stem}.safetensors", f"{stem}.pt", f"{stem}-kohya.safetensors"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert read(paths[0]).token == token


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="vectors of <my-cat> are not finite"):
        write_embedding(tmp_path, Embedding("<my-cat>", vectors() * math.inf))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file or directory"):
        write_embedding(tmp_path / "none", Embedding("<my-cat>", vectors()))


# What is told of one that is pickled.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "Stable Diffusion XL"),
        ({"string_to_param": {"*": torch.ones(2, 1024)}, "name": "cat"}, "Stable Diffusion 2.x"),
        ({"<cat>": torch.ones(768)}, "Stable Diffusion 1.x"),
        ({"state_dict": {"lora_te2_x.lora_up.weight": torch.ones(4, 2)}}, "Stable Diffusion XL"),
        ({"lora_unet_x_attn2_to_k.lora_down.weight": torch.ones(2, 768)}, "Stable Diffusion 1.x"),
    ],
)
def test_a_pickled_adapter_is_told_of_by_its_family(value: Any, expected: str) -> None:
    told = adapters._described(Path("a.pt"), value)
    assert told is not None and told["family"] == expected


def test_a_pickled_adapter_is_told_of_as_by_its_header(tmp_path: Path) -> None:
    stem = "lora_unet_x_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": vectors(4), f"{stem}.lora_up.weight": torch.ones(8, 4)}
    tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    assert adapters._described(Path("a.pt"), tensors) == describe(safetensors(tmp_path / "a", **tensors))
    expected = {"kind": "textual inversion", "dialects": ["A1111"], "vectors": 2, "width": WIDTH, "family": None}
    found = adapters._described(Path("a.pt"), {"string_to_param": {"*": vectors()}, "name": "cat"})
    assert found == {**expected, "token": "cat"}


@pytest.mark.parametrize("value", [None, [vectors()], {"a": vectors(), "b": 3}, {"a": vectors(), "b": vectors()}])
def test_other_pickles_are_no_adapters(value: Any) -> None:
    assert adapters._described(Path("a.pt"), value) is None


# What is refused.


@pytest.mark.parametrize(
    ("tensors", "error", "said"),
    [
        (
            {"cat": vectors(width=1024)},
            InputError,
            "are 1024 wide (Stable Diffusion 2.x), the model's 768 wide (Stable",
        ),
        ({"cat": vectors(width=192)}, InputError, "are 192 wide (the embedded model), the model's 768 wide"),
        ({"cat": vectors(width=33)}, InputError, "are 33 wide, the model's 768 wide"),
        (
            {"clip_l": vectors(width=768), "clip_g": vectors(width=1280)},
            InputError,
            "are 768 and 1280 wide (Stable Diffusion XL), the model's 768 wide (Stable Diffusion 1.x); use one that",
        ),
        ({"cat": vectors(76, width=768)}, InputError, "holds 76 vectors; expected are 1 to 75"),
        ({"cat": torch.zeros(0, 768)}, InputError, "holds 0 vectors"),
        ({"cat": torch.zeros(0)}, InputError, "holds 0 vectors"),
        ({"cat": torch.zeros(2, 768)}, InputError, "its vectors are all zero"),
        ({"cat": vectors(width=768) * math.inf}, NumericalError, "its vectors hold NaN or Inf"),
        ({"cat": vectors(width=768).double() * 1e300}, NumericalError, "its vectors hold NaN or Inf"),
        ({"cat": torch.ones(2, 768, dtype=torch.int64)}, InputError, "it holds torch.int64 (2, 768) in place of"),
        ({"cat": torch.ones(1, 2, 768)}, InputError, "it holds torch.float32 (1, 2, 768) in place of"),
        ({"cat": torch.tensor(1.0)}, InputError, "it holds torch.float32 () in place of"),
        ({"a.lora_up": vectors(), "a.lora_down": vectors()}, InputError, "it holds 2 entries (a.lora_down, a.lora_"),
        ({"a.lora_up.weight": vectors(), "a.alpha": vectors()}, InputError, "is a LoRA file; give it to --lora"),
        ({}, InputError, "it holds 0 entries"),
        ({"a\nb": vectors(width=768)}, InputError, r"no prompt can name the token 'a\nb'"),
        ({"": vectors(width=768)}, InputError, "no prompt can name the token ''"),
    ],
)
def test_what_does_not_fit_a_model_of_width_768_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], error: type[SdcliError], said: str
) -> None:
    path = safetensors(tmp_path / "a.safetensors", **tensors)
    with pytest.raises(error) as caught:
        read(path, width=768)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("more", [{"clip_g": torch.ones(2, 1280)}, {"other": torch.ones(2)}])
def test_an_error_does_not_repeat_a_name_of_any_length(tmp_path: Path, more: dict[str, Tensor]) -> None:
    save_file({"a" * 100_000: torch.ones(2), **more}, tmp_path / "a.safetensors")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", ["clip_l", "text_encoders_0"])
def test_the_first_of_a_pair_alone_is_for_a_model_of_one_text_encoder(tmp_path: Path, key: str) -> None:
    save_file({key: vectors(3)}, tmp_path / "my-cat.safetensors")
    found = read(tmp_path / "my-cat.safetensors")
    assert found.token == "my-cat" and torch.equal(found.vectors, vectors(3)) and found.second is None
    facts = describe(tmp_path / "my-cat.safetensors")
    assert facts is not None and facts["kind"] == "textual inversion" and "token" not in facts


@pytest.mark.parametrize("save", [save_file, torch.save])
@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_a_pair_for_two_text_encoders_is_named_for_its_file(
    tmp_path: Path, save: Callable[..., None], keys: tuple[str, str]
) -> None:
    one, other = vectors(3), vectors(3, width=24)
    save({keys[1]: other.half(), keys[0]: one}, tmp_path / "my-cat.any")
    found = read(tmp_path / "my-cat.any", second=24)
    assert found.token == "my-cat" and torch.equal(found.vectors, one)
    assert found.second is not None and torch.equal(found.second, other.half().float())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"cat": vectors(width=768)},
            "are 768 wide (Stable Diffusion 1.x), the model's 768 and 1280 wide (Stable Diff",
        ),
        ({"emb_params": vectors(width=1280)}, "are 1280 wide (the second text encoder of Stable Diffusion XL), the mo"),
        (
            {"clip_g": vectors(width=1280)},
            "is no pair for the two text encoders of Stable Diffusion XL: it holds clip_g;",
        ),
        (
            {"text_encoders_1": vectors(width=1280)},
            "it holds text_encoders_1; expected are text_encoders_0 and text_encoders_1",
        ),
        (
            {"clip_l": vectors(width=768), "clip_g": vectors(width=1280), "t5": vectors()},
            "it holds clip_g, clip_l, t5; expected are clip_l and clip_g",
        ),
        (
            {"clip_l": vectors(width=1280), "clip_g": vectors(width=768)},
            "are 1280 and 768 wide (Stable Diffusion XL), t",
        ),
        (
            {"clip_l": vectors(2, width=768), "clip_g": vectors(3, width=1280)},
            "holds 2 vectors for the first text encoder, 3 for the second; get the file again",
        ),
        ({"clip_l": vectors(width=768), "clip_g": torch.zeros(2, 1280)}, "its vectors are all zero"),
        ({"clip_l": vectors(76, width=768), "clip_g": vectors(76, width=1280)}, "holds 76 vectors"),
        ({"clip_l": vectors(width=768).int(), "clip_g": vectors(width=1280)}, "it holds torch.int32 (2, 768) in place"),
    ],
)
def test_what_does_not_fit_two_encoders_is_refused(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(safetensors(tmp_path / "a.safetensors", **tensors), width=768, second=1280)
    assert said in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("learned", [{}, {"*": vectors(), "+": vectors()}, vectors(), None, {"_parameters": 3}])
def test_a1111_holds_one_tensor_and_no_more(learned: Any) -> None:
    with pytest.raises(
        InputError, match=r"a\.pt: is no textual-inversion file: it holds not one tensor in string_to_p"
    ):
        adapters._token_and_values(Path("a.pt"), {"string_to_param": learned, "name": "cat"})


@pytest.mark.parametrize("token", ["", " a", "a\0", "a\x1b[31m", "x" * 101, "__metadata__", "\ud800", "a\u00a0b"])
def test_a_token_that_no_prompt_can_name_is_refused(token: str) -> None:
    with pytest.raises(InputError, match="--token: no prompt can name the token '") as caught:
        check_token(token, "--token")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("token", ["a", "<my-cat>", "my style", "小狗", "🐶", "x" * 100])
def test_other_tokens_are_good(token: str) -> None:
    check_token(token, "--token")


def test_a_file_spoiled_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", **{"<my-cat>": vectors()})
    whole, chance, refused = path.read_bytes(), random.Random(7), 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data) if chance.random() < 0.5 else 80)] = chance.randrange(256)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            assert read(path).vectors.shape[1] == WIDTH
        except (InputError, NumericalError):
            refused += 1
    assert 0 < refused < 500


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.pt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"a\.pt: has 1,099,511,627,776 bytes; at most 16,777,216 are accepted"):
        read(tmp_path / "a.pt")
