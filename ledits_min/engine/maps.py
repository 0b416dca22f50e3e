"""Where words are attended to, in a UNet of any family: what the attention masks of LEDITS++ [2311.16711] and the local
blend of Prompt-to-Prompt [2208.01626] are made of.

Which cross-attentions are recorded, and a hook that records them and changes nothing: every attention is computed as it
would be, fused, and the maps of a few rows in a few layers are computed once more beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ledits_min.config import EditDefaults, UNetConfig
from ledits_min.errors import InputError, quoted
from ledits_min.guidance import EditSettings
from ledits_min.p2p import AttentionControl, ControlledEpsModel, Lending, attention_maps

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
        what = f"concept {quoted(term.text, 60)}: mask is {term.mask!r}"
        check_attends(config, settings, what, "take mask 'noise' or 'percentile'")
        if not term.text.strip():
            raise InputError(f"the empty concept: mask is {term.mask!r}, and it has no words to look for; take 'noise'")


def check_attends(config: UNetConfig, settings: EditSettings | EditDefaults, what: str, way_out: str) -> None:
    """InputError where the UNet has no attention at the level that `what` is to be made of."""
    if not cross_attentions(config, settings.attention_level, settings.attention_places):
        places = " and ".join(settings.attention_places)
        raise InputError(
            f"{what}, and this model attends to no text at level {settings.attention_level} on the way {places}; "
            f"{way_out}, or name another attention_level in its ledits.json"
        )


class Look(NamedTuple):
    """Why the attention of a text's rows is recorded: for a concept's mask, or (`blends`) for a local blend.

    of_source  the rows read the source's latents, not the edit's: both may be asked about the same text
    """

    text: str
    of_source: bool = False
    blends: bool = False


def recording(
    config: UNetConfig,
    settings: EditSettings,
    contexts: Mapping[str, Context],
    latents: Tensor,
    source: str = "",
    lending: Lending | None = None,
) -> Recording | None:
    """What is recorded in an edit of latents (B, C, h, w) of the prompt `source`; None where nothing is."""
    tokens: dict[Look, Tensor] = {}
    for text in dict.fromkeys(term.text for term in settings.terms if term.attends and term.pulls):
        place = torch.arange(contexts[text].tokens.shape[1], device=latents.device)
        tokens[Look(text)] = (place > 0) & (place <= contexts[text].own[0])
    if lending is not None and lending.blend is not None:
        looks = Look(source, of_source=True, blends=True), Look(settings.target, blends=True)
        tokens |= zip(looks, lending.blend.words.to(latents.device), strict=True)
    if not tokens:
        return None
    height, width = (-(-side // 2**settings.attention_level) for side in latents.shape[-2:])
    layers = cross_attentions(config, settings.attention_level, settings.attention_places)
    return Recording(settings, tokens, layers, (height, width))


@dataclass
class Recorder:
    """Attention that is as it would be, and recorded: how much some rows of one call attend to some tokens.

    rows    int64 (P,) rows of the batch; one may be there for several looks
    tokens  bool (P, L) whose maps are summed, of each
    layers  which cross-attentions are recorded, counted in the order in which they are called

    `attend` computes the attention, or `control` does, if there is one. A map is the row's own, whatever is lent to it.
    """

    rows: Tensor
    tokens: Tensor
    layers: frozenset[int]
    attend: Attend = F.scaled_dot_product_attention
    control: AttentionControl | None = None
    calls: int = 0
    seen: list[Tensor] = field(default_factory=list)  # (P, heads, h' w'), layer by layer

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = self.attend if self.control is None else self.control.self_attention
        return attend(q, k, v)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.calls in self.layers:
            maps = attention_maps(q[self.rows], k[self.rows])
            self.seen.append((maps @ self.tokens.to(maps)[:, None, :, None]).squeeze(-1))
        self.calls += 1
        attend = self.attend if self.control is None else self.control.cross_attention
        return attend(q, k, v)

    def maps(self, size: tuple[int, int]) -> Tensor:
        """(P, h', w'): summed over the tokens, then the mean over the heads of all layers [2311.16711, 2208.01626]."""
        maps: Tensor = torch.cat(self.seen, dim=1).mean(dim=1).unflatten(1, size)
        return maps


@dataclass(frozen=True)
class Recording:
    """What a `Recorder` needs to know for a whole edit.

    tokens  bool (L,) what is looked at; of a local blend first the source's
    layers  as in `Recorder`; their maps have `size` (h', w')
    """

    settings: EditSettings
    tokens: Mapping[Look, Tensor]
    layers: frozenset[int]
    size: tuple[int, int]

    def looks(self, step: int, text: str, of_source: bool) -> list[Look]:
        """What a row about `text` is looked at for: masks while their concepts act, a blend at every step."""
        return [
            look
            for look in self.tokens
            if (look.text, look.of_source) == (text, of_source)
            and (look.blends or text in self.settings.attending(step))
        ]

    def recorder(self, rows: Tensor, tokens: Tensor, control: AttentionControl | None, attend: Attend) -> Recorder:
        """One for a call in which `control` attends, if there is one, else `attend`."""
        return Recorder(rows, tokens, self.layers, attend, control)


@dataclass(frozen=True)
class Maps:
    """What has been seen of an edit so far.

    masks  (B, h', w') by text, as it was seen last
    blend  (2, B, h', w') per step, of a local blend's words in the source's row and in the target's
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    blend: list[Tensor] = field(default_factory=list)

    def add(self, seen: Mapping[Look, Tensor]) -> None:
        """What was seen in one step, or a part of it with all that is to be blended."""
        self.masks.update({look.text: maps for look, maps in seen.items() if not look.blends})
        if words := [maps for look, maps in seen.items() if look.blends]:
            self.blend.append(torch.stack(words))


def looking_eps_model(
    eps_model: ControlledEpsModel, contexts: Mapping[str, Any], recording: Recording, maps: Maps
) -> ControlledEpsModel:
    """The same predictions; what is seen meanwhile is left in `maps`. Of several contexts the first is the source's."""

    def look(x_t: Tensor, t: Tensor, context: Any, control: AttentionControl | None = None) -> Tensor:
        asked = context if isinstance(context, list) else [context]
        parts = torch.arange(len(x_t), device=x_t.device).chunk(len(asked))
        seen = [
            (look, rows)
            for place, (one, rows) in enumerate(zip(asked, parts, strict=True))
            for look in recording.tokens
            if contexts[look.text] is one and look.of_source == (place == 0 and len(asked) > 1)
        ]
        if not seen:
            return eps_model(x_t, t, context, control)
        tokens = torch.cat([recording.tokens[look].expand(len(rows), -1) for look, rows in seen])
        recorder = recording.recorder(
            torch.cat([rows for _, rows in seen]), tokens, control, F.scaled_dot_product_attention
        )
        eps = eps_model(x_t, t, context, recorder)
        found = recorder.maps(recording.size).chunk(len(seen))
        maps.add(dict(zip((look for look, _ in seen), found, strict=True)))
        return eps

    return look
