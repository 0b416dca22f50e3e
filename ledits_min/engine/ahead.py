"""The kernels' compiling, done in threads while the weights are loaded; whoever calls a network first waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from ledits_min.errors import warn

THREADS = 4  # the compiler holds Python's lock for a part of its time: more gain little


class Ahead:
    """Jobs under way from now on."""

    def __init__(self, jobs: Sequence[Callable[[], object]]) -> None:
        self._lock = Lock()
        self._under_way: list[Future[object]] = []
        if jobs:
            pool = ThreadPoolExecutor(THREADS, "compiling kernels")
            self._under_way = [pool.submit(job) for job in jobs]
            pool.shutdown(wait=False)

    def wait(self) -> None:
        """Until all are done. What failed is said once; it is tried again when the kernel is first used."""
        if not self._under_way:
            return
        with self._lock:
            errors = [error for job in self._under_way if (error := job.exception()) is not None]
            self._under_way = []
        if errors:
            why = str(errors[0]).partition("\n")[0] or type(errors[0]).__name__
            warn(f"{len(errors)} kernels were not compiled ahead, and will be when they are used: {why}")
