"""The figures of noise: the numbers in them are diffusers' own, and what cannot be drawn is refused."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

from sdcli import figures, schedulers
from sdcli.errors import InputError, OutputError, SdcliWarning, UsageError
from sdcli.figures import FigureRecord
from sdcli.lab import plots
from sdcli.lab.specs import FigureSpec
from tests import models


def drawn(model: Path, output: Path, **how: Any) -> FigureRecord:
    record = figures.run(FigureSpec(model=str(model), output=output, **how))
    assert Image.open(record.path).size[0] == 1200
    assert json.loads(json.dumps(record.facts, allow_nan=False)) == record.facts
    return record


@pytest.mark.parametrize("plot", ["betas", "alpha-bar", "snr"])
def test_a_schedule_is_that_of_diffusers(sd1: Path, tmp_path: Path, plot: str) -> None:
    record = drawn(sd1, tmp_path / "a.png", plot=plot)
    theirs = DDIMScheduler.from_config(models.SD1_SCHEDULER)
    a = theirs.alphas_cumprod.double()
    expected = {"betas": theirs.betas.double(), "alpha-bar": a, "snr": a / (1 - a)}[plot]
    torch.testing.assert_close(torch.tensor(record.facts["values"]).double(), expected, rtol=1e-3, atol=1e-6)
    assert {k: v for k, v in record.facts.items() if k != "values"} == {
        "path": str(tmp_path / "a.png"),
        "plot": plot,
        "model": str(sd1),
    }


def test_where_no_signal_is_left_the_snr_is_0_and_sigma_is_null(model: Path, tmp_path: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    models.edit_json(path, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert drawn(model, tmp_path / "a.png", plot="snr").facts["values"][-1] == 0
    (row,) = drawn(model, tmp_path / "b.png", plot="sigmas", name="ddim", steps=5).facts["schedulers"]
    assert row["sigmas"][0] is None and None not in row["sigmas"][1:]


@pytest.mark.parametrize(
    ("name", "make"),
    [("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler)],
)
def test_sigmas_are_those_at_which_diffusers_calls_the_unet(sd1: Path, tmp_path: Path, name: str, make: Any) -> None:
    (row,) = drawn(sd1, tmp_path / "a.png", plot="sigmas", name=name, steps=7).facts["schedulers"]
    theirs = make.from_config(models.SD1_SCHEDULER)
    theirs.set_timesteps(7)
    a = theirs.alphas_cumprod[theirs.timesteps.long()]
    expected = ((1 - a) / a).sqrt() if name == "ddim" else theirs.sigmas[:-1]
    assert row["timesteps"] == [float(t) for t in theirs.timesteps]
    torch.testing.assert_close(torch.tensor(row["sigmas"]), expected.float(), rtol=1e-5, atol=1e-5)
    assert row["scheduler"] == name


@pytest.mark.parametrize("name", ["dpm2", "dpm2-a"])
def test_a_call_between_two_sigmas_is_shown_between_them(sd1: Path, tmp_path: Path, name: str) -> None:
    (row,) = drawn(sd1, tmp_path / "a.png", plot="sigmas", name=name, steps=6).facts["schedulers"]
    assert len(row["sigmas"]) == 11
    assert all(low <= 1.0001 * high for high, low in itertools.pairwise(row["sigmas"]))
    a = DDIMScheduler.from_config(models.SD1_SCHEDULER).alphas_cumprod
    table = ((1 - a) / a).sqrt().log()
    for t, sigma in zip(row["timesteps"], row["sigmas"], strict=True):  # what the UNet is told fits to what it sees
        t = min(t, 998.0)
        at = table[int(t)] + (t - int(t)) * (table[int(t) + 1] - table[int(t)])
        assert float(at.exp()) == pytest.approx(sigma, rel=0.02)


def test_without_a_name_all_schedulers_are_in_it(sd1: Path, tmp_path: Path) -> None:
    record = drawn(sd1, tmp_path, plot="sigmas", steps=10)
    assert record.path == tmp_path / "schedulers-sigmas.png"
    assert [row["scheduler"] for row in record.facts["schedulers"]] == [s.name for s in schedulers.BUILT_IN]
    assert record.facts["steps"] == 10
    for row in record.facts["schedulers"]:
        assert len(row["sigmas"]) == len(row["timesteps"]) == schedulers.find(row["scheduler"]).evaluations(10)


def test_what_cannot_do_the_steps_is_left_out_with_one_warning(sd1: Path, tmp_path: Path) -> None:
    with pytest.warns(SdcliWarning, match=r"left out: .*scheduler ddim cannot do 1 step") as told:
        record = figures.run(FigureSpec(model=str(sd1), output=tmp_path / "a.png", plot="sigmas", steps=1))
    assert len([w for w in told if w.category is SdcliWarning]) == 1
    assert "ddim" not in [row["scheduler"] for row in record.facts["schedulers"]] != []
    with pytest.raises(UsageError, match="scheduler ddim cannot do 1 step"):
        figures.run(FigureSpec(model=str(sd1), output=tmp_path / "b.png", plot="sigmas", steps=1, name="ddim"))
    assert not (tmp_path / "b.png").exists()


def test_schedulers_that_walk_alike_share_a_curve(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    chart = plots.line_chart

    def remember(curves: Any, **how: Any) -> bytes:
        names.extend(curve.name for curve in curves)
        return chart(curves, **how)

    monkeypatch.setattr(plots, "line_chart", remember)
    drawn(sd1, tmp_path / "a.png", plot="sigmas", steps=10)
    assert any({"ddim", "ddpm"} <= set(name.split(", ")) for name in names)
    assert not any({"ddim", "heun"} <= set(name.split(", ")) for name in names)


def test_the_same_command_gives_the_same_bytes(sd1: Path, tmp_path: Path) -> None:
    a, b = (drawn(sd1, tmp_path / f"{i}.png", plot="alpha-bar").path.read_bytes() for i in range(2))
    assert a == b
    assert Image.open(io.BytesIO(a)).info.keys() == {"dpi"}


def test_the_steps_are_the_models_own_where_none_are_asked_for(model: Path, tmp_path: Path) -> None:
    assert drawn(model, tmp_path / "a.png", name="euler").facts["steps"] == 25
    (model / "sdcli.json").write_text('{"steps": 4}')
    assert drawn(model, tmp_path / "b.png", name="euler").facts["steps"] == 4


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"plot": "time"}, "--plot time: unknown; use one of betas, alpha-bar, snr, sigmas"),
        ({"plot": "betas", "name": "ddim"}, "--plot betas of ddim: it is the model's, not a scheduler's"),
        ({"plot": "snr", "steps": 5}, "--steps with --plot snr"),
        ({"steps": 0}, "--steps 0: out of range"),
        ({"if_exists": "skip"}, "--if-exists skip: unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(how: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        FigureSpec(**how)
    assert what in str(caught.value)


def test_an_output_that_cannot_be_is_refused(sd1: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    for output, error, what in (
        ("a.pdf", UsageError, "figures are written as PNG"),
        ("mine.png/a.png", OutputError, "is a file"),
        ("mine.png", OutputError, "exists"),
    ):
        with pytest.raises(error, match=what):
            figures.run(FigureSpec(model=str(sd1), output=tmp_path / output, plot="betas", if_exists="error"))
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
    models.edit_json(model / "scheduler" / "scheduler_config.json", beta_end=2.0)
    with pytest.raises(InputError, match="beta_end"):
        figures.run(FigureSpec(model=str(model), output=tmp_path / "a.png", plot="betas"))
