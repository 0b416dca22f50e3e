"""The inversion outside the network: all noisy copies of a picture in one launch, a batch of residuals in another.

Both as `ledits_min.inversion` defines them; `ops` calls those or these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ledits_min.kernels._launch import cdiv, launch, launch_shape, map_strides, walkable

# sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), sqrt(alpha_bar_prev), sqrt(1 - alpha_bar_prev - sigma_t^2)
LEVELS = tl.constexpr(4)
SHAPE = {"block": 512, "warps": 4}  # 4 positions a thread, 16 bytes: these kernels only move bytes


@triton.jit(do_not_specialize=["steps"])
def _trajectory(  # type: ignore[no-untyped-def]
    levels_ptr,  # float32 (T, 4)
    x_0_ptr,  # float32 (size,)
    noise_ptr,  # float32 (T, size)
    out_ptr,  # float32 (T + 1, size)
    size,
    steps,
    BLOCK: tl.constexpr,
):
    """One program per step and block of positions; behind the last step lies x_0 itself."""
    step = tl.program_id(1)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < size
    here = step.to(tl.int64) * size + lane
    x = tl.load(x_0_ptr + lane, inside, 0.0)
    if step < steps:
        level = levels_ptr + step * LEVELS
        x = tl.load(level) * x + tl.load(level + 1) * tl.load(noise_ptr + here, inside, 0.0)
    tl.store(out_ptr + here, x, inside)


def trajectory(levels: Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
    """x_t of every step and x_0 behind them, float32: levels (T, 4), x_0 (B, C, h, w), noise (T, B, C, h, w)."""
    levels, x_0, noise = levels.contiguous(), x_0.contiguous(), noise.contiguous()
    steps, size = len(noise), x_0.numel()
    out = torch.empty(steps + 1, *x_0.shape, dtype=x_0.dtype, device=x_0.device)
    shape = launch_shape("trajectory", SHAPE, x_0.device)
    launch(
        _trajectory, (cdiv(size, shape["block"]), steps + 1),
        levels, x_0, noise, out, size, steps,
        BLOCK=shape["block"], num_warps=shape["warps"], fuse=False,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["scale", "guided", "samples", "channels", "branch_stride", "step_stride"])
def _residuals(  # type: ignore[no-untyped-def]
    levels_ptr,  # float32 (S, 4)
    x_ptr,  # float32 (S + 1, B, C, h, w)
    branches_ptr,  # (N, S, B, C, h, w)   any float dtype, NCHW or channels-last
    out_ptr,  # float32 (S, B, C, h, w)
    scale,
    guided,  # whether there is a second branch, the text's
    samples,
    channels,
    positions,
    branch_stride,
    step_stride,
    sample_stride,
    channel_stride,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per map and block of its positions."""
    this = tl.program_id(1)
    step = this // (samples * channels)
    sample = this // channels % samples
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < positions
    branch = branches_ptr + step.to(tl.int64) * step_stride + sample * sample_stride + this % channels * channel_stride
    eps = tl.load(branch + lane * STRIDE, inside, 0.0).to(tl.float32)
    eps_text = tl.load(branch + branch_stride + lane * STRIDE, inside & (guided != 0), 0.0).to(tl.float32)
    eps = tl.where(guided != 0, eps + scale * (eps_text - eps), eps)

    here = this.to(tl.int64) * positions + lane
    level = levels_ptr + step * LEVELS
    x_t = tl.load(x_ptr + here, inside, 0.0)
    x_prev = tl.load(x_ptr + here + samples * channels * positions, inside, 0.0)
    pred_x0 = tl.div_rn(x_t - tl.load(level + 1) * eps, tl.load(level))
    mu_t = tl.load(level + 2) * pred_x0 + tl.load(level + 3) * eps
    tl.store(out_ptr + here, x_prev - mu_t, inside)


def residuals(levels: Tensor, x: Tensor, branches: Tensor, scale: float) -> Tensor:
    """x_{t-1} - mu_t(x_t, eps) of S consecutive steps, float32 (S, B, C, h, w).

    levels float32 (S, 4), x float32 (S + 1, B, C, h, w); branches (N, S, B, C, h, w) in any float dtype and memory
    layout holds eps itself (N = 1), or eps_uncond and eps_text, to be guided with `scale` (N = 2).
    """
    levels, x, branches = levels.contiguous(), x.contiguous(), walkable(branches)
    count, steps, samples, channels, height, width = branches.shape
    positions = height * width
    out = torch.empty_like(x[1:])
    shape = launch_shape("residuals", SHAPE, x.device)
    step_stride, sample_stride, channel_stride, stride = map_strides(branches)
    launch(
        _residuals, (cdiv(positions, shape["block"]), steps * samples * channels),
        levels, x, branches, out, float(scale), int(count == 2), samples, channels, positions,
        branches.stride(0), step_stride, sample_stride, channel_stride,
        STRIDE=stride, BLOCK=shape["block"], num_warps=shape["warps"], fuse=False,
    )  # fmt: skip
    return out
