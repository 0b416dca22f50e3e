"""Prompt-to-Prompt: what happens to the maps, in which steps, and to the edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ledits_min import Concept, InputError, Inversion, LEdits, PromptToPrompt
from ledits_min import edit as plain
from ledits_min.config import EditDefaults, UNetConfig
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, draw_noise
from ledits_min.p2p import AttentionControl, TokenMapper, attention_maps, lend_maps, mix_maps, refine_mapper
from ledits_min.unet import UNet

TINY = Path(__file__).parents[1] / "weights/tiny"
SAMPLES = sorted((TINY / "samples").glob("*.png"))


def test_maps_are_mixed_by_hand() -> None:
    lend = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    source = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    target = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    mixed = mix_maps(source, target, TokenMapper(lend, torch.tensor([0.0, 1.0, 0.0])))
    torch.testing.assert_close(mixed, torch.tensor([[0.5, 0.6, 0.3]], dtype=torch.float64))


def control(
    mapper: TokenMapper | None, self_tokens: int, source: Sequence[int] = (0, 1), target: Sequence[int] = (2, 3)
) -> AttentionControl:
    """By default of two images: two rows that lend, then two that receive."""
    return AttentionControl(torch.tensor(source), torch.tensor(target), mapper, self_tokens)


def random_qkv(tokens: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two images, hence four rows, of three heads, in float64."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(4, 3, tokens, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(4, 3, length, 8, generator=generator, dtype=torch.float64)
    return q, k, torch.eye(length, dtype=torch.float64).expand(4, 3, -1, -1)  # attention over eye(L) is the map itself


class TestMaps:
    """With eye(L) for values, what attention returns is its map."""

    def test_cross_attention_of_the_target_is_lent_by_the_source(self) -> None:
        q, k, eye = random_qkv(9, 6)
        own = scaled_dot_product_attention(q, k, eye)
        mapper = refine_mapper([(1,), (2,)], [(1,), (7,), (2,)], 6)
        maps = control(mapper, 0).cross_attention(q, k, eye)
        torch.testing.assert_close(maps[:2], own[:2])
        for n, lender in enumerate([0, 1, None, 2, 3, 4]):
            wanted = own[2:, ..., n] if lender is None else own[:2, ..., lender]
            torch.testing.assert_close(maps[2:, ..., n], wanted)

    def test_self_attention_is_the_source_s_where_the_map_is_small(self) -> None:
        q, k, eye = random_qkv(9, 9)
        own = scaled_dot_product_attention(q, k, eye)
        lent = control(None, 9).self_attention(q, k, eye)
        torch.testing.assert_close(lent, torch.cat([own[:2], own[:2]]))
        assert torch.equal(control(None, 8).self_attention(q, k, eye), own)

    def test_nothing_is_changed_where_nothing_is_lent(self) -> None:
        q, k, eye = random_qkv(9, 6)
        assert torch.equal(control(None, 0).cross_attention(q, k, eye), scaled_dot_product_attention(q, k, eye))

    def test_rows_of_no_pair_are_left_alone_wherever_the_pairs_stand(self) -> None:
        """Row 2 lends to row 0, row 1 to row 3; rows 1 and 3 are then left out of the pairs."""
        q, k, eye = random_qkv(9, 9)
        mapper = refine_mapper([(1,), (2,)], [(1,), (7,), (2,)], 9)
        own = scaled_dot_product_attention(q, k, eye)
        both = control(mapper, 9, (2, 1), (0, 3))
        torch.testing.assert_close(both.self_attention(q, k, eye), own[[2, 1, 2, 1]])
        crossed = both.cross_attention(q, k, eye)
        for one, other in ((2, 0), (1, 3)):
            torch.testing.assert_close(crossed[other], mix_maps(own[one], own[other], mapper))
        alone = control(mapper, 9, (2,), (0,))
        for found, wanted in ((alone.self_attention, own[2]), (alone.cross_attention, crossed[0])):
            attended = found(q, k, eye)
            torch.testing.assert_close(attended[0], wanted)
            assert torch.equal(attended[[1, 3]], own[[1, 3]])
            torch.testing.assert_close(attended[2], own[2])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_maps_are_float32(self, dtype: torch.dtype) -> None:
        q, k, _ = (tensor.to(dtype) for tensor in random_qkv(9, 6))
        maps = attention_maps(100.0 * q, 100.0 * k)  # q k^T beyond what float16 can hold
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(4, 3, 9))


# Attention at 8 x 8, 4 x 4 and, the only level at a quarter of the side, 2 x 2.
CONFIG = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16, 16),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    layers_per_block=1,
    num_attention_heads=(2, 2, 2),
    cross_attention_dim=12,
    norm_num_groups=4,
    norm_eps=1e-5,
    use_linear_projection=False,
    sample_size=8,
)
SOURCE, TARGET = [(1,), (2,), (3,)], [(1,), (2,), (9,), (3,)]
TOKENS = 8
TEXTS = ("", "source", "target", "hat")


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(CONFIG).eval().requires_grad_(False).double()
    for name, weight in network.named_parameters():
        if "to_q" in name or "to_v" in name:
            weight.mul_(3.0)  # maps that differ from each other, and matter
    return network


def contexts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {text: torch.randn(1, TOKENS, 12, generator=generator, dtype=torch.float64) for text in TEXTS}


class ByHand:
    """Prompt-to-Prompt written out: every row, head, query and token by itself."""

    def __init__(self, lender: Sequence[int | None], self_tokens: int) -> None:
        self.lender, self.self_tokens = lender, self_tokens
        self.seen: list[tuple[str, int, int]] = []

    @staticmethod
    def weights(query: Tensor, keys: Tensor) -> Tensor:
        scores = torch.exp((query * keys).sum(dim=1) / len(query) ** 0.5)
        return scores / scores.sum()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mix: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        out = torch.zeros_like(q)
        half = len(q) // 2
        for b in range(len(q)):
            for h in range(q.shape[1]):
                for n in range(q.shape[2]):
                    own = self.weights(q[b, h, n], k[b, h])
                    if b >= half:
                        own = mix(self.weights(q[b - half, h, n], k[b - half, h]), own)
                    out[b, h, n] = own @ v[b, h]
        return out

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append(("cross", q.shape[2], k.shape[2]))

        def mix(source: Tensor, target: Tensor) -> Tensor:
            return torch.stack([target[n] if i is None else source[i] for n, i in enumerate(self.lender)])

        return self.attend(q, k, v, mix)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append(("self", q.shape[2], k.shape[2]))
        small = q.shape[2] <= self.self_tokens
        return self.attend(q, k, v, lambda source, target: source if small else target)


class TestInsideTheUNet:
    def test_the_prediction_is_that_of_attention_by_hand(self, unet: UNet) -> None:
        generator = torch.Generator().manual_seed(1)
        x_t = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
        t, table = torch.tensor([440, 440]), contexts()
        context = torch.cat([table["source"], table["target"]])
        lending = PromptToPrompt(1.0, 1.0).lending(SOURCE, TARGET, TOKENS, 1, x_t[:1])
        pair = torch.tensor([0]), torch.tensor([1])

        by_hand = ByHand([0, 1, 2, None, 3, 4, 5, 6], self_tokens=4)
        wanted = unet(x_t, t, context, attention=by_hand)
        found = unet(x_t, t, context, attention=lending.control(0, *pair))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the UNet returns float32
        assert sorted(set(by_hand.seen)) == [
            ("cross", 4, 8), ("cross", 16, 8), ("cross", 64, 8), ("self", 4, 4), ("self", 16, 16), ("self", 64, 64),
        ]  # fmt: skip
        assert len(by_hand.seen) == 2 * (3 + 1 + 6)

        own = unet(x_t, t, context)
        torch.testing.assert_close(found[:1], own[:1], rtol=1e-6, atol=1e-6)
        assert (found[1:] - own[1:]).abs().max() > 1e-3
        for half in (AttentionControl(*pair, lending.mapper, 0), AttentionControl(*pair, None, 4)):
            assert (unet(x_t, t, context, attention=half)[1:] - found[1:]).abs().max() > 1e-4

    def test_control_that_lends_nothing_changes_nothing(self, unet: UNet) -> None:
        x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        t, context = torch.tensor([440, 440]), contexts()["source"].expand(2, -1, -1)
        nothing = control(None, 0, (0,), (1,))
        assert torch.equal(unet(x_t, t, context, attention=nothing), unet(x_t, t, context))


class TestWindows:
    def windows(self, attention: PromptToPrompt, num_steps: int) -> tuple[int, int]:
        """In how many of the steps cross- and self-attention maps are lent."""
        lending = attention.lending(SOURCE, TARGET, TOKENS, num_steps, torch.zeros(1, 4, 8, 8))
        pair = torch.tensor([0]), torch.tensor([1])
        controls = [lending.control(step, *pair) for step in range(num_steps)]
        cross = [control is not None and control.mapper is not None for control in controls]
        own = [control is not None and control.self_tokens > 0 for control in controls]
        assert cross == sorted(cross, reverse=True)
        assert own == sorted(own, reverse=True)
        either = [lending.needs_source(step, EditSettings("target")) for step in range(num_steps)]
        assert either == [c or o for c, o in zip(cross, own, strict=True)]
        return sum(cross), sum(own)

    def test_fractions_of_num_steps(self) -> None:
        """Of all steps, not of the executed ones: 60 and 20 of 100, whatever is skipped."""
        assert self.windows(PromptToPrompt(), 100) == (60, 20)
        assert self.windows(PromptToPrompt(), 50) == (30, 10)
        assert self.windows(PromptToPrompt(), 24) == (15, 4)
        assert self.windows(PromptToPrompt(cross=0.0, self=1.0), 7) == (0, 7)
        assert self.windows(PromptToPrompt(cross=1.0, self=0.0), 7) == (7, 0)

    @pytest.mark.parametrize("num_steps", [24, 25, 33, 50, 100])
    def test_counts_are_rounded_as_in_the_authors_code(self, num_steps: int) -> None:
        """The cross-attention window is a share of a table with num_steps + 1 rows, the self-attention one is not."""
        for tenths in range(11):
            share = tenths / 10
            table = torch.arange(num_steps + 1)[: int(share * (num_steps + 1))]
            wanted = min(len(table), num_steps), int(num_steps * share)
            assert self.windows(PromptToPrompt(share, share), num_steps) == wanted

    @pytest.mark.parametrize(("scale", "asked"), [(9.0, True), (1.0, True), (0.0, False)])
    def test_nothing_is_lent_to_a_target_that_is_not_asked_about(self, scale: float, asked: bool) -> None:
        lending = PromptToPrompt().lending(SOURCE, TARGET, TOKENS, 10, torch.zeros(1, 4, 8, 8))
        assert lending.needs_source(0, EditSettings("target", scale)) is asked

    @pytest.mark.parametrize(
        ("shape", "tokens"), [((64, 64), 256), ((128, 128), 1024), ((16, 16), 16), ((65, 33), 153)]
    )
    def test_self_attention_is_lent_at_a_quarter_of_the_side(self, shape: tuple[int, int], tokens: int) -> None:
        """16 x 16 of SD's 64 x 64; of 65 x 33, halved twice, 17 x 9."""
        lending = PromptToPrompt().lending(SOURCE, TARGET, TOKENS, 10, torch.zeros(1, 4, *shape))
        assert lending.self_tokens == tokens

    @pytest.mark.parametrize("values", [{"cross": 1.1}, {"self": -0.1}, {"cross": float("nan")}, {"self": "0.2"}])
    def test_values_out_of_range_are_refused(self, values: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=f"attention: {next(iter(values))} is"):
            PromptToPrompt(**values)


def run(
    unet: UNet,
    attention: PromptToPrompt | None,
    batch: slice = slice(0, 2),
    concepts: Sequence[Concept] = (),
    same: bool = False,
    calls: list[tuple[int, bool]] | None = None,
    negative: str = "",
) -> tuple[Tensor, Tensor]:
    """(x_0, the edited x_0) of 10 steps, 3 skipped, in float64; `attention` None is `edit.edit` without a hook."""
    generator = torch.Generator().manual_seed(9)
    x_0 = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)[batch]
    inversion = InversionSettings(num_steps=10, skip=3, source="source", source_guidance_scale=3.5)
    noise = draw_noise([0, 1], 7, (4, 8, 8))[:, batch]
    table = contexts()

    def eps_model(
        x_t: Tensor, t: Tensor, context: Tensor | list[Tensor], attention: AttentionControl | None = None
    ) -> Tensor:
        if calls is not None:
            calls.append((len(x_t), attention is not None))
        several = context if isinstance(context, list) else [context]
        told = torch.cat(several).repeat_interleave(len(x_t) // len(several), dim=0)
        return unet(x_t, t, told, attention=attention).double()

    x_T, residuals = plain.invert(eps_model, table, x_0, noise, inversion)
    if calls is not None:
        calls.clear()
    terms = tuple(concept.resolve(EditDefaults()) for concept in concepts)
    settings = EditSettings(*(("source", 3.5) if same else ("target", 9.0)), negative, terms)
    if attention is None:
        return x_0, plain.edit(eps_model, table, x_T, residuals, inversion, settings)
    lending = attention.lending(SOURCE, SOURCE if same else TARGET, TOKENS, inversion.num_steps, x_T)
    hook = lend_maps(eps_model, table, x_T, residuals, inversion, settings, lending)
    return x_0, plain.edit(eps_model, table, x_T, residuals, inversion, settings, hooks=hook)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


HAT = Concept("hat", guidance_scale=3.0, threshold=0.8, warmup_steps=1)


class TestEdit:
    @pytest.mark.parametrize("concepts", [(), (HAT,)])
    def test_without_any_window_it_is_the_pure_ddpm_edit(self, unet: UNet, concepts: tuple[Concept, ...]) -> None:
        assert torch.equal(
            run(unet, PromptToPrompt(0.0, 0.0), concepts=concepts)[1], run(unet, None, concepts=concepts)[1]
        )

    @pytest.mark.parametrize("windows", [(0.6, 0.2), (1.0, 1.0), (0.0, 0.5)])
    def test_equal_prompts_reconstruct(self, unet: UNet, windows: tuple[float, float]) -> None:
        x_0, found = run(unet, PromptToPrompt(*windows), same=True)
        assert largest(found - x_0) < 1e-4

    def test_each_window_changes_the_edit(self, unet: UNet) -> None:
        edits = [run(unet, attention)[1] for attention in (
            None, PromptToPrompt(), PromptToPrompt(self=0.0), PromptToPrompt(cross=0.0), PromptToPrompt(cross=0.3),
        )]  # fmt: skip
        for i, one in enumerate(edits):
            assert all(largest(one - other) > 1e-3 for other in edits[:i])

    def test_a_batch_gives_what_its_pictures_give_alone(self, unet: UNet) -> None:
        together = run(unet, PromptToPrompt())[1]
        for i in range(2):
            alone = run(unet, PromptToPrompt(), batch=slice(i, i + 1))[1]
            assert largest(together[i : i + 1] - alone) < 1e-4

    def test_concepts_and_negative_prompts_go_with_it(self, unet: UNet) -> None:
        edits = [run(unet, PromptToPrompt())[1], run(unet, PromptToPrompt(), concepts=(HAT,))[1]]
        edits.append(run(unet, PromptToPrompt(), negative="hat")[1])
        assert min(largest(a - b) for a, b in [(edits[0], edits[1]), (edits[0], edits[2])]) > 1e-2

    def test_the_source_row_is_predicted_only_while_its_maps_are_wanted(self, unet: UNet) -> None:
        """Pair of rows, source unconditional, target unconditional; then target and unconditional alone."""
        calls: list[tuple[int, bool]] = []
        run(unet, PromptToPrompt(cross=0.2, self=0.4), calls=calls)
        assert calls == [(4, True), (2, False), (2, False)] * 4 + [(2, False)] * 2 * 3


QUICK: dict[str, Any] = {"num_steps": 10, "skip": 3, "progress": False}
PROMPT, CHANGED = "a portrait with long brown hair", "a portrait with long blond hair"


@pytest.fixture(scope="module")
def inversion(ledits: LEdits) -> Inversion:
    return ledits.invert(SAMPLES[:2], source=PROMPT, **QUICK)


class TestPublicInterface:
    def test_without_any_window_it_is_the_edit_without_attention(self, ledits: LEdits, inversion: Inversion) -> None:
        off = ledits.edit(inversion, CHANGED, attention=PromptToPrompt(cross=0.0, self=0.0), progress=False)
        pure = ledits.edit(inversion, CHANGED, progress=False)
        assert largest(off.latents - pure.latents) < 1e-4

    def test_equal_prompts_reconstruct(self, ledits: LEdits, inversion: Inversion) -> None:
        scale = inversion.settings.source_guidance_scale
        found = ledits.edit(inversion, PROMPT, scale, attention=PromptToPrompt(), progress=False)
        assert largest(found.latents - inversion.latents) < 1e-3

    def test_it_changes_the_edit(self, ledits: LEdits, inversion: Inversion) -> None:
        pure = ledits.edit(inversion, CHANGED, progress=False)
        controlled = ledits.edit(inversion, CHANGED, attention=PromptToPrompt(), progress=False)
        assert largest(controlled.latents - pure.latents) > 1e-2

    def test_concepts_leave_masks_and_a_trace(self, ledits: LEdits, inversion: Inversion) -> None:
        result = ledits.edit(
            inversion, CHANGED, concepts=[Concept("sunglasses")], attention=PromptToPrompt(), trace=True, progress=False
        )
        assert result.masks[0].any()
        assert set(result.trace[1]["eps_rms"]) == {"uncond", "target", "sunglasses"}

    @pytest.mark.parametrize(
        ("source", "settings", "says"),
        [
            ("", {"target": CHANGED}, "the source prompt is empty; invert with"),
            (PROMPT, {}, "the target prompt is empty; give"),
            (PROMPT, {"target": " "}, "the target prompt is empty; give"),
            (PROMPT, {"target": "hat", "negative": "hat"}, "target and negative prompt are both 'hat'"),
            (PROMPT, {"target": "hat", "attention": 0.6}, "attention is float; PromptToPrompt"),
        ],
    )
    def test_it_needs_two_prompts(self, ledits: LEdits, source: str, settings: dict[str, Any], says: str) -> None:
        inverted = ledits.invert(SAMPLES[0], source=source, num_steps=1, skip=0, progress=False)
        with pytest.raises(InputError, match=says) as refusal:
            ledits.edit(inverted, **{"attention": PromptToPrompt(), "progress": False, **settings})
        assert "\n" not in str(refusal.value)
