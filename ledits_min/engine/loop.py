"""The loops of `edit`, made fast, and tested equal to them. Nobody has to read this to learn LEDITS.

The inversion runs in batches over t, an editing step asks about all its texts and pictures at once, or both share their
calls, as the `plan.Phase` says. Retries live here: smaller batches where memory runs out, float32 where half precision
overflows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ledits_min.edit import Step, levels
from ledits_min.engine import ops
from ledits_min.engine.memory import is_out_of_memory, total_memory
from ledits_min.engine.ops import EditPlan, EditState, Level
from ledits_min.engine.plan import Costs, Phase, Row, capacity, split_evenly
from ledits_min.engine.tiling import in_tiles
from ledits_min.errors import RunError
from ledits_min.guidance import edited_eps, guided_texts
from ledits_min.schedule import Schedule
from ledits_min.vae import VAE

T = TypeVar("T")

# network(x_t (m, C, h, w), inputs, steps, texts, images, each int64 (n,)) -> eps float32 (n, C, h, w): evaluation i
# reads x_t[inputs[i]], and `inputs` count up from 0 to n - 1 unless m < n. A step counts the executed ones, a text is
# its place in Phase.texts, an image its place in the batch; all lie on x_t's device.
Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


# Above so many evaluations a call nothing gets faster; on a CPU, above so many bytes, which then come from main memory.
MOST = 64
CPU_ROOM = 2**28
SMALLEST_TILE = 8  # latents a side; below it a tile is all border


def batch_limit(costs: Costs, device: torch.device) -> int:
    """Evaluations a call of the network may hold on this device; the same on every run, whatever else is running."""
    room = total_memory(device) // 2 - costs.weights
    return capacity(costs, min(room, CPU_ROOM) if device.type == "cpu" else room, MOST)


class NotFinite(RunError):
    """A value was infinite or no number."""


def invert(
    network: Network,
    phase: Phase,
    x_0: Tensor,
    noise: Tensor,
    schedule: Schedule,
    skip: int,
    eta: float,
    source: str,
    source_guidance_scale: float,
    progress: Callable[[int], object] = lambda evaluations: None,
) -> tuple[Tensor, Tensor]:
    """`edit.invert`: the noisy start x_T and the residuals. NotFinite names the first value that is not."""
    x = ops.trajectory(x_0, noise, schedule.alpha_bar_t[skip:])
    steps, texts = len(noise), len(phase.texts)
    evaluate = Evaluator(network, phase, schedule.timesteps[skip:], x_0.device, progress)
    eps = evaluate(x[:-1], len(phase.rows))
    branches = eps.view(steps, texts, *x_0.shape).transpose(0, 1).contiguous()
    evaluate.check()
    sigmas = schedule.sigmas(eta)
    table = [levels(schedule, sigmas, step) for step in range(skip, schedule.num_steps)]
    return x[0], ops.residuals(x, branches, table, source, source_guidance_scale)


def edit(
    network: Network,
    phase: Phase,
    plan: EditPlan,
    x_t: Tensor,
    residuals: Tensor,
    timesteps: Tensor,
    on_step: Callable[[Step], None] | None = None,
    observed: bool = True,
    progress: Callable[[int], object] = lambda evaluations: None,
) -> EditState:
    """`edit.edit`: the last state, x_0 in its x_t. NotFinite names the first value that is not.

    `timesteps` of the executed steps. `on_step` is handed every step: latents alone, or `observed`, with predictions,
    gamma and masks too, which costs the guidance once more.
    """
    evaluate = Evaluator(network, phase, timesteps, x_t.device, progress)

    def branches(i: int, x_t: Tensor) -> Tensor:
        return evaluate(x_t[None], len(phase.groups[i]))

    state, finite = _denoise(plan, x_t, residuals, timesteps, branches, on_step, observed)
    evaluate.check(finite)
    return state


def invert_and_edit(
    network: Network,
    phase: Phase,
    plan: EditPlan,
    x_0: Tensor,
    noise: Tensor,
    schedule: Schedule,
    skip: int,
    source: str,
    source_guidance_scale: float,
    on_step: Callable[[Step], None] | None = None,
    observed: bool = True,
    progress: Callable[[int], object] = lambda evaluations: None,
) -> tuple[Tensor, Tensor, EditState]:
    """`invert`, then `edit`, in the same calls of the network: x_T, the residuals, and the last state.

    `phase` is of `plan.one_pass_phase`, `eta` in `plan.levels`; the rest is as in those two.
    """
    timesteps = schedule.timesteps[skip:]
    ahead = Ahead(x_0, noise, schedule.alpha_bar_t[skip:], plan.levels, source, source_guidance_scale)
    evaluate = Evaluator(network, phase, timesteps, x_0.device, progress)

    def branches(i: int, x_t: Tensor) -> Tensor:
        rows, cut = phase.groups[i], len(phase.groups[i]) - phase.ahead[i]
        own: dict[Row, Tensor] = {}
        if rows:  # none where the inversion has asked for all of it
            steps_ahead = dict.fromkeys(step for step, _ in rows[cut:])
            eps = evaluate(torch.stack([x_t] * (cut > 0) + [ahead.x[step] for step in steps_ahead]), len(rows))
            own.update(zip(rows[:cut], eps[:cut], strict=True))
            ahead.file(rows[cut:], eps[cut:])
        of_inversion = ahead.take(i)
        return torch.stack([own[i, text] if (i, text) in own else of_inversion[text] for text in plan.texts(i)])

    state, finite = _denoise(plan, ahead.x[0], ahead.residuals, timesteps, branches, on_step, observed)
    evaluate.check(finite)
    return ahead.x[0], ahead.residuals, state


class Ahead:
    """An inversion that runs ahead of the edit: its predictions are filed as they come, and make residuals."""

    def __init__(
        self,
        x_0: Tensor,
        noise: Tensor,
        alpha_bar_t: Tensor,
        levels: Sequence[Level],
        source: str,
        source_guidance_scale: float,
    ) -> None:
        self.x = ops.trajectory(x_0, noise, alpha_bar_t)
        self.residuals = torch.empty_like(self.x[1:])
        self.levels, self.source, self.source_guidance_scale = levels, source, source_guidance_scale
        self.table = ops.level_table(levels, x_0.device)  # once, before the loop: making it waits for the device
        self.texts = guided_texts("", source, source_guidance_scale)
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
                self.x[step : step + new + 1], of_steps.transpose(0, 1).contiguous(), self.levels[step : step + new],
                self.source, self.source_guidance_scale, self.table[step : step + new],
            )  # fmt: skip
            self.predicted += of_steps

    def take(self, step: int) -> dict[str, Tensor]:
        """The predictions of a step by text; steps are taken once, in order."""
        assert step == self.taken
        self.taken += 1
        return dict(zip(self.texts, self.predicted.pop(0), strict=True))


def _denoise(
    plan: EditPlan,
    x_t: Tensor,
    residuals: Tensor,
    timesteps: Tensor,
    branches: Callable[[int, Tensor], Tensor],
    on_step: Callable[[Step], None] | None,
    observed: bool,
) -> tuple[EditState, Tensor]:
    """The last state, and for every step whether the latents behind it are finite.

    branches(i, x_t) predicts for `plan.texts(i)`; when it returns, residuals[i] is there.
    """
    state = ops.start(plan, x_t)
    finite = torch.ones(len(residuals), dtype=torch.bool, device=x_t.device)
    for i in range(len(residuals)):
        eps = branches(i, state.x_t)
        seen = observe(plan, state, eps, i) if on_step and observed else ({}, None, [])
        ops.sega_step(plan, state, eps, residuals, i)
        finite[i] = state.x_t.isfinite().all()
        if on_step:
            on_step(Step(i, int(timesteps[i]), *seen, state.x_t.clone()))
    return state, finite


def observe(
    plan: EditPlan, state: EditState, branches: Tensor, step: int
) -> tuple[dict[str, Tensor], Tensor | None, list[Tensor | None]]:
    """Predictions by text, gamma and masks of the step to come, which `ops.sega_step` does not hand out."""
    eps = dict(zip(plan.texts(step), branches, strict=True))
    _, added = edited_eps(
        eps, plan.negative, plan.target, plan.guidance_scale, plan.terms, step,
        state.momentum, plan.momentum_scale, plan.momentum_beta,
    )  # fmt: skip
    return (eps, None, []) if added is None else (eps, added.gamma, added.masks)


def mean_masks(plan: EditPlan, state: EditState) -> list[Tensor]:
    """The share of channels, and of the steps in which a concept acted, that its mask covered: (B, h, w) on the CPU."""
    assert state.counts is not None, "the masks were not wanted"
    steps = range(len(plan.levels))
    acted = [sum(term.acts(step) for step in steps) for term in plan.terms]
    return [count.float().mean(dim=1).cpu() / max(1, n) for count, n in zip(state.counts, acted, strict=True)]


class Evaluator:
    """Asks the network about a phase's rows, in their order and in batches that fit.

    Whether a prediction is finite stays on the device, a flag an evaluation, until `check` reads them all.
    """

    def __init__(
        self,
        network: Network,
        phase: Phase,
        timesteps: Tensor,
        device: torch.device,
        progress: Callable[[int], object] = lambda evaluations: None,
    ) -> None:
        self.network, self.phase, self.timesteps, self.progress = network, phase, timesteps, progress
        self.capacity, self.done = phase.capacity, 0
        place = {text: n for n, text in enumerate(phase.texts)}
        numbers = torch.tensor([(step, place[text]) for step, text in phase.rows]).repeat_interleave(phase.images, 0)
        images = torch.arange(phase.images).repeat(len(phase.rows))
        read = [n for group in phase.inputs for n in group]
        self.inputs = [n * phase.images + image for n in read for image in range(phase.images)]
        self.numbers = torch.stack([torch.tensor(self.inputs), *numbers.T, images]).to(device)
        self.in_turn = torch.arange(phase.capacity, device=device)
        self.finite = torch.ones(phase.evaluations, dtype=torch.bool, device=device)

    def __call__(self, x_t: Tensor, rows: int) -> Tensor:
        """The next group, of so many rows: x_t float32 (inputs, B, C, h, w), as `Phase.inputs` counts them
        -> eps (rows, B, C, h, w).
        """
        flat, left, parts = x_t.flatten(0, 1), rows * x_t.shape[1], []
        while left:
            size = split_evenly(left, self.capacity)[0]
            eps = self._call(flat, size)
            if eps is None:
                self.capacity = (size + 1) // 2
                warnings.warn(
                    f"{self.phase.name}: out of memory with {size} evaluations a call; going on with {self.capacity}",
                    stacklevel=4,
                )
                continue
            parts.append(eps)
            left -= size
        eps = torch.cat(parts) if len(parts) > 1 else parts[0]
        return eps.view(rows, *x_t.shape[1:])

    def _call(self, x_t: Tensor, size: int) -> Tensor | None:
        """One call of the network with the next `size` evaluations; None where memory ran out and fewer may fit.

        x_t holds the inputs of their whole group.
        """
        here = slice(self.done, self.done + size)
        inputs, *numbers = self.numbers[:, here]
        first, last = min(self.inputs[here]), max(self.inputs[here])
        if last - first + 1 < size:
            x_t, inputs = x_t[first : last + 1], inputs - first
        else:
            x_t, inputs = x_t[inputs], self.in_turn[:size]
        try:
            eps = self.network(x_t, inputs, *numbers)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            return None
        self.finite[here] = eps.flatten(1).isfinite().all(dim=1)
        self.done = here.stop
        self.progress(size)
        return eps

    def check(self, latents: Tensor | None = None) -> None:
        """NotFinite, if need be; `latents` says for every step whether the latents behind it were finite."""
        of_row = self.finite.view(-1, self.phase.images).all(dim=1).tolist()
        rows = zip(self.phase.rows, of_row, strict=True)
        bad = [(step, f"the prediction for {text!r}") for (step, text), good in rows if not good]
        of_step = [] if latents is None else latents.tolist()
        bad += [(step, "the latents") for step, good in enumerate(of_step) if not good]
        if bad:
            step, what = min(bad, key=lambda item: item[0])
            at = f"step {step} (t = {int(self.timesteps[step])})"
            raise NotFinite(f"{self.phase.name}: {what} holds values that are not finite at {at}")


def retried_in_float32(network: nn.Module, attempt: Callable[[], T]) -> T:
    """`attempt()`, which runs `network`; once more with float32 weights where half precision was not enough.

    RunError where nothing helps.
    """
    dtype = next(network.parameters()).dtype
    try:
        return attempt()
    except NotFinite as failure:
        if dtype == torch.float32:
            raise RunError(f"{failure}; lower the guidance scales, or use a checkpoint that is not damaged") from None
        warnings.warn(f"{failure} in {str(dtype).removeprefix('torch.')}; once more in float32", stacklevel=3)
    network.float()
    try:
        return attempt()
    except NotFinite as failure:
        raise RunError(
            f"{failure}, in float32 as well; lower the guidance scales, or use a checkpoint that is not damaged"
        ) from None
    finally:
        network.to(dtype)  # exact: the values came from there


# --- the autoencoder ------------------------------------------------------------------------------------------------


def encode(vae: VAE, image: Tensor) -> Tensor:
    """`VAE.encode`, a picture at a time: in tiles where memory runs out, in float32 where half precision overflows."""
    return retried_in_float32(vae, lambda: _coded("encoding", vae.encode, image, vae.config.factor, 1))


def decode(vae: VAE, latents: Tensor) -> Tensor:
    """`VAE.decode`, likewise."""
    return retried_in_float32(vae, lambda: _coded("decoding", vae.decode, latents, 1, vae.config.factor))


def _coded(name: str, code: Callable[[Tensor], Tensor], x: Tensor, inner: int, outer: int) -> Tensor:
    longer = max(x.shape[-2:]) // inner
    tile = longer
    parts: list[Tensor] = []
    while len(parts) < len(x):
        part = _tiled(code, x[len(parts) : len(parts) + 1], tile, inner, outer)
        if part is None:
            tile = (tile + 1) // 2
            warnings.warn(
                f"{name}: out of memory; going on in tiles of {tile * max(inner, outer)} pixels", stacklevel=5
            )
            continue
        parts.append(part)
    whole = torch.cat(parts)
    if not bool(whole.isfinite().all()):
        raise NotFinite(f"{name}: values that are not finite")
    return whole


def _tiled(code: Callable[[Tensor], Tensor], x: Tensor, tile: int, inner: int, outer: int) -> Tensor | None:
    """None where memory ran out and smaller tiles may fit; a tile as large as the picture is the picture."""
    try:
        return code(x) if tile * inner >= max(x.shape[-2:]) else in_tiles(code, x, tile, inner, outer)
    except (RuntimeError, MemoryError) as error:
        if (tile + 1) // 2 < SMALLEST_TILE or not is_out_of_memory(error):
            raise
        return None
