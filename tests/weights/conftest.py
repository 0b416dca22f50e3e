"""A small diffusers folder for the tests of this folder to use and to damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def pristine(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    checkpoints.write_folder(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A diffusers folder of one's own, to damage."""
    return shutil.copytree(pristine, tmp_path / "model")
