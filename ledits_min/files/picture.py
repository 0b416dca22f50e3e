"""Pictures as tensors and back: the size the model works at, values in [-1, 1], the change laid over the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ledits_min.errors import InputError, RunError, short

MIN_LATENTS, MAX_SIDE = 8, 4096  # at the model's size: latents of the shorter side, pixels of the longer

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
    """clip(original + upsample(after - before)): the change of a small picture, laid over the large one.

    before and after are RGB pictures of one size, or tensors (3, h, w) in [-1, 1]. Where they agree, the
    original's bytes come back exactly.
    """
    change = (_as_levels(after) - _as_levels(before)).numpy()
    planes, size = [], original.size
    for plane, delta in zip(original.split(), change, strict=True):
        small = Image.fromarray(delta)
        # Bicubic: Lanczos would ring two pixels further out of an edited region.
        large = small if small.size == size else small.resize(size, Image.Resampling.BICUBIC)
        summed = np.asarray(plane, dtype=np.float32) + np.asarray(large)
        planes.append(Image.fromarray(np.rint(summed).clip(0, 255).astype(np.uint8)))
    return Image.merge("RGB", planes)


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
