"""value * gelu(gate) of a feed-forward layer's projection in one launch. `ops.geglu` calls torch or this."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ledits_min.kernels._launch import cdiv, launch, launch_shape

# A block of 256 divides every width of Stable Diffusion (1280, 2560, 5120): no lane is idle. 8 values a thread.
SHAPE = {"rows": 4, "block": 256, "warps": 4}


@triton.jit(do_not_specialize=["rows", "biased"])
def _geglu(  # type: ignore[no-untyped-def]
    projected_ptr,  # (rows, 2 * width)   [value, gate]
    bias_ptr,  # (2 * width,)
    out_ptr,  # (rows, width)
    rows,
    width,
    biased,  # whether there is a bias
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile of rows and columns; computed in float32."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    real = lane < width
    inside = (row < rows) & real
    here = projected_ptr + row.to(tl.int64) * (2 * width) + lane
    there = bias_ptr + lane
    known = real & (biased != 0)
    value = tl.load(here, inside, 0.0).to(tl.float32) + tl.load(there, known, 0.0).to(tl.float32)
    gate = tl.load(here + width, inside, 0.0).to(tl.float32) + tl.load(there + width, known, 0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))  # the exact one; 1 / sqrt(2)
    out = out_ptr + row.to(tl.int64) * width + lane
    tl.store(out, (value * gelu).to(out_ptr.dtype.element_ty), inside)


def geglu(projected: Tensor, bias: Tensor | None = None) -> Tensor:
    """[value, gate] = projected + bias: value * gelu(gate).

    projected (..., 2 * width) in any float dtype; bias (2 * width,) or None; returns (..., width) in projected's dtype.
    """
    projected = projected.contiguous()
    width = projected.shape[-1] // 2
    out = torch.empty(*projected.shape[:-1], width, dtype=projected.dtype, device=projected.device)
    rows = out.numel() // width
    shape = launch_shape("geglu", SHAPE, projected.device)
    launch(
        _geglu, (cdiv(rows, shape["rows"]), cdiv(width, shape["block"])),
        projected, projected if bias is None else bias.contiguous(), out, rows, width, int(bias is not None),
        ROWS=shape["rows"], BLOCK=shape["block"], num_warps=shape["warps"], fuse=True,
    )  # fmt: skip
    return out
