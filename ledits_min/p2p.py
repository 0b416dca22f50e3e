"""Prompt-to-Prompt [2208.01626]: keep a picture's layout by lending its attention maps to the edit.

Two rows go through the network side by side: the source prompt, which follows the inverted picture, and the target
prompt, which is the edit. For the first steps the target's attention maps M* are not its own M but the source's:

    cross-attention   map of word n      the source's for the same word, its own for a new one
    self-attention    the whole map      the source's

In the paper's letters M_t is the source's map, M_t* the target's, tau the last controlled step; the values V stay the
target's own. Only the conditional predictions are controlled, as in the authors' code: for the empty prompt there is
nothing to lend. Combined with DDPM inversion it is the baseline of LEDITS [2307.00522, Table 1].

Where the edit is to stay local, the source's row goes along to the end, and its latents take the place of the target's
wherever neither prompt attends to some words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.edit import Hooks
from ledits_min.guidance import EditSettings, guided_eps, guided_texts
from ledits_min.inversion import InversionSettings, Solver

Words = Sequence[tuple[int, ...]]  # a prompt as the token ids of each of its words


# --- which token lends to which -------------------------------------------------------------------------------------


class TokenMapper(NamedTuple):
    """What `mix_maps` needs: lend float32 (L, L), own float32 (L,).

    lend[i, n]   the share of source token i's attention that target token n receives
    own[n]       the share of its own attention that target token n keeps
    """

    lend: Tensor
    own: Tensor

    def to(self, device: torch.device) -> TokenMapper:
        return TokenMapper(self.lend.to(device), self.own.to(device))

    def reweighted(self, factors: Tensor) -> TokenMapper:
        """M*[.., n] becomes factors[n] M*[.., n], factors (L,)        [2208.01626, attention re-weighting]"""
        return TokenMapper(self.lend * factors, self.own * factors)


def token_mapper(source: Words, target: Words, length: int) -> TokenMapper:
    """Replace where the prompts have equally many words, refine where they have not        [2208.01626, section 3.2]

    Every prompt is a begin token, its words' tokens, an end token and padding. From the end token on, the k-th token
    lends to the k-th in both mappers; the authors' code pairs padding by position, which lends a word of a longer
    source to the padding of a shorter target.
    """
    make = replace_mapper if len(source) == len(target) else refine_mapper
    return make(source, target, length)


def replace_mapper(source: Words, target: Words, length: int) -> TokenMapper:
    """Word swap: word i lends to word i; between words of different token counts attention is shared out evenly.

    Rows of `lend` sum to 1, so that a replaced map stays a distribution: no attention is lost.
    """
    lend = lent_tokens(source, target, [(n, n) for n in range(len(source))], length)
    lend[lend.sum(dim=1) == 0.0, -1] = 1.0  # the padding that the target has no room for
    return TokenMapper(lend, torch.zeros(length))


def refine_mapper(source: Words, target: Words, length: int) -> TokenMapper:
    """Prompt refinement: words that both prompts have lend, new ones keep their own attention."""
    lend = lent_tokens(source, target, align(source, target), length)
    return TokenMapper(lend, 1.0 - lend.sum(dim=0))


def lent_tokens(source: Words, target: Words, pairs: Sequence[tuple[int, int]], length: int) -> Tensor:
    """`TokenMapper.lend` of the begin token, of pairs of words, and of the end and padding that both prompts have."""
    lend = torch.zeros(length, length)
    lend[0, 0] = 1.0
    source_spans, target_spans = word_spans(source), word_spans(target)
    for i, n in pairs:
        same = len(source[i]) == len(target[n])
        lend[source_spans[i], target_spans[n]] = torch.eye(len(target[n])) if same else 1.0 / len(target[n])
    shared = min(len(tail(source, length)), len(tail(target, length)))
    lend[list(tail(source, length)[:shared]), list(tail(target, length)[:shared])] = 1.0
    return lend


def align(source: Words, target: Words) -> list[tuple[int, int]]:
    """The words that two prompts share, in order: pairs of indices of a longest common subsequence.

    It is the global alignment [Needleman and Wunsch 1970] of the authors' code: match 1, gap 0, mismatch -1, traced
    from the end; of equally long ones the trace prefers to skip a target word, then to skip a source word.
    """
    # longest[i][n]: how many words source[:i] and target[:n] share.
    longest = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, word in enumerate(source):
        for n, other in enumerate(target):
            skipped = max(longest[i][n + 1], longest[i + 1][n])
            longest[i + 1][n + 1] = max(skipped, longest[i][n] + 1) if word == other else skipped
    pairs, i, n = [], len(source), len(target)
    while longest[i][n]:
        if longest[i][n] == longest[i][n - 1]:
            n -= 1
        elif longest[i][n] == longest[i - 1][n]:
            i -= 1
        else:
            i, n = i - 1, n - 1
            pairs.append((i, n))
    return pairs[::-1]


def word_spans(words: Words) -> list[slice]:
    """Where each word's tokens stand; token 0 is the begin token."""
    ends = [1 + sum(len(word) for word in words[: i + 1]) for i in range(len(words))]
    return [slice(end - len(word), end) for word, end in zip(words, ends, strict=True)]


def tail(words: Words, length: int) -> range:
    """Where the end token and the padding behind it stand."""
    return range(1 + sum(len(word) for word in words), length)


# --- what is done to the maps ---------------------------------------------------------------------------------------


def attention_maps(q: Tensor, k: Tensor) -> Tensor:
    """M = softmax(q k^T / sqrt(d)), (B, heads, N, L), in float32 or better whatever the network runs in."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1)


def mix_maps(source: Tensor, target: Tensor, mapper: TokenMapper) -> Tensor:
    """M*[.., n] = sum_i M_source[.., i] lend[i, n] + own[n] M_target[.., n]; maps (.., N, L)."""
    lend, own = mapper.lend.to(source.dtype), mapper.own.to(source.dtype)
    return source @ lend + own * target


@dataclass(frozen=True)
class AttentionControl:
    """The attention of one call of the network: some of its rows lend their maps to others.

    source, target  int64 (P,): the lending and the receiving rows of the batch, pair by pair
    mapper          for the cross-attentions; None leaves them alone
    self_tokens     self-attention maps over at most so many tokens are lent; 0 leaves all alone

    Both methods take q (B, heads, N, d), k and v (B, heads, L, d) and return (B, heads, N, d).
    """

    source: Tensor
    target: Tensor
    mapper: TokenMapper | None
    self_tokens: int

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mapper is None:
            return F.scaled_dot_product_attention(q, k, v)
        source = attention_maps(q[self.source], k[self.source])
        target = attention_maps(q[self.target], k[self.target])
        return self._lent(mix_maps(source, target, self.mapper), q, k, v)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > self.self_tokens:
            return F.scaled_dot_product_attention(q, k, v)
        source = attention_maps(q[self.source], k[self.source])
        return self._lent(source, q, k, v)

    def _lent(self, maps: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention by these maps in the rows that receive, as usual in all others."""
        attended = F.scaled_dot_product_attention(q, k, v)
        return attended.index_copy(0, self.target, maps.to(v.dtype) @ v[self.target])


# --- where the edit stays -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalBlend:
    """Local editing: a change only where some words are attended to        [2208.01626, section 3.2, Algorithm 1]

    alpha = B(M_t[w]) or B(M_t*[w*]),    B(M) = M > threshold max(M)
    x_t* <- alpha x_t* + (1 - alpha) x_t,    behind every step

    words      bool (2, L): w, tokens of the source prompt, and w*, of the target prompt; one of them may be none
    threshold  the paper's k

    M_t and M_t* are summed over the words, averaged over heads, layers and the steps so far. M_t* is the target's own
    map, as in the paper; the authors' code writes the lent one over it. A second-order solver remembers the target's
    own pred_x0, not a blended one: the prediction that it is compared with at the next step is the target's too.
    """

    words: Tensor
    threshold: float

    def mask(self, maps: Tensor, size: torch.Size) -> Tensor:
        """alpha, bool (B, 1, h, w) of `size` (h, w); maps (2, B, h', w') are M_t and M_t*, or any multiple of them.

        As in the authors' code each pixel of a map takes the largest of the 3 x 3 around it, and is grown to a block.
        """
        grown = F.interpolate(F.max_pool2d(maps, 3, stride=1, padding=1), size=tuple(size), mode="nearest")
        return (grown > self.threshold * grown.amax(dim=(-2, -1), keepdim=True)).any(dim=0)[:, None]

    def __call__(self, maps: Tensor, x_source: Tensor, x_t: Tensor) -> Tensor:
        """x_t inside the mask, x_source outside, (B, C, h, w)."""
        return torch.where(self.mask(maps, x_t.shape[-2:]), x_t, x_source)


# --- both in an edit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lending:
    """What one edit lends: cross-attention maps in the first `cross_steps` executed steps, through `mapper`, and
    self-attention maps of at most `self_tokens` tokens in the first `self_steps`; `blend` says where it stays.
    """

    mapper: TokenMapper
    cross_steps: int
    self_steps: int
    self_tokens: int
    blend: LocalBlend | None = None

    def needs_source(self, step: int, settings: EditSettings) -> bool:
        """Whether the source's row goes along at this step: it blends, or lends to a target that is asked about."""
        pulling = [term.text for term in settings.terms if term.pulls]
        asked = settings.guidance_scale != 0.0 or settings.target in pulling
        return self.blend is not None or (asked and step < max(self.cross_steps, self.self_steps))

    def control(self, step: int, source: Tensor, target: Tensor) -> AttentionControl | None:
        """What controls the attention of a step in which the rows `source` lend to the rows `target`, if they do."""
        mapper = self.mapper if step < self.cross_steps else None
        self_tokens = self.self_tokens if step < self.self_steps else 0
        return AttentionControl(source, target, mapper, self_tokens) if mapper or self_tokens else None


# --- the source's way through an edit -------------------------------------------------------------------------------


def source_texts(inversion: InversionSettings) -> tuple[str, ...]:
    """What the source's row is asked about: its prompt, whose maps are lent, and what guides it as it was inverted."""
    guiding = guided_texts("", inversion.source, inversion.source_guidance_scale)
    return tuple(dict.fromkeys([inversion.source, *guiding]))


def source_eps(eps: Mapping[str, Tensor], inversion: InversionSettings) -> Tensor:
    """The prediction that the source's row follows: it retraces the inversion, guided as it was there."""
    return guided_eps(eps, "", inversion.source, inversion.source_guidance_scale)


class ControlledEpsModel(Protocol):
    """An `edit.EpsModel` whose attention can be controlled; given a list of N contexts, the batch is N equal parts."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Any, attention: Any = None, /) -> Tensor: ...


def lend_maps(
    eps_model: ControlledEpsModel,
    contexts: Mapping[str, Any],
    x_T: Tensor,
    residuals: Tensor,
    inversion: InversionSettings,
    settings: EditSettings,
    lending: Lending,
    looked: Sequence[Tensor] = (),
) -> Hooks:
    """Prompt-to-Prompt as hooks of `edit.edit` [2208.01626, Algorithm 1]: the target's prediction under lent maps, and
    its latents blended with the source's.

    Both rows start from x_T and step with the same residuals. The source's is only computed while it is wanted.
    looked  where `eps_model` puts the M_t and M_t* (2, B, h', w') of `LocalBlend` that it sees, step by step
    """
    solver = Solver(inversion)
    pairs = torch.arange(2 * len(x_T), device=x_T.device).chunk(2)
    x_source = x_T

    def predict(step: int, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        nonlocal x_source
        if not lending.needs_source(step, settings):
            return {}
        # DM(z_t, P) and DM(z_t*, P*) with M <- Edit(M_t, M_t*, t): both prompts at once; then step the source's row.
        both = [contexts[inversion.source], contexts[settings.target]]
        together = eps_model(torch.cat([x_source, x_t]), t.repeat(2), both, lending.control(step, *pairs))
        eps_text, eps_target = together.chunk(2)
        eps = {inversion.source: eps_text}
        eps |= {text: eps_model(x_source, t, contexts[text]) for text in source_texts(inversion) if text not in eps}
        x_source = solver.mean(step, x_source, source_eps(eps, inversion)) + residuals[step]
        return {settings.target: eps_target} if settings.target in settings.texts(step) else {}

    def blend(x_t: Tensor) -> Tensor:
        return x_t if lending.blend is None else lending.blend(torch.stack([*looked]).sum(dim=0), x_source, x_t)

    return Hooks(predict, blend=blend)
