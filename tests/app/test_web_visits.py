"""The bounds that all visits of the page share: how many, how many bytes, and who makes way."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from ledits_min import InputError, Inversion
from ledits_min.app.web.models import Models
from ledits_min.app.web.server import give_memory_back
from ledits_min.app.web.session import Basis, Session
from ledits_min.app.web.visits import Limits, Visits
from ledits_min.inversion import InversionSettings

NOBODYS = cast(Models, None)  # nothing is computed here
SIDE = 200
PIXELS = SIDE * SIDE * 3


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_noise((SIDE, SIDE), 50.0).convert("RGB").save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


@pytest.fixture
def begin(tmp_path: Path, clock: Clock) -> Callable[..., Visits]:
    place = tmp_path / "place"
    place.mkdir()
    return lambda **limits: Visits(NOBODYS, place, Limits(**limits), clock)


def test_a_client_without_heartbeat_expires_and_leaves_nothing(
    begin: Callable[..., Visits], clock: Clock, picture: Path
) -> None:
    visits = begin(absent=600.0)
    invert(visits.arrive("a.1"), picture)
    clock.now = 599.0
    visits.sweep()
    assert len(visits) == 1 and visits.memory == PIXELS
    clock.now = 600.0
    visits.sweep()
    assert len(visits) == 0 and visits.memory == visits.files == 0
    assert list(visits.place.iterdir()) == []
    with pytest.raises(InputError, match="lost its visit"):
        visits.session("a.1")


def test_a_page_that_is_open_stays_and_one_that_is_left_expires(begin: Callable[..., Visits], clock: Clock) -> None:
    visits = begin(absent=600.0)
    visits.arrive("a.1")
    with visits.page_open("a.1"):
        clock.now = 10_000.0
        visits.sweep()
        assert len(visits) == 1
    clock.now = 10_599.0
    visits.sweep()
    assert len(visits) == 1
    clock.now = 10_600.0
    visits.sweep()
    assert len(visits) == 0


def test_a_second_load_of_a_visit_makes_no_second_folder(begin: Callable[..., Visits]) -> None:
    visits = begin()
    session = visits.arrive("a.1")
    for _ in range(5):
        assert visits.arrive("a.1") is session
    assert [path.name for path in (visits.place / "a").iterdir()] == [session.folder.name]


def test_a_reload_goes_on_and_a_second_tab_does_not_take_over(begin: Callable[..., Visits]) -> None:
    visits = begin()
    session = visits.arrive("a.1")
    assert visits.arrive("a.2", "1") is session and len(visits) == 1
    with visits.page_open("a.2"):
        assert visits.arrive("a.3", "2") is not session  # that page is open still: a tab was duplicated
    assert visits.arrive("b.1", "2") is not session  # another browser


def test_where_no_room_is_the_one_idle_longest_makes_way(begin: Callable[..., Visits], clock: Clock) -> None:
    visits = begin(visits=3, idle=1800.0)
    for number in range(3):
        clock.now = float(number)
        visits.arrive(f"{number}.x")
    with visits.page_open("0.x"):
        clock.now = 10.0
        visits.arrive("3.x")
        assert names(visits) == {"0.x", "2.x", "3.x"}  # 0 is there; of the others 1 was idle longest
        with visits.page_open("2.x"), visits.page_open("3.x"):
            with pytest.raises(InputError, match="3 visitors are here, as many as can be; reload in a few minutes"):
                visits.arrive("4.x")
            clock.now = 1800.0
            visits.session("2.x")
            visits.arrive("4.x")
            assert names(visits) == {"2.x", "3.x", "4.x"}  # 0 has been idle for half an hour


def test_one_browser_does_not_take_every_place(begin: Callable[..., Visits], clock: Clock) -> None:
    visits = begin(visits=64, visits_each=3)
    for number in range(50):
        clock.now += 1.0
        visits.arrive(f"a.{number}")
    assert names(visits) == {"a.47", "a.48", "a.49"}


def test_who_computes_does_not_make_way(begin: Callable[..., Visits], clock: Clock) -> None:
    visits = begin(visits=1)
    visits.arrive("a.1")
    with visits.computing("a.1"):
        clock.now = 1e6
        visits.sweep()
        with pytest.raises(InputError, match="visitors are here"):
            visits.arrive("b.1")
    visits.arrive("b.1")
    assert names(visits) == {"b.1"}


def test_memory_is_bounded(begin: Callable[..., Visits], clock: Clock, picture: Path) -> None:
    visits = begin(memory=3 * PIXELS)
    for number in range(10):
        clock.now = float(number)
        invert(visits.arrive(f"{number}.x"), picture)
        assert visits.memory <= 3 * PIXELS
    assert len(visits) == 10  # what can be made again makes way, and no visit for it
    assert {name for name in names(visits) if visits.session(name).memory} == {"7.x", "8.x", "9.x"}
    with visits.computing("7.x"), visits.computing("8.x"), visits.computing("9.x"):
        invert(visits.arrive("late.x"), picture)
        assert visits.session("late.x").memory == 0 and visits.memory == 3 * PIXELS  # made, and not kept


def test_files_are_bounded_and_who_must_wait_is_told(begin: Callable[..., Visits], clock: Clock, picture: Path) -> None:
    visits = begin(files=4_000_000)
    for number in range(8):
        clock.now = float(number)
        visits.arrive(f"{number}.x").open(picture)
        stored = sum(path.stat().st_size for path in visits.place.rglob("*") if path.is_file())
        assert stored == visits.files <= 4_000_000
    assert len(visits) < 8
    late = visits.arrive("late.x")
    with ExitStack() as open_pages:
        for name in names(visits):
            open_pages.enter_context(visits.page_open(name))
        with pytest.raises(InputError, match="holds as many pictures as it may; take a smaller one, or come back"):
            late.open(picture)
    assert late.picture is None
    late.open(picture)
    assert visits.files <= 4_000_000


def test_only_a_picture_that_can_be_gone_back_to_is_kept(begin: Callable[..., Visits], picture: Path) -> None:
    visits = begin()
    session = visits.arrive("a.1")
    for _ in range(5):
        session.open(picture)
    assert {path.name for path in session.folder.iterdir()} == {"original-5", "picture-5.png"}


def test_a_picture_is_kept_as_its_file_and_not_decoded(begin: Callable[..., Visits], picture: Path) -> None:
    visits = begin()
    session = visits.arrive("a.1")
    opened = session.open(picture)
    assert visits.memory == 0
    assert opened.file.read_bytes() == picture.read_bytes() and opened.file.parent == session.folder
    gc.collect()
    decoded = [each for each in gc.get_objects() if issubclass(type(each), Image.Image) and each.size == (SIDE, SIDE)]
    assert decoded == []


def test_two_hundred_visits_leave_a_flat_line(begin: Callable[..., Visits], clock: Clock, picture: Path) -> None:
    """The quick form of `python bench/web.py --soak 200`."""
    Image.new("RGB", (SIDE, SIDE)).save(picture)  # quick to write
    visits = begin(visits=16)
    alive: list[weakref.ref[Session]] = []
    lines = []
    for number in range(200):
        clock.now += 30.0
        name = f"{number}.x"
        session = visits.arrive(name)
        alive.append(weakref.ref(session))
        with visits.page_open(name):
            token, folder = visits.begin_upload(str(number), picture.stat().st_size)
            (folder / "noise.png").write_bytes(picture.read_bytes())
            session.open(visits.uploaded(name, token))
            visits.end_upload(token, name)
        del session
        if number % 20 != 19:
            continue
        gc.collect()
        living = sum(each() is not None for each in alive)
        lines.append((len(visits), living, visits.memory, len(list(visits.place.iterdir()))))
    assert max(lines) == lines[-1] == (16, 16, 0, 16)
    clock.now += 3600.0
    visits.sweep()
    gc.collect()
    assert [each for each in alive if each() is not None] == []
    assert list(visits.place.iterdir()) == []


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_freed_memory_is_given_back() -> None:
    kept = [bytearray(100_000) for _ in range(1000)]
    del kept[::2]  # holes between what stays
    before = resident()
    give_memory_back()
    assert resident() < before - 25_000_000
    assert len(kept) == 500


def test_an_upload_is_its_senders_alone_and_goes_when_nobody_opens_it(
    begin: Callable[..., Visits], clock: Clock
) -> None:
    visits = begin(absent=600.0)
    visits.arrive("a.1")
    visits.arrive("b.1")
    token, folder = visits.begin_upload("a", 10)
    (folder / "x.png").write_bytes(b"x")
    with pytest.raises(InputError, match="not here any more"):
        visits.uploaded("b.1", token)
    visits.end_upload(token, "b.1")
    assert visits.uploaded("a.1", token).read_bytes() == b"x"
    with pytest.raises(InputError, match="lost its visit"):
        visits.begin_upload("nobody", 10)
    with visits.page_open("a.1"):
        clock.now = 600.0
        visits.sweep()
        assert visits.files == 0 and not folder.exists()


def invert(session: Session, picture: Path) -> None:
    """Keep an inversion of as many bytes as the picture has."""
    nothing, original = torch.empty(0), torch.zeros((SIDE, SIDE, 3), dtype=torch.uint8)
    inversion = Inversion(nothing, nothing, nothing, (original,), InversionSettings())
    session._keep((session.open(picture), "", Basis(4, 1)), inversion)


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def names(visits: Visits) -> set[str]:
    found: set[Any] = set(visits._visits)
    return found
