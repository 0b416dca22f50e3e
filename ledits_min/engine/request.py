"""What a caller asks for, checked at the door: prompts, guidance, seeds, noise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ledits_min.config import EditDefaults
from ledits_min.errors import InputError, check_number, check_whole
from ledits_min.schedule import Schedule
from ledits_min.sega import Concept, ConceptTerm


@dataclass(frozen=True)
class Start:
    """Where the denoising loop starts, and the noise of its way: x_T (B, C, h, w), residuals (T, B, C, h, w)."""

    x_T: Tensor
    residuals: Tensor
    schedule: Schedule
    skip: int
    eta: float

    def to(self, device: torch.device) -> Start:
        return replace(self, x_T=self.x_T.to(device), residuals=self.residuals.to(device))


@dataclass(frozen=True)
class Guidance:
    """Where it is to go: the arguments of `LEdits.edit` by these names, with every default resolved.

    terms  one a concept; `live` are those that can change anything
    """

    target: str
    guidance_scale: float
    negative: str = ""
    terms: list[ConceptTerm] = field(default_factory=list)
    momentum_scale: float = 0.0
    momentum_beta: float = 0.6

    @classmethod
    def of(
        cls,
        target: str,
        guidance_scale: float,
        negative: str,
        concepts: Sequence[Concept],
        momentum_scale: float,
        momentum_beta: float,
        defaults: EditDefaults,
    ) -> Guidance:
        """InputError for a number out of its range and for a prompt that is no text."""
        check_number("guidance_scale", guidance_scale, 0.0, 1000.0)
        for name, value in (("momentum_scale", momentum_scale), ("momentum_beta", momentum_beta)):
            check_number(name, value, 0.0, 1.0)
            if value == 1.0:
                raise InputError(f"{name} is 1; it must stay below 1, or the momentum never fades")
        check_prompt("target", target)
        check_prompt("negative", negative)
        terms = [concept.resolve(defaults) for concept in concepts]
        return cls(target, guidance_scale, negative, terms, momentum_scale, momentum_beta)

    @property
    def live(self) -> list[ConceptTerm]:
        return [term for term in self.terms if not term.is_noop(base=self.negative)]

    @property
    def texts(self) -> list[str]:
        """Every text whose prediction may be asked for."""
        return [self.negative, self.target, *(term.text for term in self.live)]

    def warn_of_idle(self, steps: int, stacklevel: int) -> None:
        """Say which concepts never act in so many executed steps."""
        for term in self.live:
            if not any(term.acts(step) for step in range(steps)):
                warnings.warn(
                    f"concept {term.text[:40]!r} never acts: only {steps} steps are executed, and its warm-up is "
                    f"{term.warmup_steps}, its cool-down {term.cooldown_steps}",
                    stacklevel=stacklevel + 1,
                )


def check_prompt(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}; a string is wanted")
    return text


def check_output_size(output_size: str) -> None:
    if output_size not in ("input", "model"):
        raise InputError(f"output_size is {output_size!r}; 'input' or 'model' is wanted")


def check_seeds(seed: int | Sequence[int], batch: int) -> tuple[int, ...]:
    """One seed a picture."""
    seeds = tuple(seed) if isinstance(seed, list | tuple) else (seed,) * batch
    for value in seeds:
        check_whole("seed", value, 0, 2**63 - 1)  # type: ignore[arg-type]
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds for {batch} pictures; give one number, or one a picture")
    return seeds  # type: ignore[return-value]


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(noise.shape) != shape or noise.dtype != torch.float32:
        raise InputError(f"noise is {noise.dtype} {tuple(noise.shape)}; torch.float32 {shape} is wanted")
    if not bool(noise.isfinite().all()):
        raise InputError("noise holds values that are not finite")
