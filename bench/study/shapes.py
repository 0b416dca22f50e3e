"""Which square a model of one size should be given of a picture of another shape: sunglasses on drawings of six shapes.

    python -m bench.study.shapes [--count 6] [--out FILE]

The study's portraits on longer walls, or cut off; success is judged by the oracle on the portrait's own square. "The
default" is `files.square.find_square`; the others work at the whole picture with one of its sides at the model's 128
pixels, at its middle, or at the whole padded by its edges.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from bench.study.edits import named, pick
from bench.study.evaluate import as_images, as_pixels, load_oracle, succeeds
from ledits_min import LEdits
from ledits_min.weights.train_tiny.classifier import see
from ledits_min.weights.train_tiny.export import write_json
from ledits_min.weights.train_tiny.portraits import Pixels, draw

RESULTS = Path(__file__).parents[1] / "results"
SIDE = 192  # of the portrait in the drawing
# (width, height) of the drawing, and where the portrait's corner lies in it, in quarters of its side
SHAPES = {
    "4:3": ((16 / 3, 4), (2 / 3, 0)),
    "3:4, a wall above": ((4, 16 / 3), (0, 4 / 3)),
    "16:9": ((64 / 9, 4), (14 / 9, 0)),
    "16:9, the face beside": ((64 / 9, 4), (0, 0)),
    "4:3, cut above and below": ((4, 3), (0, -0.5)),
    "3:4, cut at the sides": ((3, 4), (-0.5, 0)),
}
Edit = Callable[[Pixels], Pixels]  # drawings (N, H, W, 3) to edited ones


def drawing(portrait: Pixels, shape: str) -> Pixels:
    """The portrait on more of its own edges, or less of it."""
    (width, height), (left, top) = (tuple(round(SIDE / 4 * value) for value in pair) for pair in SHAPES[shape])
    across, down = np.arange(width) - left, np.arange(height) - top
    return portrait[down.clip(0, SIDE - 1)][:, across.clip(0, SIDE - 1)]


def portrait_of(edited: Pixels, shape: str) -> Pixels:
    """The portrait's own square, as small as the oracle reads it."""
    left, top = (round(SIDE / 4 * value) for value in SHAPES[shape][1])
    across, down = np.arange(SIDE) + left, np.arange(SIDE) + top
    square = edited[down.clip(0, edited.shape[0] - 1)][:, across.clip(0, edited.shape[1] - 1)]
    return np.asarray(Image.fromarray(square).resize((128, 128), Image.Resampling.LANCZOS))


def ways(edit: Callable[..., Pixels]) -> dict[str, Edit]:
    """`edit` takes drawings and a `size` for `invert`."""

    def at_side(drawings: Pixels, side: Callable[[int, int], int]) -> Pixels:
        height, width = drawings.shape[1:3]
        scale = 128 / side(width, height)
        return edit(drawings, size=(round(width * scale / 8) * 8, round(height * scale / 8) * 8))

    def in_the_middle(drawings: Pixels) -> Pixels:
        height, width = drawings.shape[1:3]
        short, edited = min(width, height), drawings.copy()
        rows = slice((height - short) // 2, (height - short) // 2 + short)
        columns = slice((width - short) // 2, (width - short) // 2 + short)
        edited[:, rows, columns] = edit(drawings[:, rows, columns], size=128)
        return edited

    def padded(drawings: Pixels) -> Pixels:
        height, width = drawings.shape[1:3]
        top, left = (max(width - height, 0) // 2, max(height - width, 0) // 2)
        around = ((0, 0), (top, max(width - height, 0) - top), (left, max(height - width, 0) - left), (0, 0))
        return edit(np.pad(drawings, around, mode="edge"), size=128)[:, top : top + height, left : left + width]

    return {
        "the default": edit,
        "whole, the longer side at 128": lambda drawings: at_side(drawings, max),
        "whole, the shorter side at 128": lambda drawings: at_side(drawings, min),
        "the middle": in_the_middle,
        "whole, padded": padded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6, help="portraits")
    parser.add_argument("--out", type=Path, default=RESULTS / "shapes.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # that the model does not know such sizes is the point
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    oracle, asked = load_oracle(), named("+ sunglasses")
    portraits = [draw(portrait, SIDE) for portrait in pick("evaluation", asked.needs, arguments.count)]

    def edit(drawings: Pixels, **options: object) -> Pixels:
        _, result = ledits.invert_and_edit(
            as_images(drawings), seed=list(range(len(drawings))), progress=False,
            concepts=asked.concepts(asked.setting(ledits.defaults)), **options,
        )  # type: ignore[arg-type]  # fmt: skip
        return as_pixels(result.images)

    found: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        drawings = np.stack([drawing(portrait, shape) for portrait in portraits])
        for name, way in ways(edit).items():
            squares = np.stack([portrait_of(edited, shape) for edited in way(drawings)])
            found.setdefault(shape, {})[name] = round(float(succeeds(see(oracle, squares), asked).mean()), 3)
        print(shape, found[shape], flush=True)
    command = "python -m bench.study.shapes " + " ".join(sys.argv[1:])
    write_json(arguments.out, {"command": command.strip(), "portraits": arguments.count, "success": found})


if __name__ == "__main__":
    main()
