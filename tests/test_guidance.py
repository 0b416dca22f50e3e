"""Classifier-free guidance, and the texts that a step really asks the network about."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ledits_min.config import EditDefaults
from ledits_min.guidance import EditSettings, classifier_free_guidance, edited_eps, guided_eps, guided_texts
from ledits_min.sega import ConceptTerm

TEXT = st.sampled_from(["", "a cat", "ugly", "hat", "beard"])
SCALE = st.sampled_from([0.0, 0.5, 1.0, 7.5])
TERMS = st.lists(
    st.builds(
        ConceptTerm,
        text=st.sampled_from(["hat", "beard", "a cat", "ugly"]),
        guidance_scale=st.sampled_from([5.0, 0.0]),
        threshold=st.just(0.9),
        warmup_steps=st.integers(0, 4),
        cooldown_steps=st.none() | st.integers(0, 6),
        weight=st.sampled_from([1.0, 0.0]),
        reverse=st.booleans(),
    ),
    max_size=4,
)


def test_an_edit_by_default_is_the_papers() -> None:
    assert EditSettings().guidance_scale == EditDefaults().guidance_scale == 15.0
    assert EditSettings() == EditSettings("", 15.0, "", (), 0.0, 0.6)


def test_classifier_free_guidance() -> None:
    uncond, text = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert classifier_free_guidance(uncond, text, 3.0).tolist() == [4.0, -4.0]


@pytest.mark.parametrize(
    ("base", "text", "scale", "wanted"),
    [
        ("", "a cat", 7.5, ("", "a cat")),
        ("", "a cat", 0.5, ("", "a cat")),  # public code guides only where the scale is above 1
        ("", "a cat", 1.0, ("a cat",)),
        ("", "a cat", 0.0, ("",)),
        ("", "", 7.5, ("",)),
        ("ugly", "ugly", 7.5, ("ugly",)),
        ("ugly", "", 7.5, ("ugly", "")),
    ],
)
def test_branches_of_guidance(base: str, text: str, scale: float, wanted: tuple[str, ...]) -> None:
    assert guided_texts(base, text, scale) == wanted


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT, SCALE)
def test_the_short_cuts_change_nothing(base: str, text: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    eps = {name: torch.randn(2, 4, 3, 3, generator=generator) for name in ("", "a cat", "ugly", "hat", "beard")}
    needed = {name: eps[name] for name in guided_texts(base, text, scale)}
    wanted = eps[base] + scale * (eps[text] - eps[base])
    torch.testing.assert_close(guided_eps(needed, base, text, scale), wanted)


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT, SCALE, TERMS, st.integers(0, 7), st.sampled_from([0.0, 0.3]))
def test_texts_of_a_step(
    negative: str, target: str, scale: float, terms: list[ConceptTerm], step: int, momentum_scale: float
) -> None:
    texts = EditSettings(target, scale, negative, tuple(terms), momentum_scale).texts(step)
    live = {
        term.text
        for term in terms
        if term.text != negative
        and term.guidance_scale * term.weight > 0.0
        and (term.cooldown_steps is None or step < term.cooldown_steps)
        and (step >= term.warmup_steps or momentum_scale > 0.0)
    }
    needed = set(live)
    if live or scale != 1.0:
        needed.add(negative)
    if scale != 0.0:
        needed.add(target)
    assert len(texts) == len(set(texts))  # equal texts are one branch
    assert set(texts) == needed


def test_an_idle_concept_costs_nothing() -> None:
    """An idle concept costs no evaluation."""
    early = ConceptTerm("hat", 5.0, 0.9, 0, 2, 1.0, False)
    late = ConceptTerm("beard", 5.0, 0.9, 4, 6, 1.0, False)
    calls = [EditSettings(concepts=(early, late)).texts(step) for step in range(8)]
    assert calls == [("", "hat")] * 2 + [("",)] * 2 + [("", "beard")] * 2 + [("",)] * 2
    calls = [EditSettings(concepts=(early, late), momentum_scale=0.2).texts(step) for step in range(8)]
    assert calls == [("", "hat", "beard")] * 2 + [("", "beard")] * 4 + [("",)] * 2


def test_a_concept_with_the_text_of_eps_uncond_is_none_at_all() -> None:
    """One without strength stays: its warm-up counts."""
    hat, empty, ugly = (ConceptTerm(text, 5.0, 0.9, 0, None, 1.0, False) for text in ("hat", "", "ugly"))
    weak = replace(hat, guidance_scale=0.0), replace(hat, weight=0.0)
    assert EditSettings(concepts=(empty, hat, ugly, *weak)).terms == (hat, ugly, *weak)
    assert EditSettings(negative="ugly", concepts=(empty, hat, ugly, *weak)).terms == (empty, hat, *weak)
    assert EditSettings(concepts=weak, momentum_scale=0.3).texts(0) == ("",)


def test_an_edit_follows_target_and_concept_at_once() -> None:
    """eps_uncond + s (eps_target - eps_uncond) + gamma_t, where everything is kept and the concept pulls forwards."""
    eps = {"": torch.tensor(1.0), "a man": torch.tensor(3.0), "a hat": torch.tensor(5.0)}
    eps = {text: value.expand(1, 4, 2, 2) for text, value in eps.items()}
    hat = ConceptTerm("a hat", 2.0, 0.0, 0, None, 0.5, False)
    settings_ = EditSettings("a man", 3.0, concepts=(hat,))
    found, added = edited_eps(eps, settings_, 0, torch.zeros(1, 4, 2, 2), {})
    assert added is not None
    assert torch.equal(added.gamma, torch.full((1, 4, 2, 2), 0.5 * 2.0 * (5.0 - 1.0)))
    assert torch.equal(found, torch.full((1, 4, 2, 2), 1.0 + 3.0 * (3.0 - 1.0) + 4.0))
