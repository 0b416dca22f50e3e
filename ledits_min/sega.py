"""Semantic guidance, SEGA [2301.12247]: a concept's direction, where it acts, when it acts, and its momentum.

Pure functions over predicted noise. The paper's lambda is `threshold`, s_e `guidance_scale` (in psi, not in its mask),
g_i `weight`, s_m `momentum_scale`, beta_m `momentum_beta`, delta `warmup_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.config import MASKS, EditDefaults
from ledits_min.errors import InputError, check_choice, check_number, check_whole, short


@dataclass(frozen=True)
class Concept:
    """One direction of an edit: what to add (or, with `reverse`, to remove), how strongly, where and when.

    text            the concept in words; that of eps_uncond ("", or the negative prompt) is a no-op
    guidance_scale  strength s_e, 0 .. 1000
    threshold       lambda, 0 .. 1: the share of each map that is left alone; 0.95 edits the strongest 5 %
    warmup_steps    the first executed step in which it acts
    cooldown_steps  the first executed step in which it acts no more; None: it acts to the end
    weight          multiplies guidance_scale, 0 .. 1000
    reverse         move away from the concept
    mask            where it acts: "percentile", SEGA's, one map per channel; "noise", "attention" or "both", LEDITS++'s
                    [2311.16711]: where its direction is large, where its words are attended to, where both hold

    None in guidance_scale, threshold, warmup_steps or mask means the checkpoint's default, else LEDITS Table 1: 7,
    0.95, 1, "percentile". InputError for a value out of range.
    """

    text: str
    guidance_scale: float | None = None
    threshold: float | None = None
    warmup_steps: int | None = None
    cooldown_steps: int | None = None
    weight: float = 1.0
    reverse: bool = False
    mask: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"concept: its text is {short(self.text)}; a string is wanted")
        name = f"concept {self.text[:40]!r}"
        check_number(f"{name}: guidance_scale", self.guidance_scale, 0.0, 1000.0, optional=True)
        check_number(f"{name}: threshold", self.threshold, 0.0, 1.0, optional=True)
        check_number(f"{name}: weight", self.weight, 0.0, 1000.0)
        check_whole(f"{name}: warmup_steps", self.warmup_steps, 0, 100_000, optional=True)
        check_whole(f"{name}: cooldown_steps", self.cooldown_steps, 0, 100_000, optional=True)
        if not isinstance(self.reverse, bool):
            raise InputError(f"{name}: reverse is {short(self.reverse)}; True or False is wanted")
        if self.mask is not None:
            check_choice(f"{name}: mask", self.mask, MASKS)

    def resolve(self, defaults: EditDefaults) -> ConceptTerm:
        """The same concept with every None replaced by its default."""
        return ConceptTerm(
            self.text,
            defaults.concept_guidance_scale if self.guidance_scale is None else self.guidance_scale,
            defaults.threshold if self.threshold is None else self.threshold,
            defaults.warmup_steps if self.warmup_steps is None else self.warmup_steps,
            self.cooldown_steps,
            self.weight,
            self.reverse,
            defaults.mask if self.mask is None else self.mask,
        )


@dataclass(frozen=True)
class ConceptTerm:
    """A `Concept` whose numbers are all known: one term of the sum that SEGA adds to the prediction.

    Steps are counted from the first executed one.
    """

    text: str
    guidance_scale: float
    threshold: float
    warmup_steps: int
    cooldown_steps: int | None
    weight: float
    reverse: bool
    mask: str = "percentile"

    @property
    def attends(self) -> bool:
        """Whether its mask needs the attention maps of its words."""
        return self.mask in ("attention", "both")

    @property
    def pulls(self) -> bool:
        """Whether it adds anything when it acts; with scale or weight 0 only its warm-up counts."""
        return self.guidance_scale > 0.0 and self.weight > 0.0

    def is_warm(self, step: int) -> bool:
        return step >= self.warmup_steps

    def is_cooled_down(self, step: int) -> bool:
        return self.cooldown_steps is not None and step >= self.cooldown_steps

    def acts(self, step: int) -> bool:
        return self.pulls and self.is_warm(step) and not self.is_cooled_down(step)

    def matters(self, step: int, momentum_scale: float) -> bool:
        """Whether its prediction changes anything at this step: when it acts, or while it warms the momentum up."""
        return self.pulls and not self.is_cooled_down(step) and (self.is_warm(step) or momentum_scale > 0.0)


def edit_direction(eps_concept: Tensor, eps_uncond: Tensor, term: ConceptTerm) -> Tensor:
    """psi = d s_e (eps_concept - eps_uncond),  d = -1 to remove, +1 to add        [2301.12247, section 3]"""
    direction = -1.0 if term.reverse else 1.0
    return direction * term.guidance_scale * (eps_concept - eps_uncond)


def percentile_mask(psi: Tensor, threshold: float, inside: Tensor | None = None) -> Tensor:
    """mask = |psi| >= quantile(|psi|, threshold), per sample and per channel        [2301.12247, section 3]

    psi float32 or float64 (B, C, h, w); returns bool (B, C, h, w). The quantile interpolates linearly between order
    statistics, as torch.quantile does. threshold 0 keeps everything; on a constant map everything ties, and is kept.
    With `inside`, bool, only its positions count.
    """
    magnitude = psi.abs()
    if inside is None:
        return magnitude >= torch.quantile(magnitude.flatten(2), threshold, dim=-1)[..., None, None]
    cut = torch.nanquantile(magnitude.where(inside, math.nan).flatten(2), threshold, dim=-1)
    return inside & (magnitude >= cut[..., None, None])


def attention_mask(attention: Tensor, threshold: float, size: torch.Size, inside: Tensor | None = None) -> Tensor:
    """Where a concept's words are attended to        [2311.16711, M1]

    attention (B, h', w'); returns bool (B, 1, h, w), every pixel of the map grown to a block of `size` (h, w).
    Smoothed before the cut: 3 x 3, the weights proportional to exp(-(dx^2 + dy^2)), as sums: a convolution may round.
    """
    few = min(attention.shape[-2:]) < 2
    padded = F.pad(attention[:, None], (1, 1, 1, 1), mode="replicate" if few else "reflect")
    rows = padded[..., 1:-1, :] + math.exp(-1.0) * (padded[..., :-2, :] + padded[..., 2:, :])
    smooth = (rows[..., 1:-1] + math.exp(-1.0) * (rows[..., :-2] + rows[..., 2:])) / (1.0 + 2.0 * math.exp(-1.0)) ** 2
    inside = None if inside is None else F.adaptive_max_pool2d(inside.to(smooth), smooth.shape[-2:]) > 0.0
    mask = percentile_mask(smooth, threshold, inside).to(smooth)
    return F.interpolate(mask, size=tuple(size), mode="nearest") > 0.0


@dataclass(frozen=True)
class Where:
    """What masks are made of besides psi: `maps` (B, h', w') by a concept's text, how much its words are attended to;
    `region` (B or 1, 1, h, w) in [0, 1], the share of every concept that is wanted at a place, None: all of it."""

    maps: Mapping[str, Tensor] = field(default_factory=dict)
    region: Tensor | None = None


def concept_mask(psi: Tensor, term: ConceptTerm, where: Where) -> Tensor:
    """Where a concept acts, bool (B, C, h, w); thresholds are taken inside the region.

    "noise" is one map per picture, sum over channels of |psi|        [2311.16711, M2]
    """
    inside = None if where.region is None else where.region > 0.0
    if term.mask == "percentile":
        return percentile_mask(psi, term.threshold, inside)
    magnitude = psi.abs().sum(dim=1, keepdim=True)
    masks = [] if term.mask == "attention" else [percentile_mask(magnitude, term.threshold, inside)]
    if term.attends:
        mask = attention_mask(where.maps[term.text], term.threshold, psi.shape[-2:], inside)
        masks.append(mask if inside is None else mask & inside)
    return (masks[0] & masks[-1]).expand_as(psi)


@dataclass(frozen=True)
class Guidance:
    """What SEGA adds at one step.

    gamma     (B, C, h, w)  the guidance term gamma_t
    momentum  (B, C, h, w)  nu for the next step
    masks     one bool (B, C, h, w) per concept, None for a concept that did not act
    """

    gamma: Tensor
    momentum: Tensor
    masks: list[Tensor | None]


def semantic_guidance(
    eps_uncond: Tensor,
    eps_concepts: Sequence[Tensor | None],
    terms: Sequence[ConceptTerm],
    step: int,
    momentum: Tensor,
    momentum_scale: float,
    momentum_beta: float,
    where: Where,
) -> Guidance:
    """The guidance term of one step and the momentum it leaves behind.

    raw_t    = sum over concepts not cooled down of  g_i region mask_i psi_i     those in warm-up only with momentum
    full_t   = raw_t + momentum_scale nu
    nu      <- momentum_beta nu + (1 - momentum_beta) full_t               also during warm-up
    gamma_t  = full_t                                                      once every concept is past its warm-up
             = sum over the acting concepts of  g_i region mask_i psi_i    before that

    [2301.12247, section 3]; region is 1 where there is none. The weights g_i are never renormalised: an early concept
    keeps its strength when a later one joins. `eps_concepts` holds None where `ConceptTerm.matters` is false; also a
    concept with scale or weight 0 holds the momentum back as it warms up, or the result would jump at strength 0.
    """
    raw = torch.zeros_like(eps_uncond)
    acting = torch.zeros_like(eps_uncond)
    masks: list[Tensor | None] = []
    for eps_concept, term in zip(eps_concepts, terms, strict=True):
        if eps_concept is None:
            masks.append(None)
            continue
        psi = edit_direction(eps_concept, eps_uncond, term)
        mask = concept_mask(psi, term, where)
        contribution = term.weight * (1.0 if where.region is None else where.region) * psi * mask
        raw = raw + contribution
        acting = acting + contribution if term.acts(step) else acting
        masks.append(mask if term.acts(step) else None)
    full = raw + momentum_scale * momentum
    gamma = full if all(term.is_warm(step) for term in terms) else acting
    return Guidance(gamma, momentum_beta * momentum + (1.0 - momentum_beta) * full, masks)
