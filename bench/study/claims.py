"""The paper's other claims: SEGA on generated pictures, edits beside each other, dials, cost, seeds, other styles.

Functions as in measure.py: the study and an item's name in, plain numbers by name out.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from bench.study.edits import PAIRS, Setting, both, named, pick, pick_alike
from bench.study.evaluate import asked_and_others, draw_all, score, succeeds, summary
from bench.study.measure import METHODS, SPLIT, STRENGTHS, Study, mean, rate
from bench.study.scoring import (
    Numbers,
    bootstrap,
    changed_region,
    mean_of,
    psnr_each,
    rank_correlation,
)
from ledits_min import PromptToPrompt
from ledits_min.weights.train_tiny.classifier import see
from ledits_min.weights.train_tiny.portraits import Pixels, draw_other
from ledits_min.weights.train_tiny.vae import reconstruct

SWEEPS: dict[str, tuple[float, ...]] = {
    "skip": (0.0, 0.2, 0.4, 0.6),  # share of the steps
    "warmup": (0.0, 0.1, 0.25, 0.5),  # share of the executed steps
    "threshold": (0.0, 0.5, 0.8, 0.9, 0.95),
    "scale": STRENGTHS,  # share of the setting's
}
SWEPT = ("+ sunglasses", "+ beard")
KEPT_TARGETS = (("+ beard", "+ sunglasses"), ("+ smiling", "+ a red hat"))  # (target prompt, concept on top)
ELSEWHERE = ("+ sunglasses", "+ a red hat", "+ beard", "blue background")


# --- SEGA on generated pictures ---------------------------------------------------------------------------------------


def measure_sega(study: Study, item: str) -> dict[str, Any]:
    """The same concepts on pictures generated from the captions; kept is what the oracle sees as before."""
    edit = named(item)
    setting, generate = study.setting(edit), study.editor.ledits.generate
    success, kept, likeness = [], [], []
    for group in pick_alike(SPLIT, edit, study.counts.captions, study.counts.each):
        options: dict[str, Any] = {"seed": list(range(len(group.portraits))), "num_steps": setting.num_steps}
        plain = generate(group.source, progress=False, **options)
        changed = generate(group.source, concepts=edit.concepts(setting), progress=False, **options)
        before, after = (np.stack([np.asarray(image) for image in result.images]) for result in (plain, changed))
        seen_before, seen_after = see(study.oracle, before), see(study.oracle, after)
        _, _, others = asked_and_others(edit, group.portraits)
        fair = succeeds(seen_before, edit) == 0.0
        success.append(succeeds(seen_after, edit)[fair])
        kept.append((seen_before == seen_after)[others])
        likeness.append(psnr_each(before, after))
    found = {"count": int(sum(map(len, success))), "kept": float(np.concatenate(kept).mean())}
    return {item: {**rate(np.concatenate(success)), **found, "psnr_db": mean(np.concatenate(likeness))}}


# --- edits beside each other ----------------------------------------------------------------------------------


def measure_target(study: Study, item: str) -> dict[str, Any]:
    """Does a target prompt's edit survive a concept on top of it?"""
    target, concept = map(named, item.split(" under "))
    setting = study.setting(concept)
    pictures = draw_all(pick(SPLIT, both(target, concept).needs, study.counts.pair), study.size)
    inversions = study.invert(pictures, setting)
    without = study.editor.edit(inversions, target=target.texts[0])
    within = study.editor.edit(inversions, target=target.texts[0], concepts=concept.concepts(setting))
    scores = {"without": without, "with": within}
    return {item: {name: rate(succeeds(see(study.oracle, pixels), target)) for name, pixels in scores.items()}}


def measure_pair(study: Study, item: str) -> dict[str, Any]:
    """Each edit alone and both at once, on the same portraits."""
    first, second = next(pair for pair in PAIRS if both(*pair).name == item)
    union = both(first, second)
    setting = study.setting(union)
    portraits = pick(SPLIT, union.needs, study.counts.pair)
    pictures = draw_all(portraits, study.size)
    inversions = study.invert(pictures, setting)
    edited = {e.name: study.editor.edit(inversions, concepts=e.concepts(setting)) for e in (first, second, union)}
    seen = {name: see(study.oracle, pixels) for name, pixels in edited.items()}
    alone = {edit.name: succeeds(seen[edit.name], edit) for edit in (first, second)}
    together = {edit.name: succeeds(seen[union.name], edit) for edit in (first, second)}
    rates = np.stack([*alone.values(), *together.values(), succeeds(seen[union.name], union)], axis=1)

    def to_product(rows: Numbers) -> Any:
        first_alone, second_alone, _, _, at_once = np.moveaxis(rows.mean(axis=-2), -1, 0)
        return at_once / np.maximum(first_alone * second_alone, 1e-9)

    return {
        item: {
            "alone": {name: rate(values) for name, values in alone.items()},
            "beside_the_other": {name: rate(values) for name, values in together.items()},
            "both": summary(score(study.oracle, union, portraits, pictures, edited[union.name])),
            "to_product": to_product(rates),
            "to_product_interval": bootstrap(rates, to_product),
        }
    }


# --- fidelity under each dial -------------------------------------------------------------------------------------


def measure_sweep(study: Study, item: str) -> dict[str, Any]:
    """One dial moves, the others stay at their setting; fidelity is PSNR against the original outside the region."""
    name, dial = item.split(" by ")
    edit = named(name)
    base = study.setting(edit)
    portraits = pick(SPLIT, edit.needs, study.counts.sweep)
    pictures = draw_all(portraits, study.size)
    outside, rows = [], []
    fixed = study.invert(pictures, base) if dial != "skip" else []
    for value in SWEEPS[dial]:
        setting = turned(base, dial, value)
        edited = study.editor.edit(fixed or study.invert(pictures, setting), concepts=edit.concepts(setting))
        found = score(study.oracle, edit, portraits, pictures, edited, deep=False)
        outside.append(found["outside_db"])
        rows.append({"value": value, "outside_db": mean_of(outside[-1]), "success": found["success"].mean()})
    return {item: {"rows": rows, "rho": mean(rank_correlation(SWEEPS[dial], np.stack(outside, axis=1)))}}


def turned(base: Setting, dial: str, value: float) -> Setting:
    """A setting with one dial at another value; skip and warm-up are shares."""
    steps = base.num_steps
    changes: dict[str, dict[str, Any]] = {
        "skip": {"skip": round(value * steps)},
        "warmup": {"warmup_steps": round(value * (steps - base.skip))},
        "threshold": {"threshold": value},
        "scale": {"scale": value * base.scale},
    }
    return replace(base, **changes[dial])


# --- cost and seeds -------------------------------------------------------------------------------------------


def measure_cost(study: Study, item: str) -> dict[str, Any]:
    """UNet evaluations and seconds for one picture, inversion and both decodings included; median of three."""
    edit = named("+ sunglasses")
    setting, group = study.setting(edit), pick_alike(SPLIT, edit, 1, 1)[0]
    pictures = draw_all(group.portraits, study.size)
    concepts, target = {"concepts": edit.concepts(setting)}, {"target": group.target}
    source, swap = {"source": group.source}, {"attention": PromptToPrompt()}
    calls: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        METHODS[0]: ({}, concepts),
        METHODS[1]: ({}, concepts | target),
        METHODS[2]: (source, target),
        METHODS[3]: (source, target | swap),
    }
    found = {}
    for method, (before, after) in calls.items():
        runs = []
        for _ in range(3):
            with study.editor.work() as work:
                study.editor.edit(study.invert(pictures, setting, **before), **after)
            runs.append(work)
        seconds = sorted(work.seconds for work in runs)[1]
        found[method] = {"evaluations": runs[0].evaluations, "seconds": seconds}
    with study.editor.work() as work:
        study.editor.ledits.generate(
            group.source, num_steps=setting.num_steps, progress=False, concepts=edit.concepts(setting)
        )
    found["SEGA, generated"] = {"evaluations": work.evaluations, "seconds": work.seconds}
    return found


def measure_seeds(study: Study, item: str) -> dict[str, Any]:
    """The same portrait under several seeds. Spread is the RMS difference of two of its edits where it changes."""
    edit = named(item)
    setting, seeds = study.setting(edit), study.counts.seeds
    rebuilt, spread, still, worst = [], [], [], []
    for portrait in pick(SPLIT, edit.needs, study.counts.each):
        pictures = np.repeat(draw_all([portrait], study.size), seeds, axis=0)
        inversions = study.invert(pictures, setting, seed=range(seeds))
        edited = study.editor.edit(inversions, concepts=edit.concepts(setting))
        results = study.editor.results(inversions)
        latents = torch.cat([result.latents for result in results]) - torch.cat([i.latents for i in inversions])
        worst.append(float(latents.abs().max()))
        plain = np.concatenate([np.stack([np.asarray(i) for i in result.images]) for result in results])
        rebuilt.append(psnr_each(plain, pictures).min())
        where = changed_region(pictures, edited).any(axis=0)
        spread += [rms(edited[a], edited[b], where) for a, b in combinations(range(seeds), 2)]
        still += [rms(plain[a], plain[b], where) for a, b in combinations(range(seeds), 2)]
    return {
        item: {
            "seeds": seeds,
            "portraits": study.counts.each,
            "edits_differ_levels": float(np.mean(spread)),
            "reconstructions_differ_levels": float(np.mean(still)),
            "worst_reconstruction_db": float(np.min(rebuilt)),
            "worst_latent_error": max(worst),
        }
    }


def rms(a: Pixels, b: Pixels, where: Any) -> float:
    return float(np.sqrt(np.square(a.astype(float) - b.astype(float))[where].mean())) if where.any() else 0.0


# --- a style never trained on -----------------------------------------------------------------------------------------


def measure_elsewhere(study: Study, item: str) -> dict[str, Any]:
    """The oracle has not seen the style either: its view before the edit stands beside its view after."""
    pictures = np.stack([draw_other(item, f"{SPLIT} {index}", study.size) for index in range(study.counts.sweep)])
    found: dict[str, Any] = {"vae_psnr_db": psnr_each(pictures, reconstruct(study.editor.ledits.vae, pictures)).mean()}
    before = see(study.oracle, pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the embedded model cannot even copy these well is the point
        for edit in map(named, ELSEWHERE):
            setting = study.setting(edit)
            edited = study.editor.edit(study.invert(pictures, setting), concepts=edit.concepts(setting))
            found[edit.name] = {
                "count": len(pictures),
                "seen_before": succeeds(before, edit).mean(),
                **rate(succeeds(see(study.oracle, edited), edit)),
                "psnr_db": psnr_each(edited, pictures).mean(),
            }
    return {item: found}
