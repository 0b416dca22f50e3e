"""LEDITS++'s masks and a user's own, through the public call: both engines, batches, Prompt-to-Prompt, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ledits_min import Concept, InputError, LEdits, PromptToPrompt, Result
from ledits_min.config import MASKS, SD15_UNET, SDXL_UNET, UNetConfig
from ledits_min.engine.maps import Recorder, cross_attentions
from ledits_min.unet import TransformerBlock, UNet
from ledits_min.weights.read.survey import TINY

FAST: dict[str, Any] = {"num_steps": 5, "skip": 1, "progress": False}
BOTH = (Concept("sunglasses", mask="both"), Concept("a red hat", mask="both", threshold=0.8, warmup_steps=2))


def portrait(number: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.open(TINY / "samples" / f"portrait{number}.png").convert("RGB").resize(size)


def apart(one: Result, other: Result) -> float:
    return float((one.latents - other.latents).abs().max())


class TestEngines:
    @pytest.mark.parametrize("mask", ["noise", "attention", "both"])
    @pytest.mark.parametrize("size", [(64, 64), (96, 64)])
    def test_the_fast_one_is_the_plain_one(
        self, ledits: LEdits, plain: LEdits, mask: str, size: tuple[int, int]
    ) -> None:
        concepts = [replace(concept, mask=mask) for concept in BOTH]
        found, wanted = (
            each.invert_and_edit(portrait(1, size), concepts=concepts, size=size, trace=True, **FAST)[1]
            for each in (ledits, plain)
        )
        assert apart(found, wanted) < 1e-4
        for one, other in zip(found.masks, wanted.masks, strict=True):
            assert one.shape == (1, size[1] // 8, size[0] // 8) and (one - other).abs().mean() < 0.02
        for step, again in zip(found.trace, wanted.trace, strict=True):
            assert step["mask_fraction"] == pytest.approx(again["mask_fraction"], abs=0.01)

    def test_with_prompt_to_prompt(self, ledits: LEdits, plain: LEdits) -> None:
        edit: dict[str, Any] = {
            "source": "a man", "target": "a woman", "concepts": [*BOTH, Concept("a woman", mask="attention")],
            "attention": PromptToPrompt(), "guidance_scale": 2.0,
        }  # fmt: skip
        found, wanted = (each.invert_and_edit(portrait(1), **edit, **FAST)[1] for each in (ledits, plain))
        assert apart(found, wanted) < 1e-4

    def test_a_picture_of_a_batch_is_as_alone(self, ledits: LEdits) -> None:
        """Maps of several concepts, pictures and heads that are split in the wrong order mix them."""
        pictures = [portrait(number) for number in (1, 2, 3)]
        _, together = ledits.invert_and_edit(pictures, concepts=BOTH, seed=[0, 1, 2], **FAST)
        for i, picture in enumerate(pictures):
            _, alone = ledits.invert_and_edit(picture, concepts=BOTH, seed=i, **FAST)
            differs = (together.latents[i] - alone.latents[0]).abs() > 1e-3
            assert differs.float().mean() < 0.01, "no more than what ties at a threshold"
            for one, other in zip(together.masks, alone.masks, strict=True):
                assert (one[i] - other[0]).abs().mean() < 0.01

    def test_one_pass_is_two(self, ledits: LEdits) -> None:
        """Where a concept's text guides the source too, its prediction is not shared: its attention is looked at."""
        edit = {"concepts": [Concept("a man", reverse=True, mask="both", warmup_steps=0), *BOTH]}
        inversion, result = ledits.invert_and_edit(portrait(1), source="a man", **edit, **FAST)
        assert apart(ledits.edit(inversion, progress=False, **edit), result) < 1e-4

    @pytest.mark.parametrize("mask", ["noise", "attention", "both"])
    def test_masks_cost_no_evaluation_and_leave_the_network_as_it_was(self, ledits: LEdits, mask: str) -> None:
        _, before = ledits.invert_and_edit(portrait(1), concepts=[Concept("sunglasses")], **FAST)
        usual, kinds = dict(ledits.runner.evaluations), [type(module) for module in ledits.unet.modules()]
        ledits.invert_and_edit(portrait(1), concepts=[Concept("sunglasses", mask=mask)], **FAST)
        assert ledits.runner.evaluations == usual
        assert [type(module) for module in ledits.unet.modules()] == kinds
        _, after = ledits.invert_and_edit(portrait(1), concepts=[Concept("sunglasses")], **FAST)
        assert torch.equal(before.latents, after.latents)

    def test_what_looks_at_attention_changes_no_prediction(self, plain: LEdits) -> None:
        unet, config = plain.unet, plain.unet.config
        x_t = torch.randn(3, 4, 12, 8, generator=torch.Generator().manual_seed(0))
        tokens, t = plain.text.encode(["a red hat"]).tokens.expand(3, -1, -1), torch.tensor([900, 500, 100])
        own = torch.arange(tokens.shape[1])[None].expand(2, -1) < 4
        layers = cross_attentions(config, plain.defaults.attention_level, plain.defaults.attention_places)
        recorder = Recorder(torch.tensor([0, 2]), own, layers)
        with torch.no_grad():
            eps, looked_at = (unet(x_t, t, tokens, None, attention) for attention in (None, recorder))
        torch.testing.assert_close(looked_at, eps, rtol=1e-6, atol=1e-6)
        maps = recorder.maps((6, 4))
        assert maps.dtype == torch.float32 and maps.shape == (2, 6, 4) and maps.std() > 0.0

    @pytest.mark.filterwarnings("ignore:96 x 64 is worked at, but this model knows squares")
    @pytest.mark.parametrize(("num_steps", "skip"), [(6, 0), (50, 18)])
    @pytest.mark.parametrize("solver_order", [1, 2])
    @pytest.mark.parametrize("engine", ["fast", "plain"])
    def test_what_is_not_edited_comes_back(
        self, ledits: LEdits, plain: LEdits, engine: str, solver_order: int, num_steps: int, skip: int
    ) -> None:
        """Of a batch that is no square, whichever masks are cut: concepts have next to no strength."""
        used = {"fast": ledits, "plain": plain}[engine]
        pictures = [portrait(number, (96, 64)) for number in (1, 2)]
        inversion = used.invert(
            pictures, "a portrait", num_steps=num_steps, skip=skip, solver_order=solver_order, size=(96, 64),
            seed=[0, 1], progress=False,
        )  # fmt: skip
        concepts = [Concept("sunglasses", 1e-30, 0.8, 0, mask=mask) for mask in MASKS]
        result = used.edit(
            inversion, "a portrait", 3.5, concepts=concepts, mask_image=np.ones((8, 12)), progress=False
        )  # fmt: skip
        assert all(mask.mean() > 0.01 for mask in result.masks)
        assert (result.latents - inversion.latents).norm() < 1e-5 * inversion.latents.norm()

    def test_the_second_order_is_that_of_the_plain_engine(self, ledits: LEdits, plain: LEdits) -> None:
        edit = {"concepts": BOTH, "solver_order": 2}
        (inverted, found), (_, wanted) = (each.invert_and_edit(portrait(1), **edit, **FAST) for each in (ledits, plain))
        assert apart(found, wanted) < 1e-4
        assert inverted.settings.solver_order == 2
        assert apart(ledits.edit(inverted, concepts=BOTH, progress=False), found) < 1e-4
        _, first = ledits.invert_and_edit(portrait(1), concepts=BOTH, **FAST)
        assert apart(first, found) > 1e-2

    def test_a_compiler_can_follow_it(self) -> None:
        """torch's tracer, without a backend: what looks at attention must not break what it compiles into pieces."""
        with LEdits.from_pretrained("tiny", device="cpu", dtype="float32") as ledits:
            few: dict[str, Any] = {"num_steps": 2, "skip": 0, "progress": False}
            _, plain = ledits.invert_and_edit(portrait(1), concepts=BOTH[:1], **few)
            torch._dynamo.reset()
            ledits.unet.compile(dynamic=False, backend="eager", fullgraph=True)
            ledits.runner.compiled = True
            _, traced = ledits.invert_and_edit(portrait(1), concepts=BOTH[:1], **few)
            torch._dynamo.reset()
        assert apart(plain, traced) < 1e-4


class TestWords:
    def test_the_own_tokens_are_counted_and_the_padding_is_not(self, ledits: LEdits) -> None:
        counted = {text: ledits.text.encode([text]).own for text in ("beard", "a red hat", "")}
        assert counted == {"beard": (1,), "a red hat": (3,), "": (0,)}
        assert ledits.text.encode(["beard"]).tokens.shape[1] == ledits.text.length > 10


class TestLayers:
    """A place is a level and a way, and the layers are those that the network calls there."""

    @pytest.mark.parametrize(
        ("config", "level", "places", "count"),
        [
            (SD15_UNET, 2, ("down", "up"), 5), (SD15_UNET, 2, ("up",), 3), (SD15_UNET, 0, ("down", "up"), 5),
            (SD15_UNET, 3, ("down", "up"), 0), (SDXL_UNET, 2, ("down",), 20), (SDXL_UNET, 2, ("up",), 30),
            (SDXL_UNET, 0, ("down", "up"), 0),
        ],
    )  # fmt: skip
    def test_how_many(self, config: UNetConfig, level: int, places: tuple[str, ...], count: int) -> None:
        assert len(cross_attentions(config, level, places)) == count

    @pytest.mark.parametrize("config", [SD15_UNET, SDXL_UNET])
    def test_in_the_order_of_the_calls(self, config: UNetConfig) -> None:
        """Against the network itself, on the meta device: every block's name says where it is."""
        called: list[str] = []
        with torch.device("meta"), torch.no_grad():
            unet = UNet(config)
            for name, module in unet.named_modules():
                if isinstance(module, TransformerBlock):
                    module.register_forward_pre_hook(lambda _, inputs, name=name: called.append(name))
            added = config.projection_class_embeddings_input_dim
            unet(
                torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.int64),
                torch.zeros(1, 77, config.cross_attention_dim), torch.zeros(1, added) if added else None,
            )  # fmt: skip
        last = len(config.block_out_channels) - 1
        for place, at in (("down", 2), ("up", last - 2)):
            wanted = {n for n, name in enumerate(called) if name.startswith(f"{place}_blocks.{at}.")}
            assert cross_attentions(config, 2, (place,)) == wanted

    def test_a_level_without_text_is_refused(self, ledits: LEdits, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledits, "defaults", replace(ledits.defaults, attention_level=0))
        with pytest.raises(InputError, match="concept 'sunglasses': mask is 'both', and this model attends to no text"):
            ledits.invert_and_edit(portrait(1), concepts=BOTH, **FAST)
        ledits.invert_and_edit(portrait(1), concepts=[Concept("sunglasses", mask="noise")], **FAST)

    def test_a_concept_without_words_is_refused(self, ledits: LEdits) -> None:
        with pytest.raises(InputError, match="the empty concept: mask is 'attention', and it has no words"):
            ledits.invert_and_edit(portrait(1), negative="a man", concepts=[Concept("", mask="attention")], **FAST)


class TestUsersMask:
    def test_nothing_is_pushed_outside_it(self, ledits: LEdits, plain: LEdits) -> None:
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[:32] = 255
        edit: dict[str, Any] = {"concepts": [Concept("sunglasses"), *BOTH], "mask_image": mask}
        found, wanted = (each.invert_and_edit(portrait(1), **edit, **FAST)[1] for each in (ledits, plain))
        assert apart(found, wanted) < 1e-4
        assert all(float(each[0, 9:].max()) == 0.0 and float(each[0, :8].max()) > 0.0 for each in found.masks)

    def test_soft_edges_weigh_and_all_white_is_no_mask_but_for_rounding(self, ledits: LEdits) -> None:
        edit: dict[str, Any] = {"concepts": [Concept("sunglasses", threshold=0.8)]}
        _, free = ledits.invert_and_edit(portrait(1), **edit, **FAST)
        _, white = ledits.invert_and_edit(portrait(1), mask_image=Image.new("L", (640, 640), 255), **edit, **FAST)
        _, grey = ledits.invert_and_edit(portrait(1), mask_image=np.full((40, 40), 0.5), **edit, **FAST)
        weaker = [replace(edit["concepts"][0], weight=0.5)]
        inversion, half = ledits.invert_and_edit(portrait(1), concepts=weaker, **FAST)
        assert apart(free, white) < 1e-4
        assert apart(grey, half) < 2e-3 < apart(grey, white)  # a last bit may move a place in or out of a mask
        assert float((grey.masks[0] - 0.5 * half.masks[0]).abs().mean()) < 0.01

    def test_one_per_picture_and_a_file(self, ledits: LEdits, tmp_path: Path) -> None:
        top, left = np.zeros((64, 64), dtype=bool), np.zeros((64, 64), dtype=bool)
        top[:32], left[:, :32] = True, True
        Image.fromarray(left).save(tmp_path / "left.png")
        pictures, masks = [portrait(1), portrait(2)], [top, tmp_path / "left.png"]
        _, together = ledits.invert_and_edit(pictures, concepts=BOTH, mask_image=masks, seed=[0, 1], **FAST)
        for i in range(2):
            _, alone = ledits.invert_and_edit(pictures[i], concepts=BOTH, mask_image=masks[i], seed=i, **FAST)
            assert (together.latents[i] - alone.latents[0]).abs().max() < 1e-3

    @pytest.mark.parametrize(
        ("mask", "says"),
        [
            (np.zeros((64, 64)), "mask is black"),
            (Image.new("L", (64, 64), 0), "mask is black"),
            (np.ones((64, 32)), "mask is 32 x 64, and its picture 64 x 64, of another shape"),
            (np.full((64, 64), 2.0), "holds values outside 0 .. 1"),
            (np.full((64, 64), np.nan), "holds values outside 0 .. 1"),
            (np.ones((64, 64), dtype=np.int64), r"mask array is int64 \(64, 64\); bool, uint8 or float"),
            (np.ones((0, 64)), r"mask array is \(0, 64\)"),
            (np.ones((1, 64, 64), dtype=np.uint8), "mask: image array is uint8"),
            (Image.new("RGB", (64, 64), "red"), "mask has colours; a grey picture is wanted"),
            (Image.new("RGBA", (64, 64), (255, 255, 255, 9)), "mask is partly transparent"),
            ([np.ones((64, 64))] * 2, "2 masks for 1 pictures"),
            ("nowhere.png", "mask: 'nowhere.png' does not exist"),
            (3, "mask: image is int"),
        ],
    )
    def test_what_is_no_mask_is_refused(
        self, ledits: LEdits, monkeypatch: pytest.MonkeyPatch, mask: Any, says: str
    ) -> None:
        inversion = ledits.invert(portrait(1), num_steps=1, skip=0, progress=False)
        for network in ("encode", "decode", "edit", "invert_and_edit"):  # before any of them runs
            monkeypatch.setattr(ledits.runner, network, pytest.fail)
        with pytest.raises(InputError, match=says):
            ledits.edit(inversion, concepts=BOTH, mask_image=mask, progress=False)
        with pytest.raises(InputError, match=says):
            ledits.invert_and_edit(portrait(1), concepts=BOTH, mask_image=mask, progress=False)
