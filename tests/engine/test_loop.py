"""The engine's loops against the plain ones of `edit`: equal results, fewer calls, and what is done when one fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ledits_min import edit as plain
from ledits_min.config import EditDefaults
from ledits_min.edit import Step
from ledits_min.engine import loop as engine
from ledits_min.engine.evaluate import Network
from ledits_min.engine.loop import Watch
from ledits_min.engine.maps import Look, Maps, Recording, looking_eps_model
from ledits_min.engine.ops import EditState
from ledits_min.engine.plan import Phase, Row, editing_phase, inversion_phase, one_pass_phase
from ledits_min.engine.record import mean_masks
from ledits_min.errors import RunError
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, draw_noise
from ledits_min.p2p import AttentionControl, ControlledEpsModel, Lending, LocalBlend, lend_maps, token_mapper
from ledits_min.sega import Concept
from ledits_min.unet import Attend

CONTEXTS = {"": 0.0, "a cat": 0.7, "a dog": -0.9, "blurry": 0.3, "hat": 1.3, "beard": -0.6, "smile": 2.1}
SHAPE = (4, 6, 5)
TOKENS = 6  # of a text
HAT = Concept("hat", guidance_scale=3.0, threshold=0.8, warmup_steps=0)
BEARD = Concept("beard", guidance_scale=4.0, threshold=0.5, warmup_steps=2, cooldown_steps=6, reverse=True)
GONE = Concept("hat", guidance_scale=3.0, threshold=0.7, warmup_steps=4, cooldown_steps=2)  # acts by its momentum alone
SMILE = Concept("smile", guidance_scale=2.0, threshold=0.9, warmup_steps=3, weight=1.5)
NOISE_HAT, BOTH_HAT = replace(HAT, mask="noise"), replace(HAT, mask="both")
WORDS_SMILE = replace(SMILE, mask="attention")
WORDS_CAT = Concept("a cat", guidance_scale=2.0, threshold=0.6, warmup_steps=1, mask="attention")
OWN = {"hat": 1, "smile": 3, "a cat": 2, "a dog": 2, "beard": 1}  # tokens of a text
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


def eps_model(x_t: Tensor, t: Tensor, context: Any, attention: AttentionControl | None = None) -> Tensor:
    """Smooth, nonlinear, pixels attend to each other and to a text; context is a number, or several shared out evenly.

    The picture may have any dtype, and the answer has it.
    """
    levels = torch.as_tensor(context, dtype=x_t.dtype).flatten()
    level = levels.repeat_interleave(len(x_t) // len(levels)).view(-1, 1, 1, 1)
    place = torch.linspace(0.0, 1.5, x_t[0].numel(), dtype=x_t.dtype).view(x_t[0].shape)
    words = torch.arange(1.0, 1.0 + TOKENS * SHAPE[0], dtype=x_t.dtype).view(TOKENS, SHAPE[0])
    pixels = x_t.flatten(2).transpose(1, 2)[:, None]  # one head
    on_self: Attend = scaled_dot_product_attention
    on_text: Attend = scaled_dot_product_attention
    if attention is not None:
        on_self, on_text = attention.self_attention, attention.cross_attention
    seen = on_self(2.0 * pixels, pixels.roll(1, 2), pixels)
    read = on_text(2.0 * pixels, torch.sin(level * words), torch.cos((1.0 + level) * words))
    mixed = 0.6 * x_t + (0.4 * seen + 0.5 * read)[:, 0].transpose(1, 2).reshape(x_t.shape)
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
    lending: Lending | None = None
    solver_order: int = 1
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.inversion = InversionSettings(
            num_steps=self.num_steps, skip=self.skip, eta=self.eta, source=self.source,
            source_guidance_scale=self.source_guidance_scale, solver_order=self.solver_order,
        )  # fmt: skip
        self.settings = EditSettings(
            self.target, self.guidance_scale, self.negative,
            tuple(concept.resolve(EditDefaults()) for concept in self.concepts), self.momentum_scale,
        )  # fmt: skip
        self.timesteps = self.inversion.make_schedule().timesteps
        steps, limits = len(self.timesteps), (self.images, self.capacity)
        generator = torch.Generator().manual_seed(9)
        self.x_0 = torch.randn(self.images, *SHAPE, generator=generator).to(self.dtype)
        self.noise = draw_noise(range(self.images), steps, SHAPE).to(self.dtype)
        self.inverting = inversion_phase(self.inversion, *limits)
        place = torch.arange(TOKENS)
        tokens = {
            Look(term.text): (place > 0) & (place <= OWN[term.text]) for term in self.settings.terms if term.attends
        }
        if self.lending is not None and self.lending.blend is not None:
            looks = Look(self.source, of_source=True, blends=True), Look(self.target, blends=True)
            tokens |= zip(looks, self.lending.blend.words, strict=True)
        self.recording = Recording(self.settings, tokens, frozenset([0]), SHAPE[1:]) if tokens else None
        editing = editing_phase("editing", self.inversion, self.settings, *limits, self.lending)
        self.editing = replace(editing, recording=self.recording)
        self.one_pass = replace(one_pass_phase(self.inversion, self.settings, *limits), recording=self.recording)

    def network(self, phase: Phase, spy: Callable[..., None] = lambda *seen: None) -> Network:
        values = torch.tensor([CONTEXTS[text] for text in phase.texts], dtype=torch.float64)

        def network(
            x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor,
            attention: Any = None,
        ) -> Tensor:  # fmt: skip
            assert len(x_t) < len(inputs) or inputs.tolist() == list(range(len(x_t)))
            spy(x_t[inputs], steps, texts, images, attention)
            return eps_model(x_t[inputs], self.timesteps[steps], values[texts], attention)

        return network

    def invert(self, network: Network | None = None, watch: Watch = engine.UNWATCHED) -> tuple[Tensor, Tensor]:
        network = network or self.network(self.inverting)
        return engine.invert(network, self.inverting, self.x_0, self.noise, self.inversion, watch)

    def edit(
        self, x_T: Tensor, residuals: Tensor, network: Network | None = None, watch: Watch = engine.UNWATCHED
    ) -> EditState:
        network = network or self.network(self.editing)
        return engine.edit(
            network, self.editing, x_T, residuals, self.inversion, self.settings, watch, self.lending
        )  # fmt: skip

    def invert_and_edit(
        self, network: Network | None = None, watch: Watch = engine.UNWATCHED
    ) -> tuple[Tensor, Tensor, EditState]:
        network = network or self.network(self.one_pass)
        return engine.invert_and_edit(
            network, self.one_pass, self.x_0, self.noise, self.inversion, self.settings, watch
        )  # fmt: skip

    def plainly(self, on_step: Callable[[Step], None] = lambda step: None) -> tuple[Tensor, Tensor, Tensor]:
        """x_T, residuals and the edited x_0 of the plain loops."""
        x_T, residuals = plain.invert(eps_model, CONTEXTS, self.x_0, self.noise, self.inversion)
        start, hooks = (x_T, residuals, self.inversion, self.settings), plain.Hooks()
        model: ControlledEpsModel = eps_model
        maps = Maps()
        if self.recording is not None:
            model = looking_eps_model(eps_model, CONTEXTS, self.recording, maps)
        if self.lending is not None:
            hooks = lend_maps(model, CONTEXTS, *start, self.lending, maps.blend)
        return x_T, residuals, plain.edit(model, CONTEXTS, *start, on_step, hooks._replace(maps=maps.masks))

    def masks(self, state: EditState) -> list[Tensor]:
        return mean_masks(list(state.kept), self.settings, len(self.timesteps))


@settings(max_examples=60, deadline=None)
@given(
    num_steps=st.integers(1, 12),
    skip=st.integers(0, 11),
    eta_and_order=st.sampled_from([(0.0, 1), (0.5, 1), (1.0, 1), (1.0, 2)]),
    images=st.integers(1, 3),
    capacity=st.integers(1, 40),
    source=st.sampled_from(["", "a cat"]),
    target=st.sampled_from(["", "a cat", "a dog", "hat"]),
    guidance_scale=st.sampled_from([0.0, 1.0, 3.5, 7.0]),
    negative=st.sampled_from(["", "blurry"]),
    concepts=st.sampled_from(
        [
            (),
            (HAT,),
            (GONE,),
            (HAT, BEARD),
            (GONE, BEARD),
            (BEARD, SMILE),
            (replace(HAT, reverse=True), HAT),
            (NOISE_HAT, BEARD),
            (BOTH_HAT,),
            (WORDS_SMILE, BOTH_HAT, BEARD),
            (WORDS_CAT, BOTH_HAT),
        ]
    ),
    momentum_scale=st.sampled_from([0.0, 0.4]),
)
def test_equal_to_the_plain_loops(
    skip: int, num_steps: int, eta_and_order: tuple[float, int], **more: Any
) -> None:  # fmt: skip
    eta, order = eta_and_order
    run = Run(num_steps=num_steps, skip=skip % num_steps, eta=eta, solver_order=order, **more)
    seen: list[Step] = []
    x_t, residuals, edited = run.plainly(seen.append)
    found = run.invert()
    torch.testing.assert_close(found, (x_t, residuals), rtol=1e-12, atol=1e-12)
    state = run.edit(*found)
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)

    *of_inversion, together = run.invert_and_edit()
    torch.testing.assert_close(of_inversion, [x_t, residuals], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.x_t, edited, rtol=1e-10, atol=1e-10)

    for k in range(len(run.settings.terms)):
        acted = [step.masks[k].float().mean(dim=1) for step in seen if step.masks[k] is not None]  # type: ignore[union-attr]
        for masks in (run.masks(state), run.masks(together)):
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
        run.invert_and_edit(watch=Watch(step=fast.append))
    else:
        run.edit(x_t, residuals, watch=Watch(step=fast.append))
    assert len(fast) == len(plainly) == 9
    for one, other in zip(fast, plainly, strict=True):
        assert (one.index, one.t, list(one.eps)) == (other.index, other.t, list(other.eps))
        torch.testing.assert_close(one.gamma, other.gamma)
        torch.testing.assert_close(one.x_prev, other.x_prev)
        assert [mask is None for mask in one.masks] == [mask is None for mask in other.masks]


@pytest.mark.parametrize("together", [False, True])
def test_latents_alone_are_seen_where_nobody_asks_for_predictions(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is the guidance computed twice for them."""
    run = Run(target="a dog", concepts=(HAT, BEARD), momentum_scale=0.3)
    x_T, residuals = run.invert()
    plainly, steps = list[Step](), list[Step]()
    run.plainly(plainly.append)
    monkeypatch.setattr(engine, "edited_eps", None)
    watch = Watch(step=steps.append, predictions=False)
    if together:
        run.invert_and_edit(watch=watch)
    else:
        run.edit(x_T, residuals, watch=watch)
    assert [(step.eps, step.gamma, step.masks) for step in steps] == [({}, None, [])] * 9
    for one, other in zip(steps, plainly, strict=True):
        torch.testing.assert_close(one.x_prev, other.x_prev)
    with pytest.raises(TypeError):
        run.edit(x_T, residuals, watch=Watch(step=steps.append))


@pytest.mark.parametrize("capacity", [1, 4, 100])
@pytest.mark.parametrize("solver_order", [1, 2])
def test_reconstruction_is_exact(capacity: int, solver_order: int) -> None:
    """Whatever shares a call."""
    run = Run(num_steps=100, skip=36, dtype=torch.float32, capacity=capacity, solver_order=solver_order)
    state = run.edit(*run.invert())
    assert (state.x_t - run.x_0).abs().max() <= 1e-4
    assert (run.invert_and_edit()[2].x_t - run.x_0).abs().max() <= 1e-4
    assert run.one_pass.evaluations == run.inverting.evaluations  # it retraces, so the edit asks for nothing


def calls(run: Run, phase: Phase, loop: Callable[..., object]) -> list[tuple[Tensor, ...]]:
    """What each call of the network was given; the loop's progress and the plan's batches must be those calls."""
    seen: list[tuple[Tensor, ...]] = []
    told: list[int] = []
    loop(network=run.network(phase, lambda *call: seen.append(call)), watch=Watch(told.append))
    assert [len(call[0]) for call in seen] == [size for sizes in phase.batches for size in sizes] == told
    assert sum(told) == phase.evaluations
    return seen


def test_calls_are_those_of_the_plan() -> None:
    """Never above executed steps x (1 or 2), and executed steps x live branches."""
    run = Run(source="a cat", target="a dog", concepts=(HAT, BEARD), capacity=7)
    x_t, residuals = run.invert()

    def check(phase: Phase, loop: Callable[..., object]) -> None:
        asked = [one for call in calls(run, phase, loop) for one in torch.stack(call[1:4], dim=1).tolist()]
        assert asked == [[row.step, phase.texts.index(row.text), i] for row in phase.rows for i in range(run.images)]

    check(run.inverting, run.invert)
    check(run.editing, partial(run.edit, x_t, residuals))
    check(run.one_pass, run.invert_and_edit)
    assert run.inverting.evaluations == 9 * 2 * run.images
    assert run.editing.evaluations == (9 * 3 + 4) * run.images  # uncond, target, hat; beard in steps 2 to 5
    # Where both start x_t is the same, and so is the prediction for the empty prompt.
    assert run.one_pass.evaluations == run.inverting.evaluations + run.editing.evaluations - run.images


@pytest.mark.parametrize("solver_order", [1, 2])
def test_equal_through_the_kernels(monkeypatch: pytest.MonkeyPatch, solver_order: int) -> None:
    """The same loops with Triton's interpreter (or a GPU's compiler) behind `ops`."""
    pytest.importorskip("triton")
    run = Run(num_steps=5, skip=1, dtype=torch.float32, source="a cat", target="a dog", concepts=(HAT, SMILE))
    run = replace(run, momentum_scale=0.3, solver_order=solver_order)
    x_t, residuals = run.invert()
    edited = run.edit(x_t, residuals)
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    found = run.invert()
    torch.testing.assert_close(found, (x_t, residuals), rtol=1e-5, atol=1e-5)
    state = run.edit(x_t, residuals)
    torch.testing.assert_close(state.x_t, edited.x_t, rtol=1e-4, atol=1e-4)
    for one, other in zip(run.masks(state), run.masks(edited), strict=True):
        torch.testing.assert_close(one, other)
    *of_inversion, together = run.invert_and_edit()
    torch.testing.assert_close(of_inversion, [x_t, residuals], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.x_t, edited.x_t, rtol=1e-4, atol=1e-4)


def failing(network: Network, error: Exception, most: int) -> Network:
    """A network that has memory for `most` evaluations per call."""

    def limited(x_t: Tensor, inputs: Tensor, *call: Any, **more: Any) -> Tensor:
        if len(inputs) > most:
            raise error
        return network(x_t, inputs, *call, **more)

    return cast(Network, limited)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:.*out of memory with [1-9] evaluations")
def test_out_of_memory_splits_the_batch_and_goes_on(error: Exception, most: int) -> None:
    run = Run(capacity=16, target="a dog", concepts=(HAT,))
    x_t, residuals, edited = run.plainly()
    with pytest.warns(UserWarning, match="inverting: out of memory with 9 evaluations per call; going on with"):
        found = run.invert(failing(run.network(run.inverting), error, most))
    torch.testing.assert_close(found, (x_t, residuals), rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="editing: out of memory with 6 evaluations per call; going on with 3"):
        state = run.edit(*found, failing(run.network(run.editing), error, most))
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)
    with pytest.warns(UserWarning, match="inverting and editing: out of memory with 16 evaluations per call; going on"):
        *of_inversion, state = run.invert_and_edit(failing(run.network(run.one_pass), error, most))
    torch.testing.assert_close(of_inversion, [x_t, residuals], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, RuntimeError("a bug"), MemoryError()])
def test_what_cannot_be_split_is_raised(error: Exception) -> None:
    run = Run(capacity=1, images=1)
    with pytest.raises(type(error)):
        run.invert(failing(run.network(run.inverting), error, 0))


def poisoned(network: Network, phase: Phase, row: Row, value: float) -> Network:
    """One value of one row is not finite."""

    def network_with_a_fault(x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, *more: Any) -> Tensor:
        eps = network(x_t, inputs, steps, texts, *more)
        eps[(steps == row.step) & (texts == phase.texts.index(row.text)), 0, 0, 0] = value
        return eps

    return cast(Network, network_with_a_fault)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named_at_every_step_and_branch(value: float) -> None:
    run = Run(num_steps=6, skip=2, source="a cat", target="a dog", concepts=(HAT,), images=2)
    start = run.invert()
    loops = (run.inverting, run.invert), (run.editing, partial(run.edit, *start)), (run.one_pass, run.invert_and_edit)
    for phase, loop in loops:
        for row in dict.fromkeys(phase.rows):
            at = rf"^{phase.name}: the prediction for '{row.text}' .* step {row.step} \(t = {run.timesteps[row.step]}\)"
            with pytest.raises(RunError, match=at):
                loop(network=poisoned(run.network(phase), phase, row, value))


def test_latents_that_overflow_are_named() -> None:
    run = Run(num_steps=4, skip=0, dtype=torch.float32)
    x_t, residuals = run.invert()
    residuals[2] = torch.inf
    with pytest.raises(RunError, match="editing: the latents .* step 2"):
        run.edit(x_t, residuals)


@pytest.mark.parametrize("images", [1, 2])
def test_rows_about_the_same_latents_share_them(images: int) -> None:
    """The branches of an editing step, those of the inversion, and the edit's beside the inversion's."""
    run = Run(images=images, capacity=100, source="a cat", target="a dog", concepts=(HAT,))
    for phase, inputs in ((run.inverting, [9]), (run.editing, [1] * 9), (run.one_pass, [10] + [1] * 8)):
        sizes: list[int] = []

        def counting(x_t: Tensor, *call: Any, network: Network, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(x_t))
            return network(x_t, *call)

        network = partial(counting, network=run.network(phase))
        if phase is run.inverting:
            start = run.invert(network)
        elif phase is run.editing:
            run.edit(*start, network)
        else:
            run.invert_and_edit(network)
        assert sizes == [images * n for n in inputs]


# --- Prompt-to-Prompt -----------------------------------------------------------------------------------------------


def lending(cross_steps: int = 5, self_steps: int = 3, self_tokens: int = 30) -> Lending:
    """A word of the source is replaced and one is put in; a picture has 30 pixels."""
    mapper = token_mapper([(1,), (2,)], [(1,), (7,), (2,)], TOKENS)
    return Lending(mapper, cross_steps, self_steps, self_tokens)


def blending(source: Sequence[int], target: Sequence[int], threshold: float = 0.8, **lent: int) -> Lending:
    """The same, and the edit stays around these tokens of the two prompts."""
    words = torch.zeros(2, TOKENS, dtype=torch.bool)
    words[0, list(source)] = True
    words[1, list(target)] = True
    return replace(lending(**lent), blend=LocalBlend(words, threshold))


LENT: dict[str, Any] = {
    "source": "a cat", "target": "a dog", "negative": "blurry", "concepts": (HAT,), "lending": lending(),
}  # fmt: skip


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"negative": ""},  # the edit and the source both ask for the empty prompt, about latents of their own
        {"source_guidance_scale": 1.0},  # nothing but its prompt guides the source
        {"source_guidance_scale": 0.0},  # its prompt is asked about for its maps alone
        {"guidance_scale": 1.0, "concepts": ()},  # nothing but the target is asked about
        {"guidance_scale": 0.0, "concepts": ()},  # the target is not asked about, so there is nothing to lend to
        {"lending": lending(cross_steps=2, self_steps=6), "momentum_scale": 0.3},
        {"lending": lending(self_tokens=29)},
        {"lending": lending(cross_steps=9, self_steps=0), "images": 3, "eta": 0.5},
        {"lending": lending(cross_steps=0, self_steps=0)},
        {"solver_order": 2},
        {"concepts": (BOTH_HAT, WORDS_SMILE)},
        {"concepts": (replace(WORDS_CAT, text="a dog"), HAT), "images": 3},  # the target's own maps, while it borrows
        {"lending": blending([], [2])},
        {"lending": blending([1], [1, 2]), "images": 3, "negative": ""},
        {"lending": blending([1, 2], [], cross_steps=0, self_steps=0), "source_guidance_scale": 1.0},
        {"lending": blending([2], [3]), "solver_order": 2, "momentum_scale": 0.3},
        {"lending": blending([1], [2]), "guidance_scale": 0.0},  # the target is asked about for its maps alone
        {"lending": blending([1], [2]), "guidance_scale": 1.0, "concepts": ()},
        # One row is looked at twice, for a concept's own words and for those of the blend; and the source's text in
        # the edit's own row, too.
        {"lending": blending([1], [2]), "concepts": (replace(WORDS_CAT, text="a dog"), BOTH_HAT), "images": 3},
        {"lending": blending([1], [2]), "concepts": (WORDS_CAT, WORDS_SMILE)},
    ],
)
def test_prompt_to_prompt_is_the_plain_loop_with_its_hook(more: dict[str, Any], capacity: int) -> None:
    run = Run(**{**LENT, **more}, capacity=capacity)
    plainly: list[Step] = []
    fast: list[Step] = []
    x_T, residuals, edited = run.plainly(plainly.append)
    state = run.edit(x_T, residuals, watch=Watch(step=fast.append))
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)
    for one, other in zip(fast, plainly, strict=True):
        assert {*one.eps} == {*other.eps}
        torch.testing.assert_close(one.x_prev, other.x_prev, rtol=1e-10, atol=1e-10)
        for text, eps in one.eps.items():
            torch.testing.assert_close(eps, other.eps[text], rtol=1e-10, atol=1e-10)
    apart = replace(run, lending=None).edit(x_T, residuals).x_t - state.x_t
    lends = any(run.lending.needs_source(step, run.settings) for step in range(9))  # type: ignore[union-attr]
    assert (apart.abs().max() > 1e-3) == lends


@pytest.mark.parametrize("order", [1, 2])
def test_a_blend_that_keeps_nothing_of_the_edit_gives_the_picture_back(order: int) -> None:
    run = Run(**{**LENT, "lending": blending([1], [2], threshold=1.0)}, solver_order=order)
    x_T, residuals, edited = run.plainly()
    for found in (edited, run.edit(x_T, residuals).x_t):
        torch.testing.assert_close(found, run.x_0, rtol=1e-10, atol=1e-10)
    everything = replace(run, lending=blending([1], [2], threshold=0.0)).edit(x_T, residuals)
    torch.testing.assert_close(everything.x_t, Run(**LENT, solver_order=order).edit(x_T, residuals).x_t)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_no_pair_is_torn_and_progress_counts_its_evaluations(images: int, capacity: int) -> None:
    run = Run(**LENT, images=images, capacity=capacity)
    start = run.invert()
    place, lent = run.editing.texts.index, 0
    for _, steps, texts, of, attention in calls(run, run.editing, partial(run.edit, *start)):
        assert len(steps) <= max(2, capacity)
        if attention is None:
            assert steps.min() >= 5 or place("a dog") not in texts
            continue
        source, target = attention.source, attention.target  # type: ignore[attr-defined]
        assert len(source) == len(target) > 0
        assert torch.equal(of[source], of[target]) and torch.equal(steps[source], steps[target])
        assert (texts[source] == place("a cat")).all() and (texts[target] == place("a dog")).all()
        lent += len(source)
    assert lent == 5 * images
    # The concept, the negative prompt and the target at every step; while it lends, the source's two prompts besides.
    assert run.editing.evaluations == (9 * 3 + 5 * 2) * images


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("most", [2, 3, 5])
@pytest.mark.filterwarnings("ignore:.*out of memory with [1-9] evaluations")
def test_prompt_to_prompt_goes_on_in_smaller_batches(error: Exception, most: int) -> None:
    run = Run(**LENT, images=3, capacity=64)
    x_T, residuals, edited = run.plainly()
    network, sizes = run.network(run.editing, lambda x_t, *more: sizes.append(len(x_t))), list[int]()
    with pytest.warns(UserWarning, match="editing: out of memory with 15 evaluations per call; going on with 8"):
        state = run.edit(x_T, residuals, failing(network, error, most))
    torch.testing.assert_close(state.x_t, edited, rtol=1e-10, atol=1e-10)
    assert max(sizes) <= most and sum(sizes) == run.editing.evaluations


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.filterwarnings("ignore:.*out of memory with [1-9] evaluations")
def test_a_pair_that_does_not_fit_is_raised(error: Exception) -> None:
    run = Run(**LENT, images=1, capacity=64)
    start = run.invert()
    with pytest.raises(type(error)):
        run.edit(*start, failing(run.network(run.editing), error, 1))


@pytest.mark.filterwarnings("ignore:.*out of memory with [1-9] evaluations")
def test_memory_that_shrinks_behind_a_pair_does_not_hang() -> None:
    """Two evaluations fit while they are a pair, and no more two behind it: it ends, whatever the way."""
    run = Run(**LENT, images=1, capacity=64)
    start, network, tries = run.invert(), run.network(run.editing), [0]

    def shrinking(x_t: Tensor, *call: Any) -> Tensor:
        tries[0] += 1
        assert tries[0] < 50, "it tries the same batch for ever"
        if len(call[0]) > (1 if call[-1] is None else 2):
            raise OUT_OF_MEMORY[0]
        return network(x_t, *call)

    with pytest.raises(torch.OutOfMemoryError):
        run.edit(*start, shrinking)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("capacity", [2, 64])
def test_what_is_not_finite_is_named_in_the_sources_rows_too(capacity: int, value: float) -> None:
    run = Run(**LENT, capacity=capacity, num_steps=6, skip=1)
    start, phase = run.invert(), run.editing
    for row in phase.rows:
        at = rf"^editing: the prediction for '{row.text}' .* step {row.step} \(t = {run.timesteps[row.step]}\)"
        with pytest.raises(RunError, match=at):
            run.edit(*start, poisoned(run.network(phase), phase, row, value))
