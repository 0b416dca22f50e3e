"""README's picture: sample portraits, their reconstructions and three edits each, all with the default settings.

python bench/readme.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ledits_min import Concept, LEdits
from ledits_min.app.demo import Cell, contact_sheet, run
from ledits_min.image import open_image, save_image

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ("portrait1", "portrait2", "portrait3")
CONCEPTS = ("sunglasses", "a red hat", "beard")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench/results/readme.png"
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    rows = []
    for name in SAMPLES:
        picture = open_image(ROOT / f"weights/tiny/samples/{name}.png")
        inversion = ledits.invert(picture)
        edits = [Cell(f"+ {text}", run(ledits, inversion, concepts=[Concept(text)]).images[0]) for text in CONCEPTS]
        rows.append([Cell(name, picture), Cell("reconstruction", run(ledits, inversion).images[0]), *edits])
    save_image(contact_sheet(rows, [""] * len(rows)), out)


if __name__ == "__main__":
    main()
