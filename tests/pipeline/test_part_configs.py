"""What a part is built with: sizes in their ranges, of the kinds they are of, and nothing that leads to code."""

from __future__ import annotations

import inspect
from inspect import Parameter
from typing import Any

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel

from sdcli.errors import InputError
from sdcli.pipeline.part_configs import check_kinds, checked

XL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "reverse_transformer_layers_per_block": None,
    "sample_size": 128,
    "norm_eps": 1e-05,
    "flip_sin_to_cos": True,
    "_diffusers_version": "0.19",
}


def test_a_published_config_passes_without_names_of_our_own() -> None:
    assert checked("UNet2DConditionModel", XL_UNET) == {k: v for k, v in XL_UNET.items() if not k.startswith("_")}


def test_a_text_encoder_is_built_with_sizes_alone() -> None:
    config = {"hidden_size": 768, "vocab_size": 49408, "num_labels": 10**9, "id2label": {}, "dtype": "float16"}
    assert checked("CLIPTextModel", config) == {"hidden_size": 768, "vocab_size": 49408}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"block_out_channels": [10**9]},
            r"block_out_channels is \[1000000000\]; expected is a number up to 1,048,576",
        ),
        ({"block_out_channels": [320] * 17}, "a value, or up to 16"),
        ({"down_block_types": ["x"] * 10**6}, "a value, or up to 16"),
        ({"layers_per_block": [[1] * 16] * 17}, "a value, or up to 16"),
        ({"layers_per_block": 101}, "a number of layers up to 100"),
        ({"layers_per_block": True}, "a number of layers up to 100"),
        ({"layers_per_block": 100, "transformer_layers_per_block": 100}, "on 3 levels; expected are 2,000 in all"),
        ({"sample_size": 10**400}, "a number up to 1,048,576"),
        ({"norm_eps": float("inf")}, "a number up to 1,048,576"),
        ({"norm_eps": 2}, "a number from 0 to 1"),
        ({"norm_eps": "x"}, "a number from 0 to 1"),
        ({"act_fn": "x" * 201}, "text of up to 200 characters"),
        ({"anything": {"a": 1}}, "a value, or up to 16"),
        ({"scaling_factor": 0}, "a number from 0.0001 to 10000.0"),
        ({"scaling_factor": float("nan")}, "a number"),
        ({"scaling_factor": "0.18"}, "a number from 0.0001 to 10000.0"),
        ({"latents_mean": [0.0] * 4}, "only scaling_factor and shift_factor are applied"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        checked("AutoencoderKL", XL_UNET | changes)
    assert len(str(refused.value)) < 400


def argument(default: object = Parameter.empty, annotation: Any = Parameter.empty) -> dict[str, Parameter]:
    return {"key": Parameter("key", Parameter.KEYWORD_ONLY, default=default, annotation=annotation)}


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ("no", argument(False)),
        ("no", argument(False, bool)),
        ([False], argument(False, bool)),
        ([[]], argument(False, bool | tuple[bool])),
        ([[False]], argument(False, bool | tuple[bool])),
        ([[], [1]], argument(1, int | tuple[tuple[int]])),
        (1, argument(True, bool)),
        (None, argument(True)),
        ("3", argument(3, int)),
        ([3, "3"], argument(3, int | tuple[int])),
        ([3], argument(3, int)),
        (False, argument(None, int | tuple[int, int] | None)),
        (5, argument("silu", str)),
        ("x", argument((1, 2), tuple[int, ...])),
    ],
)
def test_a_value_of_another_kind_than_the_class_asks_for_is_refused(value: object, asked: dict[str, Parameter]) -> None:
    with pytest.raises(InputError, match="AutoencoderKL: key is"):
        check_kinds("AutoencoderKL", {"key": value}, asked)


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (False, argument(True, bool)),
        (None, argument(False, bool)),
        (3, argument(0.5, float)),
        (None, argument(None, int | None)),
        ([1, [2]], argument(3, int | tuple[int] | tuple[tuple])),
        (None, argument("silu", str)),
        ("x", argument(None)),
        (["a"], argument(("b",), tuple[str, ...])),
        ([True, False], argument(False, bool | tuple[bool])),
    ],
)
def test_a_value_of_the_same_kind_passes(value: object, asked: dict[str, Parameter]) -> None:
    check_kinds("AutoencoderKL", {"key": value}, asked)


@pytest.mark.parametrize("kind", [UNet2DConditionModel, AutoencoderKL, VQModel])
def test_a_flag_of_each_part_is_true_or_false(kind: type[Any]) -> None:
    arguments = inspect.signature(kind.__init__, eval_str=True).parameters
    flag = next(name for name, one in arguments.items() if isinstance(one.default, bool))
    check_kinds(kind.__name__, {name: one.default for name, one in arguments.items() if name != "self"}, arguments)
    with pytest.raises(InputError, match=f"{kind.__name__}: {flag} is 'no'; expected is true or false"):
        check_kinds(kind.__name__, {flag: "no"}, arguments)
