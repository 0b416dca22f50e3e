"""What a picture's container promises, looked at before anything is decoded.

A decoder does what a file asks of it: go over all pixels a thousand times, follow a million blocks, join comments that
grow. Each format's walk here takes a time that the file's length bounds, and refuses what would keep the decoder busy.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from ledits_min.errors import InputError
from ledits_min.files.tags import check_all_directories, check_directories

MAX_JPEG_WORK = 1_000_000_000  # scans x pixels, some 3 ns each; most progressive pictures have ten scans
MAX_SCANS = 1000
MAX_SEGMENTS = 10_000
MAX_JUNK = 65_536  # bytes between segments
MAX_EXIF = 4_000_000
MAX_CHUNKS = 200_000
MAX_PROFILES = 8  # of a PNG, which may have one; Pillow decompresses them all
MAX_GIF_LEAD = 1_000_000  # bytes before the first frame, where Pillow joins comments one by one
MAX_RLE = 4_000_000  # bytes of a run-length coded BMP, which Pillow decodes in Python

_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_FRAME = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_TIFF_STARTS = (b"II\x2a\0", b"MM\0\x2a", b"II\x2b\0", b"MM\0\x2b", b"II\0\x2a", b"MM\x2a\0")


@dataclass
class Promise:
    """What the walk through a container found.

    size      (width, height) where it is cheaper to read here than to let the decoder prepare for it
    many      whether there are more frames or pages than the first, as far as the walk went
    complete  False where a JPEG ends before its end marker
    last_pass  whether such a JPEG had begun the last pass over every coefficient, or needs one alone
    colour    PNG's chunks about colour; of AVIF and HEIC the numbers of their nclx box as `cICP`
    exif      PNG's, which may stand behind the pixels
    """

    size: tuple[int, int] | None = None
    many: bool = False
    complete: bool = True
    last_pass: bool = True
    colour: dict[bytes, bytes] = field(default_factory=dict)
    exif: bytes = b""


def kind_of(data: bytes) -> str | None:
    """The format's name by the first bytes; None where it is none of ours."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith(_TIFF_STARTS):
        return "TIFF"
    if data.startswith(b"RIFF") and data[8:15] == b"WEBPVP8":
        return "WEBP"
    if data[4:8] == b"ftyp":
        length = min(int.from_bytes(data[:4], "big"), 256)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, length, 4))]
        if any(brand in (b"avif", b"avis") for brand in brands):
            return "AVIF"
        if any(brand in _HEIC_BRANDS for brand in brands):
            return "HEIC"
    return None


def look_into(kind: str, data: bytes, name: str) -> Promise:
    """Walk the container. InputError where decoding it would take out of all proportion to its pixels."""
    return _WALKS[kind](data, name)


def _png(data: bytes, name: str) -> Promise:
    found, at, count, profiles = Promise(), 8, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + min(length, 64)]
        if kind in (b"cICP", b"gAMA", b"cHRM", b"sRGB", b"iCCP"):
            found.colour[kind] = body
        elif kind == b"eXIf":
            found.exif = data[at + 8 : at + 8 + length]
        elif kind == b"acTL" and len(body) >= 4:
            found.many = struct.unpack_from(">I", body)[0] > 1
        elif kind == b"IEND":
            break
        count += 1
        profiles += kind == b"iCCP"
        if profiles > MAX_PROFILES:
            raise InputError(f"{name} is a PNG of more than {MAX_PROFILES} colour profiles; save it again")
        if count > MAX_CHUNKS:
            raise InputError(f"{name} is a PNG of more than {MAX_CHUNKS:,} chunks; save it again in another program")
        at += 12 + length
    return found


def _jpeg(data: bytes, name: str) -> Promise:
    at, pixels, scans, segments, junk, progressive = 2, 0, 0, 0, 0, False
    exif: list[bytes] = []
    components: set[int] = set()
    refined: set[tuple[int, bool]] = set()  # (component, whether DC) that a scan to the last bit has begun
    complete = False
    while match := _MARKER.search(data, at):
        marker = match[1][0]
        junk += match.start() - at if not scans else 0
        at = match.end()
        if marker == 0xD9:
            complete = True
            break
        if marker in (0x01, 0xD8):
            continue
        if at + 2 > len(data):
            break
        length = struct.unpack_from(">H", data, at)[0]
        body = data[at + 2 : at + length]
        segments += 1
        if marker == 0xDA:
            scans += 1
            if body and len(body) == 2 * body[0] + 4:
                start, end, low = body[-3], body[-2], body[-1] & 15
                if low == 0 and (start == 0 or end == 63):
                    refined |= {(body[1 + 2 * i], start == 0) for i in range(body[0])}
        elif marker in _FRAME and len(body) >= 6:
            pixels = max(pixels, struct.unpack_from(">H", body, 1)[0] * struct.unpack_from(">H", body, 3)[0])
            progressive = marker in _PROGRESSIVE
            components = set(body[6::3])
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        if scans > MAX_SCANS or scans * pixels > MAX_JPEG_WORK:
            raise InputError(f"{name} is a JPEG of {scans} scans or more, which keeps a decoder busy; save it again")
        if segments > MAX_SEGMENTS or junk > MAX_JUNK or sum(map(len, exif)) > MAX_EXIF:
            raise InputError(f"{name} is a JPEG with far more around its picture than usual; save it again without")
        at += length
    if exif:
        check_directories(b"".join(exif), name)
    wanted = {(component, dc) for component in components for dc in (True, False)}
    return Promise(complete=complete, last_pass=not progressive or bool(wanted) and wanted <= refined)


def _gif(data: bytes, name: str) -> Promise:
    found, frames = Promise(), 0
    at = 13 + _palette(data, 10)
    while at < len(data) and frames < 2:
        block = data[at]
        if block == 0x2C:
            frames += 1
            at += 11 + _palette(data, at + 9)
            at = _behind_blocks(data, at, 1_000_000) if frames == 1 else at
        elif block == 0x21:
            at = _behind_blocks(data, at + 2, 1_000_000)
        elif block == 0x3B:
            break
        else:
            at += 1
        if frames == 0 and at > MAX_GIF_LEAD:
            raise InputError(f"{name} is a GIF with {MAX_GIF_LEAD:,} bytes before its first frame; save it again")
    found.many = frames > 1
    return found


def _palette(data: bytes, at: int) -> int:
    """Bytes of the colour table that the flags at an offset announce."""
    flags = data[at] if at < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int, most: int) -> int:
    """Offset behind a chain of blocks, each with its length in front; the end of the data after `most` of them."""
    for _ in range(most):
        if at >= len(data):
            break
        length = data[at]
        at += 1 + length
        if length == 0:
            return at
    return len(data)


def _bmp(data: bytes, name: str) -> Promise:
    run_length = len(data) >= 34 and data[14] >= 40 and data[30] in (1, 2)
    if run_length and len(data) > MAX_RLE:
        raise InputError(f"{name} is a run-length coded BMP of more than {MAX_RLE:,} bytes; save it as PNG")
    return Promise()


def _tiff(data: bytes, name: str) -> Promise:
    check_directories(data, name)
    return Promise()


def _webp(data: bytes, name: str) -> Promise:
    """The size: Pillow's reader makes room for two canvases as soon as it is asked."""
    found = Promise()
    if data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        found.size = width, height
    elif data[12:16] == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        found.size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif data[12:16] == b"VP8 " and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        found.size = width, height
    return found


def _boxes(data: bytes, name: str) -> Promise:
    """AVIF and HEIC, whose readers walk them in C with limits of their own."""
    check_all_directories(data, name)
    found, at = Promise(), data.find(b"colrnclx")
    if 0 <= at <= len(data) - 15:
        primaries, transfer, matrix = struct.unpack_from(">3H", data, at + 8)
        found.colour[b"cICP"] = bytes(min(number, 255) for number in (primaries, transfer, matrix)) + b"\1"
    return found


_WALKS: dict[str, Callable[[bytes, str], Promise]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
    "WEBP": _webp,
    "AVIF": _boxes,
    "HEIC": _boxes,
}
