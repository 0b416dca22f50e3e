"""Files that are no picture, or not one that can be used: one line, exit code 2, nothing written."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

Row = dict[str, Any]


def bad(name: str, command: str | list[str], says: str, files: Mapping[str, bytes] | None = None, **more: Any) -> Row:
    """What is typed, what the line must say, what lies there beforehand; `more` as in the Row of conftest.py."""
    return {"name": name, "command": command, "says": says, "files": files or {}, **more}


def picture(file_format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: Any) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    (Image.new("F", size, 0.5) if mode == "F" else image.convert(mode)).save(buffer, format=file_format, **options)
    return buffer.getvalue()


def png_promising(width: int, height: int) -> bytes:
    """A small PNG whose header promises another size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + picture()[33:]


def image_rows() -> list[Row]:
    """Files that are no picture, or not one that can be used."""
    gif = picture("GIF", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    contents: list[tuple[str, str, bytes, str]] = [
        ("empty", "x.png", b"", "empty file"),
        ("text", "x.png", b"hello, this is not a picture\n" * 9, "not a picture"),
        ("html", "x.jpg", b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML.*download"),
        ("svg", "x.png", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        ("pdf", "x.png", b"%PDF-1.7\n" + bytes(200), "PDF"),
        ("postscript", "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(99), "PostScript"),
        ("fits", "x.png", b"SIMPLE  =                    T" + bytes(2880), "FITS"),
        ("icon", "x.ico", b"\0\0\1\0\1\0\x10\x10" + bytes(99), "icon"),
        ("jpeg 2000", "x.jp2", picture("JPEG2000"), "JPEG 2000"),
        ("avif", "x.avif", b"\0\0\0\x20ftypavif" + bytes(99), "damaged"),
        ("heic", "x.heic", b"\0\0\0\x18ftypheic" + bytes(99), "damaged|HEIC"),
        ("heic as jpg", "x.jpg", b"\0\0\0\x18ftypmif1" + bytes(99), "damaged|HEIC"),
        ("raw", "x.nef", picture("TIFF"), "RAW"),
        ("photoshop", "x.psd", b"8BPS\0\1" + bytes(99), "Photoshop"),
        ("video", "x.mp4", b"\0\0\0\x18ftypisom" + bytes(99), "video"),
        ("zip", "x.png", b"PK\x03\x04" + bytes(99), "zip archive"),
        ("numpy", "x.npy", b"\x93NUMPY" + bytes(99), "NumPy"),
        ("lfs pointer", "x.png", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ("truncated png", "x.png", picture()[:900], "damaged or cut short"),
        ("truncated jpeg", "x.jpg", picture("JPEG")[:-300], "damaged or cut short"),
        ("truncated webp", "x.webp", picture("WEBP")[:-300], "damaged|not a picture"),
        ("truncated gif", "x.gif", gif[:500], "damaged|not a picture"),
        ("only magic", "x.png", b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
        ("95 megapixels", "x.png", png_promising(9_500, 10_000), "64 megapixels"),
        ("400 megapixels", "x.png", png_promising(20_000, 20_000), "64 megapixels"),
        ("text bomb", "x.png", _text_bomb(), "damaged"),
        ("float tiff", "x.tif", picture("TIFF", "F"), "floating-point"),
        ("one pixel", "x.png", picture(size=(1, 1)), "at least 16 pixels"),
        ("a line", "x.png", picture(size=(3, 500)), "at least 16 pixels"),
        ("a strip", "x.png", picture(size=(20, 400)), "8:1"),
        ("a checkpoint as picture", "x.ckpt", b"PK\x03\x04" + bytes(99), "zip archive"),
    ]
    return [
        *(bad(f"image: {name}", f"edit {file} --add hat", says, {file: data}) for name, file, data, says in contents),
        bad("image: missing", "edit none.png", "'none.png' does not exist", process=True),
        bad("image: truncated, in a process", "edit x.jpg", "damaged", {"x.jpg": picture("JPEG")[:-300]}, process=True),
        bad("image: folder", "edit .", "folder"),
        bad("image: dangling link", "edit x.png", "link", make=lambda w: (w.place / "x.png").symlink_to("gone.png")),
        bad("image: link to itself", "edit x.png", "cannot be read",
            make=lambda w: (w.place / "x.png").symlink_to("x.png")),
        bad("image: below a file", "edit p.png/x.png", "Not a directory"),
        bad("image: pipe", "edit x.png", "not a regular file", make=lambda w: os.mkfifo(w.place / "x.png")),
        bad("image: device", "edit /dev/zero -o o.png", "not a regular file"),
        bad("image: null byte", ["edit", "a\0b.png", "-o", "o.png"], "path"),
        bad("image: 300 letters", ["edit", f"{'a' * 300}.png", "-o", "o.png"], "File name too long"),
        bad("image: bytes that are not UTF-8", ["edit", os.fsdecode(b"\xff.png")], r"'\\udcff.png' does not"),
        bad("image: line break", ["edit", "no\nsuch.png"], r"'no\\nsuch.png' does not exist"),
        bad("image: url", "edit https://example.org/x.png", "does not exist"),
        bad("image: for invert too", "invert x.png -o o.safetensors", "empty file", {"x.png": b""}),
    ]  # fmt: skip


def _text_bomb() -> bytes:
    """A PNG whose compressed text would fill 100 MB."""
    chunk = b"zTXt" + b"bomb\0\0" + zlib.compress(bytes(100_000_000), 9)
    whole = picture()
    return whole[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


ROWS = image_rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_ends_in_one_line(row: Row, refused: Callable[[Row], None]) -> None:
    refused(row)


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("process")], ids=lambda row: row["name"])
def test_ends_a_process_in_one_line(row: Row, refused_process: Callable[[Row], None]) -> None:
    refused_process(row)


def test_there_are_rows_enough() -> None:
    assert len(ROWS) >= 40
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    assert sum(bool(row.get("process")) for row in ROWS) >= 2
