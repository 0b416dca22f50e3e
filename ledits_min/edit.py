"""LEDITS [2307.00522, Algorithm 1] as a plain loop over a callable: everything faster is tested against this file.

`eps_model(x_t, t, context)` predicts the noise in x_t (B, C, h, w) at t int64 (B,), in x_t's dtype; what a context is
only the model knows. Contexts are looked up by text, and "" is always the empty prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ledits_min.guidance import edited_eps, guided_eps, guided_texts, step_texts
from ledits_min.inversion import posterior_mean, trajectory
from ledits_min.schedule import Schedule
from ledits_min.sega import ConceptTerm

EpsModel = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Step:
    """What one editing step saw: handed to `on_step`, never read back by the loop."""

    index: int
    t: int
    eps: dict[str, Tensor]
    gamma: Tensor | None
    masks: list[Tensor | None]
    x_prev: Tensor


def invert(
    eps_model: EpsModel,
    contexts: Mapping[str, Any],
    x_0: Tensor,
    noise: Tensor,
    schedule: Schedule,
    skip: int,
    eta: float = 1.0,
    source: str = "",
    source_guidance_scale: float = 3.5,
    on_step: Callable[[int], None] = lambda index: None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1, the inversion: the noisy start x_T and the residual of every executed step.

    x_0 (B, C, h, w), noise (T, B, C, h, w) with T = num_steps - skip; returns (B, C, h, w) and (T, B, C, h, w).
    """
    # Independent noisy copies of x_0, one a timestep; the skipped timesteps are never needed.
    x = trajectory(x_0, noise, schedule.alpha_bar_t[skip:])
    sigmas = schedule.sigmas(eta)
    residuals = torch.empty_like(x[1:])

    # No iteration waits for another, since the copies are independent.
    for i in range(len(residuals)):
        step = skip + i
        t = schedule.timesteps[step].to(x.device).expand(len(x_0))
        texts = guided_texts("", source, source_guidance_scale)
        eps = {text: eps_model(x[i], t, contexts[text]) for text in texts}
        eps_source = guided_eps(eps, "", source, source_guidance_scale)
        mu_t = posterior_mean(x[i], eps_source, *levels(schedule, sigmas, step))
        residuals[i] = x[i + 1] - mu_t  # the paper's sigma_t z_t, never divided by sigma_t
        on_step(i)
    return x[0], residuals


def edit(
    eps_model: EpsModel,
    contexts: Mapping[str, Any],
    x_t: Tensor,
    residuals: Tensor,
    schedule: Schedule,
    skip: int,
    eta: float = 1.0,
    target: str = "",
    guidance_scale: float = 15.0,
    negative: str = "",
    terms: Sequence[ConceptTerm] = (),
    momentum_scale: float = 0.0,
    momentum_beta: float = 0.6,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Tensor:
    """Algorithm 1, the editing: denoise x_T again, guided by the target prompt and by every concept; returns x_0.

    x_t and residuals come from `invert` with the same schedule, skip and eta.
    """
    terms = [term for term in terms if not term.is_noop(base=negative)]
    momentum = torch.zeros_like(x_t)
    sigmas = schedule.sigmas(eta)

    for i, residual in enumerate(residuals):
        step = skip + i
        t = schedule.timesteps[step].to(x_t.device).expand(len(x_t))

        # Predict with each text once.
        texts = step_texts(negative, target, guidance_scale, terms, i, momentum_scale)
        eps = {text: eps_model(x_t, t, contexts[text]) for text in texts}

        # Guide: eps_uncond + guidance_scale (eps_target - eps_uncond) + gamma_t.
        guided, added = edited_eps(
            eps, negative, target, guidance_scale, terms, i, momentum, momentum_scale, momentum_beta
        )
        gamma, masks = None, []
        if added is not None:
            gamma, masks, momentum = added.gamma, added.masks, added.momentum

        # Step: x_{t-1} = mu_t(x_t, eps) + residual.
        x_t = posterior_mean(x_t, guided, *levels(schedule, sigmas, step)) + residual
        on_step(Step(i, int(schedule.timesteps[step]), eps, gamma, masks, x_t))
    return x_t


def levels(schedule: Schedule, sigmas: Tensor, step: int) -> tuple[float, float, float]:
    """(alpha_bar_t, alpha_bar_prev, sigma_t) of one step as float64 numbers."""
    return float(schedule.alpha_bar_t[step]), float(schedule.alpha_bar_prev[step]), float(sigmas[step])
