"""What the tables of RESULTS.md are made of: rows, and numbers with their units and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def percent(value: float) -> str:
    return f"{100.0 * value:.1f} %"


def decibel(value: float) -> str:
    return f"{value:.1f} dB"


def ratio(value: float) -> str:
    return f"{value:.3f}"


def spread(interval: Sequence[float], unit: float = 1.0, digits: int = 1) -> str:
    low, high = (f"{unit * bound:.{digits}f}" for bound in interval)
    return f"[{low}, {high}]"
