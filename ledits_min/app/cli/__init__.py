"""The `ledits` command: its options, what it does, what it prints."""

from __future__ import annotations

import os
import sys

# What OpenMP reads when torch loads it: how long a thread that waits for another spins before it sleeps.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; every failure is one line on stderr."""
    if argv is None:  # the process is this command's own
        sleep_while_waiting()
    try:
        from ledits_min.app.cli import command  # not above: the other commands' rooms import parts of this one
    except KeyboardInterrupt:  # before its own handlers stand
        print("ledits: error: interrupted", file=sys.stderr)
        return 130
    return command.main(argv)


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep at once, unless the user has said how they wait: on busy cores they would spin against
    one another, and an edit takes several times as long (bench/speed/threads.py)."""
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
