"""kernels/geglu.py against torch. Random projections, float16."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.engine import ops

# (B, tokens, 2 * width) of Stable Diffusion 1.5 at 512 px; a step with a target and two concepts is a batch of 4.
SHAPES = [(4, 4096, 2560), (4, 1024, 5120), (4, 256, 10240), (4, 64, 10240), (1, 4096, 2560)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_geglu(gpu: ModuleType, benchmark: Any, shape: tuple[int, int, int]) -> None:
    first = torch.randn(shape, device="cuda", dtype=torch.float16)
    moved = first.nbytes * 3 // 2
    arguments = [(torch.randn_like(first),) for _ in range(gpu.buffers(moved))]
    gpu.report_function(benchmark, ops.geglu, arguments, moved, tolerance=2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_geglu_with_its_bias(gpu: ModuleType, benchmark: Any, shape: tuple[int, int, int]) -> None:
    from ledits_min.kernels.geglu import geglu

    bias = torch.randn(shape[-1], device="cuda", dtype=torch.float16)
    moved = 3 * shape[0] * shape[1] * shape[2]

    def plain(projected: Tensor) -> tuple[Tensor]:
        value, gate = (projected + bias).chunk(2, -1)
        return (value * F.gelu(gate),)

    def fused(projected: Tensor) -> tuple[Tensor]:
        return (geglu(projected, bias),)

    arguments = [(torch.randn(shape, device="cuda", dtype=torch.float16),) for _ in range(gpu.buffers(moved))]
    gpu.report_pair(benchmark, plain, fused, arguments, moved, tolerance=2e-3)
