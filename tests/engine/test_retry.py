"""Half precision that is not enough is tried once more in float32, and never silently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ledits_min.engine.retry import NotFinite, retried_in_float32
from ledits_min.errors import RunError


class Half(nn.Module):
    """A module whose attempt fails as often as told."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]), requires_grad=False)
        self.failures, self.seen = failures, list[torch.dtype]()

    def attempt(self) -> str:
        self.seen.append(self.weight.dtype)
        if len(self.seen) <= self.failures:
            raise NotFinite("editing: bad at step 3")
        return "done"


def test_half_precision_is_retried_once_in_float32() -> None:
    half = Half(1).half()
    with pytest.warns(UserWarning, match="bad at step 3 in float16; once more in float32"):
        assert retried_in_float32(half, half.attempt) == "done"
    assert half.seen == [torch.float16, torch.float32]
    assert half.weight.dtype == torch.float16
    again = Half(2).bfloat16()
    with (
        pytest.warns(UserWarning, match="once more"),
        pytest.raises(RunError, match="bad at step 3, in float32 as well"),
    ):
        retried_in_float32(again, again.attempt)
    assert again.weight.dtype == torch.bfloat16


def test_float32_is_not_retried() -> None:
    single = Half(1)
    with pytest.raises(RunError, match="bad at step 3; lower"):
        retried_in_float32(single, single.attempt)
    assert len(single.seen) == 1
