"""What the exported model can do, measured on portraits that it never saw and scored by the attribute oracle."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw

from ledits_min import Concept, LEdits
from ledits_min.weights.train_tiny.classifier import Classifier, load_classifier, see
from ledits_min.weights.train_tiny.export import processor, write_json
from ledits_min.weights.train_tiny.portraits import (
    ATTRIBUTES,
    Pixels,
    Portrait,
    caption,
    draw,
    ideal_edit,
    labels,
    load_split,
    sample_portrait,
    seeds,
    visible,
)
from ledits_min.weights.train_tiny.vae import CONFIG, psnr

SIZE = CONFIG.sample_size


@dataclass(frozen=True)
class Edit:
    """A request to LEDITS, the change it asks for, and the portraits on which it makes sense."""

    name: str
    changes: Mapping[str, str]
    needs: Mapping[str, Sequence[str]]
    concepts: tuple[Concept, ...] = ()
    target: str = ""
    skip: int | None = None


@dataclass
class Score:
    """Means over the portraits: shares in [0, 1] and dB."""

    count: int
    success: float
    preserved: float
    preserved_unedited: float
    psnr_outside: float
    seconds: float


BARE = {"eyewear": ("none",), "hat": ("none",), "beard": ("none",)}
EDITS = (
    Edit("+ sunglasses", {"eyewear": "sunglasses"}, {"eyewear": ("none",)}, (Concept("sunglasses"),)),
    Edit("+ glasses", {"eyewear": "glasses"}, {"eyewear": ("none",)}, (Concept("glasses"),)),
    Edit("+ a hat", {"hat": "hat"}, {"hat": ("none",)}, (Concept("a hat"),)),
    Edit("+ a red hat", {"hat": "hat", "hat color": "red"}, {"hat": ("none",)}, (Concept("a red hat"),)),
    Edit("+ beard", {"beard": "beard"}, {"beard": ("none",)}, (Concept("beard"),)),
    Edit("+ smiling", {"mouth": "smile"}, {"mouth": ("serious", "sad")}, (Concept("smiling"),)),
    Edit(
        "+ blond hair",
        {"hair color": "blond"},
        {"hat": ("none",), "hair color": ("black", "brown", "red", "grey")},
        (Concept("blond hair"),),
    ),
    Edit(
        "+ blue background",
        {"background": "blue"},
        {"background": ("green", "yellow", "pink", "grey", "white")},
        (Concept("blue background"),),
    ),
    Edit("+ no glasses", {"eyewear": "none"}, {"eyewear": ("glasses", "sunglasses")}, (Concept("no glasses"),)),
    Edit("- sunglasses", {"eyewear": "none"}, {"eyewear": ("sunglasses",)}, (Concept("sunglasses", reverse=True),)),
    Edit("- beard", {"beard": "none"}, {"beard": ("beard",)}, (Concept("beard", reverse=True),)),
    Edit("target: sunglasses", {"eyewear": "sunglasses"}, {"eyewear": ("none",)}, target="sunglasses"),
    Edit(
        "+ sunglasses + beard",
        {"eyewear": "sunglasses", "beard": "beard"},
        {"eyewear": ("none",), "beard": ("none",)},
        (Concept("sunglasses"), Concept("beard")),
    ),
)


def pick(needs: Mapping[str, Sequence[str]], count: int) -> list[Portrait]:
    """The first portraits that show what the edit needs, of a split that nothing was trained or tuned on."""
    found = []
    for seed in seeds("evaluation", 100 * count):
        portrait = sample_portrait(seed)
        if all(portrait.attributes[name] in values for name, values in needs.items()):
            found.append(portrait)
            if len(found) == count:
                break
    return found


def as_images(pixels: Pixels) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pixels]


def as_pixels(images: Sequence[Image.Image]) -> Pixels:
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images])


def outside(before: Pixels, ideal: Pixels, margin: int = 2) -> np.ndarray:
    """bool (N, H, W): where the ideal edit changes nothing, `margin` pixels away from where it does."""
    changed = np.abs(before.astype(np.int16) - ideal.astype(np.int16)).max(axis=-1) > 8
    grown = torch.nn.functional.max_pool2d(
        torch.from_numpy(changed).float()[:, None], 2 * margin + 1, stride=1, padding=margin
    )
    unchanged: np.ndarray = grown[:, 0].numpy() == 0.0
    return unchanged


def psnr_where(a: Pixels, b: Pixels, where: np.ndarray) -> float:
    squared = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=-1)
    means = (squared * where).sum(axis=(1, 2)) / np.maximum(where.sum(axis=(1, 2)), 1)
    return float((10.0 * np.log10(255.0**2 / np.maximum(means, 1e-3))).mean())


def score(
    classifier: Classifier, portraits: Sequence[Portrait], changes: Mapping[str, str], unedited: Pixels, edited: Pixels
) -> dict[str, float]:
    """success: all asked attributes are seen as asked. preserved: share of the other attributes seen as they were.

    Only attributes visible both before and after the ideal edit count as preserved or lost; `preserved_unedited` is the
    same share for the result without an edit, so what it lacks to 1 are the oracle's own errors. psnr_outside compares
    with that result. Pictures are what a user gets: the change laid over the original pixels.
    """
    ideals = [ideal_edit(portrait, changes) for portrait in portraits]
    before, after = labels([visible(p) for p in portraits]), labels([visible(p) for p in ideals])
    asked = np.array([name in changes for name in ATTRIBUTES])
    seen = see(classifier, edited)
    others = ~asked & (before >= 0) & (after >= 0)
    pictures = np.stack([draw(p, SIZE) for p in portraits])
    where = outside(pictures, np.stack([draw(p, SIZE) for p in ideals]))
    return {
        "success": float((seen == after)[:, asked].all(axis=1).mean()),
        "preserved": float((seen == before)[others].mean()),
        "preserved_unedited": float((see(classifier, unedited) == before)[others].mean()),
        "psnr_outside": psnr_where(edited, unedited, where),
    }


def run_edit(ledits: LEdits, classifier: Classifier, edit: Edit, count: int) -> Score:
    """Invert the portraits, edit them, and score the result."""
    portraits = pick(edit.needs, count)
    images = as_images(np.stack([draw(portrait, SIZE) for portrait in portraits]))
    started = time.perf_counter()
    inversion = ledits.invert(images, skip=edit.skip, progress=False)
    edited = ledits.edit(inversion, target=edit.target, concepts=list(edit.concepts), progress=False)
    seconds = time.perf_counter() - started
    unedited = ledits.edit(inversion, progress=False)
    scores = score(classifier, portraits, edit.changes, as_pixels(unedited.images), as_pixels(edited.images))
    return Score(count=len(portraits), seconds=seconds, **scores)


def generation_accuracy(ledits: LEdits, classifier: Classifier, count: int) -> dict[str, float]:
    """Share of the attributes told by a caption that the generated picture shows, by attribute; DDIM, guidance 5."""
    rng = Random("generation")
    pairs = [caption(sample_portrait(name), rng) for name in seeds("evaluation", 10 * count)]
    pairs = [(text, told) for text, told in pairs if len(told) >= 5][:count]
    images = [
        ledits.generate(text, guidance_scale=5.0, seed=seed, progress=False).images[0]
        for seed, (text, _) in enumerate(pairs)
    ]
    truth = labels([told for _, told in pairs])
    right = see(classifier, as_pixels(images)) == truth
    return {name: round(float(right[truth[:, i] >= 0, i].mean()), 3) for i, name in enumerate(ATTRIBUTES)}


SHEET = ("+ sunglasses", "+ glasses", "+ a hat", "+ beard", "+ smiling", "+ blond hair", "+ sunglasses + beard")


def contact_sheet(ledits: LEdits, count: int, scale: int = 2) -> Image.Image:
    """One row a portrait: original, reconstruction, then each edit of SHEET; the first ones without anything on."""
    pictures = np.stack([draw(p, SIZE) for p in pick({**BARE, "mouth": ("serious", "sad")}, count)])
    inversion = ledits.invert(as_images(pictures), progress=False)
    rebuilt = ledits.edit(inversion, progress=False, output_size="model")
    columns = [("original", pictures), ("reconstruction", as_pixels(rebuilt.images))]
    for edit in EDITS:
        if edit.name in SHEET:
            edited = ledits.edit(inversion, target=edit.target, concepts=list(edit.concepts), progress=False)
            columns.append((edit.name, as_pixels(edited.images)))
    side, header = SIZE * scale, 14
    sheet = Image.new("RGB", (side * len(columns), header + side * count), "white")
    text = ImageDraw.Draw(sheet)
    for column, (name, pixels) in enumerate(columns):
        text.text((column * side + 2, 1), name, fill="black")
        for row, image in enumerate(as_images(pixels)):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (column * side, header + row * side))
    return sheet


def evaluate(run: Path, model: Path, report: Path, count: int) -> None:
    """Write tiny_edits.json, every edit's scores on `count` held-out portraits, and tiny_edits.png, a look at some."""
    ledits = LEdits.from_pretrained(model, device="cpu", dtype="fp32")
    classifier = load_classifier(run)
    pixels, shown = load_split(run / "data", "test")
    oracle = see(classifier, pixels) == labels(shown)
    scores = {}
    for edit in EDITS:
        scores[edit.name] = result = run_edit(ledits, classifier, edit, count)
        print(
            f"{edit.name:22} success {result.success:.2f}  preserved {result.preserved:.2f} "
            f"(unedited {result.preserved_unedited:.2f})  outside {result.psnr_outside:.1f} dB",
            flush=True,
        )
    inversion = ledits.invert(as_images(pixels[:count]), progress=False)
    round_trip = ledits.edit(inversion, progress=False, output_size="model")
    packages = ("torch", "transformers", "dicebear-core", "dicebear-styles", "resvg-py")
    write_json(
        report / "tiny_edits.json",
        {
            "command": "python -m ledits_min.weights.train_tiny " + " ".join(sys.argv[1:]),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "hardware": {"processor": processor(), "threads": torch.get_num_threads()},
            "defaults": vars(ledits.defaults),
            "oracle_accuracy": round(float(oracle[labels(shown) >= 0].mean()), 4),
            "round_trip_psnr_db": round(psnr(pixels[:count], as_pixels(round_trip.images)), 2),
            "generation_accuracy": generation_accuracy(ledits, classifier, count),
            "edits": {name: {k: round(v, 3) for k, v in vars(s).items()} for name, s in scores.items()},
        },
    )
    contact_sheet(ledits, 8).save(report / "tiny_edits.png")
