"""What a refusal is, range checks of numbers, and how values are named in a message."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from typing import Any


class InputError(ValueError):
    """An input was refused: one line that names the value, the reason and the way out."""


class RunError(RuntimeError):
    """Something went wrong while running, through no fault of the input: one line, the program's exit code is 1."""


def check_number(name: str, value: float | None, low: float, high: float, optional: bool = False) -> None:
    """InputError unless `value` is a finite number in low .. high (or None, where that is allowed)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is {short(value)}; a number in {low:g} .. {high:g} is wanted")


def check_whole(name: str, value: int | None, low: int, high: int, optional: bool = False) -> None:
    """InputError unless `value` is a whole number in low .. high (or None, where that is allowed)."""
    if value is None and optional:
        return
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{name} is {short(value)}; a whole number in {low} .. {high} is wanted")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """InputError unless `value` is one of the words."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {short(value)}; the choices are {', '.join(choices)}")


def short(value: Any, limit: int = 60) -> str:
    text = repr(value).replace("\n", " ")  # an array's has several lines
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(value: object, limit: int = 160) -> str:
    """One printable line for a message: control characters escaped, very long values cut in the middle."""
    text = ascii(str(value)) if not str(value).isprintable() else f"'{value}'"
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 3 :]}"


def warn(message: str) -> None:
    """A warning that points at the line which called into this package, however deep inside it arises."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("ledits_min.", "torch.")):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
