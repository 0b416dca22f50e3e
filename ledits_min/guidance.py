"""Classifier-free guidance [2207.12598], and which texts the network must be asked about at a step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ledits_min.sega import ConceptTerm


def classifier_free_guidance(eps_uncond: Tensor, eps_text: Tensor, scale: float) -> Tensor:
    """eps = eps_uncond + scale (eps_text - eps_uncond)        [2207.12598, section 3.2; scale = 1 + w]"""
    return eps_uncond + scale * (eps_text - eps_uncond)


def guided_texts(base: str, text: str, scale: float) -> tuple[str, ...]:
    """The texts whose predictions `guided_eps` needs: one where guidance cannot change anything, else two."""
    if text == base or scale == 0.0:
        return (base,)
    if scale == 1.0:
        return (text,)
    return (base, text)


def guided_eps(eps: dict[str, Tensor], base: str, text: str, scale: float) -> Tensor:
    """Classifier-free guidance from predictions keyed by text; `eps` holds at least `guided_texts(...)`."""
    needed = guided_texts(base, text, scale)
    if len(needed) == 1:
        return eps[needed[0]]
    return classifier_free_guidance(eps[base], eps[text], scale)


def step_texts(
    negative: str,
    target: str,
    guidance_scale: float,
    terms: Sequence[ConceptTerm],
    step: int,
    momentum_scale: float,
) -> tuple[str, ...]:
    """The distinct texts to evaluate at one editing step; equal texts are one branch, idle concepts are none.

    `negative` is the text of eps_uncond. Concepts need eps_uncond too, since a direction is a difference from it.
    """
    live = [term.text for term in terms if term.matters(step, momentum_scale)]
    base = [negative] if live else []
    return tuple(dict.fromkeys([*base, *guided_texts(negative, target, guidance_scale), *live]))
