"""What is opened for reading: a regular file of a bounded size, never anything that could wait or go on for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ledits_min.errors import InputError, quoted


def read_file(path: str | os.PathLike[str], wanted: str, most: int) -> bytes:
    """The whole content of a regular file of 1 .. `most` bytes; `wanted` says in a message what belongs here.

    InputError for a folder, a pipe, a device, an empty or a larger file, and for what is not there.
    """
    name = quoted(os.fspath(path))
    try:
        _check(os.stat(path), name, wanted, most)  # before it is opened: opening a device may move it
        # Not blocking, and looked at again: a pipe may have taken the file's place in between.
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            _check(status, name, wanted, most)
            return file.read(status.st_size)
    except FileNotFoundError:
        why = "is a link to a file that does not exist" if Path(path).is_symlink() else "does not exist"
        raise InputError(f"{name} {why}; check the path") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is not a usable path ({error}); check it") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(status: os.stat_result, name: str, wanted: str, most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise InputError(f"{name} is {what}; {wanted} is wanted here")
    if status.st_size == 0:
        raise InputError(f"{name} is an empty file; {wanted} is wanted here")
    if status.st_size > most:
        raise InputError(f"{name} is {status.st_size:,} bytes long, more than {wanted} may be ({most:,} bytes)")
