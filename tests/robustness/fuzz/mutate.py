"""Damage to files that goes deep: the container stays readable and one thing inside it is wrong, or bytes just change.

Every function takes a `random.Random` and returns new bytes or a new value; the same generator gives the same damage.
"""

from __future__ import annotations

import io
import json
import marshal
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from PIL import Image

INTEGERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 63, 64, 127, 128, 255, 256, 4096, 32767, 32768, 65535, 65536,
            2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, *INTEGERS, *(-number for number in INTEGERS if number), 0.0, -0.0, 0.5, 1e-300, 1e300, 3.4e38,
    float("nan"), float("inf"), "", "a", "0", "None", "\ud800", "\x00", "\x1b[2J", "\u202e", "line\nbreak", "é" * 300,
    "../../etc/passwd", "/dev/zero", "https://example.org/x", "__import__('os').system('true')", [], {}, [0], [[]],
    [1, 2, 3], {"a": 1}, "a" * 10_000,
)  # fmt: skip
ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "F16": 16, "BF16": 16,
             "I32": 32, "F32": 32, "I64": 64, "F64": 64, "F4": 4}  # fmt: skip
Path = tuple[Any, ...]


def raw(rng: Random, data: bytes) -> bytes:
    """One to eight changes of bytes, most of them near the start, where headers are."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = rng.choice(_RAW)(rng, data)
    return data


def _place(rng: Random, data: bytes) -> int:
    return rng.randrange(min(len(data), rng.choice((16, 64, 256, 10**9))) or 1)


def _flip(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes((data[at] ^ (1 << rng.randrange(8)),)) + data[at + 1 :] if data else data


def _number(rng: Random, data: bytes) -> bytes:
    at, width = _place(rng, data), rng.choice((1, 2, 4, 8))
    order: Any = rng.choice(("little", "big"))
    number = (rng.choice(INTEGERS) % 256**width).to_bytes(width, order)
    return data[:at] + number + data[at + width :]


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 100)) :]


def _repeat(rng: Random, data: bytes) -> bytes:
    at, length = _place(rng, data), rng.choice((1, 4, 16, 100))
    return data[: at + length] + data[at : at + length] * rng.choice((1, 2, 50)) + data[at + length :]


def _insert(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 64))) + data[at:]


_RAW: tuple[Callable[[Random, bytes], bytes], ...] = (_flip, _flip, _flip, _number, _number, _cut, _remove, _repeat,
                                                       _insert)  # fmt: skip


def json_value(rng: Random, value: Any, vocabulary: Sequence[Any] = ()) -> Any:
    """A copy of `value` with one to three of its nodes replaced, removed, renamed, exchanged or nested deeper."""
    value = _copy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        paths = _paths(value)
        if not paths:
            return value
        path = rng.choice(paths)
        parent = _at(value, path[:-1])
        key, old = path[-1], parent[path[-1]]
        action = rng.randrange(10)
        if action < 4:
            parent[key] = _copy(rng.choice((*VALUES, *vocabulary, *vocabulary)))
        elif action == 4:
            del parent[key]
        elif action == 5 and isinstance(parent, dict):
            parent[str(rng.choice(("", "a", key * 2, f"{key} ", "\ud800", *vocabulary)))] = parent.pop(key)
        elif action == 6:
            other = rng.choice(paths)
            parent[key] = _copy(_at(value, other))
        elif action == 7:
            for _ in range(rng.choice((1, 2, 30, 200))):
                old = [old] if rng.random() < 0.5 else {"a": old}
            parent[key] = old
        elif action == 8 and isinstance(old, int | float):
            parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, str(old), float(old), [old], old * 2**20))
        elif isinstance(old, list):
            parent[key] = rng.choice((old + old, old[::-1], old[:-1], old * 40))
        elif isinstance(old, str):
            parent[key] = rng.choice((old + old, old[:-1], old.upper(), f" {old}", old + "\n", old * 400))
    return value


def _copy(value: Any) -> Any:
    """Ten times as fast as copy.deepcopy, which would be most of the work."""
    return marshal.loads(marshal.dumps(value))


def _paths(value: Any, above: Path = ()) -> list[Path]:
    if len(above) > 40:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[Path] = []
    for key, item in items:
        found.append((*above, key))
        found += _paths(item, (*above, key))
    return found


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def json_text(rng: Random, value: Any, vocabulary: Sequence[Any] = ()) -> bytes:
    """JSON with damaged values; one time in six the text itself is damaged too: duplicates, spaces, cut, bytes."""
    text = json.dumps(json_value(rng, value, vocabulary)).encode()
    kind = rng.randrange(24)
    if kind == 0 and text.startswith(b"{") and len(text) > 2:
        return b"{" + text[1:-1] + b", " + text[1:]  # every key twice
    if kind == 1:
        return rng.choice((b" ", b"\xef\xbb\xbf", b"\n", b"[")) + text
    if kind == 2:
        return text.replace(b":", b":" + b"[" * rng.choice((1, 500, 100_000)), 1)
    return raw(rng, text) if kind == 3 else text


def safetensors(rng: Random, data: bytes, vocabulary: Sequence[Any] = ()) -> bytes:
    """A safetensors file with a wrong header; mostly its offsets are laid out anew, so that it is well-formed."""
    if rng.random() < 0.2:
        return raw(rng, data)
    length = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    body = data[8 + length :]
    names = list(header)
    kind = rng.randrange(8)
    if kind == 0:
        name = rng.choice(names)
        renamed = rng.choice(("a", name + "x", name.upper(), "", "a\nb", "x" * 600, *map(str, vocabulary)))
        header[renamed] = header.pop(name)
    elif kind == 1:
        del header[rng.choice(names)]
    elif kind == 2:
        entry = header[rng.choice(names)]
        entry["shape"] = json_value(rng, [entry["shape"], 0])
    elif kind == 3:
        header[rng.choice(names)]["dtype"] = rng.choice((*ITEM_BITS, "F33", "", None))
    elif kind == 4:
        entry = header[rng.choice(names)]
        entry["shape"] = rng.choice(([], [0], entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]))
    elif kind == 5:
        metadata = json_value(rng, metadata or {"format": "pt"}, vocabulary)
    elif kind == 6 and body:
        body = raw(rng, body).ljust(len(body), b"\xff")[: len(body)]
    else:
        header = json_value(rng, header, vocabulary)
    if kind < 7 and rng.random() < 0.8:
        body = _retile(header, body)
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    if rng.random() < 0.03:
        text = raw(rng, text)
    return struct.pack("<Q", len(text)) + text + body


def _retile(header: dict[str, Any], body: bytes) -> bytes:
    """Offsets that follow from dtypes and shapes, as far as there are any; the data is cut or filled to fit."""
    position = 0
    for entry in header.values():
        shape = entry["shape"] if isinstance(entry["shape"], list) else []
        sizes = [size for size in shape if isinstance(size, int)]
        bits = ITEM_BITS.get(str(entry["dtype"]), 32)
        for size in sizes:
            bits *= size
        end = position + abs(bits) // 8
        entry["data_offsets"], position = [position, end], end
    return body[:position].ljust(min(position, 2**20), b"\0")


def png(rng: Random, data: bytes) -> bytes:
    """A PNG whose checksums are right and whose chunks are not."""
    chunks, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, action = rng.randrange(len(chunks)), rng.randrange(6)
        kind, body = chunks[i]
        if action < 3 and body:
            chunks[i] = kind, raw(rng, body)
        elif action == 3:
            chunks.insert(rng.randrange(len(chunks)), chunks[i])
        elif action == 4:
            chunks[i], chunks[-1] = chunks[-1], chunks[i]
        else:
            text = zlib.compress(bytes(rng.choice((10, 10**6, 10**8))), 9)
            chunks.insert(1, rng.choice(((b"zTXt", b"k\0\0" + text), (b"iCCP", b"p\0\0" + text), (b"IDAT", text),
                                         (b"iTXt", b"k\0\1\0\0\0" + text), (b"eXIf", rng.randbytes(40)))))  # fmt: skip
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def jpeg(rng: Random, data: bytes) -> bytes:
    """A JPEG with one segment's content changed and its length set right again."""
    at, segments = 2, []
    while at + 4 < len(data) and data[at] == 0xFF:
        length = struct.unpack(">H", data[at + 2 : at + 4])[0]
        segments.append((at, length))
        at += 2 + length
        if data[at - 2 - length + 1] == 0xDA:
            break
    start, length = rng.choice(segments)
    body = raw(rng, data[start + 4 : start + 2 + length])[:65_000]
    return data[: start + 2] + struct.pack(">H", len(body) + 2) + body + data[start + 2 + length :]


def tiff(rng: Random, data: bytes) -> bytes:
    """A little-endian TIFF with a tag, a type, a count or a value of its directory changed."""
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start : start + 2])[0]
    at = start + 2 + 12 * rng.randrange(count)
    offset, width = rng.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2)))
    number = rng.choice((*INTEGERS, rng.randrange(70_000), 254 + rng.randrange(90)))
    return data[: at + offset] + (number % 256**width).to_bytes(width, "little") + data[at + offset + width :]


def riff(rng: Random, data: bytes) -> bytes:
    """A WebP with one chunk's content, name or length changed and the outer length right."""
    at, chunks = 12, []
    while at + 8 <= len(data):
        length = struct.unpack("<I", data[at + 4 : at + 8])[0]
        chunks.append([data[at : at + 4], data[at + 8 : at + 8 + length]])
        at += 8 + length + length % 2
    chunk = rng.choice(chunks)
    if rng.random() < 0.2:
        chunk[0] = rng.choice((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF"))
    else:
        chunk[1] = raw(rng, chunk[1])
    body = b"".join(
        name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for name, part in map(tuple, chunks)
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()
