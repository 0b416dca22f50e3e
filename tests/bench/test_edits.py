"""The study's edits: possible, told truly, and scored by what they ask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("dicebear", reason="the [train] extra is not installed")
pytest.importorskip("resvg_py", reason="the [train] extra is not installed")

from bench.study.edits import (
    EDITS,
    PAIRS,
    TOLD,
    Edit,
    Setting,
    both,
    describe,
    named,
    pick,
    pick_alike,
)
from bench.study.evaluate import Editor, draw_all, rounded, score, succeeds, summary
from bench.study.measure import COMPARED, METHODS, Counts, Study, compare, measure_curves
from ledits_min.pipeline import LEdits
from ledits_min.weights.train_tiny.classifier import Classifier
from ledits_min.weights.train_tiny.portraits import ATTRIBUTES, OTHER_STYLES, draw_other, ideal_edit, labels, visible


@pytest.fixture(scope="module")
def tiny() -> LEdits:
    return LEdits.from_pretrained("tiny", device="cpu", dtype="fp32")


def truth(edit: Edit, changed: bool) -> np.ndarray:
    portraits = pick("unit", edit.needs, 5)
    return labels([visible(ideal_edit(p, edit.changes) if changed else p) for p in portraits])


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_an_edit_fails_before_and_succeeds_when_ideal(edit: Edit) -> None:
    assert not succeeds(truth(edit, changed=False), edit).any()
    assert succeeds(truth(edit, changed=True), edit).all()


def test_a_pair_asks_for_both() -> None:
    for first, second in PAIRS:
        union = both(first, second)
        assert union.texts == first.texts + second.texts
        assert not succeeds(truth(replace(first, needs=union.needs), changed=True), union).any()


def test_every_prompt_of_the_study_is_in_the_model_s_vocabulary(tiny: LEdits) -> None:
    for edit in EDITS:
        for portrait in pick("unit", edit.needs, 20):
            for prompt in (
                *edit.texts,
                describe(portrait, (*TOLD, *edit.changes)),
                describe(ideal_edit(portrait, edit.changes), (*TOLD, *edit.changes)),
            ):
                tiny.text.check(prompt)


def test_a_description_tells_what_shows_and_nothing_else() -> None:
    portrait = replace(pick("unit", {"hat": ("hat",)}, 1)[0])
    portrait = ideal_edit(portrait, {"beard": "none", "hat color": "red", "mouth": "smile", "eyewear": "glasses"})
    assert describe(portrait, TOLD) == "a portrait of a person, glasses, a hat, no beard, smiling"
    assert "a red hat" in describe(portrait, (*TOLD, "hat color"))


def test_groups_share_their_captions() -> None:
    edit = named("blond hair")
    groups = pick_alike("unit", edit, 2, 3)
    assert [len(group.portraits) for group in groups] == [3, 3] and groups[0].source != groups[1].source
    for group in groups:
        told = (*TOLD, *edit.changes)
        assert {describe(portrait, told) for portrait in group.portraits} == {group.source}
        assert group.target.endswith("blond hair")


def test_the_ideal_edit_scores_as_ideal() -> None:
    """Pictures that are their own ideal: nothing outside changes, and nearness to the ideal is at its ceiling."""
    edit = named("+ sunglasses")
    portraits = pick("unit", edit.needs, 3)
    pictures = draw_all(portraits, 64)
    ideals = draw_all([ideal_edit(portrait, edit.changes) for portrait in portraits], 64)
    found = summary(score(Classifier().eval(), edit, portraits, pictures, ideals))
    assert found["closer"] == 1.0 and found["outside_db"] > 50.0
    assert found["ideal_inside_ssim_after"] == 1.0 > found["ideal_inside_ssim_before"]
    untouched = summary(score(Classifier().eval(), edit, portraits, pictures, pictures))
    assert untouched["gain_db"] == 0.0 and untouched["kept_ratio"] == 1.0 and untouched["closer"] == 0.0


def test_another_style_is_drawn_the_same_every_time() -> None:
    for style in OTHER_STYLES:
        picture = draw_other(style, "unit 0", 32)
        assert picture.shape == (32, 32, 3) and (picture == draw_other(style, "unit 0", 32)).all()
        assert (picture != draw_other(style, "unit 1", 32)).any()


def test_the_editor_counts_what_the_network_does(tiny: LEdits) -> None:
    editor = Editor(tiny)
    pictures = draw_all(pick("unit", {}, 2), editor.size)
    with editor.work() as work:
        inversions = editor.invert(pictures, num_steps=4, skip=1)
    assert work.evaluations == 2 * 3
    with editor.work() as work:
        edited = editor.edit(inversions, concepts=named("+ beard").concepts(Setting(4, 1, 5.0, 0.9, 0)))
    assert work.evaluations == 2 * 3 * 2 and edited.shape == pictures.shape


def test_a_section_of_the_study_runs(tiny: LEdits) -> None:
    setting = Setting(4, 1, 4.0, 0.9)
    counts = Counts(captions=1, each=2)
    study = Study(Editor(tiny), Classifier().eval(), counts, {"local": setting, "global": setting})
    name = COMPARED[0].name
    found = rounded(measure_curves(study, name))[name]
    assert {point["method"] for point in found["points"]} == set(METHODS)
    assert found["compared"] == rounded(compare(found["points"], setting.scale))
    assert len(found["monotone"]["probability"]) == len(found["monotone"]["strengths"])


def test_rounding_keeps_what_json_can_hold() -> None:
    assert rounded({"a": (float("nan"), 1.23456789e-7), "b": {"c": np.float64(2.0)}, "d": 3}) == {
        "a": [None, 1.2346e-7],
        "b": {"c": 2.0},
        "d": 3,
    }


def test_every_attribute_of_an_edit_exists() -> None:
    for edit in EDITS:
        for name in edit.changes:
            assert set(edit.accepted(name)) <= set(ATTRIBUTES[name])
