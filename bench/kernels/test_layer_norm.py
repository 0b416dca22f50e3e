"""kernels/layer_norm.py against the bias, the sum and the norm in torch. Random activations, float16."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# (tokens of all rows, width) of Stable Diffusion 1.5 at 512 px; a step with a target and two concepts has 4 rows.
SHAPES = [(4 * 4096, 320), (4 * 1024, 640), (4 * 256, 1280), (4096, 320), (32 * 4096, 320)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_add_layer_norm(gpu: ModuleType, benchmark: Any, shape: tuple[int, int]) -> None:
    from ledits_min.kernels.layer_norm import add_layer_norm

    norm = nn.LayerNorm(shape[1], device="cuda", dtype=torch.float16).requires_grad_(False)
    moved = 4 * 2 * shape[0] * shape[1]
    arguments = [
        tuple(torch.randn(*size, device="cuda", dtype=torch.float16) for size in (shape, shape, shape[1:]))
        for _ in range(gpu.buffers(moved))
    ]

    def plain(x: Tensor, residual: Tensor, add: Tensor) -> tuple[Tensor, Tensor]:
        total = x + add + residual
        return total, norm(total)

    def fused(x: Tensor, residual: Tensor, add: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, norm, residual, add)

    gpu.report_pair(benchmark, plain, fused, arguments, moved, tolerance=2e-3)
