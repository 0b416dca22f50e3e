"""A picture coded in overlapping tiles, where the whole of it does not fit into memory.

Not exact: GroupNorm and the VAE's attention look at a whole picture and here see a tile, so neighbouring tiles may
differ in tone; the overlap fades one into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Box = tuple[int, int]


def in_tiles(code: Callable[[Tensor], Tensor], x: Tensor, side: int, inner: int, outer: int) -> Tensor:
    """code(x) from tiles of `side` x `side` latents that overlap by a quarter.

    x (B, C, h inner, w inner) -> (B, C', h outer, w outer), float32: to decode, inner is 1 and outer the VAE's factor;
    to encode, the other way round.
    """
    height, width = (length // inner for length in x.shape[-2:])
    overlap = side // 4
    total, weights = torch.zeros(()), torch.zeros(())
    for rows in boxes(height, side, overlap):
        for columns in boxes(width, side, overlap):
            tile = code(x[..., scaled(rows, inner), scaled(columns, inner)])
            if total.dim() == 0:
                total = tile.new_zeros(*tile.shape[:2], height * outer, width * outer)
                weights = tile.new_zeros(height * outer, width * outer)
            down, across = (fade(*pair, overlap, outer).to(tile) for pair in ((rows, height), (columns, width)))
            window = down[:, None] * across
            place = (..., scaled(rows, outer), scaled(columns, outer))
            total[place] += window * tile
            weights[place] += window
    return total / weights


def boxes(length: int, side: int, overlap: int) -> list[Box]:
    """(start, stop) of tiles of `side` that cover 0 .. length, spread evenly, at least `overlap` in common."""
    if length <= side:
        return [(0, length)]
    gaps = -(-(length - side) // (side - overlap))
    return [(start, start + side) for start in (i * (length - side) // gaps for i in range(gaps + 1))]


def fade(box: Box, length: int, overlap: int, scale: int) -> Tensor:
    """A tile's weight along one axis: it rises over the overlap wherever a neighbour lies behind the edge."""
    start, stop = box
    inside = torch.arange((stop - start) * scale, dtype=torch.float32) + 0.5
    ramp = float(max(1, overlap * scale))
    rise = inside / ramp if start > 0 else torch.ones_like(inside)
    fall = inside.flip(0) / ramp if stop < length else torch.ones_like(inside)
    return torch.minimum(rise, fall).clamp(max=1.0)


def scaled(box: Box, scale: int) -> slice:
    return slice(box[0] * scale, box[1] * scale)
