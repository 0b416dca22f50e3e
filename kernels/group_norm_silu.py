"""GroupNorm, and the SiLU behind it, of channels-last feature maps in two launches. `ops` calls torch or this.

What stands in front of the norm comes with it: a sum (a convolution's output, its bias, the residual), written once as
the norm's statistics are taken, and the concatenation of two maps, read from two places.

In channels-last memory a group is a few channels of every position, so a program takes a block of whole groups and
walks over positions. Any channel count works: blocks are padded, not the map. Statistics are float32 and never
E[x^2] - E[x]^2: every thread keeps mean and spread of its own values (Welford 1962) and no thread waits for another
until the end of the walk, when means and spreads are merged (Chan, Golub, LeVeque 1979):

    mean   = sum n_i mean_i / sum n_i
    spread = sum spread_i + n_i (mean_i - mean)^2
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ledits_min.kernels._launch import aligned, cdiv, channels_last, launch, launch_shape, power_of_2

CHANNELS = 128  # channels of a block, where a group is not wider
MEMBERS = 32  # groups of a block at most
CHUNK = 32  # parts whose statistics are merged at a time
# A thread's, where 8 channels move as one. Left to themselves, assemblers take 128 for the first kernel, and have
# spilled to stay within 64 in the second.
REGISTERS = {"_statistics": 96, "_normalise": 80}

# rows: positions of a tile, 16 values a thread. programs: as many at most as keep a device busy to the end, each with
# `least` positions or more.
SHAPE = {"rows": 16, "warps": 4, "stages": 1, "programs": 4096, "least": 32}

# One compiled kernel serves all channel counts: sizes are arguments, in units of the VECTOR that divides them.
_SIZES = ["positions", "rows", "parts", "add_stride", "own", "channels", "span", "groups", "width", "together"]


@triton.jit(do_not_specialize=[*_SIZES, "residual", "add"])
def _statistics(  # type: ignore[no-untyped-def]
    x_ptr,  # (B, positions, own)
    skip_ptr,  # (B, positions, channels - own)
    residual_ptr,  # as x
    add_ptr,  # (B, own), or one row for all samples
    total_ptr,  # as x
    parts_ptr,  # float32 (B, parts, groups, 2)   mean and spread
    positions,
    rows,  # positions per part
    add_stride,
    own,  # in units of VECTOR, as the next two
    channels,
    span,  # channels of a block
    groups,
    width,  # channels per group
    together,  # groups per program
    residual,  # whether there is one,
    add,  # whether there is one
    SUM: tl.constexpr,  # write x + add + residual, and take its statistics; else add is not written
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per part of the positions, block of groups, and sample."""
    part = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    channel = tl.program_id(1) * span * VECTOR + lane
    real = (lane < span * VECTOR) & (channel < channels * VECTOR)
    mine = channel < own * VECTOR
    added = tl.load(add_ptr + sample * add_stride + channel, real & mine & (add != 0), 0.0).to(tl.float32)

    # Every thread by itself.
    first = part * rows
    last = tl.minimum(first + rows, positions)
    n = 0.0
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    spread = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        here, there = _offsets(sample * positions + row, channel, own * VECTOR, channels * VECTOR)
        value = tl.load(tl.where(mine[None, :], x_ptr + here, skip_ptr + there), inside, 0.0).to(tl.float32)
        if SUM:
            ours = inside & mine[None, :]
            value += added[None, :] + tl.load(residual_ptr + here, ours & (residual != 0), 0.0).to(tl.float32)
            rounded = value.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + here, rounded, ours)
            value = rounded.to(tl.float32)
        n += 1.0
        share = 1.0 / n
        off = tl.where(inside, value - mean, 0.0)
        mean += off * share
        spread += off * off * (1.0 - share)

    # The positions of a channel together.
    size = last - first
    tiles = ((size + ROWS - 1 - tl.arange(0, ROWS)) // ROWS).to(tl.float32)[:, None]
    n = size.to(tl.float32)
    channel_mean = tl.sum(tiles * mean, 0) / n
    off = mean - channel_mean[None, :]
    channel_spread = tl.sum(spread + tiles * off * off, 0)
    if not SUM:  # moves a channel's mean, and nothing else
        channel_mean += added

    # The channels of a group together.
    member = (lane[:, None] // width == tl.arange(0, MEMBERS)[None, :]) & real[:, None]
    group_mean = tl.sum(tl.where(member, channel_mean[:, None], 0.0), 0) / width
    off = tl.where(member, channel_mean[:, None] - group_mean[None, :], 0.0)
    group_spread = tl.sum(tl.where(member, channel_spread[:, None], 0.0) + n * off * off, 0)

    group = tl.program_id(1) * together + tl.arange(0, MEMBERS)
    known = (tl.arange(0, MEMBERS) < together) & (group < groups)
    out = parts_ptr + ((sample * tl.num_programs(0) + part) * groups + group) * 2
    tl.store(out, group_mean, known)
    tl.store(out + 1, group_spread, known)


@triton.jit(do_not_specialize=[*_SIZES, "epsilon", "add", "silu"])
def _normalise(  # type: ignore[no-untyped-def]
    x_ptr,  # (B, positions, own)
    skip_ptr,  # (B, positions, channels - own)
    add_ptr,  # (B, own), or one row for all samples
    parts_ptr,  # float32 (B, parts, groups, 2)
    weight_ptr,  # (channels,)
    bias_ptr,  # (channels,)
    out_ptr,  # (B, positions, channels)
    positions,
    rows,
    parts,
    epsilon,
    add_stride,
    own,
    channels,
    span,
    groups,
    width,
    together,
    add,
    silu,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per part of the positions, block of groups, and sample; what was read last comes first."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sample = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    channel = block * span * VECTOR + lane
    real = (lane < span * VECTOR) & (channel < channels * VECTOR)
    mine = channel < own * VECTOR

    # Merge the statistics of all parts.
    group = block * together + tl.arange(0, MEMBERS)[None, :]
    asked = (tl.arange(0, MEMBERS)[None, :] < together) & (group < groups)
    table = parts_ptr + (sample * parts * groups + group) * 2
    mean = tl.zeros([CHUNK, MEMBERS], tl.float32)
    for start in range(0, parts, CHUNK):
        other = (start + tl.arange(0, CHUNK))[:, None]
        n = tl.maximum(tl.minimum(positions - other * rows, rows), 0).to(tl.float32)
        mean += n * tl.load(table + other * groups * 2, asked & (other < parts), 0.0)
    mean = tl.sum(mean, 0) / positions
    spread = tl.zeros([CHUNK, MEMBERS], tl.float32)
    for start in range(0, parts, CHUNK):
        other = (start + tl.arange(0, CHUNK))[:, None]
        known = asked & (other < parts)
        n = tl.maximum(tl.minimum(positions - other * rows, rows), 0).to(tl.float32)
        off = tl.where(known, tl.load(table + other * groups * 2, known, 0.0) - mean[None, :], 0.0)
        spread += tl.load(table + other * groups * 2 + 1, known, 0.0) + n * width * off * off
    inverse = tl.rsqrt(tl.sum(spread, 0) / (positions.to(tl.float32) * width) + epsilon)

    # From groups to their channels.
    member = lane[None, :] // width == tl.arange(0, MEMBERS)[:, None]
    centre = tl.sum(tl.where(member, mean[:, None], 0.0), 0)
    scale = tl.sum(tl.where(member, inverse[:, None], 0.0), 0)
    scale *= tl.load(weight_ptr + channel, real, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, real, 0.0).to(tl.float32)
    centre -= tl.load(add_ptr + sample * add_stride + channel, real & mine & (add != 0), 0.0).to(tl.float32)

    first = part * rows
    last = tl.minimum(first + rows, positions)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        at = sample * positions + row
        here, there = _offsets(at, channel, own * VECTOR, channels * VECTOR)
        value = tl.load(tl.where(mine[None, :], x_ptr + here, skip_ptr + there), inside, 0.0).to(tl.float32)
        value = (value - centre[None, :]) * scale[None, :] + bias[None, :]
        value = tl.where(silu != 0, value / (1.0 + tl.exp(-value)), value)
        out = out_ptr + at[:, None] * (channels * VECTOR) + channel[None, :]
        tl.store(out, value.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _offsets(position, channel, own, channels):  # type: ignore[no-untyped-def]
    """Where (position, channel) lies in x, and where in the skip."""
    here = position[:, None] * own + channel[None, :]
    there = position[:, None] * (channels - own) + (channel - own)[None, :]
    return here, there


def block_of_groups(groups: int, width: int) -> tuple[int, int]:
    """(groups per program, its block of channels): whole groups, in a block of CHANNELS where they fit it.

    As many groups as fit, in multiples that keep every block 16-byte aligned in half precision where there are enough.
    """
    block = power_of_2(width, least=CHANNELS)
    together = min(groups, block // width, MEMBERS)
    multiple = next(m for m in (1, 2, 4, 8) if m * width % 8 == 0)
    return (together - together % multiple or together), block


def warps(block: int) -> int:
    """As many as keep 16 values of a tile in each thread."""
    return min(16, SHAPE["warps"] * block // CHANNELS)


def register_limit(kernel: str, vector: int, block: int) -> int | None:
    """All there are for odd widths, whose addresses are many; the assembler's own choice for wider blocks."""
    if block > CHANNELS:
        return None
    return REGISTERS[kernel] if vector == 8 else 255


def rows_per_part(positions: int, width: int, programs: int, shape: dict[str, int]) -> int:
    """How many positions a program walks over, where one part would be `programs` programs.

    Every program reads the statistics of all parts: they stay below a fifth of the bytes that it normalises.
    """
    parts = min(shape["programs"] // programs, positions // shape["least"], isqrt(positions * width // 10))
    return shape["rows"] * cdiv(positions, shape["rows"] * max(1, parts))


def fits(x: Tensor) -> bool:
    """Whether x (B, C, h, w) lies channels-last in memory. NCHW is torch's: its own kernel is made for it."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def group_norm_silu(
    x: Tensor, norm: nn.GroupNorm, add: Tensor | None = None, silu: bool = True, skip: Tensor | None = None
) -> Tensor:
    """silu(norm(cat([x + add, skip]))), channels-last, in x's dtype; without `silu` the norm alone.

    x (B, C, h, w) and skip (B, S, h, w) in one float dtype; add (B, C), (1, C) or (C,), added at every position; the
    norm has C + S channels. What does not lie channels-last is copied first.
    """
    return _norm(channels_last(x), norm, add, silu, skip)


def add_group_norm_silu(
    x: Tensor,
    norm: nn.GroupNorm,
    residual: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = True,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, silu(norm(cat([total, skip])))) with total = x + add + residual, channels-last, in x's dtype.

    As `group_norm_silu`; residual (B, C, h, w). The sum is rounded once, and what is normed is the rounded sum.
    """
    x = channels_last(x)
    total = torch.empty_like(x)
    return total, _norm(x, norm, add, silu, skip, residual, total)


def add_maps(x: Tensor, residual: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x + add + residual, channels-last, in x's dtype, for a sum that no norm stands behind.

    As `add_group_norm_silu`. It is the first of its launches, whose statistics then nobody reads.
    """
    x = channels_last(x)
    total, width = torch.empty_like(x), gcd(x.shape[1], CHANNELS)
    _sum_up(x, x, _Walk.over(x, x.shape[1], x.shape[1] // width), add, residual, total)
    return total


@dataclass(frozen=True)
class _Walk:
    """How both launches of a norm go over a map."""

    grid: tuple[int, int, int]
    positions: int
    rows: int
    sizes: tuple[int, ...]  # what both kernels take from `own` to `together`
    constants: dict[str, Any]
    groups: int

    @classmethod
    def over(cls, x: Tensor, channels: int, groups: int) -> _Walk:
        """x (B, own, h, w), with the skip's channels behind its own."""
        batch, own, height, width = x.shape
        group = channels // groups
        together, block = block_of_groups(groups, group)
        shape = launch_shape(f"group_norm_silu {block}", SHAPE | {"warps": warps(block)}, x.device)
        blocks = cdiv(groups, together)
        rows = rows_per_part(height * width, group, blocks * batch, shape)
        vector = aligned(own, channels, together * group)
        sizes = own // vector, channels // vector, together * group // vector, groups, group, together
        constants: dict[str, Any] = {
            "VECTOR": vector, "ROWS": shape["rows"], "BLOCK": block, "MEMBERS": MEMBERS, "STAGES": shape["stages"],
            "num_warps": shape["warps"], "fuse": True,
        }  # fmt: skip
        return cls((cdiv(height * width, rows), blocks, batch), height * width, rows, sizes, constants, groups)

    def registers(self, kernel: str) -> int | None:
        return register_limit(kernel, self.constants["VECTOR"], self.constants["BLOCK"])


def _rows_of(add: Tensor | None, own: int) -> tuple[Tensor | None, int]:
    """`add` as rows, and their stride: 0 where one row is for all samples."""
    rows = None if add is None else add.reshape(-1, own).contiguous()
    return rows, 0 if rows is None or len(rows) == 1 else own


def _sum_up(
    x: Tensor, skip: Tensor, walk: _Walk, add: Tensor | None, residual: Tensor | None, total: Tensor | None
) -> Tensor:
    """The first launch: the statistics of every part, and the sum in `total` where there is one."""
    parts, _, batch = walk.grid
    statistics = torch.empty(batch, parts, walk.groups, 2, dtype=torch.float32, device=x.device)
    added, stride = _rows_of(add, x.shape[1])
    launch(
        _statistics, walk.grid,
        x, skip, x if residual is None else channels_last(residual), x if added is None else added,
        x if total is None else total, statistics, walk.positions, walk.rows, stride, *walk.sizes,
        int(residual is not None), int(add is not None), SUM=total is not None,
        registers=walk.registers("_statistics"), **walk.constants,
    )  # fmt: skip
    return statistics


def _norm(
    x: Tensor,
    norm: nn.GroupNorm,
    add: Tensor | None,
    silu: bool,
    skip: Tensor | None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    batch, own, height, width = x.shape
    channels = norm.num_channels
    assert channels == own + (0 if skip is None else skip.shape[1]), "the norm's channels are those of x and skip"
    skip = x if skip is None else channels_last(skip)  # any pointer where there is none: it is not read
    walk = _Walk.over(x, channels, norm.num_groups)
    statistics = _sum_up(x, skip, walk, add, residual, total)
    if total is not None:
        x, add = total, None
    added, stride = _rows_of(add, own)
    out = torch.empty(batch, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    launch(
        _normalise, walk.grid,
        x, skip, x if added is None else added, statistics, norm.weight, norm.bias, out, walk.positions, walk.rows,
        walk.grid[0], float(norm.eps), stride, *walk.sizes, int(added is not None), int(silu), CHUNK=CHUNK,
        registers=walk.registers("_normalise"), **walk.constants,
    )  # fmt: skip
    return out
