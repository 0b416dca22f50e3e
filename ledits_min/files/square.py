"""What a model that knows squares of one size alone is given of a picture of another shape, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SAME = 16  # of 255: two columns that differ by no more are one


@dataclass(frozen=True)
class Square:
    """A square in a picture, in the model's pixels.

    side        of the square
    whole       (width, height) of the whole picture at that scale
    left, top   where the square lies in it; negative where the picture's edges are drawn out around it
    """

    side: int
    whole: tuple[int, int]
    left: int
    top: int

    @property
    def padded(self) -> bool:
        return min(self.left, self.top) < 0

    def cut(self, whole: Tensor) -> Tensor:
        """The square of a picture (..., H, W) of `whole` pixels, (..., side, side); beyond it its nearest pixel."""
        across, down = torch.arange(self.side) + self.left, torch.arange(self.side) + self.top
        return _taken(whole, across, down)

    def spread(self, square: Tensor) -> Tensor:
        """(..., side, side) over the whole picture, (..., H, W); beyond the square its nearest pixel."""
        across, down = torch.arange(self.whole[0]) - self.left, torch.arange(self.whole[1]) - self.top
        return _taken(square, across, down)


def find_square(picture: Image.Image, side: int) -> Square:
    """The square around what is drawn, as wide as the picture's shorter side, else the whole picture, padded.

    What is drawn lies, along the longer side, between the columns (rows) that are as the first and those that are as
    the last: a plain wall on either side. Nothing of it may be cut off, and where it goes on beyond both of the long
    edges, the picture shows a part of something larger: neither is to fill the square.
    """
    wide, shorter = picture.width >= picture.height, min(picture.size)
    longer = max(side, round(side * max(picture.size) / shorter))
    whole = (longer, side) if wide else (side, longer)
    small = np.asarray(picture.resize(whole, Image.Resampling.BOX), dtype=np.int16)
    levels = small if wide else small.swapaxes(0, 1)
    first, last = _drawn(levels)
    goes_on = all(np.abs(levels[row] - levels[row, 0]).max() > SAME for row in (0, -1))
    if last - first <= side and not goes_on:
        start = min(max((first + last - side) // 2, 0), longer - side)
        return Square(side, whole, *((start, 0) if wide else (0, start)))
    shown = max(1, round(side * shorter / max(picture.size)))
    margin = -((side - shown) // 2)
    return Square(side, *(((side, shown), 0, margin) if wide else ((shown, side), margin, 0)))


def over_pictures(masks: Tensor, squares: Sequence[Square]) -> Tensor:
    """Masks (B, h, w) of squares as those of the whole pictures, in as many places."""
    size = masks.shape[-2], masks.shape[-1]
    large = F.interpolate(masks[:, None], squares[0].side)
    return torch.cat([F.adaptive_avg_pool2d(one.spread(mask), size) for one, mask in zip(squares, large, strict=True)])


def _drawn(levels: np.ndarray[tuple[int, int, int], np.dtype[np.int16]]) -> tuple[int, int]:
    """Of (H, W, 3), from the first column unlike that at the left edge to behind the last unlike that at the right."""
    width = levels.shape[1]
    from_left, from_right = (
        np.flatnonzero(np.abs(levels - levels[:, edge, None]).max(axis=(0, 2)) > SAME) for edge in (0, width - 1)
    )
    return (int(from_left[0]), int(from_right[-1]) + 1) if from_left.size and from_right.size else (0, width)


def _taken(image: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """The columns and rows of (..., H, W) by their numbers, the nearest one where there is none."""
    height, width = image.shape[-2:]
    return image[..., down.clamp(0, height - 1), :][..., across.clamp(0, width - 1)]
