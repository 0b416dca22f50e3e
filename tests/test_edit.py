"""Algorithm 1 with a synthetic network: exactness, what is evaluated, and what must not change the result."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from ledits_min.config import EditDefaults, ScheduleConfig
from ledits_min.edit import Step, edit, invert
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, draw_noise
from ledits_min.schedule import make_schedule
from ledits_min.sega import Concept, ConceptTerm

# A context is a number; "" is the empty prompt.
CONTEXTS = {"": 0.0, "a cat": 0.7, "a dog": -0.9, "blurry": 0.3, "hat": 1.3, "beard": -0.6, "smile": 2.1}
SHAPE = (4, 6, 5)


def eps_model(x_t: Tensor, t: Tensor, context: float) -> Tensor:
    """Smooth, nonlinear, neighbouring pixels mixed; the context acts more here than there."""
    place = torch.linspace(0.0, 1.5, x_t[0].numel(), dtype=x_t.dtype).view(x_t[0].shape)
    mixed = 0.6 * x_t + 0.3 * x_t.roll(1, -1) + 0.1 * x_t.roll(1, 1)
    return torch.tanh(mixed + context * place) + 0.2 * torch.sin(3.0 * x_t + t.view(-1, 1, 1, 1) / 100.0)


def picture(batch: int = 2, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def terms(*concepts: Concept) -> tuple[ConceptTerm, ...]:
    return tuple(concept.resolve(EditDefaults()) for concept in concepts)


HAT = Concept("hat", guidance_scale=3.0, threshold=0.8, warmup_steps=0)
BEARD = Concept("beard", guidance_scale=4.0, threshold=0.5, warmup_steps=2, cooldown_steps=6, reverse=True)
SMILE = Concept("smile", guidance_scale=2.0, threshold=0.9, warmup_steps=3, weight=1.5)


def run(
    x_0: Tensor,
    num_steps: int = 12,
    skip: int = 3,
    eta: float = 1.0,
    seeds: Sequence[int] = (0, 1),
    source: str = "",
    source_guidance_scale: float = 3.5,
    model: Callable[[Tensor, Tensor, Any], Tensor] = eps_model,
    on_step: Callable[[Step], None] = lambda step: None,
    **settings: Any,
) -> Tensor:
    """Invert, then edit with `EditSettings(**settings)`."""
    inversion = InversionSettings(
        num_steps=num_steps, skip=skip, eta=eta, source=source, source_guidance_scale=source_guidance_scale
    )
    noise = draw_noise(seeds, inversion.executed_steps, tuple(x_0.shape[1:]))
    x_T, residuals = invert(model, CONTEXTS, x_0, noise, inversion)
    return edit(model, CONTEXTS, x_T, residuals, inversion, EditSettings(**settings), on_step)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


class TestReconstruction:
    """Without concepts, and with eps equal to eps_source, the picture comes back."""

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
    @pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize(
        ("num_steps", "skip"), [(1, 0), (2, 1), (7, 0), (20, 7), (50, 0), (50, 18), (50, 49), (100, 0), (100, 36)]
    )
    def test_both_prompts_empty(self, num_steps: int, skip: int, eta: float, dtype: torch.dtype, bound: float) -> None:
        x_0 = picture(dtype=dtype)
        assert largest(run(x_0, num_steps, skip, eta) - x_0) <= bound

    @pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
    def test_far_more_steps_in_float64(self, eta: float) -> None:
        x_0 = picture()
        assert largest(run(x_0, 500, 100, eta) - x_0) <= 1e-10

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
    @pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.5])
    def test_target_equal_to_source_at_its_scale(self, scale: float, dtype: torch.dtype, bound: float) -> None:
        x_0 = picture(dtype=dtype)
        again = run(x_0, 50, 18, source="a cat", source_guidance_scale=scale, target="a cat", guidance_scale=scale)
        assert largest(again - x_0) <= bound

    @pytest.mark.parametrize("changed", [{"target": "a dog"}, {"negative": "blurry"}, {"source": "a cat"}])
    def test_anything_else_is_an_edit(self, changed: dict[str, str]) -> None:
        x_0 = picture()
        assert largest(run(x_0, **changed) - x_0) > 1e-2

    def test_a_network_in_half_precision_reconstructs_too(self) -> None:
        """Only the network may be rounded. Its input differs in the last float32 bit on the way back, which
        moves a float16 network's output now and then."""

        def in_half(x_t: Tensor, t: Tensor, context: float) -> Tensor:
            return eps_model(x_t.half().float(), t, context).half().float()

        x_0 = picture(dtype=torch.float32)
        assert largest(run(x_0, 50, 18, model=in_half) - x_0) <= 2e-3

    @pytest.mark.parametrize("shape", [(4, 65, 33), (4, 7, 13), (6, 1, 1)])
    def test_any_shape_of_latents(self, shape: tuple[int, ...]) -> None:
        """Sizes written into the code."""
        x_0 = picture(1, shape)
        assert largest(run(x_0, 5, 1, seeds=(0,)) - x_0) <= 1e-10
        assert run(x_0, 5, 1, seeds=(0,), concepts=terms(HAT), momentum_scale=0.3).shape == x_0.shape

    def test_another_seed_reconstructs_as_well_and_edits_otherwise(self) -> None:
        """Another seed: another edit, whatever else is the same."""
        x_0 = picture()
        assert largest(run(x_0, seeds=(7, 8)) - x_0) <= 1e-10
        edited = [run(x_0, seeds=seeds, concepts=terms(HAT)) for seeds in ((0, 1), (7, 8))]
        assert largest(edited[0] - edited[1]) > 1e-2


class TestPureDDPMEdit:
    """Without concepts, LEDITS is the edit of [2304.06140]."""

    @pytest.mark.parametrize("eta", [0.4, 1.0])
    @pytest.mark.parametrize("negative", ["", "blurry"])
    def test_against_the_equations(self, eta: float, negative: str) -> None:
        num_steps, skip, x_0 = 9, 2, picture()
        noise = draw_noise((0, 1), num_steps - skip, SHAPE).double()
        beta_roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1.0 - beta_roots**2, 0)
        timesteps = [111 * i + 1 for i in reversed(range(num_steps))][skip:]

        def mean(x: Tensor, t: int, base: str, text: str, scale: float) -> Tensor:
            at = torch.tensor([t, t])
            eps = eps_model(x, at, CONTEXTS[base])
            eps = eps + scale * (eps_model(x, at, CONTEXTS[text]) - eps)
            now, before = alphas_cumprod[t], alphas_cumprod[max(t - 111, 0)]
            variance = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
            return before.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - before - variance).sqrt() * eps

        xs = [
            alphas_cumprod[t].sqrt() * x_0 + (1 - alphas_cumprod[t]).sqrt() * n
            for t, n in zip(timesteps, noise, strict=True)
        ]
        pairs = zip(xs, [*xs[1:], x_0], timesteps, strict=True)
        maps = [after - mean(x, t, "", "a cat", 3.5) for x, after, t in pairs]
        x = xs[0]
        for t, residual in zip(timesteps, maps, strict=True):
            x = mean(x, t, negative, "a dog", 5.0) + residual
        found = run(x_0, num_steps, skip, eta, source="a cat", target="a dog", guidance_scale=5.0, negative=negative)
        torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)

    def test_source_and_empty_swapped_pushes_the_wrong_way(self) -> None:
        """A fault of a well-known port; target = source at source_guidance_scale no longer reconstructs."""
        x_0 = picture()
        swapped = {**CONTEXTS, "": CONTEXTS["a cat"], "a cat": CONTEXTS[""]}
        inversion = InversionSettings(num_steps=12, skip=0, source="a cat", source_guidance_scale=3.5)
        noise = draw_noise((0, 1), 12, SHAPE)
        for contexts, exact in ((CONTEXTS, True), (swapped, False)):
            x_T, residuals = invert(eps_model, contexts, x_0, noise, inversion)
            x = edit(eps_model, CONTEXTS, x_T, residuals, inversion, EditSettings("a cat", 3.5))
            assert (largest(x - x_0) < 1e-10) is exact

    def test_a_negative_prompt_has_no_part_in_the_inversion(self) -> None:
        names = {*inspect.signature(invert).parameters, *(field.name for field in fields(InversionSettings))}
        assert "source" in names and not names & {"negative", "edit", "concepts", "target"}


class TestSkip:
    def test_residuals_belong_to_their_timestep(self) -> None:
        """The skip index applied twice. The steps that are run do not depend on how many were skipped."""
        x_0, noise = picture(), draw_noise((0, 1), 12, SHAPE)
        settings = InversionSettings(num_steps=12, skip=0, eta=0.5)
        _, everything = invert(eps_model, CONTEXTS, x_0, noise, settings)
        for skip in (1, 5, 11):
            _, residuals = invert(eps_model, CONTEXTS, x_0, noise[skip:], replace(settings, skip=skip))
            torch.testing.assert_close(residuals, everything[skip:], rtol=0.0, atol=1e-14)

    @pytest.mark.parametrize("skip", [0, 4, 9])
    def test_skipped_steps_are_never_evaluated(self, skip: int) -> None:
        seen: list[int] = []

        def spy(x_t: Tensor, t: Tensor, context: float) -> Tensor:
            assert t.shape == (2,)
            assert t.dtype == torch.int64
            seen.append(int(t[0]))
            return eps_model(x_t, t, context)

        run(picture(), 10, skip, model=spy)
        executed = make_schedule(ScheduleConfig(), 10).timesteps[skip:].tolist()
        assert seen == executed * 2


class TestCalls:
    """One call per distinct live text and step, never more."""

    def calls(self, **settings: Any) -> list[Counter[str]]:
        """Texts asked for at each of the ten steps of an edit."""
        inversion = InversionSettings(num_steps=10, skip=0)
        timesteps = inversion.make_schedule().timesteps.tolist()
        steps: list[Counter[str]] = [Counter() for _ in range(10)]
        names = {value: text for text, value in CONTEXTS.items()}

        def spy(x_t: Tensor, t: Tensor, context: float) -> Tensor:
            steps[timesteps.index(int(t[0]))][names[context]] += 1
            return eps_model(x_t, t, context)

        noise = draw_noise((0, 1), 10, SHAPE).double()
        edit(spy, CONTEXTS, picture(), noise, inversion, EditSettings(**settings))
        return steps

    def check(self, wanted: Sequence[Sequence[str]], **settings: Any) -> None:
        assert self.calls(**settings) == [Counter(texts) for texts in wanted]

    def test_empty_target(self) -> None:
        self.check([[""]] * 10)

    def test_target(self) -> None:
        self.check([["", "a dog"]] * 10, target="a dog")
        self.check([["a dog"]] * 10, target="a dog", guidance_scale=1.0)
        self.check([[""]] * 10, target="a dog", guidance_scale=0.0)
        self.check([["blurry", ""]] * 10, negative="blurry")
        self.check([["blurry"]] * 10, negative="blurry", target="blurry")

    def test_concepts(self) -> None:
        self.check([["", "hat"]] * 10, concepts=terms(HAT))
        self.check([["", "hat"]] * 10, concepts=terms(HAT, replace(HAT, reverse=True)))
        self.check([["", "hat"]] * 10, concepts=terms(HAT), target="hat")
        self.check([["", "hat", "a dog"]] * 10, concepts=terms(HAT), target="a dog")

    def test_idle_concepts(self) -> None:
        acting = [[""]] * 2 + [["", "beard"]] * 4 + [[""]] * 4
        self.check(acting, concepts=terms(BEARD))
        self.check([["", "beard"]] * 6 + [[""]] * 4, concepts=terms(BEARD), momentum_scale=0.5)
        acting = [["a dog"]] * 2 + [["a dog", "", "beard"]] * 4 + [["a dog"]] * 4
        self.check(acting, concepts=terms(BEARD), target="a dog", guidance_scale=1.0)

    def test_no_ops(self) -> None:
        empty = terms(Concept(""), replace(HAT, guidance_scale=0.0), replace(HAT, weight=0.0))
        self.check([[""]] * 10, concepts=empty, momentum_scale=0.5)
        self.check([["blurry", ""]] * 10, concepts=terms(Concept("blurry")), negative="blurry")
        late = [replace(SMILE, warmup_steps=5, guidance_scale=0.0), replace(SMILE, warmup_steps=5, weight=0.0)]
        self.check([["", "hat"]] * 10, concepts=terms(HAT, *late), momentum_scale=0.5)

    def test_inversion(self) -> None:
        count: Counter[float] = Counter()

        def spy(x_t: Tensor, t: Tensor, context: float) -> Tensor:
            count[context] += 1
            return eps_model(x_t, t, context)

        noise = draw_noise((0, 1), 7, SHAPE)
        for source, scale, wanted in (
            ("", 3.5, {0.0: 7}),
            ("a cat", 3.5, {0.0: 7, 0.7: 7}),
            ("a cat", 1.0, {0.7: 7}),
            ("a cat", 0.0, {0.0: 7}),
        ):
            count.clear()
            settings = InversionSettings(num_steps=10, skip=3, source=source, source_guidance_scale=scale)
            invert(spy, CONTEXTS, picture(), noise, settings)
            assert count == wanted


class TestConcepts:
    @pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
    def test_they_work_at_any_guidance_scale(self, scale: float) -> None:
        """A guidance scale of 1 or less switched SEGA and the negative prompt off."""
        x_0 = picture()
        plain = run(x_0, guidance_scale=scale)
        assert largest(run(x_0, guidance_scale=scale, concepts=terms(HAT)) - plain) > 1e-2
        if scale != 1.0:  # at 1, eps_uncond cancels
            assert largest(run(x_0, guidance_scale=scale, negative="blurry") - plain) > 1e-2

    @pytest.mark.parametrize("momentum_scale", [0.0, 0.3])
    def test_order_does_not_matter(self, momentum_scale: float) -> None:
        """In whatever order concepts are given, the edit is the same beyond rounding."""
        wanted = run(picture(), concepts=terms(HAT, BEARD, SMILE), momentum_scale=momentum_scale)
        for order in permutations((HAT, BEARD, SMILE)):
            found = run(picture(), concepts=terms(*order), momentum_scale=momentum_scale)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("negative", ["", "blurry"])
    def test_an_empty_concept_changes_no_bit(self, negative: str) -> None:
        """A no-op must not hold the others' momentum back either, however late its warm-up."""
        settings: dict[str, Any] = {"negative": negative, "target": "a dog", "momentum_scale": 0.4}
        without = run(picture(), concepts=terms(HAT, BEARD), **settings)
        soon = {"warmup_steps": BEARD.warmup_steps}  # what has a direction but no strength must not be the last one
        for no_op in (
            Concept(negative, warmup_steps=8),
            replace(SMILE, guidance_scale=0.0, **soon),
            replace(SMILE, weight=0.0, **soon),
        ):
            for order in ((no_op, HAT, BEARD), (HAT, no_op, BEARD), (HAT, BEARD, no_op)):
                assert torch.equal(run(picture(), concepts=terms(*order), **settings), without)
        alone = run(picture(), concepts=terms(Concept(negative)), **settings)
        assert torch.equal(alone, run(picture(), **settings))

    @pytest.mark.parametrize("field", ["guidance_scale", "weight"])
    def test_no_strength_is_the_limit_of_a_small_one(self, field: str) -> None:
        """Its warm-up holds the others' momentum back as ever: the result must not jump where a strength goes to 0."""
        settings: dict[str, Any] = {"num_steps": 20, "skip": 2, "momentum_scale": 0.3}
        seen: list[Step] = []

        def edited(strength: float, **more: Any) -> Tensor:
            late = replace(SMILE, warmup_steps=10, **{field: strength})
            return run(picture(), concepts=terms(HAT, BEARD, late), **settings, **more)

        nothing = edited(0.0, on_step=seen.append)
        assert largest(nothing - edited(1e-6)) < 1e-4
        assert largest(nothing - run(picture(), concepts=terms(HAT, BEARD), **settings)) > 1e-2
        assert all(step.masks[2] is None and "smile" not in step.eps for step in seen)

    def test_same_seed_same_bytes(self) -> None:
        """A picture's result does not depend on its neighbours in the batch."""
        settings: dict[str, Any] = {"concepts": terms(HAT, BEARD, SMILE), "target": "a dog", "momentum_scale": 0.4}
        together = run(picture(), **settings)
        assert torch.equal(together, run(picture(), **settings))
        for i in range(2):
            alone = run(picture()[i : i + 1], seeds=(i,), **settings)
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-12)

    def test_a_concept_changes_only_what_its_mask_covers_in_one_step(self) -> None:
        seen: list[Step] = []
        last = replace(HAT, warmup_steps=8)
        edited = run(picture(), concepts=terms(last), on_step=seen.append)
        mask = seen[-1].masks[0]
        assert mask is not None
        changed = (edited - run(picture())).abs() > 1e-9
        assert torch.equal(changed, mask)

    def test_more_scale_means_a_larger_edit_in_the_same_direction(self) -> None:
        x_0 = picture()
        last = replace(HAT, warmup_steps=8)
        plain = run(x_0)
        moves = [run(x_0, concepts=terms(replace(last, guidance_scale=scale))) - plain for scale in (1.0, 2.0, 4.0)]
        torch.testing.assert_close(moves[1], 2.0 * moves[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moves[2], 4.0 * moves[0], rtol=1e-9, atol=1e-9)
        away = run(x_0, concepts=terms(replace(last, guidance_scale=1.0, reverse=True))) - plain
        torch.testing.assert_close(away, -moves[0], rtol=1e-9, atol=1e-9)


class TestSteps:
    def test_what_a_step_reports(self) -> None:
        seen: list[Step] = []
        x = run(picture(), 12, 3, concepts=terms(HAT, BEARD), target="a dog", on_step=seen.append)
        assert [step.index for step in seen] == list(range(9))
        assert [step.t for step in seen] == make_schedule(ScheduleConfig(), 12).timesteps[3:].tolist()
        assert torch.equal(seen[-1].x_prev, x)
        assert set(seen[0].eps) == {"", "a dog", "hat"}
        assert set(seen[2].eps) == {"", "a dog", "hat", "beard"}
        assert [step.masks[1] is not None for step in seen] == [False] * 2 + [True] * 4 + [False] * 3

    def test_inversion_reports_its_progress(self) -> None:
        seen: list[tuple[int, set[str]]] = []
        noise, settings = draw_noise((0, 1), 7, SHAPE), InversionSettings(num_steps=10, skip=3, source="a cat")
        invert(eps_model, CONTEXTS, picture(), noise, settings, lambda step, eps: seen.append((step, set(eps))))
        assert seen == [(step, {"", "a cat"}) for step in range(7)]


@pytest.mark.parametrize("function", [invert, edit])
def test_the_loops_stay_readable(function: Callable[..., Any]) -> None:
    """At most 60 lines of code each, without docstring, comments and blank lines."""
    lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    docstring = [line for line in (inspect.getdoc(function) or "").splitlines() if line]
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) - len(docstring) <= 60
