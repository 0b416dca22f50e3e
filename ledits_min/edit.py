"""LEDITS [2307.00522, Algorithm 1] as a plain loop over a callable: everything faster is tested against this file.

`eps_model(x_t, t, context)` predicts the noise in x_t (B, C, h, w) at t int64 (B,), in float32 or better; what a
context is only the model knows. Contexts are looked up by text, and "" is always the empty prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ledits_min.guidance import EditSettings, edited_eps, guided_eps, guided_texts
from ledits_min.inversion import InversionSettings, Solver, trajectory

EpsModel = Callable[[Tensor, Tensor, Any], Tensor]
Predict = Callable[[int, Tensor, Tensor], Mapping[str, Tensor]]


class Hooks(NamedTuple):
    """What Prompt-to-Prompt and masks of attention add to the loop; without them it is Algorithm 1.

    predict  (step, x_t, t) -> predictions by text that are not asked of `eps_model` (see `p2p.lend_maps`)
    maps     attention maps (B, h', w') by text for `sega.attention_mask`, as an eps_model that records them left them
    blend    the x_t that a step leads to -> the x_t that the next one starts from (see `p2p.LocalBlend`)
    """

    predict: Predict = lambda step, x_t, t: {}
    maps: Mapping[str, Tensor] = {}
    blend: Callable[[Tensor], Tensor] = lambda x_t: x_t


NO_HOOKS = Hooks()


@dataclass(frozen=True)
class Step:
    """What one editing step saw: handed to `on_step`, never read back by the loop.

    eps holds the predictions by text, x_prev the latents behind the step; gamma and masks are as in `sega.Guidance`.
    """

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
    settings: InversionSettings,
    on_step: Callable[[int, dict[str, Tensor]], None] = lambda index, eps: None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1, the inversion: the noisy start x_T and the residual of every executed step.

    x_0 (B, C, h, w), noise (T, B, C, h, w) with T = num_steps - skip; returns (B, C, h, w) and (T, B, C, h, w).
    """
    schedule = settings.make_schedule()
    source, scale, solver = settings.source, settings.source_guidance_scale, Solver(settings)

    # Independent noisy copies of x_0, one per timestep, and x_0 itself behind them.
    x = trajectory(x_0, noise, schedule.alpha_bar_t)
    residuals = torch.empty_like(x[1:])

    # No prediction waits for another, since the copies are independent.
    for i, timestep in enumerate(schedule.timesteps):
        t = timestep.to(x.device).expand(len(x_0))
        eps = {text: eps_model(x[i], t, contexts[text]) for text in guided_texts("", source, scale)}
        mu_t = solver.mean(i, x[i], guided_eps(eps, "", source, scale))
        residuals[i] = x[i + 1] - mu_t  # the paper's sigma_t z_t, never divided by sigma_t
        on_step(i, eps)
    return x[0], residuals


def edit(
    eps_model: EpsModel,
    contexts: Mapping[str, Any],
    x_T: Tensor,
    residuals: Tensor,
    inversion: InversionSettings,
    settings: EditSettings,
    on_step: Callable[[Step], None] = lambda step: None,
    hooks: Hooks = NO_HOOKS,
) -> Tensor:
    """Algorithm 1, the editing: denoise x_T again, guided by the target prompt and by every concept; returns x_0.

    x_T and residuals come from `invert` with the settings `inversion`.
    """
    schedule = inversion.make_schedule()
    x_t, momentum, solver = x_T, torch.zeros_like(x_T), Solver(inversion)

    for i, timestep in enumerate(schedule.timesteps):
        t = timestep.to(x_t.device).expand(len(x_t))

        # Predict with each text once.
        eps = dict(hooks.predict(i, x_t, t))
        eps |= {text: eps_model(x_t, t, contexts[text]) for text in settings.texts(i) if text not in eps}

        # Guide: eps_uncond + guidance_scale (eps_target - eps_uncond) + gamma_t.
        guided, added = edited_eps(eps, settings, i, momentum, hooks.maps)
        if added is not None:
            momentum = added.momentum

        # Step: x_{t-1} = mu_t(x_t, eps) + residual.
        x_t = hooks.blend(solver.mean(i, x_t, guided) + residuals[i])
        gamma, masks = (None, []) if added is None else (added.gamma, added.masks)
        on_step(Step(i, int(timestep), eps, gamma, masks, x_t))
    return x_t
