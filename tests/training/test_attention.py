"""Attention as it learns: which way is taken, and that both ways are the same attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file
from torch import Tensor

from sdcli.training.attention import MOST_TOKENS, ShortAttention
from tests.forks import Forks
from tests.runs import metrics, train_unet


def tokens(count: int, width: int) -> Tensor:
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of diffusers' two has computed."""
    found: list[str] = []
    for kind in (AttnProcessor, AttnProcessor2_0):
        original = kind.__call__

        def noted(self: object, *given: object, original: object = original, **more: object) -> object:
            found.append(type(self).__name__)
            return original(self, *given, **more)  # type: ignore[operator]

        monkeypatch.setattr(kind, "__call__", noted)
    return found


@pytest.mark.parametrize("count", [7, MOST_TOKENS])
def test_outputs_and_gradients_are_those_of_torchs_own(layer: Attention, taken: list[str], count: int) -> None:
    found = []
    for how in (ShortAttention(), AttnProcessor2_0()):
        layer.set_processor(how)  # type: ignore[arg-type]
        x, context = tokens(9, 8).requires_grad_(), tokens(count, 6).requires_grad_()
        output = layer(x, encoder_hidden_states=context)
        found.append((output, *torch.autograd.grad(output.square().sum(), (x, context, *layer.parameters()))))
    assert taken == ["AttnProcessor", "AttnProcessor2_0"]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_many_tokens_and_what_does_not_learn_take_torchs_own(layer: Attention, taken: list[str]) -> None:
    layer.set_processor(ShortAttention())  # type: ignore[arg-type]
    layer(tokens(9, 8), encoder_hidden_states=tokens(MOST_TOKENS + 1, 6))
    with torch.no_grad():
        layer(tokens(9, 8), encoder_hidden_states=tokens(7, 6))
    assert taken == ["AttnProcessor2_0", "AttnProcessor2_0"]


def test_a_run_in_bfloat16_learns_as_one_in_float32(
    pictures: Path, vae_run: Path, unet_run: Path, forks: Forks, tmp_path: Path
) -> None:
    ended = forks.sdcli(*train_unet(pictures, tmp_path / "run", vae_run), "--mixed-precision", "bf16")
    assert ended.code == 0, ended.stderr
    losses = [[row["loss"] for row in metrics(run)] for run in (tmp_path / "run", unet_run)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    moments = [load_file(run / "cache" / "moments.safetensors") for run in (tmp_path / "run", unet_run)]
    for name, exact in moments[1].items():  # the VAE worked in bfloat16, too
        assert not torch.equal(moments[0][name], exact)
        torch.testing.assert_close(moments[0][name], exact, rtol=0.03, atol=0.03)
