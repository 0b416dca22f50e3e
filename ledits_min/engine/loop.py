"""The loops of `edit`, made fast, and tested equal to them. Nobody has to read this to learn LEDITS.

The inversion runs in batches over t, an editing step asks about all its texts and pictures at once, or both share their
calls, as the `plan.Phase` says. Prompt-to-Prompt is the same loop with more rows in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ledits_min.edit import Step
from ledits_min.engine import ops
from ledits_min.engine.evaluate import Evaluator, Network
from ledits_min.engine.ops import EditState, EditSteps
from ledits_min.engine.plan import INVERSION, SOURCE, Phase, Row, has_pair
from ledits_min.engine.steps import whole_steps
from ledits_min.guidance import EditSettings, edited_eps, guided_texts
from ledits_min.inversion import InversionSettings, Solver
from ledits_min.p2p import Lending, source_eps


@dataclass(frozen=True)
class Watch:
    """What a loop tells while it runs.

    evaluations  called with how many evaluations a call of the network made
    step         called with every editing step: latents alone, or with `predictions` also predictions, gamma and masks,
                 which costs the guidance once more
    """

    evaluations: Callable[[int], object] = lambda evaluations: None
    step: Callable[[Step], None] | None = None
    predictions: bool = True


UNWATCHED = Watch()
Asked = tuple[Tensor, Mapping[str, Tensor]]  # predictions for the texts of a step, and its attention maps by text


def invert(
    network: Network,
    phase: Phase,
    x_0: Tensor,
    noise: Tensor,
    settings: InversionSettings,
    watch: Watch = UNWATCHED,
) -> tuple[Tensor, Tensor]:
    """`edit.invert`: the noisy start x_T and the residuals. NotFinite names the first value that is not."""
    schedule = settings.make_schedule()
    x = ops.trajectory(x_0, noise, schedule.alpha_bar_t)
    evaluate = Evaluator(network, phase, schedule.timesteps, x_0.device, watch.evaluations)
    eps = evaluate(x[:-1])
    branches = eps.view(len(noise), len(phase.texts), *x_0.shape).transpose(0, 1).contiguous()
    evaluate.check()
    return x[0], ops.residuals(x, branches, settings, Solver(settings), range(len(noise)))


def edit(
    network: Network,
    phase: Phase,
    x_T: Tensor,
    residuals: Tensor,
    inversion: InversionSettings,
    settings: EditSettings,
    watch: Watch = UNWATCHED,
    lending: Lending | None = None,
) -> EditState:
    """`edit.edit`: the last state, x_0 in its x_t. NotFinite names the first value that is not.

    With `lending` Prompt-to-Prompt: the source's row, whose maps the target borrows and with whose latents its own are
    blended, runs along in the same calls.
    """
    schedule, of_source = inversion.make_schedule(), Solver(inversion)
    steps = EditSteps(of_source.levels, settings, of_source.weights)
    evaluate = Evaluator(network, phase, schedule.timesteps, x_T.device, watch.evaluations)
    x_source = x_T

    def branches(i: int, x_t: Tensor) -> Asked:
        nonlocal x_source
        group = phase.groups[i]
        if not has_pair(group):
            return evaluate(x_t[None]), evaluate.maps.masks
        assert lending is not None
        predicted = dict(zip(group, evaluate(torch.stack([x_source, x_t]), partial(lending.control, i)), strict=True))
        eps = source_eps({row.text: eps for row, eps in predicted.items() if row.reads == SOURCE}, inversion)
        x_source = of_source.mean(i, x_source, eps) + residuals[i]
        return torch.stack([predicted[Row(i, text)] for text in settings.texts(i)]), evaluate.maps.masks

    def blend(x_t: Tensor) -> Tensor:
        assert local is not None
        return local(torch.stack(evaluate.maps.blend).sum(dim=0), x_source, x_t)

    local = None if lending is None else lending.blend
    return _denoise(network, evaluate, steps, x_T, residuals, branches, watch, None if local is None else blend)


def invert_and_edit(
    network: Network,
    phase: Phase,
    x_0: Tensor,
    noise: Tensor,
    inversion: InversionSettings,
    settings: EditSettings,
    watch: Watch = UNWATCHED,
) -> tuple[Tensor, Tensor, EditState]:
    """`invert`, then `edit`, in the same calls of the network: x_T, the residuals, and the last state.

    `phase` is of `plan.one_pass_phase`; the rest is as in those two.
    """
    schedule = inversion.make_schedule()
    running = RunningInversion(x_0, noise, inversion)
    steps = EditSteps(running.solver.levels, settings, running.solver.weights)
    evaluate = Evaluator(network, phase, schedule.timesteps, x_0.device, watch.evaluations)

    def branches(i: int, x_t: Tensor) -> Asked:
        group = phase.groups[i]
        predicted: dict[Row, Tensor] = {}
        if group:  # empty where the inversion has asked for all of it
            of_inversion = [row for row in group if row.reads == INVERSION]
            read = dict.fromkeys(row.step for row in of_inversion)
            own = len(group) - len(of_inversion)
            eps = evaluate(torch.stack([x_t] * (own > 0) + [running.x[step] for step in read]))
            predicted.update(zip(group[:own], eps[:own], strict=True))
            running.file(of_inversion, eps[own:])
        else:
            evaluate.skip_empty()
        predicted |= {Row(i, text): eps for text, eps in running.take(i).items() if Row(i, text) not in predicted}
        return torch.stack([predicted[Row(i, text)] for text in settings.texts(i)]), evaluate.maps.masks

    state = _denoise(network, evaluate, steps, running.x[0], running, branches, watch)
    return running.x[0], running.residuals, state


class RunningInversion:
    """An inversion that runs ahead of the edit: its predictions are filed as they come, and make residuals."""

    def __init__(self, x_0: Tensor, noise: Tensor, settings: InversionSettings) -> None:
        schedule = settings.make_schedule()
        self.x = ops.trajectory(x_0, noise, schedule.alpha_bar_t)
        self.residuals = torch.empty_like(self.x[1:])
        self.settings, self.solver = settings, Solver(settings)
        # Once, before the loop: making it waits for the device.
        self.table = ops.level_table(self.solver.levels, x_0.device)
        self.texts = guided_texts("", settings.source, settings.source_guidance_scale)
        self.waiting: list[Tensor] = []  # predictions of steps whose residuals are not there yet, in the phase's order
        self.predicted: list[Tensor] = []  # (texts, B, C, h, w) of each step that is predicted and not taken yet
        self.taken = 0

    def file(self, rows: Sequence[Row], eps: Tensor) -> None:
        """The predictions for the next rows of the inversion."""
        assert len(rows) == len(eps)
        self.waiting += eps.clone()  # a copy, or the whole batch would stay
        new, texts = len(self.waiting) // len(self.texts), len(self.texts)
        if new:
            step = self.taken + len(self.predicted)
            of_steps = torch.stack(self.waiting[: new * texts]).unflatten(0, (new, texts))
            self.waiting = self.waiting[new * texts :]
            self.residuals[step : step + new] = ops.residuals(
                self.x[step : step + new + 1], of_steps.transpose(0, 1).contiguous(), self.settings, self.solver,
                range(step, step + new), self.table[step : step + new],
            )  # fmt: skip
            self.predicted += of_steps

    def take(self, step: int) -> dict[str, Tensor]:
        """The predictions of a step by text; steps are taken once, in order."""
        assert step == self.taken
        self.taken += 1
        return dict(zip(self.texts, self.predicted.pop(0), strict=True))


def _denoise(
    network: Network,
    evaluate: Evaluator,
    steps: EditSteps,
    x_T: Tensor,
    of: Tensor | RunningInversion,
    branches: Callable[[int, Tensor], Asked],
    watch: Watch,
    blend: Callable[[Tensor], Tensor] | None = None,
) -> EditState:
    """The last state. NotFinite names the first value that is not.

    of: the residuals, or the inversion that finds them. branches(i, x_t) predicts for `settings.texts(i)`, and
    brings the maps for `settings.attending(i)`; when it returns, residuals[i] is there. blend: as in `edit.Hooks`.
    """
    state, traced = ops.start(steps, x_T), watch.step is not None and watch.predictions
    finite = torch.ones(len(steps.levels), dtype=torch.bool, device=x_T.device)
    with whole_steps(network, evaluate, steps, state, of, finite) as whole:
        if whole is not None:
            state, finite = whole.state, whole.finite
        for i in range(len(steps.levels)):
            seen: tuple[dict[str, Tensor], Tensor | None, list[Tensor | None]] = {}, None, []
            if traced or whole is None or not whole(i):
                eps, maps = branches(i, state.x_t)
                if traced:
                    seen = observe(steps.settings, state, eps, i, maps)
                ops.sega_step(steps, state, eps, of if isinstance(of, Tensor) else of.residuals, i, maps)
                if blend is not None:
                    state.x_t.copy_(blend(state.x_t))
                finite[i] = state.x_t.isfinite().all()
            if watch.step:
                watch.step(Step(i, int(evaluate.timesteps[i]), *seen, state.x_t.clone()))
        if whole is not None:
            whole.flags()
        evaluate.check(finite)
        return state if whole is None else whole.left()


def observe(
    settings: EditSettings, state: EditState, branches: Tensor, step: int, maps: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None, list[Tensor | None]]:
    """Predictions by text, gamma and masks of the step to come, which `ops.sega_step` does not hand out."""
    eps = dict(zip(settings.texts(step), branches, strict=True))
    _, added = edited_eps(eps, settings, step, state.momentum, maps)
    return (eps, None, []) if added is None else (eps, added.gamma, added.masks)
