"""One editing step in one launch: from the predictions of all text branches to x_{t-1}.

Masks, their weighted sum, momentum, classifier-free guidance, posterior mean and residual, as `ledits_min.sega`,
`guidance` and `inversion` define them; `ops.sega_step` calls those or this. Around the network a step is some hundred
tiny operations on maps of 16 to 64 KB, so its cost is launches and waiting, not bytes: this file exists to remove them.

Everything that changes from step to step lies in tables on the device, read at the row that a counter on the device
names. One captured graph therefore serves every step and every schedule of concepts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ledits_min.kernels._launch import check_layout, launch, map_strides, power_of_2

MAX_POSITIONS = 16384  # a map stays in one program's registers: 128 x 128 latents, a picture of 1024 x 1024

# Columns of the tables; a Triton kernel can read a global number only as a constexpr.
LEVELS = tl.constexpr(4)  # sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), sqrt(alpha_bar_prev), sqrt(1 - alpha_bar_prev - sigma_t^2)
GUIDANCE = tl.constexpr(5)  # guidance_scale, momentum_scale, momentum_beta, 1 - momentum_beta, every concept is warm
TERM = tl.constexpr(4)  # d s, threshold, weight, acts
BRANCHES = tl.constexpr(3)  # eps_uncond, the base of the guidance, its text; then one a concept; -1: not evaluated

_INFINITY = tl.constexpr(0x7F800000)  # as the bits of a float32; every NaN without its sign lies above
_OUTSIDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _quantile(magnitude, inside, positions, threshold):  # type: ignore[no-untyped-def]
    """torch.quantile over the positions `inside`, exactly: linear interpolation between ranks k and k + 1.

    magnitude holds non-negative floats as int32 bits, whose order is the floats' order (-0.0 lost its sign, a NaN is
    greatest); positions outside hold a greater value than any. The value of rank k is found by bisection over bits,
    31 rounds of counting at most, and fewer as soon as exactly k + 1 values lie below the middle.
    """
    rank = threshold * (positions - 1).to(tl.float32)  # in float32, as torch computes it
    k = rank.to(tl.int32)
    fraction = rank - k.to(tl.float32)

    greatest = tl.max(tl.where(inside, magnitude, 0), 0)
    low = tl.min(magnitude, 0)
    high = greatest
    while low < high:
        middle = low + (high - low) // 2
        count = tl.sum((magnitude <= middle).to(tl.int32), 0)
        low = tl.where(count > k + 1, low, tl.where(count == k + 1, middle, middle + 1))
        high = tl.where(count > k, middle, high)

    below = tl.max(tl.where(magnitude <= high, magnitude, 0), 0)
    count = tl.sum((magnitude <= below).to(tl.int32), 0)
    above = tl.min(tl.where(magnitude > below, magnitude, _OUTSIDE), 0)
    above = tl.where((fraction > 0.0) & (count == k + 1), above, below)  # a tie: rank k + 1 has the same value

    start = below.to(tl.float32, bitcast=True)
    end = above.to(tl.float32, bitcast=True)
    # torch.lerp keeps the end exact on both sides.
    cut = tl.where(fraction < 0.5, start + fraction * (end - start), end - (end - start) * (1.0 - fraction))
    return tl.where(greatest > _INFINITY, float("nan"), cut)


@triton.jit
def _sega_step(  # type: ignore[no-untyped-def]
    step_ptr,  # int32 (maps,)                 the row to read; each program advances its own
    slots_ptr,  # int32 (T, 3 + K)
    levels_ptr,  # float32 (T, 4)
    guidance_ptr,  # float32 (T, 5)
    terms_ptr,  # float32 (T, K, 4)
    branches_ptr,  # (N, B, C, h, w)           any float dtype, NCHW or channels-last
    residuals_ptr,  # float32 (T, maps, positions)
    x_ptr,  # float32 (maps, positions)        x_t, becomes x_{t-1}
    momentum_ptr,  # float32 (maps, positions) nu, becomes the next step's
    shares_ptr,  # float32 (T, K, maps)        share of the map that the mask kept, 0 where the concept did not act
    counts_ptr,  # int32 (K, maps, positions)  number of steps whose mask kept the position
    concepts,
    channels,
    positions,
    branch_stride,
    sample_stride,
    channel_stride,
    position_stride,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a map: one channel of one sample."""
    this = tl.program_id(0)
    maps = tl.num_programs(0)
    step = tl.load(step_ptr + this)
    lane = tl.arange(0, BLOCK)
    inside = lane < positions
    here = this * positions + lane
    row = step.to(tl.int64)
    slots = slots_ptr + row * (BRANCHES + concepts)
    branch = branches_ptr + (this // channels) * sample_stride + (this % channels) * channel_stride
    branch += lane * position_stride

    # SEGA: what every concept adds, and what the acting ones add.
    raw = tl.zeros([BLOCK], tl.float32)
    acting = tl.zeros([BLOCK], tl.float32)
    uncond_slot = tl.load(slots)
    for i in range(concepts):
        slot = tl.load(slots + BRANCHES + i)
        share = 0.0
        if slot >= 0:
            term = terms_ptr + (row * concepts + i) * TERM
            scale = tl.load(term)
            threshold = tl.load(term + 1)
            weight = tl.load(term + 2)
            acts = tl.load(term + 3)
            eps_uncond = tl.load(branch + uncond_slot * branch_stride, inside, 0.0).to(tl.float32)
            eps_concept = tl.load(branch + slot * branch_stride, inside, 0.0).to(tl.float32)
            psi = scale * (eps_concept - eps_uncond)
            magnitude = tl.where(inside, psi.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _OUTSIDE)
            mask = inside & (tl.abs(psi) >= _quantile(magnitude, inside, positions, threshold))
            kept = mask.to(tl.float32)
            contribution = weight * psi * kept
            raw += contribution
            if acts != 0.0:
                acting += contribution
                share = tl.sum(kept, 0) / positions
                if COUNT:
                    count = counts_ptr + i.to(tl.int64) * maps * positions + here
                    tl.store(count, tl.load(count, inside, 0) + mask.to(tl.int32), inside)
        tl.store(shares_ptr + (row * concepts + i) * maps + this, share)

    # Momentum.
    guidance = guidance_ptr + row * GUIDANCE
    nu = tl.load(momentum_ptr + here, inside, 0.0)
    full = raw + tl.load(guidance + 1) * nu
    tl.store(momentum_ptr + here, tl.load(guidance + 2) * nu + tl.load(guidance + 3) * full, inside)
    gamma = tl.where(tl.load(guidance + 4) != 0.0, full, acting)

    # Guide.
    eps = tl.load(branch + tl.load(slots + 1) * branch_stride, inside, 0.0).to(tl.float32)
    text_slot = tl.load(slots + 2)
    if text_slot >= 0:
        eps_text = tl.load(branch + text_slot * branch_stride, inside, 0.0).to(tl.float32)
        eps = eps + tl.load(guidance) * (eps_text - eps)
    eps = eps + gamma

    # Step: x_{t-1} = mu_t(x_t, eps) + residual.
    level = levels_ptr + row * LEVELS
    x_t = tl.load(x_ptr + here, inside, 0.0)
    pred_x0 = tl.div_rn(x_t - tl.load(level + 1) * eps, tl.load(level))
    mu_t = tl.load(level + 2) * pred_x0 + tl.load(level + 3) * eps
    residual = tl.load(residuals_ptr + row * maps * positions + here, inside, 0.0)
    tl.store(x_ptr + here, mu_t + residual, inside)
    tl.store(step_ptr + this, step + 1)


def num_warps(block: int) -> int:
    """32 positions a thread at most, so that the map and the two sums stay in registers."""
    return max(4, min(16, block // 512))


def sega_step(
    step: Tensor,
    slots: Tensor,
    levels: Tensor,
    guidance: Tensor,
    terms: Tensor,
    branches: Tensor,
    residuals: Tensor,
    x_t: Tensor,
    momentum: Tensor,
    shares: Tensor,
    counts: Tensor | None,
) -> None:
    """Advance x_t, momentum and step in place, and write this step's row of `shares`; add to `counts` where given.

    step int32 (B, C) · slots int32 (T, 3 + K) · levels float32 (T, 4) · guidance float32 (T, 5) · terms float32 (T, K, 4)
    branches (N, B, C, h, w) in any float dtype · residuals float32 (T, B, C, h, w) · x_t, momentum float32 (B, C, h, w)
    shares float32 (T, K, B, C) · counts int32 (K, B, C, h, w). h w is at most MAX_POSITIONS. The columns of the tables
    stand at the top of this file. A branch that no slot of the row names is not read. ValueError for a wrong layout.
    """
    batch, channels, height, width = x_t.shape
    positions, concepts = height * width, terms.shape[1]
    if positions > MAX_POSITIONS:
        raise ValueError(f"a map of {height} x {width} positions does not fit in registers; at most {MAX_POSITIONS}")
    check_layout(
        step=step, slots=slots, levels=levels, guidance=guidance, terms=terms, residuals=residuals, x_t=x_t,
        momentum=momentum, shares=shares, counts=counts,
    )  # fmt: skip
    block = power_of_2(positions, least=128)
    launch(
        _sega_step, (batch * channels,),
        step, slots, levels, guidance, terms, branches, residuals, x_t, momentum, shares,
        step if counts is None else counts,  # any pointer: it is not read without COUNT
        concepts, channels, positions, *map_strides(branches),
        COUNT=counts is not None, BLOCK=block, num_warps=num_warps(block), fuse=False,
    )  # fmt: skip
