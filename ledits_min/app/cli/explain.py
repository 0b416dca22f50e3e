"""What `ledits edit` will evaluate: printed by --explain instead of running, kept in the report beside what ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ledits_min.engine.budget import Plan, batch_limit, inverting, inverting_and_editing
from ledits_min.engine.plan import Phase, editing_phase, inversion_phase

if TYPE_CHECKING:
    from PIL import Image

    from ledits_min.files.inversion import Inversion
    from ledits_min.inversion import InversionSettings
    from ledits_min.pipeline import LEdits


def without_weights(
    model: str, device: str, dtype: str, engine: str = "fast", **parts: Any
) -> tuple[LEdits, torch.device]:
    """`LEdits.from_pretrained` without the weights: networks that know their shapes and cannot run; and the device."""
    from ledits_min.engine.networks import resolve_device, resolve_dtype
    from ledits_min.pipeline import LEdits
    from ledits_min.weights.load import load_checkpoint

    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    checkpoint = load_checkpoint(model, dtype=chosen_dtype, **parts)
    ledits = LEdits.from_checkpoint(checkpoint, torch.device("meta"), chosen_dtype, str(model), engine)
    return ledits, chosen_device


def latent_size(inversion: Inversion) -> tuple[int, int]:
    """Of the latents that an inversion holds, (h, w)."""
    height, width = inversion.latents.shape[-2:]
    return height, width


def fitted_size(ledits: LEdits, picture: Image.Image, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Of the latents that a picture would have at `--size`, (h, w)."""
    factor = ledits.vae.config.factor
    (width, height), _ = ledits.framing.worked_at(picture.size, size)
    return height // factor, width // factor


def plan_edit(
    ledits: LEdits,
    inversion: InversionSettings,
    latents: tuple[int, int],
    edit: Mapping[str, Any],
    device: torch.device,
    *,
    inverted: bool = False,
    apart: bool = False,
) -> Plan:
    """The plan that `LEdits.invert_and_edit` of this engine follows on `device` for one picture with latents (h, w).

    edit holds arguments of `LEdits.edit`, its concepts and Prompt-to-Prompt among them. With `inverted` the inversion
    is there already; `apart` it is made first, by `LEdits.invert`, and then `LEdits.edit` follows.
    """
    asked = ("target", "guidance_scale", "negative", "concepts", "momentum_scale", "momentum_beta")
    settings = ledits.edit_settings(**{name: edit[name] for name in asked if name in edit})
    costs, attention = ledits.runner.costs(latents, device), edit.get("attention")
    plain = ledits.runner.name == "plain"  # one evaluation per call, and nothing shared
    limit = 1 if plain else batch_limit(costs, device)
    phases: tuple[Phase, ...]
    if inverted or apart or plain or attention is not None:
        lending = None
        if attention is not None:
            lending = ledits.lending(attention, inversion, settings, torch.empty(1, 4, *latents, device=ledits.device))
        phases = (editing_phase("editing", inversion, settings, 1, limit, lending),)
        if not inverted:
            first = inversion_phase(inversion, 1, limit) if plain else inverting(inversion, 1, costs, device)
            phases = (first, *phases)
    else:
        phases = (inverting_and_editing(inversion, settings, 1, costs, device),)
    # The change is laid over the original: the inverted picture is decoded as well. The embedded model looks once more.
    decodes = 1 + (edit["output_size"] == "input") + (ledits.embedded and not inverted)
    return Plan(phases, costs, 0 if inverted else 1, decodes, ledits.text.weights)
