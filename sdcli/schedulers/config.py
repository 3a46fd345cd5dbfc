"""What a model's scheduler_config.json may say: the keys that reach a scheduler, and their ranges. It is untrusted."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from math import inf

from sdcli.errors import InputError

SPACINGS = ("linspace", "leading", "trailing")  # Lin et al. 2023, arXiv:2305.08891, table 2
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEARNED_VARIANCES = ("learned", "learned_range")
SIGMA_KEYS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

Rule = tuple[Callable[[object], bool], str]  # whether a value is in range; the range in words


def check_config(config: Mapping[str, object]) -> None:
    """Raise InputError, naming the key, for a value out of range; unknown keys are no error."""
    for key, (is_valid, expected) in RULES.items():
        if key in config and not is_valid(config[key]):
            raise _refusal(key, config[key], expected)
    total, offset, betas = train_timesteps(config), steps_offset(config), config.get("trained_betas")
    if offset >= total:
        raise _refusal("steps_offset", offset, f"less than num_train_timesteps, {total}")
    if isinstance(betas, list) and len(betas) != total:
        raise _refusal("trained_betas", betas, f"one value for each of the {total} timesteps")
    if sum(config.get(key) is True for key in SIGMA_KEYS) > 1:
        raise InputError(f"scheduler_config.json: more than one of {', '.join(SIGMA_KEYS)} is true", "keep one of them")


def train_timesteps(config: Mapping[str, object]) -> int:
    """How many noise levels the model was trained on; diffusers' default is 1000."""
    return _whole(config, "num_train_timesteps", 1000)


def steps_offset(config: Mapping[str, object]) -> int:
    """What "leading" spacing adds to every timestep; 1 in Stable Diffusion's own configs."""
    return _whole(config, "steps_offset", 0)


def prediction_type(config: Mapping[str, object]) -> str:
    """What the UNet predicts: epsilon, v_prediction or sample."""
    return str(config.get("prediction_type", "epsilon"))


def has_zero_terminal_snr(config: Mapping[str, object]) -> bool:
    """Whether the last timestep is pure noise (Lin et al. 2023, arXiv:2305.08891, section 3.1)."""
    return config.get("rescale_betas_zero_snr", False) is True


def has_learned_variance(config: Mapping[str, object]) -> bool:
    """Whether the UNet predicts variances beside its prediction, in as many channels again (arXiv:2102.09672, 3.1)."""
    return config.get("variance_type") in LEARNED_VARIANCES


def _whole(config: Mapping[str, object], key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int):
        raise _refusal(key, value, "an integer")
    return value


def _refusal(key: str, value: object, expected: str) -> InputError:
    return InputError(f"scheduler_config.json:{key}: is {reprlib.repr(value)}", f"expected is {expected}")


def _one_of(*allowed: str) -> Rule:
    return lambda value: value in allowed, " or ".join(allowed)


def _integer(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}"


def _number_between(low: float, high: float) -> Rule:
    return lambda value: type(value) in (int, float) and low < value < high, f"a number between {low:g} and {high:g}"


def _number_up_to(high: float) -> Rule:
    return lambda value: type(value) in (int, float) and value <= high, f"a number up to {high:g}"


def _none_or(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"null or {rule[1]}"


def _list_of(rule: Rule) -> Rule:
    return lambda value: isinstance(value, list) and all(map(rule[0], value)), f"a list, each {rule[1]}"


# Classes whose configs speak of betas, so that any of ours can sample; flow matching and EDM are other mathematics.
VARIANCE_PRESERVING = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
OFF: Rule = (lambda value: value is False, "false: flow matching is no Stable Diffusion 1.x or 2.x")
NOTHING: Rule = (lambda value: value is None, "null")

# `_class_name` and every argument of the built-in classes; a test compares with diffusers' own signatures.
RULES: dict[str, Rule] = {
    "_class_name": (
        lambda value: value in VARIANCE_PRESERVING,
        "a Stable Diffusion scheduler's, such as PNDMScheduler",
    ),
    "num_train_timesteps": _integer(1, 100_000),
    "beta_start": _number_between(0, 1),
    "beta_end": _number_between(0, 1),
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": _none_or(_list_of(_number_between(0, 1))),
    "prediction_type": _one_of(*PREDICTIONS),
    "timestep_spacing": _one_of(*SPACINGS),
    "steps_offset": _integer(0, 99_999),
    "rescale_betas_zero_snr": FLAG,
    "set_alpha_to_one": FLAG,
    "skip_prk_steps": FLAG,
    "original_inference_steps": _integer(1, 100_000),
    "timestep_scaling": _number_between(0, inf),
    "clip_sample": FLAG,
    "clip_sample_range": _number_between(0, inf),
    "thresholding": FLAG,
    "dynamic_thresholding_ratio": _number_between(0, 1),
    "sample_max_value": _number_between(0, inf),
    "variance_type": _none_or(
        _one_of("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCES)
    ),
    **dict.fromkeys((*SIGMA_KEYS, "use_lu_lambdas"), FLAG),
    "sigma_min": _none_or(_number_between(0, inf)),
    "sigma_max": _none_or(_number_between(0, inf)),
    "final_sigmas_type": _one_of("zero", "sigma_min"),
    "interpolation_type": _one_of("linear", "log_linear"),
    "timestep_type": _one_of("discrete"),
    "algorithm_type": _one_of("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
    "solver_order": _integer(1, 3),
    "solver_type": _one_of("midpoint", "heun", "logrho", "bh1", "bh2"),
    "lower_order_final": FLAG,
    "euler_at_final": FLAG,
    "predict_x0": FLAG,
    "disable_corrector": _list_of(_integer(0, 99_999)),
    "solver_p": NOTHING,
    # At -5 and below it cuts only noise levels that hardly differ from pure noise; diffusers' documents name -5.1.
    "lambda_min_clipped": _number_up_to(-5),
    "use_flow_sigmas": OFF,
    "use_dynamic_shifting": OFF,
    "flow_shift": _number_between(0, inf),
    "shift_terminal": NOTHING,
    "time_shift_type": _one_of("exponential", "linear"),
}
