"""README's picture: sample portraits, their reconstructions and four edits each, under the study's two settings.

python bench/readme.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ledits_min import Concept, LEdits
from ledits_min.app.cli.demo import run
from ledits_min.app.sheet import Cell, contact_sheet
from ledits_min.files.opening import open_image
from ledits_min.files.write import save_image

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ("portrait1", "portrait2", "portrait3")
LOCAL = ("sunglasses", "beard")  # with the model's defaults
GLOBAL = ("a red hat", "blue background")  # README: "--skip 2" and ":scale=3,threshold=0.8"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench/results/readme.png"
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    rows = []
    for name in SAMPLES:
        picture = open_image(ROOT / f"weights/tiny/samples/{name}.png")
        inversion, wide = ledits.invert(picture), ledits.invert(picture, skip=2)
        edits = {text: (inversion, Concept(text)) for text in LOCAL}
        edits |= {text: (wide, Concept(text, guidance_scale=3.0, threshold=0.8)) for text in GLOBAL}
        cells = [Cell(f"+ {text}", run(ledits, x, concepts=[c]).images[0]) for text, (x, c) in edits.items()]
        rows.append([Cell(name, picture), Cell("reconstruction", run(ledits, inversion).images[0]), *cells])
    save_image(contact_sheet(rows), out)


if __name__ == "__main__":
    main()
