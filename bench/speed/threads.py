"""How the threads of OpenMP should wait for one another: `ledits edit` on a quiet and on a busy machine.

    python -m bench.speed.threads [--rounds 5] [--out FILE]

Each round runs every variant once, in turn, without and with one busy process per core beside it, and takes the time of
the whole command. Writes seconds (all rounds, least, median) and the ratio of the medians, torch's own to each variant.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ledits_min.weights.train_tiny.export import processor, write_json

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ["edit", str(ROOT / "weights/tiny/samples/portrait1.png"), "--add", "sunglasses", "--overwrite", "-o"]
VARIANTS: dict[str, dict[str, str]] = {
    "torch's own": {"KMP_BLOCKTIME": "200"},  # Intel's default, GNU's does not read it: the command leaves it alone
    "the command's": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin a little": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
KNOWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def spin() -> None:
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    running = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(processes)]
    for process in running:
        process.start()
    try:
        time.sleep(1.0)
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def seconds(variant: dict[str, str], out: Path) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in KNOWN} | variant
    started = time.perf_counter()
    command = [sys.executable, "-m", "ledits_min.app.cli", *COMMAND, str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    return time.perf_counter() - started


def measure(rounds: int, beside: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder, busy(beside):
        for _ in range(rounds):
            for name, variant in VARIANTS.items():
                found[name].append(round(seconds(variant, Path(folder) / "x.png"), 2))
    reference = statistics.median(found["torch's own"])
    return {
        name: {
            "seconds": each,
            "least": min(each),
            "median": statistics.median(each),
            "times_as_fast": round(reference / statistics.median(each), 2),
        }
        for name, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/threads.json")
    arguments = parser.parse_args()
    cores, load = os.cpu_count() or 1, os.getloadavg()
    found = {
        "command": "python -m bench.speed.threads " + " ".join(sys.argv[1:]),
        "processor": processor(),
        "cores": cores,
        "load_before": [round(value, 2) for value in load],
        "nothing beside it": measure(arguments.rounds, 0),
        "a busy process per core beside it": measure(arguments.rounds, cores),
    }
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
