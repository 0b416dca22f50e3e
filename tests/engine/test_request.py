"""What a caller asks for: mistakes with their way out, other programs' prompt syntax, what a callback may keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ledits_min import Concept, InputError, Inversion, LEdits, Progress, PromptToPrompt
from ledits_min.config import EditDefaults
from ledits_min.engine.progress import Reporting
from ledits_min.engine.record import observer
from ledits_min.engine.request import edit_settings, warn_of_syntax
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.weights.read.survey import TINY

SAMPLE = TINY / "samples/portrait1.png"
QUICK: dict[str, Any] = {"num_steps": 3, "skip": 1, "progress": False}


@pytest.fixture(scope="module")
def inversion(ledits: LEdits) -> Inversion:
    return ledits.invert(SAMPLE, **QUICK)


Call = Callable[[LEdits, Inversion], object]
WRONG: Any = ["hat"]
NOTHING: Any = [None]
ARRAY: Any = np.ones((64, 64))
SLIPS: list[tuple[Call, str]] = [
    (lambda ledits, x: ledits.edit(x, concepts="hat"), r"concepts is 'hat'; .*concepts=\[Concept\('hat'\)\]"),
    (lambda ledits, x: ledits.edit(x, concepts=WRONG), r"concepts holds 'hat'; write Concept\('hat'\)"),
    (lambda ledits, x: ledits.edit(x, concepts=Concept("hat")), r"a list is wanted: concepts=\[Concept\(text='hat'"),
    (lambda ledits, x: ledits.edit(x, concepts={"hat": 7.0}), "concepts is dict; a list of Concept is wanted"),
    (lambda ledits, x: ledits.edit(x, concepts=NOTHING), "concepts holds None; a Concept is wanted"),
    (lambda ledits, x: ledits.edit("p.png"), "inversion is 'p.png'; `edit` takes what `invert` gives back"),
    (lambda ledits, x: ledits.edit(x, callback=5), "callback is 5; a function that takes a Progress"),
    (lambda ledits, x: ledits.invert(SAMPLE, callback=5), "callback is 5"),
    (lambda ledits, x: ledits.invert_and_edit(SAMPLE, concepts="hat"), "concepts is 'hat'"),
    (lambda ledits, x: ledits.invert_and_edit(SAMPLE, callback="x"), "callback is 'x'"),
    (lambda ledits, x: ledits.generate("hat", concepts=WRONG), "concepts holds 'hat'"),
    (lambda ledits, x: ledits.edit(_with_channels(x, 3)), "latents of 3 channels, the model works with 4"),
    (lambda ledits, x: ledits.edit(_with_channels(x, 8)), "latents of 8 channels"),
    (lambda ledits, x: ledits.edit(x, "\ud800"), "target is '.ud800', which holds half a character"),
    (lambda ledits, x: ledits.edit(x, negative="\ud800"), "negative is '.ud800', which holds half"),
    (lambda ledits, x: ledits.edit(x, concepts=[Concept("\ud800")]), "concept is '.ud800', which holds half"),
    (lambda ledits, x: ledits.invert(SAMPLE, "\ud800"), "source is '.ud800', which holds half"),
    (lambda ledits, x: _with_source(ledits, x, "\ud800"), "source is '.ud800', which holds half"),
    (lambda ledits, x: Concept("hat", mask=ARRAY), r"mask is array\(.*; the choices are percentile, noise"),
    (lambda ledits, x: Concept("hat", reverse=ARRAY), r"reverse is array\(.*; True or False"),
    (lambda ledits, x: Concept("hat", threshold=ARRAY), r"threshold is array\(.*; a number in 0 .. 1"),
    (lambda ledits, x: ledits.edit(x, output_size=ARRAY), r"output_size is array\(.*; the choices are input, model"),
    (lambda ledits, x: ledits.with_preset(ARRAY), r"preset is array\(.*; the choices are leditspp, fast"),
    (lambda ledits, x: LEdits.from_pretrained("tiny", engine=ARRAY), r"engine is array.*; the choices are fast, plain"),
    (lambda ledits, x: ledits.edit(x, "hat", mask_image=ARRAY), "mask_image limits concepts, and there is none"),
    (lambda ledits, x: ledits.invert(SAMPLE, size=[64], **QUICK), r"size is \[64\]; two whole numbers"),
]


def _with_source(ledits: LEdits, inversion: Inversion, source: str) -> None:
    """As a file may bring it."""
    damaged = replace(inversion, settings=replace(inversion.settings, source=source))
    ledits.edit(damaged, "hat", attention=PromptToPrompt())


def _with_channels(inversion: Inversion, channels: int) -> Inversion:
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor], dim=-3)[..., :channels, :, :]

    tensors = {name: cut(getattr(inversion, name)) for name in ("x_T", "residuals", "latents")}
    return replace(inversion, **tensors)


@pytest.mark.parametrize(("call", "says"), SLIPS)
def test_a_slip_is_refused_with_the_way_out(ledits: LEdits, inversion: Inversion, call: Call, says: str) -> None:
    with pytest.raises(InputError, match=says) as refusal:
        call(ledits, inversion)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mask_image": np.zeros((64, 64))}, "mask is black"),
        ({"concepts": [Concept("", mask="both")], "negative": "beard"}, "the empty concept: mask is 'both'"),
    ],
)
def test_prompt_to_prompt_refuses_before_the_inversion(ledits: LEdits, wrong: dict[str, Any], says: str) -> None:
    ledits.runner.evaluations.clear()
    asked = {"source": "hair", "target": "hat", "concepts": [Concept("beard")], "attention": PromptToPrompt()}
    with pytest.raises(InputError, match=says):
        ledits.invert_and_edit(SAMPLE, **{**QUICK, **asked, **wrong})
    assert not ledits.runner.evaluations
    with pytest.raises(InputError, match="mask_image limits concepts, and there is none"):
        ledits.invert_and_edit(SAMPLE, target="hat", mask_image=ARRAY, **QUICK)


@pytest.mark.filterwarnings("ignore:this model knows squares", "ignore:the embedded model was trained on drawn")
def test_a_mask_beside_what_the_model_works_at_is_refused(ledits: LEdits) -> None:
    """Of a wide picture the embedded model is given the square around what is drawn."""
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste(Image.open(SAMPLE).convert("RGB").resize((80, 80)), (110, 10))
    mask = np.zeros((100, 300))
    mask[:, :20] = 1.0
    ledits.runner.evaluations.clear()
    for attention in (None, PromptToPrompt()):
        asked = {"source": "hair", "target": "hat", "concepts": [Concept("beard")], "attention": attention}
        with pytest.raises(InputError, match="mask is white only outside the square"):
            ledits.invert_and_edit(wide, mask_image=mask, **asked, **QUICK)
    assert not ledits.runner.evaluations, "before the inversion"


def test_a_size_may_be_a_list(ledits: LEdits) -> None:
    assert ledits.invert(SAMPLE, size=[80, 64], **QUICK).latents.shape[-2:] == torch.Size([8, 10])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a (hat:1.3)", r"'\(hat:1.3\)' in a prompt is a weight to other programs and plain words here"),
        ("a man BREAK a hat", "'BREAK'"),
        ("<lora:style:0.8> a hat", "load it with lora="),
        ("embedding:easynegative", "'embedding:easynegative'"),
        ("a man (with a hat), at 10:30, breaking news (1:2", ""),
    ],
)
def test_the_syntax_of_other_programs_is_told(text: str, says: str) -> None:
    if says:
        with pytest.warns(UserWarning, match=says):
            warn_of_syntax(text)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_syntax(text)


def test_a_callback_may_do_what_it_likes_with_its_trace(ledits: LEdits, inversion: Inversion) -> None:
    def spoil(progress: Progress) -> None:
        assert progress.trace is not None
        progress.trace.clear()

    clean = ledits.edit(inversion, concepts=[Concept("hat")], trace=True, progress=False)
    spoilt = ledits.edit(inversion, concepts=[Concept("hat")], trace=True, progress=False, callback=spoil)
    assert spoilt.trace == clean.trace and all(clean.trace)


@pytest.mark.parametrize(
    ("trace", "callback", "seen"), [(False, None, False), (True, None, True), (False, print, True)]
)
def test_steps_are_looked_at_where_somebody_listens(trace: bool, callback: Any, seen: bool) -> None:
    reporting = Reporting(progress=False, trace=trace, callback=callback)
    _, on_step = observer("editing", InversionSettings(), EditSettings(), reporting)
    assert (on_step is not None) is seen


@pytest.mark.parametrize(("scale", "fits"), [(0.0, True), (1000.0, True), (1000.1, False), (-0.1, False)])
def test_the_range_of_a_guidance_scale(scale: float, fits: bool) -> None:
    with nullcontext() if fits else pytest.raises(InputError, match=r"a number in 0 \.\. 1000 is wanted"):
        assert edit_settings(EditDefaults(), "a man", scale, "", (), 0.0, 0.6).guidance_scale == scale
