"""Semantic guidance: the mask, the sum over concepts, warm-up, cool-down and momentum."""

from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ledits_min.config import EditDefaults
from ledits_min.errors import InputError
from ledits_min.sega import (
    Concept,
    ConceptTerm,
    Guidance,
    Where,
    edit_direction,
    percentile_mask,
    semantic_guidance,
)

TERM = Concept("hat", guidance_scale=2.0, threshold=0.5, warmup_steps=0).resolve(EditDefaults())

# Values a map may hold, among them ties, both zeros, subnormals and extremes; exact in float64.
VALUES = st.sampled_from(
    [0.0, -0.0, 1e-310, -3e-310, 5e-320, 1e-30, 0.25, -0.25, 0.5, 1.0, -1.0, 3.0, -7.5, 1e30, -1e30, 4e30]
) | st.integers(-1000, 1000).map(float)
THRESHOLDS = st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95, 0.99, 1.0]) | st.floats(0.0, 1.0)


def quantile_by_hand(values: list[float], share: float) -> tuple[Fraction, Fraction]:
    """Linear interpolation between order statistics in exact arithmetic, and how far float64 may be from it."""
    ordered = sorted(Fraction(abs(value)) for value in values)
    rank = Fraction(share) * (len(ordered) - 1)
    low = int(rank)
    gap = ordered[min(low + 1, len(ordered) - 1)] - ordered[low]
    return ordered[low] + (rank - low) * gap, Fraction(1, 10**12) * gap + Fraction(1, 2**1074)


class TestMask:
    @settings(max_examples=300, deadline=None)
    @given(st.lists(VALUES, min_size=1, max_size=40), THRESHOLDS)
    def test_against_exact_arithmetic(self, values: list[float], threshold: float) -> None:
        mask = percentile_mask(torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1), threshold).flatten()
        cut, blur = quantile_by_hand(values, threshold)
        for value, kept in zip(values, mask.tolist(), strict=True):
            distance = Fraction(abs(value)) - cut
            if distance == 0 or abs(distance) > blur:  # an exact tie is kept; rounding may decide only the rest
                assert kept == (distance >= 0)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(VALUES, min_size=2, max_size=60), THRESHOLDS, st.sampled_from([torch.float32, torch.float64]))
    def test_always_keeps_the_strongest_and_is_monotone(
        self, values: list[float], threshold: float, dtype: torch.dtype
    ) -> None:
        psi = torch.tensor(values, dtype=dtype).view(1, 1, 1, -1)
        mask = percentile_mask(psi, threshold)
        assert mask[psi.abs() == psi.abs().max()].all()
        assert not psi.abs()[~mask].numel() or psi.abs()[~mask].max() < psi.abs()[mask].min()
        assert not (percentile_mask(psi, min(1.0, threshold + 0.1)) & ~mask).any()

    @pytest.mark.parametrize("threshold", [0.0, 0.3, 0.95, 1.0])
    @pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1e-40, 1e30])
    def test_a_constant_map_is_kept_whole(self, value: float, threshold: float) -> None:
        assert percentile_mask(torch.full((2, 4, 3, 5), value), threshold).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_zero_keeps_everything_and_one_keeps_the_maximum(self, dtype: torch.dtype) -> None:
        psi = torch.randn(2, 4, 9, 7, dtype=dtype)
        assert percentile_mask(psi, 0.0).all()
        assert percentile_mask(psi, 1.0).sum(dim=(2, 3)).eq(1).all()

    def test_signed_zeros_tie(self) -> None:
        psi = torch.tensor([0.0, -0.0, 0.0, -0.0]).view(1, 1, 2, 2)
        assert percentile_mask(psi, 0.95).all()

    @pytest.mark.parametrize("size", [(16, 16), (64, 64), (65, 33)])
    def test_the_share_that_is_kept(self, size: tuple[int, int]) -> None:
        psi = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
        kept = percentile_mask(psi, 0.95).float().mean(dim=(2, 3))
        torch.testing.assert_close(kept, torch.full((2, 4), 0.05), rtol=0.0, atol=1.0 / (size[0] * size[1]))

    def test_per_sample_and_per_channel(self) -> None:
        """One quantile for all channels leaves nothing of a weak one, and too much of a strong one."""
        generator = torch.Generator().manual_seed(0)
        loudness = torch.tensor([0.01, 1.0, 2.0, 4.0]).view(1, 4, 1, 1) * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1)
        psi = loudness * torch.randn(2, 4, 10, 10, generator=generator)
        assert percentile_mask(psi, 0.9).sum(dim=(2, 3)).eq(10).all()
        pooled = psi.abs() >= torch.quantile(psi.abs().flatten(1), 0.9, dim=1).view(2, 1, 1, 1)
        assert pooled[:, 0].sum() == 0
        assert pooled[:, 3].sum() > 40

    def test_one_sample_does_not_see_the_other(self) -> None:
        psi = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        alone = torch.cat([percentile_mask(sample[None], 0.8) for sample in psi])
        assert torch.equal(percentile_mask(psi, 0.8), alone)


class TestTerm:
    def test_direction(self) -> None:
        uncond, concept = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, -3.0]).view(1, 1, 1, 2)
        assert edit_direction(concept, uncond, TERM).flatten().tolist() == [2.0, -6.0]
        assert edit_direction(concept, uncond, replace(TERM, reverse=True)).flatten().tolist() == [-2.0, 6.0]

    def test_when_it_acts(self) -> None:
        term = replace(TERM, warmup_steps=2, cooldown_steps=5)
        assert [term.acts(step) for step in range(7)] == [False, False, True, True, True, False, False]
        assert [term.matters(step, 0.0) for step in range(7)] == [False, False, True, True, True, False, False]
        assert [term.matters(step, 0.1) for step in range(7)] == [True] * 5 + [False] * 2
        assert not any(replace(TERM, warmup_steps=4, cooldown_steps=4).acts(step) for step in range(9))
        assert replace(TERM, cooldown_steps=None).acts(10**6)

    def test_without_strength_it_neither_acts_nor_matters(self) -> None:
        """Its warm-up is its own all the same."""
        assert TERM.pulls
        for weak in (replace(TERM, guidance_scale=0.0, warmup_steps=2), replace(TERM, weight=0.0, warmup_steps=2)):
            assert not weak.pulls
            assert not any(weak.acts(step) or weak.matters(step, 0.3) for step in range(9))
            assert [weak.is_warm(step) for step in range(4)] == [False, False, True, True]

    def test_defaults_are_the_papers_or_the_checkpoints(self) -> None:
        term = Concept("hat").resolve(EditDefaults())
        assert term == ConceptTerm("hat", 7.0, 0.95, 1, None, 1.0, False)
        term = Concept("hat", warmup_steps=0).resolve(EditDefaults(concept_guidance_scale=3.0, threshold=0.8))
        assert (term.guidance_scale, term.threshold, term.warmup_steps) == (3.0, 0.8, 0)
        assert Concept("hat", guidance_scale=0.0, threshold=0.0).resolve(EditDefaults()).guidance_scale == 0.0

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("guidance_scale", -1.0),
            ("guidance_scale", float("nan")),
            ("guidance_scale", float("inf")),
            ("guidance_scale", "7"),
            ("threshold", 1.01),
            ("threshold", -0.1),
            ("threshold", True),
            ("warmup_steps", -1),
            ("warmup_steps", 1.5),
            ("cooldown_steps", "9"),
            ("weight", -0.5),
            ("weight", None),
            ("reverse", "yes"),
            ("text", None),
            ("text", 3),
        ],
    )
    def test_values_out_of_range_are_refused_by_name(self, field: str, value: Any) -> None:
        with pytest.raises(InputError, match="text" if field == "text" else field) as caught:
            Concept(**{"text": "hat", field: value})
        assert "\n" not in str(caught.value)


def predictions(terms: list[ConceptTerm], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """eps_uncond, and one prediction per concept, float64; a text has the same one whatever stands beside it."""

    def draw(offset: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + offset)
        return torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)

    return draw(0), {term.text: draw(1 + sum(term.text.encode())) for term in terms}


def run(
    terms: list[ConceptTerm], steps: int, momentum_scale: float = 0.0, momentum_beta: float = 0.6
) -> list[Guidance]:
    """Several steps over the same predictions, so that only the concepts' timing changes gamma."""
    uncond, eps = predictions(terms)
    momentum, history = torch.zeros_like(uncond), []
    for step in range(steps):
        concepts = [eps[term.text] if term.matters(step, momentum_scale) else None for term in terms]
        guidance = semantic_guidance(uncond, concepts, terms, step, momentum, momentum_scale, momentum_beta, Where())
        momentum = guidance.momentum
        history.append(guidance)
    return history


def contribution(term: ConceptTerm) -> Tensor:
    """g mask psi by hand: keep what is at least the numpy quantile of its own map."""
    uncond, eps = predictions([term])
    psi = ((-1 if term.reverse else 1) * term.guidance_scale * (eps[term.text] - uncond)).numpy()
    cut = np.quantile(np.abs(psi), term.threshold, axis=(2, 3), keepdims=True)
    return torch.from_numpy(np.where(np.abs(psi) >= cut, term.weight * psi, 0.0))


HAT = TERM
BEARD = ConceptTerm("beard", 5.0, 0.8, 2, 6, 1.5, True)
SMILE = ConceptTerm("smile", 3.0, 0.9, 4, None, 0.5, False)


class TestGuidance:
    def test_sum_of_the_acting_concepts_without_momentum(self) -> None:
        hat, beard, smile = map(contribution, (HAT, BEARD, SMILE))
        history = run([HAT, BEARD, SMILE], 8)
        for step, wanted in enumerate([hat] * 2 + [hat + beard] * 2 + [hat + beard + smile] * 2 + [hat + smile] * 2):
            torch.testing.assert_close(history[step].gamma, wanted, rtol=1e-12, atol=1e-12)

    def test_momentum_by_hand(self) -> None:
        hat, beard, smile = map(contribution, (HAT, BEARD, SMILE))
        scale, beta = 0.4, 0.7
        nu = torch.zeros_like(hat)
        for step, guidance in enumerate(run([HAT, BEARD, SMILE], 9, scale, beta)):
            everything = hat + smile + (beard if step < 6 else 0.0) + scale * nu
            acting = hat + (beard if 2 <= step < 6 else 0.0) + (smile if step >= 4 else 0.0)
            torch.testing.assert_close(guidance.gamma, everything if step >= 4 else acting, rtol=1e-12, atol=1e-12)
            nu = beta * nu + (1.0 - beta) * everything
            torch.testing.assert_close(guidance.momentum, nu, rtol=1e-12, atol=1e-12)

    def test_momentum_gathers_during_warm_up_and_decays_after_every_cool_down(self) -> None:
        terms = [replace(HAT, warmup_steps=3, cooldown_steps=5)]
        scale, beta = 0.5, 0.6
        history = run(terms, 12, scale, beta)
        assert all(not history[step].gamma.any() for step in range(3))
        assert history[2].momentum.abs().max() > 0.0
        for step in range(5, 12):
            before = history[step - 1].momentum
            torch.testing.assert_close(history[step].gamma, scale * before)
            torch.testing.assert_close(history[step].momentum, (beta + (1.0 - beta) * scale) * before)

    @pytest.mark.parametrize("field", ["guidance_scale", "weight"])
    def test_a_concept_without_strength_holds_the_momentum_back_as_a_weak_one_does(self, field: str) -> None:
        """No jump where a strength goes to 0: gamma is the limit, the momentum waits, no prediction is wanted."""
        late = replace(SMILE, warmup_steps=10)
        nothing, little, gone = (
            run([HAT, BEARD, *more], 14, 0.3)
            for more in ([replace(late, **{field: 0.0})], [replace(late, **{field: 1e-6})], [])
        )
        for without, weak in zip(nothing, little, strict=True):
            assert (without.gamma - weak.gamma).abs().max() < 1e-4
            assert (without.momentum - weak.momentum).abs().max() < 1e-4
            assert without.masks[2] is None
        jumps = [float((a.gamma - b.gamma).abs().max()) for a, b in zip(nothing, gone, strict=True)]
        assert min(jumps[2:10]) > 0.1 and max(jumps[10:]) == 0.0

    def test_masks_are_reported_for_acting_concepts_only(self) -> None:
        history = run([HAT, BEARD], 8, momentum_scale=0.3)
        assert [guidance.masks[0] is not None for guidance in history] == [True] * 8
        assert [guidance.masks[1] is not None for guidance in history] == [False] * 2 + [True] * 4 + [False] * 2
        mask = history[3].masks[1]
        assert mask is not None
        assert torch.equal(mask, contribution(BEARD) != 0.0)

    def test_an_early_concept_keeps_its_strength_when_another_joins(self) -> None:
        """Weights renormalised to sum 1 among the warm concepts, raw once all are warm."""
        early, late = replace(HAT, weight=0.5), replace(SMILE, weight=2.0, warmup_steps=3)
        only_early = contribution(late) == 0.0
        before, after = (run([early, late], 5)[step].gamma[only_early] for step in (2, 3))
        torch.testing.assert_close(before, after)

        def renormalised(step: int) -> Tensor:
            warm = [term for term in (early, late) if term.is_warm(step)]
            total = 1.0 if len(warm) == 2 else sum(term.weight for term in warm)
            terms = [term.weight / total * contribution(replace(term, weight=1.0)) for term in warm]
            return torch.stack(terms).sum(0)[only_early]

        torch.testing.assert_close(renormalised(3), after)
        torch.testing.assert_close(renormalised(2), 2.0 * before)

    def test_nothing_acts_and_nothing_is_divided_by_zero(self) -> None:
        """The only warm concept has cooled down while another one is not warm yet: weights 0 / 0."""
        terms = [replace(HAT, cooldown_steps=2), replace(SMILE, warmup_steps=5)]
        for scale in (0.0, 0.5):
            guidance = run(terms, 4, momentum_scale=scale)[3]
            assert not guidance.gamma.any()
            assert guidance.momentum.isfinite().all()
        weights = torch.tensor([HAT.weight, SMILE.weight]) * torch.tensor([False, False])
        assert (weights / weights.sum()).isnan().all()

    @pytest.mark.parametrize("momentum_scale", [0.0, 0.4])
    def test_the_order_of_concepts_does_not_matter(self, momentum_scale: float) -> None:
        """The order of concepts matters to rounding alone."""
        terms = [HAT, BEARD, SMILE]
        wanted = run(terms, 8, momentum_scale)
        for order in permutations(range(3)):
            for found, guidance in zip(run([terms[k] for k in order], 8, momentum_scale), wanted, strict=True):
                torch.testing.assert_close(found.gamma, guidance.gamma, rtol=1e-13, atol=1e-13)
                for place, k in enumerate(order):
                    mask, other = found.masks[place], guidance.masks[k]
                    assert (mask is None) == (other is None)
                    assert mask is None or other is None or torch.equal(mask, other)

    def test_weight_and_reverse_scale_the_term_only(self) -> None:
        plain, heavy, away = (
            run([term], 1)[0].gamma for term in (HAT, replace(HAT, weight=3.0), replace(HAT, reverse=True))
        )
        torch.testing.assert_close(heavy, 3.0 * plain)
        assert torch.equal(away, -plain)


@pytest.mark.parametrize("field", ["warmup_steps", "cooldown_steps"])
def test_steps_of_a_concept_have_a_bound(field: str) -> None:
    for count in (0, 100_000):
        assert getattr(Concept("hat", **{field: count}), field) == count  # type: ignore[arg-type]
    for count in (-1, 100_001):
        with pytest.raises(InputError, match=rf"{field} is {count}; a whole number in 0 \.\. 100000 is wanted"):
            Concept("hat", **{field: count})  # type: ignore[arg-type]
