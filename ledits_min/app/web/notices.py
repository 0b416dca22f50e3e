"""Warnings on the page: each goes to the visitor whose computation it concerns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_ears: ContextVar[list[str] | None] = ContextVar("ears", default=None)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of this thread, each once, while `warnings_to_visitors` runs."""
    said: list[str] = []
    token = _ears.set(said)
    try:
        yield said
    finally:
        _ears.reset(token)


@contextmanager
def warnings_to_visitors() -> Iterator[None]:
    """A warning goes to the visitor whose computation it concerns; one of nobody's to where it went before.

    Set once, before the first visitor comes: `warnings.catch_warnings` around a computation would change what all
    threads see.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        before = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            said = _ears.get()
            if said is not None and category is UserWarning:
                said.extend([str(message)] * (str(message) not in said))
            else:
                before(message, category, *rest, **named)

        warnings.showwarning = show
        yield
