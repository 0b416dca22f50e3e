"""`ledits demo`: the sheet is made, and every place on it that should hold a picture does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ledits_min.app.cli import main
from ledits_min.app.demo import CELL, Cell, contact_sheet


def test_demo_writes_one_sheet_of_legible_size(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    assert main(["demo", "-o", str(path), "--dtype", "float32"]) == 0
    sheet = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert sheet.shape[1] > 6 * CELL
    # Seven columns of the first row of pictures would not fit; six are there and none is blank.
    row = sheet[40 : 40 + CELL]
    columns = np.array_split(row, 6, axis=1)
    assert all(column.std() > 10 for column in columns)
    assert main(["demo", "-o", str(path)]) == 2  # never overwritten unasked


def test_contact_sheet_places_every_cell_and_leaves_gaps_white() -> None:
    red, tall = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 128), "blue")
    sheet = np.asarray(contact_sheet([[Cell("a", red), Cell("", None)], [Cell("b", tall)]], ["first", ""], cell=50))
    is_red = (sheet == (255, 0, 0)).all(axis=-1)
    is_blue = (sheet == (0, 0, 255)).all(axis=-1)
    assert is_red.sum() == 50 * 50
    assert is_blue.sum() == 50 * 100
    assert is_red.nonzero()[0].max() < is_blue.nonzero()[0].min()
