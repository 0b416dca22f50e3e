"""What a run will evaluate, known before it starts: few calls, nothing twice, in an order that works."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledits_min.config import SD15_UNET, SD15_VAE, EditDefaults
from ledits_min.engine.budget import Model, Plan
from ledits_min.engine.plan import (
    EDIT,
    INVERSION,
    SOURCE,
    Row,
    editing_phase,
    has_pair,
    inputs,
    inversion_phase,
    one_pass_phase,
    ranges,
    split_evenly,
)
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import Lending, token_mapper
from ledits_min.sega import Concept, ConceptTerm


def terms(*concepts: Concept) -> tuple[ConceptTerm, ...]:
    return tuple(concept.resolve(EditDefaults()) for concept in concepts)


@given(total=st.integers(1, 500), most=st.integers(1, 100))
def test_parts_are_few_and_even(total: int, most: int) -> None:
    parts = split_evenly(total, most)
    assert sum(parts) == total
    assert len(parts) == -(-total // most)
    assert max(parts) <= most
    assert max(parts) - min(parts) <= 1
    assert split_evenly(total - parts[0], most) == parts[1:] if len(parts) > 1 else True


@given(total=st.integers(1, 500), most=st.integers(1, 100))
def test_parts_that_tear_no_pair(total: int, most: int) -> None:
    parts = split_evenly(total, most, pairs=True)
    assert sum(parts) == total
    assert all(part % 2 == 0 for part in parts[:-1])
    assert max(parts) <= max(2, most)
    assert len(parts) == -(-total // max(2, most - most % 2))
    assert split_evenly(total - parts[0], most, pairs=True) == parts[1:] if len(parts) > 1 else True


def test_the_papers_edit_takes_254_evaluations() -> None:
    """100 steps, skip 36, two concepts, empty prompts: both concepts sit out their warm-up step."""
    inversion = InversionSettings(num_steps=100, skip=36)
    inverting = inversion_phase(inversion, images=1, capacity=8)
    settings = EditSettings(concepts=terms(Concept("sunglasses"), Concept("smile")))
    editing = editing_phase("editing", inversion, settings, images=1, capacity=8)
    assert inverting.evaluations + editing.evaluations == 254
    assert inverting.naive + editing.naive == 100 + 64 * 4
    assert inverting.batches == ((8,) * 8,)
    assert editing.batches == ((1,), *((3,),) * 63)
    assert list(ranges(editing.rows)) == [(0, 0, ("",)), (1, 63, ("", "sunglasses", "smile"))]
    costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64))
    plan = Plan((inverting, editing), costs, 1, 1)
    assert plan.flop / 1e12 == pytest.approx(204 + 3.6, rel=0.01)


def test_equal_texts_are_one_branch_and_idle_concepts_none() -> None:
    late = terms(Concept("hat", warmup_steps=2, cooldown_steps=4))

    def branches(**settings: Any) -> list[tuple[int, int, tuple[str, ...]]]:
        inversion = InversionSettings(num_steps=6, skip=0)
        return list(ranges(editing_phase("editing", inversion, EditSettings(concepts=late, **settings), 1, 8).rows))

    assert branches(target="hat") == [(0, 5, ("", "hat"))]
    assert branches() == [(0, 1, ("",)), (2, 3, ("", "hat")), (4, 5, ("",))]
    # Momentum gathers during the warm-up.
    assert branches(momentum_scale=0.3) == [(0, 3, ("", "hat")), (4, 5, ("",))]


def test_in_one_pass_calls_are_full_and_nothing_is_evaluated_twice() -> None:
    """20 steps, skip 7, two concepts, empty prompts, room for four: the inversion fills up the edit's calls."""
    inversion = InversionSettings(num_steps=20, skip=7)
    settings = EditSettings(concepts=terms(Concept("sunglasses"), Concept("smile")))
    phase = one_pass_phase(inversion, settings, images=1, capacity=4)
    # Step 0 is the inversion's own; at step 1 x_t still is, so only the concepts are asked about.
    assert phase.parts == {
        INVERSION: tuple(Row(step, "", INVERSION) for step in range(13)),
        EDIT: (
            *(Row(1, text) for text in ("sunglasses", "smile")),
            *(Row(step, text) for step in range(2, 13) for text in ("", "sunglasses", "smile")),
        ),
    }
    assert phase.evaluations == 13 + 2 + 11 * 3
    assert phase.naive == 20 + 13 * 4
    assert phase.batches == ((4,),) * 9 + ((3,),) * 4
    assert [row.step for row in phase.groups[0]] == [0, 1, 2, 3]


WITH_PROMPTS = st.sampled_from(["", "a cat", "hat"])


@given(
    steps=st.integers(1, 9),
    source=WITH_PROMPTS,
    source_guidance_scale=st.sampled_from([0.0, 1.0, 3.5]),
    negative=WITH_PROMPTS,
    target=WITH_PROMPTS,
    guidance_scale=st.sampled_from([0.0, 1.0, 3.5]),
    live=st.sampled_from([(), (Concept("hat"),), (Concept("hat", warmup_steps=4), Concept("smile", warmup_steps=2))]),
    momentum_scale=st.sampled_from([0.0, 0.3]),
    images=st.integers(1, 5),
    capacity=st.integers(1, 30),
)
def test_one_pass_is_both_phases_in_an_order_that_works(
    steps: int,
    source: str,
    source_guidance_scale: float,
    live: tuple[Concept, ...],
    images: int,
    capacity: int,
    **edit: Any,
) -> None:
    inversion = InversionSettings(
        num_steps=steps, skip=0, source=source, source_guidance_scale=source_guidance_scale
    )  # fmt: skip
    settings = EditSettings(concepts=terms(*live), **edit)
    inverting = inversion_phase(inversion, images, capacity)
    editing = editing_phase("editing", inversion, settings, images, capacity)
    phase = one_pass_phase(inversion, settings, images, capacity)
    of_edit = tuple(row for row in phase.rows if row.reads == EDIT)
    assert tuple(row for row in phase.rows if row.reads == INVERSION) == inverting.rows
    left_out = [row for row in editing.rows if row not in of_edit]
    assert sorted([*of_edit, *left_out]) == sorted(editing.rows)
    assert {Row(row.step, row.text, INVERSION) for row in left_out} <= set(inverting.rows)  # they are the inversion's
    inverted: set[int] = set()
    for step, group in enumerate(phase.groups):
        reads = [row.reads for row in group]
        assert reads == sorted(reads)  # the edit's rows come first
        inverted |= {row.step for row in group if row.reads == INVERSION}
        assert step in inverted  # its residual is there when the step is done
        assert all(row.step == step for row in group if row.reads == EDIT)
    assert phase.evaluations == (len(inverting.rows) + len(of_edit)) * images
    assert phase.largest_batch <= max(capacity, 1)
    for group in (*inverting.groups, *editing.groups, *phase.groups):
        numbers = inputs(group)
        assert list(dict.fromkeys(numbers)) == list(range(len(set(numbers))))
        latents = [(row.reads, row.step) for row in group]
        assert len(set(zip(numbers, latents, strict=True))) == len(set(numbers)) == len(set(latents))


@pytest.mark.parametrize(
    ("more", "retraced"),
    [
        ({}, 5),
        ({"concepts": [Concept("hat", warmup_steps=3)]}, 4),  # its last step is the first in which the hat acts
        ({"concepts": [Concept("hat", warmup_steps=0)]}, 1),
        ({"target": "a dog"}, 1),
        ({"target": "a cat", "guidance_scale": 2.0}, 1),
        ({"target": "a cat", "guidance_scale": 3.5, "source": "a cat"}, 5),
        ({"target": "a cat", "guidance_scale": 3.0, "source": "a cat"}, 1),
        ({"negative": "blurry"}, 1),
        ({"concepts": [Concept("hat", warmup_steps=3, cooldown_steps=2)]}, 5),
        ({"concepts": [Concept("hat", warmup_steps=3, cooldown_steps=2)], "momentum_scale": 0.3}, 4),
    ],
)
def test_an_edit_that_retraces_the_inversion_asks_for_nothing_of_it(more: dict[str, Any], retraced: int) -> None:
    edit = {name: value for name, value in more.items() if name not in ("source", "concepts")}
    settings = EditSettings(concepts=terms(*more.get("concepts", ())), **edit)
    inversion = InversionSettings(num_steps=5, skip=0, source=more.get("source", ""))
    phase = one_pass_phase(inversion, settings, images=1, capacity=8)
    again = {row.step for row in phase.rows if row.reads == EDIT and row.text == ""}
    assert again == set(range(retraced if "" in settings.texts(4) else 5, 5))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("source", ["", "a cat"])
def test_inversion_evaluates_one_or_two_branches_a_step(source: str, scale: float) -> None:
    inversion = InversionSettings(num_steps=10, skip=3, source=source, source_guidance_scale=scale)
    phase = inversion_phase(inversion, images=3, capacity=5)
    assert phase.evaluations == 7 * 3 * (2 if source and scale == 3.5 else 1)
    assert phase.naive * 7 == phase.evaluations * 10  # the published loop inverts the skipped steps too
    assert len(phase.groups) == 1
    assert [row.step for row in phase.rows] == sorted(row.step for row in phase.rows)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("capacity", [1, 5, 64])
@pytest.mark.parametrize("images", [1, 3])
def test_a_source_that_lends_stands_beside_its_target(images: int, capacity: int, scale: float) -> None:
    inversion = InversionSettings(num_steps=6, skip=1, source="a cat", source_guidance_scale=scale)
    settings = EditSettings("a dog", negative="blurry", concepts=terms(Concept("hat")))
    lending = Lending(token_mapper([(1,)], [(2,)], 5), cross_steps=3, self_steps=1, self_tokens=16)
    phase = editing_phase("editing", inversion, settings, images, capacity, lending)
    plain = editing_phase("editing", inversion, settings, images, capacity)
    for step, (group, apart, batch) in enumerate(zip(phase.groups, plain.groups, phase.batches, strict=True)):
        assert has_pair(group) == (step < 3)
        if not has_pair(group):
            assert group == apart
            continue
        assert group[:2] == (Row(step, "a cat", SOURCE), Row(step, "a dog"))
        assert sorted(row for row in group if row.reads == EDIT) == sorted(apart)
        # What guides the source, besides its prompt, is asked about its own latents.
        guiding = {Row(step, "a cat", SOURCE)} | ({Row(step, "", SOURCE)} if scale != 1.0 else set())
        assert {row for row in group if row.reads == SOURCE} == guiding
        assert all(size % 2 == 0 for size in batch[:-1]) and max(batch) <= max(2, capacity)
    assert phase.naive == plain.naive + 2 * 5 * images
