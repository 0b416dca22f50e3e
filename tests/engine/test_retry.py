"""Half precision that is not enough is tried once more in float32, and never silently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ledits_min.engine.retry import NotFinite, attempts
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


def run(half: Half) -> str:
    for attempt in attempts(half):
        with attempt:
            done = half.attempt()
    return done


def test_half_precision_is_retried_once_in_float32() -> None:
    half = Half(1).half()
    with pytest.warns(UserWarning, match="bad at step 3 in float16; once more in float32"):
        assert run(half) == "done"
    assert half.seen == [torch.float16, torch.float32]
    assert half.weight.dtype == torch.float16
    again = Half(2).bfloat16()
    with (
        pytest.warns(UserWarning, match="once more"),
        pytest.raises(RunError, match="bad at step 3, in float32 as well"),
    ):
        run(again)
    assert again.weight.dtype == torch.bfloat16


def test_float32_is_not_retried() -> None:
    single = Half(1)
    with pytest.raises(RunError, match="bad at step 3; lower"):
        run(single)
    assert len(single.seen) == 1


def test_what_else_goes_wrong_is_raised_and_the_weights_are_as_they_were() -> None:
    half = Half(0).half()

    def fail(*failures: Exception) -> None:
        for failure, attempt in zip(failures, attempts(half), strict=False):
            with attempt:
                raise failure

    with pytest.raises(ValueError, match="another"):
        fail(ValueError("another"))
    assert half.weight.dtype == torch.float16
    with pytest.warns(UserWarning, match="first"), pytest.raises(ValueError, match="second"):
        fail(NotFinite("first"), ValueError("second"))
    assert half.weight.dtype == torch.float16
