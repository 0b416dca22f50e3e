"""One editing step in one launch: from the predictions of all text branches to x_{t-1}.

Masks, their weighted sum, momentum, classifier-free guidance, posterior mean and residual, as `ledits_min.sega`,
`guidance` and `inversion` define them; `ops.sega_step` calls those or this. Around the network a step is some hundred
tiny operations on maps of 16 to 64 KB, so its cost is launches and waiting, not bytes: this file exists to remove them.

Everything that changes from step to step lies in tables on the device, read at the row that a counter on the device
names. One captured graph therefore serves every step and every schedule of concepts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ledits_min.kernels._launch import check_layout, launch, map_strides, power_of_2

MAX_POSITIONS = 16384  # a map stays in one program's registers: 128 x 128 latents, a picture of 1024 x 1024

# Columns of the tables; a Triton kernel reads a global number only as a constexpr.
SLOTS = tl.constexpr(3)  # branch of eps_uncond, of the guidance's base, of its text; then one a concept; -1: none
# sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), sqrt(alpha_bar_prev), sqrt(1 - alpha_bar_prev - sigma_t^2)
LEVELS = tl.constexpr(4)
GUIDANCE = tl.constexpr(5)  # guidance_scale, momentum_scale, momentum_beta, 1 - momentum_beta, every concept is warm
TERMS = tl.constexpr(4)  # direction times scale, threshold, weight, acts

_INFINITY = tl.constexpr(0x7F800000)  # its float32 bits; every NaN, its sign taken off, lies above


@triton.jit
def _quantile(magnitude, positions, threshold, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """torch.quantile of a map, exactly: linear interpolation between the values of rank k and k + 1.

    magnitude holds |psi| as int32 bits, whose order is the floats' order (-0.0 has lost its sign, NaN is greatest),
    and -1 in the BLOCK - positions places behind the map. The value of rank k is found by bisection over the bits: 31
    rounds of counting at most, and fewer as soon as no value lies between the middle and rank k.
    """
    rank = threshold * (positions - 1)  # in float32, as torch computes it
    k = rank.to(tl.int32)
    fraction = rank - k.to(tl.float32)
    wanted = BLOCK - positions + k + 1  # that many values, the -1 included, are at most the value of rank k

    greatest = tl.max(magnitude, 0)
    low = greatest * 0
    high = greatest
    while low < high:
        middle = low + (high - low) // 2
        count = tl.sum((magnitude <= middle).to(tl.int32), 0)
        low = tl.where(count > wanted, low, tl.where(count == wanted, middle, middle + 1))
        high = tl.where(count >= wanted, middle, high)

    below = tl.max(tl.where(magnitude <= high, magnitude, 0), 0)
    count = tl.sum((magnitude <= below).to(tl.int32), 0)
    above = tl.min(tl.where(magnitude > below, magnitude, greatest), 0)
    above = tl.where((fraction > 0.0) & (count == wanted), above, below)  # a tie: rank k + 1 has the same value

    start = below.to(tl.float32, bitcast=True)
    end = above.to(tl.float32, bitcast=True)
    # As torch.lerp: from the nearer end, rounded once. float64 stands for the fused multiply-add, which not every
    # interpreter has.
    near = tl.where(fraction < 0.5, start, end).to(tl.float64)
    weight = tl.where(fraction < 0.5, fraction, fraction - 1.0).to(tl.float64)
    cut = (near + weight * (end - start).to(tl.float64)).to(tl.float32)
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
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a map: one channel of one sample. K is a power of two, at least the number of concepts."""
    this = tl.program_id(0)
    maps = tl.num_programs(0)
    step = tl.load(step_ptr + this)
    row = step.to(tl.int64)
    slots = slots_ptr + row * (SLOTS + concepts)
    terms = terms_ptr + row * concepts * TERMS
    branch = branches_ptr + (this // channels) * sample_stride + (this % channels) * channel_stride

    # Where each concept acts needs the whole map at once: one cut a concept.
    whole = tl.arange(0, BLOCK)
    in_map = whole < positions
    concept = tl.arange(0, K)
    cuts = tl.zeros([K], tl.float32)
    for i in range(concepts):
        slot = tl.load(slots + SLOTS + i)
        share = 0.0
        if slot >= 0:
            term = terms + i * TERMS
            uncond = branch + tl.load(slots) * branch_stride
            psi = _direction(branch + slot * branch_stride, uncond, tl.load(term), whole * STRIDE, in_map)
            magnitude = tl.where(in_map, psi.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
            cut = _quantile(magnitude, positions, tl.load(term + 1), BLOCK)
            cuts = tl.where(concept == i, cut, cuts)
            kept = magnitude.to(tl.float32, bitcast=True) >= cut  # -1 is a NaN: not kept
            share = tl.load(term + 3) * (tl.sum(kept.to(tl.float32), 0) / positions)
        tl.store(shares_ptr + (row * concepts + i) * maps + this, share)

    # The rest is position by position.
    guidance = guidance_ptr + row * GUIDANCE
    guidance_scale, momentum_scale = tl.load(guidance), tl.load(guidance + 1)
    momentum_keep, momentum_take = tl.load(guidance + 2), tl.load(guidance + 3)
    all_warm = tl.load(guidance + 4) != 0.0
    level = levels_ptr + row * LEVELS
    signal_t, noise_t = tl.load(level), tl.load(level + 1)
    signal_prev, direction_prev = tl.load(level + 2), tl.load(level + 3)
    base = branch + tl.load(slots + 1) * branch_stride
    text_slot = tl.load(slots + 2)
    for start in range(0, positions, TILE):
        lane = start + tl.arange(0, TILE)
        inside = lane < positions
        at = lane * STRIDE

        # SEGA: what every concept adds, and what the acting ones add.
        raw = tl.zeros([TILE], tl.float32)
        acting = tl.zeros([TILE], tl.float32)
        for i in range(concepts):
            slot = tl.load(slots + SLOTS + i)
            if slot >= 0:
                term = terms + i * TERMS
                uncond = branch + tl.load(slots) * branch_stride
                psi = _direction(branch + slot * branch_stride, uncond, tl.load(term), at, inside)
                cut = tl.sum(tl.where(concept == i, cuts, 0.0), 0)
                mask = inside & (tl.abs(psi) >= cut)
                contribution = tl.load(term + 2) * psi * mask.to(tl.float32)
                raw += contribution
                if tl.load(term + 3) != 0.0:
                    acting += contribution
                    if COUNT:
                        count = counts_ptr + (i * maps + this) * positions + lane
                        tl.store(count, tl.load(count, inside, 0) + mask.to(tl.int32), inside)

        # Momentum.
        nu = tl.load(momentum_ptr + this * positions + lane, inside, 0.0)
        full = raw + momentum_scale * nu
        tl.store(momentum_ptr + this * positions + lane, momentum_keep * nu + momentum_take * full, inside)
        gamma = tl.where(all_warm, full, acting)

        # Guide.
        eps = tl.load(base + at, inside, 0.0).to(tl.float32)
        if text_slot >= 0:
            eps_text = tl.load(branch + text_slot * branch_stride + at, inside, 0.0).to(tl.float32)
            eps = eps + guidance_scale * (eps_text - eps)
        eps = eps + gamma

        # Step: x_{t-1} = mu_t(x_t, eps) + residual.
        x_t = tl.load(x_ptr + this * positions + lane, inside, 0.0)
        pred_x0 = tl.div_rn(x_t - noise_t * eps, signal_t)
        mu_t = signal_prev * pred_x0 + direction_prev * eps
        residual = tl.load(residuals_ptr + (row * maps + this) * positions + lane, inside, 0.0)
        tl.store(x_ptr + this * positions + lane, mu_t + residual, inside)
    tl.debug_barrier()  # no warp may advance the counter before every warp has read it
    tl.store(step_ptr + this, step + 1)


@triton.jit
def _direction(concept, uncond, scale, at, inside):  # type: ignore[no-untyped-def]
    """psi = d s (eps_concept - eps_uncond)"""
    eps_concept = tl.load(concept + at, inside, 0.0).to(tl.float32)
    eps_uncond = tl.load(uncond + at, inside, 0.0).to(tl.float32)
    return scale * (eps_concept - eps_uncond)


def block_shape(positions: int) -> tuple[int, int, int, int | None]:
    """(BLOCK, TILE, warps, registers) for maps of that many positions; other choices spilled registers.

    At most 32 positions a thread, so that the bisection stays in registers; 4 a thread (16 bytes of a float32 map) in
    the rest. The assembler saves registers for other programs to run beside this one, and there are none: up to 8 warps
    it is told not to. With 16 it has no choice.
    """
    block = power_of_2(positions, least=128)
    warps = max(4, min(16, block // 512))
    return block, min(block, 128 * warps), warps, 128 if warps <= 8 else None


def fits(x_t: Tensor) -> bool:
    """Whether a map of x_t (B, C, h, w) stays in one program's registers."""
    return x_t.shape[-2] * x_t.shape[-1] <= MAX_POSITIONS


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

    tables     slots int32 (T, 3 + K), levels float32 (T, 4), guidance float32 (T, 5), terms float32 (T, K, 4)
    branches   (N, B, C, h, w) in any float dtype, NCHW or channels-last
    residuals  float32 (T, B, C, h, w)
    state      step int32 (B, C); x_t, momentum float32 (B, C, h, w); shares float32 (T, K, B, C);
               counts int32 (K, B, C, h, w)

    The columns of the tables stand at the top of this file. A branch that no slot of the row names is not read.
    ValueError for more than MAX_POSITIONS positions and for a layout that is not the one above.
    """
    batch, channels, height, width = x_t.shape
    positions, concepts = height * width, terms.shape[1]
    if not fits(x_t):
        raise ValueError(f"a map of {height} x {width} positions does not fit in registers; at most {MAX_POSITIONS} do")
    check_layout(
        step=step, slots=slots, levels=levels, guidance=guidance, terms=terms, residuals=residuals, x_t=x_t,
        momentum=momentum, shares=shares, counts=counts,
    )  # fmt: skip
    block, tile, warps, registers = block_shape(positions)
    if block == MAX_POSITIONS:
        branches = branches.contiguous()  # 32 strided loads a thread would spill registers; a copy is cheaper
    *strides, stride = map_strides(branches)
    launch(
        _sega_step, (batch * channels,),
        step, slots, levels, guidance, terms, branches, residuals, x_t, momentum, shares,
        step if counts is None else counts,  # any pointer: without COUNT it is not read
        concepts, channels, positions, *strides,
        STRIDE=stride, K=power_of_2(concepts), COUNT=counts is not None, BLOCK=block, TILE=tile,
        num_warps=warps, fuse=False, registers=registers,
    )  # fmt: skip
