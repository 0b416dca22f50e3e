"""Where the kernels are tested: compiled on a CUDA device, elsewhere through Triton's interpreter.

tests/conftest.py chooses the interpreter, before anything imports triton; what needs the compiler runs in a process of
its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


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
