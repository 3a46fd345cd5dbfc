"""The scheduler registry: names, plug-ins, refusals, and equality with what diffusers itself would make."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcli.errors import InputError, UsageError
from sdcli.schedulers import (
    Scheduler,
    check_steps,
    choose,
    create,
    describe,
    find,
    listing,
    names,
)
from sdcli.schedulers.config import RULES, SIGMA_KEYS, SPACINGS
from sdcli.schedulers.steps import step_limits
from sdcli.schedulers.table import BUILT_IN

SD15: dict[str, object] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
TRAILING = {**SD15, "timestep_spacing": "trailing"}
CONFIGS: dict[str, dict[str, object]] = {
    "sd15": SD15,
    "trailing": TRAILING,
    "linspace": {**SD15, "timestep_spacing": "linspace"},
    "sd21": {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "karras": {
        **SD15,
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "use_karras_sigmas": True,
    },
    "multistep": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
        "lower_order_final": False,
        "solver_order": 3,
        "clip_sample": False,
    },
}
EVERY = pytest.mark.parametrize("scheduler", BUILT_IN, ids=lambda scheduler: scheduler.name)
OF_DIFFUSERS = pytest.mark.parametrize(
    "scheduler", [one for one in BUILT_IN if one.module.startswith("diffusers.")], ids=lambda scheduler: scheduler.name
)
STEPS = (1, 2, 3, 5, 9, 27, 50, 999)


def scheduler_class(scheduler: Scheduler) -> Any:
    return getattr(importlib.import_module(scheduler.module), scheduler.class_name)


def walk(sampler: Any) -> tuple[torch.Tensor, int]:
    """Sample with the exact denoiser of a data set of one picture, all 0.7; the result and the model calls made."""
    alpha_bars = sampler.alphas_cumprod.double()
    sigmas = ((1 - alpha_bars) / alpha_bars).sqrt().numpy()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 16, 16, generator=generator, dtype=torch.float64) * sampler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(sampler.step).parameters
    calls = 0
    for t in sampler.timesteps:
        low = int(t)
        sigma = sigmas[low] + (float(t) - low) * (sigmas[min(low + 1, 999)] - sigmas[low])
        alpha, beta = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
        eps = (sampler.scale_model_input(x, t) - alpha * 0.7) / beta
        calls += 1
        extra = {"generator": generator} if takes_generator else {}
        x = sampler.step(eps, t, x, return_dict=False, **extra)[0]
    return x, calls


def sampler_of(scheduler: Scheduler, config: dict[str, object], steps: int) -> Any:
    return create(scheduler, config, steps)


def works(scheduler: Scheduler, steps: int, config: dict[str, object]) -> bool:
    try:
        check_steps(scheduler, steps, config)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plms", "pndm"),
        ("k-lms", "lms"),
        ("K_LMS", "lms"),
        ("dpm++2m", "dpm"),
        ("dpmpp_2m", "dpm"),
        ("DPM++ 2M", "dpm"),
        ("dpmsolver++", "dpm"),
        ("euler_a", "euler-a"),
        ("Euler a", "euler-a"),
        ("euler_ancestral", "euler-a"),
        ("UniPC", "unipc"),
        ("uni_pc", "unipc"),
        ("DPM++ 2M SDE", "dpm-sde"),
        ("dpmpp_2s", "dpm-single"),
        ("DPM2", "dpm2"),
        ("kdpm_2", "dpm2"),
        ("dpm_2", "dpm2"),
        ("DPM2 a", "dpm2-a"),
        ("dpm_2_ancestral", "dpm2-a"),
        ("kdpm_2_a", "dpm2-a"),
        ("DEIS", "deis"),
        *((scheduler.name, scheduler.name) for scheduler in BUILT_IN),
    ],
)
def test_names_and_aliases_are_found_in_any_spelling(name: str, expected: str) -> None:
    assert find(name).name == expected


@pytest.mark.parametrize(
    ("name", "base", "choices"),
    [
        ("DPM++ 2M Karras", "dpm", {"sigmas": "karras"}),
        ("dpmpp_2m_k", "dpm", {"sigmas": "karras"}),
        ("DPM++ 3M SDE Exponential", "dpm-sde", {"order": 3, "sigmas": "exponential"}),
        ("dpmpp_3m", "dpm", {"order": 3}),
        ("Euler Beta", "euler", {"sigmas": "beta"}),
        ("lms_k", "lms", {"sigmas": "karras"}),
        ("Heun SGM Uniform", "heun", {"timestep_spacing": "trailing"}),
        ("euler_simple", "euler", {"timestep_spacing": "trailing"}),
        ("DPM2 a Karras", "dpm2-a", {"sigmas": "karras"}),
    ],
)
def test_names_of_other_programs_choose_what_they_say(name: str, base: str, choices: dict[str, object]) -> None:
    found = find(name)
    assert (found.name, dict(found.choices)) == (base, choices)
    assert found == choose(find(base), **choices)  # type: ignore[arg-type]


def test_a_name_that_asks_for_more_than_its_scheduler_has_is_refused() -> None:
    with pytest.raises(UsageError, match="scheduler euler-a takes no --sigmas; `sdcli schedulers euler-a` tells"):
        find("Euler a Karras")


@EVERY
@pytest.mark.parametrize("option", ["sigmas", "order", "eta", "timestep_spacing", "variance"])
def test_an_option_is_taken_as_described_or_refused_by_name(scheduler: Scheduler, option: str) -> None:
    row = describe(scheduler)
    allowed: dict[str, tuple[object, ...]] = {
        "sigmas": row.sigmas,
        "order": row.orders,
        "eta": row.eta or (),
        "timestep_spacing": row.timestep_spacings,
        "variance": row.variances,
    }
    wrong: dict[str, object] = {"order": 9, "eta": 1.5}
    for value in allowed[option]:
        chosen = choose(scheduler, **{option: value})  # type: ignore[arg-type]
        assert dict(chosen.choices) == {option: value}
        if value != "learned-range":  # which only a model that has learned it can give
            assert len(sampler_of(chosen, SD15, 10).timesteps) == scheduler.evaluations(10)
    name = "--" + option.replace("_", "-")
    with pytest.raises(UsageError, match=f"{name} .*"):
        choose(scheduler, **{option: wrong.get(option, "wrong")})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "scheduler", [one for one in BUILT_IN if one.takes_sigmas], ids=lambda scheduler: scheduler.name
)
@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta", "model"])
def test_chosen_sigmas_win_over_the_models_and_are_diffusers_own(scheduler: Scheduler, sigmas: str) -> None:
    made = sampler_of(choose(scheduler, sigmas=sigmas), CONFIGS["karras"], 10)
    keys = {key: key == f"use_{sigmas}_sigmas" for key in SIGMA_KEYS}
    expected = scheduler_class(scheduler).from_config(CONFIGS["karras"], **scheduler.overrides, **keys)
    expected.set_timesteps(10)
    assert torch.equal(made.sigmas, expected.sigmas)
    plain = sampler_of(scheduler, CONFIGS["karras"], 10)
    assert torch.equal(made.sigmas, plain.sigmas) == (sigmas == "karras")


@pytest.mark.parametrize("name", ["dpm", "dpm-single", "deis", "unipc", "pndm", "lms"])
def test_a_higher_order_draws_something_else(name: str) -> None:
    drawn = []
    for order in find(name).orders:
        chosen = choose(find(name), order=order)
        sampler = sampler_of(chosen, SD15, 10)
        x = torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64) * float(sampler.init_noise_sigma)
        for t in sampler.timesteps:
            eps = torch.tanh(sampler.scale_model_input(x, t))
            x = sampler.step(eps, t, x, return_dict=False, **chosen.step_arguments)[0]
        drawn.append(float(x.mean()))
    assert len({round(value, 6) for value in drawn}) == len(find(name).orders)


def test_eta_decides_whether_ddim_and_tcd_draw_noise() -> None:
    assert not find("ddim").is_stochastic
    assert choose(find("ddim"), eta=0.5).is_stochastic
    assert not choose(find("ddim"), eta=0.0).is_stochastic
    assert find("tcd").is_stochastic
    assert not choose(find("tcd"), eta=0.0).is_stochastic


def test_ddim_with_eta_1_draws_with_the_variance_of_ddpm() -> None:
    """Song et al. 2021, eq. 16: at eta 1 and with all steps, DDIM's sigma squared is beta~ of DDPM eq. 7."""
    ddim, ddpm = sampler_of(find("ddim"), SD15, 999), sampler_of(find("ddpm"), SD15, 999)
    for t in (2, 10, 500, 998):
        ours, theirs = float(ddim._get_variance(t, t - 1)), float(ddpm._get_variance(t))
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("variance", "power"), [("fixed-small", "beta~"), ("fixed-large", "beta")])
def test_the_variance_of_ddpm_is_the_one_chosen(variance: str, power: str) -> None:
    sampler = sampler_of(choose(find("ddpm"), variance=variance), SD15, 999)
    t = 400
    a, before = float(sampler.alphas_cumprod[t]), float(sampler.alphas_cumprod[t - 1])
    beta = 1 - a / before
    expected = beta if power == "beta" else beta * (1 - before) / (1 - a)
    assert float(sampler._get_variance(t)) == pytest.approx(expected, rel=1e-4)


def test_a_learned_variance_is_refused_where_the_model_learned_none() -> None:
    chosen = choose(find("ddpm"), variance="learned-range")
    with pytest.raises(UsageError, match="--variance learned-range: this model has learned no variance"):
        check_steps(chosen, 10, SD15)
    learned = {**SD15, "variance_type": "learned_range"}
    check_steps(chosen, 10, learned)
    assert (
        sampler_of(choose(find("ddpm"), variance="fixed-small"), learned, 10).config["variance_type"] == "fixed_small"
    )


def test_a_consistency_model_is_sampled_on_the_ladder_it_was_distilled_on() -> None:
    config = {**SD15, "original_inference_steps": 20}
    assert sampler_of(find("lcm"), config, 4).timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(UsageError, match=r"cannot do 21 steps: a model for it was distilled on 20.*it can do 1 to 20"):
        check_steps(find("tcd"), 21, config)


def test_no_name_or_alias_stands_for_two_schedulers() -> None:
    keys = [key for scheduler in BUILT_IN for key in (scheduler.name, *scheduler.aliases)]
    assert len(keys) == len(set(keys))
    assert all(find(key.upper()).name in names() for key in keys)


def test_an_unknown_name_is_refused_with_the_closest_ones_and_the_command_that_lists_all() -> None:
    with pytest.raises(UsageError, match=r"'unpic' is unknown; did you mean unipc.*`sdcli schedulers`"):
        find("unpic")
    with pytest.raises(UsageError) as refusal:
        find("\x1b[31m\n" + "z" * 10_000)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 200


@EVERY
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", [SD15, TRAILING], ids=["sd15", "trailing"])
def test_the_evaluations_of_the_table_are_those_counted_and_the_result_is_the_picture(
    scheduler: Scheduler, steps: int, config: dict[str, object]
) -> None:
    if not works(scheduler, steps, config):
        lowest, highest = step_limits(scheduler, config)
        assert not lowest <= steps <= highest
        assert lowest <= (4 if scheduler.name == "f-pndm" else 2)
        assert highest == 50 if not scheduler.spacings else highest >= 999
        return
    result, calls = walk(sampler_of(scheduler, config, steps))
    assert calls == scheduler.evaluations(steps)
    assert result.mean().item() == pytest.approx(0.7, abs=0.03)
    assert result.std().item() < 0.05  # DDIM and PNDM end at sigma_0 = 0.03, the others at 0


@OF_DIFFUSERS
@pytest.mark.parametrize("name", CONFIGS)
def test_create_equals_from_config_of_diffusers(scheduler: Scheduler, name: str) -> None:
    config = CONFIGS[name]
    made = sampler_of(scheduler, config, 25)
    known = set(inspect.signature(scheduler_class(scheduler)).parameters)
    overrides = {key: value for key, value in scheduler.overrides.items() if key in known}
    expected = scheduler_class(scheduler).from_config(dict(config), **overrides)
    expected.set_timesteps(25)
    assert torch.equal(made.timesteps, expected.timesteps)
    assert float(made.init_noise_sigma) == float(expected.init_noise_sigma)
    for table in ("sigmas", "alphas_cumprod"):
        if hasattr(expected, table):
            assert torch.equal(getattr(made, table), getattr(expected, table))
    assert {key: made.config[key] for key in known} == {key: expected.config[key] for key in known}


@EVERY
def test_the_table_knows_the_spacing_a_class_takes_when_the_config_is_silent(scheduler: Scheduler) -> None:
    parameters = inspect.signature(scheduler_class(scheduler)).parameters
    if "timestep_spacing" in parameters:
        assert scheduler.default_spacing == parameters["timestep_spacing"].default
    assert ("timestep_spacing" in parameters) == (len(scheduler.spacings) != 1)
    assert ("use_karras_sigmas" in parameters) == scheduler.takes_sigmas
    assert ("variance_type" in parameters and "DPMSolver" not in scheduler.class_name) == scheduler.takes_variance
    assert ("eta" in inspect.signature(scheduler_class(scheduler).step).parameters) == (
        scheduler.default_eta is not None
    )
    assert set(scheduler.overrides) <= set(parameters)
    assert set(parameters) <= set(RULES), "an argument of a model's config would reach the class unchecked"
    assert ("rescale_betas_zero_snr" in parameters) == bool(scheduler.zero_snr_predictions)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_clipped_only_where_the_config_says_so(name: str) -> None:
    silent = {key: value for key, value in SD15.items() if key != "clip_sample"}
    assert sampler_of(find(name), silent, 5).config["clip_sample"] is False
    assert sampler_of(find(name), {**SD15, "clip_sample": True}, 5).config["clip_sample"] is True


@EVERY
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_reaches_only_the_scheduler_that_draws_with_it(
    scheduler: Scheduler, variance_type: str
) -> None:
    made = sampler_of(scheduler, {**SD15, "variance_type": variance_type}, 5)
    assert (made.config.get("variance_type") == variance_type) == scheduler.uses_learned_variance
    assert scheduler.uses_learned_variance == (scheduler.name == "ddpm")


def test_unknown_keys_of_a_config_are_ignored_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    create(find("ddim"), {**SD15, "from_the_future": 1, "self": 2, "kwargs": 3}, 5)
    assert capfd.readouterr() == ("", "")


@EVERY
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_an_accepted_number_of_steps_gets_that_many_timesteps_of_the_model(
    scheduler: Scheduler, spacing: str, offset: int
) -> None:
    config = {**SD15, "timestep_spacing": spacing, "steps_offset": offset}
    stride = 499 if scheduler.name.startswith("dpm2") else 83  # whose timesteps are placed one by one, in Python
    tried = {*range(1, 1000, stride), 2, 3, 5, 9, 30, 499, 999, 1000}
    accepted = [steps for steps in tried if works(scheduler, steps, config)]
    assert len(accepted) > 4
    has_stages = scheduler.evaluations(100) > 101  # whose timesteps lie between those of the steps
    for steps in accepted:
        timesteps = sampler_of(scheduler, config, steps).timesteps.double()
        assert len(timesteps) == scheduler.evaluations(steps)
        assert len(set(timesteps.tolist())) == steps or has_stages
        # The ancestral middle lies between a sigma and the one its noise is added to: perhaps below the next step's.
        assert scheduler.name == "dpm2-a" or bool((timesteps[1:] <= timesteps[:-1]).all())
        assert timesteps.min() >= 0
        assert timesteps.max() <= 999


@pytest.mark.parametrize(
    ("name", "steps", "config"),
    [
        ("ddim", 1, SD15),  # starts at timestep 1
        ("heun", 1, CONFIGS["linspace"]),  # starts at timestep 0
        ("ddim", 9, CONFIGS["linspace"]),  # leaves noise
        ("ddim", 501, TRAILING),  # leaves noise
        ("lms", 499, TRAILING),  # ends at timestep -1
        ("dpm", 1000, CONFIGS["linspace"]),  # a timestep twice: NaN
        ("dpm", 999, {**SD15, "timestep_spacing": "leading"}),  # starts at timestep 1000: NaN
        ("euler", 1000, {**SD15, "timestep_spacing": "leading"}),  # starts at timestep 1000
    ],
)
def test_a_refused_number_of_steps_goes_wrong_in_diffusers(name: str, steps: int, config: dict[str, object]) -> None:
    scheduler = find(name)
    with pytest.raises(UsageError, match=f"scheduler {name} cannot do {steps} steps? .*spacing"):
        check_steps(scheduler, steps, config)
    sampler = scheduler_class(scheduler).from_config(dict(config), **scheduler.overrides)
    sampler.set_timesteps(steps)
    starts_low = sampler.timesteps[0] < 100
    leaves_the_table = sampler.timesteps.min() < 0 or sampler.timesteps.max() > 999
    if not (starts_low or leaves_the_table):
        result, _ = walk(sampler)
        assert not result.std().item() < 0.1  # NaN included


@pytest.mark.parametrize(
    ("name", "config", "limits"),
    [
        ("ddim", SD15, (2, 999)),
        ("euler", SD15, (2, 1000)),
        ("dpm", SD15, (1, 999)),
        ("unipc", {**SD15, "timestep_spacing": "leading"}, (1, 998)),
        ("pndm", TRAILING, (1, 1000)),
        ("ddim", {**SD15, "num_train_timesteps": 100}, (2, 99)),
    ],
)
def test_the_range_of_steps_follows_spacing_and_offset(
    name: str, config: dict[str, object], limits: tuple[int, int]
) -> None:
    assert step_limits(find(name), config) == limits
    with pytest.raises(UsageError, match=f"it can do {limits[0]} to {limits[1]}$"):
        check_steps(find(name), limits[1] + 1, config)
    with pytest.raises(UsageError, match=f"it can do {limits[0]} to {limits[1]}$"):
        check_steps(find(name), limits[0] - 1, config)


def test_a_number_of_steps_between_two_that_work_is_refused_with_both() -> None:
    with pytest.raises(UsageError, match=r"the nearest it can do are 60 and 62$"):
        check_steps(find("euler"), 61, TRAILING)


@pytest.mark.parametrize("name", [scheduler.name for scheduler in BUILT_IN if not scheduler.zero_snr_predictions])
def test_schedulers_that_ignore_zero_terminal_snr_refuse_such_a_model(name: str) -> None:
    config = {**TRAILING, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    with pytest.raises(
        UsageError,
        match=f"scheduler {name} cannot sample this model.*ddim, dpm, dpm-sde, ddpm, euler, euler-a, unipc, lcm, tcd",
    ):
        check_steps(find(name), 25, config)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [(scheduler.name, prediction) for scheduler in BUILT_IN for prediction in scheduler.zero_snr_predictions],
)
def test_schedulers_that_accept_zero_terminal_snr_stay_finite(name: str, prediction: str) -> None:
    config = {**TRAILING, "rescale_betas_zero_snr": True, "prediction_type": prediction}
    sampler = sampler_of(find(name), config, 9)
    x = torch.ones(1, 1, 2, 2) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        x = sampler.step(torch.zeros_like(sampler.scale_model_input(x, t)), t, x, return_dict=False)[0]
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("name", ["dpm2", "euler-a"])
def test_schedulers_without_sample_prediction_refuse_such_a_model(name: str) -> None:
    with pytest.raises(UsageError, match="predicts sample; name one of ddim"):
        check_steps(find(name), 25, {**SD15, "prediction_type": "sample"})


def test_repeated_timesteps_of_a_sigma_table_skip_no_step() -> None:
    config = {**SD15, "use_beta_sigmas": True}
    sampler = sampler_of(find("dpm"), config, 60)
    assert len(set(sampler.timesteps.tolist())) < 60
    result, calls = walk(sampler)
    assert calls == 60
    assert result.mean().item() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_start", 0),
        ("beta_start", float("nan")),
        ("beta_end", 1.0),
        ("beta_end", "0.012"),
        ("beta_schedule", "sigmoid"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 100_001),
        ("num_train_timesteps", True),
        ("num_train_timesteps", None),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "karras"),
        ("steps_offset", -1),
        ("steps_offset", 1000),
        ("trained_betas", [0.1]),
        ("trained_betas", [0.1, "x"]),
        ("rescale_betas_zero_snr", "yes"),
        ("solver_order", 10**9),
        ("use_flow_sigmas", True),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("_class_name", None),
        ("_class_name", ["os", "system"]),
    ],
)
@pytest.mark.parametrize("name", ["ddim", "unipc"])
def test_a_config_out_of_range_is_refused_by_its_key(name: str, key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^scheduler_config.json:{key}: is .*; expected is "):
        create(find(name), {**SD15, key: value}, 5)


def test_two_sigma_tables_at_once_are_refused() -> None:
    with pytest.raises(InputError, match="more than one of use_karras_sigmas"):
        check_steps(find("euler"), 5, {**SD15, "use_karras_sigmas": True, "use_beta_sigmas": True})


def test_a_description_tells_evaluations_and_limits() -> None:
    heun = describe(find("heun"))
    assert heun.evaluations == {5: 9, 10: 19, 25: 49, 50: 99}
    assert heun.limits == {"linspace": (2, 1000), "leading": (2, 999), "trailing": (1, 1000)}
    assert heun.target == "diffusers.schedulers.scheduling_heun_discrete.HeunDiscreteScheduler"
    assert describe(find("plms"), (1, 25)).evaluations == {1: 1, 25: 26}


def install(folder: Path, package: str, entry_points: dict[str, str], source: str) -> None:
    """What pip leaves behind for a package with these entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{name} = {target}" for name, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[sdcli.schedulers.v1]", *lines]), encoding="utf-8")
    (folder / f"{package}.py").write_text(source, encoding="utf-8")


def test_a_scheduler_of_another_package_is_found_and_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from sdcli.schedulers import Scheduler, find\nimport dataclasses\nGENTLE = dataclasses.replace(find('heun'))\n"
    )
    install(tmp_path, "gentle_sampler", {"Gentle_Walk": "gentle_sampler:GENTLE"}, source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "gentle-walk" in names()
    assert "gentle_sampler" not in sys.modules
    scheduler = find("gentle_walk")
    assert scheduler.name == "gentle-walk"
    assert len(sampler_of(scheduler, SD15, 5).timesteps) == 9
    assert [found.name for found in listing().schedulers] == [*(built_in.name for built_in in BUILT_IN), "gentle-walk"]
    with pytest.raises(UsageError, match="did you mean gentle-walk"):
        find("gentle-wolk")


def test_a_broken_plug_in_is_told_by_name_and_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {
        "bursts": "broken_sampler:MISSING",
        "wrong": "broken_sampler:NUMBER",
        "away": "broken_sampler:AWAY",
        "dpm": "broken_sampler:MISSING",
        "raises": "broken_sampler:RAISES",
        "greedy": "broken_sampler:GREEDY",
        "unmade": "broken_sampler:UNMADE",
    }
    source = (
        "import dataclasses\nfrom sdcli.schedulers import find\nNUMBER = 3\n"
        "AWAY = dataclasses.replace(find('dpm'), module='nowhere_at_all')\n"
        "RAISES = dataclasses.replace(find('dpm'), evaluations=lambda steps: 1 // 0)\n"
        "GREEDY = dataclasses.replace(find('dpm'), least_steps=5000)\n"
        "class Sampler:\n    def __init__(self):\n        raise TypeError('not today')\n"
        "UNMADE = dataclasses.replace(find('dpm'), module='broken_sampler', class_name='Sampler')\n"
    )
    install(tmp_path, "broken_sampler", targets, source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find("dpm").class_name == "DPMSolverMultistepScheduler"
    assert [scheduler.name for scheduler in listing().schedulers] == [
        *(built_in.name for built_in in BUILT_IN),
        "away",
        "unmade",
    ]
    broken = ["scheduler bursts", "scheduler greedy", "scheduler raises", "scheduler wrong"]
    assert [warning.split(":")[0] for warning in listing().warnings] == broken
    with pytest.raises(UsageError, match=r"bursts: its plug-in does not load: AttributeError.*package broken_sampler"):
        find("bursts")
    with pytest.raises(UsageError, match="wrong: its plug-in is no"):
        find("wrong")
    with pytest.raises(UsageError, match=r"raises: its plug-in does not describe it: ZeroDivisionError"):
        find("raises")
    with pytest.raises(UsageError, match=r"greedy: its plug-in does not describe it.*package broken_sampler"):
        find("greedy")
    with pytest.raises(UsageError, match=r"unmade: cannot be made: TypeError: not today; .*package broken_sampler"):
        create(find("unmade"), SD15, 5)
    with pytest.raises(UsageError, match=r"away: nowhere_at_all\.DPMSolverMultistepScheduler cannot be imported"):
        create(find("away"), SD15, 5)


def test_the_registry_answers_without_importing_anything_heavy() -> None:
    code = (
        "import sys\n"
        "from sdcli import schedulers\n"
        "[schedulers.describe(scheduler) for scheduler in schedulers.listing().schedulers]\n"
        "schedulers.check_steps(schedulers.find('plms'), 25, {'_class_name': 'DDIMScheduler'})\n"
        "print([name for name in ('torch', 'numpy', 'scipy', 'diffusers', 'huggingface_hub') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
