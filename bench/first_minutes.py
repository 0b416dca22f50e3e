"""How soon a newcomer is told what is wrong: `ledits` with each kind of mistake, seconds from Enter to the line.

    python -m bench.first_minutes [--rounds 5] [--before COMMIT] [--out FILE]

Every round runs each mistake once, in the tree as it is and in that of COMMIT, one after the other. Writes least and
median seconds, the exit code and the line. The page, from the command to the first edit: `python -m bench.web`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "weights/tiny/samples/portrait1.png"
MISTAKES = {
    "a file that is not there": ["edit", "none.png", "--add", "sunglasses"],
    "an option that does not exist": ["edit", SAMPLE, "--scales", "3"],
    "a number out of its range": ["edit", SAMPLE, "--steps", "0"],
    "a word the model does not know": ["edit", SAMPLE, "--add", "zeppelin"],
    "a model that is not there": ["edit", SAMPLE, "--model", "none.safetensors", "--add", "hat"],
    "a folder that is not there": ["edit", SAMPLE, "--add", "hat", "-o", "none/out.png"],
    "a table that is not there": ["batch", "none.csv", "-o", "out"],
    "a file that is no checkpoint": ["inspect", "README.md"],
    "nothing to sweep": ["sweep", SAMPLE, "--add", "hat"],
    "help": ["edit", "--help"],
}


@contextmanager
def tree_of(commit: str | None) -> Iterator[Path | None]:
    """A copy of the repository as it was."""
    if commit is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def told(tree: Path, mistake: list[str]) -> tuple[float, int, str]:
    """Seconds, the exit code and the last line."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "ledits_min.app.cli", *mistake]
    ran = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    return time.perf_counter() - started, ran.returncode, (ran.stderr.splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", metavar="COMMIT", help="measure the tree of this commit, too")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/first_minutes.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "command": "python -m bench.first_minutes " + " ".join(sys.argv[1:]),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "cores": os.cpu_count(),
        "mistakes": {},
    }
    with tree_of(arguments.before) as old:
        trees = {"now": ROOT} | ({} if old is None else {"before": old})
        for name, mistake in MISTAKES.items():
            runs = {when: [told(tree, mistake) for _ in range(arguments.rounds)] for when, tree in trees.items()}
            found["mistakes"][name] = {
                when: {
                    "least_s": round(min(seconds for seconds, _, _ in each), 3),
                    "median_s": round(median(seconds for seconds, _, _ in each), 3),
                    "exit_code": each[0][1],
                    "line": each[0][2].replace(str(ROOT), "...")[:200],
                }
                for when, each in runs.items()
            }
            print(name, {when: one["median_s"] for when, one in found["mistakes"][name].items()}, flush=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
