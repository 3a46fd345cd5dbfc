"""LoRA files of every dialect change a model as diffusers with peft does, and leave the plain one as it was."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from sdcli.errors import InputError, NumericalError, SdcliWarning
from sdcli.pipeline.bundle import ModelBundle, TextEncoder, load_bundle
from sdcli.pipeline.lora import Adapter, delta, merged, read_adapter
from sdcli.pipeline.lora_names import model_layers, original_names
from sdcli.pipeline.lora_shapes import Change
from tests import models

CPU = torch.device("cpu")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_out.0", "up_blocks.1.attentions.1.proj_in")
ATTENTION = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_v", f"{BLOCK}.attn2.to_out.0")
CONVOLUTIONS = ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.1.conv2", "up_blocks.0.upsamplers.0.conv")
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj")


@dataclass(frozen=True)
class Low:
    """The two halves of one layer's change, and its alpha."""

    down: Tensor
    up: Tensor
    alpha: float


@pytest.fixture(scope="module")
def bundle(sd1: Path) -> ModelBundle:
    return load_bundle(sd1, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def layers(sd1: Path) -> dict[str, Any]:
    return model_layers(sd1)


def lows(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...], rank: int = 2) -> dict[str, Low]:
    """Changes of some layers, all with one alpha: of several, diffusers 0.42 applies only the commonest to the UNet."""
    chance = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        out, *inputs = shapes[name]
        down = torch.randn(rank, *inputs, generator=chance)
        up = 0.3 * torch.randn(out, rank, *[1] * (len(inputs) - 1), generator=chance)
        found[name] = Low(down, up, 3.0)
    return found


def text_model(bundle: ModelBundle) -> Any:
    assert isinstance(bundle.conditioner, TextEncoder)
    return bundle.conditioner.model


@torch.no_grad()
def answers(unet: nn.Module, text: nn.Module) -> tuple[Tensor, Tensor]:
    """What the two parts of a model say to fixed inputs."""
    chance = torch.Generator().manual_seed(1)
    x, context = (torch.randn(*shape, generator=chance) for shape in ((2, *models.LATENTS), (2, 77, models.CONTEXT)))
    ids = torch.arange(77)[None] * 100
    return unet(x, torch.tensor(500), context).sample, text(input_ids=ids).last_hidden_state


def ours(bundle: ModelBundle, *adapters: Adapter) -> tuple[Tensor, Tensor]:
    changed = merged(bundle, adapters)
    return answers(changed.unet, text_model(changed))


# The dialects, against diffusers and peft.


def kohya(unet: dict[str, Low], text: dict[str, Low], naming: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    found = {}
    parts = (("lora_unet_", unet), ("lora_te_text_model_", text))
    for prefix, part in parts:
        for name, low in part.items():
            stem = prefix + (naming or {}).get(name, name).replace(".", "_")
            found |= {f"{stem}.lora_down.weight": low.down, f"{stem}.lora_up.weight": low.up}
            found[f"{stem}.alpha"] = torch.tensor(low.alpha)
    return found


def peft(unet: dict[str, Low], text: dict[str, Low]) -> dict[str, Tensor]:
    found = {}
    for prefix, part in (("unet.", unet), ("text_encoder.text_model.", text)):
        for name, low in part.items():
            found |= {f"{prefix}{name}.lora_A.weight": low.down, f"{prefix}{name}.lora_B.weight": low.up}
    return found


def old(unet: dict[str, Low], text: dict[str, Low]) -> dict[str, Tensor]:
    found = {}
    for name, low in unet.items():
        block, _, last = name.removesuffix(".0").rpartition(".")
        stem = f"unet.{block}.processor.{last}_lora"
        found |= {f"{stem}.down.weight": low.down, f"{stem}.up.weight": low.up}
    for name, low in text.items():
        stem = f"text_encoder.text_model.{name}.lora_linear_layer"
        found |= {f"{stem}.down.weight": low.down, f"{stem}.up.weight": low.up}
    return found


@pytest.mark.parametrize(
    ("write", "names"),
    [(kohya, LINEAR + CONVOLUTIONS), (peft, LINEAR + CONVOLUTIONS), (old, ATTENTION)],
    ids=["kohya", "PEFT", "attention processors"],
)
def test_every_dialect_changes_a_model_as_in_diffusers(
    sd1: Path,
    bundle: ModelBundle,
    layers: dict[str, Any],
    tmp_path: Path,
    write: Callable[..., dict[str, Tensor]],
    names: tuple[str, ...],
) -> None:
    tensors = write(lows(layers["unet"], names), lows(layers["text_encoder"], TEXT))
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    pipe: StableDiffusionPipeline = models.pipeline(sd1)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    plain, found = ours(bundle), ours(bundle, read_adapter(path, layers))
    for one, expected, before in zip(found, answers(pipe.unet, pipe.text_encoder), plain, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one, before, atol=1e-3)


def test_names_in_the_original_naming_mean_the_same_layers(
    bundle: ModelBundle, layers: dict[str, Any], tmp_path: Path
) -> None:
    changed = lows(layers["unet"], LINEAR + CONVOLUTIONS)
    save_file(kohya(changed, {}), tmp_path / "a.safetensors")
    save_file(kohya(changed, {}, original_names(layers["unet"])), tmp_path / "b.safetensors")
    found, expected = (ours(bundle, read_adapter(tmp_path / f"{name}.safetensors", layers))[0] for name in "ba")
    assert torch.equal(found, expected)


def test_diffusers_own_metadata_tell_alpha(
    sd1: Path, bundle: ModelBundle, layers: dict[str, Any], tmp_path: Path
) -> None:
    pipe: StableDiffusionPipeline = models.pipeline(sd1)
    pattern = {f"{BLOCK}.attn2.to_k": 7.0}
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["to_q", "to_k"], init_lora_weights=False, alpha_pattern=pattern
    )
    pipe.unet.add_adapter(config)
    root = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False, use_rslora=True)
    pipe.text_encoder.add_adapter(root)
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=root.to_dict(),
    )
    found = ours(bundle, read_adapter(tmp_path / "pytorch_lora_weights.safetensors", layers))
    for one, expected in zip(found, answers(pipe.unet, pipe.text_encoder), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_attention_processors_saved_alone_are_the_unets(layers: dict[str, Any], tmp_path: Path) -> None:
    tensors = old(lows(layers["unet"], ATTENTION), {})
    torch.save({key.removeprefix("unet."): one for key, one in tensors.items()}, tmp_path / "a.bin")
    found = read_adapter(tmp_path / "a.bin", layers)
    assert {change.layer for change in found.changes} == set(ATTENTION)
    assert {change.part for change in found.changes} == {"unet"}


# The forms, against peft's own modules.


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=3, init_weights=False, target_modules=[*LINEAR, *CONVOLUTIONS]),
        LoHaConfig(r=2, alpha=3, init_weights=False, target_modules=[*CONVOLUTIONS], use_effective_conv2d=True),
        LoKrConfig(r=1, alpha=1, init_weights=False, target_modules=[*LINEAR, *CONVOLUTIONS]),
        LoKrConfig(r=1, alpha=1, init_weights=False, target_modules=[*LINEAR], decompose_both=True),
        LoKrConfig(r=1, alpha=1, init_weights=False, target_modules=[*CONVOLUTIONS], use_effective_conv2d=True),
        LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=[*LINEAR, *CONVOLUTIONS], use_dora=True),
    ],
    ids=["LoHa", "LoHa of a core", "LoKr", "LoKr of two products", "LoKr of a core", "DoRA"],
)
def test_every_form_changes_a_model_as_in_peft(
    bundle: ModelBundle, layers: dict[str, Any], tmp_path: Path, config: Any
) -> None:
    torch.manual_seed(0)
    unet = load_copy(bundle.unet)
    before = {name for name, _ in unet.named_parameters()}
    inject_adapter_in_model(config, unet)
    tensors = {}
    for name, value in unet.named_parameters():
        if ".base_layer." in name or name in before:
            continue
        if "magnitude" in name:
            value.data *= torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape)
        layer, _, role = name.replace(".default", "").removesuffix(".weight").rpartition(".")
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{stem}.{KOHYAS.get(role, role)}"] = value.detach().clone()
        tensors[f"{stem}.alpha"] = torch.tensor(float(getattr(config, "lora_alpha", 0) or config.alpha))
    save_file(tensors, tmp_path / "a.safetensors")
    found = ours(bundle, read_adapter(tmp_path / "a.safetensors", layers))
    expected = answers(unet, text_model(bundle))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found[0], ours(bundle)[0], atol=1e-3)


KOHYAS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}


def load_copy(unet: Any) -> Any:
    copied = type(unet).from_config(unet.config)
    copied.load_state_dict(unet.state_dict())
    return copied.eval()


def test_a_lora_with_a_core_is_three_convolutions_after_another() -> None:
    chance = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*s, generator=chance) for s in ((3, 5, 1, 1), (3, 3, 3, 3), (4, 3, 1, 1)))
    weight, x = torch.zeros(4, 5, 3, 3), torch.randn(1, 5, 6, 6, generator=chance)
    change = Change("unet", "conv", "lora", {"down": "d", "mid": "m", "up": "u"}, rank=3, alpha=1.5)
    found = functional.conv2d(x, delta(change, {"d": down, "m": mid, "u": up}, weight), padding=1)
    chain = functional.conv2d(functional.conv2d(functional.conv2d(x, down), mid, padding=1), up)
    torch.testing.assert_close(found, 0.5 * chain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_gives_each_output_or_each_input_its_magnitude(axis: int) -> None:
    chance = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(*s, generator=chance) for s in ((4, 5, 3, 3), (2, 5, 3, 3), (4, 2, 1, 1)))
    sizes = torch.rand(4 if axis == 0 else 5, generator=chance) + 1
    shape = (4, 1, 1, 1) if axis == 0 else (1, 5, 1, 1)
    change = Change("unet", "conv", "lora", {"down": "d", "up": "u", "dora": "m"}, rank=2)
    changed = weight + delta(change, {"d": down, "u": up, "m": sizes.reshape(shape)}, weight)
    norms = changed.square().sum([one for one in range(4) if one != axis]).sqrt()
    torch.testing.assert_close(norms, sizes)
    straight = weight + torch.einsum("or, ri... -> oi...", up[:, :, 0, 0], down)
    one, other = (value.transpose(0, axis).flatten(1) for value in (changed, straight))
    torch.testing.assert_close(functional.cosine_similarity(one, other), torch.ones(len(sizes)))


# Merging.


@pytest.fixture
def file(layers: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file(kohya(lows(layers["unet"], LINEAR), lows(layers["text_encoder"], TEXT)), path)
    return path


def test_the_plain_model_stays_as_it_is_and_shares_what_is_unchanged(
    sd1: Path, file: Path, layers: dict[str, Any]
) -> None:
    bundle = load_bundle(sd1, device=CPU, dtype=torch.float32)
    before = {name: value.clone() for name, value in bundle.unet.state_dict().items()}
    changed = merged(bundle, [read_adapter(file, layers, 0.7)])
    assert all(torch.equal(value, before[name]) for name, value in bundle.unet.state_dict().items())
    shared = {name for name, one in changed.unet.named_parameters() if one is bundle.unet.get_parameter(name)}
    assert set(before) - shared == {f"{name}.weight" for name in LINEAR}
    assert changed.vae is bundle.vae


def test_what_is_added_is_in_proportion_to_the_scale(bundle: ModelBundle, file: Path, layers: dict[str, Any]) -> None:
    name = f"{LINEAR[0]}.weight"
    plain = bundle.unet.get_parameter(name)
    once, minus, thrice = (
        merged(bundle, [read_adapter(file, layers, scale)]).unet.get_parameter(name) - plain for scale in (1, -1, 3)
    )
    torch.testing.assert_close(-once, minus)
    torch.testing.assert_close(3 * once, thrice, rtol=1e-4, atol=1e-5)


def test_at_scale_0_there_is_nothing_to_merge(bundle: ModelBundle, file: Path, layers: dict[str, Any]) -> None:
    changed = merged(bundle, [read_adapter(file, layers, 0.0)])
    assert changed.unet is bundle.unet and text_model(changed) is text_model(bundle)


def test_several_add_up_in_any_order(bundle: ModelBundle, file: Path, layers: dict[str, Any]) -> None:
    one, other = read_adapter(file, layers, 0.5), read_adapter(file, layers, 0.25)
    both = [merged(bundle, adapters).unet.state_dict() for adapters in ([one, other], [other, one])]
    together = merged(bundle, [replace(one, scale=0.75)]).unet.state_dict()
    for name, value in together.items():
        torch.testing.assert_close(both[0][name], value)
        torch.testing.assert_close(both[0][name], both[1][name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_magnitudes", [False, True], ids=["LoRA", "DoRA"])
def test_half_precision_is_rounded_once(
    sd1: Path, file: Path, layers: dict[str, Any], dtype: torch.dtype, has_magnitudes: bool
) -> None:
    half, name = load_bundle(sd1, device=CPU, dtype=dtype), LINEAR[0]
    low = lows(layers["unet"], (name,))[name]
    tensors = {key: one.half() for key, one in kohya({name: low}, {}).items()}
    weight = half.unet.get_parameter(f"{name}.weight")
    expected = weight.double() + 0.75 * low.alpha / 2 * low.up.half().double() @ low.down.half().double()
    if has_magnitudes:
        sizes = torch.linspace(0.5, 1.5, len(weight)).half()[:, None]
        tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = sizes
        direction = weight.double() + low.alpha / 2 * low.up.half().double() @ low.down.half().double()
        turned = sizes.double() * direction / direction.norm(dim=1, keepdim=True)
        expected = weight.double() + 0.75 * (turned - weight.double())
    save_file(tensors, file)
    found = merged(half, [read_adapter(file, layers, 0.75)]).unet.get_parameter(f"{name}.weight")
    assert found.dtype is dtype
    # At most half the distance to the next number, but for a few 1e-7 of float32 on the way there.
    assert ((found.double() - expected).abs() <= expected.abs() * (torch.finfo(dtype).eps / 2 + 1e-6) + 1e-7).all()
    assert (found != expected.to(dtype)).float().mean() < 0.02


def test_a_unet_of_nine_channels_takes_a_lora_of_its_own_first_layer_but_not_of_four(
    inpainting: Path, sd1: Path, file: Path
) -> None:
    bundle, of_nine = load_bundle(inpainting, device=CPU, dtype=torch.float32), model_layers(inpainting)
    names = ("conv_in", LINEAR[0])
    changed = lows(of_nine["unet"], names)
    save_file(kohya(changed, {}), file)
    found = merged(bundle, [read_adapter(file, of_nine)]).unet
    for name, low in changed.items():
        plain = bundle.unet.get_parameter(f"{name}.weight")
        added = (1.5 * (low.up.flatten(1) @ low.down.flatten(1))).reshape(plain.shape)
        assert torch.equal(found.get_parameter(f"{name}.weight"), plain + added)
    save_file(kohya(lows(model_layers(sd1)["unet"], ("conv_in",)), {}), file)
    with pytest.raises(
        InputError, match=r"conv_in: down \(2, 4, 3, 3\), up \(4, 2, 1, 1\) make no change of \(4, 9, 3, 3"
    ):
        read_adapter(file, of_nine)


def test_a_sum_beyond_the_type_is_told(sd1: Path, file: Path, layers: dict[str, Any]) -> None:
    half = load_bundle(sd1, device=CPU, dtype=torch.float16)
    tensors = kohya(lows(layers["unet"], LINEAR[:1]), {})
    save_file({key: one * 1e4 if "down" in key else one for key, one in tensors.items()}, file)
    with pytest.raises(NumericalError, match=r"attn1\.to_q is not finite in torch\.float16 once it is merged; use a s"):
        merged(half, [read_adapter(file, layers, 100.0)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_files_of_any_precision_are_read(file: Path, layers: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = kohya(lows(layers["unet"], LINEAR[:1]), {})
    save_file({key: one.to(dtype) for key, one in tensors.items()}, file)
    adapter = read_adapter(file, layers)
    added = delta(adapter.changes[0], adapter.tensors, torch.zeros(layers["unet"][LINEAR[0]]))
    assert added.dtype is torch.float32 and added.any()


def test_an_alpha_of_none_is_the_rank(layers: dict[str, Any], file: Path) -> None:
    tensors = kohya(lows(layers["unet"], LINEAR[:1]), {})
    save_file({key: one for key, one in tensors.items() if "alpha" not in key}, file)
    low, adapter = lows(layers["unet"], LINEAR[:1])[LINEAR[0]], read_adapter(file, layers)
    added = delta(adapter.changes[0], adapter.tensors, torch.zeros(layers["unet"][LINEAR[0]]))
    torch.testing.assert_close(added, low.up @ low.down)


def test_one_that_was_never_trained_is_told(layers: dict[str, Any], file: Path) -> None:
    tensors = kohya(lows(layers["unet"], LINEAR[:1]), {})
    save_file({key: one * 0 if "up" in key else one for key, one in tensors.items()}, file)
    with pytest.warns(SdcliWarning, match=r"a\.safetensors: adds nothing: it was never trained"):
        read_adapter(file, layers)


# What is refused when the numbers are read.


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda key, one: one * math.nan if "up" in key else one, NumericalError, "lora_up.weight holds NaN or Inf"),
        (lambda key, one: one * math.inf if "alpha" in key else one, NumericalError, "alpha holds NaN or Inf"),
        (lambda key, one: one * 0 if "alpha" in key else one, InputError, "alpha is 0, which some programs take for"),
        (lambda key, one: one.int() if "down" in key else one, InputError, "holds torch.int32"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    file: Path, layers: dict[str, Any], change: Callable[[str, Tensor], Tensor], error: type[Exception], said: str
) -> None:
    tensors = kohya(lows(layers["unet"], LINEAR[:1]), {})
    save_file({key: change(key, one) for key, one in tensors.items()}, file)
    with pytest.raises(error, match=said) as caught:
        read_adapter(file, layers)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("alpha", "what"),
    [
        ("NaN", r"its lora_adapter_metadata cannot be read \(it holds NaN\)"),
        *(
            (one, r"attn1\.to_q: alpha is (-?inf|0), which some programs take for the rank")
            for one in ("Infinity", "-Infinity", "1e999", "0")
        ),
    ],
)
def test_an_alpha_of_the_metadata_that_makes_no_sense_is_refused(
    file: Path, layers: dict[str, Any], alpha: str, what: str
) -> None:
    said = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'}
    save_file(peft(lows(layers["unet"], LINEAR[:1]), {}), file, said)
    with pytest.raises(InputError, match=what):
        read_adapter(file, layers)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (bytes(8), "was not written by torch.save"),
        (bytes(8) + b"{", "is no whole safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "is no LoRA file: it holds nothing"),
    ],
)
def test_an_empty_file_is_refused(tmp_path: Path, layers: dict[str, Any], data: bytes, said: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=rf"^{tmp_path}/a\.safetensors: {said}"):
        read_adapter(tmp_path / "a.safetensors", layers)


def test_layers_of_one_file_may_be_named_in_different_dialects(
    bundle: ModelBundle, layers: dict[str, Any], file: Path
) -> None:
    unet, text = lows(layers["unet"], LINEAR), lows(layers["text_encoder"], TEXT)
    expected = ours(bundle, read_adapter(file, layers))
    mixed = kohya(dict(list(unet.items())[:2]), {}) | kohya({}, text)
    mixed |= peft(dict(list(unet.items())[2:]), {})
    mixed |= {f"unet.{name}.alpha": torch.tensor(unet[name].alpha) for name in list(unet)[2:]}
    save_file(mixed, file)
    for one, other in zip(ours(bundle, read_adapter(file, layers)), expected, strict=True):
        assert torch.equal(one, other)


def test_a_rank_above_the_layers_own_is_no_less_a_change(
    bundle: ModelBundle, layers: dict[str, Any], file: Path
) -> None:
    name = LINEAR[0]
    save_file(kohya(lows(layers["unet"], (name,), rank=300), {}), file)
    (low,), plain = lows(layers["unet"], (name,), rank=300).values(), bundle.unet.get_parameter(f"{name}.weight")
    found = merged(bundle, [read_adapter(file, layers, 0.5)]).unet.get_parameter(f"{name}.weight")
    assert torch.equal(found, plain + 0.5 * (low.alpha / 300 * (low.up @ low.down)))


def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, layers: dict[str, Any]) -> None:
    torch.save({"string_to_param": {"*": torch.ones(1, 16)}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: is no LoRA file: it holds more than tensors; give a textual inv"):
        read_adapter(tmp_path / "a.pt", layers)


def test_code_in_a_pickle_is_refused_by_its_name(tmp_path: Path, layers: dict[str, Any]) -> None:
    torch.save({"a": Path("x").exists}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"a\.ckpt: holds \S+, which is code and was not run"):
        read_adapter(tmp_path / "a.ckpt", layers)


def test_a_file_spoiled_anywhere_is_read_or_refused(file: Path, layers: dict[str, Any]) -> None:
    save_file(kohya(lows(layers["unet"], LINEAR[:1]), {}), file, {"lora_adapter_metadata": '{"unet.lora_alpha": 2}'})
    whole, chance, refused = file.read_bytes(), random.Random(7), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(header if chance.random() < 0.7 else len(data))] = chance.randrange(256)
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        if data[8:9] != b"{":
            continue  # for the reader of pickles, whose tests are its own
        file.write_bytes(data)
        try:
            read_adapter(file, layers)
        except (InputError, NumericalError):
            refused += 1
    assert 100 < refused < 400
