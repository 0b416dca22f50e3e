"""`ledits demo`: what LEDITS does, on one sheet: reconstruction, each workflow, where it acted, a scale sweep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PIL import Image

from ledits_min.app.sheet import Cell, contact_sheet
from ledits_min.engine.progress import progress_bar
from ledits_min.files.display import overlay
from ledits_min.files.inversion import Inversion
from ledits_min.files.result import Result
from ledits_min.pipeline import LEdits
from ledits_min.sega import Concept

CONCEPTS = ("sunglasses", "glasses", "beard", "smile")
TARGET = "a portrait with a red hat"
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)

Edits = dict[str, dict[str, Any]]  # label -> arguments of `LEdits.edit`


def demo_sheet(ledits: LEdits, picture: Image.Image, seed: int = 0) -> Image.Image:
    """Invert `picture` once and edit it seventeen times."""
    singles: Edits = {f"+ {text}": {"concepts": [Concept(text)]} for text in CONCEPTS}
    workflows: Edits = {
        "target prompt alone": {"target": TARGET},
        "target, + sunglasses": {"target": TARGET, "concepts": [Concept("sunglasses")]},
        "target, + smile": {"target": TARGET, "concepts": [Concept("smile")]},
        "+ beard, + sunglasses": {"concepts": [Concept("beard"), Concept("sunglasses")]},
        "+ beard, threshold 0.5": {"concepts": [Concept("beard", threshold=0.5)]},
        "+ beard, from step 10": {"concepts": [Concept("beard", warmup_steps=10)]},
    }
    scales: Edits = {
        f"+ sunglasses, scale {s:g}": {"concepts": [Concept("sunglasses", guidance_scale=s)]} for s in SCALES
    }
    wanted: Edits = {"reconstruction": {}, **singles, **workflows, **scales}

    inversion = ledits.invert(picture, seed=seed)
    done: dict[str, Result] = {}
    with progress_bar("editing", len(wanted), "edit", wanted=True) as bar:
        for label, options in wanted.items():
            done[label] = run(ledits, inversion, **options)
            bar.update()

    def cells(labels: Iterable[str]) -> list[Cell]:
        return [Cell(label, done[label].images[0]) for label in labels]

    where = [Cell("where it acted", overlay(picture, done[label].masks[0][0])) for label in singles]
    empty = Cell("", None)
    rows = [
        [Cell("the picture", picture), *cells(["reconstruction", *singles])],
        [empty, empty, *where],
        cells(workflows),
        cells(scales),
    ]
    titles = (
        "One concept at a time (workflow 1: no target prompt)",
        "",
        f'A target prompt, "{TARGET}", without and with concepts (workflow 2); two concepts; the dials',
        "The strength of a concept",
    )
    return contact_sheet(rows, titles)


def run(ledits: LEdits, inversion: Inversion, **options: object) -> Result:
    """One edit at the model's own size, without a progress bar of its own."""
    return ledits.edit(inversion, progress=False, output_size="model", **options)  # type: ignore[arg-type]
