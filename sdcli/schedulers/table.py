"""The built-in schedulers: what each is called, where its class lives, what it costs and what it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sdcli.schedulers.config import PREDICTIONS, SPACINGS

SIGMAS = ("model", "karras", "exponential", "beta")  # where the noise levels lie; `model`: at the timesteps
VARIANCES = ("fixed-small", "fixed-large", "learned-range")
DIFFUSERS = "diffusers.schedulers.scheduling_"


@dataclass(frozen=True)
class Scheduler:
    """A way to walk from noise to a picture: how it is called, where its class lives, what it costs and what it can do.

    evaluations: calls of the UNet made for a number of steps.
    order: of the method as its paper counts it, once the history is there; 1 for those that draw fresh noise.
    overrides: arguments that win over the model's own scheduler config.
    predictions, zero_snr_predictions: what the UNet may predict, in general and when the last timestep is pure noise.
    spacings: timestep spacings the class can take; none for those that walk a distilled model's own ladder.
    default_spacing: of the class, where the config names none.
    least_steps: what the start of a method needs.
    has_spare_interval: splits the timesteps into steps + 1 intervals, so that the last one ends before timestep 0.
    uses_learned_variance: draws its noise with the variances that a UNet of twice the channels predicts.
    has_fixed_stride: steps by a whole number of timesteps, whatever the spacing says.
    orders, has_order_by_step: what `order` may be chosen from, and whether `step` takes it, not the class.
    default_eta: the share of fresh noise where it can be chosen (0 to 1), else None.
    takes_sigmas, takes_variance: whether `sigmas` and `variance` can be chosen.
    step_arguments: given to every call of `step`.
    choices: what the user chose, by the names of the options.
    package: that it comes from; empty for a built-in one.
    """

    name: str
    summary: str
    source: str
    module: str
    class_name: str
    evaluations: Callable[[int], int]
    order: int
    aliases: tuple[str, ...] = ()
    is_stochastic: bool = False
    overrides: Mapping[str, object] = field(default_factory=dict)
    predictions: tuple[str, ...] = PREDICTIONS
    zero_snr_predictions: tuple[str, ...] = PREDICTIONS
    spacings: tuple[str, ...] = SPACINGS
    default_spacing: str = "linspace"
    least_steps: int = 1
    has_spare_interval: bool = False
    uses_learned_variance: bool = False
    has_fixed_stride: bool = False
    orders: tuple[int, ...] = ()
    has_order_by_step: bool = False
    default_eta: float | None = None
    takes_sigmas: bool = False
    takes_variance: bool = False
    step_arguments: Mapping[str, float] = field(default_factory=dict)
    choices: Mapping[str, object] = field(default_factory=dict)
    package: str = ""


def _one_per_step(steps: int) -> int:
    return steps


def _one_more(steps: int) -> int:
    return steps if steps == 1 else steps + 1  # the first step is taken twice, where there is a second timestep


def _runge_kutta_start(steps: int) -> int:
    return steps + 9  # four a step for the first three


def _two_per_step(steps: int) -> int:
    return 2 * steps - 1  # the last step, to sigma 0, is an Euler step


PNDM_PAPER = "Liu et al. 2022, arXiv:2202.09778"
K_DIFFUSION = "Crowson 2022, k-diffusion"
DPM_PAPER = "Lu et al. 2022, arXiv:2211.01095"

BUILT_IN: tuple[Scheduler, ...] = (
    Scheduler(
        name="ddim",
        summary="first order, deterministic; robust at any guidance; eta 1 draws as much noise as ddpm",
        source="Song et al. 2021, arXiv:2010.02502",
        module=f"{DIFFUSERS}ddim",
        class_name="DDIMScheduler",
        evaluations=_one_per_step,
        order=1,
        zero_snr_predictions=("v_prediction", "sample"),
        default_spacing="leading",
        has_fixed_stride=True,
        default_eta=0.0,
    ),
    Scheduler(
        name="pndm",
        summary="linear multistep of order 4 in the noise, by a short start (PLMS): Stable Diffusion's first default",
        source=PNDM_PAPER,
        module="sdcli.pipeline.solvers",
        class_name="PNDM",
        evaluations=_one_more,
        order=4,
        aliases=("plms",),
        overrides={"solver_order": 4},
        zero_snr_predictions=(),
        default_spacing="leading",
        orders=(2, 3, 4),
    ),
    Scheduler(
        name="f-pndm",
        summary="pndm as its paper has it: three Runge-Kutta steps of four evaluations, then order 4",
        source=f"{PNDM_PAPER}, algorithm 2",
        module="sdcli.pipeline.solvers",
        class_name="FPNDM",
        evaluations=_runge_kutta_start,
        order=4,
        zero_snr_predictions=(),
        default_spacing="leading",
        least_steps=4,
    ),
    Scheduler(
        name="s-pndm",
        summary="pndm of order 2, as its paper has it: steadier than order 4 at few steps",
        source=PNDM_PAPER,
        module="sdcli.pipeline.solvers",
        class_name="PNDM",
        evaluations=_one_more,
        order=2,
        zero_snr_predictions=(),
        default_spacing="leading",
        overrides={"solver_order": 2},
    ),
    Scheduler(
        name="lms",
        summary="linear multistep of order 4 in sigma",
        source=K_DIFFUSION,
        module=f"{DIFFUSERS}lms_discrete",
        class_name="LMSDiscreteScheduler",
        evaluations=_one_per_step,
        order=4,
        aliases=("k-lms",),
        zero_snr_predictions=(),
        orders=(1, 2, 3, 4),
        has_order_by_step=True,
        takes_sigmas=True,
    ),
    Scheduler(
        name="heun",
        summary="second order, two evaluations a step",
        source="Karras et al. 2022, arXiv:2206.00364, algorithm 1",
        module=f"{DIFFUSERS}heun_discrete",
        class_name="HeunDiscreteScheduler",
        evaluations=_two_per_step,
        order=2,
        aliases=("k-heun",),
        zero_snr_predictions=(),
        takes_sigmas=True,
    ),
    Scheduler(
        name="dpm",
        summary="DPM-Solver++ 2M: second order at one evaluation a step; the default",
        source=DPM_PAPER,
        module=f"{DIFFUSERS}dpmsolver_multistep",
        class_name="DPMSolverMultistepScheduler",
        evaluations=_one_per_step,
        order=2,
        aliases=("dpm++2m", "k-dpm++2m", "dpmsolver++", "dpm-solver++"),
        overrides={
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
        },
        has_spare_interval=True,
        orders=(1, 2, 3),
        takes_sigmas=True,
    ),
    Scheduler(
        name="dpm-sde",
        summary="DPM-Solver++ 2M for the stochastic equation: fresh noise at every step",
        source=DPM_PAPER,
        module=f"{DIFFUSERS}dpmsolver_multistep",
        class_name="DPMSolverMultistepScheduler",
        evaluations=_one_per_step,
        order=1,
        aliases=("dpm++2m-sde", "dpm++2m-sde-gpu"),
        is_stochastic=True,
        overrides={
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
        },
        has_spare_interval=True,
        orders=(1, 2, 3),
        takes_sigmas=True,
    ),
    Scheduler(
        name="dpm-single",
        summary="DPM-Solver++ 2S: second order within each pair of steps, no history across pairs",
        source=DPM_PAPER,
        module=f"{DIFFUSERS}dpmsolver_singlestep",
        class_name="DPMSolverSinglestepScheduler",
        evaluations=_one_per_step,
        order=2,
        aliases=("dpm++2s",),
        overrides={
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
        },
        zero_snr_predictions=(),
        spacings=("linspace",),
        has_spare_interval=True,
        orders=(1, 2, 3),
        takes_sigmas=True,
    ),
    Scheduler(
        name="ddpm",
        summary="the model's own reverse process: fresh noise at every step, many steps needed",
        source="Ho et al. 2020, arXiv:2006.11239",
        module=f"{DIFFUSERS}ddpm",
        class_name="DDPMScheduler",
        evaluations=_one_per_step,
        order=1,
        is_stochastic=True,
        zero_snr_predictions=("v_prediction", "sample"),
        default_spacing="leading",
        uses_learned_variance=True,
        takes_variance=True,
    ),
    Scheduler(
        name="euler",
        summary="first order in sigma, deterministic",
        source="Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn",
        module=f"{DIFFUSERS}euler_discrete",
        class_name="EulerDiscreteScheduler",
        evaluations=_one_per_step,
        order=1,
        aliases=("k-euler",),
        takes_sigmas=True,
    ),
    Scheduler(
        name="euler-a",
        summary="Euler with fresh noise at every step (ancestral): never settles as the steps grow",
        source=K_DIFFUSION,
        module=f"{DIFFUSERS}euler_ancestral_discrete",
        class_name="EulerAncestralDiscreteScheduler",
        evaluations=_one_per_step,
        order=1,
        aliases=("euler-ancestral", "k-euler-a", "k-euler-ancestral"),
        is_stochastic=True,
        predictions=("epsilon", "v_prediction"),
        zero_snr_predictions=("epsilon", "v_prediction"),
    ),
    Scheduler(
        name="dpm2",
        summary="DPM-Solver-2 in sigma: second order, two evaluations a step, the second in the middle",
        source="Karras et al. 2022, arXiv:2206.00364; Lu et al. 2022, arXiv:2206.00927",
        module=f"{DIFFUSERS}k_dpm_2_discrete",
        class_name="KDPM2DiscreteScheduler",
        evaluations=_two_per_step,
        order=2,
        aliases=("dpm-2", "kdpm2", "kdpm-2", "k-dpm-2"),
        predictions=("epsilon", "v_prediction"),
        zero_snr_predictions=(),
        takes_sigmas=True,
    ),
    Scheduler(
        name="dpm2-a",
        summary="dpm2 with fresh noise at every step (ancestral)",
        source=K_DIFFUSION,
        module=f"{DIFFUSERS}k_dpm_2_ancestral_discrete",
        class_name="KDPM2AncestralDiscreteScheduler",
        evaluations=_two_per_step,
        order=1,
        aliases=("dpm-2-a", "dpm2-ancestral", "dpm-2-ancestral", "kdpm2-a", "kdpm-2-a", "k-dpm-2-a"),
        is_stochastic=True,
        predictions=("epsilon", "v_prediction"),
        zero_snr_predictions=(),
        takes_sigmas=True,
    ),
    Scheduler(
        name="deis",
        summary="exponential integrator with polynomials in log rho, of order 2",
        source="Zhang and Chen 2023, arXiv:2204.13902",
        module=f"{DIFFUSERS}deis_multistep",
        class_name="DEISMultistepScheduler",
        evaluations=_one_per_step,
        order=2,
        overrides={
            "algorithm_type": "deis",
            "solver_order": 2,
            "solver_type": "logrho",
            "lower_order_final": True,
        },
        zero_snr_predictions=(),
        has_spare_interval=True,
        orders=(1, 2, 3),
        takes_sigmas=True,
    ),
    Scheduler(
        name="unipc",
        summary="predictor of order 2 with a corrector, at one evaluation a step; good at few steps",
        source="Zhao et al. 2023, arXiv:2302.04867",
        module=f"{DIFFUSERS}unipc_multistep",
        class_name="UniPCMultistepScheduler",
        evaluations=_one_per_step,
        order=2,
        aliases=("uni-pc",),
        overrides={"solver_order": 2},
        has_spare_interval=True,
        orders=(1, 2, 3),
        takes_sigmas=True,
    ),
    Scheduler(
        name="lcm",
        summary="latent consistency: for models distilled to few steps, at guidance 1 to 2",
        source="Luo et al. 2023, arXiv:2310.04378",
        module=f"{DIFFUSERS}lcm",
        class_name="LCMScheduler",
        evaluations=_one_per_step,
        order=1,
        is_stochastic=True,
        zero_snr_predictions=("v_prediction", "sample"),
        spacings=(),
        default_spacing="leading",
    ),
    Scheduler(
        name="tcd",
        summary="trajectory consistency: for models distilled to few steps; eta 0 draws no noise",
        source="Zheng et al. 2024, arXiv:2402.19159",
        module=f"{DIFFUSERS}tcd",
        class_name="TCDScheduler",
        evaluations=_one_per_step,
        order=1,
        is_stochastic=True,
        zero_snr_predictions=("v_prediction", "sample"),
        spacings=(),
        default_spacing="leading",
        default_eta=0.3,
    ),
)

# Names of other programs that say more than which scheduler: its order.
ORDERED: Mapping[str, tuple[str, int]] = {"dpm++3m": ("dpm", 3), "dpm++3m-sde": ("dpm-sde", 3)}
# How other programs end a scheduler's name to say where its noise levels lie: `sigmas` or `timestep_spacing`.
ENDINGS: Mapping[str, tuple[str | None, str | None]] = {
    "-karras": ("karras", None),
    "-k": ("karras", None),
    "-exponential": ("exponential", None),
    "-beta": ("beta", None),
    "-sgm-uniform": (None, "trailing"),
    "-simple": (None, "trailing"),
}
