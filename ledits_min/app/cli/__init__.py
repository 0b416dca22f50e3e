"""The `ledits` command: its options, what it does, what it prints."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; every failure is one line on stderr."""
    from ledits_min.app.cli import command  # not above: the other commands' rooms import parts of this one

    return command.main(argv)
