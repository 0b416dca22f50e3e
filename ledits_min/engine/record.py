"""What a run leaves behind besides its latents: masks, the trace, and whether every step stayed finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ledits_min.edit import Step
from ledits_min.schedule import Schedule
from ledits_min.sega import ConceptTerm


class Recorder:
    """Collects, step by step, what the masks covered, whether the latents stayed finite, and the trace if asked."""

    def __init__(
        self,
        terms: list[ConceptTerm],
        negative: str,
        target: str,
        schedule: Schedule,
        skip: int,
        eta: float,
        trace: bool,
    ) -> None:
        self.finite: list[Tensor] = []  # read once, after the loop: reading a device value stalls it
        self.trace: list[dict[str, Any]] = []
        self._with_trace, self._schedule, self._skip, self._sigmas = trace, schedule, skip, schedule.sigmas(eta)
        self._labels = {target: "target", negative: "uncond"}
        self._sums: list[Tensor | None] = [None] * len(terms)
        self._counts = [0] * len(terms)

    def record(self, step: Step) -> None:
        self.finite.append(step.x_prev.isfinite().all())
        for k, mask in enumerate(step.masks):
            if mask is not None:
                share = mask.float().mean(dim=1)
                total = self._sums[k]
                self._sums[k] = share if total is None else total + share
                self._counts[k] += 1
        if self._with_trace:
            self.trace.append(self._entry(step))

    def masks(self, like: Tensor) -> list[Tensor]:
        """One float32 (B, h, w) a concept, on the CPU."""
        return [
            torch.zeros_like(like[:, 0]) if total is None else (total / count).cpu()
            for total, count in zip(self._sums, self._counts, strict=True)
        ]

    def _entry(self, step: Step) -> dict[str, Any]:
        index = self._skip + step.index
        return {
            "t": step.t,
            "alpha_bar": float(self._schedule.alpha_bar_t[index]),
            "sigma": float(self._sigmas[index]),
            "eps_rms": {self._labels.get(text, text): _rms(eps) for text, eps in step.eps.items()},
            "mask_fraction": [0.0 if mask is None else float(mask.float().mean()) for mask in step.masks],
            "gamma_rms": 0.0 if step.gamma is None else _rms(step.gamma),
            "x_rms": _rms(step.x_prev),
        }


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
