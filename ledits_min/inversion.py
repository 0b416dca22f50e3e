"""Edit-friendly DDPM inversion [2304.06140]: independent noisy copies of a picture, and what each step must add.

Nothing here knows a network: predictions come in as tensors. Everything is float32 or float64, whatever the network
runs in, because sigma_t falls to 0.02 and the residuals must carry a picture exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE, ScheduleConfig
from ledits_min.schedule import Scalar, Schedule, make_schedule, sqrt


@dataclass(frozen=True)
class InversionSettings:
    """What an inversion is made with; an edit of it uses the same schedule, eta and model.

    fingerprint            identifies the model; "" where nobody asked
    num_steps, skip        steps from pure noise to the picture, and how many of the noisiest are left out
    eta                    0 .. 1: 0 is deterministic DDIM, 1 is DDPM
    source                 the prompt that describes the picture, "" for none
    source_guidance_scale  how strongly the prediction follows it, as in `guidance.guided_eps`
    seeds                  one number per picture; empty where the noise was given
    solver_order           1: DDPM or DDIM, as eta says; 2: SDE-DPM-Solver++, with eta 1 alone
    squared                whether the latents are of squares: a part cut from each picture, or the whole one padded
    """

    fingerprint: str = ""
    schedule: ScheduleConfig = SD15_SCHEDULE
    num_steps: int = 100
    skip: int = 36
    eta: float = 1.0
    source: str = ""
    source_guidance_scale: float = 3.5
    seeds: tuple[int, ...] = ()
    solver_order: int = 1
    squared: bool = False

    @property
    def executed_steps(self) -> int:
        """T, the number of steps that are run; the trajectory has T + 1 entries."""
        return self.num_steps - self.skip

    def make_schedule(self) -> Schedule:
        """The noise levels of the executed steps."""
        return make_schedule(self.schedule, self.num_steps, self.skip)


def draw_noise(seeds: Sequence[int], executed_steps: int, shape: tuple[int, ...]) -> Tensor:
    """n_t for the last `executed_steps` timesteps: float32 (T, B, *shape), item 0 belongs to the noisiest one.

    Each image has its own CPU generator, drawn from the last timestep upward, so that another skip, another batch or
    another device sees the same noise.
    """
    columns = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator) for _ in range(executed_steps)]
        columns.append(torch.stack(drawn[::-1]))
    return torch.stack(columns, dim=1)


def noisy_latents(x_0: Tensor, noise: Tensor, alpha_bar_t: Scalar) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) n_t        [2304.06140, section 3]"""
    return sqrt(alpha_bar_t) * x_0 + sqrt(1.0 - alpha_bar_t) * noise


def trajectory(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """x_t of every executed step, and x_0 itself behind them.

    x_0 (B, C, h, w), noise (T, B, C, h, w), alpha_bar_t float64 (T,); returns (T + 1, B, C, h, w) in x_0's dtype.
    """
    copies = [noisy_latents(x_0, n_t, level) for n_t, level in zip(noise.to(x_0), alpha_bar_t.tolist(), strict=True)]
    return torch.stack([*copies, x_0])


def predict_x0(x_t: Tensor, eps: Tensor, alpha_bar_t: Scalar) -> Tensor:
    """pred_x0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)        [2010.02502, Eq. 12, first term]"""
    return (x_t - sqrt(1.0 - alpha_bar_t) * eps) / sqrt(alpha_bar_t)


def posterior_mean(x_t: Tensor, eps: Tensor, alpha_bar_t: Scalar, alpha_bar_prev: Scalar, sigma_t: Scalar) -> Tensor:
    """mu_t = sqrt(alpha_bar_prev) pred_x0 + sqrt(1 - alpha_bar_prev - sigma_t^2) eps        [2010.02502, Eq. 12]

    sigma_t^2 carries eta^2. Both original repositories wrote eta there, which eta in {0, 1} hides.
    """
    pred_x0 = predict_x0(x_t, eps, alpha_bar_t)
    return sqrt(alpha_bar_prev) * pred_x0 + sqrt(1.0 - alpha_bar_prev - sigma_t**2) * eps


def second_order_eps(
    x_t: Tensor, eps: Tensor, last_pred_x0: Tensor | float, alpha_bar_t: float, weight: float
) -> tuple[Tensor, Tensor]:
    """eps' = eps - weight (pred_x0 - last_pred_x0), and pred_x0, both (B, C, h, w)        [2211.01095]

    Its posterior mean with eta = 1 is SDE-DPM-Solver++'s step; with weight 0 the step is of first order, LEDITS' own.
    """
    pred_x0 = predict_x0(x_t, eps, alpha_bar_t)
    return eps - weight * (pred_x0 - last_pred_x0), pred_x0


class Solver:
    """One path through the noise levels, step by step; of second order it remembers pred_x0 of the step before."""

    def __init__(self, settings: InversionSettings) -> None:
        schedule = settings.make_schedule()
        self.levels = schedule.levels(settings.eta)
        self.weights = schedule.second_order_weights() if settings.solver_order == 2 else []
        self.last_pred_x0: Tensor | float = 0.0

    def mean(self, step: int, x_t: Tensor, eps: Tensor) -> Tensor:
        """mu_t of an executed step that follows eps."""
        level = self.levels[step]
        if self.weights:
            weight = self.weights[step]
            eps, self.last_pred_x0 = second_order_eps(x_t, eps, self.last_pred_x0, level.alpha_bar_t, weight)
        return posterior_mean(x_t, eps, *level)


def eps_from_v(v: Tensor, x_t: Tensor, alpha_bar_t: Scalar) -> Tensor:
    """eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t        [2202.00512, section 4]"""
    return sqrt(alpha_bar_t) * v + sqrt(1.0 - alpha_bar_t) * x_t
