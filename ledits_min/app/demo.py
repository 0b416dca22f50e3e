"""`ledits demo`: what LEDITS does, on one sheet: reconstruction, each workflow, where it acted, a scale sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ledits_min.app.outputs import overlay
from ledits_min.archive import Inversion
from ledits_min.pipeline import LEdits, Result
from ledits_min.sega import Concept
from ledits_min.weights.survey import TINY

SAMPLE = TINY / "samples" / "portrait1.png"
CONCEPTS = ("sunglasses", "glasses", "beard", "smile")
TARGET = "a portrait with a red hat"
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
CELL = 168  # pixels of one picture
_GAP, _TEXT = 10, 14


@dataclass(frozen=True)
class Cell:
    """A picture of the sheet and the words under it; None leaves the place empty."""

    label: str
    picture: Image.Image | None


def demo_sheet(ledits: LEdits, picture: Image.Image, seed: int = 0) -> Image.Image:
    """Invert `picture` once and edit it fourteen times."""
    inversion = ledits.invert(picture, seed=seed)

    def edited(label: str, **options: object) -> Cell:
        return Cell(label, run(ledits, inversion, **options).images[0])

    singles = [run(ledits, inversion, concepts=[Concept(text)]) for text in CONCEPTS]
    pairs = list(zip(CONCEPTS, singles, strict=True))
    rows = [
        [Cell("the picture", picture), edited("reconstruction")]
        + [Cell(f"+ {text}", result.images[0]) for text, result in pairs],
        [Cell("", None), Cell("", None)]
        + [Cell(f"where + {text} acted", overlay(picture, result.masks[0][0])) for text, result in pairs],
        [
            edited("target prompt alone", target=TARGET),
            edited("target, + sunglasses", target=TARGET, concepts=[Concept("sunglasses")]),
            edited("target, + smile", target=TARGET, concepts=[Concept("smile")]),
            edited("+ beard, + sunglasses", concepts=[Concept("beard"), Concept("sunglasses")]),
            edited("+ beard, threshold 0.5", concepts=[Concept("beard", threshold=0.5)]),
            edited("+ beard, from step 10", concepts=[Concept("beard", warmup_steps=10)]),
        ],
        [edited(f"+ sunglasses, scale {s:g}", concepts=[Concept("sunglasses", guidance_scale=s)]) for s in SCALES],
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


def contact_sheet(rows: Sequence[Sequence[Cell]], titles: Sequence[str], cell: int = CELL) -> Image.Image:
    """Rows of pictures on white, each row under its title (none where it is ""), each picture over its label."""
    font, bold = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT + 2)
    pictures = [entry.picture for row in rows for entry in row if entry.picture is not None]
    tallest = max(round(cell * picture.height / picture.width) for picture in pictures)
    tops, height = [], _GAP
    for title in titles:
        height += (_TEXT + 2 + _GAP) * bool(title)
        tops.append(height)
        height += tallest + _TEXT + 2 * _GAP
    sheet = Image.new("RGB", (_GAP + max(map(len, rows)) * (cell + _GAP), height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, title, top in zip(rows, titles, tops, strict=True):
        draw.text((_GAP, top - _TEXT - 2 - _GAP // 2), title, "black", bold)
        for column, entry in enumerate(row):
            if entry.picture is None:
                continue
            left = _GAP + column * (cell + _GAP)
            size = (cell, round(cell * entry.picture.height / entry.picture.width))
            sheet.paste(entry.picture.resize(size, Image.Resampling.BICUBIC), (left, top))
            draw.text((left, top + tallest + 3), entry.label, (60, 60, 60), font)
    return sheet
