"""A convolution of 3 x 3 with 4/9 of the multiplications: Winograd's F(2 x 2, 3 x 3) [1509.09308, section 4.1].

2 x 2 results y see 4 x 4 inputs d. With the weights g (3 x 3) of one input channel for one output channel

    y = A^T [(G g G^T) * (B^T d B)] A        * entry by entry; the paper's equation 8

and summed over the input channels the 16 entries in brackets are 16 products of matrices, (tiles, C) by (C, O). The
transforms are products of matrices as well, which add in float32 and round once: where X is written as a column,
P X P^T is (P kron P) X.

In bfloat16 the inputs, the weights and the 16 products are rounded once more than in the convolution itself: the result
is off by 0.5 % (root mean square) instead of 0.2 %.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILES = 256  # at a time: enough for products at their full rate, few enough for the caches
CHANNELS, POSITIONS = 256, 256  # from so many on fewer multiplications outweigh the transforms, and the weights' memory
Matrix = tuple[tuple[float, ...], ...]
A_T: Matrix = (1, 1, 1, 0), (0, 1, -1, -1)
B_T: Matrix = (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)
G: Matrix = (1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)


def pays(inputs: int, outputs: int, height: int, width: int) -> bool:
    """Whether `convolve` takes maps of this size and has enough of channels and positions to beat the convolution."""
    return not height % 2 and not width % 2 and min(inputs, outputs) >= CHANNELS and height * width >= POSITIONS


def transform_weights(weights: Tensor) -> Tensor:
    """G g G^T: weights (O, C, 3, 3) -> (16, O, C)."""
    columns = weights.permute(2, 3, 0, 1).reshape(9, -1)
    transformed = _both_ways(G, weights) @ columns
    return transformed.view(16, *weights.shape[:2])


def convolve(hidden: Tensor, transformed: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """residual + bias + the convolution with weights that were transformed, zeros beyond the border.

    hidden (B, C, h, w), h and w even; transformed (16, O, C); bias (O,); residual (B, O, h, w) or None.
    Returns channels-last (B, O, h, w).
    """
    batch, channels, height, width = hidden.shape
    outputs, down, across = transformed.shape[1], height // 2, width // 2
    result = hidden.new_empty(batch, height, width, outputs).permute(0, 3, 1, 2)
    results, residuals = _tiles(result), None if residual is None else _tiles(residual)
    from_inputs = _both_ways(B_T, hidden)
    to_results = F.pad(_both_ways(A_T, hidden), (0, 1), value=1.0)  # and the bias, a 17th product, to every result

    images, rows = _evenly(batch, TILES // (down * across)), _evenly(down, TILES // across)
    for image in range(0, batch, images):
        for row in range(0, down, rows):
            d = _windows(hidden[image : image + images], row, min(row + rows, down)).reshape(16, -1)
            transformed_d = (from_inputs @ d).view(16, -1, channels)
            products = hidden.new_empty(17, transformed_d.shape[1], outputs)
            torch.bmm(transformed_d, transformed.transpose(1, 2), out=products[:16])
            products[16] = 0.0 if bias is None else bias

            here = (slice(None), slice(None), slice(image, image + images), slice(row, row + rows))
            y = (to_results @ products.flatten(1)).view(results[here].shape)
            if residuals is None:
                results[here] = y
            else:
                torch.add(residuals[here], y, out=results[here])
    return result


def _both_ways(matrix: Matrix, like: Tensor) -> Tensor:
    """P kron P in like's dtype, in which all these entries are exact."""
    p = like.new_tensor(matrix)
    return torch.kron(p, p)


def _windows(hidden: Tensor, first: int, last: int) -> Tensor:
    """What the tiles of rows first to last see: (B, C, h, w) -> (4, 4, B, last - first, w / 2, C)."""
    top, bottom = 2 * first - 1, 2 * last + 1
    inside = hidden.permute(0, 2, 3, 1)[:, max(0, top) : bottom]
    padded = F.pad(inside, (0, 0, 1, 1, max(0, -top), max(0, bottom - hidden.shape[2])))
    windows = padded.unfold(1, 4, 2).unfold(2, 4, 2)
    return windows.permute(4, 5, 0, 1, 2, 3)


def _tiles(hidden: Tensor) -> Tensor:
    """(B, C, h, w) -> a view (2, 2, B, h / 2, w / 2, C): the place in a tile, then the tile."""
    tiles: Tensor = hidden.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return tiles.permute(2, 4, 0, 1, 3, 5)


def _evenly(total: int, most: int) -> int:
    """How large the parts are when `total` is cut into as few of at most `most` (or of 1) as there can be."""
    parts = -(-total // max(1, most))
    return -(-total // parts)
