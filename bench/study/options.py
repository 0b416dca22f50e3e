"""LEDITS++'s options on the embedded model: masks, the second-order solver, few steps; and removals in several ways.

    python -m bench.study.options                       200 portraits, some 70 minutes on one core for every 50
    python -m bench.study.options --round 2             the second 50 portraits, beside a process for the first
    python -m bench.study.options --portraits 50 --only removals

Every row edits the same unseen portraits, 50 at a time. A finished round of a row and an edit is a file in --folder, so
that a stopped run goes on where it was. Writes results/study_options_*.json; `python -m bench.study.options_pictures`
draws quality over evaluations and contact sheets, and `python -m bench.report` writes the tables. One thread a process
is the fastest: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.study.edits import ADD, CHANGE, EDITS, REVERSE, Edit, named, pick
from bench.study.evaluate import (
    BATCH,
    ORACLE,
    Editor,
    Scores,
    Work,
    draw_all,
    joined,
    load_oracle,
    rounded,
    score,
    summary,
)
from bench.study.scoring import bootstrap, mean_of
from ledits_min import Concept, InputError, Inversion, LEdits
from ledits_min.files.write import atomic_write
from ledits_min.weights.train_tiny.classifier import Classifier
from ledits_min.weights.train_tiny.export import processor, write_json
from ledits_min.weights.train_tiny.portraits import Pixels, Portrait

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
    wide_skip: int | None = None  # for what is large or removed, where that has another one

    def inversion(self, edit: Edit) -> dict[str, int]:
        skip = self.wide_skip if self.wide_skip is not None and edit.reach == "global" else self.skip
        return {"num_steps": self.num_steps, "skip": skip, "solver_order": self.solver_order}

    def concepts(self, edit: Edit) -> list[Concept]:
        numbers = self.reverse if edit.reverse else self.wide if edit.reach == "global" else self.local
        return [Concept(t, *numbers, self.warmup_steps, reverse=edit.reverse, mask=self.mask) for t in edit.texts]


TUNED: dict[str, Any] = {"local": (1.5, 0.95), "wide": (2.5, 0.8), "reverse": (1.0, 0.95)}
MASKED: dict[str, Any] = {"local": (1.5, 0.9), "wide": (4.0, 0.8), "reverse": (1.0, 0.9)}
SHIPPED: dict[str, Any] = {
    "local": (2.0, 0.9), "wide": (3.0, 0.8), "reverse": (3.0, 0.8), "warmup_steps": 1, "wide_skip": 2,
}  # fmt: skip
THEIRS: dict[str, Any] = {"local": (5.0, 0.9), "wide": (5.0, 0.9), "reverse": (5.0, 0.9)}
METHODS = (
    Method("LEDITS, 25 steps, the study's settings", 25, 4, **SHIPPED),
    Method("LEDITS, 25 steps, tuned", 25, 2, **TUNED),
    Method("LEDITS, 10 steps, tuned", 10, 1, **TUNED),
    Method("LEDITS, 6 steps, tuned", 6, 0, **TUNED),
    Method("10 steps, noise mask", 10, 1, **MASKED, mask="noise"),
    Method("10 steps, attention mask", 10, 1, **MASKED, mask="attention"),
    Method("10 steps, both masks", 10, 1, **MASKED, mask="both"),
    Method("10 steps, second order", 10, 1, **TUNED, solver_order=2),
    Method("10 steps, second order, both masks", 10, 1, **MASKED, mask="both", solver_order=2),
    Method("LEDITS++'s numbers (preset leditspp)", 34, 4, **THEIRS, mask="both", solver_order=2),
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
REMOVING = Method("", 25, 2, **TUNED)


@dataclass(frozen=True)
class Task:
    """One row's answer to one edit."""

    edit: Edit
    method: Method
    concepts: Sequence[Concept]


class Inverted(NamedTuple):
    portraits: list[Portrait]
    pictures: Pixels
    inversions: list[Inversion]
    work: Work


@dataclass
class Bench:
    """Runs tasks a round of `BATCH` portraits at a time; a finished round of a task is a file in `folder`."""

    editor: Editor
    oracle: Classifier
    folder: Path
    inverted: dict[str, Inverted] = field(default_factory=dict)  # of the present round

    def scores(self, task: Task, portraits: range) -> Scores:
        """What each of these portraits scores, and the evaluations and seconds of its inversion and edit."""
        file = self.folder / f"{self._key(task, portraits)}.json"
        if not file.is_file():
            scores = {name: values.tolist() for name, values in self._measure(task, portraits).items()}
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps(scores).encode())  # whole or not at all: a stopped run reads it again
        found: Mapping[str, list[float]] = json.loads(file.read_text())
        return {name: np.array(values, dtype=np.float64) for name, values in found.items()}

    def _measure(self, task: Task, portraits: range) -> Scores:
        edit, method = task.edit, task.method
        # Edits that share their portraits and methods that share their schedule share the inversions too.
        key = json.dumps([dict(edit.needs), list(portraits), method.inversion(edit)])
        if key not in self.inverted:
            self.inverted[key] = self._invert(edit, method, portraits)
        before = self.inverted[key]
        with self.editor.work() as editing:
            edited = self.editor.edit(before.inversions, concepts=task.concepts)
        scores = score(self.oracle, edit, before.portraits, before.pictures, edited, deep=False)
        for name in ("evaluations", "seconds"):
            spent = getattr(before.work, name) + getattr(editing, name)
            scores[name] = np.full(len(portraits), spent / len(portraits))
        return scores

    def _invert(self, edit: Edit, method: Method, portraits: range) -> Inverted:
        picked = pick("evaluation", edit.needs, portraits.stop)[portraits.start :]
        pictures = draw_all(picked, self.editor.size)
        with self.editor.work() as work:
            inversions = self.editor.invert(pictures, seed=portraits, **method.inversion(edit))
        return Inverted(picked, pictures, inversions, work)

    def _key(self, task: Task, portraits: range) -> str:
        """The file's name, by all that its figures depend on."""
        ledits, concepts = self.editor.ledits, [asdict(concept) for concept in task.concepts]
        inversion = task.method.inversion(task.edit)
        about = [ledits.fingerprint, str(ledits.dtype), task.edit.name, *inversion.values(), concepts, list(portraits)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def rounds(portraits: int) -> list[range]:
    return [range(first, min(first + BATCH, portraits)) for first in range(0, portraits, BATCH)]


def measured(bench: Bench, tasks: Sequence[Task], parts: Sequence[range]) -> list[Scores]:
    """The scores of every task, joined over the rounds: a round of all tasks before the next."""
    found: list[list[Scores]] = [[] for _ in tasks]
    for portraits in parts:
        bench.inverted.clear()
        for task, scores in zip(tasks, found, strict=True):
            scores.append(bench.scores(task, portraits))
        print(f"portraits {portraits.start + 1} to {portraits.stop}: done", flush=True)
    return [joined(scores) for scores in found]


def about_edit(found: Scores) -> dict[str, Any]:
    """`evaluate.summary`, and what a picture costs."""
    return summary(found) | {name: float(found[name].mean()) for name in ("evaluations", "seconds")}


def over_edits(found: Sequence[Scores], base: Sequence[Scores]) -> dict[str, Any]:
    """Over all portraits of `EDITED`: rates and means with their intervals, and what differs from `base`, in pairs."""
    whole, others = joined(found), joined(base)
    line = about_edit(whole)
    for name in ("success", "gain_db", "outside_db"):
        difference = whole[name] - others[name]
        line |= {f"{name}_more": float(mean_of(difference)), f"{name}_more_interval": bootstrap(difference)}
    for group, word in GROUPS.items():
        gains = [scores["gain_db"].mean() for edit, scores in zip(EDITED, found, strict=True) if edit.group == group]
        line[f"gain_db_{word}"] = fmean(gains)
    return line


def measure_methods(bench: Bench, parts: Sequence[range]) -> list[dict[str, Any]]:
    tasks = [Task(edit, method, method.concepts(edit)) for method in METHODS for edit in EDITED]
    found = measured(bench, tasks, parts)
    by_method = [found[first : first + len(EDITED)] for first in range(0, len(found), len(EDITED))]
    return [
        {
            "method": method.name,
            **over_edits(scores, by_method[0]),
            "edits": {edit.name: about_edit(one) for edit, one in zip(EDITED, scores, strict=True)},
        }
        for method, scores in zip(METHODS, by_method, strict=True)
    ]


def measure_removals(bench: Bench, parts: Sequence[range]) -> list[dict[str, Any]]:
    asked = [(named(name), phrase, way) for name, phrase in REMOVED.items() for way in REMOVALS]
    tasks = [Task(edit, REMOVING, way.concepts(edit.texts[0], phrase)) for edit, phrase, way in asked]
    return [
        {"edit": edit.name, "way": way.name, **about_edit(scores)}
        for (edit, _, way), scores in zip(asked, measured(bench, tasks, parts), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--portraits", type=int, default=200, help="of each edit (default: 200)")
    parser.add_argument("--only", choices=("methods", "removals"), help="one of the two tables; the other one stays")
    parser.add_argument("--round", type=int, help="only measure this round, from 1, and write no table")
    parser.add_argument("--folder", type=Path, default=Path("build/options"), help="where finished rounds lie")
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    parser.add_argument("--dtype", default="auto", help="of the networks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype=arguments.dtype)
    bench = Bench(Editor(ledits), load_oracle(arguments.oracle), arguments.folder)
    command = " ".join(["python -m bench.study.options", *map(shlex.quote, sys.argv[1:])])
    about = {"portraits": arguments.portraits, "dtype": str(ledits.dtype).removeprefix("torch."), "command": command}
    about["processor"] = processor()
    parts = rounds(arguments.portraits)
    for table, measure in (("methods", measure_methods), ("removals", measure_removals)):
        if arguments.only not in (None, table):
            continue
        if arguments.round is not None:
            measure(bench, parts[arguments.round - 1 : arguments.round])
            continue
        rows = rounded(measure(bench, parts))
        write_json(arguments.out / f"study_options_{table}.json", {**about, "rows": rows})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"options: error: {error}")
