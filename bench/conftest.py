"""`pytest bench --results` writes what was measured to bench/results/<stem>.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", action="store_true", help="write bench/results/<stem>.json")


def processor() -> str:
    """Its name as Linux tells it; elsewhere what the platform says."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def conditions() -> dict[str, Any]:
    """What a figure means little without. No host name: the file is committed."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(),
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


@pytest.fixture(autouse=True)
def keep_results(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a benchmark: its seconds and its extra_info join the file that is named after its own."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is None or benchmark.stats is None or not request.config.getoption("--results"):
        return
    stats = benchmark.stats.stats
    file = RESULTS / f"{request.path.stem.removeprefix('test_')}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[request.node.name.removeprefix("test_")] = {
        "seconds": {name: round(getattr(stats, name), 4) for name in ("min", "median", "max")},
        "rounds": stats.rounds,
        **benchmark.extra_info,
        "conditions": conditions(),
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")
