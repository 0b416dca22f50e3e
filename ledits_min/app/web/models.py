"""The models that the page was started with, and what it has to know of each: its numbers, its presets, its words."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ledits_min import InputError, LEdits
from ledits_min.config import EditDefaults
from ledits_min.errors import quoted


@dataclass(frozen=True)
class Preset:
    """Numbers that suit a kind of edit; `skip` is a share of the steps."""

    guidance_scale: float
    threshold: float
    warmup_steps: int
    skip: float

    @property
    def numbers(self) -> tuple[float, float, int]:
        """Those of a concept."""
        return self.guidance_scale, self.threshold, self.warmup_steps


# Measured for the embedded model. For other checkpoints starting points: a face wants little of the map and late steps,
# a style much of it and early ones.
PRESETS_EMBEDDED = {"small thing": Preset(2.0, 0.9, 1, 4 / 25), "big thing": Preset(3.0, 0.8, 1, 2 / 25)}
PRESETS = {
    "face": Preset(7.0, 0.95, 1, 0.36),
    "object": Preset(10.0, 0.9, 1, 0.30),
    "style": Preset(7.0, 0.5, 2, 0.18),
}

SMALL, BIG = PRESETS_EMBEDDED
CUSTOM = "custom"  # a concept whose numbers are nobody's preset


@dataclass(frozen=True)
class Example:
    """An edit ready to be made: the sample's number from 0, what to add, and the preset it wants."""

    sample: int
    text: str
    preset: str


# What the embedded model does well on portraits it has never seen (README, "What the embedded model can do"): the words
# with their preset, and four of them on a sample.
SUGGESTIONS = {
    "sunglasses": SMALL, "glasses": SMALL, "smiling": SMALL, "a beard": SMALL, "a red hat": BIG, "blond hair": BIG,
    "a red shirt": BIG, "blue background": BIG, "no sunglasses": SMALL, "clean shaven": SMALL,
}  # fmt: skip
EXAMPLES = (
    Example(0, "sunglasses", SMALL), Example(1, "a red hat", BIG), Example(2, "smiling", SMALL),
    Example(4, "clean shaven", SMALL),
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What the page has to know of a model that is not loaded any more."""

    defaults: EditDefaults
    presets: Mapping[str, Preset]
    native_size: int
    embedded: bool


class Models:
    """The models that were named, one of them loaded at a time, and one computation at a time on it."""

    def __init__(self, names: Sequence[str], device: str = "auto", dtype: str = "auto", **parts: Any) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.given: dict[str, Any] = {"device": device, "dtype": dtype, **parts}  # as `from_pretrained` takes it
        self._facts: dict[str, Facts] = {}
        self._lock = threading.Lock()
        self._loaded: tuple[str, LEdits] | None = None

    @contextmanager
    def use(self, name: str) -> Iterator[LEdits]:
        """The model of that name for as long as the block runs; the one loaded before is freed first."""
        if name not in self.names:
            raise InputError(f"{quoted(name, 60)} is not one of the models this page was started with")
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._free()
                self._loaded = name, LEdits.from_pretrained(name, **self.given)
            ledits = self._loaded[1]
            presets = PRESETS_EMBEDDED if ledits.embedded else PRESETS
            self._facts[name] = Facts(ledits.defaults, presets, ledits.native_size, ledits.embedded)
            yield ledits

    def facts(self, name: str) -> Facts:
        if name not in self._facts:
            with self.use(name):
                pass
        return self._facts[name]

    def close(self) -> None:
        with self._lock:
            self._free()

    def _free(self) -> None:
        if self._loaded is not None:
            self._loaded[1].close()
        self._loaded = None
