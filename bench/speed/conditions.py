"""Under what conditions a figure was measured, and the peak memory of a stretch of work."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ledits_min.engine.cpu import computes_in_bfloat16, multiplies_bfloat16_in_vectors

RESULTS = Path(__file__).parents[1] / "results"


def processor() -> str:
    """Its name as Linux tells it; elsewhere what the platform says."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def kind_of(device: torch.device) -> str:
    """The device, and how a CPU multiplies bfloat16: figures of one kind say nothing about another."""
    if device.type != "cpu" or not computes_in_bfloat16():
        return device.type
    return "cpu (AVX-512)" if multiplies_bfloat16_in_vectors() else "cpu (AMX)"


def commit() -> str:
    """As git tells it; empty where there is none."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def conditions() -> dict[str, Any]:
    """What a figure means little without. No host name: the file is committed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(),
        "cores": cores,
        "bfloat16": "no" if not computes_in_bfloat16() else "vectors" if multiplies_bfloat16_in_vectors() else "tiles",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


class Memory:
    """The peak memory of what happens inside a `with`, weights included, in bytes: a device's own, or the process's.

    Linux keeps a process's peak; writing 5 to clear_refs makes it forget what was before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> Memory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        self.peak = 1024 * int(found[1])


def give_back_freed_memory() -> None:
    """What Linux's allocator keeps for later would count as the next work's memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
