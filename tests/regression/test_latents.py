"""What the whole program computed before its house was rebuilt, kept: some thirty edits, float32 latents.

    python tests/regression/test_latents.py            # how far today's latents are from the kept ones
    python tests/regression/test_latents.py --write    # keep today's: only where a change of the results is meant

The checkpoints of Stable Diffusion 2 (predicting v) and XL are random and small; the embedded model is the real one.
On the machine that wrote them the latents come back to 1e-6. Another CPU adds in another order, and a mask is a
comparison, so a test elsewhere allows the few positions of a mask that may change sides.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ledits_min import Concept, LEdits, PromptToPrompt
from ledits_min.config import SD15_SCHEDULE

HERE = Path(__file__).parent
KEPT = HERE / "latents.safetensors"
SAMPLES = sorted((HERE.parents[1] / "weights/tiny/samples").glob("*.png"))
SAME_MACHINE, ANY_MACHINE = 1e-6, 2e-3  # relative, in the norm

Case = Callable[[LEdits], Tensor]


def inverted(picture: int = 0, **settings: Any) -> Callable[[LEdits], Any]:
    """An inversion of one of the embedded model's samples."""
    quiet = {"num_steps": 25, "skip": 6, "seed": picture, "progress": False, **settings}
    return lambda ledits: ledits.invert(SAMPLES[picture], **quiet)


def edited(inversion: Callable[[LEdits], Any], **settings: Any) -> Case:
    return lambda ledits: ledits.edit(inversion(ledits), progress=False, **settings).latents


def in_one_pass(picture: int = 0, **settings: Any) -> Case:
    quiet = {"num_steps": 25, "skip": 6, "seed": picture, "progress": False, **settings}
    return lambda ledits: ledits.invert_and_edit(SAMPLES[picture], **quiet)[1].latents


def generated(prompt: str, **settings: Any) -> Case:
    return lambda ledits: ledits.generate(prompt, progress=False, **settings).latents


HAT, GLASSES = Concept("red hat", guidance_scale=4.0, threshold=0.8), Concept("sunglasses")
LATE = Concept("smile", guidance_scale=3.0, warmup_steps=4, cooldown_steps=12)
NO_BEARD = Concept("beard", guidance_scale=6.0, threshold=0.85, reverse=True)
BATCH: dict[str, Any] = {"num_steps": 10, "skip": 2, "progress": False}
PORTRAIT: dict[str, Any] = {"source": "short black hair", "source_guidance_scale": 2.0}

EMBEDDED: dict[str, Case] = {
    "no edit": edited(inverted()),
    "defaults": lambda ledits: ledits.edit(
        ledits.invert(SAMPLES[0], progress=False), concepts=[GLASSES], progress=False
    ).latents,
    "one concept": edited(inverted(), concepts=[GLASSES]),
    "two concepts": edited(inverted(1), concepts=[HAT, GLASSES]),
    "a removal": edited(inverted(2), concepts=[NO_BEARD]),
    "a removal and an addition": edited(inverted(2), concepts=[NO_BEARD, HAT]),
    "momentum": edited(inverted(), concepts=[GLASSES, LATE], momentum_scale=0.3, momentum_beta=0.6),
    "warm-up and cool-down": edited(inverted(), concepts=[LATE, HAT]),
    "every cool-down over, with momentum": edited(inverted(), concepts=[LATE], momentum_scale=0.4),
    "weights": edited(inverted(), concepts=[Concept("hat", weight=0.5), Concept("smile", weight=1.5)]),
    "negative prompt": edited(inverted(), negative="beard", concepts=[GLASSES]),
    "target prompt": edited(inverted(1), target="red hat", guidance_scale=5.0),
    "target prompt and concepts": edited(inverted(1), target="red hat", guidance_scale=5.0, concepts=[GLASSES]),
    "target prompt against a negative one": edited(inverted(), target="hat", guidance_scale=4.0, negative="beard"),
    "source prompt": edited(inverted(**PORTRAIT), concepts=[GLASSES]),
    "eta 0.5": edited(inverted(eta=0.5), concepts=[GLASSES, HAT]),
    "eta 0": edited(inverted(eta=0.0), target="sunglasses", guidance_scale=3.0),
    "another size": edited(inverted(size=(160, 96)), concepts=[GLASSES]),
    "P2P, replace": edited(
        inverted(1, **PORTRAIT), target="short blond hair", guidance_scale=4.0, attention=PromptToPrompt()
    ),
    "P2P, refine": edited(
        inverted(1, **PORTRAIT), target="short black hair, sunglasses", guidance_scale=4.0,
        attention=PromptToPrompt(cross=0.8, self=0.4),
    ),
    "P2P, a concept and a negative prompt": edited(
        inverted(1, **PORTRAIT), target="short blond hair", guidance_scale=4.0, negative="beard",
        concepts=[GLASSES], attention=PromptToPrompt(),
    ),
    "a batch": lambda ledits: ledits.edit(
        ledits.invert(SAMPLES[:3], seed=[3, 4, 5], **BATCH), concepts=[GLASSES, NO_BEARD], progress=False
    ).latents,
    "a batch, P2P": lambda ledits: ledits.edit(
        ledits.invert(SAMPLES[:2], seed=[3, 4], **BATCH, **PORTRAIT), target="short blond hair", guidance_scale=4.0,
        attention=PromptToPrompt(cross=0.8, self=0.4), progress=False,
    ).latents,
    "one pass": in_one_pass(concepts=[GLASSES]),
    "one pass, both prompts": in_one_pass(1, **PORTRAIT, target="red hat", guidance_scale=4.0, concepts=[GLASSES]),
    "one pass, momentum": in_one_pass(concepts=[LATE, HAT], momentum_scale=0.3),
    "generated": generated("sunglasses", num_steps=20, seed=3, guidance_scale=4.0, concepts=[HAT]),
    "generated, eta 1": generated("beard", num_steps=20, seed=[1, 2], guidance_scale=4.0, eta=1.0),
}  # fmt: skip

MILD = Concept("a hat", guidance_scale=2.0, threshold=0.7)
RANDOM_WEIGHTS: dict[str, Case] = {
    "one concept": edited(inverted(num_steps=8, skip=2), concepts=[MILD]),
    "one pass, both prompts": in_one_pass(
        num_steps=8, skip=2, source="a man", source_guidance_scale=1.5, target="a woman", guidance_scale=2.0,
        concepts=[MILD],
    ),
    "generated": generated("a cat", num_steps=6, guidance_scale=2.0, size=64),
    "P2P": edited(
        inverted(num_steps=10, skip=2, source="a man with hair", source_guidance_scale=1.5),
        target="a cat with hair", guidance_scale=2.0, attention=PromptToPrompt(),
    ),
}  # fmt: skip
CASES = [
    *(("tiny", name) for name in EMBEDDED),
    *((family, name) for family in ("SD 2.x", "SDXL") for name in RANDOM_WEIGHTS),
]


@cache
def model(family: str) -> LEdits:
    if family == "tiny":
        return LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    spec = importlib.util.spec_from_file_location("ledits_min_regression_checkpoints", HERE.parent / "checkpoints.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    predicts_v = replace(SD15_SCHEDULE, prediction_type="v_prediction")
    with tempfile.TemporaryDirectory() as folder:
        writer.write_family_folder(Path(folder), family, predicts_v if family == "SD 2.x" else SD15_SCHEDULE)
        return LEdits.from_pretrained(folder, device="cpu", dtype="float32")


def latents_of(family: str, name: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small pictures, cheap settings: what they warn of is tested elsewhere
        return (EMBEDDED if family == "tiny" else RANDOM_WEIGHTS)[name](model(family))


def distance(found: Tensor, kept: Tensor) -> float:
    return float((found - kept).norm() / kept.norm())


@cache
def kept() -> dict[str, Tensor]:
    return load_file(KEPT)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_latents_are_the_kept_ones(family: str, name: str) -> None:
    assert distance(latents_of(family, name), kept()[f"{family}: {name}"]) < ANY_MACHINE


def test_the_kept_latents_are_edits_and_differ() -> None:
    assert kept().keys() == {f"{family}: {name}" for family, name in CASES}
    arrays = [latents.numpy() for latents in kept().values()]
    assert all(np.isfinite(array).all() and 0.1 < array.std() < 10.0 for array in arrays)
    alike = [
        (one, other)
        for (one, a), (other, b) in combinations(kept().items(), 2)
        if a.shape == b.shape and (a - b).abs().max() < 1e-2
    ]
    assert alike == [("tiny: one concept", "tiny: one pass")], "one edit by two ways, and no other pair"


def distances() -> Iterator[tuple[str, float]]:
    for family, name in CASES:
        label = f"{family}: {name}"
        yield label, distance(latents_of(family, name), kept()[label])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep today's latents")
    if parser.parse_args().write:
        save_file({f"{family}: {name}": latents_of(family, name).contiguous() for family, name in CASES}, KEPT)
        print(f"kept {len(CASES)} in {KEPT.name}, torch {torch.__version__}")
    else:
        largest = 0.0
        for label, moved in distances():
            print(f"{moved:8.1e}  {label}")
            largest = max(largest, moved)
        print(f"largest: {largest:.1e}; allowed on the machine that kept them: {SAME_MACHINE:.0e}")
        sys.exit(largest > SAME_MACHINE)
