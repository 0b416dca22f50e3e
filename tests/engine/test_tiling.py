"""Tiles cover a picture, and fade into each other without a seam."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ledits_min.engine.memory import free_memory, is_out_of_memory, total_memory
from ledits_min.engine.tiling import boxes, in_tiles


@given(length=st.integers(1, 200), side=st.integers(8, 64))
def test_boxes_cover_and_overlap(length: int, side: int) -> None:
    found = boxes(length, side, side // 4)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(stop - start == min(side, length) for start, stop in found)
    for (_, stop), (start, _) in pairwise(found):
        assert stop - start >= side // 4
    widest = sum(side - side // 4 for _ in found[1:]) + side
    assert len(found) == 1 or widest - (side - side // 4) < length  # one tile fewer would not reach


@pytest.mark.parametrize(("inner", "outer"), [(1, 8), (8, 1), (4, 1)])
@pytest.mark.parametrize("size", [(9, 9), (30, 17), (8, 33)])
def test_a_code_without_a_neighbourhood_is_exact(size: tuple[int, int], inner: int, outer: int) -> None:
    def code(x: Tensor) -> Tensor:
        small = F.avg_pool2d(x, inner)
        return F.interpolate(small, scale_factor=outer, mode="nearest").square()

    x = torch.randn(2, 3, size[0] * inner, size[1] * inner)
    torch.testing.assert_close(in_tiles(code, x, 8, inner, outer), code(x))


def test_tiles_of_different_tone_fade_into_each_other() -> None:
    """A tile's own mean stands for what GroupNorm does: no step between neighbours may be as large as the offset."""
    found = in_tiles(lambda x: x + float(x[..., 0, 0].sum()), torch.arange(32.0).expand(1, 1, 32, 32), 16, 1, 1)
    steps = found.diff(dim=-1)
    assert steps.max() < 1.0 + 16.0 / 4
    assert steps.min() > 0.0


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(OSError("out of memory"))


def test_memory_is_there() -> None:
    device = torch.device("cpu")
    assert 0 < free_memory(device) <= total_memory(device)
