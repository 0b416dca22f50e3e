"""Prompt-to-Prompt [2208.01626]: keep a picture's layout by lending its attention maps to the edit.

Two rows go through the network side by side: the source prompt, which follows the inverted picture, and the target
prompt, which is the edit. For the first steps the target's attention maps M* are not its own M but the source's:

    cross-attention   map of word n      the source's for the same word, its own for a new one
    self-attention    the whole map      the source's

In the paper's letters M_t is the source's map, M_t* the target's, tau the last controlled step; the values V stay the
target's own. Only the conditional predictions are controlled, as in the authors' code: for the empty prompt there is
nothing to lend. Combined with DDPM inversion it is the baseline of LEDITS [2307.00522, Table 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.edit import Predict
from ledits_min.errors import InputError, check_number
from ledits_min.guidance import EditSettings, guided_eps, guided_texts
from ledits_min.inversion import InversionSettings, Solver

Words = Sequence[tuple[int, ...]]  # a prompt as the token ids of each of its words


# --- what people hand to LEdits.edit --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptToPrompt:
    """Attention control for `LEdits.edit(..., attention=PromptToPrompt())`        [2208.01626, section 3.2]

    cross   tau_x, 0 .. 1: the source's cross-attention maps act in the first int(cross * (num_steps + 1)) steps
    self    tau_a, 0 .. 1: its self-attention maps act in the first int(self * num_steps), where a map has at most a
            quarter of the latents' height and width: the 16 x 16 tokens that the authors' code allows at 64 x 64

    Executed steps are counted, but num_steps holds the skipped ones too: with 36 of 100 skipped, 0.6 covers 60 of the
    64 that are executed. Prompts with equally many words are edited by word swap ("replace"), all others by prompt
    refinement ("refine"). The inversion must have been made with a source prompt, and the edit needs a target. The
    defaults are those of LEDITS, Table 1. `reweight` names words of the target, and what their cross-attention is
    multiplied by while maps are lent, -10 .. 10. InputError for a value out of range.
    """

    cross: float = 0.6
    self: float = 0.2
    reweight: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("attention: cross", self.cross, 0.0, 1.0)
        check_number("attention: self", self.self, 0.0, 1.0)
        if not isinstance(self.reweight, Mapping):
            raise InputError(f"attention: reweight is {self.reweight!r}; words and their factors are wanted")
        for word, factor in self.reweight.items():
            check_number(f"attention: reweight of {word!r}", factor, -10.0, 10.0)

    def lending(self, source: Words, target: Words, length: int, num_steps: int, latents: Tensor) -> Lending:
        """What is lent, and for how long, between two prompts of `length` tokens L each, padding included.

        latents (B, C, h, w). Step counts are rounded as in the authors' code.
        """
        height, width = (-(-side // 4) for side in latents.shape[-2:])
        return Lending(
            mapper=token_mapper(source, target, length).to(latents.device),
            cross_steps=int(self.cross * (num_steps + 1)),
            self_steps=int(self.self * num_steps),
            self_tokens=height * width,
        )


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
    lend = torch.zeros(length, length)
    lend[0, 0] = 1.0  # the begin token
    for i, n in zip(word_spans(source), word_spans(target), strict=True):
        same = i.stop - i.start == n.stop - n.start
        lend[i, n] = torch.eye(n.stop - n.start) if same else 1.0 / (n.stop - n.start)
    ends = tail(target, length)
    for k, end in enumerate(tail(source, length)):
        lend[end, ends[min(k, len(ends) - 1)]] = 1.0
    return TokenMapper(lend, torch.zeros(length))


def refine_mapper(source: Words, target: Words, length: int) -> TokenMapper:
    """Prompt refinement: words that both prompts have lend, new ones keep their own attention."""
    lend = torch.zeros(length, length)
    lend[0, 0] = 1.0  # the begin token
    source_spans, target_spans = word_spans(source), word_spans(target)
    for i, n in align(source, target):
        lend[source_spans[i], target_spans[n]] = torch.eye(len(target[n]))
    source_tail, target_tail = tail(source, length), tail(target, length)
    shared = min(len(source_tail), len(target_tail))  # the end and padding tokens that both prompts have
    for source_end, target_end in zip(source_tail[:shared], target_tail[:shared], strict=True):
        lend[source_end, target_end] = 1.0
    return TokenMapper(lend, 1.0 - lend.sum(dim=0))


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


@dataclass(frozen=True)
class Lending:
    """What one edit lends: cross-attention maps in the first `cross_steps` executed steps, through `mapper`, and
    self-attention maps of at most `self_tokens` tokens in the first `self_steps`.
    """

    mapper: TokenMapper
    cross_steps: int
    self_steps: int
    self_tokens: int

    def lends(self, step: int, settings: EditSettings) -> bool:
        """Whether anything is lent at this step, to a target that is asked about at some step."""
        asked = settings.guidance_scale != 0.0 or any(
            term.pulls and term.text == settings.target for term in settings.terms
        )
        return step < max(self.cross_steps, self.self_steps) and asked

    def control(self, step: int, source: Tensor, target: Tensor) -> AttentionControl:
        """What controls the attention of a step in which the rows `source` lend to the rows `target`."""
        mapper = self.mapper if step < self.cross_steps else None
        return AttentionControl(source, target, mapper, self.self_tokens * (step < self.self_steps))


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
) -> Predict:
    """Prompt-to-Prompt as the hook of `edit.edit` [2208.01626, Algorithm 1]: the target's prediction under lent maps.

    Both rows start from x_T and step with the same residuals. The source's is only computed while its maps are wanted.
    """
    solver = Solver(inversion)
    pairs = torch.arange(2 * len(x_T), device=x_T.device).chunk(2)
    x_source = x_T

    def predict(step: int, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        nonlocal x_source
        if not lending.lends(step, settings):
            return {}
        # DM(z_t, P) and DM(z_t*, P*) with M <- Edit(M_t, M_t*, t): both prompts at once; then step the source's row.
        both = [contexts[inversion.source], contexts[settings.target]]
        together = eps_model(torch.cat([x_source, x_t]), t.repeat(2), both, lending.control(step, *pairs))
        eps_text, eps_target = together.chunk(2)
        eps = {inversion.source: eps_text}
        eps |= {text: eps_model(x_source, t, contexts[text]) for text in source_texts(inversion) if text not in eps}
        x_source = solver.mean(step, x_source, source_eps(eps, inversion)) + residuals[step]
        return {settings.target: eps_target}

    return predict
