"""`ledits batch` on many portraits, some of them poisoned: killed and resumed, and what it gains.

    python -m bench.batch kills         killed twice with SIGKILL and resumed, against an undisturbed run
    python -m bench.batch throughput    against the same jobs one by one in a loop, and Ray with 1 and 2 workers

Each writes its part of bench/results/batch.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ledits_min.weights.train_tiny.portraits import draw, sample_portrait

RESULTS = Path(__file__).parent / "results" / "batch.json"
SIZE = 128
# The jobs take turns; the rows of one kind differ in picture and seed alone.
EDITS: tuple[dict[str, Any], ...] = (
    {"add": "sunglasses"},
    {"add": ["beard", "smiling"], "output_size": "model"},
    {"add": "a red hat:scale=3,threshold=0.8", "skip": 2},
    {"target": "a portrait with blond hair"},
)
Damage = Callable[[bytes], bytes | None]


def _as_it_is(png: bytes) -> bytes:
    return png


def _huge(png: bytes) -> bytes:
    """A header that promises 10^18 pixels, its checksum right."""
    header = png[12:16] + b"\x3f\xff\xff\xff" * 2 + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


# What becomes of the picture (None: it is missing), what of the row, and what the reason must say.
POISONS: tuple[tuple[Damage, dict[str, Any], str], ...] = (
    (lambda png: png[: len(png) // 2], {}, "damaged or cut short"),
    (lambda png: None, {}, "does not exist"),
    (_as_it_is, {"add": "spaceship"}, "does not know 'spaceship'"),
    (_as_it_is, {"steps": 0}, "column steps is 0; a whole number in 1 .. 500"),
    (lambda png: b"not a picture\n", {}, "is not a picture"),
    (lambda png: b"", {}, "is an empty file"),
    (_huge, {}, "far above 64 megapixels"),
    (_as_it_is, {"eta": "much"}, "column eta: '\"much\"' is not a number"),
    (lambda png: b"<html>404</html>", {}, "its download failed"),
    (_as_it_is, {"add": "beard:threshold=2"}, "threshold"),
)


def write_table(folder: Path, count: int, poisoned: int) -> dict[str, str]:
    """Draw `count` portraits into `folder` and write jobs.jsonl there; {picture of a poisoned job: what is its reason}.

    The poisoned jobs stand at equal distances, so that most batches have a neighbour to protect.
    """
    places = {round((i + 0.5) * count / poisoned): POISONS[i % len(POISONS)] for i in range(poisoned)}
    rows, reasons = [], {}
    for number in range(count):
        name = f"{number:03}.png"
        row: dict[str, Any] = {"image": name, "seed": number, **EDITS[number % len(EDITS)]}
        path = folder / name
        Image.fromarray(draw(sample_portrait(f"batch {number}"), SIZE)).save(path)
        if number in places:
            damage, changes, reasons[name] = places[number]
            row |= changes
            content = damage(path.read_bytes())
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        rows.append(row)
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reasons


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    arguments = [str(folder / "jobs.jsonl"), "-o", str(out), *options]
    command = [sys.executable, "-m", "ledits_min.app.cli", "batch", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill a run when a third and when two thirds of its outputs are there, resume it, compare with another run."""
    reasons = write_table(folder, arguments.count, arguments.poisoned)
    good = arguments.count - len(reasons)
    options = ["--steps", str(arguments.steps)]
    began = time.perf_counter()
    undisturbed = start(folder, folder / "whole", *options)
    said = undisturbed.communicate()
    seconds = time.perf_counter() - began
    killed_at = []
    for share in (1, 2):
        process = start(folder, folder / "resumed", *options)
        while process.poll() is None and len(list((folder / "resumed").glob("*.png"))) < good * share // 3:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at.append({"exit": process.returncode, "outputs": len(outputs(folder / "resumed"))})
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "resumed").glob("*.png")}
    resumed = start(folder, folder / "resumed", *options)
    resumed.communicate()
    whole, again = outputs(folder / "whole"), outputs(folder / "resumed")
    errors = [json.loads(line) for line in (folder / "resumed" / "errors.jsonl").read_text().splitlines()]
    return {
        "jobs": arguments.count,
        "steps": arguments.steps,
        "killed_at": killed_at,
        "exits": {"undisturbed": undisturbed.returncode, "resumed": resumed.returncode},
        "undisturbed_says": " ".join("".join(said).replace(str(folder), "").split()),
        "undisturbed_seconds": round(seconds, 1),
        "outputs": len(again),
        "outputs_equal": sum(again.get(name) == content for name, content in whole.items()),
        "done_twice": sum(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items()),
        "left_over": sorted({path.name for path in (folder / "resumed").iterdir()} - set(again) - {"errors.jsonl"}),
        "errors_equal": (folder / "whole/errors.jsonl").read_bytes() == (folder / "resumed/errors.jsonl").read_bytes(),
        "errors_explained": sum(reasons.get(entry["image"], "\0") in entry["reason"] for entry in errors),
        "errors": [
            {**entry, "reason": entry["reason"].replace(str(folder) + "/", "")[:200]} for entry in errors
        ],
    }  # fmt: skip


def throughput(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same jobs in a plain loop over the library, in batches, and on Ray; each in a process of its own, the best of
    the rounds. A process's seconds run from its first output to its last, so that nobody's imports count."""
    write_table(folder, arguments.count, 0)
    ways: dict[str, Callable[[Path], subprocess.Popen[str]]] = {
        "one by one": lambda out: one_by_one(folder, out, arguments.steps),
        "batch": lambda out: start(folder, out, "--steps", str(arguments.steps)),
        **{f"ray, {n}": partial(start_ray, folder, arguments.steps, n) for n in (1, 2)},
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        for name, run in ways.items():
            out = folder / f"{name} {number}"
            began = time.perf_counter()
            process = run(out)
            said = process.communicate()
            if process.returncode:
                sys.exit(f"batch: {name} failed: {said}")
            stamps = sorted(path.stat().st_mtime for path in out.glob("*.png"))
            # The first wave's outputs come with the start.
            first = sum(stamp - stamps[0] < 0.5 * (stamps[-1] - stamps[0]) / len(stamps) for stamp in stamps)
            rate = (len(stamps) - first) / (stamps[-1] - stamps[0])
            seconds[name].append({"seconds": time.perf_counter() - began, "jobs_a_second": rate})
    found: dict[str, Any] = {
        name: {"seconds": round(min(run["seconds"] for run in runs), 2),
               "jobs_a_second": round(max(run["jobs_a_second"] for run in runs), 3)}
        for name, runs in seconds.items()
    }  # fmt: skip
    plain, together = outputs(folder / "one by one 0"), outputs(folder / "batch 0")
    for name in ways:
        found[name]["times_one_by_one"] = round(found[name]["jobs_a_second"] / found["one by one"]["jobs_a_second"], 2)
    found["psnr_batch_to_one_by_one"] = psnr(folder / "one by one 0", folder / "batch 0")
    found["equal_batch_to_one_by_one"] = sum(plain[name] == content for name, content in together.items())
    found["equal_ray_to_batch"] = [
        sum(outputs(folder / f"ray, {n} 0")[name] == content for name, content in together.items()) for n in (1, 2)
    ]
    return {"jobs": arguments.count, "steps": arguments.steps, "rounds": arguments.rounds, **found}


def start_ray(folder: Path, steps: int, workers: int, out: Path) -> subprocess.Popen[str]:
    return start(folder, out, "--steps", str(steps), "--engine", "ray", "--workers", str(workers))


LOOP = """
import json, sys
from pathlib import Path
from ledits_min import Concept, LEdits
from ledits_min.app.values import parse_concept
folder, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
out.mkdir()
ledits = LEdits.from_pretrained()
for line in (folder / "jobs.jsonl").read_text().splitlines():
    job = json.loads(line)
    words = job.get("add", [])
    concepts = [Concept(**parse_concept(text, False)) for text in ([words] if isinstance(words, str) else words)]
    _, result = ledits.invert_and_edit(
        folder / job["image"], num_steps=steps, skip=job.get("skip"), seed=job["seed"], target=job.get("target", ""),
        concepts=concepts, output_size=job.get("output_size", "input"))
    result.images[0].save(out / job["image"])
"""


def one_by_one(folder: Path, out: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOOP, str(folder), str(out), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def psnr(one: Path, other: Path) -> dict[str, float | None]:
    """Least and median over the pictures, in dB; None where all are equal."""
    values = []
    for path in sorted(one.glob("*.png")):
        with Image.open(path) as a, Image.open(other / path.name) as b:
            error = float(np.square(np.asarray(a, dtype=np.float64) - np.asarray(b)).mean())
        values.append(math.inf if error == 0.0 else 10.0 * math.log10(255.0**2 / error))
    found = {"least": min(values), "median": float(np.median(values))}
    return {name: round(value, 1) if math.isfinite(value) else None for name, value in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    from bench.speed.conditions import conditions  # here: tests read this file by its path, and cannot import bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kills", "throughput"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--poisoned", type=int, default=10, help="of the part kills")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="of the part throughput")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = {"kills": kills, "throughput": throughput}[arguments.part](Path(folder), arguments)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    load = [round(value, 2) for value in os.getloadavg()]
    kept[arguments.part] = {**found, "conditions": {**conditions(), "load_average": load}}
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")
    print(json.dumps(kept[arguments.part], indent=2))


if __name__ == "__main__":
    main()
