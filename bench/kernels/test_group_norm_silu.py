"""kernels/group_norm_silu.py against torch's GroupNorm and SiLU on channels-last maps. Random activations, float16."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.engine import ops

# (B, C, h, w) of Stable Diffusion 1.5 at 512 px; a step with a target and two concepts is a batch of 4.
SHAPES = [
    (4, 320, 64, 64), (4, 640, 64, 64), (4, 960, 64, 64), (16, 320, 64, 64), (16, 960, 64, 64),  # the five largest
    (4, 1920, 32, 32), (4, 1280, 16, 16), (4, 2560, 8, 8), (1, 1280, 8, 8),
    (1, 128, 512, 512), (1, 512, 64, 64),  # the VAE
]  # fmt: skip
# (B, C, h, w) behind a sum, channels of the skip beside it (0: none)
SUMS = [((4, 320, 64, 64), 0), ((4, 320, 64, 64), 320), ((4, 640, 64, 64), 320), ((4, 1280, 16, 16), 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_group_norm_silu(
    gpu: ModuleType, inputs: ModuleType, benchmark: Any,
    shape: tuple[int, int, int, int],
) -> None:  # fmt: skip
    norm = inputs.norm(shape[1], 32, torch.float16, "cuda")
    first = inputs.feature_map(shape, torch.float16, "cuda")
    moved = 2 * first.nbytes
    maps = [first, *(torch.randn_like(first) for _ in range(gpu.buffers(moved) - 1))]
    # No published Triton norm takes channels-last maps in groups of 10 or 30 channels; one takes NCHW, so it gets that.
    peers = {}
    if importlib.util.find_spec("liger_kernel"):
        published = importlib.import_module("liger_kernel.transformers.group_norm").LigerGroupNorm
        layer = published(shape[1], 32, eps=norm.eps).to("cuda", torch.float16)
        planes = [x.contiguous() for x in maps]
        peers["Liger, NCHW"] = [lambda x=x: F.silu(layer(x)) for x in planes]
    arguments = [(x, norm) for x in maps]
    gpu.report_function(benchmark, ops.group_norm_silu, arguments, moved, tolerance=2e-3, peers=peers)


@pytest.mark.parametrize(("shape", "skip"), SUMS, ids=lambda value: str(value).replace(" ", ""))
def test_add_group_norm_silu(
    gpu: ModuleType, inputs: ModuleType, benchmark: Any, shape: tuple[int, int, int, int], skip: int
) -> None:
    from ledits_min.kernels.group_norm_silu import add_group_norm_silu

    norm = inputs.norm(shape[1] + skip, 32, torch.float16, "cuda")
    pixels = shape[0] * shape[2] * shape[3]
    moved = 2 * pixels * (4 * shape[1] + 2 * skip)
    widths = [shape[1], shape[1], skip] if skip else [shape[1], shape[1]]

    def maps() -> tuple[Tensor, ...]:
        sizes = [(shape[0], width, *shape[2:]) for width in widths]
        return tuple(inputs.feature_map(size, torch.float16, "cuda", seed=i) for i, size in enumerate(sizes))

    bias = torch.randn(shape[1], device="cuda", dtype=torch.float16)

    def plain(x: Tensor, residual: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x + bias[:, None, None] + residual
        return total, F.silu(norm(total if skipped is None else torch.cat([total, skipped], 1)))

    def fused(x: Tensor, residual: Tensor, skipped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_group_norm_silu(x, norm, residual, bias, skip=skipped)

    arguments = [maps() for _ in range(gpu.buffers(moved))]
    gpu.report_pair(benchmark, plain, fused, arguments, moved, tolerance=2e-3)
