"""A user's mask: where concepts may act, as a grey picture of any size with soft edges, or as an array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ledits_min.errors import InputError
from ledits_min.files.opening import ImageLike, open_image
from ledits_min.files.square import Square

Plane = NDArray[np.float32]
MaskLike = ImageLike  # an array may also be (H, W): bool, uint8, or float in 0 .. 1
MAX_PIXELS = 64_000_000
GREY = 8  # how far apart the colours of a grey pixel may be: a JPEG rounds them
SHAPE = 0.02  # by which its aspect ratio may differ from the picture's: both have whole pixels


def open_masks(masks: MaskLike | Sequence[MaskLike], sizes: Sequence[tuple[int, int]]) -> list[Plane]:
    """One mask for all pictures or one per picture, white where concepts may act: float32 (H, W), 0 .. 1.

    sizes (width, height) of the pictures. InputError for a mask that is no grey picture, has another shape than its
    picture, or is black.
    """
    many = list(masks) if isinstance(masks, list | tuple) else [masks]
    if len(many) not in (1, len(sizes)):
        raise InputError(f"{len(many)} masks for {len(sizes)} pictures; give one, or one per picture")
    planes = [_plane(mask) for mask in many]  # type: ignore[arg-type]
    for plane, (width, height) in zip(planes if len(planes) > 1 else planes * len(sizes), sizes, strict=True):
        high, wide = plane.shape
        if abs(wide * height - high * width) > SHAPE * max(wide * height, high * width):
            raise InputError(
                f"mask is {wide} x {high}, and its picture {width} x {height}, of another shape; draw the mask over "
                "the whole picture, at any scale"
            )
    return planes


def region_of(planes: Sequence[Plane], latents: tuple[int, int], squares: Sequence[Square] = ()) -> Tensor:
    """Opened masks over latents (h, w): float32 (1 or B, 1, h, w). Of the `squares` in pictures that were made some.

    InputError for a mask that is black wherever the model works.
    """
    masks = [torch.from_numpy(plane) for plane in planes]
    if squares:
        masks = masks if len(masks) > 1 else masks * len(squares)
        masks = [one.cut(_resized(mask, one.whole[::-1])) for one, mask in zip(squares, masks, strict=True)]
        if not all(bool(mask.any()) for mask in masks):
            raise InputError(
                "mask is white only outside the square of the picture that this model works at, so that nothing would "
                "change; paint white inside it, or cut the picture around what is to change"
            )
    return torch.stack([_resized(mask, latents)[None] for mask in masks])


def _resized(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(mask[None, None], size=size, mode="bilinear", antialias=True)[0, 0].clamp(0.0, 1.0)


def _plane(mask: MaskLike) -> Plane:
    plane = _of_array(mask) if isinstance(mask, np.ndarray) and mask.ndim == 2 else _of_picture(mask)
    if not plane.max() > 0.0:
        raise InputError("mask is black, so that nothing would change; paint white where concepts may act")
    return plane


def _of_picture(mask: MaskLike) -> Plane:
    notices: list[str] = []
    try:
        pixels = np.asarray(open_image(mask, notices=notices)).astype(np.int16)
    except InputError as error:
        raise InputError(f"mask: {error}") from None
    if any("transparent" in notice for notice in notices):
        raise InputError("mask is partly transparent; save it grey: white where concepts may act, black elsewhere")
    if (pixels.max(axis=2) - pixels.min(axis=2)).max() > GREY:
        raise InputError("mask has colours; a grey picture is wanted: white where concepts may act, black elsewhere")
    plane: Plane = (pixels.mean(axis=2) / 255.0).astype(np.float32)
    return plane


def _of_array(mask: np.ndarray[Any, Any]) -> Plane:
    if mask.dtype == np.uint8:
        plane = mask.astype(np.float32) / 255.0
    elif mask.dtype == np.bool_ or np.issubdtype(mask.dtype, np.floating):
        plane = mask.astype(np.float32)
    else:
        raise InputError(f"mask array is {mask.dtype} {mask.shape}; bool, uint8 or float (H, W) is wanted")
    if not 0 < mask.size <= MAX_PIXELS:
        raise InputError(f"mask array is {mask.shape}; 1 .. {MAX_PIXELS // 10**6} million pixels are wanted")
    if not (np.isfinite(plane).all() and plane.min() >= 0.0 and plane.max() <= 1.0):
        raise InputError("mask array holds values outside 0 .. 1; a float mask has 1 where concepts may act, else 0")
    return np.ascontiguousarray(plane)
