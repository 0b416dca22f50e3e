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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.edit import Step, levels
from ledits_min.errors import InputError, check_number
from ledits_min.guidance import edited_eps, guided_eps, guided_texts, step_texts
from ledits_min.inversion import posterior_mean
from ledits_min.schedule import Schedule
from ledits_min.sega import ConceptTerm

Words = Sequence[tuple[int, ...]]  # a prompt as the token ids of each of its words


# --- what people hand to LEdits.edit --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptToPrompt:
    """Attention control for `LEdits.edit(..., attention=PromptToPrompt())`        [2208.01626, section 3.2]

    cross   tau_x, 0 .. 1: the source's cross-attention maps act in the first cross * num_steps executed steps
    self    tau_a, 0 .. 1: likewise its self-attention maps, where a map has at most a quarter of the latents' height
            and width: the 16 x 16 tokens that the authors' code allows at Stable Diffusion's 64 x 64 latents

    Steps count from the first executed one (after skip); a fraction of a step is rounded. Prompts with equally many
    words are edited by word swap ("replace"), all others by prompt refinement ("refine"). The inversion must have been
    made with a source prompt, and the edit needs a target. The defaults are those of LEDITS, Table 1.
    InputError for a value out of range.
    """

    cross: float = 0.6
    self: float = 0.2

    def __post_init__(self) -> None:
        check_number("attention: cross", self.cross, 0.0, 1.0)
        check_number("attention: self", self.self, 0.0, 1.0)

    def control(
        self, source: Words, target: Words, length: int, num_steps: int, latents: Tensor
    ) -> Callable[[int], AttentionControl | None]:
        """Executed step -> what controls the attention there, None once nothing does.

        `length` is the number of tokens L that the network attends to, padding included; latents (B, C, h, w).
        """
        mapper = token_mapper(source, target, length).to(latents.device)
        cross_steps, self_steps = round(self.cross * num_steps), round(self.self * num_steps)
        height, width = (-(-side // 4) for side in latents.shape[-2:])

        def at(step: int) -> AttentionControl | None:
            if step >= max(cross_steps, self_steps):
                return None
            return AttentionControl(mapper if step < cross_steps else None, height * width * (step < self_steps))

        return at


def check_prompts(source: str, target: str, negative: str) -> None:
    """InputError where Prompt-to-Prompt has no two prompts to work with."""
    if not source.strip():
        raise InputError("Prompt-to-Prompt: the source prompt is empty; invert with a description of the picture")
    if not target.strip():
        raise InputError("Prompt-to-Prompt: the target prompt is empty; give a description of the new picture")
    if target == negative:
        raise InputError(f"Prompt-to-Prompt: target and negative prompt are both {target[:40]!r}; give different ones")


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

    It is the global alignment [Needleman and Wunsch 1970] of the authors' code: match 1, gap 0, mismatch -1.
    """
    # longest[i][n]: how many words source[i:] and target[n:] share.
    longest = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i in reversed(range(len(source))):
        for n in reversed(range(len(target))):
            same = source[i] == target[n]
            longest[i][n] = longest[i + 1][n + 1] + 1 if same else max(longest[i + 1][n], longest[i][n + 1])
    pairs, i, n = [], 0, 0
    while i < len(source) and n < len(target):
        if source[i] == target[n]:
            pairs.append((i, n))
            i, n = i + 1, n + 1
        elif longest[i + 1][n] >= longest[i][n + 1]:
            i += 1
        else:
            n += 1
    return pairs


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
    """The attention of one step over a batch whose first half is the source's rows, its second half the target's.

    mapper       for the cross-attentions; None leaves them alone
    self_tokens  self-attention maps over at most so many tokens are lent; 0 leaves all alone

    Both methods take q (2B, heads, N, d), k and v (2B, heads, L, d) and return (2B, heads, N, d).
    """

    mapper: TokenMapper | None
    self_tokens: int

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mapper is None:
            return F.scaled_dot_product_attention(q, k, v)
        source, target = attention_maps(q, k).chunk(2)
        maps = torch.cat([source, mix_maps(source, target, self.mapper)])
        return maps.to(v.dtype) @ v

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > self.self_tokens:
            return F.scaled_dot_product_attention(q, k, v)
        source = attention_maps(q.chunk(2)[0], k.chunk(2)[0])
        return torch.cat([source, source]).to(v.dtype) @ v


# --- the edit -------------------------------------------------------------------------------------------------------


class ControlledEpsModel(Protocol):
    """An `edit.EpsModel` whose attention can be controlled."""

    def __call__(
        self, x_t: Tensor, t: Tensor, context: Any, attention: AttentionControl | None = None, /
    ) -> Tensor: ...


@dataclass(frozen=True)
class SourceRow:
    """What the source's row is predicted with.

    text, guidance_scale   those of the inversion
    uncond                 context of the empty prompt
    both                   context of 2B rows: the source prompt B times, then the target prompt B times
    control                executed step -> attention control, as `PromptToPrompt.control` makes it
    """

    text: str
    guidance_scale: float
    uncond: Any
    both: Any
    control: Callable[[int], AttentionControl | None]


def edit(
    eps_model: ControlledEpsModel,
    contexts: Mapping[str, Any],
    x_t: Tensor,
    residuals: Tensor,
    schedule: Schedule,
    skip: int,
    eta: float,
    target: str,
    guidance_scale: float,
    negative: str,
    terms: Sequence[ConceptTerm],
    momentum_scale: float,
    momentum_beta: float,
    on_step: Callable[[Step], None],
    *,
    row: SourceRow,
) -> Tensor:
    """`edit.edit` with a row for the source beside the edit's [2208.01626, Algorithm 1]; returns x_0 of the edit.

    Both rows start from the same x_T and step with the same residuals. The source's row retraces the inversion, and is
    only computed while its maps are wanted.
    """
    terms = [term for term in terms if not term.is_noop(base=negative)]
    momentum = torch.zeros_like(x_t)
    sigmas = schedule.sigmas(eta)
    x_source = x_t

    for i, residual in enumerate(residuals):
        step = skip + i
        level = levels(schedule, sigmas, step)
        t = schedule.timesteps[step].to(x_t.device).expand(len(x_t))
        texts = step_texts(negative, target, guidance_scale, terms, i, momentum_scale)
        eps: dict[str, Tensor] = {}

        # DM(z_t, P) and DM(z_t*, P*) with M <- Edit(M_t, M_t*, t): both prompts at once; then step the source's row.
        control = row.control(i) if target in texts else None
        if control is not None:
            together = eps_model(torch.cat([x_source, x_t]), t.repeat(2), row.both, control)
            eps_text, eps[target] = together.chunk(2)
            eps_source = source_eps(eps_model, row, x_source, t, eps_text)
            x_source = posterior_mean(x_source, eps_source, *level) + residual

        # From here on as without control.
        eps |= {text: eps_model(x_t, t, contexts[text]) for text in texts if text not in eps}
        guided, added = edited_eps(
            eps, negative, target, guidance_scale, terms, i, momentum, momentum_scale, momentum_beta
        )
        gamma, masks = None, []
        if added is not None:
            gamma, masks, momentum = added.gamma, added.masks, added.momentum
        x_t = posterior_mean(x_t, guided, *level) + residual
        on_step(Step(i, int(schedule.timesteps[step]), eps, gamma, masks, x_t))
    return x_t


def source_eps(eps_model: ControlledEpsModel, row: SourceRow, x_t: Tensor, t: Tensor, eps_text: Tensor) -> Tensor:
    """eps_uncond + source_guidance_scale (eps_text - eps_uncond), as the inversion computed it."""
    eps = {row.text: eps_text}
    if "" in guided_texts("", row.text, row.guidance_scale):
        eps[""] = eps_model(x_t, t, row.uncond)
    return guided_eps(eps, "", row.text, row.guidance_scale)
