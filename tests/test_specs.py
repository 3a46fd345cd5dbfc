"""What the user asked for is checked in one place: every range, and no value that slips through."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.checks import MAX_SEED, parse_size
from sdcli.cli import codec, generate, train_embedding, train_unet, train_vae
from sdcli.cli.options import NO_SETTINGS
from sdcli.errors import ExitCode, UsageError
from sdcli.lab.specs import RoundtripSpec
from sdcli.specs import CodecSpec, GenerateSpec
from sdcli.train_specs import TrainEmbeddingSpec, TrainUnetSpec, TrainVaeSpec

IN_RANGE: list[tuple[type, dict[str, Any]]] = [
    (GenerateSpec, {}),
    (GenerateSpec, {"steps": 1, "guidance": 1.0, "seed": 0, "count": 1, "batch_size": 1}),
    (GenerateSpec, {"steps": 1000, "guidance": 1e6, "seed": MAX_SEED, "count": 10_000, "size": "16384x8"}),
    (GenerateSpec, {"width": 8, "height": 16384}),
    (GenerateSpec, {"init_image": "a.png", "strength": 0.0}),
    (GenerateSpec, {"init_image": "a.png", "strength": 1.0, "mask": "m.png"}),
    (CodecSpec, {"sample": True, "seed": MAX_SEED, "size": "64X64", "if_exists": "skip"}),
    (TrainVaeSpec, {"l1_weight": 0.0, "stop_after": 1, "ema": 0.0}),
    (TrainUnetSpec, {"prediction": "v", "caption_dropout": 1.0, "init": "tiny", "vae": "builtin"}),
]
OUT_OF_RANGE: list[tuple[type, dict[str, Any], str]] = [
    (GenerateSpec, {"steps": 0}, "--steps 0"),
    (GenerateSpec, {"steps": 1001}, "--steps 1001"),
    (GenerateSpec, {"steps": -1}, "--steps -1"),
    (GenerateSpec, {"guidance": 0.5}, "--guidance 0.5"),
    (GenerateSpec, {"guidance": float("nan")}, "--guidance nan"),
    (GenerateSpec, {"guidance": float("inf")}, "--guidance inf"),
    (GenerateSpec, {"seed": -1}, "--seed -1"),
    (GenerateSpec, {"seed": MAX_SEED + 1}, "--seed 18446744073709551616"),
    (GenerateSpec, {"count": 0}, "--count 0"),
    (GenerateSpec, {"count": 100_001}, "--count 100001: out of range"),
    (GenerateSpec, {"batch_size": 0}, "--batch-size 0"),
    (GenerateSpec, {"size": "512"}, "--size 512"),
    (GenerateSpec, {"size": "512x"}, "--size 512x"),
    (GenerateSpec, {"size": "0x512"}, "--size 0"),
    (GenerateSpec, {"size": "16385x512"}, "--size 16385"),
    (GenerateSpec, {"width": 4}, "--width 4"),
    (GenerateSpec, {"height": 16385}, "--height 16385"),
    (GenerateSpec, {"size": "512x512", "width": 512}, "--size and --width/--height"),
    (GenerateSpec, {"output": "-", "count": 2}, "--count 2 with --output -"),
    (GenerateSpec, {"clip_skip": -1}, "--clip-skip -1"),
    (GenerateSpec, {"prompt": "a dog", "class_name": "dog"}, "the prompt and --class exclude each other"),
    (GenerateSpec, {"if_exists": "ask"}, "--if-exists ask"),
    (GenerateSpec, {"dtype": "float8"}, "--dtype float8"),
    (GenerateSpec, {"init_image": "a.png", "strength": 1.5}, "--strength 1.5"),
    (GenerateSpec, {"init_image": "a.png", "strength": -0.1}, "--strength -0.1"),
    (GenerateSpec, {"init_image": "a.png", "strength": float("nan")}, "--strength nan"),
    (GenerateSpec, {"strength": 0.5}, "--strength without --init-image"),
    (GenerateSpec, {"mask": "m.png"}, "--mask without --init-image"),
    (GenerateSpec, {"init_image": "a.png", "latents": "n"}, "--latents and --init-image exclude each other"),
    (CodecSpec, {"seed": -1}, "--seed -1"),
    (CodecSpec, {"size": "axb"}, "--size axb"),
    (CodecSpec, {"clip_skip": -1}, "--clip-skip -1"),
    (CodecSpec, {"if_exists": ""}, "--if-exists"),
    (CodecSpec, {"dtype": "half"}, "--dtype half"),
    (TrainVaeSpec, {"model": "builtin", "init": "tiny"}, "--model and --init"),
    (TrainVaeSpec, {"batch_size": 0}, "--batch-size 0"),
    (TrainVaeSpec, {"steps": 0}, "--steps 0"),
    (TrainVaeSpec, {"save_every": 0}, "--save-every 0"),
    (TrainVaeSpec, {"keep": 0}, "--keep 0"),
    (TrainVaeSpec, {"workers": 0}, "--workers 0"),
    (TrainVaeSpec, {"stop_after": 0}, "--stop-after 0"),
    (TrainVaeSpec, {"resolution": 4}, "--resolution 4"),
    (TrainVaeSpec, {"lr": 1.5}, "--lr 1.5"),
    (TrainVaeSpec, {"lr": float("nan")}, "--lr nan"),
    (TrainVaeSpec, {"weight_decay": -0.1}, "--weight-decay -0.1"),
    (TrainVaeSpec, {"ema": 1.0}, "--ema 1.0"),
    (TrainVaeSpec, {"clip_norm": -1.0}, "--clip-norm -1.0"),
    (TrainVaeSpec, {"lr_schedule": "step"}, "--lr-schedule step"),
    (TrainVaeSpec, {"lr_warmup": -1}, "--lr-warmup -1"),
    (TrainVaeSpec, {"mixed_precision": "fp8"}, "--mixed-precision fp8"),
    (TrainVaeSpec, {"export_dtype": "int8"}, "--export-dtype int8"),
    (TrainVaeSpec, {"kl_weight": -1.0}, "--kl-weight -1.0"),
    (TrainVaeSpec, {"l1_weight": 0.0, "l2_weight": 0.0}, "--l1-weight and --l2-weight"),
    (TrainUnetSpec, {"caption_dropout": 1.1}, "--caption-dropout 1.1"),
    (TrainUnetSpec, {"prediction": "score"}, "--prediction score"),
    (TrainUnetSpec, {"init": "tiny"}, "--init needs --vae"),
]


@pytest.mark.parametrize(("spec", "values"), IN_RANGE)
def test_values_in_range_are_taken(spec: type, values: dict[str, Any]) -> None:
    made = spec(**values)
    assert all(getattr(made, name) == value for name, value in values.items())


@pytest.mark.parametrize(("spec", "values", "named"), OUT_OF_RANGE)
def test_values_out_of_range_are_named_with_what_was_expected(spec: type, values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec(**values)
    assert caught.value.message.startswith(named)
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(("text", "size"), [("512x768", (512, 768)), ("8X16", (8, 16)), ("0064x0064", (64, 64))])
def test_a_size_is_width_by_height(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=20))
def test_a_size_is_two_numbers_or_refused(text: str) -> None:
    try:
        width, height = parse_size(text)
    except UsageError:
        return
    assert 8 <= width <= 16384 and 8 <= height <= 16384


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateSpec().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "command", "apart"),
    [
        (GenerateSpec, generate.generate, {"dry_run", "preview", "no_serve"}),
        (CodecSpec, codec.encode, {"format", "quality"}),  # of decode
        (RoundtripSpec, codec.roundtrip, set()),
        (TrainVaeSpec, train_vae.train_vae, set()),
        (TrainUnetSpec, train_unet.train_unet, set()),
        (TrainEmbeddingSpec, train_embedding.train_embedding, {"init", "vlb_weight", "export_dtype"}),
    ],
)
def test_every_field_is_an_option_with_the_same_default(spec: type, command: Any, apart: set[str]) -> None:
    options = {"output" if name == "out" else name: p for name, p in inspect.signature(command).parameters.items()}
    fields = {field.name: field for field in dataclasses.fields(spec)}
    assert options.keys() - {*NO_SETTINGS, *apart} == fields.keys() - apart
    for name in fields.keys() - apart:
        if options[name].default is not inspect.Parameter.empty:
            default = options[name].default
            assert (tuple(default) if isinstance(default, list) else default) == fields[name].default, name
