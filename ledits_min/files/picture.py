"""Pictures in and out: any usual file to 8-bit sRGB, sizes, tensors in [-1, 1], files that are whole or absent."""

from __future__ import annotations

import io
import os
import secrets
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ledits_min.errors import InputError, RunError, quoted, warn

ImageLike = Image.Image | str | os.PathLike[str] | np.ndarray[Any, Any]

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # short: Pillow's other readers were attacked
MAX_PIXELS = 64_000_000
MIN_SIDE = 16
MAX_ASPECT = 8
MIN_LATENTS, MAX_SIDE = 8, 4096  # at the model's size: latents of the shorter side, pixels of the longer
OUTPUT_SIDES = {".png": 2**31 - 1, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # what a format can hold

_WANTED = "PNG, JPEG, WEBP, TIFF, BMP or GIF"
_RAW_SUFFIXES = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw")
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftypcrx", "a camera RAW file"),
    (4, b"ftyphei", "a HEIC picture"),
    (4, b"ftyphev", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIC picture"),
    (4, b"ftypmsf1", "a HEIC picture"),
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
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AssertionError, AttributeError,
    struct.error, zlib.error,
)  # fmt: skip


def open_image(source: ImageLike, *, notices: list[str] | None = None) -> Image.Image:
    """An upright 8-bit sRGB picture, whatever it was: alpha over white, first frame, colour profile applied.

    source   a file (PNG, JPEG, WEBP, TIFF, BMP, GIF), a PIL image, or a uint8 array (H, W, 3)
    notices  receives one line for everything that was not taken as it came

    InputError for anything else, for a damaged file, and outside 16 px .. 64 megapixels or 8:1.
    """
    notices = [] if notices is None else notices
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(f"image array is {source.dtype} {source.shape}; uint8 (H, W, 3) is wanted")
        _check_size((source.shape[1], source.shape[0]), "image array")
        return Image.fromarray(np.ascontiguousarray(source))
    if isinstance(source, Image.Image):
        return _read(source, "image", notices)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise InputError(f"image is {kind}; a path, a PIL image or a uint8 array (H, W, 3) is wanted")
    name = quoted(os.fspath(source))
    with _opened(Path(source), name) as (image, frames):
        if frames > 1:
            notices.append(f"{name} has {frames} frames or pages; the first is used")
        return _read(image, name, notices)


def upright_size(source: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) that `open_image` would give the file, without decoding it wherever the header tells.

    InputError as from `open_image`, as far as the header shows.
    """
    name = quoted(os.fspath(source))
    with _opened(Path(source), name) as (image, _):
        _check_size(image.size, name)
        behind = image.format == "PNG" and "exif" not in image.info and b"eXIf" in Path(source).read_bytes()
        if image.format != "TIFF" and not behind:  # a TIFF turns as Pillow decodes it; a PNG may tell behind its pixels
            turned = image.format != "PNG" or "exif" in image.info
            width, height = image.size
            return (height, width) if turned and _orientation(image) in range(5, 9) else (width, height)
    return open_image(source).size


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


def fit_size(picture: tuple[int, int], size: int | tuple[int, int] | None, native: int, factor: int) -> tuple[int, int]:
    """(width, height) the model works at: both multiples of `factor`, the pixels of one latent.

    size  the longer side, with the aspect kept; or (width, height); None: `native` for the longer side, or more
          where the shorter one would have fewer than 8 latents. InputError outside 8 latents .. 4096 px.
    """
    least = MIN_LATENTS * factor
    if size is None:
        longer = max(float(native), least * max(picture) / min(picture))
    elif isinstance(size, tuple):
        if len(size) != 2 or any(type(side) is not int for side in size):
            raise InputError(f"size is {size!r}; two whole numbers (width, height) are wanted")
        picture, longer = size, float(max(size))
    elif type(size) is int:
        longer = float(size)
    else:
        raise InputError(f"size is {size!r}; a whole number or (width, height) is wanted")
    if not (0 < longer <= MAX_SIDE and min(picture) > 0):
        raise InputError(f"size {_by(size, longer)} must have sides in {least} .. {MAX_SIDE} pixels")
    scale = longer / max(picture)
    width, height = (max(1, round(side * scale / factor)) * factor for side in picture)
    if min(width, height) < least:
        why = f"is too small for this model, which needs {least} pixels a side; pass a larger one"
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


def save_image(image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write PNG, JPEG or WEBP by the name's ending, atomically; a PNG carries `metadata` as text."""
    suffix = Path(path).suffix.lower()
    check_output_picture(path, image.size)
    buffer = io.BytesIO()
    if suffix == ".png":
        text = PngImagePlugin.PngInfo()
        for key, value in (metadata or {}).items():
            text.add_text(key, value)
        image.save(buffer, format="PNG", pnginfo=text)
    elif suffix == ".webp":
        image.save(buffer, format="WEBP", quality=95)
    else:
        image.save(buffer, format="JPEG", quality=95, subsampling=0)
    atomic_write(path, buffer.getvalue())


def check_output_picture(path: str | Path, size: tuple[int, int]) -> None:
    """InputError unless the name asks for a format we write, and that can hold a picture of this size."""
    suffix = Path(path).suffix.lower()
    if suffix not in OUTPUT_SIDES:
        raise InputError(f"{quoted(path)} does not end in a format we write; use {', '.join(OUTPUT_SIDES)}")
    if max(size) > OUTPUT_SIDES[suffix]:
        raise InputError(
            f"{quoted(path)}: {suffix[1:].upper()} holds {OUTPUT_SIDES[suffix]} pixels a side, the picture "
            f"is {size[0]} x {size[1]}; use .png"
        )


def atomic_write(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all: a new one beside it, synced, then renamed over it.

    `content` is the bytes, or a function that writes them to the path it is given. OSError as for any file, under the
    final name. A process that is killed outright may leave `.ledits-*.tmp` beside it, never a broken file.
    """
    final = Path(os.path.realpath(path))  # an existing link keeps pointing at the file it names
    temporary = final.with_name(f".ledits-{secrets.token_hex(6)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
            temporary.chmod(mode)  # a writer may put a private file of its own in place
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException as error:  # Ctrl-C and SIGTERM too: nothing may stay behind
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(final)) from error  # not the temporary's name, or none
        raise


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[Image.Image, int]]:
    """The picture, not yet decoded, and how many frames or pages it has."""
    with warnings.catch_warnings(), _open_file(path, name) as file:
        warnings.simplefilter("ignore")  # what matters of Pillow's warnings is refused or noted by the caller
        try:
            image = Image.open(file, formats=list(FORMATS))
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        except UnidentifiedImageError:
            raise InputError(_why_no_picture(file, path, name)) from None
        except Image.DecompressionBombError:
            raise InputError(f"{name} is far above {MAX_PIXELS / 1e6:.0f} megapixels; scale it down") from None
        except _DAMAGED as error:
            raise _damaged(name, error) from error
        yield image, frames


def _open_file(path: Path, name: str) -> io.BufferedReader:
    """The file opened, once it is known to be a regular one that is not empty."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise InputError(f"{name} is {what}; a picture ({_WANTED}) is wanted here")
        if status.st_size == 0:
            raise InputError(f"{name} is an empty file; a picture ({_WANTED}) is wanted here")
        if path.suffix.lower() in _RAW_SUFFIXES:  # TIFF inside, with a thumbnail as first page
            raise InputError(f"{name} is a camera RAW file by its name; develop it to {_WANTED} first")
        return open(path, "rb")
    except FileNotFoundError:
        why = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise InputError(f"{name} {why}; check the path") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is not a usable path ({error}); check it") from None


def _why_no_picture(file: io.BufferedReader, path: Path, name: str) -> str:
    """Say what a file is that Pillow does not take for a picture, where its first bytes give it away."""
    file.seek(0)
    start = file.read(512)
    for offset, magic, meaning in _MAGIC:
        if start[offset:].startswith(magic):
            return f"{name} is {meaning}; convert it to {_WANTED}"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return f"{name} is an SVG drawing; render it to {_WANTED} first"
    if text.startswith(b"<"):
        return f"{name} is an HTML or XML page, not a picture: its download failed; download it again"
    if path.suffix.lower() in (".heic", ".heif"):
        return f"{name} is no picture that can be read here; convert it to {_WANTED}"
    return f"{name} is not a picture, or its first bytes are damaged; {_WANTED} is wanted"


def _damaged(name: str, error: BaseException) -> InputError:
    return InputError(f"{name} is damaged or cut short ({_reason(error)}); use a whole copy of it")


def _reason(error: BaseException) -> str:
    return quoted(error, 100).strip("'") or type(error).__name__


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is {width} x {height}, more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down first"
        )
    if min(size) < MIN_SIDE:
        raise InputError(f"{name} is {width} x {height}; at least {MIN_SIDE} pixels a side are wanted")
    if max(size) > MAX_ASPECT * min(size):
        raise InputError(f"{name} is {width} x {height}, longer than {MAX_ASPECT}:1; crop it first")


def _read(image: Image.Image, name: str, notices: list[str]) -> Image.Image:
    """Decode `image`, which may still be lazy; upright 8-bit sRGB with nothing else attached."""
    _check_size(image.size, name)  # before decoding: a small file can promise gigabytes
    try:
        with quiet_stderr() if image.format == "TIFF" else nullcontext():
            image.load()
        rgb = _upright(image, _to_srgb(image, name, notices), name, notices)
    except InputError:
        raise
    except _DAMAGED as error:
        raise _damaged(name, error) from error
    rgb.info = {}  # an orientation left here would be saved, and applied a second time
    return rgb


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence for libraries that tell their troubles to the terminal by themselves, and raise what matters as well."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nothing to keep quiet
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _to_srgb(image: Image.Image, name: str, notices: list[str]) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point values of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_16_bit(image, name)
    alpha = _alpha(image)
    colour = _apply_profile(image, name, notices)
    if colour.mode != "RGB":
        if colour.mode == "CMYK":
            notices.append(f"{name} is CMYK without a usable colour profile; its colours are approximate")
        # Through RGBA: a palette with transparency loses its colours otherwise.
        colour = colour.convert("RGBA").convert("RGB") if alpha is not None else colour.convert("RGB")
    if alpha is None or alpha.getextrema() == (255, 255):
        return colour.copy() if colour is image else colour
    notices.append(f"{name} is partly transparent; it is laid over white")
    return Image.composite(colour, Image.new("RGB", image.size, "white"), alpha)


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey, scaled by 1/257 so that 65535 becomes 255 (Pillow's own conversion clips)."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise InputError(f"{name} holds values in {values.min()} .. {values.max()}; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8)).convert("RGB")


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
    except (ImageCms.PyCMSError, *_DAMAGED):
        notices.append(f"{name} has a colour profile that cannot be used; its colours are taken as sRGB")
        return image
    return image if converted is None else converted


def _upright(source: Image.Image, rgb: Image.Image, name: str, notices: list[str]) -> Image.Image:
    """`rgb` turned the way the EXIF data of `source` says."""
    orientation = _orientation(source)
    if orientation is None:
        notices.append(f"{name} has damaged EXIF data; it is taken as upright")
        return rgb
    bare = Image.Exif()
    bare[0x0112] = orientation
    rgb.info = {"exif": bare.tobytes()} if orientation in range(2, 9) else {}
    return ImageOps.exif_transpose(rgb) if rgb.info else rgb


def _orientation(image: Image.Image) -> int | None:
    """EXIF's, 1 where it says nothing; None where the data are damaged."""
    try:
        orientation: int = image.getexif().get(0x0112, 1)
    except _DAMAGED:
        return None
    return orientation


def _by(size: int | tuple[int, int] | None, longer: float) -> str:
    return f"{size[0]} x {size[1]}" if isinstance(size, tuple) else f"{longer:g}"


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
