"""GroupNorm, and the SiLU behind it, of channels-last feature maps in two launches. `ops` calls torch or this.

In channels-last memory a group is a few channels of every position, so a program takes a block of whole groups and
walks over positions; sums go over positions first, and over the few channels of each group last. Any channel count
works: blocks are padded, not the map. Statistics are float32 and never E[x^2] - E[x]^2: every tile's spread is
measured around its own mean while it lies in registers, and means and spreads are then merged (Chan, Golub, LeVeque
1979):

    mean   = sum n_i mean_i / sum n_i
    spread = sum spread_i + n_i (mean_i - mean)^2
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ledits_min.kernels._launch import check_layout, launch, power_of_2

ROWS = 32  # positions of a tile
CHANNELS = 128  # channels of a block, where a group is not wider
PARTS = 64  # the statistics of a map are collected by at most so many programs a block of channels
WARPS = 4


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    x_ptr,  # (B, positions, channels)
    add_ptr,  # (B, channels)          added to every position before the norm
    parts_ptr,  # float32 (B, parts, groups, 2)   mean and spread
    positions,
    rows,  # positions a part
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels a group
    TOGETHER: tl.constexpr,  # groups a program
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """One program a part of the positions, a block of groups, and a sample."""
    part = tl.program_id(0)
    sample = tl.program_id(2)
    lane = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * TOGETHER * WIDTH + lane
    real = (lane < TOGETHER * WIDTH) & (channel < GROUPS * WIDTH)
    x = x_ptr + sample.to(tl.int64) * positions * (GROUPS * WIDTH) + channel[None, :]

    # Every channel by itself.
    first = part * rows
    last = tl.minimum(first + rows, positions)
    n = 0.0
    mean = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * (GROUPS * WIDTH), inside, 0.0).to(tl.float32)
        count = tl.minimum(last - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(value, 0) / count
        off = tl.where(inside, value - tile_mean[None, :], 0.0)
        off_mean = tile_mean - mean
        share = count / (n + count)
        mean += off_mean * share
        spread += tl.sum(off * off, 0) + off_mean * off_mean * n * share
        n += count
    if ADD:  # moves a channel's mean, and nothing else
        mean += tl.load(add_ptr + sample * (GROUPS * WIDTH) + channel, real, 0.0).to(tl.float32)

    # The channels of a group together.
    member = (lane[None, :] // WIDTH == tl.arange(0, MEMBERS)[:, None]) & real[None, :]
    group_mean = tl.sum(tl.where(member, mean[None, :], 0.0), 1) / WIDTH
    off = tl.where(member, mean[None, :] - group_mean[:, None], 0.0)
    group_spread = tl.sum(tl.where(member, spread[None, :], 0.0) + n * off * off, 1)

    group = tl.program_id(1) * TOGETHER + tl.arange(0, MEMBERS)
    own = (tl.arange(0, MEMBERS) < TOGETHER) & (group < GROUPS)
    out = parts_ptr + ((sample * tl.num_programs(0) + part) * GROUPS + group) * 2
    tl.store(out, group_mean, own)
    tl.store(out + 1, group_spread, own)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    x_ptr,  # (B, positions, channels)
    add_ptr,  # (B, channels)
    parts_ptr,  # float32 (B, parts, groups, 2)
    weight_ptr,  # (channels,)
    bias_ptr,  # (channels,)
    out_ptr,  # (B, positions, channels)
    positions,
    rows,
    parts,
    epsilon,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program a part of the positions, a block of groups, and a sample."""
    sample = tl.program_id(2)
    lane = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * TOGETHER * WIDTH + lane
    real = (lane < TOGETHER * WIDTH) & (channel < GROUPS * WIDTH)

    # Merge the statistics of all parts.
    part = tl.arange(0, PARTS)[:, None]
    group = tl.program_id(1) * TOGETHER + tl.arange(0, MEMBERS)[None, :]
    known = (part < parts) & (group < GROUPS)
    table = parts_ptr + ((sample * parts + part) * GROUPS + group) * 2
    n = tl.maximum(tl.minimum(positions - part * rows, rows), 0).to(tl.float32)
    part_mean = tl.load(table, known, 0.0)
    mean = tl.sum(n * part_mean, 0) / positions
    off = tl.where(known, part_mean - mean[None, :], 0.0)
    spread = tl.sum(tl.load(table + 1, known, 0.0) + n * WIDTH * off * off, 0)
    inverse = tl.rsqrt(spread / (positions * WIDTH) + epsilon)

    # From groups to their channels.
    member = lane[:, None] // WIDTH == tl.arange(0, MEMBERS)[None, :]
    centre = tl.sum(tl.where(member, mean[None, :], 0.0), 1)
    scale = tl.sum(tl.where(member, inverse[None, :], 0.0), 1)
    scale *= tl.load(weight_ptr + channel, real, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, real, 0.0).to(tl.float32)
    if ADD:
        centre -= tl.load(add_ptr + sample * (GROUPS * WIDTH) + channel, real, 0.0).to(tl.float32)

    offset = sample.to(tl.int64) * positions * (GROUPS * WIDTH) + channel[None, :]
    first = tl.program_id(0) * rows
    last = tl.minimum(first + rows, positions)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        here = offset + row[:, None].to(tl.int64) * (GROUPS * WIDTH)
        value = tl.load(x_ptr + here, inside, 0.0).to(tl.float32)
        value = (value - centre[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out_ptr + here, value.to(out_ptr.dtype.element_ty), inside)


def block_of_groups(groups: int, width: int) -> tuple[int, int]:
    """(groups a program, its block of channels): whole groups, in a block of CHANNELS where they fit it.

    As many groups as fit, in multiples that keep every block 16-byte aligned in half precision where there are enough.
    """
    block = power_of_2(width, least=CHANNELS)
    together = min(groups, block // width)
    aligned = next(m for m in (1, 2, 4, 8) if m * width % 8 == 0)
    return (together - together % aligned or together), block


def fits(x: Tensor) -> bool:
    """Whether x (B, C, h, w) lies channels-last in memory. NCHW is torch's: its own kernel is made for it."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, add: Tensor | None, silu: bool
) -> Tensor:
    """silu(group_norm(x + add)), channels-last, in x's dtype.

    x (B, C, h, w) in any float dtype, channels-last; weight, bias (C,); add (B, C) or None, added at every position;
    without `silu` the norm alone. ValueError for another memory layout.
    """
    if not fits(x):
        raise ValueError(f"a map of shape {tuple(x.shape)} and strides {x.stride()} is not channels-last")
    add = None if add is None else add.contiguous()
    check_layout(weight=weight, bias=bias)
    batch, channels, height, width = x.shape
    positions = height * width
    together, block = block_of_groups(groups, channels // groups)
    rows = ROWS * triton.cdiv(positions, ROWS * PARTS)  # positions a program
    parts = triton.cdiv(positions, rows)
    statistics = torch.empty(batch, parts, groups, 2, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    grid = (parts, triton.cdiv(groups, together), batch)
    shape: dict[str, Any] = {
        "GROUPS": groups, "WIDTH": channels // groups, "TOGETHER": together, "ADD": add is not None,
        "ROWS": ROWS, "BLOCK": block, "MEMBERS": power_of_2(together), "num_warps": WARPS, "fuse": True,
    }  # fmt: skip
    added = x if add is None else add  # any pointer: without ADD it is not read
    launch(_statistics, grid, x, added, statistics, positions, rows, **shape)
    launch(
        _normalise, grid, x, added, statistics, weight, bias, out, positions, rows, parts, eps,
        SILU=silu, PARTS=power_of_2(parts), **shape,
    )  # fmt: skip
    return out
