"""Every equation about noise levels. All tables are float64; they are rounded once, where they meet a latent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ledits_min.config import ScheduleConfig
from ledits_min.errors import InputError

Scalar = TypeVar("Scalar", float, Tensor)
MARGIN = 1e-6  # nearer to 0 and 1 than this, 1 - alpha_bar_prev - sigma_t^2 is rounding error and may be negative
SINGULAR = 1e-7  # an alpha_bar below this is pure noise: pred_x0 divides by its square root


class Level(NamedTuple):
    """What one step needs to know of the noise: the level it leaves, the level it leads to, the noise it adds."""

    alpha_bar_t: float
    alpha_bar_prev: float
    sigma_t: float


@dataclass(frozen=True)
class Schedule:
    """The noise levels that one run visits, from noisy to clean: T executed steps.

    timesteps      int64 (T,)    descending; item i is t of executed step i
    t_prev         int64 (T,)    the timestep that step i leads to; -1 after the last one
    alpha_bar_t    float64 (T,)  alphas_cumprod[t]
    alpha_bar_prev float64 (T,)  alphas_cumprod[t_prev]; alphas_cumprod[0] after the last one (with
                                 steps_offset 1 its sigma is therefore not 0)
    alphas_cumprod float64 (num_train_timesteps,)  prod (1 - betas)
    """

    timesteps: Tensor
    t_prev: Tensor
    alpha_bar_t: Tensor
    alpha_bar_prev: Tensor
    alphas_cumprod: Tensor

    def sigmas(self, eta: float) -> Tensor:
        """sigma_t of every step, float64 (T,)."""
        return sigma(self.alpha_bar_t, self.alpha_bar_prev, eta)

    def levels(self, eta: float) -> list[Level]:
        """Every step's numbers."""
        columns = (self.alpha_bar_t, self.alpha_bar_prev, self.sigmas(eta))
        return [Level(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]

    def second_order_weights(self) -> list[float]:
        """Weights of `inversion.second_order_eps`, one per step        [2211.01095, midpoint, sde form]

        weight_i = sqrt(alpha_bar_t / (1 - alpha_bar_t)) min(h_i / (2 h_{i-1}), 1/2),  h_i = lambda_{i+1} - lambda_i

        lambda = ln(alpha_bar / (1 - alpha_bar)) / 2. The first step has none before it; the last is of first order, as
        in diffusers. The bound is ours: behind a short interval a long one would multiply the edit's last change.
        """
        snr, snr_prev = (level / (1.0 - level) for level in (self.alpha_bar_t, self.alpha_bar_prev))
        h, weights = 0.5 * (snr_prev / snr).log(), torch.zeros_like(snr)
        weights[1:-1] = snr[1:-1].sqrt() * (h[1:-1] / (2.0 * h[:-2])).clamp(max=0.5)
        return weights.tolist()


def make_schedule(config: ScheduleConfig, num_steps: int, skip: int = 0) -> Schedule:
    """The "leading" timesteps of DDIM for `num_steps` steps, without the `skip` noisiest.

    t = i * (num_train_timesteps // num_steps) + steps_offset, descending. num_steps is at least 1 and at most half the
    training timesteps: a stride of one would run past the table or start far from pure noise; skip is below it.
    InputError outside these ranges, and where the first step would be pure noise (zero terminal SNR).
    """
    longest = config.num_train_timesteps // 2
    if not 1 <= num_steps <= longest:
        raise InputError(f"num_steps is {num_steps}; it must lie in 1 .. {longest}")
    if not 0 <= skip < num_steps:
        raise InputError(f"skip is {skip}; it must lie in 0 .. {num_steps - 1}")
    stride = config.num_train_timesteps // num_steps
    timesteps = torch.arange(num_steps - 1 - skip, -1, -1) * stride + config.steps_offset
    t_prev = torch.cat([timesteps[1:], torch.tensor([-1])])
    alphas_cumprod = torch.cumprod(1.0 - betas(config), dim=0)
    if alphas_cumprod[0] > 1.0 - MARGIN or (alphas_cumprod[-1] < MARGIN and not config.rescale_betas_zero_snr):
        raise InputError(
            f"beta_start {config.beta_start} and beta_end {config.beta_end} make a noise schedule that begins or ends "
            f"within {MARGIN} of pure picture or pure noise; use the checkpoint's own scheduler config"
        )
    if config.rescale_betas_zero_snr:
        alphas_cumprod = rescaled(alphas_cumprod)
        if alphas_cumprod[timesteps[0]] < SINGULAR:
            raise InputError(
                f"num_steps is {num_steps}, and its first step, t = {int(timesteps[0])}, is pure noise in this model "
                "(zero terminal SNR), which cannot be inverted; take fewer steps"
            )
    return Schedule(
        timesteps=timesteps,
        t_prev=t_prev,
        alpha_bar_t=alphas_cumprod[timesteps],
        alpha_bar_prev=alphas_cumprod[t_prev.clamp(min=0)],
        alphas_cumprod=alphas_cumprod,
    )


def betas(config: ScheduleConfig) -> Tensor:
    """Variance added at each training timestep, float64 (num_train_timesteps,).

    scaled_linear: betas = linspace(sqrt(beta_start), sqrt(beta_end))^2        [2112.10752, released code]
    linear:        betas = linspace(beta_start, beta_end)                      [2006.11239, section 4]
    """
    n = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, n, dtype=torch.float64)
    return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, n, dtype=torch.float64) ** 2


def rescaled(alphas_cumprod: Tensor) -> Tensor:
    """The table shifted and stretched so that its last entry is 0 and its first stays: zero terminal SNR.

    sqrt(a'_t) = (sqrt(a_t) - sqrt(a_T)) sqrt(a_0) / (sqrt(a_0) - sqrt(a_T))        [2305.08891, Algorithm 1]

    Only the last timestep is pure noise; float64 (num_train_timesteps,) like the table it comes from.
    """
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def sigma(alpha_bar_t: Scalar, alpha_bar_prev: Scalar, eta: float) -> Scalar:
    """Standard deviation of the noise that a DDIM step adds.

    sigma_t = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)

    eta = 0 is deterministic DDIM, eta = 1 is DDPM. [2010.02502, Eq. 16]
    """
    variance = (1.0 - alpha_bar_prev) / (1.0 - alpha_bar_t) * (1.0 - alpha_bar_t / alpha_bar_prev)
    return eta * sqrt(variance)


def sqrt(level: Scalar) -> Scalar:
    """Square root of a number or of every item of a tensor."""
    return level.sqrt() if isinstance(level, Tensor) else math.sqrt(level)
