"""What a run starts from: pictures opened and encoded, and what the UNet is told of each text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ledits_min.config import UNetConfig
from ledits_min.engine.runner import Runner
from ledits_min.errors import InputError
from ledits_min.files.inversion import Inversion, InversionSettings
from ledits_min.files.picture import fit_size, open_image, to_tensor
from ledits_min.text import Context, TextEncoder, TextEncoderPair
from ledits_min.unet import sinusoids

ImageLike = Image.Image | str | Path | np.ndarray[Any, Any]

EMBEDDED_MIN_PSNR = 25.0  # below it a picture is outside what the embedded model's VAE has learned


@dataclass(frozen=True)
class Prepared:
    """What an inversion starts from: x_0 (B, C, h, w) and noise (T, B, C, h, w), both float32 on the device."""

    pictures: list[Image.Image]
    settings: InversionSettings
    x_0: Tensor
    noise: Tensor

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the pictures' own pixels."""
        return [picture.size for picture in self.pictures]

    def inversion(self, x_T: Tensor, residuals: Tensor) -> Inversion:
        originals = tuple(torch.from_numpy(np.array(picture)) for picture in self.pictures)
        return Inversion(x_T.cpu(), residuals.cpu(), self.x_0.cpu(), originals, self.settings)


def open_pictures(image: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """One picture or several, as RGB."""
    notices: list[str] = []
    sources = list(image) if isinstance(image, list | tuple) else [image]
    if not sources:
        raise InputError("no image was given; pass one picture or a list of at least one")
    pictures = [open_image(source, notices=notices) for source in sources]  # type: ignore[arg-type]
    for notice in notices:
        warnings.warn(notice, stacklevel=5)
    return pictures


def encode_pictures(
    runner: Runner, pictures: list[Image.Image], size: int | tuple[int, int] | None, native_size: int, embedded: bool
) -> Tensor:
    """Scaled latents of all pictures, float32 (B, C, h, w) on the device; `size` as in `LEdits.invert`."""
    sizes = {fit_size(picture.size, size, native_size, runner.vae.config.factor) for picture in pictures}
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise InputError(f"the pictures would have different sizes ({listed}); pass size=(width, height)")
    tensor = to_tensor(pictures, sizes.pop()).to(runner.unet.conv_in.weight.device)
    x_0 = runner.encode(tensor)
    if embedded:
        error = (runner.decode(x_0).clamp(-1.0, 1.0) - tensor).square().mean(dim=(1, 2, 3)).max()
        psnr = 10.0 * float(torch.log10(4.0 / error))
        if psnr < EMBEDDED_MIN_PSNR:
            warnings.warn(
                f"the embedded model was trained on drawn portraits and cannot even copy this picture well "
                f"({psnr:.0f} dB); it wants a larger model, such as a Stable Diffusion checkpoint",
                stacklevel=5,
            )
    return x_0


def told_contexts(
    text: TextEncoder | TextEncoderPair,
    config: UNetConfig,
    factor: int,
    texts: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    latents: Tensor,
) -> dict[str, Context]:
    """What the UNet is told of each text; SDXL's is told the sizes too, a row an image where they differ.

    added = [pooled text, waves of (H, W of the original; 0, 0: nothing cropped; H, W worked at)]
    [2307.01952, section 2.2]; `sizes` (width, height) are those of the pictures' own pixels, `factor` is the VAE's.
    """
    # One prompt a call: a prompt's embedding must not depend, to the last bit, on its neighbours.
    contexts = {one: text.encode([one]) for one in dict.fromkeys(texts)}
    waves = config.addition_time_embed_dim
    if not waves:
        return contexts
    worked_at = [side * factor for side in latents.shape[-2:]]
    told = sizes[:1] if len(set(sizes)) == 1 else sizes
    numbers = [[height, width, 0, 0, *worked_at] for width, height in told]
    features = sinusoids(torch.tensor(numbers, device=contexts[texts[0]].tokens.device), waves).flatten(1)
    return {one: context.told(features) for one, context in contexts.items()}
