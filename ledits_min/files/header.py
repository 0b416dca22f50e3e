"""Read and check the header of a safetensors file before anything else in it is touched.

A safetensors file is  u64 little-endian n | n bytes of JSON | data,  the JSON being
{"name": {"dtype": "F16", "shape": [320, 4, 3, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}.
The rules are those of the format's description (huggingface/safetensors, README): the JSON starts at its
first byte, no name appears twice, and the tensors tile the data exactly. The library that reads the data
later accepts a leading space, some duplicates and any name; this check does not, so that no two readers see
different things in one file, and nobody's terminal obeys a name.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from ledits_min.errors import InputError, quoted

# The format allows 100 MB. The largest header of a published checkpoint is 45 times smaller than this, and a hostile
# one takes up to 30 times its size in memory: 0.5 GB here, 3 GB there.
MAX_HEADER_BYTES = 16_000_000
FORMAT_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 512
MAX_RANK = 16
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
)

PICKLE_ADVICE = "convert it to .safetensors with a tool you trust, because opening a pickle can run code"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights; run `git lfs pull` in its repository"),
    (b"PK", f"a zip archive, probably a pickled PyTorch checkpoint; {PICKLE_ADVICE}"),
    (b"GGUF", "a GGUF file; convert it to .safetensors"),
    (b"\x89HDF", "an HDF5 file; convert it to .safetensors"),
    (b"\x89PNG", "a PNG picture; pass a model file here"),
    (b"\xff\xd8\xff", "a JPEG picture; pass a model file here"),
    (b"\x1f\x8b", "gzip-compressed; decompress it first"),
    (b"\x93NUMPY", "a NumPy array; pass a model file here"),
)


class TensorInfo(NamedTuple):
    """What the header says of one tensor; `begin` and `end` count bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return _product(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors by name, the free metadata, where the data starts, the file's size."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int


def read_header(path: str | Path) -> Header:
    """Check `path` and return its header; reads 8 + n bytes and nothing of the data.

    Raises InputError for anything that is not a complete, well-formed safetensors file.
    """
    source = quoted(path)
    if Path(path).suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{source} is a pickle by its name; {PICKLE_ADVICE}")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{source} is a folder; a .safetensors file is wanted here")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{source} is not a regular file; a .safetensors file is wanted here")
        if sys.byteorder != "little":  # as the weights lie in the file, and are mapped from it
            raise InputError(f"{source} is little-endian, this machine is {sys.byteorder}-endian; use another machine")
        with open(path, "rb") as file:
            raw = file.read(512)
            length = _header_length(raw, status.st_size, source)
            raw += file.read(max(0, 8 + length - len(raw)))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source} cannot be read: {_reason(error, path)}; check the path") from error
    return parse_header(raw[: 8 + length], status.st_size, source)


def parse_header(raw: bytes, size: int, source: str) -> Header:
    """Check the first 8 + n bytes of a file of `size` bytes; `source` names the file in messages."""
    length = _header_length(raw[:512], size, source)
    body = raw[8 : 8 + length]
    try:
        parsed = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(pairs, source),
            parse_float=lambda text: _damaged(source, f"it holds the fraction {quoted(text, 40)}"),
            parse_constant=lambda text: _damaged(source, f"it holds {text}"),
        )
    except UnicodeDecodeError as error:
        _damaged(source, f"it is not UTF-8 at byte {8 + error.start}", error)
    except RecursionError as error:
        _damaged(source, "it is nested too deeply", error)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        _damaged(source, f"it is not JSON ({quoted(error, 100)})", error)
    if not isinstance(parsed, dict):
        _damaged(source, "it is not a JSON object")
    metadata = _metadata(parsed.pop("__metadata__", {}), source)
    tensors = {name: _tensor_info(name, value, source) for name, value in parsed.items()}
    if not tensors:
        raise InputError(f"{source} holds no tensors; download it again or pass another file")
    _check_tiling(tensors, size - 8 - length, source)
    return Header(MappingProxyType(tensors), MappingProxyType(metadata), 8 + length, size)


def _header_length(start: bytes, size: int, source: str) -> int:
    """The JSON's length, checked against the limit and the file's size before a byte of it is read."""
    if size == 0:
        raise InputError(f"{source} is an empty file; download it again")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    plausible = start[8:9] == b"{" and 2 <= length <= MAX_HEADER_BYTES
    if not plausible:
        _refuse_by_magic(start, source)
        # Eight letters read as a number are far above the limit, so only a text can start like this.
        if length > MAX_HEADER_BYTES and start[:1] in (b"{", b"["):
            raise InputError(f"{source} is JSON text; if it is an index of several files, pass their folder")
        if len(start) >= 8 and _is_text(start):
            raise InputError(f"{source} is a text file; a .safetensors file is wanted here")
    if size < 8:
        raise InputError(
            f"{source} is cut short: {size} bytes, and even the header's length takes 8; download it again"
        )
    if MAX_HEADER_BYTES < length <= FORMAT_HEADER_BYTES and start[8:9] == b"{":
        raise InputError(
            f"{source} has a header of {length} bytes, of which at most {MAX_HEADER_BYTES} are read here; a picture or "
            "a log among its metadata takes as much: save it again without them"
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{source} is not a safetensors file: its header would take {length} bytes, the limit is "
            f"{MAX_HEADER_BYTES}; download it again"
        )
    if 8 + length > size:
        raise InputError(
            f"{source} is cut short: its header ends at byte {8 + length}, the file at {size}; download it again"
        )
    if not plausible:
        _damaged(source, "its JSON does not start with '{'")
    return int(length)


def _refuse_by_magic(start: bytes, source: str) -> None:
    """Say what the file is instead, where its first bytes give it away."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        raise InputError(f"{source} is an HTML or XML page: the download failed or wants a login; download it again")
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise InputError(f"{source} is a pickle; {PICKLE_ADVICE}")
    for magic, meaning in _MAGIC:
        if start.startswith(magic):
            raise InputError(f"{source} is {meaning}")


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(start) or error.start < len(start) - 3:
            return False
        text = start[: error.start].decode("utf-8")  # the last letter goes on behind what was read
    return bool(text) and all(letter.isprintable() or letter.isspace() for letter in text)


def _metadata(value: Any, source: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        _damaged(source, "__metadata__ must map strings to strings")
    if any("\ud800" <= character <= "\udfff" for text in (*value, *value.values()) for character in text):
        _damaged(source, "__metadata__ holds half a character (a lone surrogate)")
    return value


def _tensor_info(name: str, value: Any, source: str) -> TensorInfo:
    """Check one entry by itself: its name, its three fields, and that shape, dtype and offsets agree."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        _damaged(
            source,
            f"the tensor name {quoted(name, 60)} is empty, longer than {MAX_NAME_LENGTH} or unprintable",
        )
    entry = f"tensor {quoted(name, 100)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _damaged(source, f"{entry} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _damaged(source, f"{entry} has the unknown dtype {quoted(dtype, 40)}; known are {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(item) for item in shape):
        _damaged(source, f"{entry} has the impossible shape {quoted(shape, 60)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(item) for item in offsets):
        _damaged(source, f"{entry} has the impossible data_offsets {quoted(offsets, 60)}")
    begin, end = offsets
    bits = _product(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        _damaged(
            source,
            f"{entry}, {dtype} {quoted(shape, 60)}, takes {bits} bits, its offsets span {8 * (end - begin)}",
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_tiling(tensors: Mapping[str, TensorInfo], found: int, source: str) -> None:
    """The tensors must cover the data without a hole, an overlap or a rest: nothing can hide between them."""
    position, last = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "overlaps" if info.begin < position else f"leaves a hole of {info.begin - position} bytes after"
            before = f"tensor {quoted(last, 80)}" if last else "the header"
            _damaged(source, f"tensor {quoted(name, 80)} {what} {before}")
        position, last = info.end, name
    if found < position:
        raise InputError(
            f"{source} is cut short: its header promises {position} bytes of data, {found} are there; download it again"
        )
    if found > position:
        _damaged(source, f"{found - position} bytes follow the last tensor")


def _unique(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        _damaged(source, f"it names {quoted(twice, 100)} twice")
    return result


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _product(shape: tuple[int, ...] | list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, FileNotFoundError) and Path(path).is_symlink():
        return "it is a link to a file that does not exist"
    return (error.strerror or "") if isinstance(error, OSError) else str(error)


def _damaged(source: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise InputError(f"{source} has a damaged header: {why}; download it again") from cause
