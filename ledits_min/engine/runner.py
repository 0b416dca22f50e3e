"""The fast engine over the networks of one checkpoint: batches that fit, progress, one line when memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ledits_min.engine import coding, loop
from ledits_min.engine.ahead import Ahead
from ledits_min.engine.budget import Costs, Model, batch_limit, inverting, inverting_and_editing, size
from ledits_min.engine.cpu import transforms_weights
from ledits_min.engine.denoiser import Denoiser
from ledits_min.engine.evaluate import Network
from ledits_min.engine.fast_networks import FastUNet, accelerate
from ledits_min.engine.graphs import Graphed, use_graphs
from ledits_min.engine.maps import Recorder, Recording, recording
from ledits_min.engine.memory import free_memory, is_out_of_memory
from ledits_min.engine.overhead import Overhead
from ledits_min.engine.plan import Phase, editing_phase
from ledits_min.engine.precision import float32_products
from ledits_min.engine.progress import Callback, Progress, Reporting, progress_bar, tell
from ledits_min.engine.record import Edited, mean_masks, observer
from ledits_min.engine.request import Start
from ledits_min.engine.retry import Attempt, attempts
from ledits_min.engine.steps import GraphedSteps, StepGraphs, standing_on
from ledits_min.engine.usage import Usage
from ledits_min.errors import RunError
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import AttentionControl, Lending
from ledits_min.text import Context
from ledits_min.unet import UNet
from ledits_min.vae import VAE

Contexts = Mapping[str, Context]
Advance = Callable[[int], object]


class Runner:
    """`edit.invert` and `edit.edit` over a UNet and a VAE, batched; `plain.PlainRunner` has the same methods.

    `tokens` is the length L of every context. `evaluations` counts what the last run of each phase evaluated,
    `overhead` gathers what compiling and recording took. `compiled`: torch.compile runs the UNet. `tf32`: products of
    float32 may round on a CUDA device. `usage` counts the runs that use the networks.
    """

    name = "fast"

    def __init__(self, unet: UNet, vae: VAE, prediction_type: str, tokens: int) -> None:
        self.unet, self.vae = self.networks(unet, vae)
        self.prediction_type, self.tokens = prediction_type, tokens
        self.compiled = self.tf32 = False
        self.evaluations: dict[str, int] = {}
        self.overhead = Overhead()
        self.graphs = StepGraphs(self.overhead)
        self.ahead = Ahead([])
        self.usage = Usage()

    def networks(self, unet: UNet, vae: VAE) -> tuple[UNet, VAE]:
        return accelerate(unet), accelerate(vae)

    def precisely(self) -> AbstractContextManager[None]:
        """What every call of a network stands in; the first waits for the kernels."""
        self.ahead.wait()
        return float32_products(self.unet.conv_in.weight.device, self.tf32)

    @property
    def model(self) -> Model:
        widths = (network.conv_in.weight.element_size() for network in (self.unet, self.vae.encoder))
        return Model(self.unet.config, self.vae.config, self.tokens, *widths)

    def costs(self, latents: tuple[int, int], device: torch.device) -> Costs:
        """Of latents (h, w) on a device, which need not be the one that the networks are on."""
        return self.model.costs(latents, device.type == "cpu" and transforms_weights(self.unet.conv_in.weight.dtype))

    def costs_of(self, latents: Tensor) -> Costs:
        height, width = latents.shape[-2:]
        return self.costs((height, width), latents.device)

    def encode(self, image: Tensor) -> Tensor:
        """`VAE.encode`; RunError where it cannot be done."""
        with self.precisely(), self.memory_named("encoding", image, factor=1):
            return coding.encode(self.vae, image)

    def decode(self, latents: Tensor) -> Tensor:
        """`VAE.decode`, likewise."""
        with self.precisely(), self.memory_named("decoding", latents):
            return coding.decode(self.vae, latents)

    def invert(
        self, contexts: Contexts, x_0: Tensor, noise: Tensor, settings: InversionSettings, reporting: Reporting
    ) -> tuple[Tensor, Tensor]:
        """`edit.invert`, in batches over t; the callback hears of every call of the network."""
        phase = inverting(settings, len(x_0), self.costs_of(x_0), x_0.device)
        for attempt in self.attempts(phase, x_0, reporting, reporting.callback):
            with attempt as advance:
                network = self.network(phase, contexts, settings, x_0.device)
                inverted = loop.invert(network, phase, x_0, noise, settings, loop.Watch(advance))
        return inverted

    def edit(
        self, name: str, contexts: Contexts, start: Start, settings: EditSettings, reporting: Reporting,
        lending: Lending | None = None,
    ) -> Edited:  # fmt: skip
        """`edit.edit`, as a phase called `name`; with `lending` Prompt-to-Prompt."""
        x_T, residuals, inversion = start.x_T, start.residuals, start.inversion
        limit = batch_limit(self.costs_of(x_T), x_T.device)
        phase = editing_phase(name, inversion, settings, len(x_T), limit, lending)
        phase = replace(phase, recording=self.recording(settings, contexts, x_T, inversion.source, lending))
        for attempt in self.attempts(phase, x_T, reporting):
            with attempt as advance:
                network = self.network(phase, contexts, inversion, x_T.device)
                trace, on_step = observer(name, inversion, settings, reporting)
                watch = loop.Watch(advance, on_step, reporting.trace)
                state = loop.edit(network, phase, x_T, residuals, inversion, settings, watch, lending)
        return Edited(state.x_t, mean_masks(list(state.kept), settings, len(residuals)), trace)

    def invert_and_edit(
        self, contexts: Contexts, x_0: Tensor, noise: Tensor, inversion: InversionSettings, settings: EditSettings,
        reporting: Reporting,
    ) -> tuple[Tensor, Tensor, Edited]:  # fmt: skip
        """`invert` and `edit` in the same calls: x_T, the residuals, and the edit."""
        phase = inverting_and_editing(inversion, settings, len(x_0), self.costs_of(x_0), x_0.device)
        phase = replace(phase, recording=self.recording(settings, contexts, x_0))
        for attempt in self.attempts(phase, x_0, reporting):
            with attempt as advance:
                network = self.network(phase, contexts, inversion, x_0.device)
                trace, on_step = observer(phase.name, inversion, settings, reporting)
                watch = loop.Watch(advance, on_step, reporting.trace)
                x_T, residuals, state = loop.invert_and_edit(network, phase, x_0, noise, inversion, settings, watch)
        return x_T, residuals, Edited(state.x_t, mean_masks(list(state.kept), settings, len(noise)), trace)

    def recording(
        self, settings: EditSettings, contexts: Contexts, latents: Tensor, source: str = "",
        lending: Lending | None = None,
    ) -> Recording | None:  # fmt: skip
        return recording(self.unet.config, settings, contexts, latents, source, lending)

    def network(self, phase: Phase, contexts: Contexts, inversion: InversionSettings, device: torch.device) -> Network:
        """The UNet as `loop` asks it, in CUDA graphs where there are any."""
        texts = [contexts[text] for text in phase.texts]
        schedule = inversion.make_schedule()
        with self.precisely():
            denoiser = Denoiser(cast(FastUNet, self.unet), texts, schedule, self.prediction_type, self.compiled)
        if not use_graphs(device):
            return self._precise(denoiser)
        network = self._precise(Graphed(denoiser, self.overhead))
        standing = standing_on(self.unet, self.tf32, self.compiled)
        return GraphedSteps(network, self._precise(denoiser), denoiser.tensors, standing, self.graphs)

    def _precise(self, network: Network) -> Network:
        def precise(
            x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor,
            attention: AttentionControl | Recorder | None = None,
        ) -> Tensor:  # fmt: skip
            with self.precisely():
                return network(x_t, inputs, steps, texts, images, attention)

        return precise

    def forget(self) -> None:
        """Let go of the graphs that were kept, and their memory."""
        self.graphs.clear()

    def attempts(
        self, phase: Phase, latents: Tensor, reporting: Reporting, on_evaluations: Callback | None = None
    ) -> Iterator[AbstractContextManager[Advance]]:
        """Attempts at a phase, a second in float32 where half precision overflows; each gives what moves its bar."""
        self.evaluations[phase.name] = 0
        for attempt in attempts(self.unet):
            yield self._watched(attempt, phase, latents, reporting, on_evaluations)

    @contextmanager
    def _watched(
        self, attempt: Attempt, phase: Phase, latents: Tensor, reporting: Reporting, on_evaluations: Callback | None
    ) -> Iterator[Advance]:
        """An attempt with a bar, its compiling timed apart, and one line where memory ends."""
        before = self.evaluations[phase.name]
        with (
            attempt,
            self.memory_named(phase.name, latents),
            self.overhead.watching_the_compiler(),
            progress_bar(phase.name, phase.evaluations, "evaluation", reporting.progress) as bar,
        ):

            def advance(evaluations: int) -> None:
                self.evaluations[phase.name] += evaluations
                bar.update(evaluations)
                done = self.evaluations[phase.name] - before
                tell(on_evaluations, Progress(phase.name, done, phase.evaluations))
                self.usage.check(phase.name)

            yield advance

    @contextmanager
    def memory_named(self, phase: str, maps: Tensor, factor: int | None = None) -> Iterator[None]:
        """RunError with the size that would fit, where memory runs out and no retry is left.

        maps (B, C, h, w) with `factor` pixels per position, by default those of latents.
        """
        factor = factor or self.vae.config.factor
        width, height = maps.shape[-1] * factor, maps.shape[-2] * factor
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            free = free_memory(maps.device)
            side = self.model.largest_side((width, height), free)
            way_out = f"--size {side} would fit" if side else "no size would fit: use another --device or --dtype"
            raise RunError(
                f"{phase}: out of memory with one picture of {width} x {height} pixels; {size(free)} free, {way_out}"
            ) from None
