"""What compiling and recording took is told apart from the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ledits_min.app.cli import main
from ledits_min.engine.overhead import Overhead

SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"
PAUSE = 0.2


def slow_compiler(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    time.sleep(PAUSE)
    return module.forward


def test_seconds_gather_until_they_are_taken() -> None:
    overhead = Overhead()
    assert overhead.take() == {}
    for _ in range(2):
        with overhead.timed("record"):
            time.sleep(0.05)
    with pytest.raises(ZeroDivisionError), overhead.timed("compile"):
        raise ZeroDivisionError
    taken = overhead.take()
    assert taken["record"] >= 0.1 and list(taken) == ["record", "compile"]
    assert overhead.take() == {}


def test_the_compiler_is_watched_and_let_go() -> None:
    overhead = Overhead()
    compiled = torch.compile(lambda x: x.sin() + 1, backend=slow_compiler, dynamic=False)
    with overhead.watching_the_compiler():
        compiled(torch.zeros(2))
        compiled(torch.zeros(2))
    assert overhead.take()["compile"] >= PAUSE
    with overhead.watching_the_compiler():
        compiled(torch.zeros(2))  # is compiled already
    compiled(torch.zeros(3))  # nobody watches
    assert overhead.take() == {}


def test_the_report_tells_compiling_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: plain(self, backend=slow_compiler, **how))
    monkeypatch.chdir(tmp_path)
    edit = ["edit", str(SAMPLE), "--add", "hat", "--steps", "3", "--skip", "1", "--report", "r.json", "-o", "o.png"]
    started = time.perf_counter()
    assert main([*edit, "--compile"]) == 0
    whole = time.perf_counter() - started
    seconds = json.loads(Path("r.json").read_text())["seconds"]
    assert list(seconds) == ["load", "compile", "edit"]
    assert seconds["compile"] >= PAUSE and all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) <= whole
