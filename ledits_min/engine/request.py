"""What a caller asks for, checked at the door: prompts, settings, seeds, noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ledits_min.config import EditDefaults
from ledits_min.errors import InputError, check_number, check_whole, quoted, short, warn
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import Lending, Words, token_mapper, word_spans
from ledits_min.sega import Concept


@dataclass(frozen=True)
class Start:
    """Where the denoising loop starts, and the noise of its way: x_T (B, C, h, w), residuals (T, B, C, h, w)."""

    x_T: Tensor
    residuals: Tensor
    inversion: InversionSettings

    def to(self, device: torch.device) -> Start:
        return replace(self, x_T=self.x_T.to(device), residuals=self.residuals.to(device).contiguous())


@dataclass(frozen=True)
class PromptToPrompt:
    """Attention control for `LEdits.edit(..., attention=PromptToPrompt())`        [2208.01626, section 3.2]

    cross     tau_x, 0 .. 1: the source's cross-attention maps act in the first int(cross * (num_steps + 1)) steps
    self      tau_a, 0 .. 1: its self-attention maps act in the first int(self * num_steps), where a map has at most a
              quarter of the latents' height and width: the 16 x 16 tokens that the authors' code allows at 64 x 64
    reweight  words of the target, and what their cross-attention is multiplied by while maps are lent, -10 .. 10
    blend     words of the source or the target, one string or several: the edit acts where either prompt attends to
              them, and the rest of the picture stays as it is; none: it may change everything
    blend_threshold  0 .. 1: where they are attended to more than this share of their largest attention, the edit
              acts; at 1 it acts nowhere. None: the checkpoint's own, else the paper's 0.3

    Executed steps are counted, but num_steps holds the skipped ones too: with 36 of 100 skipped, 0.6 covers 60 of the
    64 that are executed. Prompts with equally many words are edited by word swap ("replace"), all others by prompt
    refinement ("refine"). The inversion must have been made with a source prompt, and the edit needs a target. The
    other defaults are those of LEDITS, Table 1. As in the paper every step blends; the authors' later code leaves out
    the first fifth from pure noise, which an inversion mostly skips. `blend` reads the maps that LEDITS++'s masks read,
    and has the source's row computed in every step. InputError for a value out of range.
    """

    cross: float = 0.6
    self: float = 0.2
    reweight: Mapping[str, float] = field(default_factory=dict)
    blend: str | Sequence[str] = ()
    blend_threshold: float | None = None

    def __post_init__(self) -> None:
        check_number("attention: cross", self.cross, 0.0, 1.0)
        check_number("attention: self", self.self, 0.0, 1.0)
        if not isinstance(self.reweight, Mapping):
            raise InputError(f"attention: reweight is {short(self.reweight)}; words and their factors are wanted")
        for word, factor in self.reweight.items():
            check_text("attention: a word to reweight", word)
            check_number(f"attention: reweight of {quoted(word, 60)}", factor, -10.0, 10.0)
        phrases = (self.blend,) if isinstance(self.blend, str) else self.blend
        if not isinstance(phrases, list | tuple) or not all(isinstance(one, str) and one.strip() for one in phrases):
            raise InputError(f"attention: blend is {short(self.blend)}; words of the source or the target are wanted")
        for phrase in phrases:
            check_text("attention: a word to blend around", phrase)
        object.__setattr__(self, "blend", tuple(phrases))
        check_number("attention: blend_threshold", self.blend_threshold, 0.0, 1.0, optional=True)
        if self.blend_threshold is not None and not phrases:
            raise InputError(
                f"attention: blend_threshold is {self.blend_threshold:g} and has no effect without blend; name the "
                "words around which the edit is to stay"
            )

    def resolve(self, defaults: EditDefaults) -> PromptToPrompt:
        """The same with every None that has an effect replaced by its default."""
        if not self.blend or self.blend_threshold is not None:
            return self
        return replace(self, blend_threshold=defaults.blend_threshold)

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


def edit_settings(
    defaults: EditDefaults,
    target: str,
    guidance_scale: float | None,
    negative: str,
    concepts: Sequence[Concept],
    momentum_scale: float,
    momentum_beta: float,
) -> EditSettings:
    """The arguments of `LEdits.edit` by these names, every default resolved.

    InputError for a number out of its range and for a prompt that is no text.
    """
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    check_number("guidance_scale", scale, 0.0, 1000.0)
    for name, value in (("momentum_scale", momentum_scale), ("momentum_beta", momentum_beta)):
        check_number(name, value, 0.0, 1.0)
        if value == 1.0:
            raise InputError(f"{name} is 1; it must stay below 1, or the momentum never fades")
    check_prompt("target", target)
    check_prompt("negative", negative)
    for concept in concepts:
        check_prompt("concept", concept.text)
    terms = tuple(concept.resolve(defaults) for concept in concepts)
    read = defaults.attention_level, defaults.attention_places
    return EditSettings(target, scale, negative, terms, momentum_scale, momentum_beta, *read)


def edit_texts(settings: EditSettings) -> list[str]:
    """Every text whose prediction an edit may ask for."""
    return [settings.negative, settings.target, *(term.text for term in settings.terms if term.pulls)]


def warn_of_idle(settings: EditSettings, steps: int) -> None:
    """Say which concepts never act in so many executed steps."""
    for term in settings.terms:
        if term.pulls and not any(term.acts(step) for step in range(steps)):
            warn(
                f"concept {term.text[:40]!r} never acts: only {steps} steps are executed, and its warm-up is "
                f"{term.warmup_steps}, its cool-down {term.cooldown_steps}"
            )


def check_prompt(name: str, text: str) -> str:
    check_text(name, text)
    warn_of_syntax(text)
    return text


def check_text(name: str, text: object) -> None:
    """InputError for what is no text, and for half a character (a lone surrogate), which no tokenizer reads."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}; a string is wanted")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{name} is {quoted(text, 60)}, which holds half a character; write it as whole Unicode text")


def check_prompts(source: str, target: str, negative: str) -> None:
    """InputError where Prompt-to-Prompt has no two prompts to work with."""
    check_text("source", source)  # a saved inversion's was written by who knows whom
    if not source.strip():
        raise InputError("Prompt-to-Prompt: the source prompt is empty; invert with a description of the picture")
    if not target.strip():
        raise InputError("Prompt-to-Prompt: the target prompt is empty; give a description of the new picture")
    if target == negative:
        raise InputError(f"Prompt-to-Prompt: target and negative prompt are both {target[:40]!r}; give different ones")


def tokens_of(words: Words, prompt: Words) -> list[int]:
    """Where a phrase's tokens stand in a prompt, wherever its words follow each other."""
    spans, count = word_spans(prompt), len(words)
    starts = [n for n in range(len(prompt) - count + 1) if count and list(prompt[n : n + count]) == list(words)]
    return [token for n in starts for token in range(spans[n].start, spans[n + count - 1].stop)]


def named_tokens(
    attention: PromptToPrompt, words_of: Callable[[str], Words], source: str, target: str, length: int
) -> tuple[Tensor, Tensor]:
    """The words that `attention` names, in prompts of `length` tokens L: what it multiplies the target's tokens by,
    float32 (L,), and which of the source's and of the target's it blends around, bool (2, L).

    words_of  the token ids of each word of a text. InputError for words that are in no prompt, or behind what the model
    reads of it.
    """
    prompts = words_of(source), words_of(target)
    longest = max(sum(map(len, prompt)) for prompt in prompts)
    cut = f", among the {longest} tokens that the model reads" if longest == length - 2 else ""
    factors = torch.ones(length)
    for phrase, factor in attention.reweight.items():
        found = tokens_of(words_of(phrase), prompts[1])
        if not found:
            raise InputError(
                f"Prompt-to-Prompt: {quoted(phrase, 60)} is not in the target prompt; name words that are{cut}"
            )
        factors[found] *= factor
    blended = torch.zeros(2, length, dtype=torch.bool)
    for phrase in attention.blend:
        places = [tokens_of(words_of(phrase), prompt) for prompt in prompts]
        if not any(places):
            raise InputError(
                f"Prompt-to-Prompt: blend names {quoted(phrase, 60)}, which is neither in the source prompt "
                f"{quoted(source)} nor in the target prompt {quoted(target)}; name words that are{cut}"
            )
        for row, found in zip(blended, places, strict=True):
            row[found] = True
    return factors, blended


def check_attention(attention: object) -> None:
    if not isinstance(attention, PromptToPrompt | None):
        raise InputError(f"attention is {type(attention).__name__}; PromptToPrompt() or None is wanted")


_SYNTAX = (  # how other programs write what is no part of a prompt here -> what to use instead
    (re.compile(r"\([^()]*:\s*[\d.]+\s*\)"), "a weight", "give a concept a guidance_scale or weight"),
    (re.compile(r"\bBREAK\b"), "a break between chunks", "a prompt is one chunk; put what matters first"),
    (re.compile(r"<(?:lora|lyco):[^<>]*>", re.IGNORECASE), "a LoRA", "load it with lora= (--lora FILE:SCALE)"),
    (re.compile(r"\bembedding:\S+"), "an embedding", "load it with embedding= (--embedding FILE)"),
)


def warn_of_syntax(text: str) -> None:
    """One warning for each kind of other programs' prompt syntax: it is read as plain words."""
    for pattern, what, instead in _SYNTAX:
        if match := pattern.search(text):
            warn(f"{quoted(match[0], 60)} in a prompt is {what} to other programs and plain words here; {instead}")


def check_call(concepts: object = (), callback: object = None) -> None:
    """What is easily mistaken in a call, with the way out."""
    if callback is not None and not callable(callback):
        raise InputError(f"callback is {short(callback)}; a function that takes a Progress is wanted")
    if isinstance(concepts, str | Concept):
        one = f"Concept({short(concepts)})" if isinstance(concepts, str) else short(concepts)
        raise InputError(f"concepts is {short(concepts)}; a list is wanted: concepts=[{one}]")
    if not isinstance(concepts, list | tuple):
        raise InputError(f"concepts is {type(concepts).__name__}; a list of Concept is wanted")
    for concept in concepts:
        if not isinstance(concept, Concept):
            way_out = f"write Concept({short(concept)})" if isinstance(concept, str) else "a Concept is wanted"
            raise InputError(f"concepts holds {short(concept)}; {way_out}")


def check_seeds(seed: int | Sequence[int], batch: int) -> tuple[int, ...]:
    """One seed per picture."""
    seeds = tuple(seed) if isinstance(seed, list | tuple) else (seed,) * batch
    for value in seeds:
        check_whole("seed", value, 0, 2**63 - 1)  # type: ignore[arg-type]
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds for {batch} pictures; give one number, or one per picture")
    return seeds  # type: ignore[return-value]


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(noise.shape) != shape or noise.dtype != torch.float32:
        raise InputError(f"noise is {noise.dtype} {tuple(noise.shape)}; torch.float32 {shape} is wanted")
    if not bool(noise.isfinite().all()):
        raise InputError("noise holds values that are not finite")
