"""Where words are attended to, in a UNet of any family: what LEDITS++'s attention masks are made of [2311.16711].

Which cross-attentions are looked at, and a hook that looks at them and changes nothing: every attention is computed as
it would be, fused, and the maps of a few rows in a few layers once more beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.config import UNetConfig
from ledits_min.errors import InputError, quoted
from ledits_min.guidance import EditSettings
from ledits_min.p2p import AttentionControl, ControlledEpsModel, attention_maps

if TYPE_CHECKING:
    from ledits_min.text import Context
    from ledits_min.unet import Attend


def cross_attentions(config: UNetConfig, level: int, places: tuple[str, ...]) -> frozenset[int]:
    """The cross-attentions of a level on the way "down" and "up", counted in the order in which they are called.

    Level 0 works at the latents' own size, and each further one at half of it.
    """
    levels = len(config.block_out_channels)
    visited = [("down", at, depth) for at, depths in enumerate(config.down_depths) for depth in depths]
    visited += [("middle", levels - 1, config.mid_depth)]
    visited += [("up", levels - 1 - at, depth) for at, depths in enumerate(config.up_depths) for depth in depths]
    found: list[int] = []
    called = 0
    for place, at, depth in visited:
        if at == level and place in places:
            found += range(called, called + depth)
        called += depth
    return frozenset(found)


def check_masks(config: UNetConfig, settings: EditSettings) -> None:
    """InputError where a concept's mask needs attention that the UNet does not have, or words that there are not."""
    for term in settings.terms:
        if not term.attends:
            continue
        if not cross_attentions(config, settings.attention_level, settings.attention_places):
            places = " and ".join(settings.attention_places)
            raise InputError(
                f"concept {quoted(term.text, 60)}: mask is {term.mask!r}, and this model attends to no text at level "
                f"{settings.attention_level} on the way {places}; take mask 'noise' or 'percentile', or name another "
                "attention_level in its ledits.json"
            )
        if not term.text.strip():
            raise InputError(f"the empty concept: mask is {term.mask!r}, and it has no words to look for; take 'noise'")


def recording(
    config: UNetConfig, settings: EditSettings, contexts: Mapping[str, Context], latents: Tensor
) -> Recording | None:
    """What is recorded in an edit of latents (B, C, h, w); None where no mask needs it."""
    looked_at = {term.text for term in settings.terms if term.attends and term.pulls}
    if not looked_at:
        return None
    height, width = (-(-side // 2**settings.attention_level) for side in latents.shape[-2:])
    return Recording(
        settings,
        {text: contexts[text].own[0] for text in looked_at},
        cross_attentions(config, settings.attention_level, settings.attention_places),
        (height, width),
    )


@dataclass
class Recorder:
    """Attention that is as it would be, and looked at: how much some rows of one call attend to their own words.

    rows    int64 (P,) rows of the batch
    tokens  int64 (P,) how many tokens of each row's text are its own; they stand behind the begin token
    layers  which cross-attentions are looked at, counted in the order in which they are called

    `on_self` and `on_text` are what attends.
    """

    rows: Tensor
    tokens: Tensor
    layers: frozenset[int]
    on_self: Attend = F.scaled_dot_product_attention
    on_text: Attend = F.scaled_dot_product_attention
    calls: int = 0
    seen: list[Tensor] = field(default_factory=list)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.on_self(q, k, v)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.calls in self.layers:
            place = torch.arange(k.shape[2], device=k.device)
            own = (place > 0) & (place <= self.tokens[:, None])
            maps = attention_maps(q[self.rows], k[self.rows])
            self.seen.append((maps @ own.to(maps)[:, None, :, None]).squeeze(-1))
        self.calls += 1
        return self.on_text(q, k, v)

    def maps(self, size: tuple[int, int]) -> Tensor:
        """(P, h', w'): summed over a row's own words, then the mean over the heads of all layers [2311.16711]."""
        maps: Tensor = torch.cat(self.seen, dim=1).mean(dim=1).unflatten(1, size)
        return maps


@dataclass(frozen=True)
class Recording:
    """What a `Recorder` needs to know for a whole edit.

    tokens  how many tokens of a text are its own, for every text that is looked at
    layers  as in `Recorder`; their maps have `size` (h', w')
    """

    settings: EditSettings
    tokens: Mapping[str, int]
    layers: frozenset[int]
    size: tuple[int, int]

    def recorder(self, rows: Tensor, tokens: Tensor, control: AttentionControl | None, attend: Attend) -> Recorder:
        """One for a call in which `control` attends, if there is one, else `attend`."""
        on_self, on_text = attend, attend
        if control is not None:
            on_self, on_text = control.self_attention, control.cross_attention
        return Recorder(rows, tokens, self.layers, on_self, on_text)


def looking_eps_model(
    eps_model: ControlledEpsModel, contexts: Mapping[str, Any], recording: Recording, maps: dict[str, Tensor]
) -> ControlledEpsModel:
    """The same predictions; what was seen of a text that is looked at is left in `maps`, the last time it was asked."""
    looked_at = {id(contexts[text]): text for text in recording.tokens}

    def look(x_t: Tensor, t: Tensor, context: Any, control: AttentionControl | None = None) -> Tensor:
        asked = context if isinstance(context, list) else [context]
        texts = [looked_at.get(id(each)) for each in asked]
        parts = torch.arange(len(x_t), device=x_t.device).chunk(len(asked))
        seen = [(text, rows) for text, rows in zip(texts, parts, strict=True) if text is not None]
        if not seen:
            return eps_model(x_t, t, context, control)
        tokens = torch.cat([torch.full_like(rows, recording.tokens[text]) for text, rows in seen])
        recorder = recording.recorder(
            torch.cat([rows for _, rows in seen]), tokens, control, F.scaled_dot_product_attention
        )
        eps = eps_model(x_t, t, context, recorder)
        maps.update(zip((text for text, _ in seen), recorder.maps(recording.size).chunk(len(seen)), strict=True))
        return eps

    return look
