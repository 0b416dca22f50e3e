"""The study's contact sheets: edits as they come, with where they acted, and portraits of other styles.

python bench/study/sheets.py [RESULTS_FOLDER]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.study.edits import CHANGE, EDITS, REVERSE, Edit, named, pick
from bench.study.evaluate import Editor, as_images, draw_all
from ledits_min import LEdits
from ledits_min.app.sheet import Cell, contact_sheet
from ledits_min.files.display import overlay
from ledits_min.files.write import save_image
from ledits_min.weights.train_tiny.portraits import OTHER_STYLES, Pixels, draw_other, ideal_edit

RESULTS = Path(__file__).parents[1] / "results"
CELL = 128
BARE = {"eyewear": ("none",), "hat": ("none",), "beard": ("none",), "mouth": ("serious", "sad")}
ADDED = ("+ sunglasses", "+ glasses", "+ a red hat", "+ beard", "+ smiling")
ELSEWHERE = ("+ sunglasses", "+ a red hat", "+ beard", "blue background")


def edited(editor: Editor, edit: Edit, pictures: Pixels) -> tuple[list[Image.Image], list[Image.Image]]:
    """The edits, and each original under the mask of where its concept acted."""
    setting = edit.setting(editor.ledits.defaults)
    inversions = editor.invert(pictures, num_steps=setting.num_steps, skip=setting.skip)
    results = editor.results(inversions, concepts=edit.concepts(setting))
    masks = [mask for result in results for mask in result.masks[0]]
    where = [overlay(image, mask) for image, mask in zip(as_images(pictures), masks, strict=True)]
    return [image for result in results for image in result.images], where


def by_portrait(editor: Editor, pictures: Pixels, edits: Sequence[Edit]) -> Image.Image:
    """Two rows per portrait: the original and its edits, and below each edit where it acted."""
    done = [(edit.name, *edited(editor, edit, pictures)) for edit in edits]
    rows: list[list[Cell]] = []
    for index, original in enumerate(as_images(pictures)):
        rows.append([Cell("original", original), *(Cell(name, images[index]) for name, images, _ in done)])
        rows.append([Cell("", None), *(Cell("where it acted", where[index]) for _, _, where in done)])
    return contact_sheet(rows, cell=CELL)


def by_edit(editor: Editor, edits: Sequence[Edit], count: int) -> Image.Image:
    """Three rows per edit: originals, edits, and the ideal edits as the renderer draws them."""
    rows, titles = [], []
    for edit in edits:
        portraits = pick("evaluation", edit.needs, count)
        pictures = draw_all(portraits, editor.size)
        ideals = draw_all([ideal_edit(portrait, edit.changes) for portrait in portraits], editor.size)
        images, _ = edited(editor, edit, pictures)
        for label, row in (("original", as_images(pictures)), (edit.name, images), ("ideal", as_images(ideals))):
            rows.append([Cell(label, image) for image in row])
        titles += [edit.name, "", ""]
    return contact_sheet(rows, titles, cell=3 * CELL // 4)


def sheets(editor: Editor) -> Mapping[str, Image.Image]:
    bare = draw_all(pick("evaluation", BARE, 4), editor.size)
    others = np.stack([draw_other(style, f"evaluation {i}", editor.size) for style in OTHER_STYLES for i in range(2)])
    removals = [edit for edit in EDITS if edit.group in (REVERSE, CHANGE)]
    return {
        "study_sheet_additions": by_portrait(editor, bare, [named(name) for name in ADDED]),
        "study_sheet_removals_and_changes": by_edit(editor, removals, 6),
        "study_sheet_out_of_domain": by_portrait(editor, others, [named(name) for name in ELSEWHERE]),
    }


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    warnings.simplefilter("ignore")  # that the embedded model cannot even copy some of these well is the point
    for name, sheet in sheets(Editor(LEdits.from_pretrained("tiny", device="cpu"))).items():
        save_image(sheet, folder / f"{name}.png", {})


if __name__ == "__main__":
    main()
