"""Damaged files by the thousand: `python -m tests.robustness.fuzz --count 100000 --seed 0`.

Every input must be accepted or end in an InputError or RunError of one printable line: no other exception, no crash, no
more than SECONDS and MEGABYTES each, no network, no process, no file written elsewhere, no code of its own run. The
inputs are read by a child process; what happened is counted by kind and outcome. An input is made from seed and number
alone, so `--replay NUMBER` shows the traceback of one, and `--start` and `--count` divide a long run into slices whose
counts `--results` adds up in bench/results/fuzz.json. Exit code 1 if anything broke the promise.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "bench/results/fuzz.json"
SECONDS = 20  # for one input; the slowest takes a small part of it
MEGABYTES = 1500  # for one input above the resting process: a picture of 64 megapixels in its largest mode
MAX_LINE = 4000
CHILD_STARTS = 20  # a child that dies is started again behind the input that killed it, this many times

_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "subprocess.Popen", "os.system",
              "os.exec", "os.fork", "os.posix_spawn", "pickle.find_class", "ctypes.dlopen")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", action="store_true", help=f"add the counts to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="read one input and show what happens")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None or args.replay is not None:
        return _read_all(args)
    began = time.perf_counter()
    records = _run_child(args)
    summary = _summary(records)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    for record in records:
        if record["outcome"].startswith("BROKEN"):
            print(f"{record['kind']} {record['number']}: {record['outcome']}: {record['says']}")
    if args.results:
        _add_results(summary, args)
    print(json.dumps(summary, indent=1))
    return int(any(outcome.startswith("BROKEN") for counts in summary["outcomes"].values() for outcome in counts))


def _run_child(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of every input; a crash or a hang is a record too, and costs the child its life."""
    records: list[dict[str, Any]] = []
    end = args.start + args.count
    for _ in range(CHILD_STARTS):
        first = records[-1]["number"] + 1 if records else args.start
        if first >= end:
            break
        with tempfile.TemporaryDirectory(prefix="ledits-fuzz-") as folder, tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-m", "tests.robustness.fuzz", "--child", folder, "--seed", str(args.seed)]
            command += ["--start", str(first), "--count", str(end - first)]
            environment = {**os.environ, "HOME": folder, "HF_HOME": folder}
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
                                  env=environment) as child:  # fmt: skip
                assert child.stdout is not None
                records += [json.loads(line) for line in child.stdout]
            done = records[-1]["number"] + 1 if records else args.start
            if done < end:
                errors.seek(0)
                tail = errors.read()[-1500:]
                if not records or done == first:
                    raise SystemExit(f"the child did not start:\n{tail}")
                kind = _kind(args.seed, done)[0]
                records.append({"number": done, "kind": kind, "outcome": "BROKEN: crash or hang", "says": tail})
    return records


def _kind(seed: int, number: int) -> tuple[str, Random]:
    """The kind of an input and the generator that makes it."""
    from tests.robustness.fuzz.targets import SHARES

    rng = Random(f"{seed}:{number}")
    return rng.choices(list(SHARES), [share for _, share in SHARES.values()])[0], rng


def _read_all(args: argparse.Namespace) -> int:
    """The child: make and read every input, one line of JSON each."""
    from tests.robustness.fuzz.targets import build

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print what they like
    warnings.simplefilter("ignore")
    if args.replay is not None:
        args.start, args.count, args.child = args.replay, 1, tempfile.mkdtemp(prefix="ledits-fuzz-")
    folder = Path(args.child)
    kinds = build(folder)
    watch = _Watch(folder)
    limit = _memory("VmSize") + 2 * MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(args.start, args.start + args.count):
        name, rng = _kind(args.seed, number)
        kinds[name].make(rng)
        record = {"number": number, "kind": name, **_read_one(kinds[name], watch, args.replay is not None)}
        if args.replay is not None:
            record["folder"] = str(folder / name)
        print(json.dumps(record), file=out, flush=True)
    return 0


def _read_one(kind: Any, watch: _Watch, show: bool) -> dict[str, Any]:
    """What became of one input: outcome, message, seconds, megabytes."""
    watch.begin()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    says = ""
    try:
        kind.read()
        outcome = "accepted"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is counted; a panic in Rust is no Exception
        if show:
            traceback.print_exc()
        outcome, says = _judged(error)
    faulthandler.cancel_dump_traceback_later()
    seconds, megabytes, deeds = watch.end()
    if deeds:
        outcome, says = "BROKEN: " + deeds[0].split()[0], "; ".join(deeds[:3])
    elif megabytes > MEGABYTES:
        outcome, says = "BROKEN: memory", f"{megabytes:.0f} MB; {says}"
    return {"outcome": outcome, "says": says, "seconds": round(seconds, 4), "megabytes": round(megabytes, 1)}


def _judged(error: BaseException) -> tuple[str, str]:
    """The outcome that an exception stands for."""
    from ledits_min.errors import InputError, RunError

    says = str(error)
    if not isinstance(error, InputError | RunError):
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"BROKEN: {type(error).__name__}", f"{says[:300]} at {where.filename}:{where.lineno}"
    if not says.isprintable() or not 0 < len(says) <= MAX_LINE:
        return "BROKEN: not one line", repr(says)[:300]
    return ("refused" if isinstance(error, InputError) else "failed in one line"), says[:200]


class _Watch:
    """Seconds, memory and forbidden deeds of one input."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.deeds, self.on = str(folder), list[str](), False
        self.code = (sys.prefix, sys.base_prefix, str(ROOT), "<frozen")
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _FORBIDDEN:
            self.deeds.append(f"{event} {arguments!r:.200}")
        elif event == "exec" and not str(arguments[0].co_filename).startswith(self.code):
            self.deeds.append(f"exec {arguments[0].co_filename}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            here = str(arguments[0]).startswith((self.folder, os.devnull))
            self.deeds += [] if here else [f"writes {arguments[0]!r}"]

    def begin(self) -> None:
        self.deeds.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.resting, self.began, self.on = _memory("VmRSS"), time.perf_counter(), True

    def end(self) -> tuple[float, float, list[str]]:
        self.on = False
        return time.perf_counter() - self.began, (_memory("VmHWM") - self.resting) / 2**20, self.deeds


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    outcomes: dict[str, Counter[str]] = {}
    for record in records:
        outcomes.setdefault(record["kind"], Counter())[record["outcome"]] += 1
    worst = {
        measure: {kind: max(r.get(measure, 0) for r in records if r["kind"] == kind) for kind in sorted(outcomes)}
        for measure in ("seconds", "megabytes")
    }
    counts = {kind: dict(sorted(counts.items())) for kind, counts in sorted(outcomes.items())}
    return {"inputs": len(records), "outcomes": counts, "most_seconds": worst["seconds"], "most_MB": worst["megabytes"]}


def _add_results(summary: dict[str, Any], args: argparse.Namespace) -> None:
    """Add a slice to the file; a slice that is in it already, or of another seed, starts the file anew."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    slices = old.get("slices", [])
    fresh = old.get("seed") != args.seed or any(
        start < args.start + args.count and args.start < start + count for start, count in slices
    )
    if fresh:
        old, slices = {"outcomes": {}, "inputs": 0, "seconds": 0.0, "most_seconds": {}, "most_MB": {}}, []
    outcomes = {
        kind: dict(sorted((Counter(old["outcomes"].get(kind, {})) + Counter(counts)).items()))
        for kind, counts in summary["outcomes"].items()
    }
    merged = {
        "seed": args.seed,
        "inputs": old["inputs"] + summary["inputs"],
        "outcomes": outcomes,
        "limits": {"seconds": SECONDS, "MB": MEGABYTES},
        **{key: {kind: max(value, old[key].get(kind, 0)) for kind, value in summary[key].items()}
           for key in ("most_seconds", "most_MB")},
        "seconds": round(old["seconds"] + summary["seconds"], 1),
        "slices": sorted([*slices, [args.start, args.count]]),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(merged, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
