"""Fidelity against compliance: every edit by concepts on many portraits, and LEDITS beside its baselines.

Each measure_* function takes the study and the name of one item, and returns what it found as plain numbers by name.
bench/study/__main__.py runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.study.edits import (
    ADD,
    CHANGE,
    EDITS,
    Edit,
    Group,
    Setting,
    named,
    pick,
    pick_alike,
)
from bench.study.evaluate import (
    Editor,
    compliance,
    draw_all,
    held_out,
    joined,
    score,
    summary,
)
from bench.study.scoring import Numbers, at_equal, bootstrap, mean_of, rank_correlation, wilson
from ledits_min import Concept, Inversion, PromptToPrompt
from ledits_min.weights.train_tiny.classifier import Classifier
from ledits_min.weights.train_tiny.portraits import Pixels

SPLIT = "evaluation"  # neither trained nor tuned on

STRENGTHS = (0.125, 0.25, 0.5, 0.75, 1.0, 2.0)  # of a concept, as shares of its setting's scale; 0 is the original
BESIDE_TARGET = (0.25, 0.5, 1.0)  # likewise, where a target prompt asks for the edit too
SKIPS = (0.12, 0.36, 0.6)  # the baselines', as shares of the steps
DDPM_SCALES, P2P_SCALES = (3.5, 7.0, 15.0), (3.5, 9.0)
METHODS = ("LEDITS, workflow 1", "LEDITS, workflow 2", "DDPM inversion", "DDPM inversion + P2P")
COMPARED = tuple(edit for edit in EDITS if edit.group in (ADD, CHANGE) and not edit.vague)


@dataclass(frozen=True)
class Counts:
    """Portraits: of each edit, of each caption of a comparison (and how many captions), of a pair, of a sweep..."""

    portraits: int = 200
    captions: int = 2
    each: int = 13
    pair: int = 100
    sweep: int = 20
    seeds: int = 6
    model_portraits: int = 500
    model_captions: int = 50


FULL = Counts()
QUICK = Counts(portraits=8, captions=1, each=3, pair=8, sweep=3, seeds=3, model_portraits=50, model_captions=8)


@dataclass(frozen=True)
class Study:
    editor: Editor
    oracle: Classifier
    counts: Counts
    settings: dict[str, Setting]  # by reach

    @property
    def size(self) -> int:
        return self.editor.size

    def setting(self, edit: Edit) -> Setting:
        return self.settings[edit.reach]

    def invert(self, pictures: Pixels, setting: Setting, **options: Any) -> list[Inversion]:
        return self.editor.invert(pictures, **{"num_steps": setting.num_steps, "skip": setting.skip, **options})


def at_strength(edit: Edit, setting: Setting, strength: float) -> list[Concept]:
    return edit.concepts(replace(setting, scale=strength * setting.scale))


def rate(successes: Numbers) -> dict[str, Any]:
    return {"success": successes.mean(), "interval": wilson(int(successes.sum()), len(successes))}


def mean(values: Numbers) -> dict[str, Any]:
    return {"mean": float(mean_of(values)), "interval": bootstrap(values)}


# --- what the parts can do --------------------------------------------------------------------------------------------


def measure_model(study: Study, item: str) -> dict[str, Any]:
    counts = study.counts
    return held_out(study.editor.ledits, study.oracle, counts.model_portraits, counts.model_captions)


# --- every edit by concepts alone, on many portraits --------------------------------------------------------------


def by_needs() -> dict[str, list[Edit]]:
    """Edits that share their portraits share the inversions too."""
    groups: dict[str, list[Edit]] = {}
    for edit in EDITS:
        key = " ".join([edit.reach, *(f"{name}={'|'.join(values)}" for name, values in edit.needs.items())])
        groups.setdefault(key, []).append(edit)
    return groups


def measure_edits(study: Study, item: str) -> dict[str, Any]:
    edits = by_needs()[item]
    setting = study.setting(edits[0])
    portraits = pick(SPLIT, edits[0].needs, study.counts.portraits)
    pictures = draw_all(portraits, study.size)
    inversions = study.invert(pictures, setting)
    found = {}
    for edit in edits:
        edited = study.editor.edit(inversions, concepts=edit.concepts(setting))
        about = {"group": edit.group, "reach": edit.reach, "vague": edit.vague}
        found[edit.name] = {**about, **summary(score(study.oracle, edit, portraits, pictures, edited))}
    return found


# --- Figure 5: fidelity against compliance, method by method ---------------------------------------------------


@dataclass(frozen=True)
class Point:
    method: str
    skip: float  # share of the steps
    scale: float


def workflow_points(study: Study, edit: Edit, group: Group, pictures: Pixels) -> Iterator[tuple[Point, Pixels]]:
    """LEDITS: concepts alone, and with a target prompt that asks for the edit too."""
    setting, edits = study.setting(edit), study.editor.edit
    share, guidance = setting.skip / setting.num_steps, study.editor.ledits.defaults.source_guidance_scale
    inversions = study.invert(pictures, setting)
    for strength in STRENGTHS:
        edited = edits(inversions, concepts=at_strength(edit, setting, strength))
        yield Point(METHODS[0], share, strength * setting.scale), edited
    inversions = study.invert(pictures, setting, source=group.source)
    for strength in BESIDE_TARGET:
        concepts = at_strength(edit, setting, strength)
        edited = edits(inversions, target=group.target, guidance_scale=guidance, concepts=concepts)
        yield Point(METHODS[1], share, strength * setting.scale), edited


def baseline_points(study: Study, edit: Edit, group: Group, pictures: Pixels) -> Iterator[tuple[Point, Pixels]]:
    """DDPM inversion with a source and a target prompt, and the same under Prompt-to-Prompt."""
    setting, edits = study.setting(edit), study.editor.edit
    for share in SKIPS:
        skip = round(share * setting.num_steps)
        inversions = study.invert(pictures, setting, skip=skip, source=group.source)
        for scale in DDPM_SCALES:
            yield Point(METHODS[2], share, scale), edits(inversions, target=group.target, guidance_scale=scale)
        for scale in P2P_SCALES:
            swap = {"target": group.target, "guidance_scale": scale, "attention": PromptToPrompt()}
            yield Point(METHODS[3], share, scale), edits(inversions, **swap)


def measure_curves(study: Study, item: str) -> dict[str, Any]:
    edit = named(item)
    points: dict[Point, list[dict[str, Numbers]]] = {}
    scores: list[Numbers] = []  # (portraits, 1 + STRENGTHS) of each group: the oracle's log probabilities
    for group in pick_alike(SPLIT, edit, study.counts.captions, study.counts.each):
        pictures = draw_all(group.portraits, study.size)
        sweep = [compliance(study.oracle, edit, pictures)]
        for makers in (workflow_points, baseline_points):
            for point, edited in makers(study, edit, group, pictures):
                found = score(study.oracle, edit, group.portraits, pictures, edited, deep=False)
                points.setdefault(point, []).append(found)
                if point.method == METHODS[0]:
                    sweep.append(compliance(study.oracle, edit, edited))
        scores.append(np.stack(sweep, axis=1))
    rows = [{**asdict(point), **summary(joined(parts))} for point, parts in points.items()]
    scale = study.setting(edit).scale
    return {
        item: {
            "setting_scale": scale,
            "points": rows,
            "compared": compare(rows, scale),
            "monotone": monotony(np.concatenate(scores)),
        }
    }


def compare(points: Sequence[dict[str, Any]], scale: float) -> dict[str, dict[str, float | None]]:
    """By method: success and gain at the fidelity that workflow 1 has at `scale`, and fidelity at its success."""
    mark = next(point for point in points if point["method"] == METHODS[0] and point["scale"] == scale)
    found = {}
    for method in METHODS:
        own = [mark] if method == METHODS[0] else [point for point in points if point["method"] == method]
        outside, success, gain = ([point[name] for point in own] for name in ("outside_db", "success", "gain_db"))
        found[method] = {
            "success": at_equal(outside, success, mark["outside_db"]),
            "gain_db": at_equal(outside, gain, mark["outside_db"]),
            "outside_db": at_equal(success, outside, mark["success"]),
        }
    return found


def monotony(scores: Numbers) -> dict[str, Any]:
    """Spearman's rho of log probabilities (N, 1 + STRENGTHS) with the scale.

    rho              up to the setting's own scale
    rho_rounded      likewise, of probabilities to three digits, where ties count half: what happens near 1 is little
    rho_whole_sweep  up to the largest
    """
    sweep = (0.0, *STRENGTHS)
    usual = [index for index, strength in enumerate(sweep) if strength <= 1.0]
    values, part = [sweep[index] for index in usual], scores[:, usual]
    return {
        "count": len(scores),
        "strengths": list(sweep),
        "probability": list(np.exp(scores).mean(axis=0)),
        "rho": mean(rank_correlation(values, part)),
        "rho_rounded": mean(rank_correlation(values, np.exp(part).round(3))),
        "rho_whole_sweep": mean(rank_correlation(sweep, scores)),
    }


def measure_reverse(study: Study, item: str) -> dict[str, Any]:
    """The further the scale goes in reverse, the surer the oracle that the thing is gone."""
    edit = named(item)
    setting = study.setting(edit)
    pictures = draw_all(pick(SPLIT, edit.needs, study.counts.sweep), study.size)
    inversions = study.invert(pictures, setting)
    edited = [study.editor.edit(inversions, concepts=at_strength(edit, setting, strength)) for strength in STRENGTHS]
    scores = [compliance(study.oracle, edit, pixels) for pixels in (pictures, *edited)]
    return {item: monotony(np.stack(scores, axis=1))}
