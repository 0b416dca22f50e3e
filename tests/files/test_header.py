"""The header check refuses whatever is not exactly one complete safetensors file, and says what it is instead."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ledits_min.errors import InputError, quoted
from ledits_min.files.header import DTYPE_BITS, MAX_HEADER_BYTES, parse_header, read_header

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
VALID = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.float16)}, {"format": "pt"})


def with_header(text: str | bytes, data: int = 32, length: int | None = None) -> bytes:
    body = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(body) if length is None else length) + body + bytes(data)


def entry(dtype: str = "F32", shape: Any = (8,), offsets: Any = (0, 32)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def tensors(**entries: Any) -> bytes:
    return with_header(json.dumps(entries))


ONE = json.dumps(entry())
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "seven bytes": (b"1234567", "cut short"),
    "length alone": (struct.pack("<Q", 0), "does not start with"),
    "length of one": (with_header("{"), "does not start with"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "header would take"),
    "length above the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header of 16000001 bytes.*metadata"),
    "length above the format's": (struct.pack("<Q", 100_000_001) + b"{}", "header would take"),
    "length past the end": (with_header("{}", 0, 1000), "ends at byte 1008, the file at 10"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML"),
    "html after blank lines": (b"\n\n\r\n   <html></html>", "HTML"),
    "json error message": (b'{"error": "Access to model is restricted"}', "JSON text"),
    "zip checkpoint": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "zip archive.*convert"),
    "pickle 2": (b"\x80\x02}q\x00(X\x05\x00\x00\x00", "pickle.*convert"),
    "pickle 4": (b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00", "pickle.*convert"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "gzip"),
    "leading space": (with_header(' {"a": ' + ONE + "}"), "does not start with"),
    "byte order mark": (with_header("\ufeff" + '{"a": ' + ONE + "}"), "does not start with"),
    "not utf-8": (with_header(b'{"\xff": ' + ONE.encode() + b"}"), "not UTF-8"),
    "not json": (with_header('{"a": '), "not JSON"),
    "two values": (with_header('{"a": ' + ONE + "} {}"), "not JSON"),
    "nested deeply": (with_header('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply|not JSON"),
    "nested lists": (with_header('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), "nested too deeply|not JSON"),
    "huge number": (with_header('{"a": ' + "9" * 10_000 + "}"), "not JSON|exactly dtype"),
    "no tensors": (with_header("{}", 0), "no tensors"),
    "metadata only": (with_header('{"__metadata__": {"a": "b"}}', 0), "no tensors"),
    "metadata number": (with_header('{"__metadata__": {"a": 1}, "a": ' + ONE + "}"), "strings to strings"),
    "half a character in metadata": (with_header('{"__metadata__": {"a": "\\ud800"}, "a": ' + ONE + "}"), "surrogate"),
    "half a character in a metadata key": (
        with_header('{"__metadata__": {"\\udfff": "b"}, "a": ' + ONE + "}"),
        "surrogate",
    ),
    "metadata in metadata": (with_header('{"__metadata__": {"a": {}}, "a": ' + ONE + "}"), "strings to strings"),
    "metadata null": (with_header('{"__metadata__": null, "a": ' + ONE + "}"), "strings to strings"),
    "twice the same": (with_header('{"a": ' + ONE + ', "a": ' + ONE + "}"), "names 'a' twice"),
    "twice in an entry": (with_header('{"a": {"dtype": "F32", "dtype": "F32", "shape": [8]}}'), "'dtype' twice"),
    "twice by an escape": (with_header('{"a": ' + ONE + ', "\\u0061": ' + ONE + "}"), "names 'a' twice"),
    "nan": (with_header('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 32]}}'), "holds NaN"),
    "fraction": (with_header('{"a": {"dtype": "F32", "shape": [8.0], "data_offsets": [0, 32]}}'), "fraction"),
    "entry is a list": (tensors(a=[1]), "exactly dtype, shape"),
    "entry lacks offsets": (tensors(a={"dtype": "F32", "shape": [8]}), "exactly dtype, shape"),
    "entry has more": (tensors(a=entry() | {"code": "x"}), "exactly dtype, shape"),
    "unknown dtype": (tensors(a=entry("F33")), "unknown dtype 'F33'; known are .*BF16"),
    "dtype is a list": (tensors(a=entry(["F32"])), "unknown dtype"),  # type: ignore[arg-type]
    "negative shape": (tensors(a=entry(shape=[-8])), "impossible shape"),
    "boolean shape": (tensors(a=entry("U8", [True, 32])), "impossible shape"),
    "shape is a number": (tensors(a=entry(shape=8)), "impossible shape"),
    "too many dimensions": (tensors(a=entry(shape=[1] * 40 + [8])), "impossible shape"),
    "negative offset": (tensors(a=entry(offsets=[-1, 31])), "impossible data_offsets"),
    "three offsets": (tensors(a=entry(offsets=[0, 16, 32])), "impossible data_offsets"),
    "reversed offsets": (tensors(a=entry(offsets=[32, 0])), "takes 256 bits"),
    "overflow of the product": (tensors(a=entry(shape=[2**62, 2**62, 8])), "takes .* bits"),
    "overflow to the right size": (tensors(a=entry("U8", [2**62, 4, 1], [0, 0])), "takes .* bits"),
    "shape and offsets disagree": (tensors(a=entry(shape=[7])), "takes 224 bits, its offsets span 256"),
    "half a byte": (tensors(a=entry("F4", [3], [0, 1])), "takes 12 bits"),
    "overlap": (tensors(a=entry(offsets=[0, 32]), b=entry("U8", [8], [24, 32])), "overlaps tensor 'a'"),
    "the same place": (tensors(a=entry(), b=entry()), "overlaps"),
    "hole at the start": (tensors(a=entry("U8", [24], [8, 32])), "hole of 8 bytes after the header"),
    "hole between": (
        tensors(a=entry("U8", [8], [0, 8]), b=entry("U8", [8], [24, 32])),
        "hole of 16 bytes after tensor 'a'",
    ),
    "cut data": (VALID[:-1], "promises 32 bytes of data, 31 are there"),
    "more data": (VALID + b"x", "1 bytes follow"),
    "zip behind it": (VALID + b"PK\x03\x04" + bytes(60), "64 bytes follow"),
    "empty name": (tensors(**{"": entry()}), "name '' is empty"),
    "newline in a name": (tensors(**{"a\nb": entry()}), "unprintable"),
    "escape in a name": (tensors(**{"a\x1b[31m": entry()}), "unprintable"),
    "lone surrogate in a name": (with_header('{"\\ud800": ' + ONE + "}"), "unprintable"),
    "right-to-left override": (tensors(**{"a\u202eb": entry()}), "unprintable"),
    "long name": (tensors(**{"a" * 1000: entry()}), "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refuses_in_one_line_with_the_reason(name: str, tmp_path: Path) -> None:
    data, reason = BAD[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    assert str(path) in message or "..." in message


def test_accepts_a_valid_file_and_reports_it_exactly(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (info.dtype, info.shape, info.numel) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3), 6),
        "b": ("F16", (4,), 4),
    }
    assert header.size == len(VALID) == header.data_start + 32
    info = header.tensors["a"]
    assert VALID[header.data_start + info.begin :][: info.end - info.begin] == np.arange(6, dtype=np.float32).tobytes()


def test_a_header_cannot_be_changed(tmp_path: Path) -> None:
    header = parse_header(VALID, len(VALID), "x")
    with pytest.raises(TypeError):
        header.tensors["c"] = header.tensors["a"]  # type: ignore[index]


def test_padding_scalars_and_empty_tensors_are_part_of_the_format() -> None:
    data = tensors(a=entry("U8", [], [0, 1]), b=entry("F32", [0, 7], [1, 1]), c=entry("U8", [31], [1, 32]))
    assert parse_header(data, len(data), "x").tensors["a"].numel == 1
    data = with_header('{"a": ' + ONE + "}     ")
    assert set(parse_header(data, len(data), "x").tensors) == {"a"}


def missing(folder: Path) -> Path:
    return folder / "absent.safetensors"


def dangling(folder: Path) -> Path:
    (folder / "link.safetensors").symlink_to(folder / "nowhere")
    return folder / "link.safetensors"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.safetensors")
    return folder / "pipe.safetensors"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (missing, "No such file"),
        (dangling, "link to a file that does not exist"),
        (pipe, "not a regular file"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: folder / ("x" * 300), "cannot be read"),
        (lambda folder: folder / "a\x00b", "cannot be read"),
        (lambda folder: folder / "model.ckpt", "pickle by its name"),
        (lambda folder: folder / "pytorch_model.BIN", "pickle by its name"),
    ],
)
def test_refuses_what_is_no_file(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_header(make(tmp_path))
    assert str(caught.value).isprintable()


def test_a_machine_that_reads_numbers_the_other_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": np.ones(3, dtype=np.float32)}))
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(InputError, match="is little-endian, this machine is big-endian"):
        read_header(path)


def test_a_name_of_any_bytes_makes_one_printable_line(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\nb\xff \xf0\x9f\x8c\xb5.safetensors")
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    assert quoted("caf\u00e9") == "'caf\u00e9'"


def accepted_by_the_library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return {name: (piece.get_dtype(), piece.get_shape()) for name, piece in slices.items()}
    except SafetensorError:
        return None


def check_against_the_library(path: Path, data: bytes) -> bool:
    """We refuse with InputError only, and whatever we accept the library reads as the same tensors."""
    path.write_bytes(data)
    try:
        header = read_header(path)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.isprintable()
        return False
    ours = {name: (info.dtype, list(info.shape)) for name, info in header.tensors.items()}
    assert accepted_by_the_library(path) == ours
    return True


@QUICK
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
def test_changed_bytes(tmp_path: Path, position: int, value: int) -> None:
    check_against_the_library(tmp_path / "x.safetensors", VALID[:position] + bytes([value]) + VALID[position + 1 :])


@QUICK
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=0, max_size=20))
def test_cut_and_lengthened_files_are_always_refused(tmp_path: Path, cut: int, tail: bytes) -> None:
    path = tmp_path / "x.safetensors"
    assert not check_against_the_library(path, VALID[:cut])
    assert check_against_the_library(path, VALID + tail) == (not tail)


@QUICK
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    assert not check_against_the_library(tmp_path / "x.safetensors", data)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.sampled_from(list(DTYPE_BITS))
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "C64"]) | json_values,
        "shape": st.lists(st.integers(0, 3), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2).map(sorted) | json_values,
    }
)


@QUICK
@given(st.dictionaries(st.text(max_size=5), entries | json_values, max_size=3), st.integers(0, 32))
def test_random_headers(tmp_path: Path, header: dict[str, Any], data: int) -> None:
    check_against_the_library(tmp_path / "x.safetensors", with_header(json.dumps(header), data))


shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
dtypes = st.sampled_from(["float32", "float16", "float64", "int64", "uint8", "bool"])


@QUICK
@given(st.dictionaries(st.text("abc._0", min_size=1, max_size=8), st.tuples(shapes, dtypes), min_size=1, max_size=6))
def test_whatever_the_library_writes_is_accepted(tmp_path: Path, wanted: dict[str, tuple[Any, str]]) -> None:
    data = save({name: np.zeros(shape, dtype) for name, (shape, dtype) in wanted.items()})
    assert check_against_the_library(tmp_path / "x.safetensors", data)


def test_the_hollow_files_of_the_other_tests_are_valid(checkpoints: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoints.write_hollow(path, {"a": ("F32", (2, 3)), "b": ("BF16", (5,))}, {"format": "pt"})
    assert accepted_by_the_library(path) == {"a": ("F32", [2, 3]), "b": ("BF16", [5])}
    assert read_header(path).tensors["b"].begin == 24
