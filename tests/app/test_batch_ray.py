"""`ledits batch --engine ray`: what the local engine writes, though a worker is killed in the middle of a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ledits_min.app.cli import main

# Every Python reads this when it starts. The first worker that is about to put the victim in place is killed.
KILLER = """
import os, signal, sys

def hook(event, arguments):
    if event == "os.rename" and sys.argv[0].endswith("default_worker.py"):
        if str(arguments[1]).endswith({victim!r}) and not os.path.exists({mark!r}):
            open({mark!r}, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_outputs_and_errors_are_those_of_the_local_engine(
    poisoned_table: Callable[[Path, int, int], dict[str, str]], tmp_path: Path
) -> None:
    """Batches of three: 002, 006 and 010 make one; the worker dies when 002 is written and 006 is not."""
    pytest.importorskip("ray", reason="the [batch] extra is not installed")
    poisoned = poisoned_table(tmp_path, 12, 2)
    table = [str(tmp_path / "jobs.jsonl"), "--steps", "5", "--batch-size", "3"]
    command = [sys.executable, "-m", "ledits_min.app.cli", "batch", *table]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["OMP_NUM_THREADS"] = "1"  # Ray's workers have one thread a slot, and another number rounds differently
    local = subprocess.run([*command, "-o", tmp_path / "local"], env=environment, capture_output=True, check=False)
    assert local.returncode == 1, local.stderr

    hooks, folder, mark = tmp_path / "hooks", tmp_path / "ray", tmp_path / "killed"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(KILLER.format(victim="006.png", mark=str(mark)))
    path = os.pathsep.join(filter(None, [str(hooks), os.environ.get("PYTHONPATH")]))
    environment["PYTHONPATH"] = path
    command += ["-o", str(folder), "--engine", "ray", "--workers", "1"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    assert mark.exists()  # the killer did its work
    assert finished.stdout.startswith("wrote 10 pictures to ")
    assert finished.stderr == f"ledits: error: 2 of 12 jobs failed; '{folder}/errors.jsonl' says why, one line each\n"
    assert contents(folder) == contents(tmp_path / "local")
    assert len(contents(folder)) == 12 - len(poisoned) + 1
    assert (folder / "002.png").stat().st_mtime_ns < mark.stat().st_mtime_ns  # not done twice
    assert (folder / "006.png").stat().st_mtime_ns > mark.stat().st_mtime_ns


def test_without_ray_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ledits_min.app.batch.ray_engine", raising=False)
    samples = str(Path(__file__).resolve().parents[2] / "weights/tiny/samples")
    argv = ["batch", samples, "-o", str(tmp_path / "out"), "--add", "hat", "--steps", "2", "--skip", "1"]
    assert main([*argv, "--engine", "ray"]) == 2
    message = "--engine ray needs Ray; `pip install 'ledits-min[batch]'` brings it"
    assert capsys.readouterr().err == f"ledits: error: {message}\n"
    assert main(argv) == 0  # the local engine never asks for it
