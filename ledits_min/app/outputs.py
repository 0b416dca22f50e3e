"""What the command writes: parameters, the report, the picture of the masks."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from ledits_min import PromptToPrompt, __version__
from ledits_min.app.sheet import Type, fitted, letters_for
from ledits_min.errors import quoted
from ledits_min.files.display import opacity, overlay, ramp
from ledits_min.files.inversion import Inversion
from ledits_min.inversion import InversionSettings
from ledits_min.sega import Concept

if TYPE_CHECKING:
    from ledits_min.pipeline import LEdits  # for the type alone: a name that cannot be written is refused before it

PANEL_SIDES = (256, 512)  # the longer side of one panel of the masks picture, least and most
COLUMNS = 4
_MARGIN, _GREY = 12, (80, 80, 80)


def settings(
    ledits: LEdits,
    inversion: Inversion,
    concepts: Sequence[Concept],
    attention: PromptToPrompt | None,
    edit: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that decides the pixels, every default resolved: what a PNG carries and a report repeats.

    But for the batches that an evaluation shared: with --save-inversion, in a sweep or a table they have other sizes,
    which round differently.
    """
    return planned_settings(
        ledits, inversion.settings, worked_at(ledits, inversion), concepts, attention, edit
    )  # fmt: skip


def planned_settings(
    ledits: LEdits,
    made: InversionSettings,
    size: tuple[int, int],
    concepts: Sequence[Concept],
    attention: PromptToPrompt | None,
    edit: Mapping[str, Any],
) -> dict[str, Any]:
    """The same before there is an inversion; size (width, height) is what the model will work at."""
    terms, defaults = [concept.resolve(ledits.defaults) for concept in concepts], ledits.defaults
    looks = any(term.attends for term in terms) or (attention is not None and bool(attention.blend))
    read = {"attention_level": defaults.attention_level, "attention_places": list(defaults.attention_places)}
    return {
        "ledits_min": __version__,
        "model": ledits.fingerprint,
        "dtype": ledits.precision,
        "compiled": ledits.runner.compiled,
        **({"engine": "plain"} if ledits.runner.name == "plain" else {}),
        "prediction_type": made.schedule.prediction_type,
        "size": list(size),
        **({"squared": True} if made.squared else {}),
        "num_steps": made.num_steps,
        "skip": made.skip,
        "eta": made.eta,
        "solver_order": made.solver_order,
        "seeds": list(made.seeds),
        "source": made.source,
        "source_guidance_scale": made.source_guidance_scale,
        **edit,
        "prompt_to_prompt": None if attention is None else asdict(attention.resolve(defaults)),
        **(read if looks else {}),
        "concepts": [asdict(term) for term in terms],
    }


def common(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that several runs share; of concepts and Prompt-to-Prompt, the numbers that they share."""
    shared: dict[str, Any] = {}
    for name, value in runs[0].items():
        values = [run[name] for run in runs if name in run]
        if len(values) < len(runs):
            continue
        if name == "concepts":
            shared[name] = [common(concept) for concept in zip(*values, strict=True)]
        elif all(isinstance(one, Mapping) for one in values):
            shared[name] = common(values)
        elif all(other == value for other in values):
            shared[name] = value
    return shared


def worked_at(ledits: LEdits, inversion: Inversion) -> tuple[int, int]:
    """(width, height) in pixels of an inversion's latents."""
    height, width = (ledits.vae.config.factor * side for side in inversion.latents.shape[-2:])
    return width, height


def parameters_line(values: Mapping[str, Any]) -> str:
    """The same settings in one line for people; what `values` lacks is left out."""
    return "; ".join(parameters(values))


def parameters(values: Mapping[str, Any]) -> list[str]:
    """Each part of that line."""
    parts = [_concept_words(concept) for concept in values["concepts"]]
    for name in ("source", "target", "negative"):
        if values[name]:
            parts.append(f"{name} {quoted(values[name], 1000)}")
    if "only_where" in values:
        parts.append(f"only where mask {values['only_where'][:12]} is white")
    if values["target"]:
        parts += _told(values, guidance_scale="target scale {:g}")
    control = values["prompt_to_prompt"]
    if control is not None:
        told = _told(control, cross="cross {:g}", self="self {:g}")
        told += [f"{quoted(word, 100)} times {factor:g}" for word, factor in (control.get("reweight") or {}).items()]
        if words := control.get("blend"):
            above = _told(control, blend_threshold=" above {:g}")
            told += [f"only around {', '.join(quoted(word, 100) for word in words)}{''.join(above)}"]
        parts += [" ".join(["Prompt-to-Prompt", ", ".join(told)])]
    if values.get("momentum_scale") != 0.0:
        parts += [", ".join(_told(values, momentum_scale="momentum {:g}", momentum_beta="momentum beta {:g}"))]
    second = "dpm++" if values.get("solver_order") == 2 else None
    numbers = {**values, "second": second}
    parts += [", ".join(_told(numbers, num_steps="{} steps", skip="skip {}", eta="eta {:g}", second="{}"))]
    if "seeds" in values:
        parts.append(f"seed {', '.join(map(str, values['seeds'])) or 'given as noise'}")
    parts.append(f"model {values['model'][:12]}, ledits_min {values['ledits_min']}")
    return [part for part in parts if part]


def _concept_words(concept: Mapping[str, Any]) -> str:
    scale, weight = concept.get("guidance_scale"), concept.get("weight")
    strength = scale if scale is None or weight is None else scale * weight
    seen = concept.get("mask") if concept.get("mask") != "percentile" else None
    numbers = _told(
        {**concept, "strength": strength, "only_weight": weight if scale is None and weight != 1.0 else None,
         "seen": seen},
        strength="scale {:g}", only_weight="weight {:g}", threshold="threshold {:g}",
        warmup_steps="from step {}", cooldown_steps="to step {}", seen="mask {}",
    )  # fmt: skip
    named = f"{'-' if concept['reverse'] else '+'}{quoted(concept['text'], 1000)}"
    return f"{named} ({', '.join(numbers)})" if numbers else named


def _told(values: Mapping[str, Any], **formats: str) -> list[str]:
    """Each value in its words, without those that are missing or None."""
    return [text.format(values[name]) for name, text in formats.items() if values.get(name) is not None]


def metadata(values: Mapping[str, Any]) -> dict[str, str]:
    """The text a PNG carries: `ledits` for programs, `parameters` for people."""
    return {"ledits": json.dumps(values, allow_nan=False), "parameters": parameters_line(values)}


def original_picture(inversion: Inversion) -> Image.Image:
    """The first picture of an inversion, as it came in."""
    return Image.fromarray(inversion.originals[0].numpy())


def report(
    values: Mapping[str, Any],
    masks: Sequence[Tensor],
    trace: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    notices: Sequence[str],
    device: str,
    evaluations: Mapping[str, Any],
) -> bytes:
    """The report as strict JSON: settings, versions, seconds of each phase, evaluations planned and made, masks."""
    content = {
        "settings": values,
        "versions": versions(),
        "device": device,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "evaluations": evaluations,
        "masks": mask_statistics(values["concepts"], masks),
        "trace": list(trace),
        "notices": list(notices),
    }
    return as_json(content)


def as_json(content: Mapping[str, Any]) -> bytes:
    """Strict JSON: a number that is not finite has no place in it."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def versions() -> dict[str, str]:
    return {
        "ledits_min": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }


def mask_statistics(concepts: Sequence[Mapping[str, Any]], masks: Sequence[Tensor]) -> list[dict[str, Any]]:
    """What each concept's mask (h, w) covered; `concepts` as in the settings."""
    return [
        {
            "text": concept["text"],
            "reverse": concept["reverse"],
            "mean": float(mask.mean()),
            "max": float(mask.max()),
            "share_above_half": float((mask > 0.5).float().mean()),
        }
        for concept, mask in zip(concepts, masks, strict=True)
    ]


def mask_picture(picture: Image.Image, concepts: Sequence[Concept], masks: Sequence[Tensor]) -> Image.Image:
    """The picture, and for each concept its mask (h, w) laid over it, with the peak of the mask under the panel."""
    small = fitted(picture, min(max(*picture.size, PANEL_SIDES[0]), PANEL_SIDES[1]))
    columns, width = min(COLUMNS, len(concepts) + 1), max(small.width, PANEL_SIDES[0])
    letters = letters_for(columns * (width + 2 * _MARGIN), width)
    names = [letters.wrapped(f"{'-' if concept.reverse else '+'} {concept.text}", width) for concept in concepts]
    most = max(map(len, names), default=1)
    panels = [_panel(small, ["original"], most, None, letters)]
    for name, mask in zip(names, masks, strict=True):
        panels.append(_panel(overlay(small, mask), name, most, mask, letters))
    rows = -(-len(panels) // columns)
    width, height = panels[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * width, index // columns * height))
    return sheet


def _panel(picture: Image.Image, name: list[str], most: int, mask: Tensor | None, letters: Type) -> Image.Image:
    """A picture, its name in up to `most` lines, the mask's numbers and the ramp's legend below, on white."""
    width, line = max(picture.width, PANEL_SIDES[0]), letters.line
    panel = Image.new("RGB", (width + 2 * _MARGIN, picture.height + (most + 2) * line + 3 * _MARGIN), "white")
    panel.paste(picture, (_MARGIN, _MARGIN))
    top = picture.height + 2 * _MARGIN - 4
    letters.draw(panel, (_MARGIN, top), name, "black")
    if mask is None:
        return panel
    mean, peak = (f"{100 * float(value):.1f} %" for value in (mask.mean(), mask.max()))
    top += len(name) * line
    letters.draw(panel, (_MARGIN, top), [f"mean {mean}, peak {peak}", "0 %"], _GREY)
    left = _MARGIN + letters.width("0 %") + 8
    right = _MARGIN + width - letters.width(peak) - 8
    letters.draw(panel, (right + 8, top + line), [peak], _GREY)
    steps = np.linspace(0.0, 1.0, right - left)[None, :, None]
    alpha = opacity(steps)
    thick = letters.size // 2
    bar = np.rint((1.0 - alpha) * 90.0 + alpha * ramp(steps)).astype(np.uint8).repeat(thick, axis=0)
    panel.paste(Image.fromarray(bar), (left, top + line + (line - thick) // 2))
    return panel
