"""What the exported model can do, measured on portraits that it never saw and judged by the attribute oracle.

`Editor` runs LEdits over many portraits and counts its work, `score` judges what came out, one number per portrait,
and `summary` turns that into means with intervals. As a program, what the parts of an exported model can do:

    python -m bench.study.evaluate --out RUNDIR [--model FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bench.study.edits import Edit, pick
from bench.study.scoring import (
    Numbers,
    bootstrap,
    changed_region,
    log_probability,
    mean_of,
    psnr_each,
    ssim_each,
    wilson,
)
from ledits_min import Inversion, LEdits
from ledits_min.errors import InputError
from ledits_min.files.result import Result
from ledits_min.weights.train_tiny.classifier import Classifier, load_classifier, see
from ledits_min.weights.train_tiny.export import TINY, write_json
from ledits_min.weights.train_tiny.portraits import (
    ATTRIBUTES,
    Pixels,
    Portrait,
    caption,
    draw,
    ideal_edit,
    labels,
    sample_portrait,
    visible,
)
from ledits_min.weights.train_tiny.vae import reconstruct, to_image

ORACLE = TINY / "oracle.safetensors"
BATCH = 50

Scores = dict[str, Numbers]


def load_oracle(path: Path = ORACLE) -> Classifier:
    """The attribute oracle as the recipe exported it."""
    if not path.is_file():
        raise InputError(f"{path}: no oracle there; `python -m ledits_min.weights.train_tiny export` writes it")
    oracle = Classifier()
    oracle.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=True)
    return oracle.eval().requires_grad_(False)


@torch.no_grad()
def logits(oracle: Classifier, pixels: Pixels) -> list[Tensor]:
    """The oracle's logits (N, values) of every attribute."""
    parts = [oracle(to_image(part)) for part in np.array_split(pixels, max(1, len(pixels) // 250))]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def as_images(pixels: Pixels) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pixels]


def as_pixels(images: Sequence[Image.Image]) -> Pixels:
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images])


def draw_all(portraits: Sequence[Portrait], size: int) -> Pixels:
    return np.stack([draw(portrait, size) for portrait in portraits])


@dataclass
class Work:
    """What some calls cost: predictions of the UNet, and seconds."""

    evaluations: int = 0
    seconds: float = 0.0


class Editor:
    """LEdits over many pictures, a batch at a time."""

    def __init__(self, ledits: LEdits) -> None:
        self.ledits = ledits
        self.size = ledits.native_size
        self._work: list[Work] = []
        ledits.unet.register_forward_hook(self._count)

    def _count(self, unet: torch.nn.Module, inputs: tuple[Tensor, ...], predictions: Tensor) -> None:
        for work in self._work:
            work.evaluations += len(predictions)

    @contextmanager
    def work(self) -> Iterator[Work]:
        """Counts what happens inside."""
        work, started = Work(), time.perf_counter()
        self._work.append(work)
        try:
            yield work
        finally:
            work.seconds = time.perf_counter() - started
            self._work.remove(work)

    def invert(self, pictures: Pixels, **options: Any) -> list[Inversion]:
        """One inversion a batch. Picture i has seed i."""
        starts = range(0, len(pictures), BATCH)
        return [self._invert_batch(pictures[start : start + BATCH], start, **options) for start in starts]

    def _invert_batch(self, pictures: Pixels, first_seed: int, **options: Any) -> Inversion:
        seeds = options.pop("seed", range(first_seed, first_seed + len(pictures)))
        return self.ledits.invert(as_images(pictures), seed=list(seeds), progress=False, **options)

    def results(self, inversions: Sequence[Inversion], **options: Any) -> list[Result]:
        return [self.ledits.edit(inversion, progress=False, **options) for inversion in inversions]

    def edit(self, inversions: Sequence[Inversion], **options: Any) -> Pixels:
        """What a user gets: the change laid over the original pixels."""
        return np.concatenate([as_pixels(result.images) for result in self.results(inversions, **options)])


def asked_and_others(edit: Edit, portraits: Sequence[Portrait]) -> tuple[list[int], Any, Any]:
    """The asked attributes' numbers, the labels (N, attributes) before, and which others show before and after."""
    ideals = [ideal_edit(portrait, edit.changes) for portrait in portraits]
    before, after = labels([visible(p) for p in portraits]), labels([visible(p) for p in ideals])
    asked = [list(ATTRIBUTES).index(name) for name in edit.changes]
    others = (before >= 0) & (after >= 0)
    others[:, asked] = False
    return asked, before, others


def accepted_values(edit: Edit) -> list[list[int]]:
    return [[list(ATTRIBUTES[name]).index(value) for value in edit.accepted(name)] for name in edit.changes]


def compliance(oracle: Classifier, edit: Edit, edited: Pixels) -> Numbers:
    """log probability (N,) that a picture shows what was asked."""
    seen = logits(oracle, edited)
    asked = [seen[list(ATTRIBUTES).index(name)] for name in edit.changes]
    return log_probability(asked, accepted_values(edit))


def succeeds(seen: Any, edit: Edit) -> Numbers:
    """1 where every asked attribute, of the seen ones (N, attributes), has a value that counts."""
    columns = [list(ATTRIBUTES).index(name) for name in edit.changes]
    right = [np.isin(seen[:, i], good) for i, good in zip(columns, accepted_values(edit), strict=True)]
    return np.asarray(np.all(right, axis=0), dtype=np.float64)


def score(
    oracle: Classifier,
    edit: Edit,
    portraits: Sequence[Portrait],
    pictures: Pixels,
    edited: Pixels,
    *,
    deep: bool = True,
) -> Scores:
    """One number per portrait. Reconstructions are the pictures themselves: LEDITS returns them unless asked for more.

    success                     every asked attribute is seen as asked
    kept, kept_unedited         how many of the other attributes are seen as they were, in the edited and the original
    others                      how many there are: those that show both before and after the ideal edit
    outside_db                  PSNR against the original where the ideal edit changes nothing
    gain_db                     PSNR against the ideal edit, after less before
    with `deep`, in dB and as SSIM: inside (the changed region) against the ideal, before and after; outside likewise
    """
    ideals = draw_all([ideal_edit(portrait, edit.changes) for portrait in portraits], pictures.shape[1])
    inside = changed_region(pictures, ideals)
    _, before, others = asked_and_others(edit, portraits)
    seen, seen_unedited = see(oracle, edited), see(oracle, pictures)
    scores = {
        "success": succeeds(seen, edit),
        "kept": ((seen == before) & others).sum(axis=1).astype(np.float64),
        "kept_unedited": ((seen_unedited == before) & others).sum(axis=1).astype(np.float64),
        "others": others.sum(axis=1).astype(np.float64),
        "outside_db": psnr_each(edited, pictures, ~inside),
        "gain_db": psnr_each(edited, ideals) - psnr_each(pictures, ideals),
    }
    if deep:
        for name, part in (("before", pictures), ("after", edited)):
            scores[f"ideal_inside_db_{name}"] = psnr_each(part, ideals, inside)
            scores[f"ideal_inside_ssim_{name}"] = ssim_each(part, ideals, inside)
        scores["outside_ssim"] = ssim_each(edited, pictures, ~inside)
    return scores


def joined(parts: Sequence[Scores]) -> Scores:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def kept_ratio(counts: Numbers) -> Any:
    """Others kept over others kept without an edit; counts (..., N, 2)."""
    kept, unedited = np.moveaxis(counts.sum(axis=-2), -1, 0)
    return np.divide(kept, unedited, out=np.full(np.shape(kept), np.nan), where=unedited > 0)[()]


def summary(scores: Scores) -> dict[str, Any]:
    """Means over the portraits; rates with Wilson's, means with bootstrapped 95 % intervals."""
    count = len(scores["success"])
    kept = np.stack([scores["kept"], scores["kept_unedited"]], axis=1)
    closer = scores["gain_db"] > 0.0
    result: dict[str, Any] = {
        "count": count,
        "success": scores["success"].mean(),
        "success_interval": wilson(int(scores["success"].sum()), count),
        "kept": scores["kept"].sum() / scores["others"].sum(),
        "kept_ratio": kept_ratio(kept),
        "kept_ratio_interval": bootstrap(kept, kept_ratio),
        "closer": closer.mean(),
        "closer_interval": wilson(int(closer.sum()), count),
    }
    for name, values in scores.items():
        if name.split("_")[0] in ("outside", "gain", "ideal"):
            result[name] = float(mean_of(values))
            result[f"{name}_interval"] = bootstrap(values)
    exact: dict[str, Any] = rounded(result)
    return exact


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers to so many significant digits, in dictionaries and lists too; None where JSON has no number for it."""
    if isinstance(value, Mapping):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(part, digits) for part in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.{digits}g}") if np.isfinite(value) else None
    return value


def generation_accuracy(ledits: LEdits, oracle: Classifier, captions: int, each: int) -> dict[str, float]:
    """Share of the attributes told by a caption that the generated pictures show, by attribute; DDIM, guidance 5."""
    rng, truth, pictures = Random("generation"), list[dict[str, str]](), list[Image.Image]()
    pairs = (caption(sample_portrait(f"evaluation {index}"), rng) for index in range(100 * captions))
    for text, told in [pair for pair in pairs if len(pair[1]) >= 5][:captions]:
        seeds = [len(pictures) + i for i in range(each)]
        pictures += ledits.generate(text, guidance_scale=5.0, seed=seeds, progress=False).images
        truth += [told] * each
    seen, wanted = see(oracle, as_pixels(pictures)), labels(truth)
    known, right = wanted >= 0, seen == wanted
    by_name = {name: float(mean_of(np.where(known, right, np.nan)[:, i])) for i, name in enumerate(ATTRIBUTES)}
    return {"all": float(right[known].mean()), **by_name}


def held_out(ledits: LEdits, oracle: Classifier, portraits: int, captions: int) -> dict[str, Any]:
    """What the parts can do on unseen portraits: autoencoder, oracle, generation."""
    unseen = pick("evaluation", {}, portraits)
    pictures = draw_all(unseen, ledits.native_size)
    truth = labels([visible(portrait) for portrait in unseen])
    right = see(oracle, pictures) == truth
    return {
        "size": ledits.native_size,
        "factor": ledits.vae.config.factor,
        "portraits": portraits,
        "vae_psnr_db": float(psnr_each(pictures, reconstruct(ledits.vae, pictures)).mean()),
        "oracle_accuracy": {name: float(right[truth[:, i] >= 0, i].mean()) for i, name in enumerate(ATTRIBUTES)},
        "generated_pictures": 4 * captions,
        "generation_accuracy": generation_accuracy(ledits, oracle, captions, each=4),
    }


def evaluate(run: Path, model: Path) -> None:
    """Write RUN/evaluation.json: what the parts of an exported model can do, judged by the run's own oracle."""
    ledits = LEdits.from_pretrained(model, device="cpu", dtype="fp32")
    found = rounded(held_out(ledits, load_classifier(run), portraits=500, captions=50))
    write_json(run / "evaluation.json", found)
    print(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.study.evaluate")
    parser.add_argument("--out", type=Path, required=True, help="the training run's folder")
    parser.add_argument("--model", type=Path, default=TINY, help="the exported model")
    arguments = parser.parse_args()
    evaluate(arguments.out, arguments.model)
