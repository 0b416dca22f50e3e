"""What an edit gives back, and how a notebook shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from ledits_min.files.display import Figure, figures, overlay
from ledits_min.sega import ConceptTerm


@dataclass(frozen=True)
class Result:
    """What an edit gives back.

    images   B PIL images, RGB
    latents  float32 (B, C, h, w), scaled, on the CPU
    masks    K float32 tensors (B, h, w) in [0, 1], on the CPU: the share of channels, and of the steps in which the
             concept acted, that its mask covered; zero for a concept that never acted
    trace    with trace=True one dict per step: t, alpha_bar, sigma, eps_rms {branch: value}, mask_fraction [K],
             gamma_rms, x_rms
    originals, concepts   B PIL images as they came in, none for a generated picture; the K concepts
    """

    images: list[Image.Image]
    latents: Tensor = field(repr=False)
    masks: list[Tensor] = field(repr=False)
    trace: list[dict[str, Any]] = field(default_factory=list, repr=False)
    originals: list[Image.Image] = field(default_factory=list, repr=False)
    concepts: tuple[ConceptTerm, ...] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        """Before, after, and where each concept acted, for a notebook."""
        rows: list[list[Figure]] = []
        for i, after in enumerate(self.images):
            before = self.originals[i] if self.originals else after
            where = [
                (f"{'-' if concept.reverse else '+'} {concept.text}", overlay(before, mask[i]))
                for concept, mask in zip(self.concepts, self.masks, strict=True)
            ]
            rows.append([*([("before", before)] if self.originals else []), ("after", after), *where])
        return figures(rows)
