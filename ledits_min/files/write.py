"""Files that are whole or absent, and the pictures among them."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ledits_min.errors import InputError, quoted, warn

if TYPE_CHECKING:
    from PIL import Image

OUTPUT_SIDES = {".png": 2**31 - 1, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # what a format can hold

_TEMPORARY = ".ledits-{}.tmp"
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # the file system has no such thing


def save_image(
    image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None, through_links: bool = True
) -> None:
    """Write PNG, JPEG or WEBP by the name's ending, as `atomic_write` does; a PNG carries `metadata` as text."""
    suffix = Path(path).suffix.lower()
    check_output_picture(path, image.size)
    buffer = io.BytesIO()
    if suffix == ".png":
        from PIL import PngImagePlugin  # not above: the command checks its names before it imports anything

        text = PngImagePlugin.PngInfo()
        for key, value in (metadata or {}).items():
            text.add_text(key, value)
        image.save(buffer, format="PNG", pnginfo=text)
    elif suffix == ".webp":
        image.save(buffer, format="WEBP", quality=95)
    else:
        image.save(buffer, format="JPEG", quality=95, subsampling=0)
    atomic_write(path, buffer.getvalue(), through_links)


def check_output_picture(path: str | Path, size: tuple[int, int]) -> None:
    """InputError unless the name asks for a format we write, and that can hold a picture of this size."""
    suffix = Path(path).suffix.lower()
    if suffix not in OUTPUT_SIDES:
        raise InputError(f"{quoted(path)} does not end in a format we write; use {', '.join(OUTPUT_SIDES)}")
    if max(size) > OUTPUT_SIDES[suffix]:
        raise InputError(
            f"{quoted(path)}: {suffix[1:].upper()} holds {OUTPUT_SIDES[suffix]} pixels per side, the picture "
            f"is {size[0]} x {size[1]}; use .png"
        )


def atomic_write(path: str | Path, content: bytes, through_links: bool = True) -> None:
    """Write a file so that it is there whole or not at all: a new one beside it, synced, then renamed over it.

    An existing link keeps pointing at the file it names, which is what is written; without `through_links` the link
    itself is replaced. InputError where the name belongs to anything but a file; OSError as for any file, under the
    final name. A process that is killed outright may leave `.ledits-*.tmp` beside it, never a broken file. Where a file
    system can neither sync nor rename, the file is written in place, with a warning.
    """
    final = Path(os.path.realpath(path)) if through_links else Path(path)
    _check_regular(final)
    temporary = final.with_name(_TEMPORARY.format(secrets.token_hex(6)))
    try:
        with open(temporary, "xb") as file:
            _lock(file.fileno())  # until it is in place: nobody takes it for what a killed run has left
            file.write(content)
            file.flush()
            _sync(file.fileno())
            try:
                os.replace(temporary, final)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                _write_in_place(final, content)
                temporary.unlink(missing_ok=True)
    except BaseException as error:  # Ctrl-C and SIGTERM too: nothing may stay behind
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(final)) from error  # not the temporary's name, or none
        raise


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes were writing in a folder; what a living one is writing stays."""
    for left in folder.glob(_TEMPORARY.format("*")):
        try:
            handle = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone, not ours, or no file
            continue
        try:
            if _lock(handle):
                left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _check_regular(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{quoted(path)} is {what}; name a file to write")


def _lock(handle: int) -> bool:
    """Whether the open file is ours alone now; False too where the file system, or the machine, has no such locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


def _write_in_place(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(handle, "wb") as file:
        file.write(content)
    warn(f"{quoted(path)}: this file system cannot rename; the file was written in place, which a power cut may break")
