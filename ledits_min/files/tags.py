"""Directories of tags: a TIFF's own, and those of EXIF data in any picture. Bounded before anybody follows them.

A directory is a number of entries (tag, type, count, value or offset), so that a few bytes can point at megabytes, many
times at the same ones. [TIFF 6.0, section 2; Exif 2.3, section 4.6.2]
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ledits_min.errors import InputError

ORIENTATION = 0x0112
MAX_ENTRIES = 2000  # of one directory; cameras write some sixty
MAX_NUMBERS = 100_000  # of one entry; a picture of 64 megapixels in strips of one row has 22,627 offsets
MAX_DIRECTORIES = 100  # that a container without a plain list of its contents seems to hold
SPARE_BYTES = 1_000_000

Data = bytes | memoryview

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTES = (1, 2, 6, 7)  # types whose values stay bytes
_INNER = (0x8769, 0x8825, 0xA005)  # entries that point to a further directory: EXIF, GPS, interoperability
_STARTS = re.compile(rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]|II\0\x2a|MM\x2a\0")


class Entry(NamedTuple):
    """One entry: its values, if they are bytes or whole numbers that stand in the entry itself, begin at `value`."""

    tag: int
    kind: int
    number: int
    value: bytes


def check_directories(data: Data, name: str) -> None:
    """InputError where reading the first directory, and those inside it, would take more than there is.

    What is damaged otherwise passes: it costs nothing to find that out.
    """
    left = len(data) + SPARE_BYTES
    if _STARTS.match(data) is None:
        return
    waiting = [_first(data)]
    for _ in range(8):
        if not waiting:
            return
        for entry in _entries(data, waiting.pop(), name):
            size = entry.number * _SIZES.get(entry.kind, 0)
            if size > 8 and entry.kind not in _BYTES and entry.number > MAX_NUMBERS:
                raise InputError(f"{name} has a tag of {entry.number:,} numbers; save it again in another program")
            left -= min(size, len(data))
            if left < 0:
                raise InputError(f"{name} has tags that promise more than the file holds; save it again without them")
            if entry.tag in _INNER:
                waiting.append(_number(entry, data))


def check_all_directories(data: bytes, name: str) -> None:
    """The same for every place in a container that reads as the start of a directory."""
    found = 0
    for match in _STARTS.finditer(data):
        rest = memoryview(data)[match.start() :]
        if 0 < _first(rest) < len(rest):
            found += 1
            if found > MAX_DIRECTORIES:
                raise InputError(f"{name} holds more than {MAX_DIRECTORIES} directories of tags; save it again")
            check_directories(rest, name)


def orientation(data: bytes, name: str) -> int | None:
    """EXIF's orientation, 1 where the data say nothing; None where they are damaged."""
    data = data.removeprefix(b"Exif\0\0")
    if not data:
        return 1
    if _STARTS.match(data) is None:
        return None
    try:
        for entry in _entries(data, _first(data), name):
            if entry.tag == ORIENTATION:
                return _number(entry, data)
    except InputError:
        return None
    return 1


def _order(data: Data) -> str:
    return "<" if data[:2] == b"II" else ">"


def _is_big(data: Data) -> bool:
    return 0x2B in data[2:4]


def _first(data: Data) -> int:
    """Offset of the first directory; 0 where the data end before it is said."""
    at, kind, size = (8, "Q", 16) if _is_big(data) else (4, "I", 8)
    return int(struct.unpack_from(f"{_order(data)}{kind}", data, at)[0]) if len(data) >= size else 0


def _entries(data: Data, at: int, name: str) -> Iterator[Entry]:
    """The entries of the directory at an offset, as far as the data go."""
    big, order = _is_big(data), _order(data)
    width, kind, each = (8, "Q", 20) if big else (2, "H", 12)
    if not 0 < at <= len(data) - width:
        return
    number = struct.unpack_from(f"{order}{kind}", data, at)[0]
    if number > MAX_ENTRIES:
        raise InputError(f"{name} has a directory of {number:,} tags; save it again in another program")
    for start in range(at + width, min(at + width + each * number, len(data) - each + 1), each):
        tag, kind_of, count = struct.unpack_from(f"{order}HH{'Q' if big else 'I'}", data, start)
        yield Entry(tag, kind_of, count, bytes(data[start + each - (8 if big else 4) : start + each]))


def _number(entry: Entry, data: Data) -> int:
    """The first value of an entry of whole numbers; 0 where it has none."""
    size = _SIZES.get(entry.kind, 0)
    letter = {1: "B", 2: "H", 4: "I", 8: "Q"}.get(size)
    return 0 if letter is None else int(struct.unpack_from(f"{_order(data)}{letter}", entry.value)[0])
