"""The `ledits` command: its options, what it does, what it prints."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; every failure is one line on stderr."""
    try:
        from ledits_min.app.cli import command  # not above: the other commands' rooms import parts of this one
    except KeyboardInterrupt:  # before its own handlers stand
        print("ledits: error: interrupted", file=sys.stderr)
        return 130
    return command.main(argv)
