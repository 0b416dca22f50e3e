"""`ledits batch --engine ray` as people run it: ended by a signal, and on a cluster that loses a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "weights/tiny/samples"
RUN = [sys.executable, "-m", "ledits_min.app.cli", "batch"]
WAIT = 240.0  # seconds after which a test gives up on a process


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, "OMP_NUM_THREADS": "1", **more}  # Ray's workers have one thread, and another number rounds


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_table(folder: Path, jobs: int) -> Path:
    rows = [f'{{"image": "{SAMPLES}/portrait{1 + i % 6}.png", "output": "{i}.png", "seed": {i}}}' for i in range(jobs)]
    (folder / "t.jsonl").write_text("\n".join(rows))
    return folder / "t.jsonl"


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + WAIT
    while process.poll() is None and not condition() and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code", "says"), [(signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_it_with_one_line_and_nothing_stays(
    tmp_path: Path, number: signal.Signals, code: int, says: str
) -> None:
    """In the middle of the work; Ray has handlers, traces and folders of its own."""
    pytest.importorskip("ray", reason="the [batch] extra is not installed")
    place = tmp_path / "tmp"
    place.mkdir()
    short = Path("/tmp") / f"l{os.getpid()}"  # where Ray's sockets lie, whose names must be short
    short.symlink_to(place)
    try:
        table, out = write_table(tmp_path, 200), tmp_path / "out"
        argv = [*RUN, str(table), "-o", str(out), "--add", "hat", "--steps", "5", "--engine", "ray", "--workers", "1"]
        process = subprocess.Popen(
            argv, env=environment(TMPDIR=str(short)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: out.is_dir() and any(out.glob("*.png")), process)
        process.send_signal(number)
        said = process.communicate(timeout=WAIT)[1]
        assert (process.returncode, said) == (code, f"ledits: error: {says}\n")
        assert list(place.glob("ledits-ray-*")) == []
        assert 0 < len(list(out.glob("*.png"))) < 200
        assert not list(out.glob(".ledits-*"))
    finally:
        short.unlink()


def test_a_cluster_of_three_machines_loses_one(tmp_path: Path) -> None:
    """Three nodes of one slot each; one is killed when some pictures are there. The bytes are the local engine's."""
    pytest.importorskip("ray", reason="the [batch] extra is not installed")
    table = write_table(tmp_path, 30)
    argv = [*RUN, str(table), "--add", "hat", "--steps", "5", "--batch-size", "2"]
    local = subprocess.run([*argv, "-o", tmp_path / "local"], env=environment(), capture_output=True, check=False)
    assert local.returncode == 0, local.stderr
    script = CLUSTER.format(argv=[*argv, "-o", str(tmp_path / "ray"), "--engine", "ray", "--workers", "3"])
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "ray")], env=environment(), capture_output=True, text=True,
        check=False, timeout=2 * WAIT,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[0] == "killed a node in the middle: True"
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


CLUSTER = """
import os, subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", RAY_BACKEND_LOG_LEVEL="fatal")
cluster = Cluster()
nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False) for _ in range(3)]
cluster.wait_for_nodes()
out = Path(sys.argv[1])
process = subprocess.Popen({argv!r}, env={{**os.environ, "RAY_ADDRESS": cluster.address}})
while process.poll() is None and len(list(out.glob("*.png"))) < 4:
    time.sleep(0.02)
middle = process.poll() is None and len(list(out.glob("*.png"))) < 24
cluster.remove_node(nodes[-1], allow_graceful=False)  # not the one that keeps the cluster together
print("killed a node in the middle:", middle, flush=True)
code = process.wait()
cluster.shutdown()
sys.exit(code)
"""
