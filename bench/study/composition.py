"""How an edit comes back to the original's pixels: `lay_change` against original + change, and the model's own pixels.

    python -m bench.study.composition [--count 8] [--out FOLDER]

Worked at 128 pixels, on pictures of 128 (1x) and of 512 (4x). Drawn portraits: the embedded model's edits, against the
ideal edit as the renderer draws it. Photographs (scikit-image's): edits made by hand at full size are the ideal; what a
model would give is simulated by a soft, tinted and noisy copy of them. PSNR in dB inside the ideal change, at its
border (four pixels of the model's size around it) and outside; "outlines" is how much of the original's gradient is
still there where the ideal edit is smooth. Writes FOLDER/composition.json and composition.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter

from bench.study.edits import Edit, named, pick
from bench.study.evaluate import Editor, as_images, draw_all, rounded
from bench.study.scoring import LEVEL, mean_of, psnr_each
from ledits_min import LEdits
from ledits_min.app.sheet import Cell, contact_sheet
from ledits_min.files.picture import lay_change, to_images
from ledits_min.files.write import save_image
from ledits_min.weights.train_tiny.export import write_json
from ledits_min.weights.train_tiny.portraits import Pixels, ideal_edit

RESULTS = Path(__file__).parents[1] / "results"
EDITS = ("+ sunglasses", "+ a red hat", "+ beard", "+ smiling", "blond hair", "blue background", "a red shirt",
         "- beard", "- sunglasses")  # fmt: skip
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
TIMES = (1, 4)

Plane = NDArray[np.float32]
Case = tuple[Image.Image, Image.Image, Image.Image, Image.Image]  # original, ideal, and small: before, after
Method = Callable[[Image.Image, Image.Image, Image.Image], Image.Image]


def add_change(original: Image.Image, before: Image.Image, after: Image.Image) -> Image.Image:
    """clip(original + upsample(after - before)): what was done before."""
    change = np.asarray(after, np.float32) - np.asarray(before, np.float32)
    planes = [
        Image.fromarray(plane).resize(original.size, Image.Resampling.BICUBIC) for plane in np.moveaxis(change, 2, 0)
    ]
    laid = np.asarray(original, np.float32) + np.stack(planes, axis=2)
    return Image.fromarray(np.rint(laid).clip(0, 255).astype(np.uint8))


def own_pixels(original: Image.Image, before: Image.Image, after: Image.Image) -> Image.Image:
    return after.resize(original.size, Image.Resampling.BICUBIC)


METHODS: dict[str, Method] = {"original + change": add_change, "lay_change": lay_change, "the model's own": own_pixels}


def portraits(editor: Editor, edit: Edit, times: int, count: int) -> Iterator[Case]:
    drawn = pick("evaluation", edit.needs, count)
    pictures = draw_all(drawn, times * editor.size)
    ideals = draw_all([ideal_edit(portrait, edit.changes) for portrait in drawn], times * editor.size)
    setting = edit.setting(editor.ledits.defaults)
    inversions = editor.invert(pictures, num_steps=setting.num_steps, skip=setting.skip)
    results = editor.results(inversions, concepts=edit.concepts(setting), output_size="model")
    with torch.no_grad():
        before = [image for x in inversions for image in to_images(editor.ledits.runner.decode(x.latents))]
    after = [image for result in results for image in result.images]
    yield from zip(as_images(pictures), as_images(ideals), before, after, strict=True)


def photographs(times: int) -> Iterator[tuple[str, Case]]:
    """One edit of each kind on each photograph, within an ellipse but for the last."""
    from skimage import data

    for name in PHOTOGRAPHS:
        picture = getattr(data, name)()[..., :3]
        height, width = (side // (8 * times) * 8 * times for side in picture.shape[:2])
        photo = picture[:height, :width].astype(np.float32)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        radii = 0.22 * height, 0.25 * width
        away = np.hypot((y - 0.4 * height) / radii[0], (x - 0.45 * width) / radii[1])[..., None]
        mask = np.clip((1.0 - away) * min(radii) / 1.5 + 0.5, 0.0, 1.0)
        shade = 1.0 + 0.25 * (x - 0.45 * width)[..., None] / radii[1]
        inside = {
            "another thing": np.array([200.0, 40.0, 50.0]) * shade,
            "removed": gaussian_filter(photo, (40, 40, 0)),
            "another colour": photo[..., [2, 0, 1]],
            "brighter": 1.15 * photo + 5.0,
        }
        ideals = {kind: photo + mask * (np.clip(part, 0, 255) - photo) for kind, part in inside.items()}
        ideals["another tone"] = photo * np.array([1.08, 1.0, 0.9])
        rng = np.random.default_rng(0)
        tint, size = rng.normal(0.0, 2.5, 3), (width // times, height // times)
        grain = gaussian_filter(rng.normal(0.0, 12.0, (size[1], size[0], 3)), (1.5, 1.5, 0))
        stray = gaussian_filter(rng.normal(0.0, 10.0, (size[1], size[0], 3)), (2.0, 2.0, 0))
        near = np.exp(-4.0 * np.clip(away[..., 0] - 1.0, 0.0, None))
        stray *= np.asarray(Image.fromarray(near).resize(size))[..., None]
        original = _image(photo)
        copy = _soft(original, size) + tint + grain
        for kind, ideal in ideals.items():
            wanted = _image(ideal)
            yield kind, (original, wanted, _image(copy), _image(_soft(wanted, size) + tint + grain + stray))


def _soft(image: Image.Image, size: tuple[int, int]) -> Any:
    """A smaller copy, as soft as an autoencoder leaves it."""
    return gaussian_filter(np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float64), (0.8, 0.8, 0))


def _image(levels: Any) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(levels, 0.0, 255.0)).astype(np.uint8))


def measure(case: Case, method: Method, times: int) -> dict[str, float]:
    original, ideal, before, after = case
    laid = np.asarray(method(original, before, after))
    source, wanted = np.asarray(original), np.asarray(ideal)
    inside = np.abs(source.astype(np.int16) - wanted).max(axis=-1) > LEVEL
    around = maximum_filter(inside, 8 * times + 1) & ~inside
    places = {"inside": inside, "border": around, "outside": ~inside & ~around}
    found = {name: float(psnr_each(laid[None], wanted[None], place[None])[0]) for name, place in places.items()}
    old, new, aim = (_gradient(picture) for picture in (source, laid, wanted))
    edges = inside & (maximum_filter(aim, 4 * times + 1) < 1.5) & (old > 8.0)
    found["outlines"] = float(new[edges].sum() / old[edges].sum()) if edges.sum() > 20 else np.nan
    return found


def _gradient(picture: Pixels) -> Plane:
    magnitude: Plane = np.hypot(*np.gradient(picture.astype(np.float32).mean(axis=-1)))
    return magnitude


def averages(cases: list[Case], times: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, method in METHODS.items():
        measured = [measure(case, method, times) for case in cases]
        found[name] = {key: float(mean_of(np.array([one[key] for one in measured]))) for key in measured[0]}
    return found


def row(label: str, case: Case) -> list[Cell]:
    original, ideal, before, after = case
    laid = [Cell(name, method(original, before, after)) for name, method in METHODS.items()]
    return [Cell(label, original), *laid, Cell("the ideal edit", ideal)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="portraits per edit")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    editor = Editor(LEdits.from_pretrained("tiny", device="cpu", dtype="float32"))
    found: dict[str, Any] = {"command": "python -m bench.study.composition " + " ".join(sys.argv[1:])}
    rows = []
    for times in TIMES:
        drawn = {name: list(portraits(editor, named(name), times, arguments.count)) for name in EDITS}
        taken: dict[str, list[Case]] = {}
        for kind, case in photographs(times):
            taken.setdefault(kind, []).append(case)
        for subject, cases in (("portraits", drawn), ("photographs", taken)):
            found[f"{subject}, {times}x"] = {name: averages(some, times) for name, some in cases.items()}
        found[f"portraits, {times}x"]["all"] = averages([case for some in drawn.values() for case in some], times)
        if times == max(TIMES):
            rows = [row(name, drawn[name][0]) for name in ("+ a red hat", "+ sunglasses", "- beard")]
            rows += [row(kind, taken[kind][0]) for kind in ("another thing", "removed", "another colour")]
    write_json(arguments.out / "composition.json", rounded(found))
    save_image(contact_sheet(rows), arguments.out / "composition.png", {})


if __name__ == "__main__":
    main()
