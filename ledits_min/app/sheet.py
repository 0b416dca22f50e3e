"""Contact sheets: pictures in rows on white, with titles, headings and labels that never run into their neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageDraw, ImageFont

CELL = 168  # pixels of the longer side of one picture
_SHOWN_AT = 830  # pixels a README gives a sheet: the width at which its text must still be read
_INK, _GREY = "black", (60, 60, 60)

Ink = str | tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """A picture of the sheet and the words under it; None leaves the place empty."""

    label: str
    picture: Image.Image | None


@dataclass(frozen=True)
class Type:
    """The one font there is, at `size` pixels."""

    size: int

    @cached_property
    def font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(self.size)

    @property
    def line(self) -> int:
        return round(1.3 * self.size)

    def width(self, text: str) -> int:
        return math.ceil(self.font.getlength(text))

    def wrapped(self, text: str, width: int) -> list[str]:
        """`text` in lines of at most `width` pixels, broken at spaces, and within a word that is wider than a line."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            while len(word) > 1 and self.width(word) > width:
                fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or self.width(word[:n]) <= width)
                lines.append(word[:fits])
                word = word[fits:]
            lines.append(word)
        return lines

    def draw(self, sheet: Image.Image, at: tuple[int, int], lines: Sequence[str], ink: Ink) -> None:
        pen, font = ImageDraw.Draw(sheet), self.font
        for number, line in enumerate(lines):
            pen.text((at[0], at[1] + number * self.line), line, ink, font)


def letters_for(width: int, cell: int) -> Type:
    """For pictures of `cell` pixels on a sheet `width` wide: still read where a README shows it, never too large."""
    return Type(max(14, min(cell // 10, round(13 * width / _SHOWN_AT))))


def contact_sheet(
    rows: Sequence[Sequence[Cell]],
    titles: Sequence[str] = (),
    *,
    cell: int = CELL,
    columns: Sequence[str] = (),
    sides: Sequence[str] = (),
    lead: Cell | None = None,
    caption: Sequence[str] = (),
) -> Image.Image:
    """Rows of pictures, each within `cell` pixels per side and over its label.

    titles   over each row, none where it is ""
    columns  headings over the columns, and `sides` at the left of the rows
    lead     a picture at the top, with the lines of `caption` at its right
    """
    gap, across = max(8, cell // 16), max(map(len, rows))
    wide = across * (cell + gap) + gap
    letters = letters_for(wide, cell)
    headline = Type(letters.size + 2)

    left = [headline.wrapped(text, cell) for text in sides] or [[]] * len(rows)
    margin = max((headline.width(line) + gap for lines in left for line in lines), default=0)
    over = [headline.wrapped(text, cell) for text in columns]
    found = _Flow(max(wide + margin, 3 * (cell + gap) if lead else 0), gap, cell, letters, headline)
    if lead is not None:
        room = found.width - cell - 3 * gap
        found.row([lead], gap, right=[line for text in caption for line in letters.wrapped(text, room)])
    if over:
        found.headings(over, gap + margin)
    for index, row in enumerate(rows):
        if index < len(titles) and titles[index]:
            found.title(titles[index])
        found.row(row, gap + margin, left[index])
    return found.sheet()


class _Flow:
    """What stands where: filled from the top down, drawn once the height is known."""

    def __init__(self, width: int, gap: int, cell: int, letters: Type, headline: Type) -> None:
        self.width, self.gap, self.cell, self.letters, self.headline = width, gap, cell, letters, headline
        self.top = gap
        self.pictures: list[tuple[Image.Image, tuple[int, int]]] = []
        self.texts: list[tuple[Type, tuple[int, int], Sequence[str], Ink]] = []

    def title(self, text: str) -> None:
        lines = self.headline.wrapped(text, self.width - 2 * self.gap)
        self.texts.append((self.headline, (self.gap, self.top), lines, _INK))
        self.top += len(lines) * self.headline.line + self.gap // 2

    def headings(self, columns: Sequence[list[str]], left: int) -> None:
        """One over each column, all standing on one line."""
        self.top += max(map(len, columns)) * self.headline.line
        for index, lines in enumerate(columns):
            at = (left + index * (self.cell + self.gap), self.top - len(lines) * self.headline.line)
            self.texts.append((self.headline, at, lines, _INK))
        self.top += self.gap // 2

    def row(self, cells: Sequence[Cell], left: int, side: Sequence[str] = (), right: Sequence[str] = ()) -> None:
        """Pictures from `left` on with their labels; `side` in the margin, halfway down; `right` of the last, text."""
        small = [None if entry.picture is None else fitted(entry.picture, self.cell) for entry in cells]
        labels = [self.letters.wrapped(entry.label, self.cell) for entry in cells]
        height = max((picture.height for picture in small if picture is not None), default=0)
        for index, (picture, label) in enumerate(zip(small, labels, strict=True)):
            at = left + index * (self.cell + self.gap)
            if picture is not None:
                self.pictures.append((picture, (at, self.top)))
                self.texts.append((self.letters, (at, self.top + height + self.gap // 3), label, _GREY))
        beside = len(side) * self.headline.line
        self.texts.append((self.headline, (self.gap, self.top + max(0, height - beside) // 2), side, _INK))
        self.texts.append((self.letters, (left + len(cells) * (self.cell + self.gap), self.top), right, _GREY))
        words = max(map(len, labels), default=0) * self.letters.line
        below = height + (self.gap // 3 + words if words else 0)
        self.top += max(below, beside, len(right) * self.letters.line) + self.gap

    def sheet(self) -> Image.Image:
        sheet = Image.new("RGB", (self.width, self.top), "white")
        for picture, at in self.pictures:
            sheet.paste(picture, at)
        for letters, at, lines, ink in self.texts:
            letters.draw(sheet, at, lines, ink)
        return sheet


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at `side` pixels."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)
