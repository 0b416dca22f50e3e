"""Pictures as tensors and back: the size the model works at, values in [-1, 1], the change laid over the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ledits_min.errors import InputError, RunError, short

MIN_LATENTS, MAX_SIDE = 8, 4096  # at the model's size: latents of the shorter side, pixels of the longer
LITTLE, MUCH = 16.0, 64.0  # of 255: where a change begins to count as large, and where it is
NOISE = 5.0  # levels^2: less variance than this is no structure

Size = int | tuple[int, int] | list[int]


def fit_size(picture: tuple[int, int], size: Size | None, native: int, factor: int) -> tuple[int, int]:
    """(width, height) the model works at: both multiples of `factor`, the pixels of one latent.

    size  the longer side, with the aspect kept; or (width, height); None: `native` for the longer side, or more
          where the shorter one would have fewer than 8 latents. InputError outside 8 latents .. 4096 px.
    """
    least = MIN_LATENTS * factor
    if size is None:
        longer = max(float(native), least * max(picture) / min(picture))
    elif isinstance(size, tuple | list):
        if len(size) != 2 or any(type(side) is not int for side in size):
            raise InputError(f"size is {short(size)}; two whole numbers (width, height) are wanted")
        picture, longer = (size[0], size[1]), float(max(size))
    elif type(size) is int:
        longer = float(size)
    else:
        raise InputError(f"size is {short(size)}; a whole number or (width, height) is wanted")
    if not (0 < longer <= MAX_SIDE and min(picture) > 0):
        raise InputError(f"size {_by(size, longer)} must have sides in {least} .. {MAX_SIDE} pixels")
    scale = longer / max(picture)
    width, height = (max(1, round(side * scale / factor)) * factor for side in picture)
    if min(width, height) < least:
        why = f"is too small for this model, which needs {least} pixels per side; pass a larger one"
        raise InputError(f"size {width} x {height} {why}")
    return width, height


def to_tensor(images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """RGB pictures as float32 (B, 3, H, W) in [-1, 1]; Lanczos to `size` (W, H), without rounding in between."""
    return torch.from_numpy(np.stack([_planes(image, size) for image in images])) / 127.5 - 1.0


def to_images(image: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in about [-1, 1] as 8-bit pictures; RunError where a value is not finite."""
    levels = _levels(image).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in levels]


def lay_change(original: Image.Image, before: Image.Image | Tensor, after: Image.Image | Tensor) -> Image.Image:
    """The change of a small picture, after - before, laid over the large one.

    result = (1 - undone) original + undone upsample(before) + upsample(change - max(much - undone, 0) tint)
    What the model's copy lacks, original - before, is a tint, its mean over 3 x 3 pixels, and detail. Where the change
    undoes what was there neither may stay, or the old picture shows through: there are the model's own pixels. Where
    much changes and the structure stays, the tint goes alone: a coat of another colour keeps its cloth. Elsewhere it
    is original + change. before and after are RGB pictures of one size, or tensors (3, h, w) in [-1, 1]. Where they
    agree, the original's bytes come back exactly.
    """
    small, planes = _as_levels(before), []
    change = _as_levels(after) - small
    much = _smoothstep((_mean(change.abs().amax(dim=0, keepdim=True)) - LITTLE) / (MUCH - LITTLE))
    undone = _undone(small, change, much)
    tint = _mean(torch.from_numpy(_planes(original, (small.shape[2], small.shape[1]))) - small)
    added = change - (much - undone).clamp(min=0.0) * tint
    share = _enlarged(undone[0], original.size).clip(0.0, 1.0)
    for plane, own, addition in zip(original.split(), small, added, strict=True):
        levels = np.asarray(plane, dtype=np.float32)
        levels = levels + _enlarged(addition, original.size) + share * (_enlarged(own, original.size) - levels)
        planes.append(Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8)))
    return Image.merge("RGB", planes)


def _undone(before: Tensor, change: Tensor, much: Tensor) -> Tensor:
    """How much of the structure of `before` (3, h, w) the change undoes, (1, h, w) in [0, 1].

    undone = clip(-cov(before, change) / (var(before) + NOISE)) over a window and the channels: 1 - undone is the slope
    that the guided filter [1505.00996] finds from before to after. No change undoes nothing, another colour little,
    another thing all. Wider windows know what a flat place belongs to; they count where `much` changes, so that
    nothing is undone beside a change.
    """
    found = torch.zeros_like(much)
    for radius in (1, 4, 16):
        mean, mean_change = _mean(before, radius), _mean(change, radius)
        variance = (_mean(before * before, radius) - mean * mean).sum(dim=0, keepdim=True)
        covariance = (_mean(before * change, radius) - mean * mean_change).sum(dim=0, keepdim=True)
        slope = (-covariance / (variance.clamp(min=0.0) + NOISE)).clamp(0.0, 1.0)
        found = found.maximum(slope if radius == 1 else much * slope)
    return found


def _mean(levels: Tensor, radius: int = 1) -> Tensor:
    """(C, h, w) over windows of 2 radius + 1 pixels, fewer at the edge."""
    for kernel, padding in (((1, 2 * radius + 1), (0, radius)), ((2 * radius + 1, 1), (radius, 0))):
        levels = F.avg_pool2d(levels, kernel, stride=1, padding=padding, count_include_pad=False)
    return levels


def _smoothstep(x: Tensor) -> Tensor:
    x = x.clamp(0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _enlarged(plane: Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """(h, w) at another size. Bicubic: Lanczos would ring two pixels further out of an edited region."""
    small = Image.fromarray(plane.numpy())
    return np.asarray(small if small.size == size else small.resize(size, Image.Resampling.BICUBIC))


def _by(size: Size | None, longer: float) -> str:
    return f"{longer:g}" if size is None or isinstance(size, int) else f"{size[0]} x {size[1]}"


def _planes(image: Image.Image, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """float32 (3, H, W) in 0 .. 255; Lanczos overshoots, so the result is clipped."""
    planes = [plane.convert("F") for plane in image.split()]
    if image.size != size:
        planes = [plane.resize(size, Image.Resampling.LANCZOS) for plane in planes]
    return np.stack([np.asarray(plane) for plane in planes]).clip(0.0, 255.0)


def _levels(image: Tensor) -> Tensor:
    """[-1, 1] to 0 .. 255, float32 on the CPU. A cast to uint8 would turn NaN into a silent black."""
    if not bool(image.isfinite().all()):
        raise RunError("the decoded picture holds values that are not finite; try --dtype float32")
    return (image.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5


def _as_levels(image: Image.Image | Tensor) -> Tensor:
    return torch.from_numpy(_planes(image, image.size)) if isinstance(image, Image.Image) else _levels(image)
