"""The folder that `ledits batch` writes to: what in it is the batch's own, and what nobody may touch.

Everything of a batch carries a mark: a picture the hash of its job, errors.jsonl the fields of a `Failure` in each
line. What carries none is somebody else's. Nothing is ever written through a link.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ledits_min.app.batch.jobs import Job
from ledits_min.app.terminal import one_line
from ledits_min.errors import InputError, quoted
from ledits_min.files.write import atomic_write, remove_abandoned

HASH = "ledits_job"  # the text of a PNG that holds its job's hash
ERRORS = "errors.jsonl"
MAX_OUTPUT = 2**30  # bytes of a picture of ours, at the very most
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Failure:
    """What errors.jsonl says of a job."""

    line: int
    image: str
    output: str
    reason: str

    @classmethod
    def of(cls, job: Job, error: BaseException | str) -> Failure:
        reason = error if isinstance(error, str) else one_line(error)
        return cls(job.line, job.image, job.output, " ".join(reason.split()))


@dataclass(frozen=True)
class Found:
    """What lies under an output's name: a batch's own, or not; of its own the hash, "" where it is not whole."""

    ours: bool
    hash: str = ""
    what: str = "exists and is no output of a batch"
    replaceable: bool = True


def found_at(path: Path) -> Found | None:
    """None where there is nothing. Links are not followed, and nothing that could block is opened."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder"}
            kind = kinds.get(stat.S_IFMT(status.st_mode), "not a regular file")
            return Found(False, what=f"is {kind}", replaceable=stat.S_ISLNK(status.st_mode))
        if status.st_size > MAX_OUTPUT:
            return Found(False)
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            data = file.read(status.st_size)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Found(False, what=f"cannot be looked at: {error.strerror}", replaceable=False)
    if not data:  # nothing to lose
        return Found(True)
    mark = f"tEXt{HASH}\0".encode()
    at = data.find(mark, 0, max(data.find(b"IDAT"), 0) or len(data))
    if not data.startswith(b"\x89PNG") or at < 0:
        return Found(False)
    found = data[at + len(mark) : at + len(mark) + 64]
    return Found(True, found.decode("latin-1") if _is_whole(data) else "")


def _is_whole(data: bytes) -> bool:
    # Not above: the command reads this file before any other.
    from PIL.PngImagePlugin import PngImageFile

    from ledits_min.files.opening import DAMAGED

    try:
        PngImageFile(io.BytesIO(data)).verify()  # the checksums of all that follows, the last one aside
    except DAMAGED:
        return False
    return data.endswith(_PNG_END)


def check_folder(folder: Path, jobs: Sequence[Job]) -> None:
    """InputError where the outputs cannot go there, or would replace what is not theirs to replace."""
    inputs = {os.path.realpath(job.path) for job in jobs}
    inputs |= {os.path.realpath(mask) for job in jobs if (mask := job.options.get("only_where")) is not None}
    for job in jobs:
        if job.output and os.path.realpath(folder / job.output) in inputs:
            raise InputError(f"-o {quoted(folder)}: {quoted(job.output)} there is an input of this run; choose another")
    try:
        there = os.path.lexists(folder)
        usable = not there or stat.S_ISDIR(os.stat(folder).st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"-o {quoted(folder)} cannot be used: {reason}; choose another folder") from None
    if not usable:
        raise InputError(f"-o {quoted(folder)} cannot be used: it is not a folder; choose another folder")
    if there and not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"-o {quoted(folder)} cannot be written to; choose another folder")
    _check_errors_file(folder / ERRORS)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {quoted(folder)} cannot be made: {error.strerror}; choose another folder") from None


def check_place(path: Path, overwrite: bool) -> None:
    """InputError for somebody else's under an output's name; a batch's own may go, or the plan was refused."""
    found = found_at(path)
    if found is None or found.ours:
        return
    if not overwrite:
        raise InputError(f"{quoted(path)} {found.what}; pass --overwrite to replace it")
    if not found.replaceable:
        raise InputError(f"{quoted(path)} {found.what}, which --overwrite does not replace; move it away")


def check_others(folder: Path, others: Sequence[str], overwrite: bool) -> None:
    """InputError for outputs of a batch that were made of other pictures or with other settings."""
    if others and not overwrite:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"-o {quoted(folder)}: {quoted(others[0])}{more} there are of other pictures or settings; pass --overwrite "
            "to make them anew, or name another folder"
        )


def write_errors(folder: Path, failures: Sequence[Failure]) -> None:
    """One line per failed job, in the table's order; no file where none failed."""
    path = folder / ERRORS
    _check_errors_file(path)
    if not failures:
        path.unlink(missing_ok=True)
        return
    lines = (json.dumps(asdict(failure)) for failure in sorted(failures, key=lambda failure: failure.line))
    atomic_write(path, "".join(f"{line}\n" for line in lines).encode(), through_links=False)


def _check_errors_file(path: Path) -> None:
    """InputError for a file of that name which no batch has written."""
    try:
        ours = stat.S_ISREG(os.lstat(path).st_mode)
        if ours:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(handle, "rb") as file:
                entry = json.loads(file.readline(MAX_OUTPUT))
            ours = isinstance(entry, dict) and list(entry) == [field.name for field in fields(Failure)]
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise InputError(f"{quoted(path)} is of no batch; move it away, or name another folder with -o")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else's while it lasts, and rid of what a killed run was writing."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"-o {quoted(folder)}: another batch is writing there; wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks
    try:
        remove_abandoned(folder)
        yield
        remove_abandoned(folder)  # a worker of Ray may have been killed
    finally:
        os.close(handle)
