"""Settings under one name: what a preset stands for, where it is refused, and that it only changes defaults."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from ledits_min import Concept, InputError, LEdits
from ledits_min.app.values import PRESETS
from ledits_min.config import EditDefaults
from ledits_min.engine.presets import preset_defaults
from ledits_min.schedule import make_schedule
from ledits_min.weights.read.survey import TINY


@pytest.fixture(scope="module")
def tiny() -> Iterator[LEdits]:
    with LEdits.from_pretrained("tiny", device="cpu", dtype="float32") as ledits:
        yield ledits


@pytest.mark.parametrize(("is_sdxl", "theirs"), [(False, 30), (True, 50)])
def test_leditspp_executes_as_many_steps_as_diffusers(is_sdxl: bool, theirs: int) -> None:
    defaults = preset_defaults("leditspp", EditDefaults(), False, is_sdxl)
    assert defaults.num_steps - defaults.skip == theirs
    total = int(theirs * 1.15)
    their_first = theirs * (1000 // (total + 1)) + 1
    ours = make_schedule_of(defaults)
    assert abs(int(ours[0]) - their_first) < 30, "the same noise to begin with, but for the stride"
    mask = "noise" if is_sdxl else "both"
    assert (defaults.mask, defaults.solver_order, defaults.threshold, defaults.warmup_steps) == (mask, 2, 0.9, 0)
    assert (defaults.concept_guidance_scale, defaults.source_guidance_scale) == (5.0, 3.5)


@pytest.mark.parametrize(
    ("preset", "skips"), [(None, {25: 4, 50: 8, 1: 0}), ("fast", {10: 1, 20: 2, 1: 0}), ("leditspp", {34: 4, 57: 7})]
)
def test_another_number_of_steps_skips_the_same_share(tiny: LEdits, preset: str | None, skips: dict[int, int]) -> None:
    ledits = tiny.with_preset(preset)
    assert {steps: ledits.inversion_settings(num_steps=steps).skip for steps in skips} == skips
    paper = replace(tiny.defaults, num_steps=100, skip=36)
    other = copy(tiny)
    other.defaults = paper
    assert [other.inversion_settings(num_steps=steps).skip for steps in (100, 50, 20, 1)] == [36, 18, 7, 0]


def make_schedule_of(defaults: EditDefaults) -> Any:
    from ledits_min.config import SD15_SCHEDULE

    return make_schedule(SD15_SCHEDULE, defaults.num_steps, defaults.skip).timesteps


@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_its_settings_written_out_and_what_is_given_stays(tiny: LEdits, preset: str) -> None:
    picture = Image.open(TINY / "samples/portrait1.png")
    other = tiny.with_preset(preset)
    defaults = other.defaults
    _, result = other.invert_and_edit(
        picture, num_steps=3, skip=1, concepts=[Concept("sunglasses", threshold=0.7)], progress=False
    )
    numbers = defaults.concept_guidance_scale, 0.7, defaults.warmup_steps
    _, wanted = tiny.invert_and_edit(
        picture, source_guidance_scale=defaults.source_guidance_scale, num_steps=3, skip=1,
        solver_order=defaults.solver_order, progress=False,
        concepts=[Concept("sunglasses", *numbers, mask=defaults.mask)],
    )  # fmt: skip
    assert result.latents.equal(wanted.latents)
    settings = other.inversion_settings()
    assert (settings.num_steps, settings.skip) == (defaults.num_steps, defaults.skip)
    assert tiny.inversion_settings().num_steps == 25, "the first one is as it was"
    assert tiny.with_preset(None) is tiny


def test_what_it_is_not_for_is_refused(tiny: LEdits) -> None:
    with pytest.raises(InputError, match="preset 'fast' was measured on the embedded model alone; .* num_steps 50"):
        preset_defaults("fast", EditDefaults(), False, False)
    with pytest.raises(InputError, match="preset is 'quick'; the choices are leditspp, fast"):
        tiny.with_preset("quick")
    with pytest.raises(InputError, match="preset is 'quick'"):
        LEdits.from_pretrained("tiny", device="cpu", dtype="float32", preset="quick")
    with pytest.raises(InputError, match="solver_order 2 .* eta 1 alone"):
        tiny.with_preset("leditspp").inversion_settings(eta=0.5)
