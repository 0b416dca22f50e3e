"""ComfyUI's IMAGE and MASK to pictures and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ledits_min.errors import InputError


def to_pictures(image: Tensor) -> list[Image.Image]:
    """An IMAGE, float (B, H, W, 3 or 4) in [0, 1], as B pictures of 8 bits; what lies outside is clipped as on saving.

    InputError for another shape and for values that are not finite.
    """
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or not image.numel():
        raise InputError(f"image is {list(image.shape)}; an IMAGE (pictures, height, width, 3 or 4 colours) is wanted")
    if not bool(image.isfinite().all()):
        raise InputError("image holds values that are not finite; look at the node that made it")
    levels = (image.detach().float().cpu().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return [Image.fromarray(level) for level in levels.numpy()]


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as an IMAGE, float32 (B, H, W, 3) in [0, 1]; InputError where their sizes differ."""
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sizes)
        raise InputError(f"these pictures differ in size ({listed}) and an IMAGE has one; set output_size to model")
    return torch.from_numpy(np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])) / 255.0


def to_mask(mask: Tensor, image: Tensor) -> Tensor:
    """A concept's mask (B, h, w) as a MASK of the image's size, float32 (B, H, W) in [0, 1]."""
    size = (image.shape[1], image.shape[2])
    return nn.functional.interpolate(mask.float()[:, None], size, mode="bilinear", align_corners=False)[:, 0]
