"""Where the kernels are tested: compiled on a CUDA device, elsewhere through Triton's interpreter.

tests/conftest.py chooses the interpreter, before anything imports triton; what needs the compiler runs in a process of
its own. Which files have passed is noted in pytest's cache: the benchmarks of a kernel ask for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PASSED = "ledits/kernels-passed"  # in pytest's cache: {file name: the `state` in which all its tests passed}


def state(test: Path) -> str:
    """A digest of what a kernel's test depends on: the kernels, `ops`, the test, the device and the versions."""
    files = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "ledits_min" / "engine" / "ops.py", test]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    parts = [file.read_bytes() for file in files]
    parts += [word.encode() for word in (device, version("torch"), version("triton"))]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def passed_files(items: list[str], deselected: list[str], passed: set[str]) -> set[str]:
    """Names of the files of which every test has passed, those aside that only compile for other devices."""
    every: dict[str, set[str]] = {}
    for nodeid in [*items, *deselected]:
        path, _, test = nodeid.partition("::")
        if "compiles" not in test:
            every.setdefault(path, set()).add(nodeid)
    return {Path(path).name for path, tests in every.items() if tests <= passed}


class Noting:
    """A plugin for one run of pytest: it notes which files of this folder have passed as a whole."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.deselected: list[str] = []
        self.passed: set[str] = set()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += [item.nodeid for item in items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.config.cache is None or any("::" in argument for argument in self.config.args):
            return
        here = Path(__file__).parent
        items = [item.nodeid for item in session.items if item.path.parent == here]
        found = {name: state(here / name) for name in passed_files(items, self.deselected, self.passed)}
        if found:
            self.config.cache.set(PASSED, self.config.cache.get(PASSED, {}) | found)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Noting(config))


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    """A triton that was imported too early cannot be tested here, and that must not pass for a success."""
    pytest.importorskip("triton", reason="the kernels need triton, which is published for Linux only")
    from triton import jit
    from triton.runtime.jit import JITFunction

    def empty() -> None: ...

    if not torch.cuda.is_available() and isinstance(jit(empty), JITFunction):
        pytest.fail("triton was imported before tests/conftest.py set TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """The kernels have no backward; and the interpreter's numpy would warn of overflows where a GPU says nothing."""
    with torch.no_grad(), np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def inputs() -> ModuleType:
    """bench/kernels/inputs.py, the makers of random inputs that benchmarks and these tests share."""
    name = "ledits_min_bench_inputs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / "kernels" / "inputs.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """on("torch") and on("triton"): choose who computes what follows."""
    return lambda side: monkeypatch.setenv("LEDITS_KERNELS", side)


@pytest.fixture(scope="session")
def ahead_of_time() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Compile kernels for sm_80, sm_90 and sm_100 without any of them: see ahead_of_time.py."""

    def compile_all(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("ahead_of_time.py")
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, script], input=json.dumps(variants), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        usages: list[dict[str, Any]] = json.loads(done.stdout)
        return usages

    return compile_all
