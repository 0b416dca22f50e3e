"""Time that a run spends on compiling and recording: it happens inside the first calls, and is no part of the work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from ledits_min.engine.torch_private import watch_compiler


class Overhead:
    """Seconds by kind, gathered until they are taken: "compile" by torch.compile, "record" of CUDA graphs."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def take(self) -> dict[str, float]:
        """What has gathered since the last time."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[kind] += time.perf_counter() - started

    @contextmanager
    def watching_the_compiler(self) -> Iterator[None]:
        """Times what torch.compile does in this thread meanwhile, where this torch tells."""
        thread, started = get_ident(), None

        def start(*_: object) -> None:
            nonlocal started
            started = time.perf_counter() if get_ident() == thread else None

        def end(*_: object) -> None:
            nonlocal started
            if started is not None:  # else it began before, or in another thread
                self._seconds["compile"] += time.perf_counter() - started
            started = None

        stop = watch_compiler(start, end)
        try:
            yield
        finally:
            stop()
