"""Contact sheets: every picture is where it belongs, and no text touches a picture, another text or the edge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ledits_min.app import sheet
from ledits_min.app.sheet import Cell, Type, contact_sheet

LONG = "a concept with a name far longer than the picture above it, and 9223372036854775807"


def box(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of everything in this colour."""
    down, across = (np.asarray(picture) == colour).all(axis=-1).nonzero()
    return int(across.min()), int(down.min()), int(across.max()), int(down.max())


def test_it_places_every_cell_and_leaves_gaps_white() -> None:
    red, tall = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 128), "blue")
    made = contact_sheet([[Cell("a", red), Cell("", None)], [Cell("b", tall)]], ["first", ""], cell=50)
    first, second = box(made, (255, 0, 0)), box(made, (0, 0, 255))
    assert (first[2] - first[0] + 1, first[3] - first[1] + 1) == (50, 50)
    assert (second[2] - second[0] + 1, second[3] - second[1] + 1) == (25, 50)
    assert first[3] < second[1] and first[0] == second[0]
    assert np.asarray(made)[first[1] : first[3], first[2] + 1 :].min() == 255


def test_a_matrix_has_its_lead_on_top_and_its_headings_above_and_beside() -> None:
    colours = [[(200, 10 * i, 10 * j) for j in range(3)] for i in range(2)]
    rows = [[Cell("", Image.new("RGB", (80, 80), colour)) for colour in row] for row in colours]
    lead = Cell("original", Image.new("RGB", (80, 80), (0, 200, 0)))
    made = contact_sheet(
        rows, cell=80, columns=["x 1", "x 2", "x 3"], sides=["y 1", "y 2"], lead=lead, caption=["fixed"]
    )  # fmt: skip
    places = [[box(made, colour) for colour in row] for row in colours]
    assert all(places[0][j][0] == places[1][j][0] for j in range(3))
    assert all(places[i][j][1] == places[i][0][1] for i in range(2) for j in range(3))
    assert places[0][0][2] < places[0][1][0] and places[0][0][3] < places[1][0][1]
    top = box(made, (0, 200, 0))
    pixels = np.asarray(made.convert("L"))
    assert top[3] < places[0][0][1]
    assert pixels[top[1] : top[1] + 20, top[2] + 1 :].min() < 128  # the caption, right of the original
    for left, above, _, below in (place for row in places for place in row[:1]):
        assert pixels[above:below, :left].min() < 128  # its heading, at the left
    for left, above, right, _ in places[0]:
        assert pixels[above - 25 : above, left:right].min() < 128  # its heading, above


@pytest.mark.parametrize("cell", [48, 168, 512])
def test_no_text_leaves_its_place(cell: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int, int, int]] = []

    def draw(self: Type, made: Image.Image, at: tuple[int, int], lines: list[str], ink: object) -> None:
        if lines:
            drawn.append((*at, at[0] + max(map(self.width, lines)), at[1] + len(lines) * self.line))
            assert drawn[-1][2] <= made.width and drawn[-1][3] <= made.height

    monkeypatch.setattr(sheet.Type, "draw", draw)
    picture = Image.new("RGB", (64, 48))
    rows = [[Cell(LONG, picture)] * 3] * 2
    contact_sheet(
        rows, [LONG, ""], cell=cell, columns=[LONG] * 3, sides=[LONG, "b"], lead=Cell(LONG, picture), caption=[LONG] * 5
    )
    assert len(drawn) == 2 + 3 + 6 + 2 + 1
    for index, one in enumerate(drawn):
        for other in drawn[index + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)


@settings(deadline=None)
@given(st.text(min_size=1), st.integers(20, 300))
def test_wrapping_keeps_every_letter_and_the_width(text: str, width: int) -> None:
    letters = Type(14)
    lines = letters.wrapped(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(letters.width(line) <= width or len(line) == 1 for line in lines)
