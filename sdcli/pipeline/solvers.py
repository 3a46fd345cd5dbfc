"""Solvers that diffusers lacks or has otherwise, in their paper's notation; they behave like its schedulers."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from sdcli.errors import NumericalError
from sdcli.pipeline.noise import alpha_bars

RUNGE_KUTTA_STEPS = 3  # which give the four slopes of order 4
# Adams-Bashforth: the share of the newest slope and of those before it, by order; for order 4 PNDM eq. 12.
SHARES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def transfer(x: Tensor, e: Tensor, a: float, b: float) -> Tensor:
    """phi, the transfer part: from x_t to x_{t-delta} along the noise e, without error where e is the true noise.

    x, e: of one shape; a, b: alpha_bar at t and at t - delta. Returns that shape.
    Source: Liu et al. 2022, arXiv:2202.09778, eq. 9, solved for x_{t-delta}.
    """
    slope = (b - a) / (math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b)))
    return math.sqrt(b / a) * x - slope * e


class PNDM:
    """Pseudo linear multistep methods: of order 1 DDIM, of order 2 S-PNDM, of order 4 what is called PLMS.

    Of order 2 and above the first step is a pseudo improved Euler step: it is taken, the noise predicted at its end,
    and taken again with the mean of both; so the second timestep comes twice. From there the order grows with the
    history. Steps go from each timestep to the next, also where they are not evenly spaced.
    At order 4 and of a UNet that predicts the noise it draws what diffusers' PNDMScheduler draws with `skip_prk_steps`.
    Of one that predicts v that class weighs the v of different timesteps, which is not the method: here the history
    holds the noise, whatever the UNet predicts.
    Source: Liu et al. 2022, arXiv:2202.09778, section 3.
    """

    init_noise_sigma = 1.0

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        set_alpha_to_one: bool = False,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        solver_order: int = 4,
    ) -> None:
        self.config: dict[str, object] = {key: value for key, value in locals().items() if key != "self"}
        self.alphas_cumprod = alpha_bars(self.config)  # (T,) float64
        self.final_alpha_cumprod = 1.0 if set_alpha_to_one else float(self.alphas_cumprod[0])
        self.prediction_type = prediction_type
        self.solver_order = solver_order
        self.num_inference_steps = 0
        self.timesteps = torch.empty(0, dtype=torch.int64)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Place the timesteps, falling, and forget what was sampled."""
        total, offset = len(self.alphas_cumprod), int(str(self.config["steps_offset"]))
        places = torch.arange(num_inference_steps, dtype=torch.float64)
        if self.config["timestep_spacing"] == "leading":
            t = (places * (total // num_inference_steps)).flip(0) + offset
        elif self.config["timestep_spacing"] == "linspace":
            t = (places * ((total - 1) / max(num_inference_steps - 1, 1))).flip(0)
        else:  # trailing
            t = total - places * (total / num_inference_steps) - 1
        self.num_inference_steps = num_inference_steps
        self._of_steps, self._device = [int(one) for one in t.round()], device
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """Begin at a step, counted from 0, as at the first; timesteps before it and what was sampled are forgotten."""
        of_steps = self._of_steps[step:]
        self._of_calls = self._calls(of_steps)
        self.timesteps = torch.tensor(self._of_calls, device=self._device)
        self.steps_of_calls = self._steps_of_calls(len(of_steps))
        self._index = 0  # of the next call
        self._method = self._walk(of_steps)
        next(self._method)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x_0), DDPM eq. 4: shapes as of x_0; t: (1,) or (B,)."""
        a = self.alphas_cumprod[t.cpu()].view(-1, 1, 1, 1)
        return a.sqrt().to(x_0) * x_0 + (1 - a).sqrt().to(x_0) * noise

    def scale_model_input(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The UNet is given x_t as it is."""
        return x

    def step(self, prediction: Tensor, t: Tensor, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """From x_t to where the UNet is asked next, or with the last timestep to the end. Shapes as of x.

        prediction: of the UNet at t, which must be the next of `timesteps`. Returns a tuple of one, as with diffusers'
        `return_dict=False`.
        """
        if self._index >= len(self._of_calls):
            raise NumericalError("the scheduler has taken all its steps", "make a fresh one")
        e = self._noise(prediction, x, self._alpha_bar(self._of_calls[self._index]))
        self._index += 1
        return (self._method.send((x, e)),)

    def _calls(self, t: list[int]) -> list[int]:
        """The timesteps at which the UNet is asked, from those of the steps."""
        return [*t[:2], *t[1:]] if self.solver_order > 1 and len(t) > 1 else t

    def _steps_of_calls(self, steps: int) -> list[int]:
        """The step, from 0, that each call of the UNet belongs to."""
        return [0] * (len(self._of_calls) - steps) + list(range(steps))

    def _walk(self, t: list[int]) -> Generator[Tensor, tuple[Tensor, Tensor], None]:
        """The method, straight down: it is sent x and the noise e predicted there, and yields the next x."""
        levels = [*map(self._alpha_bar, t), self.final_alpha_cumprod]
        x, e = yield torch.empty(0)
        slopes: list[Tensor] = []  # newest first
        for i, (a, b) in enumerate(pairwise(levels)):
            slopes = [e, *slopes[: self.solver_order - 1]]
            if i == 0 and len(self._of_calls) > len(t):  # pseudo improved Euler
                _, e_1 = yield transfer(x, e, a, b)
                x, e = yield transfer(x, (e + e_1) / 2, a, b)
            else:  # pseudo linear multistep
                x, e = yield transfer(x, _weighted(slopes), a, b)

    def _alpha_bar(self, t: int) -> float:
        return float(self.alphas_cumprod[t])

    def _noise(self, prediction: Tensor, x: Tensor, a: float) -> Tensor:
        """epsilon from whatever the UNet predicts (Salimans and Ho 2022, arXiv:2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "v_prediction":
            return math.sqrt(a) * prediction + math.sqrt(1 - a) * x
        return (x - math.sqrt(a) * prediction) / math.sqrt(1 - a)


class FPNDM(PNDM):
    """F-PNDM: three pseudo Runge-Kutta steps of four evaluations, then pseudo linear multistep steps of order 4.

    Of a UNet that predicts the noise it draws what diffusers' PNDMScheduler draws without `skip_prk_steps`.
    Source: Liu et al. 2022, arXiv:2202.09778, algorithm 2, eq. 12 and 13.
    """

    def _calls(self, t: list[int]) -> list[int]:
        start = [
            [now, _middle(now, then), _middle(now, then), then] for now, then in pairwise(t[: RUNGE_KUTTA_STEPS + 1])
        ]
        return [*chain.from_iterable(start), *t[RUNGE_KUTTA_STEPS:]]

    def _steps_of_calls(self, steps: int) -> list[int]:
        return sorted([*range(steps), *[*range(RUNGE_KUTTA_STEPS)] * 3])

    def _walk(self, t: list[int]) -> Generator[Tensor, tuple[Tensor, Tensor], None]:
        levels = [*map(self._alpha_bar, t), self.final_alpha_cumprod]
        x, e = yield torch.empty(0)
        slopes: list[Tensor] = []  # newest first
        for i, (a, b) in enumerate(pairwise(levels)):
            slopes = [e, *slopes[:3]]
            if i < RUNGE_KUTTA_STEPS:  # eq. 13
                m = self._alpha_bar(_middle(t[i], t[i + 1]))
                _, e_2 = yield transfer(x, e, a, m)
                _, e_3 = yield transfer(x, e_2, a, m)
                _, e_4 = yield transfer(x, e_3, a, b)
                x, e = yield transfer(x, (e + 2 * e_2 + 2 * e_3 + e_4) / 6, a, b)
            else:  # eq. 12
                x, e = yield transfer(x, _weighted(slopes), a, b)


def _weighted(slopes: list[Tensor]) -> Tensor:
    """The slope of Adams-Bashforth's method of as many steps as there are slopes, newest first."""
    shares = SHARES[len(slopes)]
    return torch.stack([share * slope for share, slope in zip(shares, slopes, strict=True)]).sum(dim=0)


def _middle(t: int, s: int) -> int:
    return (t + s) // 2
