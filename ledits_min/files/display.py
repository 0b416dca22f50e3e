"""What a notebook shows of an edit or an inversion: pictures under captions, as HTML that loads nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

SIDE = 320  # pixels of the longer side, at most
SHOWN = 8  # pictures of a batch
_LOW, _HIGH = np.array([213.0, 94.0, 0.0]), np.array([255.0, 235.0, 130.0])  # vermilion to pale yellow, on grey

Figure = tuple[str, Image.Image]  # a caption and its picture


def figures(rows: Sequence[Sequence[Figure]], note: str = "") -> str:
    """Rows of pictures, each no larger than SIDE, with their captions below, and a note at the end."""
    left_out = f"and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    lines = [f"<div>{html.escape(text)}</div>" for text in (left_out, note) if text]
    shown = ["".join(map(_figure, row)) for row in rows[:SHOWN]]
    return "\n".join([*(f'<div style="display:flex;flex-wrap:wrap;gap:8px">{row}</div>' for row in shown), *lines])


def _figure(figure: Figure) -> str:
    caption, picture = html.escape(figure[0], quote=True), figure[1].copy()
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.save(content, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return (
        f'<figure style="margin:0;width:{picture.width}px"><img alt="{caption}" src="{source}">'
        f'<figcaption style="overflow-wrap:anywhere">{caption}</figcaption></figure>'
    )


def overlay(picture: Image.Image, mask: Tensor) -> Image.Image:
    """The picture in grey with a mask (h, w) laid over it: the stronger, the brighter.

    The ramp runs from nothing (grey) over vermilion to pale yellow, lighter all the way, so that it reads without
    telling red from green; its top is the mask's own peak.
    """
    peak = max(float(mask.max()), 1e-6)
    plane = Image.fromarray((mask.float().cpu() / peak).numpy()).resize(picture.size, Image.Resampling.BILINEAR)
    strength = np.asarray(plane).clip(0.0, 1.0)[..., None]
    # Darkened and flattened, so that the ramp is lighter than any part of the picture under it.
    grey = 20.0 + 0.4 * np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    alpha = opacity(strength)
    return Image.fromarray(np.rint((1.0 - alpha) * grey + alpha * ramp(strength)).clip(0, 255).astype(np.uint8))


def ramp(strength: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    mixed: np.ndarray[Any, Any] = _LOW + strength * (_HIGH - _LOW)
    return mixed


def opacity(strength: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.minimum(0.75, 1.5 * strength)  # the face stays visible under its mask
    return found
