"""The study of LEDITS++'s options as pictures: what each method buys for its evaluations, and contact sheets.

    python -m bench.study.options_pictures

Reads results/study_options_methods.json; writes study_options.png, study_sheet_options.png and
study_sheet_removals.png beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import mode
from typing import Any

import matplotlib
import torch
from PIL import Image

from bench.study.edits import Edit, named, pick
from bench.study.evaluate import Editor, as_images, draw_all
from bench.study.options import METHODS, REMOVALS, REMOVED, REMOVING, RESULTS, Method
from ledits_min import Concept, LEdits
from ledits_min.app.sheet import Cell, contact_sheet
from ledits_min.files.write import save_image
from ledits_min.weights.train_tiny.portraits import ideal_edit

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

CELL = 96
SHOWN = ("+ sunglasses", "+ beard", "a red shirt", "- glasses")
GREY = "#BBBBBB"
# Okabe and Ito's colours by how far a concept acts; the numbers name the rows.
COLORS = {"percentile": "#0072B2", "noise": "#E69F00", "attention": "#009E73", "both": "#D55E00"}


def plot(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Quality over evaluations, and fidelity against compliance, with 95 % intervals.

    The latter of the rows of equally many evaluations, as most have; the others stand there in grey.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14.0, 4.6))
    count = mode(row["evaluations"] for row in rows)
    gain, outside = ("gain_db", "nearer to the ideal edit, dB"), ("outside_db", "PSNR outside the region, dB")
    evaluations = ("evaluations", "UNet evaluations per picture, inversion and edit")
    success = ("success", "success, as the classifier sees it")
    _scatter(axes[0], rows, evaluations, gain)
    _scatter(axes[1], rows, evaluations, outside)
    _scatter(axes[2], rows, outside, success, count)
    axes[2].set_title(f"at {count:.0f} evaluations (grey: at others)", fontsize=9)
    names = "\n".join(f"{number}  {row['method']}" for number, row in enumerate(rows, start=1))
    dots = [Line2D([], [], marker="o", linestyle="", color=color, label=mask) for mask, color in COLORS.items()]
    figure.legend(handles=dots, title="mask", loc="upper left", bbox_to_anchor=(0.55, 0.0), frameon=False)
    figure.text(0.06, 0.0, names, va="top", fontsize=9)
    figure.tight_layout()
    return figure


def _scatter(
    axis: Axes, rows: Sequence[Mapping[str, Any]], x: tuple[str, str], y: tuple[str, str], count: float | None = None
) -> None:
    """Rows of equally many evaluations, which would stand on one another, are drawn side by side; all but those of
    `count` evaluations in grey."""
    there = [row["evaluations"] for row in rows]
    for number, (row, method) in enumerate(zip(rows, METHODS, strict=True)):
        beside = there[:number].count(there[number]) - (there.count(there[number]) - 1) / 2.0
        aside = 1.6 * beside if x[0] == "evaluations" else 0.0
        at, value, (low, high) = row[x[0]] + aside, row[y[0]], row[f"{y[0]}_interval"]
        spread = [[value - low], [high - value]]
        color = COLORS[method.mask] if count in (None, row["evaluations"]) else GREY
        axis.errorbar(at, value, yerr=spread, fmt="o", color=color, markersize=4, linewidth=1)
        axis.annotate(str(number + 1), (at, value), textcoords="offset points", xytext=(3, 4), fontsize=9)
    axis.set_xlabel(x[1], fontsize=9)
    axis.set_ylabel(y[1], fontsize=9)
    axis.grid(alpha=0.3)


def edited(editor: Editor, edit: Edit, method: Method, concepts: Sequence[Concept], count: int) -> list[Image.Image]:
    pictures = draw_all(pick("evaluation", edit.needs, count), editor.size)
    inversions = editor.invert(pictures, **method.inversion(edit))
    return as_images(editor.edit(inversions, concepts=concepts))


def given(editor: Editor, edit: Edit, count: int) -> list[list[Cell]]:
    """A row of originals, and one of what the renderer draws for the edit."""
    portraits = pick("evaluation", edit.needs, count)
    ideals = [ideal_edit(portrait, edit.changes) for portrait in portraits]
    pairs = (("original", portraits), ("ideal", ideals))
    return [[Cell(label, one) for one in as_images(draw_all(drawn, editor.size))] for label, drawn in pairs]


def options_sheet(editor: Editor, each: int = 3) -> Image.Image:
    """One row per method, `each` portraits of every shown edit side by side."""
    edits = [named(name) for name in SHOWN]
    rows: list[list[Cell]] = [[], []]
    for edit in edits:
        for row, cells in zip(rows, given(editor, edit, each), strict=True):
            row += cells
    for method in METHODS:
        made = [(edit, edited(editor, edit, method, method.concepts(edit), each)) for edit in edits]
        rows.append([Cell(edit.name, image) for edit, images in made for image in images])
    return contact_sheet(rows, ["", "", *(method.name for method in METHODS)], cell=CELL)


def removals_sheet(editor: Editor, each: int = 5) -> Image.Image:
    """One row per way, glasses on the left and hats on the right."""
    edits = [(named(name), phrase) for name, phrase in REMOVED.items()]
    rows: list[list[Cell]] = [[], []]
    for edit, _ in edits:
        for row, cells in zip(rows, given(editor, edit, each), strict=True):
            row += cells
    for way in REMOVALS:
        made = [edited(editor, edit, REMOVING, way.concepts(edit.texts[0], phrase), each) for edit, phrase in edits]
        rows.append([Cell("", image) for images in made for image in images])
    return contact_sheet(rows, ["", "", *(way.name for way in REMOVALS)], cell=CELL)


def main() -> None:
    rows = json.loads((RESULTS / "study_options_methods.json").read_text())["rows"]
    plot(rows).savefig(RESULTS / "study_options.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    torch.set_flush_denormal(True)
    editor = Editor(LEdits.from_pretrained("tiny", device="cpu"))
    save_image(options_sheet(editor), RESULTS / "study_sheet_options.png", {})
    save_image(removals_sheet(editor), RESULTS / "study_sheet_removals.png", {})


if __name__ == "__main__":
    main()
