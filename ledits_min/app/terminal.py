"""What the command says: one line per message on stderr, results on stdout."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from ledits_min.errors import InputError, RunError, quoted

MAX_SAID = 4000  # letters of one line


class Clock:
    """Seconds a phase, for the report."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str, apart: Mapping[str, float] | None = None) -> None:
        """`apart` holds seconds of this lap that are to be told under names of their own."""
        now = time.perf_counter()
        for name, seconds in (apart or {}).items():
            self.laps[name] = self.laps.get(name, 0.0) + seconds
            self.last += seconds
        self.laps[phase], self.last = now - self.last, now


@contextmanager
def warnings_as_lines() -> Iterator[list[str]]:
    """Python's warnings as `ledits: warning: ...`; yields the list of what was said, for the report."""
    said: list[str] = []

    def show(message: Warning | str, category: object, filename: str, *_: object, **__: object) -> None:
        if "PIL" in Path(filename).parts:  # what matters of a damaged picture is refused or noted by us
            return
        if str(message) not in said:  # a sweep would say it for every cell
            said.append(str(message))
            say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield said


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on a terminal what takes its time, until it is done; anywhere else nothing."""
    from tqdm import tqdm

    silent = None if sys.stderr is not None else True  # None: wherever it is no terminal
    with tqdm(desc=f"{what} ...", bar_format="{desc}", file=sys.stderr, leave=False, disable=silent):
        yield


def one_line(error: BaseException) -> str:
    """Why it went wrong, in one line for a person."""
    text = str(error)
    if isinstance(error, InputError | RunError):
        return text
    # torch's own error is known by its name only, since torch may never have been imported.
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    if isinstance(error, MemoryError) or out_of_memory:
        return "out of memory; try a smaller --size, --dtype bfloat16, or --device cpu"
    if isinstance(error, OSError):
        where = "" if error.filename is None else f" ({quoted(os.fsdecode(error.filename))})"
        if disk_is_full(error):
            return f"the disk is full{where}; free some space and run it again"
        return f"{error.strerror or text}{where}"
    return f"{type(error).__name__}: {text or 'no message'} (a fault of this program; --debug shows where)"


def disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def notice(args: argparse.Namespace, text: str) -> None:
    if text not in args.said:
        args.said.append(text)
        say(text)


def say(text: str) -> None:
    """One line on stderr, whatever the text holds; dropped where stderr is closed or full."""
    if sys.stderr is None:
        return
    line = "".join(character if character.isprintable() else " " for character in text[:MAX_SAID])
    line = f"ledits: {' '.join(line.split())}" + (" ..." if len(text) > MAX_SAID else "")
    encoding = sys.stderr.encoding or "utf-8"
    try:
        with _beside_the_bar():
            print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """Point a stream that takes no more at nothing: what is still buffered must not fail again when Python exits."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Something behind descriptors 0 to 2, so that no file of ours becomes one that a library writes messages to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence on descriptor 2, for libraries that write there by themselves what they also raise.

    It is the whole process that falls silent: for the command's main thread while no other runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nothing to keep quiet
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _beside_the_bar() -> AbstractContextManager[object]:
    """Takes a progress bar off the terminal for as long as a line is printed; there is one only once tqdm is there."""
    tqdm = sys.modules.get("tqdm")
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(sys.stderr)


def tell(text: str) -> None:
    """The result, on stdout."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # the reader has left (`| head`)
        _give_up(sys.stdout)


def tell_written(clock: Clock, paths: Sequence[str | Path | None]) -> None:
    names = ", ".join(quoted(path, 4096) for path in paths if path is not None)
    tell(f"wrote {names} in {time.perf_counter() - clock.start:.1f} s")
