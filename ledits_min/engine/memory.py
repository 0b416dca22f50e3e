"""How much memory a device has, and whether an error says that there was not enough of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it, the CPU's allocator only a sentence in a RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in said)


def total_memory(device: torch.device) -> int:
    """Bytes the device has, used or not: what is decided by it must not depend on what else is running."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _machine_memory("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes that could be had now, besides those this program holds."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:  # Linux counts what its caches would give back
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else _machine_memory("SC_AVPHYS_PAGES")


def _machine_memory(name: str) -> int:
    """As POSIX tells it; where it does not, what a small machine has."""
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30
