"""Fixtures that several tests of the commands share."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench/batch.py"


@pytest.fixture(scope="session")
def poisoned_table() -> Callable[[Path, int, int], dict[str, str]]:
    """bench/batch.py's writer of portraits and their table, some of them poisoned; bench/ is not importable by name."""
    pytest.importorskip("dicebear", reason="the [train] extra is not installed")
    written: Callable[[Path, int, int], dict[str, str]] = runpy.run_path(str(BENCH))["write_table"]
    return written
