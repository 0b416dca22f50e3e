"""value * gelu(gate) of a feed-forward layer's projection in one launch. `ops.geglu` calls torch or this."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ledits_min.kernels._launch import check_layout, launch

BLOCK = 1024
WARPS = 4


@triton.jit
def _geglu(  # type: ignore[no-untyped-def]
    projected_ptr,  # (rows, 2 * width)   [value, gate]
    out_ptr,  # (rows, width)
    width,
    BLOCK: tl.constexpr,
):
    """One program a row and a block of its width; computed in float32."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    value = tl.load(projected_ptr + row * 2 * width + lane, inside, 0.0).to(tl.float32)
    gate = tl.load(projected_ptr + (row * 2 + 1) * width + lane, inside, 0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))  # the exact one; 1 / sqrt(2)
    tl.store(out_ptr + row * width + lane, (value * gelu).to(out_ptr.dtype.element_ty), inside)


def geglu(projected: Tensor) -> Tensor:
    """projected (..., 2 * width), contiguous, any float dtype -> (..., width) in the same dtype."""
    check_layout(projected=projected)
    width = projected.shape[-1] // 2
    out = torch.empty(*projected.shape[:-1], width, dtype=projected.dtype, device=projected.device)
    grid = (out.numel() // width, triton.cdiv(width, BLOCK))
    launch(_geglu, grid, projected, out, width, BLOCK=BLOCK, num_warps=WARPS, fuse=True)
    return out
