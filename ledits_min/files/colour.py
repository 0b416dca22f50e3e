"""What a picture says about its colours beside its ICC profile: PNG's gAMA, cHRM, cICP and tRNS, and nclx boxes.

[PNG, third edition, sections 4.3 and 11.3.2; ITU-T H.273 for the numbers of cICP and nclx]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from PIL import Image

from ledits_min.files.containers import Promise

_SRGB_GAMMA = 45_455  # gAMA of sRGB and of most cameras' files, in units of 1 / 100,000
_SRGB_CHROMATICITIES = (31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)
_SDR = {1, 2, 6, 13}  # transfer functions that are displayed like sRGB's: BT.709, unknown, BT.601, sRGB
_NEAR = {0, 1, 2, 5, 6, 7}  # primaries close to sRGB's: BT.709 and both BT.601


@dataclass(frozen=True)
class Reading:
    """How the samples are to be read.

    table                256 entries for each of three channels, samples to sRGB; None: they are sRGB
    transparency_factor  what PNG's transparent sample is multiplied with, since fewer than 8 bits are stretched to 8
    notices              what is not honoured
    """

    table: list[int] | None = None
    transparency_factor: int = 1
    notices: list[str] = field(default_factory=list)


def colours_said(kind: str, image: Image.Image, promise: Promise, name: str) -> Reading:
    """From the chunks in their order of precedence: cICP, then an ICC profile, sRGB, and gAMA with cHRM at last."""
    chunks, notices = promise.colour, list[str]()
    table = None
    if numbers := chunks.get(b"cICP"):
        primaries, transfer = numbers[0], numbers[1]
        if transfer not in _SDR or primaries not in _NEAR:
            wide = "high dynamic range" if transfer in (16, 18) else "a wider range of colours"
            said = f"primaries {primaries}, transfer function {transfer}"
            if not image.info.get("icc_profile"):
                notices.append(f"{name} is coded for {wide} ({said}), which is not converted; its colours will be off")
    elif not image.info.get("icc_profile") and b"sRGB" not in chunks:
        table = _gamma_table(chunks.get(b"gAMA", b""))
        white = chunks.get(b"cHRM", b"")
        if len(white) >= 32:
            found = struct.unpack_from(">8I", white)
            if any(abs(one - other) > 1000 for one, other in zip(found, _SRGB_CHROMATICITIES, strict=True)):
                notices.append(f"{name} has primaries of its own (PNG's cHRM), which are taken as sRGB's")
    factor = 1
    if kind == "PNG" and "transparency" in image.info:
        raw = _raw_mode(image)
        factor = {"L;2": 85, "L;4": 17}.get(raw, 1)
        if raw == "RGB;16B":
            clear = image.info.pop("transparency")
            notices.append(f"{name} has a transparent colour of 16 bits {clear}, which is not applied; use an alpha")
    return Reading(table, factor, notices)


def _raw_mode(image: Image.Image) -> str:
    """How the samples lie in the file, which Pillow knows until it has decoded them."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _gamma_table(chunk: bytes) -> list[int] | None:
    """light = sample^(1 / gamma), and light to sRGB; None where the gamma is sRGB's, near enough, or makes no sense."""
    gamma = struct.unpack_from(">I", chunk)[0] if len(chunk) >= 4 else 0
    if not 10_000 <= gamma <= 1_000_000 or abs(gamma - _SRGB_GAMMA) <= 1000:
        return None
    light = [(sample / 255.0) ** (100_000 / gamma) for sample in range(256)]
    encoded = [12.92 * one if one <= 0.0031308 else 1.055 * one ** (1 / 2.4) - 0.055 for one in light]
    return [round(255.0 * one) for one in encoded] * 3
