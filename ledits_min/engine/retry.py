"""What is tried again: in float32 where half precision was not enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ledits_min.errors import RunError, warn

T = TypeVar("T")


class NotFinite(RunError):
    """A value was infinite or no number."""

    @classmethod
    def at(cls, phase: str, what: str, step: int, t: int) -> NotFinite:
        return cls(f"{phase}: {what} holds values that are not finite at step {step} (t = {t})")


def retried_in_float32(network: nn.Module, attempt: Callable[[], T]) -> T:
    """`attempt()`, which runs `network`; once more with float32 weights where half precision was not enough.

    RunError where nothing helps.
    """
    dtype = next(network.parameters()).dtype
    way_out = "lower the guidance scales, or use a checkpoint that is not damaged"
    try:
        return attempt()
    except NotFinite as failure:
        if dtype == torch.float32:
            raise RunError(f"{failure}; {way_out}") from None
        warn(f"{failure} in {str(dtype).removeprefix('torch.')}; once more in float32")
    network.float()
    try:
        return attempt()
    except NotFinite as failure:
        raise RunError(f"{failure}, in float32 as well; {way_out}") from None
    finally:
        network.to(dtype)  # exact: the values came from there
