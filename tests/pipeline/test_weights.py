"""What a single file holds is what diffusers' own converter finds in it, tensor by tensor, and is not copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.errors import InputError, NumericalError
from sdcli.original.checkpoint import read_checkpoint
from sdcli.pipeline.bundle import load_bundle, load_text, load_unet
from sdcli.pipeline.weights import is_finite, read_state, write_tensors
from tests import originals

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, small, in the authors' naming."""
    folder = tmp_path_factory.mktemp("originals")
    v = {"modelspec.prediction_type": "v"}
    return {
        "sd1": originals.write(folder / "sd1.safetensors", originals.SD1),
        "half": originals.write(folder / "half.safetensors", originals.SD1, dtype=torch.float16),
        "sd2": originals.write(folder / "sd2.safetensors", originals.SD2, metadata=v, dtype=torch.bfloat16),
        "sdxl": originals.write(folder / "sdxl.safetensors", originals.SDXL, dtype=torch.float16),
        "inpainting": originals.write(folder / "inpainting.safetensors", originals.INPAINTING),
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def expected_text(whole: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    if kind != "sd2":
        found = oracle.convert_ldm_clip_checkpoint(whole)
    else:
        found = oracle.convert_open_clip_checkpoint(None, whole)
    return {
        key.removeprefix("text_model."): value
        for key, value in found.items()
        if "position_ids" not in key and "text_projection" not in key
    }


@pytest.mark.parametrize("kind", ["sd1", "half", "sd2", "sdxl", "inpainting"])
def test_every_tensor_is_the_one_that_diffusers_own_converter_gives(files: dict[str, Path], kind: str) -> None:
    path, whole = files[kind], load_file(files[kind])
    configs = read_checkpoint(path).configs
    assert_equal(read_state(path, "unet"), oracle.convert_ldm_unet_checkpoint(dict(whole), dict(configs["unet"])))
    assert_equal(read_state(path, "vae"), oracle.convert_ldm_vae_checkpoint(dict(whole), dict(configs["vae"])))
    assert_equal(read_state(path, "text_encoder"), expected_text(dict(whole), kind))
    if kind == "sdxl":
        expected = oracle.convert_open_clip_checkpoint(None, dict(whole), prefix=originals.OPEN_CLIP_XL)
        assert_equal(read_state(path, "text_encoder_2"), expected)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_text_encoder_without_one_of_its_layers_is_refused(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Those behind it are not taken for tensors that nothing reads."""
    whole = load_file(files[kind])
    save_file({key: value for key, value in whole.items() if ".resblocks.1." not in key}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"0 tensors of its .*text encoder are missing and [1-9]"):
        load_text(tmp_path / "bad.safetensors", device=CPU, dtype=torch.float32)


def test_averages_are_taken_when_asked_for_and_refused_where_there_are_none(
    files: dict[str, Path], tmp_path: Path
) -> None:
    whole = load_file(files["sd1"])
    save_file(whole | originals.averages(whole), tmp_path / "ema.safetensors")
    plain, averaged = (read_state(tmp_path / "ema.safetensors", "unet", averaged=one) for one in (False, True))
    assert_equal(plain, read_state(files["sd1"], "unet"))
    assert_equal(averaged, {key: value * 0.5 for key, value in plain.items()})
    with pytest.raises(InputError, match=r"sd1\.safetensors: holds no averaged weights"):
        read_state(files["sd1"], "unet", averaged=True)


def test_a_matrix_in_the_vae_attention_is_read_as_well_as_a_convolution(files: dict[str, Path], tmp_path: Path) -> None:
    whole = load_file(files["sd1"])
    newer = {
        key: value.flatten(1) if ".mid.attn_1." in key and key.endswith("weight") and value.dim() == 4 else value
        for key, value in whole.items()
    }
    assert any(newer[key].dim() != whole[key].dim() for key in whole)
    save_file(newer, tmp_path / "new.safetensors")
    assert_equal(read_state(tmp_path / "new.safetensors", "vae"), read_state(files["sd1"], "vae"))


def test_weights_of_the_type_asked_for_stay_mapped_on_the_file(files: dict[str, Path]) -> None:
    """No second copy: what is not written to takes no memory of the process's own."""
    unet = load_unet(files["half"], device=CPU, dtype=torch.float16)
    weight = unet.down_blocks[0].resnets[0].conv1.weight
    lines = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(files["half"]) in line]
    assert any(int(first, 16) <= weight.data_ptr() < int(last, 16) for first, last in spans)


def test_a_whole_model_loads_with_its_own_tokenizer(files: dict[str, Path]) -> None:
    for kind, pad in (("sd1", "<|endoftext|>"), ("sd2", "!")):
        bundle = load_bundle(files[kind], device=CPU, dtype=torch.float32)
        assert bundle.conditioner.tokenizer.pad_token == pad  # type: ignore[union-attr]
        assert bundle.unet.dtype == torch.float32
        assert all(parameter.device == CPU for parameter in bundle.vae.parameters())


def changed(path: Path, target: Path, **tensors: Tensor | None) -> Path:
    """A copy of a checkpoint with tensors by the ends of their names changed, or left out."""
    whole = load_file(path)
    for end, value in tensors.items():
        (key,) = [key for key in whole if key.endswith(end.replace("__", "."))]
        if value is None:
            del whole[key]
        else:
            whole[key] = value
    save_file(whole, target)
    return target


LEAF = "diffusion_model__middle_block__1__norm__weight"


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (None, InputError, "1 tensors of its UNet are missing and 0 unexpected"),
        (torch.zeros(7), InputError, r"has shape \(7,\)"),
        (torch.full((64,), torch.nan), NumericalError, "holds NaN or Inf"),
        (torch.full((64,), torch.inf), NumericalError, "holds NaN or Inf"),
        (torch.zeros(64, dtype=torch.int32), InputError, "is of type torch.int32"),
    ],
)
def test_weights_that_cannot_be_are_refused_by_name(
    files: dict[str, Path], tmp_path: Path, value: Tensor | None, kind: type[Exception], said: str
) -> None:
    path = changed(files["sd1"], tmp_path / "bad.safetensors", **{LEAF: value})
    with pytest.raises(kind, match=rf"bad\.safetensors: .*{said}"):
        load_unet(path, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(("config", "said"), [({"_class_name": "os.system"}, "is a 'os.system'"), ({}, "is a None")])
def test_configs_in_the_metadata_name_no_other_class(
    files: dict[str, Path], tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(load_file(files["sd1"]), path, metadata={"sdcli.configs": json.dumps({"unet": config})})
    with pytest.raises(InputError, match=said):
        load_unet(path, device=CPU, dtype=torch.float32)


def test_what_is_written_is_to_the_byte_what_the_library_writes(tmp_path: Path) -> None:
    state = {"b": torch.ones(3, dtype=torch.float16), "a": torch.zeros(2, 2), "c": torch.ones(1, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "ours.safetensors", state, {"format": "pt"}, None)
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_type_that_cannot_hold_the_weights_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"a is not finite in torch\.float16"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.tensor([1e9])}, {}, torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_whole_numbers_are_not_written_as_weights(tmp_path: Path, dtype: torch.dtype | None) -> None:
    with pytest.raises(InputError, match=r"a: is of type torch\.int8"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1, dtype=torch.int8)}, {}, dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_type_of_number_is_asked_whether_it_is_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3).to(dtype))
    for value in (torch.nan, torch.inf, -torch.inf) if dtype != torch.float8_e4m3fn else (torch.nan,):
        assert not is_finite(torch.tensor([0.0, value, 1.0]).to(dtype))
    assert is_finite(torch.ones(0).to(dtype))
