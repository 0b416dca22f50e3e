"""Portraits drawn by the avataaars style: attributes, pictures, captions, and the ideal edit of each.

A portrait is a seed and a value for every attribute. All that an attribute leaves open (which of two
sunglasses, the exact shade of a red) is drawn from a random stream of the seed and the attribute's own
name, so changing one attribute changes nothing else in the picture: that is the ideal edit.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

# attribute -> {value: weight of that value when portraits are drawn}
ATTRIBUTES: dict[str, dict[str, float]] = {
    "eyewear": {"none": 4, "glasses": 3, "sunglasses": 3},
    "hat": {"none": 6, "hat": 2.5, "winter hat": 1.5},
    "beard": {"none": 6, "beard": 4},
    "mouth": {"smile": 4, "serious": 3, "sad": 3},
    "hair length": {"short": 1, "long": 1},
    "hair color": {"black": 1, "brown": 1, "blond": 1, "red": 1, "grey": 1},
    "hat color": {"red": 1, "blue": 1, "green": 1, "yellow": 1, "black": 1},
    "shirt": {"red": 1, "blue": 1, "green": 1, "yellow": 1, "black": 1, "white": 1},
    "background": {"blue": 1, "green": 1, "yellow": 1, "pink": 1, "grey": 1, "white": 1},
    "skin": {"light": 2, "brown": 1, "dark": 1},
}

VARIANTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("eyewear", "glasses"): ("prescription02", "round"),
    ("eyewear", "sunglasses"): ("sunglasses", "wayfarers"),
    ("hat", "hat"): ("hat",),
    ("hat", "winter hat"): ("winterHat03",),
    ("beard", "beard"): ("beardMedium", "beardMajestic", "beardLight"),
    ("hair length", "short"): ("shortFlat", "shortRound", "shortWaved", "theCaesar"),
    ("hair length", "long"): ("bob", "longButNotTooLong", "straight01", "straightAndStrand", "curly"),
}

COLORS: dict[str, dict[str, str]] = {
    "hair color": {"black": "2c1b18", "brown": "724133", "blond": "e3bf62", "red": "c93305", "grey": "c9c6c6"},
    "hat color": {"red": "e23b3b", "blue": "3a6fe0", "green": "37a854", "yellow": "f5d02f", "black": "262e33"},
    "shirt": {
        "red": "e23b3b",
        "blue": "3a6fe0",
        "green": "37a854",
        "yellow": "f5d02f",
        "black": "262e33",
        "white": "f2f2f2",
    },
    "background": {
        "blue": "a3d3f7",
        "green": "b4e3ae",
        "yellow": "fbeaa0",
        "pink": "f8bfd2",
        "grey": "bcc2c9",
        "white": "fafafa",
    },
    "skin": {"light": "f5c9a0", "brown": "c07a48", "dark": "6b4734"},
}
COLOR_JITTER = 6  # of 255, either way, on each of red, green and blue

OPENINGS = (
    "",
    "",
    "",
    "a portrait of a person",
    "portrait of a person",
    "a portrait",
    "a person",
    "a face",
    "a picture of a person",
    "a photo of a person",
    "a cartoon character",
    "a man",
    "a woman",
    "portrait of a man",
    "portrait of a woman",
    "an avatar",
    "the face of a person",
    "the portrait of a man",
)
JOINTS = (" ", ", ", " and ", " with ")
SPELLINGS = {"grey": "gray", "blond": "blonde"}


@dataclass(frozen=True)
class Portrait:
    """One portrait: `attributes` holds a value of ATTRIBUTES for every attribute, hidden ones included."""

    seed: str
    attributes: Mapping[str, str]


def sample_portrait(seed: str) -> Portrait:
    """Draw every attribute independently from its weights."""
    rng = Random(f"{seed} attributes")
    attributes = {name: rng.choices(tuple(values), tuple(values.values()))[0] for name, values in ATTRIBUTES.items()}
    return Portrait(seed, attributes)


def ideal_edit(portrait: Portrait, changes: Mapping[str, str]) -> Portrait:
    """The same portrait with these attributes changed and nothing else."""
    for name, value in changes.items():
        if value not in ATTRIBUTES[name]:
            raise ValueError(f"{name} {value!r} is no value of it; choose from {', '.join(ATTRIBUTES[name])}")
    return replace(portrait, attributes={**portrait.attributes, **changes})


def visible(portrait: Portrait) -> dict[str, str]:
    """The attributes that can be seen: a hat hides the hair, and only a beard then still shows its colour."""
    shown = dict(portrait.attributes)
    if shown["hat"] == "none":
        del shown["hat color"]
    else:
        del shown["hair length"]
        if shown["beard"] == "none":
            del shown["hair color"]
    return shown


def _shade(color: str, rng: Random) -> str:
    channels = bytes.fromhex(color)
    return bytes(min(255, max(0, c + rng.randint(-COLOR_JITTER, COLOR_JITTER))) for c in channels).hex()


def drawing_options(portrait: Portrait) -> dict[str, Any]:
    """The options of the avataaars style, each a choice of one."""
    attributes, streams = portrait.attributes, {name: Random(f"{portrait.seed} {name}") for name in ATTRIBUTES}
    other = Random(f"{portrait.seed} other")

    def variant(name: str) -> list[str]:
        # One stream a value, so that trying one value does not move the choice within another.
        rng = Random(f"{portrait.seed} {name} {attributes[name]}")
        return [rng.choice(VARIANTS.get((name, attributes[name]), ("",)))]

    def color(name: str) -> list[str]:
        return [_shade(COLORS[name][attributes[name]], streams[name])]

    bare = attributes["hat"] == "none"
    options: dict[str, Any] = {
        "seed": "portrait",
        "topVariant": variant("hair length" if bare else "hat"),
        "topProbability": 100,
        "hairColor": color("hair color"),
        "hatColor": color("hat color"),
        "accessoriesProbability": 0,
        "accessoriesColor": ["262e33"],
        "facialHairProbability": 0,
        "facialHairColor": color("hair color"),
        "mouthVariant": [attributes["mouth"]],
        "eyesVariant": [other.choice(("default", "squint", "side", "happy"))],
        "eyebrowsVariant": [other.choice(("defaultNatural", "flatNatural", "raisedExcitedNatural"))],
        "clothesVariant": [other.choice(("shirtCrewNeck", "shirtVNeck", "hoodie"))],
        "clothesColor": color("shirt"),
        "skinColor": color("skin"),
        "backgroundColor": color("background"),
        "scale": round(other.uniform(1.05, 1.25), 3),
        "translateX": round(other.uniform(-5, 5), 2),
        "translateY": round(other.uniform(7, 12), 2),
    }
    if attributes["eyewear"] != "none":
        options |= {"accessoriesProbability": 100, "accessoriesVariant": variant("eyewear")}
    if attributes["beard"] != "none":
        options |= {"facialHairProbability": 100, "facialHairVariant": variant("beard")}
    return options


@cache
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(json.loads((files("dicebear_styles") / f"{name}.json").read_text(encoding="utf-8")))


def draw(portrait: Portrait, size: int) -> Pixels:
    """The picture, uint8 (size, size, 3): drawn at twice the size and box-averaged, which antialiases evenly."""
    return _draw("avataaars", drawing_options(portrait), size)


# Portraits that nothing here was trained on. Open Peeps by Pablo Stanley (CC0 1.0), ToonHead by Johan Melin and
# Personas by Draftbit (both CC BY 4.0), as remixed by DiceBear.
OTHER_STYLES = ("open-peeps", "toon-head", "personas")


def draw_other(style: str, seed: str, size: int) -> Pixels:
    """A portrait of another style, uint8 (size, size, 3), on a background from the training."""
    background = Random(f"{seed} background").choice(tuple(COLORS["background"].values()))
    return _draw(style, {"seed": seed, "backgroundColor": [background]}, size)


def _draw(style: str, options: dict[str, Any], size: int) -> Pixels:
    import resvg_py
    from dicebear import Avatar

    svg = Avatar(_style(style), options).to_string()
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size))
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB").reduce(2), dtype=np.uint8)


def phrases(name: str, shown: Mapping[str, str], rng: Random) -> tuple[str, tuple[str, ...]]:
    """One phrase about an attribute, and the attributes that it tells (a hat may tell its colour too)."""
    value = shown[name]
    if name == "eyewear":
        if value == "none":
            return rng.choice(("no glasses", "no sunglasses", "without glasses", "no eyewear")), (name,)
        return rng.choice((value, value, f"wearing {value}", f"with {value}")), (name,)
    if name == "hat":
        if value == "none":
            return rng.choice(("no hat", "without a hat")), (name,)
        if rng.random() < 0.6:
            thing = f"{shown['hat color']} {value}"
            return rng.choice((thing, f"a {thing}", f"wearing a {thing}")), (name, "hat color")
        return rng.choice((value, f"a {value}", f"wearing a {value}")), (name,)
    if name == "beard":
        if value == "none":
            return rng.choice(("no beard", "clean shaven", "without a beard")), (name,)
        return rng.choice(("beard", "a beard", "bearded")), (name,)
    if name == "mouth":
        words = {
            "smile": ("smile", "smiling", "a smile", "happy"),
            "serious": ("serious", "a serious face"),
            "sad": ("sad", "a sad face", "frowning"),
        }
        return rng.choice(words[value]), (name,)
    if name == "hair length" and "hair color" in shown and rng.random() < 0.3:
        return f"{value} {shown['hair color']} hair", (name, "hair color")
    noun = {"hair length": "hair", "hair color": "hair", "shirt": "shirt", "background": "background", "skin": "skin"}
    phrase = f"{value} {noun[name]}"
    if name == "shirt":
        return rng.choice((phrase, f"a {phrase}", f"wearing a {phrase}", f"in a {phrase}")), (name,)
    if name == "background":
        return rng.choice((phrase, f"a {phrase}", f"on a {phrase}")), (name,)
    return phrase, (name,)


def caption(portrait: Portrait, rng: Random) -> tuple[str, dict[str, str]]:
    """A true caption and what it tells: 12 % empty, 30 % one short phrase, else a random part in random order."""
    text, told = _caption(visible(portrait), rng)
    for word, other in SPELLINGS.items():
        if word in text and rng.random() < 0.2:
            text = text.replace(word, other)
    return text, told


def _caption(shown: Mapping[str, str], rng: Random) -> tuple[str, dict[str, str]]:
    topics = [name for name in shown if name != "hat color"]
    kind = rng.random()
    if kind < 0.12:
        return "", {}
    if kind < 0.42:
        phrase, told = phrases(rng.choice(topics), shown, rng)
        return phrase, {name: shown[name] for name in told}
    keep = rng.choice((0.4, 0.7, 1.0))
    topics = [name for name in topics if rng.random() < keep]
    rng.shuffle(topics)
    parts, mentioned = [rng.choice(OPENINGS)], dict[str, str]()
    for name in topics:
        if name not in mentioned:
            phrase, told = phrases(name, shown, rng)
            parts.append(phrase)
            mentioned |= {attribute: shown[attribute] for attribute in told}
    text = ""
    for part in filter(None, parts):
        text += (rng.choice(JOINTS) if text else "") + part
    return text, mentioned


def vocabulary() -> list[str]:
    """Every word that captions hold, sorted: those of enough captions for the rarest to have come by."""
    words = set[str]()
    for index in range(4000):
        words |= set(caption(sample_portrait(f"vocabulary {index}"), Random(index))[0].replace(",", " ").split())
    return sorted(words)


def labels(portraits: Sequence[Mapping[str, str]]) -> NDArray[np.int64]:
    """Class numbers (N, attributes) in the order of ATTRIBUTES; -1 where an attribute cannot be seen or is not told."""
    rows = [
        [list(values).index(shown[name]) if name in shown else -1 for name, values in ATTRIBUTES.items()]
        for shown in portraits
    ]
    return np.asarray(rows, dtype=np.int64).reshape(len(rows), len(ATTRIBUTES))


def _draw_seed(task: tuple[str, int]) -> Pixels:
    return draw(sample_portrait(task[0]), task[1])


def seeds(split: str, count: int) -> list[str]:
    return [f"{split} {index}" for index in range(count)]


def render_split(folder: Path, split: str, count: int, size: int, processes: int) -> None:
    """Write <split>.npy, uint8 (count, size, size, 3), and <split>.json, the visible attributes, unless they exist."""
    pixels_file, attributes_file = folder / f"{split}.npy", folder / f"{split}.json"
    if pixels_file.exists() and attributes_file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = seeds(split, count)
    with Pool(processes) as pool:
        pictures = pool.map(_draw_seed, [(seed, size) for seed in names], chunksize=64)
    np.save(pixels_file, np.stack(pictures))
    attributes_file.write_text(json.dumps([visible(sample_portrait(seed)) for seed in names]) + "\n")


def load_split(folder: Path, split: str) -> tuple[Pixels, list[dict[str, str]]]:
    pictures: Pixels = np.load(folder / f"{split}.npy", allow_pickle=False)
    shown: list[dict[str, str]] = json.loads((folder / f"{split}.json").read_text())
    return pictures, shown


def dataset_hash(folder: Path) -> str:
    """SHA-256 over the pixels and attributes of both splits."""
    digest = hashlib.sha256()
    for name in ("train.npy", "train.json", "test.npy", "test.json"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
