"""What people really pass by mistake, the machinery: test_bad_*.py hold the rows.

A row goes through the command's entry point, or through a process of its own: exit code, one line that names the
matter, and nothing written.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ledits_min.app.cli import main
from ledits_min.config import SD15_TEXT, SD15_UNET, SD15_VAE

SAMPLE = Path(__file__).resolve().parents[2] / "weights/tiny/samples/portrait1.png"


@dataclass(frozen=True)
class Workshop:
    """Where a row makes its files: an empty folder, the writer of checkpoints, and a whole random diffusers folder."""

    place: Path
    checkpoints: ModuleType
    whole: Path

    def folder(self, name: str = "model") -> Path:
        """A copy of the whole folder to damage; made of links, so a file is replaced, never written into."""
        return Path(shutil.copytree(self.whole, self.place / name, copy_function=os.link))

    def listing(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names, dtypes and shapes of a complete SD 1.5 single file."""
        result: dict[str, tuple[str, tuple[int, ...]]] = self.checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT)
        return result

    def hollow(self, listing: Mapping[str, Any], name: str = "bad.safetensors") -> None:
        self.checkpoints.write_hollow(self.place / name, listing)


Make = Callable[[Workshop], object]


@dataclass(frozen=True)
class Row:
    """What is typed, what the line must say, what lies in the folder beforehand, and how it ends."""

    name: str
    command: str | list[str]
    says: str
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    make: Make | None = None
    code: int = 2
    process: bool = False

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.command) if isinstance(self.command, str) else self.command


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory, checkpoints: ModuleType) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model"
    checkpoints.write_folder(path)
    return path


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: ModuleType, whole_folder: Path) -> Workshop:
    shutil.copy(SAMPLE, tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path, checkpoints, whole_folder)


def prepared(row: Row, workshop: Workshop) -> dict[str, tuple[int, int]]:
    for name, content in row.files.items():
        (workshop.place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if row.make is not None:
        row.make(workshop)
    return snapshot(workshop.place)


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    """Every name below `place` with its size and time of change."""
    found = {}
    for folder, _, names in os.walk(place):
        for path in [Path(folder), *(Path(folder) / name for name in names)]:
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def check_line(stderr: str, row: Row) -> None:
    """One line of error, the last, that says what the row wants; what stands above it may only be notices."""
    lines = stderr.splitlines()
    assert lines[-1].startswith("ledits: error: "), stderr
    assert [line for line in lines if line.startswith("ledits: error: ")] == lines[-1:]
    assert all(line.startswith("ledits: ") for line in lines), stderr
    assert re.search(row.says, lines[-1]), lines[-1]
    assert len(lines[-1]) < 4000


@pytest.fixture
def refused(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> Callable[[dict[str, Any]], None]:
    def check(fields: dict[str, Any]) -> None:
        row = Row(**fields)
        before = prepared(row, workshop)
        code = main(row.argv)
        output = capsys.readouterr()
        assert code == row.code, output.err
        check_line(output.err, row)
        assert output.out == ""
        assert snapshot(workshop.place) == before

    return check


@pytest.fixture
def refused_process(workshop: Workshop) -> Callable[[dict[str, Any]], None]:
    def check(fields: dict[str, Any]) -> None:
        row = Row(**fields)
        before = prepared(row, workshop)
        finished = subprocess.run(
            [sys.executable, "-m", "ledits_min.app.cli", *row.argv], capture_output=True, text=True, check=False
        )
        assert finished.returncode == row.code, finished.stderr
        check_line(finished.stderr, row)
        assert finished.stdout == ""
        assert snapshot(workshop.place) == before

    return check
