"""Fixtures that several tests of the commands share."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench/batch.py"
WEB = BENCH.with_name("web.py")


@pytest.fixture(scope="session")
def bench_web() -> ModuleType:
    """bench/web.py, which starts the page and the browser, and knows how to visit it without one."""
    name = "ledits_min_bench_web"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, WEB)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def poisoned_table() -> Callable[[Path, int, int], dict[str, str]]:
    """bench/batch.py's writer of portraits and their table, some of them poisoned; bench/ is not importable by name."""
    pytest.importorskip("dicebear", reason="the [train] extra is not installed")
    written: Callable[[Path, int, int], dict[str, str]] = runpy.run_path(str(BENCH))["write_table"]
    return written
