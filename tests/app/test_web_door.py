"""What comes in to the page of `ledits web` from outside: nobody else's files, no address fetched, no other name."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from ledits_min.app.web.models import Models
from ledits_min.app.web.visits import Limits, Visits
from ledits_min.weights.read.survey import TINY

pytest.importorskip("gradio", reason="the [web] extra is not installed")
httpx = pytest.importorskip("httpx", reason="httpx, the test client, is not installed")

from starlette.responses import PlainTextResponse  # noqa: E402

from ledits_min.app.web import door as web_door  # noqa: E402
from ledits_min.app.web.page import Page  # noqa: E402
from ledits_min.app.web.server import door, listening, names_of, quiet_gradio, running  # noqa: E402

SAMPLE = TINY / "samples" / "portrait1.png"


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    models = Models(["tiny"])
    yield models
    models.close()


class Served:
    """The page as `ledits web` serves it, on a port of this machine alone."""

    def __init__(self, page: Page, app: Any, port: int) -> None:
        self.page, self.app, self.port = page, app, port
        self.cookie = f"ledits_{port}"
        self.clients: list[Any] = []

    def browser(self) -> Any:
        """Cookies of its own."""
        self.clients.append(httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60))
        return self.clients[-1]


@contextmanager
def serving(models: Models, place: Path, limits: Limits | None = None) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, listening("127.0.0.1", 0) as listener:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # put back afterwards
        quiet_gradio(place)
        page, port = Page(models, place, limits), listener.getsockname()[1]
        served = Served(page, door(page, "127.0.0.1", port), port)
        try:
            with running(served.app, listener):
                yield served
        finally:
            for client in served.clients:
                client.close()
            page.visits.close()


@pytest.fixture(scope="module")
def served(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(models, tmp_path_factory.mktemp("place").resolve()) as served:
        yield served


@pytest.fixture
def visitor(served: Served, bench_web: Any) -> Any:
    return bench_web.Visitor(served.browser())


@pytest.fixture(scope="module")
def guest(served: Served, bench_web: Any) -> Any:
    """One who has opened a picture, for tests that leave it as it is."""
    guest = bench_web.Visitor(served.browser())
    guest.open(SAMPLE)
    return guest


@pytest.fixture
def sealed(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whatever would leave the process, but for the test's own way to the page."""
    left: list[Any] = []

    def seal(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def refuse(*args: Any, **named: Any) -> Any:
            if ("127.0.0.1", served.port) in args or args[:2] == ("127.0.0.1", served.port):
                return original(*args, **named)
            left.append((name, args))
            raise OSError("sealed")

        monkeypatch.setattr(owner, name, refuse)

    for name in ("connect", "connect_ex", "sendto"):
        seal(socket.socket, name)
    for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr", "create_connection"):
        seal(socket, name)
    return left


ELSEWHERE = ["http://127.0.0.1:9/x.png", "https://example.org/x.png", "//example.org/x", "ftp://example.org/x"]


@pytest.mark.parametrize("address", ELSEWHERE)
def test_no_address_is_fetched_for_a_visitor(
    visitor: Any, sealed: list[Any], address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    get = visitor.client.get
    for route in ("file=", "file/", "proxy=", "stream/", "custom_component/"):
        assert get(f"/gradio_api/{route}{address}").status_code == 404
    file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
    for event in visitor.events():
        values = [file] * len(event["inputs"]) or [file]
        for route in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
            assert visitor.post(route, event["id"], values).status_code == 400
    assert get("/", params={"deep_link": address}).status_code == 200
    assert get("/config", params={"deep_link": address}).status_code == 200
    visitor.call("upload", "upload", told={"token": address})
    assert "not here any more" in visitor.said
    assert sealed == []
    assert capfd.readouterr() == ("", "")


def test_a_whole_visit_sends_nothing(visitor: Any, sealed: list[Any]) -> None:
    visitor.open(SAMPLE)
    assert "+ sunglasses" in visitor.edit("sunglasses")
    assert sealed == []


def test_only_the_browser_that_a_picture_belongs_to_is_served_it(bench_web: Any, served: Served, visitor: Any) -> None:
    visitor.open(SAMPLE)
    (mine,) = visitor.pictures("slider")
    assert visitor.client.get(mine).headers["content-type"] == "image/png"
    other = bench_web.Visitor(served.browser())
    other.open(SAMPLE)
    assert other.client.get(mine).status_code == 404
    nobody = served.browser()
    assert nobody.get(mine).status_code == 403
    nobody.cookies.set(served.cookie, "made.up")
    assert nobody.get(mine).status_code == 403
    other.client.cookies.set(served.cookie, visitor.client.cookies[served.cookie][:-1] + "x")
    assert other.client.get(mine).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/kept/../../etc/passwd", "/kept/%2e%2e/%2e%2e/etc/passwd", "/kept//etc/passwd",
        "/kept/" + "a/" * 2000, "/kept/%00", "/kept/", "/samples/-1.png", "/samples/99.png", "/samples/0.png/..",
        "/assets/../../__init__.py", "/static/%2e%2e/%2e%2e/routes.py", "/gradio_api/file=/etc/passwd",
        "/gradio_api/info", "/gradio_api/openapi.json", "/monitoring", "/gradio_api/vibe-code/", "/docs", "/login",
    ],
)  # fmt: skip
def test_no_other_file_and_no_other_route(guest: Any, path: str) -> None:
    answer = guest.client.get(path)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text and "Traceback" not in answer.text


def test_a_link_in_a_visits_folder_is_not_followed(served: Served, visitor: Any) -> None:
    visitor.open(SAMPLE)
    (mine,) = visitor.pictures("slider")
    (folder,) = served.page.visits.place.rglob(Path(mine).parts[-2])
    (folder / "picture-99.png").symlink_to(SAMPLE)
    assert visitor.client.get(f"/kept/{folder.name}/picture-99.png").status_code == 404


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", {"host": "127.0.0.1:7860"}, 200),
        ("127.0.0.1", {"host": "localhost:7860"}, 200),
        ("127.0.0.1", {"host": "[::1]:7860"}, 200),
        ("127.0.0.1", {"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ("127.0.0.1", {"host": "evil.example:7860"}, 421),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}, 421),
        ("127.0.0.1", {"host": "192.0.2.7:7860"}, 421),
        ("127.0.0.1", {"host": ""}, 421),
        ("127.0.0.1", {"origin": "http://evil.example"}, 403),
        ("127.0.0.1", {"origin": "http://127.0.0.1:9999"}, 403),
        ("127.0.0.1", {"origin": "null"}, 403),
        ("0.0.0.0", {"host": "192.0.2.7:7860"}, 200),
        ("0.0.0.0", {"host": "evil.example:7860"}, 421),
        ("lab.example", {"host": "lab.example:7860"}, 200),
        ("lab.example", {"host": "192.0.2.7:7860"}, 421),
    ],
)
def test_only_its_own_names_and_its_own_pages(
    served: Served, monkeypatch: pytest.MonkeyPatch, host: str, headers: dict[str, str], status: int
) -> None:
    monkeypatch.setattr(served.app, "_names", frozenset(names_of(host)))  # as if it had been started with that --host
    headers = {name: value.replace("7860", str(served.port)) for name, value in headers.items()}
    answer = served.browser().get("/robots.txt", headers=headers)
    assert answer.status_code == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_preflight_is_not_answered(visitor: Any) -> None:
    answer = visitor.client.options(
        "/gradio_api/queue/join", headers={"origin": "http://evil.example", "access-control-request-method": "POST"}
    )
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_no_client_takes_the_visit_of_another(bench_web: Any, served: Served, visitor: Any) -> None:
    visitor.open(SAMPLE)
    other = bench_web.Visitor(served.browser(), name=visitor.name)  # calls itself the same
    assert other.call("history", "select", told={"index": 0}) and "no such edit" in other.said
    assert other.visit != visitor.visit
    visitor.edit("sunglasses")  # has its picture still
    stranger = bench_web.Visitor(served.browser(), name="stranger", before=visitor.visit)
    assert stranger.pictures("history") == []  # a visit can be gone on with by its own browser alone


def test_a_browser_goes_on_with_its_visit_after_a_reload(bench_web: Any, visitor: Any) -> None:
    visitor.open(SAMPLE)
    visitor.edit("sunglasses")
    again = bench_web.Visitor(visitor.client, name="again", before=visitor.visit)
    assert len(again.pictures("history")) == 1 and len(again.pictures("slider")) == 2
    assert "reused" in again.edit("glasses")


def test_what_a_browser_has_kept_brings_words_and_numbers_back(bench_web: Any, served: Served, visitor: Any) -> None:
    visitor.open_sample(1)
    visitor.edit("a red hat")
    kept = visitor.values["kept"]
    later = bench_web.Visitor(served.browser(), kept=kept)  # another server, for all it knows
    assert len(later.pictures("history")) == 1
    later.call("history", "select", told={"index": 0})
    assert "press Edit" in later.said and "portrait2.png" in later.said
    assert later.values["text"] == "a red hat"
    assert "Inverted in" in later.edit()


@pytest.mark.parametrize(
    "kept",
    [
        "no JSON", "[" * 5000, "{}", "[1, null, {}]", json.dumps([{"model": "tiny", "source": "x", "thumbnail": "y"}]),
        json.dumps([{"model": "tiny", "source": "../../etc/passwd", "thumbnail": "data:image/jpeg;base64,AAAA",
                     "values": ["", "", "", 3.5, 6, 2, 0, 1, 0, "ddpm", 1,
                                *["add", "hat", 1, 0.5, 1, 0, "both"] * 6]}]),
        json.dumps([{"model": "/etc", "source": 1, "thumbnail": [], "values": "x"}] * 1000),
    ],
)  # fmt: skip
def test_what_a_browser_has_kept_may_hold_anything(
    bench_web: Any, served: Served, kept: str, capfd: pytest.CaptureFixture[str]
) -> None:
    visitor = bench_web.Visitor(served.browser(), kept=kept)
    assert visitor.pictures("history") == [] and visitor.said == ""
    assert capfd.readouterr() == ("", "")


MALFORMED: list[Any] = [
    b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b'"x"', b"[" * 20_000, b'{"data": NaN}', b'{"data": [1' + b"0" * 9000,
    {}, {"fn_index": 0}, {"fn_index": "0", "data": []}, {"fn_index": -1, "data": []}, {"fn_index": 10**9, "data": []},
    {"fn_index": True, "data": []}, {"fn_index": 0, "data": {}}, {"fn_index": 0, "data": [1] * 500},
    {"fn_index": 0, "data": ["x" * 500_000, ""]}, {"fn_index": 0, "data": [[], {}]},
    {"fn_index": 0, "data": ["", ""], "session_hash": None}, {"fn_index": 0, "data": ["", ""], "session_hash": "../x"},
    {"fn_index": 0, "data": ["", ""], "session_hash": "x" * 100}, {"fn_index": 0, "data": ["", ""], "session_hash": ""},
]  # fmt: skip


def test_malformed_requests_are_a_line_to_who_sent_them_and_none_to_the_terminal(
    visitor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    for body in MALFORMED:
        for route in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = visitor.client.post(route, content=content)
            assert answer.status_code in (400, 413) and answer.text.count("\n") == 1, body
    assert visitor.client.post("/gradio_api/queue/join", content=b" " * (2**20 + 1)).status_code == 413
    assert visitor.client.put("/").status_code == 405
    assert visitor.client.get("/gradio_api/queue/data", params={"session_hash": "a/b"}).status_code == 400
    assert visitor.client.get("/gradio_api/heartbeat/a.b").status_code == 400
    assert visitor.client.get("/gradio_api/queue/data").status_code == 400
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("index", [-100, -1, 6, 10**9, "x", None, True, 1.5, [], {}])
@pytest.mark.parametrize("where", ["samples", "examples", "suggestions", "history"])
def test_an_index_of_nothing_is_refused(guest: Any, where: str, index: Any, capfd: pytest.CaptureFixture[str]) -> None:
    index = 10 if (where, index) == ("suggestions", 6) else index
    guest.call(where, "select", told={"index": index})
    assert "there is no such" in guest.said and "fault" not in guest.said
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", "x", "steps is"), ("steps", None, "steps is empty"), ("steps", 10**30, "steps is"),
        ("skip", -1, "skip"), ("seed", 1.5, "seed is"), ("eta", "1", "eta is"), ("eta", None, "eta is"),
        ("solver", "ddim", "solver is 'ddim'"), ("solver", None, "solver is"),
        ("mask", "words", "the mask of 'sunglasses'"), ("mask", None, "the mask of"),
        ("size", -5, "size is"), ("guidance", True, "target scale is"), ("target", 5, "target is no text"),
        ("source", None, "source is no text"), ("negative", "x" * 3000, "negative has 3000 characters"),
        ("source", "hat \ud800", "which holds half a character"),
        ("text", "\udfff", "half a character"), ("count", 99, "number of concepts"),
        ("mode", "rm", "add or remove is wanted"),
        ("scale", "2", "the scale of"), ("threshold", 2, "the threshold of"), ("warmup", -1, "first step of"),
        ("cooldown", "", "last step of"), ("text", "  ", "nothing is asked for"), ("text", "bicycle", "does not know"),
        ("model", "/etc/passwd", "not one of the models"), ("model", 1, "models"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_a_line_under_the_picture(
    guest: Any, name: str, value: Any, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(guest.values)
    guest.values |= {"text": "sunglasses", name: value}
    guest.edit()
    said, guest.values = guest.said, before
    assert says in said and "fault" not in said
    assert capfd.readouterr() == ("", "")


def test_no_path_of_this_machine_is_told(served: Served, visitor: Any) -> None:
    told = visitor.client.get("/config").text + visitor.client.get("/").text
    for path in (served.page.visits.place, TINY, Path(__file__).parents[2], Path.home(), Path.cwd()):
        assert str(path) not in told
    visitor.open(SAMPLE)
    visitor.edit("sunglasses")
    assert str(served.page.visits.place) not in json.dumps(visitor.values)


@pytest.mark.parametrize("longest", [60.0, 0.01], ids=["one at a time", "one that hangs"])
def test_who_is_here_does_not_wait_for_those_who_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: float
) -> None:
    monkeypatch.setattr(web_door, "LONGEST_TURN", longest)
    visits, begun, names = Visits(cast(Models, None), tmp_path), list[str](), list[str]()
    go_on = asyncio.Event()

    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope["path"])
        if scope["method"] == "POST":
            names.append(json.loads((await receive())["body"])["session_hash"])
        elif begun.count("/") == 2:  # the first of those who arrive
            await go_on.wait()
        await PlainTextResponse("")(scope, receive, send)

    async def crowd() -> None:
        way = httpx.ASGITransport(web_door.Door(gradio, visits, {0: 0}, ["here"], 80, []))
        async with httpx.AsyncClient(transport=way, base_url="http://here") as client:
            await client.get("/")

            async def ask(name: str) -> Any:
                event = {"fn_index": 0, "data": [], "session_hash": name}
                return await client.post("/gradio_api/run/predict", json=event)

            await ask("visitor")
            visits.arrive(names[-1])
            arriving = [asyncio.create_task(client.get("/")) for _ in range(5)]
            arriving += [asyncio.create_task(ask(f"other{number}")) for number in range(5)]
            await asyncio.sleep(0.01)
            assert (await ask("visitor")).status_code == 200 and not arriving[0].done()
            if longest < 1.0:
                await asyncio.wait(arriving[1:])
            assert len(begun) == (13 if longest < 1.0 else 4)
            go_on.set()
            assert {answer.status_code for answer in await asyncio.gather(*arriving)} == {200}

    asyncio.run(crowd())


def test_a_page_that_reads_no_answers_is_given_no_more(
    served: Served, visitor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_door, "MAX_UNREAD", 5)
    post, answers = visitor.post, list[Any]()

    def kept(*asked: Any) -> Any:
        answers.append(post(*asked))
        return answers[-1]

    visitor.post, visitor._wait_for = kept, lambda event: None
    for _ in range(8):
        visitor.open_sample(0)
    while served.page.blocks._queue.event_ids_to_events:
        time.sleep(0.01)
    visitor.open_sample(0)
    assert answers[0].status_code == 200
    assert (answers[-1].status_code, answers[-1].text) == (429, "this page does not read its answers; reload it\n")


def test_nothing_is_kept_of_visits_that_are_over(bench_web: Any, models: Models, tmp_path: Path) -> None:
    with serving(models, tmp_path.resolve(), Limits(visits=2)) as served:
        queue = served.page.blocks._queue
        for number in range(6):
            visitor = bench_web.Visitor(served.browser())
            if number % 2:
                visitor._wait_for = lambda event: None  # asks, and never reads the answer
            visitor.open_sample(0)
        kept = queue.pending_event_ids_session, queue.pending_messages_per_session
        assert [len(each) for each in kept] == [6, 6]
        while queue.event_ids_to_events:
            time.sleep(0.01)
        served.page.sweep()
        assert [len(each) for each in kept] == [2, 2] == [len(served.page.blocks.state_holder.session_data)] * 2
        assert all(name in served.page.visits for each in kept for name in each)


def test_uploads_are_bounded(bench_web: Any, models: Models, tmp_path: Path) -> None:
    limits = Limits(upload=40_000, files=400_000)
    with serving(models, tmp_path.resolve(), limits) as served:
        page, visitor = served.page, bench_web.Visitor(served.browser())
        assert visitor.client.post("/upload", content=b"x" * 40_001).status_code == 422
        assert visitor.client.post("/upload", content=iter([b"x"])).status_code == 411
        for _ in range(30):  # never opened: only the last two are kept
            assert visitor.client.post("/upload", content=b"x" * 40_000).status_code == 200
        assert page.visits.files <= 80_000
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 80_000
        clients = [bench_web.Visitor(served.browser()).client for _ in range(12)]
        answers = [client.post("/upload", content=b"x" * 40_000) for client in clients]
        assert page.visits.files <= 400_000
        assert {answer.status_code for answer in answers} <= {200, 422}


@pytest.mark.parametrize("name", ["../../x.png", "/etc/passwd", "..", "", "a\0b.png", "x" * 5000, "%2e%2e%2fx.png"])
def test_the_name_of_an_upload_is_a_name(visitor: Any, served: Served, name: str) -> None:
    before = set(served.page.visits.place.parent.iterdir())
    visitor.open(SAMPLE, name=name)
    assert visitor.pictures("slider"), visitor.said
    assert set(served.page.visits.place.parent.iterdir()) == before
