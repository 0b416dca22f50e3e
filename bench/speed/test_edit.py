"""What people wait for: README's sample edit, `ledits --help` and the import, each in a fresh process."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"
COMMAND = "import sys; from ledits_min.app.cli import main; sys.exit(main())"


def fresh_process(code: str, *arguments: str | Path) -> float:
    """Run python -c; its peak resident memory in MiB."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=silent)
    _, status, usage = os.wait4(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)  # macOS counts bytes


def measure(benchmark: Any, rounds: int, code: str, *arguments: str | Path) -> None:
    """Seconds go to the benchmark, the largest peak to its extra_info.

    A child's peak is never counted below what its parent held when it was started, so a smaller one says nothing.
    """
    peaks: list[float] = []
    benchmark.pedantic(lambda: peaks.append(fresh_process(code, *arguments)), rounds=rounds, warmup_rounds=1)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    if max(peaks) > 1.1 * held:
        benchmark.extra_info["peak_memory_MiB"] = round(max(peaks))


def test_edit_sample(benchmark: Any, tmp_path: Path) -> None:
    out = tmp_path / "sunglasses.png"
    measure(benchmark, 3, COMMAND, "edit", SAMPLE, "--add", "sunglasses", "--overwrite", "-o", out)
    assert out.stat().st_size > 0


@pytest.mark.parametrize("command", [[], ["edit"]], ids=["ledits", "ledits edit"])
def test_help(benchmark: Any, command: list[str]) -> None:
    measure(benchmark, 10, COMMAND, *command, "--help")


@pytest.mark.parametrize(
    "code",
    ["import ledits_min", "from ledits_min import LEdits", "import torch", "pass"],
    ids=["ledits_min", "LEdits", "torch alone", "python alone"],
)
def test_import(benchmark: Any, code: str) -> None:
    measure(benchmark, 5, code)
