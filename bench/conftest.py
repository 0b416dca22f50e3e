"""`pytest bench --results` writes what was measured to bench/results/<stem>.json."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", action="store_true", help="write bench/results/<stem>.json")


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
        "conditions": beside("speed/conditions").conditions(),
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")


def beside(stem: str) -> ModuleType:
    """bench/<stem>.py by its path, since bench/ is not importable by name."""
    name = f"ledits_min_bench_{Path(stem).name}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{stem}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def inputs() -> ModuleType:
    """bench/kernels/inputs.py, the makers of random inputs that tests/kernels share."""
    return beside("kernels/inputs")


@pytest.fixture(scope="module")
def gpu(request: pytest.FixtureRequest) -> ModuleType:
    """bench/speed/gpu.py, to benchmark a kernel: it skips without CUDA, and refuses while the kernel's test fails."""
    if not torch.cuda.is_available():
        pytest.skip("a kernel is measured on a CUDA device, and there is none")
    test = Path(__file__).parents[1] / "tests" / "kernels" / request.path.name
    if test.exists():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not compiles", str(test)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"not measured, because {test.name} fails:\n{done.stdout[-3000:]}")
    return beside("speed/gpu")
