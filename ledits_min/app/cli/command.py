"""The `ledits` command: its exit codes, its one line for every failure, and how a signal ends it.

Only a command that runs imports torch, so that `ledits --help` and a misspelt option answer at once.
Exit codes: 0 done, 2 bad input, 1 went wrong while running, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from ledits_min.app.cli.commands import COMMANDS
from ledits_min.app.cli.options import build_parser
from ledits_min.app.terminal import one_line, open_standard_streams, say, warnings_as_lines
from ledits_min.errors import InputError


class _Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt no ordinary handler may swallow it."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; every failure is one line on stderr."""
    if argv is None:  # the process is this command's own
        open_standard_streams()
        argv = sys.argv[1:]
    with _signals() as heard, warnings_as_lines() as said:
        try:
            args = build_parser().parse_args(argv)
            args.said = said
            COMMANDS[args.command](args)
        # The one place that catches everything: a person at a terminal gets a line and an exit code, not a traceback.
        except BaseException as error:  # noqa: BLE001
            if isinstance(error, SystemExit) and not heard:  # --help and --version
                return int(error.code or 0)
            if "--debug" in argv:
                with suppress(OSError, ValueError):
                    traceback.print_exc()
            # A signal that arrives inside a library's compiled part may come out of it as that library's own failure.
            code, line = exit_and_line(heard[0]() if heard else error)
            say(f"error: {line}")
            return code
    return 0


def exit_and_line(error: BaseException) -> tuple[int, str]:
    """Exit code and the line for a person."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, _Terminated):
        return 143, "terminated"
    return 1, one_line(error)


@contextmanager
def _signals() -> Iterator[list[type[BaseException]]]:
    """Ctrl-C and SIGTERM both end a run through every `finally`; a run that one of them ends hears no other.

    What the signal raised, once there was one.
    """
    heard: list[type[BaseException]] = []
    ends: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: _Terminated}

    def stop(number: int, _: object) -> NoReturn:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleaning up, nor the last words
        heard.append(ends[number])
        raise heard[0]

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    # A shell starts what runs in its background with Ctrl-C ignored; it stays so.
    before = {each: signal.getsignal(each) for each in ends if signal.getsignal(each) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield heard
    finally:
        for each, handler in before.items() if not heard else ():
            signal.signal(each, handler or signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
