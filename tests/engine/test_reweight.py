"""Prompt-to-Prompt's re-weighting of words: what it multiplies, both engines, and words that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from ledits_min import InputError, LEdits, PromptToPrompt
from ledits_min.app.outputs import parameters_line
from ledits_min.app.values import parse_p2p
from ledits_min.p2p import TokenMapper, mix_maps
from ledits_min.weights.read.survey import TINY

EDIT: dict[str, Any] = {
    "source": "a man", "target": "a man with a red hat", "guidance_scale": 3.0, "num_steps": 5, "skip": 1,
    "progress": False,
}  # fmt: skip


def latents(ledits: LEdits, **reweight: float) -> torch.Tensor:
    picture, attention = Image.open(TINY / "samples/portrait1.png"), PromptToPrompt(reweight=reweight)
    return ledits.invert_and_edit(picture, attention=attention, **EDIT)[1].latents


def test_a_map_is_multiplied_and_the_others_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    source, target = torch.rand(2, 1, 2, 4, 5, generator=generator).softmax(-1)
    lend, own = torch.rand(5, 5, generator=generator), torch.rand(5, generator=generator)
    plain = mix_maps(source, target, TokenMapper(lend, own))
    factors = torch.tensor([1.0, 1.0, -2.0, 1.0, 3.0])
    torch.testing.assert_close(mix_maps(source, target, TokenMapper(lend, own).reweighted(factors)), factors * plain)


def test_both_engines_agree_and_a_factor_of_one_does_nothing(ledits: LEdits) -> None:
    with LEdits.from_pretrained("tiny", device="cpu", dtype="float32", engine="plain") as plain:
        assert (latents(plain, hat=3.0) - latents(ledits, hat=3.0)).abs().max() < 1e-4
    assert torch.equal(latents(ledits), latents(ledits, hat=1.0))
    assert (latents(ledits) - latents(ledits, hat=3.0)).abs().max() > 1e-2


def test_words_that_are_not_there_are_refused(ledits: LEdits) -> None:
    picture = Image.open(TINY / "samples/portrait1.png")
    inversion = ledits.invert(picture, "a man", num_steps=2, skip=0, progress=False)
    for words in ("beard", "hat red", ""):
        with pytest.raises(InputError, match=f"'{words}' is not in the target prompt"):
            ledits.edit(inversion, "a red hat", attention=PromptToPrompt(reweight={words: 2.0}), progress=False)
    with pytest.raises(InputError, match="reweight of 'hat' is 11"):
        PromptToPrompt(reweight={"hat": 11.0})
    with pytest.raises(InputError, match="reweight is 'hat'; words and their factors are wanted"):
        PromptToPrompt(reweight="hat")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reweight of 'hat' is 'much'"):
        PromptToPrompt(reweight={"hat": "much"})  # type: ignore[dict-item]


def test_it_is_read_and_written() -> None:
    assert parse_p2p("cross=0.5,reweight=red hat:2,reweight=man:-1") == {
        "cross": 0.5, "reweight": {"red hat": 2.0, "man": -1.0}
    }  # fmt: skip
    for wrong in ("reweight=hat", "reweight=:2", "reweight=hat:x", "reweight=a:1,reweight=a:2"):
        with pytest.raises(Exception, match="reweight=WORD:N|is not a number"):
            parse_p2p(wrong)
    said = parameters_line({
        "concepts": [], "source": "", "target": "", "negative": "", "momentum_scale": 0.0, "model": "x",
        "ledits_min": "0", "prompt_to_prompt": {"cross": 0.5, "self": 0.2, "reweight": {"red hat": 2.0}},
    })  # fmt: skip
    assert "Prompt-to-Prompt cross 0.5, self 0.2, 'red hat' times 2" in said
