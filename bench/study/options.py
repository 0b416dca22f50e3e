"""LEDITS++'s options on the embedded model: masks, the second-order solver, few steps; and removals in several ways.

    python -m bench.study.options --portraits 24        some 20 minutes on one core
    python -m bench.study.options --portraits 24 --only removals

Every row edits the same unseen portraits. Writes results/study_options_*.json and results/study_options.png, quality
over evaluations; `python -m bench.report` shows them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.study.edits import ADD, CHANGE, EDITS, REVERSE, Edit, named, pick
from bench.study.evaluate import ORACLE, Editor, draw_all, load_oracle, rounded, score, summary
from bench.study.scoring import wilson
from ledits_min import Concept, InputError, LEdits
from ledits_min.weights.train_tiny.classifier import Classifier
from ledits_min.weights.train_tiny.export import write_json

RESULTS = Path(__file__).parents[1] / "results"
EDITED = tuple(edit for edit in EDITS if edit.group in (ADD, CHANGE, REVERSE) and not edit.vague)
GROUPS = {ADD: "add", CHANGE: "change", REVERSE: "remove"}


@dataclass(frozen=True)
class Method:
    """A row: the inversion, and (scale, threshold) by what is edited: local, global, in reverse."""

    name: str
    num_steps: int
    skip: int
    local: tuple[float, float]
    wide: tuple[float, float]
    reverse: tuple[float, float]
    warmup_steps: int = 0
    mask: str = "percentile"
    solver_order: int = 1

    def concepts(self, edit: Edit) -> list[Concept]:
        numbers = self.reverse if edit.reverse else self.wide if edit.reach == "global" else self.local
        return [Concept(t, *numbers, self.warmup_steps, reverse=edit.reverse, mask=self.mask) for t in edit.texts]


TUNED: dict[str, Any] = {"local": (1.5, 0.95), "wide": (2.5, 0.8), "reverse": (1.0, 0.95)}
MASKED: dict[str, Any] = {"local": (1.5, 0.9), "wide": (4.0, 0.8), "reverse": (1.0, 0.9)}
SHIPPED: dict[str, Any] = {"local": (2.0, 0.9), "wide": (3.0, 0.8), "reverse": (3.0, 0.8), "warmup_steps": 1}
THEIRS: dict[str, Any] = {"local": (5.0, 0.9), "wide": (5.0, 0.9), "reverse": (5.0, 0.9)}
METHODS = (
    Method("LEDITS, 25 steps, the study's settings", 25, 4, **SHIPPED),
    Method("LEDITS, 25 steps, tuned", 25, 2, **TUNED),
    Method("LEDITS, 10 steps (preset fast)", 10, 1, **TUNED),
    Method("LEDITS, 6 steps", 6, 0, **TUNED),
    Method("10 steps, noise mask", 10, 1, **MASKED, mask="noise"),
    Method("10 steps, attention mask", 10, 1, **MASKED, mask="attention"),
    Method("10 steps, both masks", 10, 1, **MASKED, mask="both"),
    Method("10 steps, second order", 10, 1, **TUNED, solver_order=2),
    Method("10 steps, second order, both masks", 10, 1, **MASKED, mask="both", solver_order=2),
    Method("LEDITS++'s settings (preset leditspp)", 34, 4, **THEIRS, mask="both", solver_order=2),
)


@dataclass(frozen=True)
class Removal:
    """A way to ask that a thing go: in reverse, by a phrase of its absence, or by both at once."""

    name: str
    reverse: float = 0.0
    phrase: float = 0.0
    threshold: float = 0.8
    mask: str = "percentile"

    def concepts(self, thing: str, phrase: str) -> list[Concept]:
        asked = [Concept(thing, self.reverse, self.threshold, 0, reverse=True, mask=self.mask)] * (self.reverse > 0.0)
        return asked + [Concept(phrase, self.phrase, self.threshold, 0, mask=self.mask)] * (self.phrase > 0.0)


REMOVALS = (
    Removal("in reverse", reverse=3.0),
    Removal("in reverse, both masks", reverse=3.0, mask="both"),
    Removal("in reverse, attention mask", reverse=3.0, mask="attention"),
    Removal("by phrase", phrase=3.0),
    Removal("by phrase, attention mask", phrase=3.0, mask="attention"),
    Removal("both at once", reverse=1.5, phrase=3.0),
    Removal("both at once, attention mask", reverse=1.5, phrase=3.0, mask="attention"),
)
REMOVED = {"- glasses": "no glasses", "- hat": "no hat"}


@dataclass
class Bench:
    editor: Editor
    oracle: Classifier
    portraits: int
    drawn: dict[str, Any] = field(default_factory=dict)

    def measure(self, edit: Edit, method: Method, concepts: Sequence[Concept]) -> dict[str, Any]:
        """What `score` sums up of one edit, and evaluations and seconds per picture, inversion included."""
        if edit.name not in self.drawn:
            portraits = pick("evaluation", edit.needs, self.portraits)
            self.drawn[edit.name] = portraits, draw_all(portraits, self.editor.size)
        portraits, pictures = self.drawn[edit.name]
        with self.editor.work() as work:
            inversions = self.editor.invert(
                pictures, num_steps=method.num_steps, skip=method.skip, solver_order=method.solver_order
            )
            edited = self.editor.edit(inversions, concepts=concepts)
        found = summary(score(self.oracle, edit, portraits, pictures, edited, deep=False))
        per = {"evaluations": work.evaluations / len(pictures), "seconds": work.seconds / len(pictures)}
        return rounded(found | per)  # type: ignore[no-any-return]


def over_edits(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the edits, success and nearness over all portraits with their intervals, gains by kind of edit."""
    count = sum(one["count"] for one in found.values())
    line: dict[str, Any] = {"count": count}
    for name in ("success", "closer"):
        hits = round(sum(one[name] * one["count"] for one in found.values()))
        line |= {name: hits / count, f"{name}_interval": wilson(hits, count)}
    for name in ("outside_db", "gain_db", "evaluations", "seconds"):
        line[name] = fmean(one[name] for one in found.values())
    for group, word in GROUPS.items():
        line[f"gain_db_{word}"] = fmean(found[e.name]["gain_db"] for e in EDITED if e.group == group)
    return rounded(line)  # type: ignore[no-any-return]


def measure_methods(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        found = {edit.name: bench.measure(edit, method, method.concepts(edit)) for edit in EDITED}
        rows.append({"method": method.name, **over_edits(found), "edits": found})
        print(method.name, {k: v for k, v in rows[-1].items() if k != "edits"}, flush=True)
    return rows


def measure_removals(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    base = Method("", 25, 2, **TUNED)
    for name, phrase in REMOVED.items():
        edit = named(name)
        for way in REMOVALS:
            found = bench.measure(edit, base, way.concepts(edit.texts[0], phrase))
            rows.append({"edit": name, "way": way.name, **found})
            print(name, way.name, found["success"], found["outside_db"], found["gain_db"], flush=True)
    return rows


def plot(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Quality over evaluations: what is gained against the ideal edit, and what is kept outside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11.0, 4.6))
    wanted = (("gain_db", "nearer to the ideal edit, dB"), ("outside_db", "PSNR outside the region, dB"))
    for axis, (name, label) in zip(axes, wanted, strict=True):
        for number, row in enumerate(rows, start=1):
            axis.plot(row["evaluations"], row[name], "o", color="#0072B2")
            axis.annotate(str(number), (row["evaluations"], row[name]), textcoords="offset points", xytext=(5, 4))
        axis.set_xlabel("UNet evaluations per picture, inversion and edit", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        axis.grid(alpha=0.3)
    words = "   ".join(f"{number} {row['method']}" for number, row in enumerate(rows, start=1))
    figure.text(0.5, 0.0, words, ha="center", va="top", fontsize=8, wrap=True)
    figure.tight_layout()
    figure.savefig(out, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--portraits", type=int, default=200, help="of each edit (default: 200)")
    parser.add_argument("--only", choices=("methods", "removals"), help="one of the two tables; the other one stays")
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    parser.add_argument("--dtype", default="auto", help="of the networks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype=arguments.dtype)
    bench = Bench(Editor(ledits), load_oracle(arguments.oracle), arguments.portraits)
    command = "python -m bench.study.options " + " ".join(map(shlex.quote, sys.argv[1:]))
    about = {"portraits": arguments.portraits, "dtype": str(ledits.dtype).removeprefix("torch."), "command": command}
    for table, measure in (("methods", measure_methods), ("removals", measure_removals)):
        if arguments.only in (None, table):
            rows = measure(bench)
            write_json(arguments.out / f"study_options_{table}.json", {**about, "rows": rows})
            if table == "methods":
                plot(rows, arguments.out / "study_options.png")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"options: error: {error}")
