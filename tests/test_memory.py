"""What is told of a machine's memory, and the allocator that keeps it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ledits_min import memory

CPU = torch.device("cpu")


def test_free_memory_is_what_could_be_had() -> None:
    total, free = memory.total_memory(CPU), memory.free_memory(CPU)
    assert 2**27 < free <= total
    held = torch.ones(2**26)  # 256 MiB, touched
    assert memory.free_memory(CPU) < free + 2**26
    del held


@pytest.mark.parametrize("content", ["", "MemTotal: 1 kB\n", None])
def test_where_linux_does_not_tell(content: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        if content is None:
            raise FileNotFoundError(path)
        return content

    monkeypatch.setattr(Path, "read_text", read_text)
    assert 0 < memory.free_memory(CPU) <= memory.total_memory(CPU)


def test_freed_memory_is_kept() -> None:
    """A large block that was freed is still the process's, and the next one need not be fetched."""
    code = """
import ctypes, re, sys
from ledits_min.memory import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, size = ctypes.c_void_p, [ctypes.c_void_p], 200 * 2**20
held = lambda: int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = held()
block = libc.malloc(ctypes.c_size_t(size))
ctypes.memset(block, 1, size)
libc.free(block)
print(int(kept), held() - before)
"""
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library has no mallopt")
    left = {}
    for how in ("kept", "plain"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True)
        set_, left[how] = map(int, done.stdout.split())
        assert set_ == (how == "kept")
    assert left["kept"] > 150 * 1024 > 50 * 1024 > left["plain"]


def test_without_mallopt_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
