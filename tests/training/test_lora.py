"""Low-rank adapters: what moves, and that other programs read what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from sdcli.pipeline.bundle import TextEncoder, load_bundle
from sdcli.pipeline.lora import merged as merged_bundle
from sdcli.pipeline.lora import read_adapter
from sdcli.pipeline.lora_names import model_layers
from sdcli.training import lora
from tests.forks import Forks
from tests.runs import final_files, metrics, newest_checkpoint

CPU = torch.device("cpu")


def train_lora(pictures: Path, model: Path, run: Path, *more: object) -> tuple[object, ...]:
    """A command that trains an adapter of a tiny model for six steps."""
    common = ("--resolution", 16, "--steps", 6, "--lr", 0.01, "--save-every", 2, "--device", "cpu")
    return ("train-unet", "--data", pictures, "--model", model, "--run", run, "--lora-rank", 3, *common, *more)


@pytest.fixture(scope="module")
def lora_run(pictures: Path, unet_run: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained adapters of the UNet and the text encoder, with an alpha apart from the rank."""
    run = tmp_path_factory.mktemp("lora") / "run"
    ended = forks.sdcli(
        *train_lora(pictures, unet_run / "export", run, "--train-text-encoder", "--lora-alpha", 1.5, "--ema", 0)
    )
    assert ended.code == 0, ended.stderr
    return run


def merged(model: Path, adapter: Path) -> dict[str, Tensor]:
    """The UNet's weights with the adapters of a kohya file added by its definition, W + alpha / rank * up @ down."""
    found = load_file(adapter)
    unet = load_bundle(model, device=CPU, dtype=torch.float32).unet
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    for name in state:
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_down.weight" in found:
            down, up = found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"]
            state[name] += float(found[f"{key}.alpha"]) / len(down) * (up @ down)
    return state


def test_only_the_adapters_are_in_a_checkpoint_and_they_alone_move(lora_run: Path) -> None:
    weights = load_file(newest_checkpoint(lora_run) / "model.safetensors")
    assert weights and all(".lora_A." in name or ".lora_B." in name for name in weights)
    assert {name.split(".")[0] for name in weights} == {"unet", "condition"}
    assert all(float(value.abs().max()) > 0 for value in weights.values())


def test_a_fresh_adapter_adds_nothing(unet_run: Path) -> None:
    unet = load_bundle(unet_run / "export", device=CPU, dtype=torch.float32).unet
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    before = unet(x, t, context).sample
    lora.adapt(unet, lora.UNET_TARGETS, rank=4, alpha=4.0, seed=0)
    assert torch.equal(unet(x, t, context).sample, before)
    learns = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert learns and all(".lora_" in name for name in learns)


@pytest.mark.parametrize("file", [lora.DIFFUSERS_FILE, lora.KOHYA_FILE])
def test_plain_diffusers_draws_with_either_dialect_as_with_the_adapters_merged_by_hand(
    lora_run: Path, unet_run: Path, file: str
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(unet_run / "export", local_files_only=True)
    pipe.load_lora_weights(lora_run / "export", weight_name=file)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)
    t = torch.tensor([500])
    ours = load_bundle(unet_run / "export", device=CPU, dtype=torch.float32).unet
    with torch.no_grad():
        plain = ours(x, t, context).sample
        ours.load_state_dict(merged(unet_run / "export", lora_run / "export" / lora.KOHYA_FILE))
        expected, found = ours(x, t, context).sample, pipe.unet(x, t, context).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4)
    ids = pipe.tokenizer(["a disc"], padding="max_length", return_tensors="pt").input_ids
    before = load_bundle(unet_run / "export", device=CPU, dtype=torch.float32).conditioner
    assert not torch.allclose(pipe.text_encoder(ids)[0], before.model(input_ids=ids)[0], atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("file", [lora.DIFFUSERS_FILE, lora.KOHYA_FILE])
def test_either_dialect_read_again_is_the_model_that_was_trained(lora_run: Path, unet_run: Path, file: str) -> None:
    plain = load_bundle(unet_run / "export", device=CPU, dtype=torch.float32)
    changed = merged_bundle(plain, [read_adapter(lora_run / "export" / file, model_layers(unet_run / "export"))])
    trained = load_bundle(unet_run / "export", device=CPU, dtype=torch.float32)
    assert isinstance(trained.conditioner, TextEncoder) and isinstance(changed.conditioner, TextEncoder)
    weights = load_file(newest_checkpoint(lora_run) / "model.safetensors")
    parts = (
        ("unet", trained.unet, lora.UNET_TARGETS),
        ("condition.model", trained.conditioner.model, lora.TEXT_TARGETS),
    )
    for name, module, targets in parts:
        lora.adapt(module, targets, rank=3, alpha=1.5, seed=0)
        own = {key.removeprefix(f"{name}."): one for key, one in weights.items() if key.startswith(f"{name}.")}
        assert own.keys() <= module.state_dict().keys()
        module.load_state_dict(own, strict=False)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)
    ids = torch.arange(77)[None] * 50
    with torch.no_grad():
        answers = [
            (one.unet(x, torch.tensor([500]), context).sample, one.conditioner.model(input_ids=ids)[0])  # type: ignore[union-attr]
            for one in (changed, trained, plain)
        ]
    for found, expected, before in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(found, before, atol=1e-4)


def test_a_lora_run_in_parts_ends_as_a_straight_one(
    pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    model = unet_run / "export"
    assert forks.sdcli(*train_lora(pictures, model, tmp_path / "straight")).code == 0
    for stop in (1, 3):
        assert forks.sdcli(*train_lora(pictures, model, tmp_path / "parts"), "--stop-after", stop).code == 0
    assert forks.sdcli(*train_lora(pictures, model, tmp_path / "parts")).code == 0
    assert final_files(tmp_path / "parts") == final_files(tmp_path / "straight")


def test_its_default_rate_is_its_own(pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path) -> None:
    command = ("train-unet", "--data", pictures, "--model", unet_run / "export", "--steps", 1, "--device", "cpu")
    rates = []
    for name, flags in (("whole", ()), ("lora", ("--lora-rank", 2))):
        assert forks.sdcli(*command, "--run", tmp_path / name, *flags).code == 0
        rates.append(metrics(tmp_path / name)[0]["lr"])
    assert rates == [1e-5, 1e-4]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--lora-rank", 0), 2, "--lora-rank 0: out of range"),
        (("--lora-alpha", 2), 2, "--lora-alpha without --lora-rank"),
        (("--lora-rank", 2, "--lora-alpha", 0), 2, "--lora-alpha 0.0: out of range"),
        (("--lora-rank", 2, "--loss", "hybrid"), 2, "adapters add no channels"),
        (("--lora-rank", 2, "--init", "tiny", "--vae", "builtin"), 2, "an adapter needs a trained model"),
        (("--lora-rank", 2, "--prediction", "epsilon"), 2, "an adapter cannot carry it"),
        (("--lora-rank", 2, "--zero-terminal-snr"), 2, "an adapter cannot carry it"),
    ],
)
def test_what_makes_no_adapter_is_refused(
    pictures: Path, forks: Forks, tmp_path: Path, flags: tuple[object, ...], code: int, said: str
) -> None:
    ended = forks.sdcli("train-unet", "--data", pictures, "--run", tmp_path / "run", *flags)
    assert (ended.code, said in ended.stderr) == (code, True), ended.stderr
    assert not (tmp_path / "run").exists()


def test_beside_an_adapter_the_table_of_classes_stays_as_it_is(
    own_pictures: Path, classed: Path, forks: Forks, tmp_path: Path
) -> None:
    names = json.loads((classed / "class_embedder" / "config.json").read_text(encoding="utf-8"))["names"]
    for number, path in enumerate(sorted(own_pictures.glob("*.png"))):
        folder = own_pictures / names[number % 2]
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    for path in own_pictures.glob("*.txt"):
        path.unlink()
    run = tmp_path / "run"
    ended = forks.sdcli(*train_lora(own_pictures, classed, run))
    assert ended.code == 0, ended.stderr
    weights = load_file(newest_checkpoint(run) / "model.safetensors")
    assert weights and all(".lora_" in name for name in weights)
