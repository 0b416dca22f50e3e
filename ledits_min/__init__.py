"""LEDITS [2307.00522] from scratch: DDPM inversion of a real picture, edited by semantic guidance."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ledits_min.errors import InputError

if TYPE_CHECKING:
    from ledits_min.engine.progress import Progress, Stopped
    from ledits_min.engine.request import PromptToPrompt
    from ledits_min.files.inversion import Inversion
    from ledits_min.files.result import Result
    from ledits_min.pipeline import LEdits
    from ledits_min.sega import Concept

__all__ = ["Concept", "InputError", "Inversion", "LEdits", "Progress", "PromptToPrompt", "Result", "Stopped"]
__version__ = "0.1.0"

# Everything that needs torch is imported when it is first asked for [PEP 562]: `ledits --help` should not wait for it.
_HOMES = {
    "Concept": "ledits_min.sega",
    "Inversion": "ledits_min.files.inversion",
    "LEdits": "ledits_min.pipeline",
    "Progress": "ledits_min.engine.progress",
    "PromptToPrompt": "ledits_min.engine.request",
    "Result": "ledits_min.files.result",
    "Stopped": "ledits_min.engine.progress",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
