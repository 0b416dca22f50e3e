"""Prompt-to-Prompt over a checkpoint's networks: the plain loop of `p2p.edit`, with progress, trace and masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ledits_min import p2p
from ledits_min.edit import Step
from ledits_min.engine.denoiser import plain_eps_model
from ledits_min.engine.ops import EditPlan
from ledits_min.engine.progress import Callback, Progress, progress_bar, tell
from ledits_min.engine.record import Recorder
from ledits_min.engine.request import Start
from ledits_min.engine.runner import Edited, Runner
from ledits_min.errors import InputError, RunError
from ledits_min.schedule import Schedule
from ledits_min.text import Context, TextEncoder, TextEncoderPair


def check_attention(attention: object) -> None:
    if not isinstance(attention, p2p.PromptToPrompt | None):
        raise InputError(f"attention is {type(attention).__name__}; PromptToPrompt() or None is wanted")


def source_row(
    attention: p2p.PromptToPrompt,
    text: TextEncoder | TextEncoderPair,
    contexts: Mapping[str, Context],
    source: str,
    source_guidance_scale: float,
    target: str,
    num_steps: int,
    x_T: Tensor,
) -> p2p.SourceRow:
    """The row that is predicted beside the edit's; `contexts` of the empty prompt, the source and the target."""
    batch = len(x_T)
    both = [contexts[source], contexts[target]]
    tokens = torch.cat([context.tokens for context in both])
    added = [context.added for context in both if context.added is not None]
    control = attention.control(text.words(source), text.words(target), tokens.shape[1], num_steps, x_T)
    both_rows = Context(
        tokens.repeat_interleave(batch, dim=0),
        torch.cat([rows.expand(batch, -1) for rows in added]) if added else None,
    )
    return p2p.SourceRow(source, source_guidance_scale, contexts[""], both_rows, control)


def edit_beside(
    row: p2p.SourceRow,
    runner: Runner,
    contexts: Mapping[str, Context],
    plan: EditPlan,
    start: Start,
    progress: bool,
    trace: bool,
    callback: Callback | None,
) -> Edited:
    """`Runner.edit` with the source's row beside the edit."""
    phase, schedule, total = "editing", start.schedule, len(start.residuals)
    recorder = Recorder(list(plan.terms), plan.negative, plan.target, schedule, start.skip, start.eta, trace)
    with (
        progress_bar(phase, total, "step", progress) as bar,
        runner.memory_named(phase, start.x_T),
        runner.preparation.watching_the_compiler(),
    ):

        def on_step(step: Step) -> None:
            recorder.record(step)
            bar.update()
            entry = recorder.trace[-1] if trace else None
            tell(callback, Progress(phase, step.index + 1, total, step.x_prev.clone(), entry))

        latents = p2p.edit(
            plain_eps_model(runner.unet, schedule, runner.prediction_type), contexts, start.x_T, start.residuals,
            schedule, start.skip, start.eta, plan.target, plan.guidance_scale, plan.negative, plan.terms,
            plan.momentum_scale, plan.momentum_beta, on_step, row=row,
        )  # fmt: skip
    _refuse_non_finite(recorder.finite, schedule, start.skip, phase)
    return latents, recorder.masks(start.x_T), recorder.trace


def _refuse_non_finite(finite: list[Tensor], schedule: Schedule, skip: int, phase: str) -> None:
    """RunError that names the first step whose result was not finite."""
    bad = (~torch.stack(finite)).nonzero()
    if len(bad):
        index = int(bad[0])
        t = int(schedule.timesteps[skip + index])
        raise RunError(f"{phase}: values that are not finite at step {index} (t = {t}); try --dtype float32")
