"""Pictures whose decoding is the attack, what a picture says of its colours, and pictures opened by many threads."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from ledits_min.errors import InputError
from ledits_min.files import opening
from ledits_min.files.opening import open_image, upright_size


def noise_picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def opened(path: Path, content: bytes) -> tuple[Image.Image, list[str]]:
    path.write_bytes(content)
    notices: list[str] = []
    return open_image(path, notices=notices), notices


# --- what would keep a decoder busy -----------------------------------------------------------------------------------


def directory(entries: list[tuple[int, int, int, int]], follows: int = 0) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + body + struct.pack("<I", follows)


def tiff_of_pages(pages: int) -> bytes:
    """One picture of 16 x 16, named by that many directories in a row."""
    start, each = 8 + 768, 2 + 12 * 8 + 4
    data = b"II*\0" + struct.pack("<I", start) + bytes(768)
    tags = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (278, 3, 1, 16), (279, 4, 1, 256)]  # fmt: skip
    pages_at = [start + each * page for page in range(pages)] + [0]
    return data + b"".join(directory(tags, follows) for follows in pages_at[1:])


def exif_that_promises() -> bytes:
    """Two thousand tags that all point at the same 60 kB."""
    tags = [(1000 + i, 7, 60_000, 8) for i in range(2000)]
    return (b"II*\0" + struct.pack("<I", 8) + directory(tags)).ljust(62_000, b"\0")


def tiff_with(*more: tuple[int, int, int, int]) -> bytes:
    data = encoded(noise_picture(16, 16), "TIFF")
    at = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[at : at + 2])[0]
    entries = [struct.unpack("<HHII", data[at + 2 + 12 * i : at + 14 + 12 * i]) for i in range(count)]
    place = len(data) + len(data) % 2
    return data[:4] + struct.pack("<I", place) + data[8:].ljust(place - 8, b"\0") + directory([*entries, *more])


def jpeg_of_scans(scans: int) -> bytes:
    data = encoded(noise_picture(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def jpeg_with(segments: bytes) -> bytes:
    data = encoded(noise_picture(), "JPEG")
    return data[:2] + segments + data[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def gif_with(lead: bytes) -> bytes:
    data = encoded(noise_picture(), "GIF")
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:at] + lead + data[at:]


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    data = encoded(noise_picture(), "PNG")
    made = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return data[:33] + made + data[33:]


def run_length_bmp(size: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 1024, 1024, 1, 8, 1, size, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + size, 0, 0, 1078) + header + bytes(1024) + b"\1\1" * (size // 2)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans": (lambda: jpeg_of_scans(2000), "scans or more"),
    "exif of a jpeg": (lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + exif_that_promises())), "promise more than"),
    "exif in pieces": (lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 80), "far more around"),
    "junk in a jpeg": (lambda: jpeg_with(segment(0xFE, b"") + bytes(100_000)), "far more around"),
    "segments": (lambda: jpeg_with(segment(0xFE, b"") * 20_000), "far more around"),
    "tags of a tiff": (lambda: tiff_with(*((5000 + i, 7, 60_000, 8) for i in range(1900))) + bytes(60_000),
                       "promise more than"),
    "numbers of a tiff": (lambda: tiff_with((50_000, 4, 500_000, 8)) + bytes(2_000_000), "a tag of 500,000 numbers"),
    "a directory of tags": (lambda: tiff_with(*((20_000 + i, 3, 1, 0) for i in range(3000))), "directory of 3,0"),
    "comments of a gif": (lambda: gif_with(b"\x21\xfe" + (b"\xff" + bytes(255)) * 5000 + b"\0"), "before its first"),
    "junk in a gif": (lambda: gif_with(bytes(1_100_000)), "before its first"),
    "profiles": (lambda: png_with(*[(b"iCCP", b"p\0\0" + zlib.compress(bytes(10**6)))] * 9), "colour profiles"),
    "chunks": (lambda: png_with(*[(b"prVt", b"")] * 200_001), "more than 200,000 chunks"),
    "runs": (lambda: run_length_bmp(5_000_000), "run-length coded"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_decoder_is_not_kept_busy(tmp_path: Path, name: str) -> None:
    make, says = ATTACKS[name]
    (tmp_path / "x.bin").write_bytes(make())
    with pytest.raises(InputError, match=says):
        open_image(tmp_path / "x.bin")


def test_an_avif_with_exif_that_promises_is_refused(tmp_path: Path) -> None:
    data = encoded(noise_picture(), "AVIF")
    (tmp_path / "x.avif").write_bytes(data + exif_that_promises())
    with pytest.raises(InputError, match="promise more than"):
        open_image(tmp_path / "x.avif")


def test_pages_are_never_counted(tmp_path: Path) -> None:
    """The time of 60,000 pages is that of two: nothing asks for the second one."""
    (tmp_path / "x.tif").write_bytes(tiff_of_pages(60_000))
    asked: list[int] = []
    plain = TiffImageFile._seek

    def counting(self: Any, frame: int) -> None:
        asked.append(frame)
        plain(self, frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiffImageFile, "_seek", counting)
        notices: list[str] = []
        assert open_image(tmp_path / "x.tif", notices=notices).size == (16, 16)
    assert asked == [0]
    assert any("more than one frame or page" in notice for notice in notices)


def test_ordinary_pictures_are_far_from_every_bound(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description" * 100
    exif.get_ifd(0x8769)[0x9286] = b"a comment" * 1000
    for file_format, more in (("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("TIFF", {}), ("AVIF", {})):
        picture, notices = opened(tmp_path / "x.bin", encoded(noise_picture(), file_format, exif=exif, **more))
        assert picture.size == (64, 48)
        assert notices == []


def test_a_file_of_gigabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.write(encoded(noise_picture(), "PNG"))
        file.truncate(2**33)  # sparse
    with pytest.raises(InputError, match="8,589,934,592 bytes long, more than a picture"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("side", [10_000, 16_383])
def test_a_webp_is_measured_before_room_is_made(tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = b"VP8X" + struct.pack("<IB3x", 10, 2) + (side - 1).to_bytes(3, "little") * 2
    whole = encoded(noise_picture(), "WEBP", lossless=True)
    data = b"RIFF" + struct.pack("<I", len(chunk) + len(whole) - 8) + b"WEBP" + chunk + whole[12:]
    monkeypatch.setitem(opening._READERS, "WEBP", None)  # type: ignore[arg-type]
    (tmp_path / "x.webp").write_bytes(data)
    with pytest.raises(InputError, match=f"{side} x {side}, more than 64 megapixels"):
        open_image(tmp_path / "x.webp")


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_open_pictures_and_the_process_stays_as_it_was(tmp_path: Path) -> None:
    """File descriptor 2 and the warning filters are the same objects at every moment, and the pixels too."""
    (tmp_path / "p.png").write_bytes(png_with((b"acTL", bytes(8))))  # of which Pillow warns
    (tmp_path / "p.tif").write_bytes(encoded(noise_picture(), "TIFF", compression="tiff_lzw"))
    (tmp_path / "broken.tif").write_bytes(encoded(noise_picture(), "TIFF", compression="tiff_lzw")[:900])
    filters, stderr = list(warnings.filters), os.fstat(2)
    wanted = {name: open_image(tmp_path / name).tobytes() for name in ("p.png", "p.tif")}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(40):
            for name, pixels in wanted.items():
                if open_image(tmp_path / name).tobytes() != pixels:
                    wrong.append(name)
            try:
                open_image(tmp_path / "broken.tif")
            except InputError:
                pass
            else:
                wrong.append("broken.tif was opened")
            if not os.path.samestat(os.fstat(2), stderr) or list(warnings.filters) != filters:
                wrong.append("the process was changed")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(warnings.filters) == filters


# --- colours ----------------------------------------------------------------------------------------------------------


def grey_png(depth: int, rows: np.ndarray[Any, Any], *chunks: tuple[bytes, bytes]) -> bytes:
    height, width = rows.shape
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
        lines = [np.packbits(row).tobytes() for row in bits]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)), *chunks,
             (b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))), (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_shows_white_at_every_depth(tmp_path: Path, depth: int) -> None:
    top = 2**depth - 1
    clear = {1: 0, 16: 40_000}.get(depth, 1)
    rows = np.full((16, 16), top if depth == 1 else 0)
    rows[:, :8] = clear
    found, notices = opened(tmp_path / "x.png", grey_png(depth, rows, (b"tRNS", struct.pack(">H", clear))))
    assert found.getpixel((2, 2)) == (255, 255, 255)
    assert found.getpixel((12, 2)) == ((255,) * 3 if depth == 1 else (0, 0, 0))
    assert any("laid over white" in notice for notice in notices)


def test_a_neighbouring_grey_of_16_bits_stays(tmp_path: Path) -> None:
    rows = np.full((16, 16), 40_001)
    found, notices = opened(tmp_path / "x.png", grey_png(16, rows, (b"tRNS", struct.pack(">H", 40_000))))
    assert found.getpixel((2, 2)) == (156, 156, 156)
    assert notices == []


def test_a_transparent_colour_of_16_bits_is_told(tmp_path: Path) -> None:
    """Pillow keeps 8 bits of such a picture: which of its pixels had the colour is not known any more."""
    line = b"\0" + struct.pack(">3H", 300, 2, 3) * 16
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)), (b"tRNS", struct.pack(">3H", 300, 2, 3)),
             (b"IDAT", zlib.compress(line * 16)), (b"IEND", b"")]  # fmt: skip
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    found, notices = opened(tmp_path / "x.png", b"\x89PNG\r\n\x1a\n" + body)
    assert found.getpixel((0, 0)) == (1, 0, 0)
    assert ["(300, 2, 3), which is not applied" in notice for notice in notices] == [True]


@pytest.mark.parametrize("gamma", [100_000, 55_556, 45_455, 45_000])
def test_the_gamma_of_a_png_is_used(tmp_path: Path, gamma: int) -> None:
    rows = np.repeat(np.arange(256)[None], 40, axis=0)
    found, notices = opened(tmp_path / "x.png", grey_png(8, rows, (b"gAMA", struct.pack(">I", gamma))))
    light = (np.arange(256) / 255.0) ** (100_000 / gamma)
    wanted = 255.0 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    if abs(gamma - 45_455) <= 1000:
        wanted = np.arange(256.0)
    assert np.abs(np.asarray(found)[0, :, 0] - wanted).max() <= 0.5
    assert notices == []


def test_srgb_and_a_profile_come_before_gamma(tmp_path: Path) -> None:
    rows, gamma = np.repeat(np.arange(256)[None], 40, axis=0), (b"gAMA", struct.pack(">I", 100_000))
    found, _ = opened(tmp_path / "x.png", grey_png(8, rows, (b"sRGB", b"\0"), gamma))
    assert np.array_equal(np.asarray(found)[0, :, 0], np.arange(256))


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        ((b"cICP", bytes([9, 16, 0, 1])), "high dynamic range"),
        ((b"cICP", bytes([12, 13, 0, 1])), "a wider range of colours"),
        ((b"cICP", bytes([1, 13, 0, 1])), ""),
        ((b"cHRM", struct.pack(">8I", 31_270, 32_900, 68_000, 32_000, 26_500, 69_000, 15_000, 6_000)), "cHRM"),
        ((b"cHRM", struct.pack(">8I", 31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)), ""),
    ],
)
def test_colours_that_are_not_converted_are_told(tmp_path: Path, chunk: tuple[bytes, bytes], says: str) -> None:
    found, notices = opened(tmp_path / "x.png", png_with(chunk))
    assert found.tobytes() == noise_picture().tobytes()
    assert [says in notice for notice in notices] == [True] * bool(says)


# --- AVIF, HEIC, and JPEGs that were cut ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pictures_of_phones(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "HEIF":
        heif = pytest.importorskip("pillow_heif", reason="the [heif] extra is not installed")
        buffer = io.BytesIO()
        file = heif.from_pillow(noise_picture())
        file.save(buffer, format="HEIF", quality=95, chroma=444, exif=exif.tobytes())
        content = buffer.getvalue()
    else:
        content = encoded(noise_picture(), "AVIF", quality=95, exif=exif)
    found, notices = opened(tmp_path / "x.bin", content)
    wanted = noise_picture().transpose(Image.Transpose.ROTATE_270) if orientation == 6 else noise_picture()
    assert found.size == upright_size(tmp_path / "x.bin") == wanted.size
    assert np.abs(np.asarray(found, float) - np.asarray(wanted, float)).mean() < 4.0
    assert notices == []
    (tmp_path / "half.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged or cut short"):
        open_image(tmp_path / "half.bin")


def test_without_pillow_heif_there_is_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    with pytest.raises(InputError, match=r"is a HEIC picture, which needs pillow-heif; `pip install"):
        open_image(tmp_path / "x.heic")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lost", [2, 3, 40])
def test_a_jpeg_that_lost_its_last_bytes_is_taken_with_a_note(tmp_path: Path, progressive: bool, lost: int) -> None:
    content = encoded(noise_picture(320, 320), "JPEG", progressive=progressive, quality=95)
    whole, _ = opened(tmp_path / "x.jpg", content)
    found, notices = opened(tmp_path / "x.jpg", content[:-lost])
    same = np.asarray(found)[:280].astype(int) - np.asarray(whole)[:280]
    assert np.abs(same).mean() < (2.0 if progressive else 1e-9)
    assert ["cut short by a little" in notice or "end marker" in notice for notice in notices] == [True]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_jpeg_that_lost_more_is_refused(tmp_path: Path, progressive: bool, share: float) -> None:
    content = encoded(noise_picture(320, 320), "JPEG", progressive=progressive, quality=95)
    (tmp_path / "x.jpg").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="damaged or cut short"):
        open_image(tmp_path / "x.jpg")
