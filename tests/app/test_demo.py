"""`ledits demo`: the sheet is made, and every place on it that should hold a picture does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ledits_min.app.cli import main
from ledits_min.app.sheet import CELL


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
