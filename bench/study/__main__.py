"""The study: the LEDITS paper's claims and its baselines, measured on portraits whose ideal edits are known.

    python bench/study/__main__.py                 everything, some 80 minutes on one core, 40 with two processes
    python bench/study/__main__.py --quick         small counts, some ten minutes; results go to OUT/quick
    python bench/study/__main__.py --part 1/2      every second unit: run 2/2 beside it, with the same --out

The work is cut into units, `section/item`. Each finished unit is a file in --out, so that a stopped run goes on where
it was; with all of them there, results/study.json, the pictures and RESULTS.md are written. One thread a process is the
fastest for networks this small: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.study import claims, measure
from bench.study.edits import EDITS, GLOBAL, PAIRS, REVERSE, both
from bench.study.evaluate import ORACLE, Editor, load_oracle, rounded
from bench.study.measure import COMPARED, FULL, QUICK, Study
from ledits_min import InputError, LEdits
from ledits_min.weights.train_tiny.export import processor, write_json
from ledits_min.weights.train_tiny.portraits import OTHER_STYLES

RESULTS = Path(__file__).parents[1] / "results"

Measure = Callable[[Study, str], dict[str, Any]]
SECTIONS: dict[str, tuple[Measure, Sequence[str]]] = {
    "model": (measure.measure_model, ("parts",)),
    "edits": (measure.measure_edits, tuple(measure.by_needs())),
    "curves": (measure.measure_curves, tuple(edit.name for edit in COMPARED)),
    "reverse": (measure.measure_reverse, tuple(edit.name for edit in EDITS if edit.group == REVERSE)),
    "sega": (claims.measure_sega, tuple(edit.name for edit in COMPARED)),
    "target": (claims.measure_target, tuple(f"{target} under {concept}" for target, concept in claims.KEPT_TARGETS)),
    "pairs": (claims.measure_pair, tuple(both(*pair).name for pair in PAIRS)),
    "sweeps": (claims.measure_sweep, tuple(f"{name} by {dial}" for name in claims.SWEPT for dial in claims.SWEEPS)),
    "cost": (claims.measure_cost, ("methods",)),
    "seeds": (claims.measure_seeds, claims.SWEPT),
    "elsewhere": (claims.measure_elsewhere, OTHER_STYLES),
}


def conditions(study: Study) -> dict[str, Any]:
    """What the figures mean little without."""
    ledits = study.editor.ledits
    packages = ("torch", "transformers", "numpy", "scikit-image", "dicebear-core", "dicebear-styles", "resvg-py")
    return {
        "model": ledits.fingerprint,
        "dtype": str(ledits.dtype).removeprefix("torch."),
        "defaults": vars(ledits.defaults),
        "settings": {reach: asdict(setting) for reach, setting in study.settings.items()},
        "counts": asdict(study.counts),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def run_units(study: Study, wanted: Sequence[tuple[str, str]], folder: Path) -> None:
    """Measure what is not there yet. A unit's file goes by the unit and by all that its figures depend on."""
    for section, item in wanted:
        file = unit_file(study, folder, section, item)
        if file.exists():
            continue
        print(f"{section}/{item} ...", end=" ", flush=True)
        with study.editor.work() as work:
            found = rounded(SECTIONS[section][0](study, item))
        cost = {"unet_evaluations": work.evaluations, "seconds": round(work.seconds, 1)}
        write_json(file, {"section": section, "item": item, "found": found, "work": cost})
        print(f"{work.evaluations} evaluations, {work.seconds:.0f} s", flush=True)


def unit_file(study: Study, folder: Path, section: str, item: str) -> Path:
    about = conditions(study)
    key = json.dumps([section, item, about["model"], about["dtype"], about["settings"], about["counts"]])
    return folder / f"{section}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def collect(study: Study, folder: Path) -> dict[str, Any] | None:
    """All units as one dictionary by section, or None while some are missing."""
    whole: dict[str, Any] = {}
    work: dict[str, Any] = {}
    for section, (_, items) in SECTIONS.items():
        for item in items:
            file = unit_file(study, folder, section, item)
            if not file.exists():
                return None
            unit = json.loads(file.read_text())
            whole.setdefault(section, {}).update(unit["found"])
            spent = work.setdefault(section, {"unet_evaluations": 0, "seconds": 0.0})
            for name in spent:
                spent[name] = round(spent[name] + unit["work"][name], 1)
    return {"conditions": conditions(study), "work": work, **whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small counts; results go to OUT/quick")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of " + ",".join(SECTIONS))
    parser.add_argument("--part", default="1/1", help="i/n: every n-th unit from the i-th")
    parser.add_argument("--out", type=Path, default=Path("build/study"), help="where finished units lie")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    parser.add_argument("--dtype", default="auto", help="of the networks")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    ledits = LEdits.from_pretrained(arguments.model, device="cpu", dtype=arguments.dtype)
    settings = {"local": EDITS[0].setting(ledits.defaults), "global": GLOBAL}
    counts = QUICK if arguments.quick else FULL
    study = Study(Editor(ledits), load_oracle(arguments.oracle), counts, settings)

    sections = arguments.sections.split(",")
    part, parts = map(int, arguments.part.split("/"))
    wanted = [(section, item) for section in sections for item in SECTIONS[section][1]]
    run_units(study, wanted[part - 1 :: parts], arguments.out)
    whole = collect(study, arguments.out)
    if whole is None:
        print(f"units are missing in {arguments.out}; run the other sections or parts")
        return
    results = arguments.out / "quick" if arguments.quick else RESULTS
    write_json(results / "study.json", {"command": "python bench/study/__main__.py " + " ".join(sys.argv[1:]), **whole})
    text = results / "RESULTS.md" if arguments.quick else RESULTS.parent / "RESULTS.md"
    for script in ("plots.py", "sheets.py"):
        subprocess.run([sys.executable, Path(__file__).with_name(script), results], check=True)
    command = [sys.executable, "-m", "bench.report", results.absolute(), text.absolute()]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"study: error: {error}")
