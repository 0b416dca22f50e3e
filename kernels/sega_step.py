"""One editing step in two launches: from the predictions of all text branches to x_{t-1}.

Masks, their weighted sum, momentum, classifier-free guidance, posterior mean and residual, as `ledits_min.sega`,
`guidance` and `inversion` define them; `ops.sega_step` calls those or this. Around the network a step is some hundred
tiny operations on maps of 16 to 64 KB, so its cost is launches and waiting, not bytes: this file exists to remove them.
Where a concept acts needs a whole map at once; the first launch finds all cuts side by side, the second does the rest
position by position.

Everything that changes from step to step lies in tables on the device, read at the row that a counter on the device
names. One captured graph therefore serves every step and every schedule of concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ledits_min.kernels._launch import cdiv, check_state, launch, launch_shape, map_strides, power_of_2, walkable

MAX_POSITIONS = 16384  # a map stays in one program's registers: 128 x 128 latents, a picture of 1024 x 1024

# Columns of the tables; a Triton kernel reads a global number only as a constexpr.
SLOTS = tl.constexpr(3)  # branch of eps_uncond, of the guidance's base, of its text; then one per concept; -1: none
# sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), sqrt(alpha_bar_prev), sqrt(1 - alpha_bar_prev - sigma_t^2)
LEVELS = tl.constexpr(4)
GUIDANCE = tl.constexpr(5)  # guidance_scale, momentum_scale, momentum_beta, 1 - momentum_beta, every concept is warm
TERMS = tl.constexpr(4)  # direction times scale, threshold, weight, acts

_INFINITY = tl.constexpr(0x7F800000)  # its float32 bits; every NaN, its sign taken off, lies above
_BINADE = tl.constexpr(0x800000)  # float32 bits between x and 2 x

# Concepts of a step are rounded up to a power of two and to this, so that 1 to 4 share a compiled kernel.
CONCEPTS = 4
# probes: how many values a round of the search tries at once
CUT = {"warps": 8, "probes": 4}
COMBINE = {"tile": 512, "warps": 4}
REGISTERS = 128  # a thread's: so that an assembler, which saves them for programs that are not there, spills none


@triton.jit
def _quantile(magnitude, positions, threshold, BLOCK: tl.constexpr, PROBES: tl.constexpr):  # type: ignore[no-untyped-def]
    """torch.quantile of a map, exactly: linear interpolation between the values of rank k and k + 1.

    magnitude holds |psi| as int32 bits, whose order is the floats' order (-0.0 has lost its sign, NaN is greatest),
    and -1 in the BLOCK - positions places behind the map. Every round counts, for PROBES bit patterns at once, how many
    values are at most that; the value of rank k stays between `low` and `high`. The first round looks 1, 2, 4, ..
    binades below the greatest value, where a high percentile mostly lies; the others divide what is left evenly. It
    ends as soon as a probe hits the gap above rank k: 5 rounds on average for 4096 normal values, 4 probes and
    threshold 0.95; 14 is the worst seen.
    """
    rank = threshold * (positions - 1)  # in float32, as torch computes it
    k = rank.to(tl.int32)
    fraction = rank - k.to(tl.float32)
    wanted = BLOCK - positions + k + 1  # that many values, the -1 included, are at most the value of rank k

    greatest = tl.max(magnitude, 0)
    which = tl.arange(0, PROBES)
    low = greatest * 0
    high = greatest
    probes = tl.maximum(greatest - (_BINADE << which), 0)
    while low < high:
        counts = tl.sum((magnitude[None, :] <= probes[:, None]).to(tl.int32), 1)
        hit = tl.max(tl.where(counts == wanted, probes, -1), 0)
        low = tl.maximum(low, tl.max(tl.where(counts < wanted, probes + 1, 0), 0))
        high = tl.minimum(high, tl.min(tl.where(counts < wanted, high, probes), 0))
        low = tl.where(hit >= 0, hit, low)
        high = tl.where(hit >= 0, hit, high)
        probes = low + tl.maximum((high - low) // (PROBES + 1), 1) * (which + 1) - 1

    # Nothing lies between the value of rank k and `high`.
    below = tl.max(tl.where(magnitude <= high, magnitude, 0), 0)
    above = tl.min(tl.where(magnitude > high, magnitude, greatest), 0)
    count = tl.sum((magnitude <= high).to(tl.int32), 0)
    above = tl.where((fraction > 0.0) & (count == wanted), above, below)  # a tie: rank k + 1 has the same value

    start = below.to(tl.float32, bitcast=True)
    end = above.to(tl.float32, bitcast=True)
    # As torch.lerp: from the nearer end, rounded once. float64 stands for the fused multiply-add, which not every
    # interpreter has.
    near = tl.where(fraction < 0.5, start, end).to(tl.float64)
    weight = tl.where(fraction < 0.5, fraction, fraction - 1.0).to(tl.float64)
    cut = (near + weight * (end - start).to(tl.float64)).to(tl.float32)
    return tl.where(greatest > _INFINITY, float("nan"), cut)


@triton.jit(do_not_specialize=["concepts", "channels"])
def _cut(  # type: ignore[no-untyped-def]
    step_ptr,  # int32 (maps,)                 the row to read
    slots_ptr,  # int32 (T, 3 + K)
    terms_ptr,  # float32 (T, K, 4)
    branches_ptr,  # (N, B, C, h, w)           any float dtype, NCHW or channels-last
    shares_ptr,  # float32 (T, K, maps)        share of the map that the mask kept, 0 where the concept did not act
    rows_ptr,  # int32 (maps,)                 what step was
    cuts_ptr,  # float32 (maps, K)
    concepts,
    channels,
    positions,
    branch_stride,
    sample_stride,
    channel_stride,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PROBES: tl.constexpr,
):
    """One program per map (one channel of one sample) and concept."""
    this = tl.program_id(0)
    i = tl.program_id(1)
    step = tl.load(step_ptr + this)
    if i == 0:
        tl.store(rows_ptr + this, step)
    if i < concepts:
        row = step.to(tl.int64)
        slots = slots_ptr + row * (SLOTS + concepts)
        term = terms_ptr + (row * concepts + i) * TERMS
        slot = tl.load(slots + SLOTS + i)
        cut = 0.0
        share = 0.0
        if slot >= 0:
            branch = branches_ptr + (this // channels) * sample_stride + (this % channels) * channel_stride
            uncond = branch + tl.load(slots) * branch_stride
            at = tl.arange(0, BLOCK)
            inside = at < positions
            psi = _direction(branch + slot * branch_stride, uncond, tl.load(term), at * STRIDE, inside)
            magnitude = tl.where(inside, psi.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
            cut = _quantile(magnitude, positions, tl.load(term + 1), BLOCK, PROBES)
            kept = magnitude.to(tl.float32, bitcast=True) >= cut  # -1 is a NaN: not kept
            share = tl.load(term + 3) * (tl.sum(kept.to(tl.float32), 0) / positions)
        tl.store(cuts_ptr + this * concepts + i, cut)
        tl.store(shares_ptr + (row * concepts + i) * tl.num_programs(0) + this, share)


@triton.jit(do_not_specialize=["concepts", "channels"])
def _combine(  # type: ignore[no-untyped-def]
    rows_ptr,  # int32 (maps,)
    cuts_ptr,  # float32 (maps, K)
    slots_ptr,  # int32 (T, 3 + K)
    levels_ptr,  # float32 (T, 4)
    guidance_ptr,  # float32 (T, 5)
    terms_ptr,  # float32 (T, K, 4)
    branches_ptr,  # (N, B, C, h, w)           any float dtype, NCHW or channels-last
    residuals_ptr,  # (T, B, C, h, w)          likewise
    step_ptr,  # int32 (maps,)                 moves on by one
    x_ptr,  # float32 (maps, positions)        x_t, becomes x_{t-1}
    momentum_ptr,  # float32 (maps, positions) nu, becomes the next step's
    counts_ptr,  # int32 (K, maps, positions)  number of steps whose mask kept the position
    weights_ptr,  # float32 (T,)               of the solver's second-order term
    pred_x0_ptr,  # float32 (maps, positions)  of the step before, becomes this one's
    concepts,
    channels,
    positions,
    branch_stride,
    sample_stride,
    channel_stride,
    residual_step_stride,
    residual_sample_stride,
    residual_channel_stride,
    residual_stride,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    SECOND: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per map and tile of its positions. K is a power of two, at least the number of concepts.

    Nothing waits for anything but the row: what a branch, a concept, or a text slot is missing, is masked, not skipped,
    so that all loads are on their way together.
    """
    this = tl.program_id(0)
    maps = tl.num_programs(0)
    step = tl.load(rows_ptr + this)
    row = step.to(tl.int64)
    slots = slots_ptr + row * (SLOTS + concepts)
    terms = terms_ptr + row * concepts * TERMS
    lane = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = lane < positions
    at = lane * STRIDE
    here = this * positions + lane
    branch = branches_ptr + (this // channels) * sample_stride + (this % channels) * channel_stride
    if tl.program_id(1) == 0:
        tl.store(step_ptr + this, step + 1)  # nobody in this launch reads it

    # SEGA: what every concept adds, and what the acting ones add.
    uncond = branch + tl.load(slots) * branch_stride
    raw = tl.zeros([TILE], tl.float32)
    acting = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(K):
        given = i < concepts
        slot = tl.load(slots + SLOTS + i, given, -1)
        term = terms + i * TERMS
        live = slot >= 0
        acts = live & (tl.load(term + 3, given, 0.0) != 0.0)
        psi = _direction(branch + slot * branch_stride, uncond, tl.load(term, given, 0.0), at, inside & live)
        mask = inside & (tl.abs(psi) >= tl.load(cuts_ptr + this * concepts + i, given, 0.0))
        contribution = tl.load(term + 2, given, 0.0) * psi * mask.to(tl.float32)
        raw = tl.where(live, raw + contribution, raw)
        acting = tl.where(acts, acting + contribution, acting)
        if COUNT:
            count = counts_ptr + i * maps * positions + here
            tl.store(count, tl.load(count, inside & acts, 0) + mask.to(tl.int32), inside & acts)

    # Momentum.
    guidance = guidance_ptr + row * GUIDANCE
    guidance_scale, momentum_scale = tl.load(guidance), tl.load(guidance + 1)
    momentum_keep, momentum_take = tl.load(guidance + 2), tl.load(guidance + 3)
    all_warm = tl.load(guidance + 4) != 0.0
    nu = tl.load(momentum_ptr + here, inside, 0.0)
    full = raw + momentum_scale * nu
    tl.store(momentum_ptr + here, momentum_keep * nu + momentum_take * full, inside)
    gamma = tl.where(all_warm, full, acting)

    # Guide.
    text_slot = tl.load(slots + 2)
    eps = tl.load(branch + tl.load(slots + 1) * branch_stride + at, inside, 0.0).to(tl.float32)
    eps_text = tl.load(branch + text_slot * branch_stride + at, inside & (text_slot >= 0), 0.0).to(tl.float32)
    eps = tl.where(text_slot >= 0, eps + guidance_scale * (eps_text - eps), eps)
    eps = eps + gamma

    # Step: x_{t-1} = mu_t(x_t, eps) + residual.
    level = levels_ptr + row * LEVELS
    signal_t, noise_t = tl.load(level), tl.load(level + 1)
    signal_prev, direction_prev = tl.load(level + 2), tl.load(level + 3)
    x_t = tl.load(x_ptr + here, inside, 0.0)
    pred_x0 = tl.div_rn(x_t - noise_t * eps, signal_t)
    if SECOND:
        change = pred_x0 - tl.load(pred_x0_ptr + here, inside, 0.0)
        tl.store(pred_x0_ptr + here, pred_x0, inside)
        eps = eps - tl.load(weights_ptr + row) * change
        pred_x0 = tl.div_rn(x_t - noise_t * eps, signal_t)
    mu_t = signal_prev * pred_x0 + direction_prev * eps
    residual = residuals_ptr + row * residual_step_stride
    residual += (this // channels) * residual_sample_stride + (this % channels) * residual_channel_stride
    tl.store(x_ptr + here, mu_t + tl.load(residual + lane * residual_stride, inside, 0.0).to(tl.float32), inside)


@triton.jit
def _direction(concept, uncond, scale, at, inside):  # type: ignore[no-untyped-def]
    """psi = d s (eps_concept - eps_uncond)"""
    eps_concept = tl.load(concept + at, inside, 0.0).to(tl.float32)
    eps_uncond = tl.load(uncond + at, inside, 0.0).to(tl.float32)
    return scale * (eps_concept - eps_uncond)


def cut_shape(positions: int, device: torch.device) -> tuple[int, int, int, int | None]:
    """(BLOCK, warps, PROBES, registers) of `_cut` for maps of that many positions.

    At most 16 positions a thread: with 32, some layouts spilled. The assembler saves registers for other programs to
    run beside this one, and there are none: up to 8 warps it is told not to. With more it has no choice.
    """
    block = power_of_2(positions, least=128)
    default = CUT | {"warps": max(4, min(32, block // 512))}
    shape = launch_shape(f"sega_cut {block}", default, device)
    return block, shape["warps"], shape["probes"], REGISTERS if shape["warps"] <= 8 else None


def fits(x_t: Tensor) -> bool:
    """Whether a map of x_t (B, C, h, w) stays in one program's registers."""
    return x_t.shape[-2] * x_t.shape[-1] <= MAX_POSITIONS


def sega_step(
    step: Tensor,
    tables: Mapping[str, Tensor],
    branches: Tensor,
    residuals: Tensor,
    x_t: Tensor,
    carried: Sequence[Tensor],
    shares: Tensor,
    counts: Tensor | None,
) -> None:
    """Advance x_t, `carried` and step in place, and write this step's row of `shares`; add to `counts` where given.

    tables     slots int32 (T, 3 + K), levels float32 (T, 4), guidance float32 (T, 5), terms float32 (T, K, 4);
               second_order float32 (T,) for steps of second order
    branches   (N, B, C, h, w) in any float dtype and memory layout; NCHW and channels-last are not copied
    residuals  (T, B, C, h, w) in any float dtype and memory layout
    state      step int32 (B, C); x_t float32 (B, C, h, w); shares float32 (T, K, B, C); counts int32 (K, B, C, h, w)
    carried    momentum float32 (B, C, h, w), and pred_x0 of the step before where the step is of second order

    The columns of the tables stand at the top of this file. A branch that no slot of the row names is not read.
    ValueError for more than MAX_POSITIONS positions and for state that is not contiguous.
    """
    batch, channels, height, width = x_t.shape
    slots, levels, guidance, terms = (tables[name].contiguous() for name in ("slots", "levels", "guidance", "terms"))
    maps, positions, concepts = batch * channels, height * width, terms.shape[1]
    if not fits(x_t):
        raise ValueError(f"a map of {height} x {width} positions does not fit in registers; at most {MAX_POSITIONS} do")
    momentum, *second = carried
    pred_x0 = second[0] if second else None
    check_state(step=step, x_t=x_t, momentum=momentum, shares=shares, counts=counts, pred_x0=pred_x0)
    branches, residuals = walkable(branches), walkable(residuals)
    *strides, stride = map_strides(branches)
    rows = torch.empty(maps, dtype=torch.int32, device=x_t.device)
    cuts = torch.empty(maps, concepts, dtype=torch.float32, device=x_t.device)
    block, warps, probes, limit = cut_shape(positions, x_t.device)
    launch(
        _cut, (maps, max(1, concepts)),
        step, slots, terms, branches, shares, rows, cuts, concepts, channels, positions, *strides,
        STRIDE=stride, BLOCK=block, PROBES=probes, num_warps=warps, fuse=False, registers=limit,
    )  # fmt: skip
    shape = launch_shape("sega_combine", COMBINE, x_t.device)
    launch(
        _combine, (maps, cdiv(positions, shape["tile"])),
        rows, cuts, slots, levels, guidance, terms, branches, residuals, step, x_t, momentum,
        step if counts is None else counts,  # any pointer: without COUNT or SECOND it is not read
        *((levels, levels) if pred_x0 is None else (tables["second_order"], pred_x0)),
        concepts, channels, positions, *strides, *map_strides(residuals),
        STRIDE=stride, K=power_of_2(concepts, least=CONCEPTS), COUNT=counts is not None, SECOND=pred_x0 is not None,
        TILE=shape["tile"], num_warps=shape["warps"], fuse=False, registers=REGISTERS,
    )  # fmt: skip
