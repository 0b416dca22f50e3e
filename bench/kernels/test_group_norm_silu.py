"""kernels/group_norm_silu.py against torch's GroupNorm and SiLU on channels-last maps. Random activations, float16."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ledits_min.engine import ops

# (B, C, h, w) of Stable Diffusion 1.5 at 512 px; a step with a target and two concepts is a batch of 4.
SHAPES = [
    (4, 320, 64, 64), (4, 640, 64, 64), (4, 960, 64, 64), (16, 320, 64, 64), (16, 960, 64, 64),  # the five largest
    (4, 1920, 32, 32), (4, 1280, 16, 16), (4, 2560, 8, 8), (1, 1280, 8, 8),
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
    # No published Triton norm takes channels-last maps in groups of 10 or 30 channels; one takes NCHW, so it gets that.
    peers = {}
    if importlib.util.find_spec("liger_kernel"):
        published = importlib.import_module("liger_kernel.transformers.group_norm").LigerGroupNorm
        layer = published(shape[1], 32, eps=norm.eps).to("cuda", torch.float16)
        planes = [x.contiguous() for x in maps]
        peers["Liger, NCHW"] = [lambda x=x: F.silu(layer(x)) for x in planes]
    arguments = [(x, norm) for x in maps]
    gpu.report_function(benchmark, ops.group_norm_silu, arguments, moved, tolerance=2e-3, peers=peers)
