"""The names of what a command will write, checked before any work and before torch is imported."""

from __future__ import annotations

import argparse
import errno
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from ledits_min.errors import InputError, quoted
from ledits_min.files.write import OUTPUT_SIDES

PICTURES = tuple(OUTPUT_SIDES)


def check_outputs(args: argparse.Namespace, wanted: Mapping[str, tuple[str | Path | None, Sequence[str]]]) -> None:
    """InputError unless every output can be written; {option: (path or None, endings it may have)}."""
    merged = [path for path, _ in (args.lora or []) + (args.embedding or [])]
    inputs = [args.image, args.model, args.vae, args.text_encoder, args.tokenizer, *merged]
    inputs.append(getattr(args, "only_where", None))
    taken: dict[str, str] = {}
    for option, (given, suffixes) in wanted.items():
        if given is None:
            continue
        path = Path(given)
        name = f"{option} {quoted(path)}"
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{name} must end in {' or '.join(suffixes)}")
        _check_place(path, name, args.overwrite)
        real = os.path.realpath(path)
        if real in taken:
            raise InputError(f"{name} is also the name given with {taken[real]}; give each output its own")
        taken[real] = option
        for source in inputs:
            if source is not None and _same_file(source, path):
                raise InputError(f"{name} is an input of this run; write to another name")


def _check_place(path: Path, name: str, overwrite: bool) -> None:
    try:
        folder = Path(os.path.realpath(path)).parent
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise InputError(f"{name}: {quoted(folder)} is not a folder; name a folder that exists")
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not folder.is_dir():
            raise InputError(f"{name}: the folder {quoted(folder)} does not exist; make it first") from None
        if path.is_symlink():
            raise InputError(f"{name} is a link to a file that does not exist; name the file itself") from None
        mode = None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        why = "the name is too long" if long else str(getattr(error, "strerror", None) or error)
        raise InputError(f"{name} cannot be written: {why}; choose another name with -o") from None
    if mode is not None and not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{name} is {what}; name a file to write")
    if mode is not None and not overwrite:
        raise InputError(f"{name} exists already; pass --overwrite, or another name with -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{name}: the folder {quoted(folder)} cannot be written to; choose another")


def _same_file(source: str, path: Path) -> bool:
    try:
        return os.path.samefile(source, path)
    except (OSError, ValueError):
        return False
