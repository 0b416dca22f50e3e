"""What a run tells its caller while it runs, and how the caller stops it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ledits_min.errors import RunError


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    phase    "inverting", "editing", "inverting and editing" (of `LEdits.invert_and_edit`) or "generating"
    done     of `total`: evaluations of the UNet while inverting, which runs all timesteps at once, else executed steps
    latents  x_t behind the step, float32 (B, C, h, w) on the device, the receiver's own copy; None while inverting
    trace    the step's entry in `Result.trace`, with trace=True; the receiver's own copy

    A phase that is repeated in float32, because half precision overflowed, counts from the start again.
    """

    phase: str
    done: int
    total: int
    latents: Tensor | None = None
    trace: dict[str, Any] | None = None


Callback = Callable[[Progress], object]


@dataclass(frozen=True)
class Reporting:
    """What a caller wants to hear of a run: a bar, an entry per step in `Result.trace`, calls of its own function."""

    progress: bool = True
    trace: bool = False
    callback: Callback | None = None


class Stopped(RunError):
    """A callback asked to stop."""


def tell(callback: Callback | None, progress: Progress) -> None:
    """Call back, if anybody wants it; Stopped where the answer is true."""
    if callback is not None and callback(replace(progress, trace=deepcopy(progress.trace))):
        unit = "evaluations" if progress.latents is None else "steps"
        raise Stopped(f"{progress.phase}: stopped by the callback after {progress.done} of {progress.total} {unit}")


def progress_bar(phase: str, total: int, unit: str, wanted: bool) -> tqdm[Any]:
    """A bar: in a notebook a widget, else text on stderr, which stays silent where that is no terminal, or closed."""
    numbers = f"{{n_fmt}}/{{total_fmt}} {unit}s in {{elapsed}}, {{remaining}} left{{postfix}}"
    return tqdm(
        total=total, desc=phase, bar_format=f"{{desc:<10}} {{percentage:3.0f}} % |{{bar}}| {numbers}",
        file=sys.stderr, disable=None if wanted and sys.stderr is not None else True,
    )  # fmt: skip
