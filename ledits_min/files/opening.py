"""Pictures as people bring them, to upright 8-bit sRGB. Nothing here imports torch or changes a setting of the process:
any number of threads may open pictures at once.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ledits_min.errors import InputError, quoted, warn
from ledits_min.files.colour import Reading, colours_said
from ledits_min.files.containers import Promise, kind_of, look_into
from ledits_min.files.door import read_file
from ledits_min.files.tags import orientation

MAX_PIXELS = 64_000_000
MAX_BYTES = 2**29  # of a file; 64 megapixels in four colours of 16 bits, not compressed
MIN_SIDE = 16
MAX_ASPECT = 8
MAX_MISSING = 0.1  # the share of its rows that a JPEG may have lost at its end

_WANTED = "PNG, JPEG, WEBP, TIFF, BMP, GIF, AVIF or HEIC"
_RAW_SUFFIXES = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw")
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypcrx", "a camera RAW file"),
    (4, b"ftyp", "a video"),
    (0, b"\x00\x00\x00\x0cjP", "a JPEG 2000 picture"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (0, b"\x00\x00\x00\x0cJXL", "a JPEG XL picture"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"SIMPLE", "a FITS file"),
    (0, b"\x00\x00\x01\x00", "an icon"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"FUJIFILM", "a camera RAW file"),
    (0, b"PK", "a zip archive"),
    (0, b"version https://git-lfs", "a git-lfs pointer, not the picture"),
)
# What Pillow's readers raise on damaged files: they parse with struct, indices and int(), and rarely wrap it.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AssertionError, AttributeError,
    struct.error, zlib.error,
)  # fmt: skip


_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


ImageLike = Image.Image | str | os.PathLike[str] | np.ndarray[Any, Any]


def open_pictures(image: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """One picture or several, as RGB."""
    notices: list[str] = []
    sources = list(image) if isinstance(image, list | tuple) else [image]
    if not sources:
        raise InputError("no image was given; pass one picture or a list of at least one")
    pictures = [open_image(source, notices=notices) for source in sources]  # type: ignore[arg-type]
    for notice in notices:
        warn(notice)
    return pictures


def open_image(source: ImageLike, *, notices: list[str] | None = None) -> Image.Image:
    """An upright 8-bit sRGB picture, whatever it was: alpha over white, first frame, colour profile applied.

    source   a file (PNG, JPEG, WEBP, TIFF, BMP, GIF, AVIF, HEIC), a PIL image, or a uint8 array (H, W, 3)
    notices  receives one line for everything that was not taken as it came

    InputError for anything else, for a damaged file, for one that would keep its decoder busy, and outside
    16 px .. 64 megapixels or 8:1. libtiff, behind a damaged TIFF, may write lines of its own to file descriptor 2.
    """
    notices = [] if notices is None else notices
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(f"image array is {source.dtype} {source.shape}; uint8 (H, W, 3) is wanted")
        check_size((source.shape[1], source.shape[0]), "image array")
        return Image.fromarray(np.ascontiguousarray(source))
    if isinstance(source, Image.Image):
        return _read(_Opened(source, "image", Promise()), notices)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise InputError(f"image is {kind}; a path, a PIL image or a uint8 array (H, W, 3) is wanted")
    return _read(_open_file(source), notices)


def upright_size(source: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) that `open_image` would give the file, without decoding it wherever the header tells.

    InputError as from `open_image`, as far as the header shows.
    """
    opened = _open_file(source)
    if opened.kind == "TIFF":  # turned as Pillow decodes it
        return _read(opened, []).size
    width, height = opened.image.size
    return (height, width) if opened.orientation() in range(5, 9) else (width, height)


@dataclass
class _Opened:
    """A picture that is known by its header and not yet decoded; `data` is its whole file, b"" where it is none."""

    image: Image.Image
    name: str
    promise: Promise
    kind: str = ""
    data: bytes = b""

    def orientation(self) -> int | None:
        """EXIF's, or XMP's where there is no EXIF; None where the data are damaged."""
        info = self.image.info
        if not self.kind:  # somebody's own image: it may hold EXIF data that are in no file
            try:
                return int(self.image.getexif().get(0x0112, 1))
            except DAMAGED:
                return None
        exif = self.promise.exif or info.get("exif") or b""
        if not exif and isinstance(profile := info.get("Raw profile type exif"), str):
            try:
                exif = bytes.fromhex("".join(profile.split("\n")[3:]))
            except ValueError:
                return None
        if exif:
            return orientation(exif, self.name)
        xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
        match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
        return int(match[1]) if match else 1


def _heic(file: io.BytesIO) -> ImageFile:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise InputError("needs pillow-heif; `pip install 'ledits-min[heif]'` brings it") from None
    opened: ImageFile = HeifImageFile(file)
    return opened


def _avif(file: io.BytesIO) -> ImageFile:
    try:
        from PIL.AvifImagePlugin import SUPPORTED, AvifImageFile
    except ImportError:  # Pillow before 11.3
        SUPPORTED = False
    if not SUPPORTED:
        raise InputError("needs a Pillow with AVIF; `pip install -U pillow` brings it")
    return AvifImageFile(file)


# The readers themselves: `Image.open` tries them through settings of the whole process, and warns through others.
_READERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "TIFF": TiffImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "AVIF": _avif,
    "HEIC": _heic,
}


def _open_file(source: str | os.PathLike[str]) -> _Opened:
    """The picture, not yet decoded, from bytes that are read once: what is checked is what is decoded."""
    name, path = quoted(os.fspath(source)), Path(source)
    data = read_file(source, f"a picture ({_WANTED})", MAX_BYTES)
    if path.suffix.lower() in _RAW_SUFFIXES:  # TIFF inside, with a thumbnail as first page
        raise InputError(f"{name} is a camera RAW file by its name; develop it to {_WANTED} first")
    kind = kind_of(data)
    if kind is None:
        raise InputError(_why_no_picture(data[:512], name))
    promise = look_into(kind, data, name)
    if promise.size is not None:
        check_size(promise.size, name)
    try:
        image = _READERS[kind](io.BytesIO(data))
    except InputError as error:
        raise InputError(f"{name} is {'an' if kind == 'AVIF' else 'a'} {kind} picture, which {error}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} is far above {MAX_PIXELS / 1e6:.0f} megapixels; scale it down") from None
    except DAMAGED as error:
        raise _damaged(name, error) from error
    check_size(image.size, name)  # before decoding: a small file can promise gigabytes
    if kind in ("TIFF", "WEBP", "AVIF", "HEIC"):  # these know without counting to the end
        promise.many = bool(getattr(image, "is_animated", False))
    return _Opened(image, name, promise, kind, data)


def _why_no_picture(start: bytes, name: str) -> str:
    """Say what a file is that is none of ours, where its first bytes give it away."""
    for offset, magic, meaning in _MAGIC:
        if start[offset:].startswith(magic):
            return f"{name} is {meaning}; convert it to {_WANTED}"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return f"{name} is an SVG drawing; render it to {_WANTED} first"
    if text.startswith(b"<"):
        return f"{name} is an HTML or XML page, not a picture: its download failed; download it again"
    return f"{name} is not a picture, or its first bytes are damaged; {_WANTED} is wanted"


def _damaged(name: str, error: BaseException) -> InputError:
    return InputError(f"{name} is damaged or cut short ({_reason(error)}); use a whole copy of it")


def _reason(error: BaseException) -> str:
    return quoted(error, 100).strip("'") or type(error).__name__


def check_size(size: tuple[int, int], name: str) -> None:
    """InputError for a picture outside 16 px .. 64 megapixels or 8:1."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is {width} x {height}, more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down first"
        )
    if min(size) < MIN_SIDE:
        raise InputError(f"{name} is {width} x {height}; at least {MIN_SIDE} pixels per side are wanted")
    if max(size) > MAX_ASPECT * min(size):
        raise InputError(f"{name} is {width} x {height}, longer than {MAX_ASPECT}:1; crop it first")


def _read(opened: _Opened, notices: list[str]) -> Image.Image:
    """Decode; upright 8-bit sRGB with nothing else attached."""
    name = opened.name
    check_size(opened.image.size, name)
    if opened.promise.many:
        notices.append(f"{name} has more than one frame or page; the first is used")
    try:
        reading = colours_said(opened.kind, opened.image, opened.promise, name)  # before its tiles are gone
        image = _decoded(opened, notices)
        check_size(image.size, name)  # a frame may be larger than its picture
        rgb = _upright(opened, _to_srgb(image, reading, name, notices), notices)
    except InputError:
        raise
    except DAMAGED as error:
        raise _damaged(name, error) from error
    rgb.info = {}  # an orientation left here would be saved, and applied a second time
    return rgb


def _decoded(opened: _Opened, notices: list[str]) -> Image.Image:
    """The pixels. A JPEG that lost its last bytes is taken with what its decoder puts there, and a notice."""
    image = opened.image
    try:
        image.load()
    except OSError:
        if opened.kind != "JPEG" or opened.promise.complete or not opened.promise.last_pass:
            raise
        if not image.info.get("progressive") and _missing_rows(image) > MAX_MISSING:
            raise
        whole = JpegImageFile(io.BytesIO(opened.data + b"\xff\xd9"))
        whole.load()
        notices.append(f"{opened.name} is cut short by a little; what is missing at its end is filled in")
        return whole
    if not opened.promise.complete:
        notices.append(f"{opened.name} ends without an end marker; its last bytes may be missing")
    return image


def _missing_rows(image: Image.Image) -> float:
    """The share of rows at the bottom that the decoder had not come to: they are still what they were made as."""
    box = image.im.getbbox()
    return 1.0 - (0 if box is None else box[3]) / image.height


def _to_srgb(image: Image.Image, reading: Reading, name: str, notices: list[str]) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point values of unknown range; save it with 8 or 16 bits")
    notices += reading.notices
    if image.mode.startswith("I"):
        colour, alpha = _from_16_bit(image, reading, name)
    else:
        if "transparency" in image.info and reading.transparency_factor != 1:
            image.info["transparency"] *= reading.transparency_factor
        alpha = _alpha(image)
        colour = _apply_profile(image, name, notices)
    if colour.mode != "RGB":
        if colour.mode == "CMYK":
            notices.append(f"{name} is CMYK without a usable colour profile; its colours are approximate")
        # Through RGBA: a palette with transparency loses its colours otherwise.
        colour = colour.convert("RGBA").convert("RGB") if alpha is not None else colour.convert("RGB")
    if reading.table is not None:
        colour = colour.point(reading.table)
    if alpha is None or alpha.getextrema() == (255, 255):
        return colour.copy() if colour is image else colour
    notices.append(f"{name} is partly transparent; it is laid over white")
    return Image.composite(colour, Image.new("RGB", image.size, "white"), alpha)


def _from_16_bit(image: Image.Image, reading: Reading, name: str) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey, scaled by 1/257 so that 65535 becomes 255 (Pillow's own conversion clips); and its alpha."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise InputError(f"{name} holds values in {values.min()} .. {values.max()}; save it with 8 or 16 bits")
    grey = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8)).convert("RGB")
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey, None
    return grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    plain = image.convert("LA") if image.mode == "La" else image
    return plain.convert("RGBA").getchannel("A")


def _apply_profile(image: Image.Image, name: str, notices: list[str]) -> Image.Image:
    """The colours as sRGB where an embedded profile says they are something else; else the image itself."""
    data = image.info.get("icc_profile")
    if not data:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image
        colour = image.convert({"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space])
        if (colour.mode == "CMYK") != (image.mode == "CMYK"):
            raise ImageCms.PyCMSError(f"a {space} profile in a picture of mode {image.mode}")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(colour, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, *DAMAGED):
        notices.append(f"{name} has a colour profile that cannot be used; its colours are taken as sRGB")
        return image
    return image if converted is None else converted


def _upright(opened: _Opened, rgb: Image.Image, notices: list[str]) -> Image.Image:
    """`rgb` turned the way its EXIF data say."""
    if opened.kind == "TIFF":
        return rgb  # turned as it was decoded
    turned = opened.orientation()
    if turned is None:
        notices.append(f"{opened.name} has damaged EXIF data; it is taken as upright")
        return rgb
    bare = Image.Exif()
    bare[0x0112] = turned
    rgb.info = {"exif": bare.tobytes()} if turned in range(2, 9) else {}
    return ImageOps.exif_transpose(rgb) if rgb.info else rgb
