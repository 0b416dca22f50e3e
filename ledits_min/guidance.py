"""Classifier-free guidance [2207.12598], and which texts the network must be asked about at a step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ledits_min.sega import ConceptTerm, Guidance, semantic_guidance


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


def edited_eps(
    eps: dict[str, Tensor],
    negative: str,
    target: str,
    guidance_scale: float,
    terms: Sequence[ConceptTerm],
    step: int,
    momentum: Tensor,
    momentum_scale: float,
    momentum_beta: float,
) -> tuple[Tensor, Guidance | None]:
    """The prediction that an editing step follows, and what SEGA added to it (None without concepts).

    eps = eps_uncond + guidance_scale (eps_target - eps_uncond) + gamma_t        [2307.00522, Algorithm 1]

    `eps` holds the predictions for `step_texts(...)`, keyed by text.
    """
    guided = guided_eps(eps, negative, target, guidance_scale)
    if not terms:
        return guided, None
    uncond = eps.get(negative, guided)  # absent where every concept is idle: then nothing is subtracted from it
    concepts = [eps[term.text] if term.matters(step, momentum_scale) else None for term in terms]
    added = semantic_guidance(uncond, concepts, terms, step, momentum, momentum_scale, momentum_beta)
    return guided + added.gamma, added
