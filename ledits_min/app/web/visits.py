"""All visits of the page, and the bounds that they share: how many, how many bytes, how long without anybody there.

A visit is one load of the page; its id is `OWNER.REST`, where the owner is the browser that it belongs to. Both are
made by `door.py`. Where room is short, the visit that has been idle longest makes way; a visitor who finds none is
asked, in one line, to come back.
"""

from __future__ import annotations

import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ledits_min import InputError
from ledits_min.app.web.models import Models
from ledits_min.app.web.session import Session

_RELATIVE = re.compile(r"[\w-]+(/[\w-]+)*(\.[a-z]+)?", re.ASCII)  # a file's place within an owner's folder


@dataclass(frozen=True)
class Limits:
    """Bytes and seconds.

    absent   until a visit that no page is open for is closed
    idle     until a visit with its page open may make way for others
    """

    visits: int = 64
    visits_each: int = 8
    memory: int = 2 * 2**30
    files: int = 4 * 2**30
    upload: int = 32 * 2**20
    absent: float = 600.0
    idle: float = 1800.0


@dataclass
class Visit:
    session: Session
    used: float
    computing: bool = False


@dataclass(frozen=True)
class Upload:
    owner: str
    size: int
    begun: float


class Visits:
    """Thread-safe. `place` is the folder for all files; `clock` gives seconds."""

    def __init__(
        self, models: Models, place: Path, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.models, self.place, self.limits = models, place, limits or Limits()
        self._clock = clock
        self._lock = threading.RLock()
        self._visits: dict[str, Visit] = {}
        self._pages: Counter[str] = Counter()  # heartbeats that are open
        self._uploads: dict[str, Upload] = {}

    def __len__(self) -> int:
        return len(self._visits)

    def __contains__(self, name: str) -> bool:
        return name in self._visits

    @property
    def memory(self) -> int:
        """Bytes of all inversions."""
        with self._lock:
            return sum(visit.session.memory for visit in self._visits.values())

    @property
    def files(self) -> int:
        """Bytes of all files, and of the uploads that have begun."""
        with self._lock:
            stored = sum(visit.session.stored for visit in self._visits.values())
            return stored + sum(upload.size for upload in self._uploads.values())

    def arrive(self, name: str, before: str = "") -> Session:
        """The session of a page that was loaded: its own where it has one, the one it had `before` it was loaded again.

        InputError where as many are here as may be.
        """
        with self._lock:
            self.sweep()
            before = f"{_owner(name)}.{before}"
            if name not in self._visits and before in self._visits and not self._pages[before]:
                self._visits[name] = self._visits.pop(before)
            if name not in self._visits:
                self._make_way(name)
                folder = self.place / _owner(name)
                folder.mkdir(exist_ok=True)
                session = Session(self.models, folder)
                session.admit = lambda memory, files: self._admit(session, memory, files)
                self._visits[name] = Visit(session, self._clock())
            return self.session(name)

    def session(self, name: str | None) -> Session:
        """The session of a visit that has arrived; it is in use now."""
        with self._lock:
            visit = self._visits.get(name or "")
            if visit is None:
                raise InputError("this page has lost its visit, or is still loading; reload it")
            visit.used = self._clock()
            return visit.session

    @contextmanager
    def computing(self, name: str | None) -> Iterator[Session]:
        """The session while it computes: it does not make way then."""
        session = self.session(name)
        visit = self._visits[name or ""]
        visit.computing = True
        try:
            yield session
        finally:
            visit.computing, visit.used = False, self._clock()

    @contextmanager
    def page_open(self, name: str) -> Iterator[None]:
        """As long as the page is open in a browser. When it is left, what it computes is stopped."""
        with self._lock:
            self._pages[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pages[name] -= 1
                if not self._pages[name]:
                    del self._pages[name]
                    if (visit := self._visits.get(name)) is not None:
                        visit.used = self._clock()
                        visit.session.stop()
                        visit.session.release()

    def file(self, owner: str, relative: str) -> Path | None:
        """A file that was stored for this owner."""
        path = self.place / owner / relative
        return path if _RELATIVE.fullmatch(relative) and not path.is_symlink() and path.is_file() else None

    def begin_upload(self, owner: str, size: int) -> tuple[str, Path]:
        """A token and the folder for a file of that many bytes."""
        with self._lock:
            self.sweep()
            if not any(_owner(name) == owner for name in self._visits):
                raise InputError("this page has lost its visit; reload it")
            for token in [token for token, upload in self._uploads.items() if upload.owner == owner][:-1]:
                self.end_upload(token)
            if size > self.limits.upload:
                most = self.limits.upload // 2**20
                raise InputError(f"the file has {size / 2**20:.0f} MB; at most {most} MB can be opened here")
            if not self._admit(None, 0, size):
                raise InputError("the page's disk holds as many pictures as it may; come back in a while")
            token = f"upload-{secrets.token_hex(8)}"
            self._uploads[token] = Upload(owner, size, self._clock())
            folder = self.place / owner / token
            folder.mkdir()
            return token, folder

    def uploaded(self, name: str | None, token: str) -> Path:
        """The file that this visitor has sent."""
        upload = self._uploads.get(token)
        if upload is None or upload.owner != _owner(name or ""):
            raise InputError("this file is not here any more; choose it again")
        return next((self.place / upload.owner / token).iterdir())

    def end_upload(self, token: str, name: str | None = None) -> None:
        """`name` is the visit that asks for it; nobody else's upload is ended then."""
        with self._lock:
            upload = self._uploads.get(token)
            if upload is not None and (name is None or upload.owner == _owner(name)):
                del self._uploads[token]
                shutil.rmtree(self.place / upload.owner / token, ignore_errors=True)

    def sweep(self) -> None:
        """Close what nobody is there for any more."""
        with self._lock:
            now = self._clock()
            for name, visit in list(self._visits.items()):
                if self._away(name) and now - visit.used >= self.limits.absent:
                    self._close(name)
            for token, upload in list(self._uploads.items()):
                if now - upload.begun >= self.limits.absent:
                    self.end_upload(token)

    def close(self) -> None:
        with self._lock:
            for name in list(self._visits):
                self._close(name)

    def _close(self, name: str) -> None:
        self._visits.pop(name).session.close()
        owner = _owner(name)
        if not any(_owner(other) == owner for other in self._visits):
            for token in [token for token, upload in self._uploads.items() if upload.owner == owner]:
                self.end_upload(token)
            shutil.rmtree(self.place / owner, ignore_errors=True)

    def _away(self, name: str) -> bool:
        return not self._pages[name] and not self._visits[name].computing

    def _idle_first(self) -> list[str]:
        """Those that may make way: with nobody there, then idle for long; the one idle longest first."""
        now = self._clock()
        order = sorted(self._visits, key=lambda name: (not self._away(name), self._visits[name].used))
        return [
            name for name in order
            if self._away(name) or (not self._visits[name].computing
                                    and now - self._visits[name].used >= self.limits.idle)
        ]  # fmt: skip

    def _make_way(self, name: str) -> None:
        own = [other for other in self._visits if _owner(other) == _owner(name)]
        if len(own) >= self.limits.visits_each:
            gone = [other for other in self._idle_first() if other in own]
            if not gone:
                raise InputError(f"this page is open in {len(own)} tabs of this browser; close one and reload")
            self._close(gone[0])
        while len(self._visits) >= self.limits.visits:
            gone = self._idle_first()
            if not gone:
                raise InputError(f"{len(self._visits)} visitors are here, as many as can be; reload in a few minutes")
            self._close(gone[0])

    def _admit(self, session: Session | None, memory: int, files: int) -> bool:
        """Whether there is room for so many more bytes, once inversions and then visits of others have made way."""
        with self._lock:
            others = [name for name in self._visits if self._visits[name].session is not session]
            for name in sorted(others, key=lambda name: self._visits[name].used):
                if self.memory + memory <= self.limits.memory:
                    break
                if not self._visits[name].computing:
                    self._visits[name].session.release()
            for name in [name for name in self._idle_first() if name in others]:
                if self._has_room(memory, files):
                    break
                self._close(name)
            return self._has_room(memory, files)

    def _has_room(self, memory: int, files: int) -> bool:
        return self.memory + memory <= self.limits.memory and self.files + files <= self.limits.files


def _owner(name: str) -> str:
    return name.split(".")[0]
