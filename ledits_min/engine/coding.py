"""The autoencoder, one picture at a time: in tiles where memory runs out, in float32 where half precision overflows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ledits_min.engine.memory import is_out_of_memory
from ledits_min.engine.retry import NotFinite, attempts
from ledits_min.engine.tiling import in_tiles
from ledits_min.errors import warn
from ledits_min.vae import VAE

SMALLEST_TILE = 8  # latents per side; below it a tile is all border


def encode(vae: VAE, image: Tensor) -> Tensor:
    """`VAE.encode`: image (B, 3, H, W) -> scaled latents, float32 (B, C, h, w)."""
    for attempt in attempts(vae):
        with attempt:
            latents = _coded("encoding", vae.encode, image, vae.config.factor, 1)
    return latents


def decode(vae: VAE, latents: Tensor) -> Tensor:
    """`VAE.decode`, likewise."""
    for attempt in attempts(vae):
        with attempt:
            image = _coded("decoding", vae.decode, latents, 1, vae.config.factor)
    return image


def _coded(name: str, code: Callable[[Tensor], Tensor], x: Tensor, inner: int, outer: int) -> Tensor:
    tile = max(x.shape[-2:]) // inner
    parts: list[Tensor] = []
    while len(parts) < len(x):
        part = _tiled(code, x[len(parts) : len(parts) + 1], tile, inner, outer)
        if part is None:
            tile = (tile + 1) // 2
            warn(f"{name}: out of memory; going on in tiles of {tile * max(inner, outer)} pixels")
            continue
        parts.append(part)
    whole = torch.cat(parts)
    if not bool(whole.isfinite().all()):
        raise NotFinite(f"{name}: values that are not finite")
    return whole


def _tiled(code: Callable[[Tensor], Tensor], x: Tensor, tile: int, inner: int, outer: int) -> Tensor | None:
    """None where memory ran out and smaller tiles may fit; a tile as large as the picture is the picture."""
    try:
        return code(x) if tile * inner >= max(x.shape[-2:]) else in_tiles(code, x, tile, inner, outer)
    except (RuntimeError, MemoryError) as error:
        if (tile + 1) // 2 < SMALLEST_TILE or not is_out_of_memory(error):
            raise
        return None
