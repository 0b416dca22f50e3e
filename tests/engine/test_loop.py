"""The engine against the plain loops of `edit`: equal results, fewer calls, and what happens when things go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ledits_min import edit as plain
from ledits_min.config import EditDefaults, ScheduleConfig
from ledits_min.edit import Step, levels
from ledits_min.engine import loop as engine
from ledits_min.engine.ops import EditPlan, EditState
from ledits_min.engine.plan import Phase, editing_phase, inversion_phase, one_pass_phase
from ledits_min.errors import RunError
from ledits_min.inversion import draw_noise
from ledits_min.schedule import make_schedule
from ledits_min.sega import Concept, ConceptTerm

CONTEXTS = {"": 0.0, "a cat": 0.7, "a dog": -0.9, "blurry": 0.3, "hat": 1.3, "beard": -0.6, "smile": 2.1}
SHAPE = (4, 6, 5)
HAT = Concept("hat", guidance_scale=3.0, threshold=0.8, warmup_steps=0)
BEARD = Concept("beard", guidance_scale=4.0, threshold=0.5, warmup_steps=2, cooldown_steps=6, reverse=True)
GONE = Concept("hat", guidance_scale=3.0, threshold=0.7, warmup_steps=4, cooldown_steps=2)  # acts by its momentum alone
SMILE = Concept("smile", guidance_scale=2.0, threshold=0.9, warmup_steps=3, weight=1.5)
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


def eps_model(x_t: Tensor, t: Tensor, context: Any) -> Tensor:
    """Smooth, nonlinear, neighbouring pixels mixed; context a number or one a sample."""
    place = torch.linspace(0.0, 1.5, x_t[0].numel(), dtype=x_t.dtype).view(x_t[0].shape)
    level = torch.as_tensor(context, dtype=x_t.dtype).view(-1, 1, 1, 1)
    mixed = 0.6 * x_t + 0.3 * x_t.roll(1, -1) + 0.1 * x_t.roll(1, 1)
    return torch.tanh(mixed + level * place) + 0.2 * torch.sin(3.0 * x_t + t.view(-1, 1, 1, 1) / 100.0)


@dataclass
class Run:
    """One inversion and one edit, in both forms."""

    num_steps: int = 12
    skip: int = 3
    eta: float = 1.0
    images: int = 2
    capacity: int = 5
    source: str = ""
    source_guidance_scale: float = 3.5
    target: str = ""
    guidance_scale: float = 7.0
    negative: str = ""
    concepts: tuple[Concept, ...] = ()
    momentum_scale: float = 0.0
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.schedule = make_schedule(ScheduleConfig(), self.num_steps)
        self.steps = self.num_steps - self.skip
        generator = torch.Generator().manual_seed(9)
        self.x_0 = torch.randn(self.images, *SHAPE, generator=generator).to(self.dtype)
        self.noise = draw_noise(range(self.images), self.steps, SHAPE).to(self.dtype)
        resolved = [concept.resolve(EditDefaults()) for concept in self.concepts]
        self.terms: list[ConceptTerm] = [term for term in resolved if not term.is_noop(base=self.negative)]
        self.inverting = inversion_phase(
            self.steps, self.source, self.source_guidance_scale, self.images, self.capacity, self.num_steps
        )
        self.editing = editing_phase(
            "editing", self.steps, self.negative, self.target, self.guidance_scale, self.terms, self.momentum_scale,
            self.images, self.capacity,
        )  # fmt: skip

        self.one_pass = one_pass_phase(
            self.steps, self.source, self.source_guidance_scale, self.negative, self.target, self.guidance_scale,
            self.terms, self.momentum_scale, self.images, self.capacity, self.num_steps,
        )  # fmt: skip

    def network(self, phase: Phase, spy: Callable[..., None] = lambda *seen: None) -> engine.Network:
        values = torch.tensor([CONTEXTS[text] for text in phase.texts], dtype=torch.float64)
        timesteps = self.schedule.timesteps[self.skip :]

        def network(x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor) -> Tensor:
            assert len(x_t) < len(inputs) or inputs.tolist() == list(range(len(x_t)))
            spy(x_t[inputs], steps, texts, images)
            return eps_model(x_t[inputs], timesteps[steps], values[texts])

        return network

    def invert(self, network: engine.Network | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        return engine.invert(
            network or self.network(self.inverting), self.inverting, self.x_0, self.noise, self.schedule, self.skip,
            self.eta, self.source, self.source_guidance_scale, **more,
        )  # fmt: skip

    @property
    def plan(self) -> EditPlan:
        sigmas = self.schedule.sigmas(self.eta)
        table = [levels(self.schedule, sigmas, step) for step in range(self.skip, self.num_steps)]
        return EditPlan(table, self.terms, self.target, self.guidance_scale, self.negative, self.momentum_scale)

    def edit(self, x_t: Tensor, residuals: Tensor, network: engine.Network | None = None, **more: Any) -> EditState:
        return engine.edit(
            network or self.network(self.editing), self.editing, self.plan, x_t, residuals,
            self.schedule.timesteps[self.skip :], **more,
        )  # fmt: skip

    def invert_and_edit(self, network: engine.Network | None = None, **more: Any) -> tuple[Tensor, Tensor, EditState]:
        return engine.invert_and_edit(
            network or self.network(self.one_pass), self.one_pass, self.plan, self.x_0, self.noise, self.schedule,
            self.skip, self.source, self.source_guidance_scale, **more,
        )  # fmt: skip

    def plainly(self, on_step: Callable[[Step], None] = lambda step: None) -> tuple[Tensor, Tensor, Tensor]:
        """x_T, residuals and the edited x_0 of the plain loops."""
        x_t, residuals = plain.invert(
            eps_model, CONTEXTS, self.x_0, self.noise, self.schedule, self.skip, self.eta, self.source,
            self.source_guidance_scale,
        )  # fmt: skip
        edited = plain.edit(
            eps_model, CONTEXTS, x_t, residuals, self.schedule, self.skip, self.eta, self.target, self.guidance_scale,
            self.negative, self.terms, self.momentum_scale, on_step=on_step,
        )  # fmt: skip
        return x_t, residuals, edited


@settings(max_examples=60, deadline=None)
@given(
    num_steps=st.integers(1, 12),
    skip=st.integers(0, 11),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    images=st.integers(1, 3),
    capacity=st.integers(1, 40),
    source=st.sampled_from(["", "a cat"]),
    target=st.sampled_from(["", "a cat", "a dog", "hat"]),
    guidance_scale=st.sampled_from([0.0, 1.0, 3.5, 7.0]),
    negative=st.sampled_from(["", "blurry"]),
    concepts=st.sampled_from(
        [(), (HAT,), (GONE,), (HAT, BEARD), (GONE, BEARD), (BEARD, SMILE), (replace(HAT, reverse=True), HAT)]
    ),
    momentum_scale=st.sampled_from([0.0, 0.4]),
)
def test_equal_to_the_plain_loops(skip: int, num_steps: int, **more: Any) -> None:
    run = Run(num_steps=num_steps, skip=skip % num_steps, **more)
    seen: list[Step] = []
    x_t, residuals, edited = run.plainly(seen.append)
    found = run.invert()
    torch.testing.assert_close(found, (x_t, residuals), rtol=1e-12, atol=1e-12)
    state = run.edit(*found)
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)

    *of_inversion, together = run.invert_and_edit()
    torch.testing.assert_close(of_inversion, [x_t, residuals], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.x_t, edited, rtol=1e-10, atol=1e-10)

    for k in range(len(run.terms)):
        acted = [step.masks[k].float().mean(dim=1) for step in seen if step.masks[k] is not None]  # type: ignore[union-attr]
        for masks in (engine.mean_masks(run.plan, state), engine.mean_masks(run.plan, together)):
            torch.testing.assert_close(masks[k], torch.stack(acted).mean(0) if acted else torch.zeros_like(masks[k]))


def test_momentum_that_is_let_go_ends_the_retracing() -> None:
    """A concept that has cooled down when all are warm never acts, and yet its momentum moves the edit."""
    run = Run(concepts=(GONE,), momentum_scale=0.4, eta=0.5)
    *_, edited = run.plainly()
    assert (edited - run.x_0).abs().max() > 1e-3
    torch.testing.assert_close(run.invert_and_edit()[2].x_t, edited, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("together", [False, True])
def test_what_on_step_sees_is_what_the_plain_loop_shows(together: bool) -> None:
    run = Run(target="a dog", concepts=(HAT, BEARD), momentum_scale=0.3)
    plainly: list[Step] = []
    fast: list[Step] = []
    x_t, residuals, _ = run.plainly(plainly.append)
    if together:
        run.invert_and_edit(on_step=fast.append)
    else:
        run.edit(x_t, residuals, on_step=fast.append)
    assert len(fast) == len(plainly) == 9
    for one, other in zip(fast, plainly, strict=True):
        assert (one.index, one.t, list(one.eps)) == (other.index, other.t, list(other.eps))
        torch.testing.assert_close(one.gamma, other.gamma)
        torch.testing.assert_close(one.x_prev, other.x_prev)
        assert [mask is None for mask in one.masks] == [mask is None for mask in other.masks]


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_reconstruction_is_exact(capacity: int) -> None:
    """T1, whatever shares a call."""
    run = Run(num_steps=100, skip=36, dtype=torch.float32, capacity=capacity)
    state = run.edit(*run.invert())
    assert (state.x_t - run.x_0).abs().max() <= 1e-4
    assert (run.invert_and_edit()[2].x_t - run.x_0).abs().max() <= 1e-4
    assert run.one_pass.evaluations == run.inverting.evaluations  # it retraces, so the edit asks for nothing


def test_calls_are_those_of_the_plan() -> None:
    """Never above executed steps x (1 or 2), and executed steps x live branches."""
    run = Run(source="a cat", target="a dog", concepts=(HAT, BEARD), capacity=7)
    x_t, residuals = run.invert()

    def check(phase: Phase, loop: Callable[..., object]) -> None:
        asked: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        told: list[int] = []

        def spy(x_t: Tensor, steps: Tensor, texts: Tensor, images: Tensor) -> None:
            sizes.append(len(x_t))
            asked.extend(zip(steps.tolist(), texts.tolist(), images.tolist(), strict=True))

        loop(network=run.network(phase, spy), progress=told.append)
        assert sizes == [size for sizes in phase.batches for size in sizes] == told
        assert asked == [(step, phase.texts.index(text), i) for step, text in phase.rows for i in range(run.images)]

    check(run.inverting, run.invert)
    check(run.editing, partial(run.edit, x_t, residuals))
    check(run.one_pass, run.invert_and_edit)
    assert run.inverting.evaluations == 9 * 2 * run.images
    assert run.editing.evaluations == (9 * 3 + 4) * run.images  # uncond, target, hat; beard in steps 2 to 5
    # Where both start x_t is the same, and so is the prediction for the empty prompt.
    assert run.one_pass.evaluations == run.inverting.evaluations + run.editing.evaluations - run.images


def test_equal_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loops with Triton's interpreter (or a GPU's compiler) behind `ops`."""
    pytest.importorskip("triton")
    run = Run(num_steps=5, skip=1, dtype=torch.float32, source="a cat", target="a dog", concepts=(HAT, SMILE))
    run = replace(run, momentum_scale=0.3)
    x_t, residuals = run.invert()
    edited = run.edit(x_t, residuals)
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    found = run.invert()
    torch.testing.assert_close(found, (x_t, residuals), rtol=1e-5, atol=1e-5)
    state = run.edit(x_t, residuals)
    torch.testing.assert_close(state.x_t, edited.x_t, rtol=1e-4, atol=1e-4)
    for one, other in zip(engine.mean_masks(run.plan, state), engine.mean_masks(run.plan, edited), strict=True):
        torch.testing.assert_close(one, other)
    *of_inversion, together = run.invert_and_edit()
    torch.testing.assert_close(of_inversion, [x_t, residuals], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.x_t, edited.x_t, rtol=1e-4, atol=1e-4)


def failing(network: engine.Network, error: Exception, most: int) -> engine.Network:
    """A network that has memory for `most` evaluations a call."""

    def limited(x_t: Tensor, *numbers: Tensor) -> Tensor:
        if len(numbers[0]) > most:
            raise error
        return network(x_t, *numbers)

    return limited


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:.*out of memory with [2348] evaluations")
def test_out_of_memory_splits_the_batch_and_goes_on(error: Exception, most: int) -> None:
    run = Run(capacity=16, target="a dog", concepts=(HAT,))
    x_t, residuals, edited = run.plainly()
    with pytest.warns(UserWarning, match="inverting: out of memory with 9 evaluations a call; going on with"):
        found = run.invert(failing(run.network(run.inverting), error, most))
    torch.testing.assert_close(found, (x_t, residuals), rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="editing: out of memory with 6 evaluations a call; going on with 3"):
        state = run.edit(*found, failing(run.network(run.editing), error, most))
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)
    with pytest.warns(UserWarning, match="inverting and editing: out of memory with 16 evaluations a call; going on"):
        *of_inversion, state = run.invert_and_edit(failing(run.network(run.one_pass), error, most))
    torch.testing.assert_close(of_inversion, [x_t, residuals], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, RuntimeError("a bug"), MemoryError()])
def test_what_cannot_be_split_is_raised(error: Exception) -> None:
    run = Run(capacity=1, images=1)
    with pytest.raises(type(error)):
        run.invert(failing(run.network(run.inverting), error, 0))


def poisoned(network: engine.Network, phase: Phase, step: int, text: str, value: float) -> engine.Network:
    """One value of one evaluation is not finite."""

    def network_with_a_fault(x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor) -> Tensor:
        eps = network(x_t, inputs, steps, texts, images)
        eps[(steps == step) & (texts == phase.texts.index(text)), 0, 0, 0] = value
        return eps

    return network_with_a_fault


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named_at_every_step_and_branch(value: float) -> None:
    run = Run(num_steps=6, skip=2, source="a cat", target="a dog", concepts=(HAT,), images=2)
    x_t, residuals = run.invert()
    timesteps = run.schedule.timesteps[2:].tolist()
    for step, text in run.inverting.rows:
        at = rf"inverting: the prediction for '{text}' .* step {step} \(t = {timesteps[step]}\)"
        with pytest.raises(RunError, match=at):
            run.invert(poisoned(run.network(run.inverting), run.inverting, step, text, value))
    for step, text in run.editing.rows:
        at = rf"editing: the prediction for '{text}' .* step {step} \(t = {timesteps[step]}\)"
        with pytest.raises(RunError, match=at):
            run.edit(x_t, residuals, poisoned(run.network(run.editing), run.editing, step, text, value))
    for step, text in set(run.one_pass.rows):
        at = rf"inverting and editing: the prediction for '{text}' .* step {step} \(t = {timesteps[step]}\)"
        with pytest.raises(RunError, match=at):
            run.invert_and_edit(poisoned(run.network(run.one_pass), run.one_pass, step, text, value))


def test_latents_that_overflow_are_named() -> None:
    run = Run(num_steps=4, skip=0, dtype=torch.float32)
    x_t, residuals = run.invert()
    residuals[2] = torch.inf
    with pytest.raises(RunError, match="editing: the latents .* step 2"):
        run.edit(x_t, residuals)


class Half(nn.Module):
    """A module whose attempt fails as often as told."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]), requires_grad=False)
        self.failures, self.seen = failures, list[torch.dtype]()

    def attempt(self) -> str:
        self.seen.append(self.weight.dtype)
        if len(self.seen) <= self.failures:
            raise engine.NotFinite("editing: bad at step 3")
        return "done"


def test_half_precision_is_retried_once_in_float32() -> None:
    half = Half(1).half()
    with pytest.warns(UserWarning, match="bad at step 3 in float16; once more in float32"):
        assert engine.retried_in_float32(half, half.attempt) == "done"
    assert half.seen == [torch.float16, torch.float32]
    assert half.weight.dtype == torch.float16
    again = Half(2).bfloat16()
    with (
        pytest.warns(UserWarning, match="once more"),
        pytest.raises(RunError, match="bad at step 3, in float32 as well"),
    ):
        engine.retried_in_float32(again, again.attempt)
    assert again.weight.dtype == torch.bfloat16


def test_float32_is_not_retried() -> None:
    single = Half(1)
    with pytest.raises(RunError, match="bad at step 3; lower"):
        engine.retried_in_float32(single, single.attempt)
    assert len(single.seen) == 1


class TestCoding:
    """The autoencoder: a picture at a time, then in tiles."""

    class Blur(nn.Module):
        """Stands for a VAE whose receptive field is small: eight times larger pictures, softly."""

        class config:
            factor = 8

        def __init__(self, most: int = 10**9, error: Exception = OUT_OF_MEMORY[0]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
            self.most, self.error = most, error
            self.sides: list[tuple[int, ...]] = []

        def fits(self, height: int, width: int) -> None:
            self.sides.append((height, width))
            if height * width > self.most:
                raise self.error

        def decode(self, latents: Tensor) -> Tensor:
            self.fits(*latents.shape[-2:])
            return nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="nearest")

        def encode(self, image: Tensor) -> Tensor:
            self.fits(*(side // 8 for side in image.shape[-2:]))
            return nn.functional.avg_pool2d(image, 8)

    @pytest.mark.parametrize("error", OUT_OF_MEMORY)
    @pytest.mark.parametrize("size", [(32, 32), (40, 21), (17, 64)])
    def test_tiles_after_memory_ran_out(self, size: tuple[int, int], error: Exception) -> None:
        latents = torch.randn(2, 4, *size)
        image = torch.randn(2, 3, 8 * size[0], 8 * size[1])
        whole, limited = self.Blur(), self.Blur(most=300, error=error)
        with pytest.warns(UserWarning, match="decoding: out of memory; going on in tiles"):
            found = engine.decode(limited, latents)  # type: ignore[arg-type]
        torch.testing.assert_close(found, engine.decode(whole, latents))  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match="encoding: out of memory; going on in tiles"):
            found = engine.encode(limited, image)  # type: ignore[arg-type]
        torch.testing.assert_close(found, engine.encode(whole, image))  # type: ignore[arg-type]

    def test_a_batch_is_coded_a_picture_at_a_time(self) -> None:
        vae = self.Blur()
        assert engine.decode(vae, torch.randn(3, 4, 8, 8)).shape == (3, 3, 64, 64)  # type: ignore[arg-type]
        assert vae.sides == [(8, 8)] * 3

    @pytest.mark.parametrize("error", OUT_OF_MEMORY)
    def test_no_tile_fits(self, error: Exception) -> None:
        vae = self.Blur(most=0, error=error)
        with pytest.warns(UserWarning, match="in tiles of 64 pixels"), pytest.raises(type(error)):
            engine.decode(vae, torch.randn(1, 4, 64, 64))  # type: ignore[arg-type]
        assert vae.sides[-1] == (8, 8)

    def test_half_precision_that_overflows(self) -> None:
        class Overflowing(self.Blur):  # type: ignore[misc, name-defined]
            def decode(self, latents: Tensor) -> Tensor:
                found = super().decode(latents)
                return found if self.weight.dtype == torch.float32 else found * torch.inf

        with pytest.warns(UserWarning, match="decoding: values that are not finite in float16; once more in float32"):
            assert engine.decode(Overflowing().half(), torch.randn(1, 4, 8, 8)).isfinite().all()  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("texts", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_prediction_lands_with_its_row(steps: int, texts: int, images: int, capacity: int) -> None:
    """Whatever the batches are, and however many rows read the same x_t."""
    rows = tuple((step, str(text)) for step in range(steps) for text in range(texts))
    phase = Phase("testing", (rows,), images, capacity, 0)
    shared = []

    def network(x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor) -> Tensor:
        assert len(x_t) <= len(inputs) <= capacity
        shared.append(len(inputs) - len(x_t))
        return x_t[inputs] + (100.0 * steps + 10000.0 * images + 1e6 * texts).view(-1, 1, 1, 1)

    evaluate = engine.Evaluator(network, phase, torch.arange(steps), torch.device("cpu"))
    x_t = torch.randn(steps, images, 3, 2, 2, dtype=torch.float64)
    of_step, of_image, of_text = (torch.arange(n, dtype=torch.float64) for n in (steps, images, texts))
    numbers = 100.0 * of_step.view(-1, 1, 1) + 10000.0 * of_image + 1e6 * of_text.view(-1, 1)
    wanted = (x_t[:, None] + numbers[..., None, None, None]).flatten(0, 1)
    torch.testing.assert_close(evaluate(x_t, len(rows)), wanted)
    evaluate.check()
    if images == 1 and capacity >= texts * steps:
        assert shared == [steps * (texts - 1)]


@pytest.mark.parametrize("images", [1, 2])
def test_rows_about_the_same_latents_share_them(images: int) -> None:
    """The branches of an editing step, those of the inversion, and the edit's beside the inversion's."""
    run = Run(images=images, capacity=100, source="a cat", target="a dog", concepts=(HAT,))
    for phase, inputs in ((run.inverting, [9]), (run.editing, [1] * 9), (run.one_pass, [10] + [1] * 8)):
        sizes: list[int] = []

        def counting(x_t: Tensor, *numbers: Tensor, network: engine.Network, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(x_t))
            return network(x_t, *numbers)

        network = partial(counting, network=run.network(phase))
        if phase is run.inverting:
            start = run.invert(network)
        elif phase is run.editing:
            run.edit(*start, network)
        else:
            run.invert_and_edit(network)
        assert sizes == [images * n for n in inputs]
