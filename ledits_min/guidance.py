"""What an edit is asked to do, and classifier-free guidance [2207.12598]: which texts the network must be asked about
at a step, and what their predictions become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ledits_min.sega import ConceptTerm, Guidance, Where, semantic_guidance


@dataclass(frozen=True)
class EditSettings:
    """Where an edit goes, every default resolved.

    target, guidance_scale  the target prompt and how strongly it pulls; "" is the empty prompt
    negative                the text of eps_uncond
    concepts                what to add or remove
    momentum_scale, momentum_beta   SEGA's momentum, 0 <= value < 1
    attention_level, attention_places   where words' attention maps are read, as in `EditDefaults`
    region                  limits every concept, as in `sega.Where`
    """

    target: str = ""
    guidance_scale: float = 15.0
    negative: str = ""
    concepts: tuple[ConceptTerm, ...] = ()
    momentum_scale: float = 0.0
    momentum_beta: float = 0.6
    attention_level: int = 2
    attention_places: tuple[str, ...] = ("down", "up")
    region: Tensor | None = field(default=None, compare=False)

    @property
    def terms(self) -> tuple[ConceptTerm, ...]:
        """The concepts that can have an effect: one with the text of eps_uncond has no direction, and is dropped."""
        return tuple(term for term in self.concepts if term.text != self.negative)

    def attending(self, step: int) -> set[str]:
        """The texts whose attention maps make masks at one step."""
        return {term.text for term in self.terms if term.attends and term.matters(step, self.momentum_scale)}

    def texts(self, step: int) -> tuple[str, ...]:
        """The distinct texts to evaluate at one step; equal texts are one branch, idle concepts are none."""
        live = [term.text for term in self.terms if term.matters(step, self.momentum_scale)]
        base = [self.negative] if live else []  # a direction is a difference from eps_uncond
        return tuple(dict.fromkeys([*base, *guided_texts(self.negative, self.target, self.guidance_scale), *live]))


def classifier_free_guidance(eps_uncond: Tensor, eps_text: Tensor, scale: float) -> Tensor:
    """eps = eps_uncond + scale (eps_text - eps_uncond)        [2207.12598, section 3.2; scale = 1 + w]"""
    return eps_uncond + scale * (eps_text - eps_uncond)


def guided_texts(base: str, text: str, scale: float) -> tuple[str, ...]:
    """The texts whose predictions `guided_eps` needs: two, but where one would count nothing or both are the same."""
    if text == base or scale == 0.0:
        return (base,)
    if scale == 1.0:
        return (text,)
    return (base, text)


def guided_eps(eps: Mapping[str, Tensor], base: str, text: str, scale: float) -> Tensor:
    """Classifier-free guidance from predictions keyed by text; `eps` holds at least `guided_texts(...)`."""
    needed = guided_texts(base, text, scale)
    if len(needed) == 1:
        return eps[needed[0]]
    return classifier_free_guidance(eps[base], eps[text], scale)


def edited_eps(
    eps: Mapping[str, Tensor], settings: EditSettings, step: int, momentum: Tensor, maps: Mapping[str, Tensor]
) -> tuple[Tensor, Guidance | None]:
    """The prediction that an editing step follows, and what SEGA added to it (None without concepts).

    eps = eps_uncond + guidance_scale (eps_target - eps_uncond) + gamma_t        [2307.00522, Algorithm 1]

    `eps` holds the predictions for `settings.texts(step)`, `maps` the attention maps for `settings.attending(step)`.
    """
    guided = guided_eps(eps, settings.negative, settings.target, settings.guidance_scale)
    if not settings.terms:
        return guided, None
    uncond = eps.get(settings.negative, guided)  # absent only where every concept is idle: then its shape alone is used
    concepts = [eps[term.text] if term.matters(step, settings.momentum_scale) else None for term in settings.terms]
    added = semantic_guidance(
        uncond, concepts, settings.terms, step, momentum, settings.momentum_scale, settings.momentum_beta,
        Where(maps, settings.region),
    )  # fmt: skip
    return guided + added.gamma, added
