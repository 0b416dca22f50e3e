"""Prompt-to-Prompt against diffusers' UNet with attention processors of its own, in float64: the same latents.

The reference keeps four rows in one batch to the end, as the authors' code does, and knows nothing of ledits_min's
mappers: it is told by hand which token lends to which.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from ledits_min import PromptToPrompt
from ledits_min.config import UNetConfig
from ledits_min.edit import edit, invert
from ledits_min.engine.maps import Look, Maps, Recording, cross_attentions, looking_eps_model
from ledits_min.files.configs import config_json
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import ControlledEpsModel, LocalBlend, lend_maps
from ledits_min.unet import UNet

Fill = Callable[[nn.Module, int], nn.Module]
Error = Callable[[Tensor, Tensor], float]

# Attention over 8 x 12, 4 x 6 and 2 x 3 tokens.
UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32, 32),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    layers_per_block=1,
    num_attention_heads=(2, 4, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
    norm_eps=1e-5,
    use_linear_projection=False,
    sample_size=8,
)
TOKENS, SELF_TOKENS = 9, 6
SOURCE_SCALE, TARGET_SCALE = 3.5, 7.0


@dataclass(frozen=True)
class Case:
    """Two prompts as token ids of their words, and for each target token {source token: share}; {} keeps its own."""

    source: tuple[tuple[int, ...], ...]
    target: tuple[tuple[int, ...], ...]
    lenders: tuple[dict[int, float], ...]
    num_steps: int = 20
    skip: int = 7
    eta: float = 1.0
    cross: float = 0.4
    self: float = 0.2
    blend: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # tokens of source and target around which it stays
    threshold: float = 0.97  # the maps of random weights are flat


SWAP = Case(((1,), (2,), (3,)), ((1,), (8,), (3,)), tuple({n: 1.0} for n in range(TOKENS)))
BLENDED = replace(SWAP, num_steps=10, skip=3)
CASES = {
    "swap": SWAP,
    "swap of one token for two": Case(
        ((1,), (2,), (3,)),
        ((1,), (8, 9), (3,)),
        ({0: 1.0}, {1: 1.0}, {2: 0.5}, {2: 0.5}, {3: 1.0}, {4: 1.0}, {5: 1.0}, {6: 1.0}, {7: 1.0, 8: 1.0}),
    ),
    "refinement": Case(
        ((1,), (2,), (3,)),
        ((1,), (8, 9), (2,), (3,)),
        ({0: 1.0}, {1: 1.0}, {}, {}, {2: 1.0}, {3: 1.0}, {4: 1.0}, {5: 1.0}, {6: 1.0}),
    ),
    "words left out": Case(
        ((1,), (2,), (3,)),
        ((1,), (3,)),
        ({0: 1.0}, {1: 1.0}, {3: 1.0}, {4: 1.0}, {5: 1.0}, {6: 1.0}, {7: 1.0}, {8: 1.0}, {}),
    ),
    "cross-attention alone, eta 0.5": Case(SWAP.source, SWAP.target, SWAP.lenders, self=0.0, eta=0.5),
    "self-attention alone": Case(SWAP.source, SWAP.target, SWAP.lenders, cross=0.0, self=0.5),
    "24 steps, of which the counts are rounded": Case(SWAP.source, SWAP.target, SWAP.lenders, num_steps=24, cross=0.6),
    "to the end": Case(SWAP.source, SWAP.target, SWAP.lenders, cross=1.0, self=1.0),
    "blended": replace(BLENDED, blend=((2,), (2,))),
    "blended to the end": replace(BLENDED, blend=((2,), (2, 3)), cross=1.0, self=1.0),
    "blended around a word of the target": replace(BLENDED, blend=((), (1,)), cross=0.2, eta=0.5),
    "blended around a word of the source, and nothing lent": replace(BLENDED, blend=((3,), ()), cross=0.0, self=0.0),
}
MAP = (4, 6)  # of the cross-attentions that a blend looks at: one on the way down and two on the way up


class Processor:
    """Attention over the rows [source uncond, target uncond, source, target], B images each."""

    def __init__(self, reference: "Reference") -> None:
        self.reference = reference

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):  # type: ignore[no-untyped-def]
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (
            attn.head_to_batch_dim(layer(tensor))
            for layer, tensor in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        maps = attn.get_attention_scores(q, k)
        maps = maps.view(len(hidden_states), attn.heads, *maps.shape[1:])
        if len(maps) == 4 * self.reference.batch:
            _, _, source, target = maps.chunk(4)  # views: written in place
            if cross and maps.shape[2] == MAP[0] * MAP[1]:
                self.reference.store.append(torch.stack([source, target]))  # a copy, of what is not written over yet
            if cross and self.reference.step < self.reference.cross_steps:
                own = target.clone()
                for n, lenders in enumerate(self.reference.case.lenders):
                    shares = [share * source[..., i] for i, share in lenders.items()]
                    target[..., n] = sum(shares) if shares else own[..., n]
            if not cross and maps.shape[2] <= SELF_TOKENS and self.reference.step < self.reference.self_steps:
                target.copy_(source)
        out = attn.batch_to_head_dim(torch.bmm(maps.flatten(0, 1), v))
        return attn.to_out[0](out)


class Reference:
    """Inversion and edit with diffusers' UNet and DDIMScheduler; shares no line with ledits_min."""

    def __init__(self, case: Case, unet: UNet2DConditionModel, table: dict[str, Tensor]) -> None:
        self.case, self.unet = case, unet
        self.table = {text: context.double() for text, context in table.items()}
        self.cross_steps, self.self_steps = int(case.cross * (case.num_steps + 1)), int(case.self * case.num_steps)
        self.step, self.batch = 0, 2
        self.store: list[Tensor] = []  # (2, B, heads, N, L), layer by layer and step by step
        self.kept: list[float] = []  # the share of each mask
        unet.set_attn_processor(Processor(self))
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.scheduler.set_timesteps(case.num_steps)
        self.timesteps = [int(t) for t in self.scheduler.timesteps][case.skip :]

    def eps(self, x: Tensor, t: int, texts: list[str]) -> Tensor:
        context = torch.cat([self.table[text] for text in texts for _ in range(self.batch)])
        result: Tensor = self.unet(x, t, encoder_hidden_states=context).sample
        return result

    def mean(self, x: Tensor, t: int, eps: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        result: Tensor = self.scheduler.step(eps, t, x, eta=self.case.eta, variance_noise=zero).prev_sample
        return result

    def run(self, x_0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The last latents of the source's and of the target's row."""
        xs = [self.scheduler.add_noise(x_0, n, torch.full((2,), t)) for t, n in zip(self.timesteps, noise, strict=True)]
        xs.append(x_0)
        rows = torch.cat([xs[0], xs[0]])
        scales = torch.tensor([SOURCE_SCALE, SOURCE_SCALE, TARGET_SCALE, TARGET_SCALE]).view(4, 1, 1, 1)
        for i, t in enumerate(self.timesteps):
            self.step = i
            uncond, text = self.eps(torch.cat([xs[i], xs[i]]), t, ["", "source"]).chunk(2)
            residual = xs[i + 1] - self.mean(xs[i], t, uncond + SOURCE_SCALE * (text - uncond))
            uncond, text = self.eps(torch.cat([rows, rows]), t, ["", "", "source", "target"]).chunk(2)
            rows = self.mean(rows, t, uncond + scales * (text - uncond)) + torch.cat([residual, residual])
            if self.case.blend is not None:
                rows = torch.cat([rows[:2], self.blended(rows[:2], rows[2:], self.case.blend)])
        return rows[:2], rows[2:]

    def blended(self, source: Tensor, target: Tensor, tokens: tuple[tuple[int, ...], ...]) -> Tensor:
        """The authors' formula, written out for one picture after the other."""
        pictures = []
        for b in range(self.batch):
            inside = torch.zeros(1, 1, *source.shape[2:], dtype=torch.bool)
            for row, chosen in enumerate(tokens):
                if chosen:
                    layers = torch.cat([maps[row, b] for maps in self.store])  # all heads of all layers and steps
                    looked = layers[..., list(chosen)].sum(-1).mean(0).view(1, 1, *MAP)
                    grown = interpolate(max_pool2d(looked, (3, 3), (1, 1), padding=(1, 1)), size=source.shape[2:])
                    inside = inside | (grown / grown.max()).gt(self.case.threshold)
            self.kept.append(float(inside.double().mean()))
            pictures.append(source[b : b + 1] + inside.double() * (target[b : b + 1] - source[b : b + 1]))
        return torch.cat(pictures)


def ours(case: Case, unet: UNet, table: dict[str, Tensor], x_0: Tensor, noise: Tensor) -> Tensor:
    def eps_model(x_t: Tensor, t: Tensor, context: Any, attention: Any = None) -> Tensor:
        several = context if isinstance(context, list) else [context]
        told = torch.cat(several).repeat_interleave(len(x_t) // len(several), dim=0)
        return unet(x_t, t, told, attention=attention)  # type: ignore[no-any-return]

    inversion = InversionSettings(
        num_steps=case.num_steps, skip=case.skip, eta=case.eta, source="source", source_guidance_scale=SOURCE_SCALE
    )
    settings = EditSettings("target", TARGET_SCALE)
    x_T, residuals = invert(eps_model, table, x_0, noise, inversion)
    attention = PromptToPrompt(case.cross, case.self)
    lending = attention.lending(case.source, case.target, TOKENS, case.num_steps, x_T)
    model: ControlledEpsModel = eps_model
    maps = Maps()
    if case.blend is not None:
        words = torch.zeros(2, TOKENS, dtype=torch.bool)
        for row, chosen in zip(words, case.blend, strict=True):
            row[list(chosen)] = True
        lending = replace(lending, blend=LocalBlend(words, case.threshold))
        looks = Look("source", of_source=True, blends=True), Look("target", blends=True)
        layers = cross_attentions(UNET, 1, ("down", "up"))
        recording = Recording(settings, dict(zip(looks, words, strict=True)), layers, MAP)
        model = looking_eps_model(eps_model, table, recording, maps)
    hooks = lend_maps(model, table, x_T, residuals, inversion, settings, lending, maps.blend)
    return edit(model, table, x_T, residuals, inversion, settings, hooks=hooks)


@pytest.mark.parametrize("name", CASES)
def test_final_latents(name: str, fill: Fill, error: Error) -> None:
    case = CASES[name]
    theirs = UNet2DConditionModel.from_config(config_json(UNET))
    fill(theirs, 3)
    unet = UNet(UNET)
    unet.load_state_dict(theirs.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(4)
    table = {text: 2.0 * torch.randn(1, TOKENS, 24, generator=generator) for text in ("", "source", "target")}
    x_0 = torch.randn(2, 4, 8, 12, generator=generator)
    noise = torch.randn(case.num_steps - case.skip, 2, 4, 8, 12, generator=generator)

    reference = Reference(case, theirs.double(), table)
    source, wanted = reference.run(x_0.double(), noise.double())
    found = ours(case, unet.eval().requires_grad_(False), table, x_0, noise)
    assert error(source, x_0) <= 1e-6
    assert error(found, wanted) <= 1e-3
    # The comparison would be empty if control moved nothing, or a mask kept everything or nothing.
    without = ours(replace(case, cross=0.0, self=0.0, blend=None), unet, table, x_0, noise)
    assert error(without, wanted) > 1e-2
    assert all(0.05 < share < 0.95 for share in reference.kept)
