"""What `--lora` means, and that a file which does not fit is refused before anything heavy is imported."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcli.errors import InputError, UsageError
from sdcli.plan.lora_files import LoraFile, check_fit, content, lora_facts, lora_file
from tests import models


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "odd:0.5", "a.safetensors:2", ":1"):
        Path(name).touch()


@pytest.mark.parametrize(
    ("written", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("a.safetensors:1e1", "a.safetensors", 10.0),
        ("a.safetensors: 1 ", "a.safetensors", 1.0),
        ("odd:0.5", "odd:0.5", 1.0),
        ("odd:0.5:3", "odd:0.5", 3.0),
        ("a.safetensors:2", "a.safetensors:2", 1.0),  # a file of the whole name comes first
        (":1", ":1", 1.0),
    ],
)
def test_the_whole_is_a_file_or_what_follows_the_last_colon_a_scale(
    here: None, written: str, path: str, scale: float
) -> None:
    assert lora_file(written) == LoraFile(Path(path), scale)


@pytest.mark.parametrize(
    ("written", "error", "said"),
    [
        ("none.pt", InputError, "none.pt: no such file or directory"),
        ("none.pt:1", InputError, "--lora none.pt:1: no such file; write it as FILE or FILE:0.8"),
        ("a.safetensors:", UsageError, "--lora a.safetensors:: an empty scale is no number; write it as FILE or FILE:"),
        ("a.safetensors:big", UsageError, "big is no number"),
        ("a.safetensors:0.5:0.8", InputError, "--lora a.safetensors:0.5:0.8: no such file"),
        ("a.safetensors:nan", UsageError, "the scale is out of range; expected is -100..100; 1 is as it was trained"),
        ("a.safetensors:inf", UsageError, "the scale is out of range"),
        ("a.safetensors:-101", UsageError, "the scale is out of range"),
        (".", InputError, ".: is a folder"),
        ("", InputError, "is a folder"),
    ],
)
def test_what_is_neither_is_refused(here: None, written: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        lora_file(written)
    assert said in str(caught.value)


def test_a_file_for_another_model_is_refused_by_its_header(sd1: Path, classed: Path, tmp_path: Path) -> None:
    file = LoraFile(models.write_lora(tmp_path / "a.safetensors", sd1))
    check_fit([file], sd1)
    with pytest.raises(InputError, match=r"tensors belong to no layer of the model .* the model has no text encoder"):
        check_fit([file], classed)
    save_file({key: one.repeat(1, 2) if "down" in key else one for key, one in load_file(file.path).items()}, file.path)
    with pytest.raises(InputError, match="is for a context 32 wide, the model's is 16 wide; use one that was made for"):
        check_fit([file], sd1)


@pytest.mark.parametrize("name", ["down_blocks." + "9" * 5000 + ".resnets.0.conv1.weight", "a.weight"])
def test_headers_of_a_malformed_model_are_told_or_left_to_its_reader(sd1: Path, tmp_path: Path, name: str) -> None:
    file = LoraFile(models.write_lora(tmp_path / "a.safetensors", sd1))
    folder = models.copy(sd1, tmp_path / "model")
    models.edit_weights(folder / "unet", lambda weights: {**weights, name: torch.ones(2, 2)})
    check_fit([file], folder)
    unet = models.weight_file(folder / "unet")
    unet.write_bytes(unet.read_bytes().replace(b'"shape":[2,2]', b'"shape":"2,2"'))
    with pytest.raises(InputError, match=r"its safetensors header makes no sense"):
        check_fit([file], folder)


def test_a_pickle_is_not_read_before_it_is_needed(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK\3\4 and anything")
    check_fit([LoraFile(tmp_path / "a.pt")], sd1)
    for data, said in ((b"", "is empty"), (b"anything else", "is neither a safetensors file nor one of torch.save")):
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(InputError, match=rf"a\.pt: {said}"):
            check_fit([LoraFile(tmp_path / "a.pt")], sd1)


def test_facts_name_the_file_and_the_hash_that_a1111_gives_it(tmp_path: Path) -> None:
    path, edited = tmp_path / "my lora.safetensors", tmp_path / "edited.safetensors"
    save_file({"a": torch.ones(3)}, path, {"title": "x"})
    save_file({"a": torch.ones(3)}, edited, {"title": "another"})
    first, second = lora_facts([LoraFile(path, 0.5), LoraFile(edited)])
    short = hashlib.sha256(torch.ones(3).numpy().tobytes()).hexdigest()[:12]
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert first == {"file": path.name, "sha256": whole, "scale": 0.5, "a1111_hash": short}
    assert (second["a1111_hash"], second["sha256"] == whole) == (short, False)


def test_of_a_pickle_a1111_hashes_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"anything, really")
    (facts,) = lora_facts([LoraFile(tmp_path / "a.pt")])
    assert facts["a1111_hash"] == hashlib.sha256(b"anything, really").hexdigest()[:12] == facts["sha256"][:12]


def test_another_content_of_the_same_name_or_another_scale_is_another_job(tmp_path: Path) -> None:
    def said(data: bytes, scale: float) -> list[Any]:
        (tmp_path / "a").write_bytes(data)
        return content(LoraFile(tmp_path / "a", scale))

    assert len({str(said(data, scale)) for data in (b"one", b"other") for scale in (1.0, 0.5)}) == 4
    assert said(b"one", 1.0) == said(b"one", 1.0)
