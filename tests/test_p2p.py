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
from ledits_min.config import EditDefaults, ScheduleConfig, UNetConfig
from ledits_min.inversion import draw_noise
from ledits_min.p2p import (
    AttentionControl,
    SourceRow,
    TokenMapper,
    attention_maps,
    edit,
    mix_maps,
    refine_mapper,
)
from ledits_min.schedule import make_schedule
from ledits_min.unet import UNet

TINY = Path(__file__).parents[1] / "weights/tiny"
SAMPLES = sorted((TINY / "samples").glob("*.png"))


def test_maps_are_mixed_by_hand() -> None:
    lend = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    source = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    target = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    mixed = mix_maps(source, target, TokenMapper(lend, torch.tensor([0.0, 1.0, 0.0])))
    torch.testing.assert_close(mixed, torch.tensor([[0.5, 0.6, 0.3]], dtype=torch.float64))


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
        maps = AttentionControl(mapper, 0).cross_attention(q, k, eye)
        torch.testing.assert_close(maps[:2], own[:2])
        for n, lender in enumerate([0, 1, None, 2, 3, 4]):
            wanted = own[2:, ..., n] if lender is None else own[:2, ..., lender]
            torch.testing.assert_close(maps[2:, ..., n], wanted)

    def test_self_attention_is_the_source_s_where_the_map_is_small(self) -> None:
        q, k, eye = random_qkv(9, 9)
        own = scaled_dot_product_attention(q, k, eye)
        lent = AttentionControl(None, 9).self_attention(q, k, eye)
        torch.testing.assert_close(lent, torch.cat([own[:2], own[:2]]))
        assert torch.equal(AttentionControl(None, 8).self_attention(q, k, eye), own)

    def test_nothing_is_changed_where_nothing_is_lent(self) -> None:
        q, k, eye = random_qkv(9, 6)
        assert torch.equal(
            AttentionControl(None, 0).cross_attention(q, k, eye), scaled_dot_product_attention(q, k, eye)
        )

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
        scores = torch.stack([(query * key).sum() / len(key) ** 0.5 for key in keys])
        return torch.exp(scores) / torch.exp(scores).sum()

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
        latents = x_t[:1]

        by_hand = ByHand([0, 1, 2, None, 3, 4, 5, 6], self_tokens=4)
        wanted = unet(x_t, t, context, attention=by_hand)
        control = PromptToPrompt(1.0, 1.0).control(SOURCE, TARGET, TOKENS, 1, latents)(0)
        found = unet(x_t, t, context, attention=control)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the UNet returns float32
        assert sorted(set(by_hand.seen)) == [
            ("cross", 4, 8), ("cross", 16, 8), ("cross", 64, 8), ("self", 4, 4), ("self", 16, 16), ("self", 64, 64),
        ]  # fmt: skip
        assert len(by_hand.seen) == 2 * (3 + 1 + 6)

        own = unet(x_t, t, context)
        torch.testing.assert_close(found[:1], own[:1], rtol=1e-6, atol=1e-6)
        assert (found[1:] - own[1:]).abs().max() > 1e-3
        for half in (AttentionControl(control.mapper, 0), AttentionControl(None, 4)):  # type: ignore[union-attr]
            assert (unet(x_t, t, context, attention=half)[1:] - found[1:]).abs().max() > 1e-4

    def test_control_that_lends_nothing_changes_nothing(self, unet: UNet) -> None:
        x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        t, context = torch.tensor([440, 440]), contexts()["source"].expand(2, -1, -1)
        assert torch.equal(unet(x_t, t, context, attention=AttentionControl(None, 0)), unet(x_t, t, context))


class TestWindows:
    def windows(self, attention: PromptToPrompt, num_steps: int, shape: tuple[int, int] = (8, 8)) -> tuple[int, int]:
        at = attention.control(SOURCE, TARGET, TOKENS, num_steps, torch.zeros(1, 4, *shape))
        controls = [at(step) for step in range(num_steps + 1)]
        cross = [control is not None and control.mapper is not None for control in controls]
        lent = [control is not None and control.self_tokens > 0 for control in controls]
        assert cross == sorted(cross, reverse=True)
        assert lent == sorted(lent, reverse=True)
        return sum(cross), sum(lent)

    def test_fractions_of_num_steps(self) -> None:
        """Of all steps, not of the executed ones: 60 and 20 of 100, whatever is skipped."""
        assert self.windows(PromptToPrompt(), 100) == (60, 20)
        assert self.windows(PromptToPrompt(), 50) == (30, 10)
        assert self.windows(PromptToPrompt(cross=0.29, self=0.58), 100) == (29, 58)
        assert self.windows(PromptToPrompt(cross=0.0, self=1.0), 7) == (0, 7)

    @pytest.mark.parametrize(
        ("shape", "tokens"), [((64, 64), 256), ((128, 128), 1024), ((16, 16), 16), ((65, 33), 153)]
    )
    def test_self_attention_is_lent_at_a_quarter_of_the_side(self, shape: tuple[int, int], tokens: int) -> None:
        """16 x 16 of SD's 64 x 64; of 65 x 33, halved twice, 17 x 9."""
        control = PromptToPrompt().control(SOURCE, TARGET, TOKENS, 10, torch.zeros(1, 4, *shape))(0)
        assert control is not None
        assert control.self_tokens == tokens

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
    """(x_0, the edited x_0) of 10 steps, 3 skipped, in float64; `attention` None is edit.edit."""
    generator = torch.Generator().manual_seed(9)
    x_0 = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)[batch]
    schedule, skip = make_schedule(ScheduleConfig(), 10), 3
    noise = draw_noise([0, 1], 7, (4, 8, 8))[:, batch]
    table = contexts()

    def eps_model(x_t: Tensor, t: Tensor, context: Tensor, attention: AttentionControl | None = None) -> Tensor:
        if calls is not None:
            calls.append((len(x_t), attention is not None))
        return unet(x_t, t, context.expand(len(x_t), -1, -1), attention=attention).double()

    x_t, residuals = plain.invert(eps_model, table, x_0, noise, schedule, skip, 1.0, "source", 3.5)
    if calls is not None:
        calls.clear()
    target, scale = ("source", 3.5) if same else ("target", 9.0)
    terms = [concept.resolve(EditDefaults()) for concept in concepts]
    settings = (
        table, x_t, residuals, schedule, skip, 1.0, target, scale, negative, terms, 0.0, 0.6, lambda step: None,
    )  # fmt: skip
    if attention is None:
        return x_0, plain.edit(eps_model, *settings)
    both = torch.cat([table["source"], table[target]]).repeat_interleave(len(x_t), dim=0)
    control = attention.control(SOURCE, SOURCE if same else TARGET, TOKENS, 10, x_t)
    return x_0, edit(eps_model, *settings, row=SourceRow("source", 3.5, table[""], both, control))


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
def ledits() -> LEdits:
    return LEdits.from_pretrained("tiny", device="cpu", dtype="float32")


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
