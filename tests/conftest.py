"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

# Files side by side have a core each, and so have the programs they start; torch's threads would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # it reads that when it is imported

# Triton decides when it is first imported whether kernels are interpreted, and many a library imports it: so here,
# before any test file is read. Without a GPU there is nothing to compile for.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ledits_min import LEdits

# No test depends on a quiet machine: an example may take as long as it takes.
settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")


@pytest.fixture(scope="session")
def checkpoints() -> ModuleType:
    """tests/checkpoints.py, the writer of random checkpoints; a fixture because tests/ is not importable by name."""
    name = "ledits_min_test_checkpoints"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("checkpoints.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="module")
def ledits() -> LEdits:
    """The embedded model in float32; each file's own, so that what one does to it no other sees."""
    return LEdits.from_pretrained("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain() -> LEdits:
    """The same through the loops of `edit.py` and plain networks."""
    return LEdits.from_pretrained("tiny", device="cpu", dtype="float32", engine="plain")


@pytest.fixture(scope="session")
def layouts() -> dict[str, Any]:
    """Listings of published checkpoints, {file stem: {"keys": {name: [dtype, shape]}, ...}}."""
    folder = os.environ.get("LEDITS_LAYOUTS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LEDITS_LAYOUTS does not name a folder with listings of published checkpoints")
    files = sorted(path for path in Path(folder).glob("*.json") if path.stem != "index")
    assert files, f"{folder} holds no listings"
    return {path.stem: json.loads(path.read_text()) for path in files}
