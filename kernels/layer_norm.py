"""LayerNorm with the sum in front of it, written once each, in one launch.

In a transformer block every norm stands behind a sum (a layer's output, its bias, the residual), which is needed again
as the next residual. Apart they read or write seven times the size of the tokens; here four: two reads, two writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ledits_min.kernels._launch import cdiv, launch, launch_shape, power_of_2

MAX_WIDTH = 8192  # a row stays in registers; the widest of SDXL is 1280
SHAPE = {"tile": 2048, "warps": 4}  # 16 values a thread, as many rows as they give


@triton.jit(do_not_specialize=["rows", "epsilon", "residual", "add", "keep"])
def _add_layer_norm(  # type: ignore[no-untyped-def]
    x_ptr,  # (rows, width)
    residual_ptr,  # (rows, width)
    add_ptr,  # (width,)
    weight_ptr,  # (width,)
    bias_ptr,  # (width,)
    total_ptr,  # (rows, width)
    out_ptr,  # (rows, width)
    rows,
    width,
    epsilon,
    residual,  # whether there is one,
    add,  # whether there is one,
    keep,  # whether the sum is written
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per few rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, BLOCK)
    real = lane < width
    inside = (row < rows) & real[None, :]
    here = row.to(tl.int64) * width + lane[None, :]

    value = tl.load(x_ptr + here, inside, 0.0).to(tl.float32)
    value += tl.load(add_ptr + lane, real & (add != 0), 0.0).to(tl.float32)[None, :]
    value += tl.load(residual_ptr + here, inside & (residual != 0), 0.0).to(tl.float32)
    # The norm is of what is written: the next residual, rounded.
    total = value.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + here, total, inside & (keep != 0))
    value = total.to(tl.float32)

    mean = tl.sum(value, 1) / width
    off = tl.where(inside, value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(off * off, 1) / width + epsilon)
    weight = tl.load(weight_ptr + lane, real, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + lane, real, 0.0).to(tl.float32)
    normed = off * inverse[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + here, normed.to(out_ptr.dtype.element_ty), inside)


def warps(block: int) -> int:
    """As many as keep 16 values in each thread."""
    return max(SHAPE["warps"], block // 512)


def fits(x: Tensor) -> bool:
    """Whether a row of x (..., C) stays in one program's registers."""
    return 0 < x.shape[-1] <= MAX_WIDTH


def add_layer_norm(
    x: Tensor, norm: nn.LayerNorm, residual: Tensor | None = None, add: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(total, norm(total)) with total = x + add + residual, both in x's dtype.

    x and residual (..., C) in one float dtype; add (C,), the bias that the layer before has left to this sum; `norm`
    has weight and bias of shape (C,). Without residual and add, total is x. ValueError for rows wider than MAX_WIDTH.
    """
    if not fits(x):
        raise ValueError(f"rows of {x.shape[-1]} values do not fit in registers; 1 to {MAX_WIDTH} do")
    x, width = x.contiguous(), x.shape[-1]
    keep = residual is not None or add is not None
    out = torch.empty_like(x)
    total = torch.empty_like(x) if keep else x
    block, rows = power_of_2(width, least=128), x.numel() // width
    shape = launch_shape(f"layer_norm {block}", SHAPE | {"warps": warps(block)}, x.device)
    together = max(1, shape["tile"] // block)
    launch(
        _add_layer_norm, (cdiv(rows, together),),
        x, x if residual is None else residual.contiguous(), x if add is None else add.contiguous(),
        norm.weight, norm.bias, total, out, rows, width, float(norm.eps),
        int(residual is not None), int(add is not None), int(keep),
        ROWS=together, BLOCK=block, num_warps=shape["warps"], fuse=True,
    )  # fmt: skip
    return total, out
