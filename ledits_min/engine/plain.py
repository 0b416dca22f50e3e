"""The plain engine: `edit.py` itself through the plain networks, step by step. It is the audit of everything else.

One text and one timestep per call of the UNet, nothing shared, nothing batched but the pictures. Progress, trace,
masks, the retry in float32 and the line that names what was not finite are those of the fast engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ledits_min.edit import Hooks, Step, edit, invert
from ledits_min.engine.denoiser import plain_eps_model
from ledits_min.engine.maps import Maps, looking_eps_model
from ledits_min.engine.plan import editing_phase, inversion_phase
from ledits_min.engine.progress import Reporting
from ledits_min.engine.record import Edited, mean_masks, observer
from ledits_min.engine.request import Start
from ledits_min.engine.retry import NotFinite
from ledits_min.engine.runner import Advance, Contexts, Runner
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import ControlledEpsModel, Lending, lend_maps
from ledits_min.unet import UNet
from ledits_min.vae import VAE


class PlainRunner(Runner):
    """`Runner` with nothing fast in it."""

    name = "plain"

    def networks(self, unet: UNet, vae: VAE) -> tuple[UNet, VAE]:
        return unet, vae

    def invert(
        self, contexts: Contexts, x_0: Tensor, noise: Tensor, settings: InversionSettings, reporting: Reporting
    ) -> tuple[Tensor, Tensor]:
        phase, timesteps = inversion_phase(settings, len(x_0), len(x_0)), settings.make_schedule().timesteps

        def check(step: int, eps: dict[str, Tensor]) -> None:
            _check("inverting", step, int(timesteps[step]), _named(eps))

        for attempt in self.attempts(phase, x_0, reporting, reporting.callback):
            with attempt as advance:
                inverted = invert(self._eps_model(settings, advance), contexts, x_0, noise, settings, check)
        return inverted

    def edit(
        self, name: str, contexts: Contexts, start: Start, settings: EditSettings, reporting: Reporting,
        lending: Lending | None = None,
    ) -> Edited:  # fmt: skip
        x_T, residuals, inversion = start.x_T, start.residuals, start.inversion
        phase = editing_phase(name, inversion, settings, len(x_T), len(x_T), lending)
        for attempt in self.attempts(phase, x_T, reporting):
            with attempt as advance:
                eps_model, hooks, maps = self._eps_model(inversion, advance), Hooks(), Maps()
                if (recording := self.recording(settings, contexts, x_T, inversion.source, lending)) is not None:
                    eps_model = looking_eps_model(eps_model, contexts, recording, maps)
                if lending is not None:
                    hooks = lend_maps(eps_model, contexts, x_T, residuals, inversion, settings, lending, maps.blend)
                hooks = hooks._replace(maps=maps.masks)
                counts = [torch.zeros_like(x_T) for _ in settings.terms]
                trace, tell_step = observer(name, inversion, settings, reporting)
                on_step = partial(_observe, name, counts, tell_step)
                latents = edit(eps_model, contexts, x_T, residuals, inversion, settings, on_step, hooks)
        return Edited(latents, mean_masks(counts, settings, len(residuals)), trace)

    def invert_and_edit(
        self, contexts: Contexts, x_0: Tensor, noise: Tensor, inversion: InversionSettings, settings: EditSettings,
        reporting: Reporting,
    ) -> tuple[Tensor, Tensor, Edited]:  # fmt: skip
        """One after the other: nothing is shared here."""
        x_T, residuals = self.invert(contexts, x_0, noise, inversion, reporting)
        start = Start(x_T, residuals, inversion)
        return x_T, residuals, self.edit("editing", contexts, start, settings, reporting)

    def _eps_model(self, inversion: InversionSettings, advance: Advance) -> ControlledEpsModel:
        eps_model = plain_eps_model(self.unet, inversion.make_schedule(), self.prediction_type)

        def counted(x_t: Tensor, t: Tensor, context: Any, *attention: Any) -> Tensor:
            with self.precisely():
                prediction = eps_model(x_t, t, context, *attention)
            advance(len(x_t))
            return prediction

        return counted


def _observe(phase: str, counts: list[Tensor], tell_step: Callable[[Step], None] | None, step: Step) -> None:
    """What every step is looked at for: values that are not finite, masks, whoever wants to hear of it."""
    _check(phase, step.index, step.t, {**_named(step.eps), "the latents": step.x_prev})
    for count, mask in zip(counts, step.masks, strict=True):
        if mask is not None:
            count += mask
    if tell_step is not None:
        tell_step(step)


def _named(eps: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"the prediction for {text!r}": prediction for text, prediction in eps.items()}


def _check(phase: str, step: int, t: int, found: dict[str, Tensor]) -> None:
    """NotFinite for the first value that is not."""
    for what, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise NotFinite.at(phase, what, step, t)
