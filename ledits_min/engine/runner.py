"""The engine's loops over the networks of one checkpoint: batches that fit, progress, one line when memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ledits_min.edit import Step
from ledits_min.engine import loop as loops
from ledits_min.engine.cpu import transforms_weights
from ledits_min.engine.denoiser import Denoiser
from ledits_min.engine.graphs import Graphed, use_graphs
from ledits_min.engine.loop import Network
from ledits_min.engine.memory import free_memory, is_out_of_memory
from ledits_min.engine.ops import EditPlan
from ledits_min.engine.plan import Costs, Model, Phase, editing_phase, inversion_phase, one_pass_phase, size
from ledits_min.engine.preparation import Preparation
from ledits_min.engine.progress import Callback, Progress, progress_bar, tell
from ledits_min.engine.record import Recorder
from ledits_min.engine.request import Start
from ledits_min.errors import RunError
from ledits_min.schedule import Schedule
from ledits_min.text import Context
from ledits_min.unet import UNet
from ledits_min.vae import VAE

T = TypeVar("T")
Advance = Callable[[int], object]
Edited = tuple[Tensor, list[Tensor], list[dict[str, Any]]]  # latents, one mask a term of the plan, the trace if wanted


class Runner:
    """`tokens` is the length L of every context. `evaluations` counts what the last run of each phase evaluated,
    `preparation` gathers what compiling and recording took.
    """

    def __init__(self, unet: UNet, vae: VAE, prediction_type: str, tokens: int) -> None:
        self.unet, self.vae, self.prediction_type, self.tokens = unet, vae, prediction_type, tokens
        self.evaluations: dict[str, int] = {}
        self.preparation = Preparation()

    @property
    def model(self) -> Model:
        widths = (network.conv_in.weight.element_size() for network in (self.unet, self.vae.encoder))
        return Model(self.unet.config, self.vae.config, self.tokens, *widths)

    def costs(self, latents: tuple[int, int], device: torch.device) -> Costs:
        """Of latents (h, w) on a device, which need not be the one that the networks are on."""
        return self.model.costs(latents, device.type == "cpu" and transforms_weights(self.unet.conv_in.weight.dtype))

    def batch_limit(self, latents: Tensor) -> int:
        height, width = latents.shape[-2:]
        return loops.batch_limit(self.costs((height, width), latents.device), latents.device)

    def encode(self, image: Tensor) -> Tensor:
        """`VAE.encode`; RunError where it cannot be done."""
        with self.memory_named("encoding", image, factor=1):
            return loops.encode(self.vae, image)

    def decode(self, latents: Tensor) -> Tensor:
        """`VAE.decode`, likewise."""
        with self.memory_named("decoding", latents):
            return loops.decode(self.vae, latents)

    def invert(
        self,
        contexts: Mapping[str, Context],
        x_0: Tensor,
        noise: Tensor,
        schedule: Schedule,
        skip: int,
        eta: float,
        source: str,
        source_guidance_scale: float,
        progress: bool,
        callback: Callback | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`edit.invert`, in batches over t."""
        limit = self.batch_limit(x_0)
        phase = inversion_phase(len(noise), source, source_guidance_scale, len(x_0), limit, schedule.num_steps)

        def loop(network: Network, advance: Advance) -> tuple[Tensor, Tensor]:
            return loops.invert(
                network, phase, x_0, noise, schedule, skip, eta, source, source_guidance_scale, advance
            )  # fmt: skip

        return self.run(loop, phase, contexts, schedule, skip, x_0, progress, callback)

    def edit(
        self,
        name: str,
        contexts: Mapping[str, Context],
        plan: EditPlan,
        start: Start,
        progress: bool,
        trace: bool,
        callback: Callback | None = None,
    ) -> Edited:
        """`edit.edit`."""
        schedule, skip = start.schedule, start.skip
        phase = editing_phase(
            name, len(start.residuals), plan.negative, plan.target, plan.guidance_scale, plan.terms,
            plan.momentum_scale, len(start.x_T), self.batch_limit(start.x_T),
        )  # fmt: skip

        def loop(network: Network, advance: Advance) -> Edited:
            recorder, on_step = _observer(name, plan, schedule, skip, start.eta, trace, callback)
            state = loops.edit(
                network, phase, plan, start.x_T, start.residuals, schedule.timesteps[skip:], on_step, trace, advance
            )  # fmt: skip
            return state.x_t, loops.mean_masks(plan, state), recorder.trace

        return self.run(loop, phase, contexts, schedule, skip, start.x_T, progress)

    def invert_and_edit(
        self,
        contexts: Mapping[str, Context],
        plan: EditPlan,
        x_0: Tensor,
        noise: Tensor,
        schedule: Schedule,
        skip: int,
        eta: float,
        source: str,
        source_guidance_scale: float,
        progress: bool,
        trace: bool,
        callback: Callback | None = None,
    ) -> tuple[Tensor, Tensor, Edited]:
        """`invert` and `edit` in the same calls: x_T, the residuals, and the edit."""
        phase = one_pass_phase(
            len(noise), source, source_guidance_scale, plan.negative, plan.target, plan.guidance_scale, plan.terms,
            plan.momentum_scale, len(x_0), self.batch_limit(x_0), schedule.num_steps,
        )  # fmt: skip

        def loop(network: Network, advance: Advance) -> tuple[Tensor, Tensor, Edited]:
            recorder, on_step = _observer(phase.name, plan, schedule, skip, eta, trace, callback)
            x_T, residuals, state = loops.invert_and_edit(
                network, phase, plan, x_0, noise, schedule, skip, source, source_guidance_scale, on_step, trace, advance
            )  # fmt: skip
            return x_T, residuals, (state.x_t, loops.mean_masks(plan, state), recorder.trace)

        return self.run(loop, phase, contexts, schedule, skip, x_0, progress)

    def run(
        self,
        loop: Callable[[Network, Advance], T],
        phase: Phase,
        contexts: Mapping[str, Context],
        schedule: Schedule,
        skip: int,
        latents: Tensor,
        progress: bool,
        on_evaluations: Callback | None = None,
    ) -> T:
        """`loop` over the UNet, with a bar; once more in float32 where half precision overflows."""
        self.evaluations[phase.name] = 0

        def attempt() -> T:
            texts = [contexts[text] for text in phase.texts]
            before = self.evaluations[phase.name]
            network: Network = Denoiser(self.unet, texts, schedule, skip, self.prediction_type)
            if use_graphs(latents.device):
                network = Graphed(network, self.preparation)
            with progress_bar(phase.name, phase.evaluations, "evaluation", progress) as bar:

                def advance(evaluations: int) -> None:
                    self.evaluations[phase.name] += evaluations
                    bar.update(evaluations)
                    done = self.evaluations[phase.name] - before
                    tell(on_evaluations, Progress(phase.name, done, phase.evaluations))

                return loop(network, advance)

        with self.memory_named(phase.name, latents), self.preparation.watching_the_compiler():
            return loops.retried_in_float32(self.unet, attempt)

    @contextmanager
    def memory_named(self, phase: str, maps: Tensor, factor: int | None = None) -> Iterator[None]:
        """RunError with the size that would fit, where memory runs out and no retry is left.

        maps (B, C, h, w) with `factor` pixels a position, by default those of latents.
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


def _observer(
    phase: str, plan: EditPlan, schedule: Schedule, skip: int, eta: float, trace: bool, callback: Callback | None
) -> tuple[Recorder, Callable[[Step], None] | None]:
    """Where the trace gathers, and what the loop hands its steps to; None where nobody wants them."""
    recorder = Recorder(list(plan.terms), plan.negative, plan.target, schedule, skip, eta, trace)

    def on_step(step: Step) -> None:
        if trace:
            recorder.record(step)
        entry = recorder.trace[-1] if trace else None
        tell(callback, Progress(phase, step.index + 1, len(plan.levels), step.x_prev, entry))

    return recorder, on_step if trace or callback else None
