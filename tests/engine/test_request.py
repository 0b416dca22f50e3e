"""What a caller asks for: mistakes with their way out, other programs' prompt syntax, what a callback may keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from ledits_min import Concept, InputError, Inversion, LEdits, Progress
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
    (lambda ledits, x: ledits.invert(SAMPLE, size=[64], **QUICK), r"size is \[64\]; two whole numbers"),
]


def _with_channels(inversion: Inversion, channels: int) -> Inversion:
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor], dim=-3)[..., :channels, :, :]

    tensors = {name: cut(getattr(inversion, name)) for name in ("x_T", "residuals", "latents")}
    return replace(inversion, **tensors)


@pytest.mark.parametrize(("call", "says"), SLIPS)
def test_a_slip_is_refused_with_the_way_out(ledits: LEdits, inversion: Inversion, call: Call, says: str) -> None:
    with pytest.raises(InputError, match=says):
        call(ledits, inversion)


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
