"""Whether a checkpoint predicts eps or v, and its noise schedule: what files say of it, and a guess where they do not.

Nothing in the layout tells. In this order: --prediction-type; a scheduler config; the marker tensors v_pred and ztsnr;
the metadata of a single file (modelspec.prediction_type, modelspec.architecture); for SD 2.x, which comes in both
kinds, the guess of `looks_like_v`; eps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ledits_min.config import SD15_SCHEDULE, ScheduleConfig
from ledits_min.errors import InputError, quoted
from ledits_min.files.configs import read_config
from ledits_min.weights.read.identify import INSIST, Layout

_DISTILLED = "distilled to a few steps, it has no noise levels between them; pass the checkpoint it was distilled from"
PREDICTION_TYPES = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
# What a sampler of few steps has beside its betas.
_OF_FEW_STEPS = ("_class_name", "original_inference_steps", "timestep_scaling")
# The tensor that the guess looks at, by our name, and the least spread of its values in a model that predicts v.
TELLING_TENSOR = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
LEAST_SPREAD_OF_V = 0.09
UNDECIDED = (
    "eps or v: neither metadata nor a marker says it, so one weight is looked at when it loads; pass --prediction-type "
    "(prediction_type=) to be sure"
)


def prediction_type_named(value: str) -> str:
    """eps and v in their short and their long spelling."""
    if value not in PREDICTION_TYPES:
        raise InputError(f"prediction type {quoted(value, 40)} is unknown; the choices are eps and v")
    return PREDICTION_TYPES[value]


def schedule_of_file(layout: Layout, metadata: Mapping[str, str]) -> tuple[ScheduleConfig | None, list[str]]:
    """(schedule, why) if marker tensors or metadata of a single file say how it was trained, else (None, doubts).

    The markers are v_pred and ztsnr: zero terminal SNR, under which only v can be learnt [2305.08891, section 3.2].
    """
    title = f"{metadata.get('modelspec.architecture', '')} {metadata.get('modelspec.title', '')}".lower()
    notes = []
    if word := next((word for word in re.split(r"[^a-z]+", title) if word in ("turbo", "lightning", "lcm")), None):
        notes.append(f"its metadata says {word!r}: if it is {_DISTILLED}")
    schedule = SD15_SCHEDULE
    declared = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    if "ztsnr" in layout.markers:
        schedule = replace(schedule, rescale_betas_zero_snr=True)
        kind, why = "v_prediction", "the file holds the marker tensor ztsnr, so the betas are rescaled"
    elif "v_pred" in layout.markers:
        kind, why = "v_prediction", "the file holds the marker tensor v_pred"
    elif declared is not None:
        kind, why = declared, "the file's metadata says so (modelspec.prediction_type)"
    elif "-v2-768-v" in title:
        kind, why = "v_prediction", "the file's metadata says so (modelspec.architecture)"
    elif "-v2-512" in title:
        kind, why = "epsilon", "the file's metadata says so (modelspec.architecture)"
    else:
        return None, notes
    return replace(schedule, prediction_type=kind), [f"{kind}: {why}", *notes]


def few_steps(mapping: Mapping[str, Any]) -> str | None:
    """The kind of model whose scheduler config this looks like, where that is one of a few steps."""
    sampler = mapping.get("_class_name")
    if sampler == "EulerAncestralDiscreteScheduler" and mapping.get("timestep_spacing") == "trailing":
        return "turbo"
    return str(sampler) if sampler in ("LCMScheduler", "TCDScheduler") else None


def schedule_of_folder(mapping: Mapping[str, Any], source: str, insist: bool = False) -> ScheduleConfig:
    """The schedule of a scheduler config; InputError for one that looks like a few steps' (turbo, LCM, TCD).

    With `insist` a plain model was saved with such a sampler, and its betas are read.
    """
    kind = few_steps(mapping)
    if kind is not None and not insist:
        way_out = f"if a plain model was saved with this sampler, {INSIST}"
        raise InputError(f"{source} is the schedule of a {kind} model: {_DISTILLED}; {way_out}")
    if kind is not None:
        mapping = {key: value for key, value in mapping.items() if key not in _OF_FEW_STEPS}
    return read_config(ScheduleConfig, mapping, source)


def looks_like_v(spread: float) -> tuple[str, str]:
    """(prediction type, note) guessed from the standard deviation of `TELLING_TENSOR`: above 0.09 it is v.

    Source: ComfyUI, supported_models.py, SD20.model_type. It is an observation on published models, not a law.
    """
    kind = "v_prediction" if spread > LEAST_SPREAD_OF_V else "epsilon"
    sign = ">" if spread > LEAST_SPREAD_OF_V else "<="
    return kind, (
        f"{kind}: guessed, since {TELLING_TENSOR} spreads {spread:.3f} {sign} {LEAST_SPREAD_OF_V}; "
        "pass --prediction-type (prediction_type=) if the edit is noise"
    )
