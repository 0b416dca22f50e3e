"""Which settings edit best: a grid over skip, scale and threshold on portraits of the split "tuning".

    python bench/study/tune.py                                      the local edits
    python bench/study/tune.py --edits change --thresholds 0.3,0.6  the global ones
    python bench/study/tune.py --edits 'blond hair,+ beard' --steps 25,50 --skips 0.2,0.36 --scales 3,6

A line is one setting: means over the edits, and in brackets the worst edit. The study's two settings were read off
these tables: the local one stands in weights/tiny/ledits.json, the global one in bench/study/edits.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.study.edits import CHANGE, EDITS, Edit, Setting, pick
from bench.study.evaluate import ORACLE, Editor, draw_all, load_oracle, rounded, score, summary
from bench.study.scoring import Numbers
from ledits_min import InputError, LEdits
from ledits_min.weights.train_tiny.classifier import Classifier
from ledits_min.weights.train_tiny.export import write_json

RESULTS = Path(__file__).parents[1] / "results"
LOCAL = ("+ sunglasses", "+ glasses", "+ a red hat", "+ beard", "+ smiling", "+ no glasses", "- sunglasses", "- beard")
COLUMNS = {"success": 100.0, "kept_ratio": 100.0, "outside_db": 1.0, "gain_db": 1.0, "closer": 100.0}


def chosen(names: str) -> list[Edit]:
    wanted = {"local": LOCAL, "change": tuple(e.name for e in EDITS if e.group == CHANGE)}.get(names, names.split(","))
    by_name = {edit.name: edit for edit in EDITS}
    return [by_name[name] for name in wanted]


def grid(steps: Sequence[int], skips: Sequence[float], scales: Sequence[float], cuts: Sequence[float]) -> list[Setting]:
    return [Setting(n, round(s * n), scale, cut) for n, s, scale, cut in product(steps, skips, scales, cuts)]


def tried(
    editor: Editor, oracle: Classifier, edit: Edit, settings: Sequence[Setting], count: int
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """The edit's summary under every setting; settings that share steps and skip share the inversion."""
    portraits = pick("tuning", edit.needs, count)
    pictures = draw_all(portraits, editor.size)
    for num_steps, skip in dict.fromkeys((setting.num_steps, setting.skip) for setting in settings):
        inversions = editor.invert(pictures, num_steps=num_steps, skip=skip)
        for setting in settings:
            if (setting.num_steps, setting.skip) == (num_steps, skip):
                edited = editor.edit(inversions, concepts=edit.concepts(setting))
                yield setting, summary(score(oracle, edit, portraits, pictures, edited, deep=False))


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", default="local", help="local, change, or names with commas between")
    parser.add_argument("--steps", type=numbers, default=[50])
    parser.add_argument("--skips", type=numbers, default=[0.2, 0.36, 0.5], help="shares of the steps")
    parser.add_argument("--scales", type=numbers, default=[2, 4, 6])
    parser.add_argument("--thresholds", type=numbers, default=[0.8, 0.9, 0.95])
    parser.add_argument("--count", type=int, default=12, help="portraits of each edit")
    parser.add_argument("--single", action="store_true", help="a table for every edit as well")
    parser.add_argument("--save", metavar="NAME", help="write results/tune_NAME.json, which the report shows")
    parser.add_argument("--note", default="", help="what the report says above it")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    editor = Editor(LEdits.from_pretrained(arguments.model, device="cpu", dtype=arguments.dtype))
    oracle = load_oracle(arguments.oracle)
    settings = grid([int(n) for n in arguments.steps], arguments.skips, arguments.scales, arguments.thresholds)
    found: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in settings}
    head = "steps skip scale threshold | " + "  ".join(f"{name:>15}" for name in COLUMNS)
    for edit in chosen(arguments.edits):
        print(f"\n{edit.name}\n{head}" if arguments.single else edit.name, flush=True)
        for setting, line in tried(editor, oracle, edit, settings, arguments.count):
            found[setting].append(line)
            if arguments.single:
                print(row(setting, [line]), flush=True)
    print(f"\nmean over the edits (the worst)\n{head}")
    ranked = sorted(found.items(), key=lambda pair: -merit(pair[1]))
    for setting, lines in ranked:
        print(row(setting, lines))
    if arguments.save:
        command = "python bench/study/tune.py " + " ".join(map(shlex.quote, sys.argv[1:]))
        rows = [{**asdict(setting), **means(lines)} for setting, lines in ranked]
        write_json(RESULTS / f"tune_{arguments.save}.json", {"command": command, "note": arguments.note, "rows": rows})


def means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over the edits, and the worst of them."""
    values = {name: [line[name] for line in lines] for name in COLUMNS}
    worst = {f"{name}, worst": min(column) for name, column in values.items()}
    return rounded({name: sum(column) / len(column) for name, column in values.items()} | worst, 4)


def merit(lines: Sequence[dict[str, Any]]) -> float:
    """For the order of the lines only: what falls short of 95 % success, 95 % kept, 30 dB outside and 3 dB gained."""
    wanted = {"success": (0.95, 0.05), "kept_ratio": (0.95, 0.02), "outside_db": (30.0, 2.0), "gain_db": (3.0, 1.0)}
    return -sum(max(0.0, (goal - line[name]) / unit) for line in lines for name, (goal, unit) in wanted.items())


def row(setting: Setting, lines: Sequence[dict[str, Any]]) -> str:
    cells = []
    for name, unit in COLUMNS.items():
        values: Numbers = np.array([line[name] for line in lines]) * unit
        cells.append(f"{values.mean():7.1f} ({values.min():5.1f})")
    dials = f"{setting.num_steps:5d} {setting.skip:4d} {setting.scale:5.1f} {setting.threshold:9.2f}"
    return f"{dials} | " + "  ".join(f"{cell:>15}" for cell in cells)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"tune: error: {error}")
