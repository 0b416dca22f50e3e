"""README's picture: what these commands make of three sample portraits, side by side.

    ledits edit portrait1.png                                  the reconstruction, with --output-size model
    ledits edit portrait1.png --add sunglasses                 and --add beard
    ledits edit portrait1.png --add "a red hat:scale=3,threshold=0.8" --skip 2      and "blue background:..."

python bench/readme.py [OUT.png]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ledits_min.app.cli.command import main as ledits
from ledits_min.app.sheet import Cell, contact_sheet
from ledits_min.files.opening import open_image
from ledits_min.files.write import save_image

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ("portrait1", "portrait2", "portrait3")
COMMANDS = {
    "reconstruction": ["--output-size", "model"],
    "+ sunglasses": ["--add", "sunglasses"],
    "+ beard": ["--add", "beard"],
    "+ a red hat": ["--add", "a red hat:scale=3,threshold=0.8", "--skip", "2"],
    "+ blue background": ["--add", "blue background:scale=3,threshold=0.8", "--skip", "2"],
}


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench/results/readme.png"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        edited = Path(folder) / "edited.png"
        for name in SAMPLES:
            picture = ROOT / f"weights/tiny/samples/{name}.png"
            cells = [Cell(name, open_image(picture))]
            for label, options in COMMANDS.items():
                code = ledits(["edit", str(picture), *options, "--dtype", "float32", "--overwrite", "-o", str(edited)])
                if code:
                    sys.exit(code)
                cells.append(Cell(label, open_image(edited)))
            rows.append(cells)
    save_image(contact_sheet(rows), out)


if __name__ == "__main__":
    main()
