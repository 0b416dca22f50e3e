"""Prompt-to-Prompt's local blend: the mask by hand, both engines, what stays as it was, words that are not there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ledits_min import Concept, InputError, Inversion, LEdits, PromptToPrompt, Result
from ledits_min.app.outputs import common, parameters_line, planned_settings
from ledits_min.app.values import parse_p2p
from ledits_min.engine.maps import Look, recording
from ledits_min.engine.request import named_tokens
from ledits_min.guidance import EditSettings
from ledits_min.p2p import LocalBlend
from ledits_min.weights.read.survey import TINY

EDIT: dict[str, Any] = {
    "source": "short black hair", "target": "short blond hair", "guidance_scale": 3.0, "num_steps": 6, "skip": 1,
    "progress": False,
}  # fmt: skip
HAIR = PromptToPrompt(blend="hair")
NOWHERE = PromptToPrompt(blend="hair", blend_threshold=1.0)


def portrait(number: int = 2, size: tuple[int, int] = (128, 128)) -> Image.Image:
    return Image.open(TINY / "samples" / f"portrait{number}.png").convert("RGB").resize(size)


def run(ledits: LEdits, attention: PromptToPrompt = HAIR, picture: Any = None, **more: Any) -> tuple[Inversion, Result]:
    return ledits.invert_and_edit(picture or portrait(), attention=attention, **{**EDIT, **more})


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def mask_by_hand(maps: list[list[list[float]]], threshold: float, height: int, width: int) -> list[list[bool]]:
    """Of one picture, pixel by pixel; `maps` are the source's and the target's."""

    def pooled(rows: list[list[float]], i: int, j: int) -> float:
        return max(value for row in rows[max(0, i - 1) : i + 2] for value in row[max(0, j - 1) : j + 2])

    inside = [[False] * width for _ in range(height)]
    for rows in maps:
        largest = max(value for row in rows for value in row)
        for y in range(height):
            for x in range(width):
                i, j = math.floor(y * len(rows) / height), math.floor(x * len(rows[0]) / width)
                inside[y][x] |= largest > 0.0 and pooled(rows, i, j) / largest > threshold
    return inside


class TestMask:
    @pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
    @pytest.mark.parametrize(("small", "size"), [((16, 16), (64, 64)), ((9, 17), (33, 65)), ((1, 3), (2, 5))])
    def test_by_hand(self, small: tuple[int, int], size: tuple[int, int], threshold: float) -> None:
        maps = torch.rand(2, 3, *small, generator=torch.Generator().manual_seed(7)) ** 8
        maps[1, 2] = 0.0  # the words are not in this prompt
        blend = LocalBlend(torch.ones(2, 5, dtype=torch.bool), threshold)
        wanted = [mask_by_hand(maps[:, b].tolist(), threshold, *size) for b in range(3)]
        found = blend.mask(maps, torch.Size(size))
        assert found.shape == (3, 1, *size) and found[:, 0].tolist() == wanted
        assert torch.equal(blend.mask(7.0 * maps, torch.Size(size)), found), "a sum over steps is as good as a mean"
        x_source, x_t = torch.randn(2, 3, 4, *size, generator=torch.Generator().manual_seed(8))
        blended, inside = blend(maps, x_source, x_t), found.expand_as(x_t)
        assert apart(blended, x_source + found.float() * (x_t - x_source)) < 1e-6
        assert torch.equal(blended[~inside], x_source[~inside]) and torch.equal(blended[inside], x_t[inside])

    def test_a_share_of_the_mask_is_neither_all_nor_nothing(self) -> None:
        """Or the comparison above would prove little."""
        maps = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(7)) ** 8
        share = LocalBlend(torch.ones(2, 5), 0.9).mask(maps, torch.Size((64, 64))).float().mean()
        assert 0.05 < share < 0.5


class TestEdit:
    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"solver_order": 2},
            {"picture": portrait(2, (96, 64)), "size": (96, 64)},
            {"attention": PromptToPrompt(cross=0.0, self=0.0, blend=("black", "blond"))},
            {"attention": PromptToPrompt(blend="blond", reweight={"blond": 2.0}), "eta": 0.5},
            {"concepts": [Concept("sunglasses", mask="both"), Concept("short blond hair", mask="attention")]},
            {"guidance_scale": 0.0, "concepts": [Concept("sunglasses")]},
            {"source_guidance_scale": 1.0, "negative": "beard"},
        ],
    )
    def test_the_fast_engine_is_the_plain_one(self, ledits: LEdits, plain: LEdits, more: dict[str, Any]) -> None:
        (_, found), (_, wanted) = (run(ledits, trace=True, **more) for ledits in (ledits, plain))
        assert apart(found.latents, wanted.latents) < 1e-4
        assert ledits.runner.evaluations == plain.runner.evaluations
        for step, again in zip(found.trace, wanted.trace, strict=True):
            assert {*step["eps_rms"]} == {*again["eps_rms"]}
            assert step["x_rms"] == pytest.approx(again["x_rms"], abs=1e-4)

    @pytest.mark.parametrize("order", [1, 2])
    def test_what_is_outside_to_the_end_is_the_picture_itself(
        self, ledits: LEdits, order: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        masks: list[Tensor] = []
        mask = LocalBlend.mask

        def noted(*arguments: Any) -> Tensor:
            masks.append(mask(*arguments))
            return masks[-1]

        monkeypatch.setattr(LocalBlend, "mask", noted)
        inversion, result = run(ledits, solver_order=order)
        _, free = run(ledits, PromptToPrompt(), solver_order=order)
        assert len(masks) == 5
        outside = ~masks[-1].expand_as(result.latents)
        assert 0.2 < outside.float().mean() < 0.8
        assert apart(result.latents[outside], inversion.latents[outside]) < 1e-5
        assert apart(free.latents[outside], inversion.latents[outside]) > 0.1
        assert apart(result.latents[~outside], inversion.latents[~outside]) > 0.1

    @pytest.mark.parametrize("order", [1, 2])
    def test_where_no_place_is_looked_at_enough_the_picture_comes_back(
        self, ledits: LEdits, plain: LEdits, order: int
    ) -> None:
        for engine in (ledits, plain):
            inversion, result = run(engine, NOWHERE, solver_order=order)
            assert apart(result.latents, inversion.latents) < 3e-5

    def test_a_mask_of_everything_changes_nothing(self, ledits: LEdits) -> None:
        everywhere = run(ledits, PromptToPrompt(blend="hair", blend_threshold=0.0))[1]
        assert apart(everywhere.latents, run(ledits, PromptToPrompt())[1].latents) < 1e-4

    def test_a_picture_of_a_batch_is_as_alone(self, ledits: LEdits) -> None:
        pictures = [portrait(number) for number in (1, 2, 4)]
        together = run(ledits, picture=pictures, seed=[0, 1, 2])[1]
        for i, picture in enumerate(pictures):
            assert apart(together.latents[i], run(ledits, picture=picture, seed=i)[1].latents[0]) < 1e-3

    def test_a_saved_inversion_gives_the_same(self, ledits: LEdits, tmp_path: Path) -> None:
        inversion, result = run(ledits)
        inversion.save(tmp_path / "x.safetensors")
        again = ledits.edit(
            Inversion.load(tmp_path / "x.safetensors"), EDIT["target"], EDIT["guidance_scale"], attention=HAIR,
            progress=False,
        )  # fmt: skip
        assert torch.equal(again.latents, result.latents)

    def test_bfloat16(self) -> None:
        with LEdits.from_pretrained("tiny", device="cpu", dtype="bfloat16") as ledits:
            ledits.vae.float()  # coding would take most of the time
            inversion, result = run(ledits, NOWHERE, portrait(2, (64, 64)), size=64, num_steps=2, skip=0)
        assert apart(result.latents, inversion.latents) < 0.1

    def test_the_threshold_is_the_checkpoint_s_own(self, ledits: LEdits) -> None:
        assert ledits.defaults.blend_threshold == 0.6
        assert HAIR.resolve(ledits.defaults) == PromptToPrompt(blend="hair", blend_threshold=0.6)
        assert PromptToPrompt().resolve(ledits.defaults) == PromptToPrompt()
        said = run(ledits, HAIR.resolve(ledits.defaults))[1]
        assert torch.equal(run(ledits)[1].latents, said.latents)


class TestWords:
    def test_they_stand_where_the_prompts_have_them(self, ledits: LEdits) -> None:
        attention = PromptToPrompt(blend=("hair", "red hat"), reweight={"hat": 3.0})
        factors, blended = named_tokens(attention, ledits.text.words, "brown hair", "a red hat, brown hair", 9)
        assert blended.nonzero().tolist() == [[0, 2], [1, 2], [1, 3], [1, 5]]
        assert factors.tolist() == [1, 1, 1, 3, 1, 1, 1, 1, 1]

    def test_what_is_recorded_of_which_row(self, ledits: LEdits) -> None:
        """A row's words for a mask, and the same row's words for a blend, are two things."""
        settings = EditSettings("a hat", concepts=(Concept("a hat", mask="attention").resolve(ledits.defaults),))
        contexts = {"a hat": ledits.text.encode(["a hat"])}
        latents, length = torch.zeros(1, 4, 16, 12), ledits.text.length
        inversion = replace(ledits.inversion_settings("hair", num_steps=5, skip=0))
        attention = PromptToPrompt(blend=("hair", "hat"))
        lending = ledits.lending(attention, inversion, settings, latents)
        found = recording(ledits.unet.config, settings, contexts, latents, "hair", lending)
        assert found is not None and found.size == (4, 3)
        places = {look: tokens.nonzero().flatten().tolist() for look, tokens in found.tokens.items()}
        assert places == {
            Look("a hat"): [1, 2], Look("hair", of_source=True, blends=True): [1], Look("a hat", blends=True): [2]
        }  # fmt: skip
        assert all(len(tokens) == length for tokens in found.tokens.values())
        assert found.looks(0, "a hat", False) == [Look("a hat", blends=True)], "the concept still warms up"
        assert len(found.looks(1, "a hat", False)) == 2 and not found.looks(1, "hair", False)

    @pytest.mark.parametrize("words", ["beard", "hair short", ("hair", "beard")])
    def test_those_that_are_in_neither_prompt_are_refused(self, ledits: LEdits, words: Any) -> None:
        wrong = words if isinstance(words, str) else words[-1]
        says = f"'{wrong}', which is neither in the source prompt 'short black hair' nor in the target prompt 'short b"
        before = dict(ledits.runner.evaluations)
        with pytest.raises(InputError, match=says):
            run(ledits, PromptToPrompt(blend=words))
        assert ledits.runner.evaluations == before, "before anything is evaluated"

    def test_a_word_that_was_cut_off_is_refused_with_the_reason(self, ledits: LEdits) -> None:
        words, length = ledits.text.words, ledits.text.length
        long = " ".join(["hair"] * (length - 2)) + " beard"
        for attention in (PromptToPrompt(blend="beard"), PromptToPrompt(reweight={"beard": 2.0})):
            with pytest.raises(InputError, match=f"name words that are, among the {length - 2} tokens that the model"):
                named_tokens(attention, words, "hair", long, length)

    @pytest.mark.parametrize("words", ["", " ", ("hat", ""), 3, None, {"hat": 1.0}, ("hat", 2)])
    def test_what_is_no_word_is_refused(self, words: Any) -> None:
        with pytest.raises(InputError, match="attention: blend is .*; words of the source or the target are wanted"):
            PromptToPrompt(blend=words)
        with pytest.raises(InputError, match="blend_threshold is 1.1"):
            PromptToPrompt(blend="hat", blend_threshold=1.1)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"blend_threshold": 0.5}, "blend_threshold is 0.5 and has no effect without blend"),
            ({"blend": "\ud800"}, "a word to blend around is '.ud800', which holds half a character"),
            ({"reweight": {"\ud800": 2.0}}, "a word to reweight is '.ud800', which holds half a character"),
            ({"reweight": {5: 2.0}}, "a word to reweight is int; a string is wanted"),
            ({"reweight": {None: 2.0}}, "a word to reweight is NoneType; a string is wanted"),
            ({"reweight": torch.ones(30, 4)}, "reweight is tensor.*; words and their factors are wanted"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_in_one_line(self, given: dict[str, Any], says: str) -> None:
        with pytest.raises(InputError, match=says) as refusal:
            PromptToPrompt(**given)
        assert "\n" not in str(refusal.value)

    def test_a_reweight_that_never_acts_is_said(self, ledits: LEdits) -> None:
        with pytest.warns(UserWarning, match="reweight acts while cross-attention is lent"):
            run(ledits, PromptToPrompt(cross=0.0, reweight={"hair": 2.0}), num_steps=1, skip=0)

    def test_where_maps_are_read_is_written_where_it_decides_pixels(self, ledits: LEdits) -> None:
        """ledits.json may change, and is no part of the fingerprint."""
        inversion = ledits.inversion_settings("hair")
        read = {"attention_level": 1, "attention_places": ["up"]}
        for concepts, attention, wanted in (
            ([], HAIR, read),
            ([], PromptToPrompt(), {}),
            ([Concept("hat", mask="both")], None, read),
            ([Concept("hat", mask="noise")], None, {}),
        ):
            values = planned_settings(ledits, inversion, (128, 128), concepts, attention, {})
            assert {name: value for name, value in values.items() if name.startswith("attention_")} == wanted
            plain = [Concept("hat", mask="noise")] * len(concepts)
            other = planned_settings(ledits, inversion, (128, 128), plain, None, {})
            assert "attention_level" not in common([values, other])

    def test_a_level_without_text_is_refused(self, ledits: LEdits, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledits, "defaults", replace(ledits.defaults, attention_level=0))
        with pytest.raises(InputError, match="blend is by attention, and this model attends to no text at level 0"):
            run(ledits)
        run(ledits, PromptToPrompt())

    def test_they_are_read_and_written(self) -> None:
        fields = parse_p2p("blend=red hat,cross=0.5,blend=hair,blend_threshold=0.4")
        assert fields == {"blend": ("red hat", "hair"), "cross": 0.5, "blend_threshold": 0.4}
        for wrong in ("blend", "blend=", "blend=hat,blend=hat", "blend_threshold=much"):
            with pytest.raises(Exception, match="blend=WORD, each word once|is not a number"):
                parse_p2p(wrong)
        said = parameters_line({
            "concepts": [], "source": "", "target": "", "negative": "", "momentum_scale": 0.0, "model": "x",
            "ledits_min": "0",
            "prompt_to_prompt": {"cross": 0.5, "self": 0.2, "blend": ["red hat", "hair"], "blend_threshold": 0.6},
        })  # fmt: skip
        assert "self 0.2, only around 'red hat', 'hair' above 0.6" in said
