"""What is tried again: in float32 where half precision was not enough."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch
from torch import nn

from ledits_min.errors import RunError, warn


class NotFinite(RunError):
    """A value was infinite or no number."""

    @classmethod
    def at(cls, phase: str, what: str, step: int, t: int) -> NotFinite:
        return cls(f"{phase}: {what} holds values that are not finite at step {step} (t = {t})")


class Attempt:
    """One attempt at something: `with` it a NotFinite is kept, not raised."""

    failure: NotFinite | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.failure = error if isinstance(error, NotFinite) else None
        return self.failure is not None


def attempts(network: nn.Module) -> Iterator[Attempt]:
    """At most two attempts at what runs `network`: once more with float32 weights where half precision was not enough.

        for attempt in attempts(network):
            with attempt:
                result = ...

    RunError where nothing helps.
    """
    dtype = next(network.parameters()).dtype
    way_out = "lower the guidance scales, or use a checkpoint that is not damaged"
    yield (first := Attempt())
    if first.failure is None:
        return
    if dtype == torch.float32:
        raise RunError(f"{first.failure}; {way_out}") from None
    warn(f"{first.failure} in {str(dtype).removeprefix('torch.')}; once more in float32")
    network.float()
    try:
        yield (second := Attempt())
    finally:
        network.to(dtype)  # exact: the values came from there
    if second.failure is not None:
        raise RunError(f"{second.failure}, in float32 as well; {way_out}") from None
