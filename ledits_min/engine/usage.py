"""Who uses an editor's networks: runs in any thread, and whoever takes the networks from under them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ledits_min.engine.progress import Stopped
from ledits_min.errors import InputError

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


class Usage:
    """Thread-safe; it waits for nobody, so that a run's own callback may close the editor too."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._runs = 0
        self._free: Callable[[], None] | None = None  # there once the editor is closed

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run of the networks; InputError where the editor is closed. Once it is, its last run frees the memory."""
        with self._lock:
            self._check_open()
            self._runs += 1
        try:
            yield
        finally:
            with self._lock:
                self._runs -= 1
                self._free_when_idle()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A change of the networks themselves, which no run may see; InputError where one is under way."""
        with self._lock:
            self._check_open()
            if self._runs:
                raise InputError("this LEdits is at work; move it when its run has ended")
            yield

    def close(self, free: Callable[[], None]) -> None:
        """Let nobody in any more, and `free` the memory as soon as the runs under way have stopped."""
        with self._lock:
            self._free = free
            self._free_when_idle()

    def check(self, phase: str) -> None:
        """What a run asks behind every evaluation; Stopped where the editor was closed meanwhile."""
        if self._free is not None:
            raise Stopped(f"{phase}: stopped, since the LEdits was closed")

    def _check_open(self) -> None:
        if self._free is not None:
            raise InputError("this LEdits is closed; make another with LEdits.from_pretrained")

    def _free_when_idle(self) -> None:
        if self._free is not None and not self._runs:
            self._free()


class _User(Protocol):
    @property
    def usage(self) -> Usage: ...


User = TypeVar("User", bound=_User)


def running(
    method: Callable[Concatenate[User, Arguments], Returned],
) -> Callable[Concatenate[User, Arguments], Returned]:
    """A method that is a run from beginning to end."""

    @functools.wraps(method)
    def run(self: User, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with self.usage.run():
            return method(self, *args, **kwargs)

    return run
