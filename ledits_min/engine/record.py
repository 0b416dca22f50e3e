"""What a run leaves behind besides its latents: the masks of its concepts and the trace of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ledits_min.edit import Step
from ledits_min.engine.progress import Progress, Reporting, tell
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings


class Edited(NamedTuple):
    """latents (B, C, h, w); one mask (B, h, w) per term, on the CPU; the trace, empty where it is not wanted."""

    latents: Tensor
    masks: list[Tensor]
    trace: list[dict[str, Any]]


def mean_masks(counts: Sequence[Tensor], settings: EditSettings, steps: int) -> list[Tensor]:
    """The share of channels, and of the steps in which a concept acted, that its mask covered: (B, h, w) on the CPU.

    Where a region limits the concepts, that share times the region's own.

    counts (B, C, h, w) per term: in how many of the `steps` executed steps its mask kept a position.
    """
    acted = [sum(term.acts(step) for step in range(steps)) for term in settings.terms]
    region = 1.0 if settings.region is None else settings.region[:, 0].cpu()
    return [count.float().mean(dim=1).cpu() / max(1, n) * region for count, n in zip(counts, acted, strict=True)]


def observer(
    phase: str, inversion: InversionSettings, settings: EditSettings, reporting: Reporting
) -> tuple[list[dict[str, Any]], Callable[[Step], None] | None]:
    """Where the trace gathers, and what a loop hands its steps to; None where nobody wants them."""
    trace: list[dict[str, Any]] = []
    levels = inversion.make_schedule().levels(inversion.eta)
    labels = {settings.target: "target", settings.negative: "uncond"}

    def on_step(step: Step) -> None:
        if reporting.trace:
            level = levels[step.index]
            trace.append({
                "t": step.t,
                "alpha_bar": level.alpha_bar_t,
                "sigma": level.sigma_t,
                "eps_rms": {labels.get(text, text): _rms(eps) for text, eps in step.eps.items()},
                "mask_fraction": [0.0 if mask is None else float(mask.float().mean()) for mask in step.masks],
                "gamma_rms": 0.0 if step.gamma is None else _rms(step.gamma),
                "x_rms": _rms(step.x_prev),
            })  # fmt: skip
        entry = trace[-1] if reporting.trace else None
        tell(reporting.callback, Progress(phase, step.index + 1, len(levels), step.x_prev, entry))

    return trace, on_step if reporting.trace or reporting.callback else None


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
