"""kernels/group_norm_silu.py against torch's GroupNorm and SiLU on channels-last maps. Random activations, float16."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from ledits_min import ops

# (B, C, h, w) of Stable Diffusion 1.5 at 512 px; a step with a target and two concepts is a batch of 4.
SHAPES = [
    (4, 320, 64, 64), (4, 640, 64, 64), (4, 960, 64, 64), (16, 320, 64, 64), (16, 960, 64, 64),  # the five largest
    (4, 640, 32, 32), (4, 1920, 32, 32), (4, 1280, 16, 16), (4, 2560, 16, 16), (4, 1280, 8, 8), (4, 2560, 8, 8),
    (1, 320, 64, 64), (1, 1280, 8, 8),
    (1, 128, 512, 512), (1, 512, 64, 64),  # the VAE
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_group_norm_silu(
    gpu: ModuleType, inputs: ModuleType, benchmark: Any,
    shape: tuple[int, int, int, int],
) -> None:  # fmt: skip
    norm = inputs.norm(shape[1], 32, torch.float16, "cuda")
    first = inputs.feature_map(shape, torch.float16, "cuda")
    moved = 2 * first.nbytes
    maps = [first, *(torch.randn_like(first) for _ in range(gpu.buffers(moved) - 1))]
    # No published Triton GroupNorm takes channels-last maps with groups of 10 or 30 channels: torch is the peer.
    gpu.report_function(benchmark, ops.group_norm_silu, [(x, norm) for x in maps], moved, tolerance=2e-3)
