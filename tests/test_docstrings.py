"""`help()` of the public interface: every argument is explained, and what stops a run is named."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import ledits_min
from ledits_min import Concept, Inversion, LEdits, PromptToPrompt
from ledits_min.config import EditDefaults

METHODS = [
    method
    for owner in (LEdits, Inversion)
    for name in vars(owner)
    if not name.startswith("_") and callable(method := getattr(owner, name))
]


def explained(text: str) -> set[str]:
    """The names that a docstring explains: in front of a gap of two spaces or of "as in", and those in backticks."""
    heads = re.findall(r"(?:^|; )([\w, ]+?)(?:  | as (?:in|there))", text, re.MULTILINE)
    return set(re.findall(r"\w+", " ".join(heads))) | set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__qualname__)
def test_every_argument_is_explained(method: Callable[..., Any]) -> None:
    text = inspect.getdoc(method) or ""
    assert text
    missing = {name for name in inspect.signature(method).parameters if name not in ("self", "path")} - explained(text)
    assert not missing


@pytest.mark.parametrize("kind", [Concept, PromptToPrompt, ledits_min.Progress, ledits_min.Result, Inversion])
def test_every_field_is_explained(kind: type) -> None:
    assert not set(inspect.signature(kind).parameters) - explained(inspect.getdoc(kind) or "")


def test_what_an_argument_may_be_and_what_stops_a_run() -> None:
    text = inspect.getdoc(LEdits) or ""
    assert all(name in text for name in ("ImageLike", "Callback", "`Stopped`", "`InputError`", "uint8"))
    for method in (LEdits.invert, LEdits.edit):
        text = inspect.getdoc(method) or ""
        assert all(name in text for name in ("Stopped", "`Progress`", "the checkpoint's own, else the"))


def test_the_defaults_are_those_of_the_paper_where_a_checkpoint_has_none() -> None:
    """The numbers in the docstrings are those of the code."""
    defaults = EditDefaults()
    invert, edit = inspect.getdoc(LEdits.invert) or "", inspect.getdoc(LEdits.edit) or ""
    assert f"the paper's {defaults.num_steps}" in invert.replace("\n", " ")
    assert f"{defaults.skip} of {defaults.num_steps}" in invert
    assert f"paper's {defaults.source_guidance_scale:g}" in invert
    assert f"the paper's {defaults.guidance_scale:g}" in edit


def test_an_editor_says_what_it_is() -> None:
    with LEdits.from_pretrained("tiny", device="cpu", dtype="float32") as ledits:
        assert repr(ledits) == "LEdits('tiny', cpu, float32)"
    assert repr(ledits) == "LEdits('tiny', closed)"
