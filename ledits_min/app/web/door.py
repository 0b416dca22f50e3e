"""What may come in to the page of `ledits web`, and what goes out: an ASGI application around Gradio's.

Gradio serves files by their path, fetches addresses that it is handed, and takes whatever name a client gives itself.
None of that is reached from outside: this door lets through the few routes that the page itself uses, with plain values
alone; pictures come and go by routes of its own, each only for the browser that they belong to; and a visit's name is
made here, from a secret, the browser's cookie and what the client calls itself, so that no client can take another's.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import parse_qs, unquote

import anyio.to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from ledits_min import InputError
from ledits_min.app.terminal import one_line, say
from ledits_min.app.web.visits import Visits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 2**20  # of what an event sends: values of the page, and the history that a browser kept
MAX_TEXT = 400_000
MAX_UNREAD = 200  # answers that wait for a page to read them
LONGEST_TURN = 1.0  # seconds until the next page is loaded, whatever the one before still waits for

_PAGE = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/gradio_api/startup-events")
_RENDERED = ("/", "/config")
_PARTS = ("/assets/", "/static/", "/svelte/")
_JOIN = "/gradio_api/queue/join"
_EVENTS = (_JOIN, "/gradio_api/run/predict")
_HEARTBEAT, _QUEUE = "/gradio_api/heartbeat/", "/gradio_api/queue/data"
_CLIENT = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what a client calls itself
_NOT_PASSED_ON = ("cookie", "origin", "referer", "authorization", "forwarded", "x-forwarded-host", "x-forwarded-for",
                  "x-forwarded-port", "x-forwarded-prefix", "content-type", "content-length", "range")  # fmt: skip

_GUARD = {
    # Gradio makes functions of strings, and styles by hand; everything it loads is its own.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}


class Refused(Exception):
    """A request that does not come in: its status, and one line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Door:
    """`app` is Gradio's, `events` the number of values that each of its events takes, `names` those of this server.

    unread  how many answers of a visit wait in Gradio's queue
    """

    def __init__(
        self, app: App, visits: Visits, events: dict[int, int], names: Iterable[str], port: int, samples: list[Path],
        unread: Callable[[str], int] = lambda name: 0,
    ) -> None:  # fmt: skip
        self._unread = unread
        self._app, self._visits, self._events, self._samples = app, visits, events, samples
        self._names, self._port = frozenset(names), port
        self._secret = secrets.token_bytes(32)
        self._cookie = f"ledits_{port}"  # browsers keep cookies by name and host, whatever the port
        self._arriving = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, fresh = False, ""

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                for name, value in _GUARD.items():
                    headers[name] = value
                if fresh:
                    headers.append("set-cookie", f"{self._cookie}={fresh}; Path=/; HttpOnly; SameSite=Lax")
            await send(message)

        response: Response
        try:
            headers = Headers(scope=scope)
            self._check_names(headers)
            browser = self._browser(headers)
            if not browser and scope["path"] == "/":
                browser = secrets.token_urlsafe(24)
                fresh = f"{browser}.{self._sign('cookie', browser)}"
            await self._route(scope, receive, guarded, headers, self._sign("owner", browser)[:20] if browser else "")
            return
        except Refused as error:
            response = PlainTextResponse(f"{error}\n", error.status)
        except InputError as error:
            response = PlainTextResponse(f"{error}\n", 422)
        except Exception as error:  # noqa: BLE001 - what a request runs into is a line at the terminal
            say(f"warning: a request to the page failed: {one_line(error)}")
            response = PlainTextResponse("this request went wrong\n", 500)
        if not begun:
            await response(scope, receive, guarded)

    async def _route(self, scope: Scope, receive: Receive, send: Send, headers: Headers, owner: str) -> None:
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            if path in _PAGE or path.startswith(_PARTS) and ".." not in path:
                serve = self._in_turn if path in _RENDERED else self._app
                await serve(_passed_on(scope, headers), receive, send)
            elif path.startswith("/samples/"):
                await self._sample(path)(scope, receive, send)
            elif not owner:
                raise Refused(403, "this browser has no visit here; load the page first")
            elif path.startswith("/kept/"):
                found = await anyio.to_thread.run_sync(self._visits.file, owner, path.removeprefix("/kept/"))
                if found is None:
                    raise Refused(404, "there is no such picture here, or not for you")
                await FileResponse(found, headers={"cache-control": "private, no-store"})(scope, receive, send)
            elif path.startswith(_HEARTBEAT):
                name = self._name(owner, path.removeprefix(_HEARTBEAT))
                with self._visits.page_open(name):
                    await self._app(_passed_on(scope, headers, path=_HEARTBEAT + name), receive, send)
            elif path == _QUEUE:
                (client,) = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[:1]
                query = f"session_hash={self._name(owner, client)}"
                with suppress(RuntimeError):  # Starlette's, where Gradio finds that nobody waits for anything
                    await self._app(_passed_on(scope, headers, query=query), receive, send)
            else:
                raise Refused(404, "there is nothing here")
        elif method == "POST" and path in (*_EVENTS, "/upload"):
            if not owner:
                raise Refused(403, "this browser has no visit here; load the page first")
            if path == "/upload":
                response = await self._upload(receive, headers, owner)
                await response(scope, receive, send)
            else:
                event = self._event(await _body(receive), owner)
                if path == _JOIN and self._unread(event["session_hash"]) >= MAX_UNREAD:
                    raise Refused(429, "this page does not read its answers; reload it")
                body = json.dumps(event).encode()
                serve = self._app if event["session_hash"] in self._visits else self._in_turn
                await serve(_passed_on(scope, headers, body=body), _said_once(body, receive), send)
        elif method == "POST":
            raise Refused(404, "there is nothing here")
        else:
            raise Refused(405, "only GET, HEAD and POST are served")

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One page load after the other: who is here already waits for one of them and not for all at once.

        Gradio computes for a tenth of a second on each, and nothing else is answered meanwhile.
        """
        async with self._arriving:
            serving = asyncio.ensure_future(self._app(scope, receive, send))
            await asyncio.wait([serving], timeout=LONGEST_TURN)
        await serving

    def _check_names(self, headers: Headers) -> None:
        """DNS can be made to point any name at this machine; only its own are answered, and only pages of its own."""
        host = headers.get("host", "")
        name, _, _ = host.rpartition(":") if re.search(r":\d+$", host) else (host, "", "")
        if not self._is_ours(name.lower().strip("[]")):
            raise Refused(421, "this page does not go by that name; use the address that `ledits web` printed, or "
                               "start it with --host NAME")  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            raise Refused(403, "this request comes from another page")

    def _is_ours(self, name: str) -> bool:
        if name in self._names:
            return True
        try:  # on all interfaces, any of the machine's addresses; no name points at an address by itself
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return bool(self._names & {"0.0.0.0", "::"})

    def _browser(self, headers: Headers) -> str:
        """What the cookie says, if it is one of ours."""
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        browser, _, signature = (morsel.value if morsel else "").partition(".")
        known = hmac.compare_digest(signature.encode(), self._sign("cookie", browser).encode())
        return browser if browser and known else ""

    def _sign(self, *what: str) -> str:
        return hmac.digest(self._secret, json.dumps(what).encode(), "sha256").hex()

    def _name(self, owner: str, client: str) -> str:
        """A visit's name, from what its client calls itself."""
        if not _CLIENT.fullmatch(client):
            raise Refused(400, "the session's name is not one")
        return f"{owner}.{self._sign('visit', owner, client)[:20]}"

    def _event(self, body: bytes, owner: str) -> dict[str, Any]:
        """The event as Gradio is handed it: its values are plain ones, as many as it takes."""
        try:
            asked = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(asked, dict):
            raise Refused(400, "the body is not an object")
        number, values, client = asked.get("fn_index"), asked.get("data"), asked.get("session_hash")
        if type(number) is not int or number not in self._events:
            raise Refused(400, "there is no such event")
        if not isinstance(values, list) or len(values) != self._events[number] or not all(map(_is_plain, values)):
            raise Refused(400, "an event takes plain values, and as many as it has")
        if not isinstance(client, str):
            raise Refused(400, "the session has no name")
        told, trigger = asked.get("event_data"), asked.get("trigger_id")
        index, token = (told.get("index"), told.get("token")) if isinstance(told, dict) else (None, None)
        return {
            "data": values,
            "fn_index": number,
            "session_hash": self._name(owner, client),
            "trigger_id": trigger if type(trigger) is int else None,
            "event_data": {
                "index": index if type(index) is int else None,
                "token": token if isinstance(token, str) and len(token) <= 64 else None,
            },
        }

    async def _upload(self, receive: Receive, headers: Headers, owner: str) -> Response:
        """The body is the file, its name a header's."""
        length = headers.get("content-length", "")
        if not re.fullmatch(r"\d{1,12}", length):
            raise Refused(411, "an upload says its length")
        token, folder = await anyio.to_thread.run_sync(self._visits.begin_upload, owner, int(length))
        try:
            async with await anyio.open_file(folder / _file_name(headers.get("x-name", "")), "wb") as file:
                received = 0
                async for chunk in _chunks(receive):
                    received += len(chunk)
                    if received > int(length):
                        raise Refused(400, "the upload is longer than it said")
                    await file.write(chunk)
        except BaseException:
            self._visits.end_upload(token)
            raise
        return JSONResponse({"token": token})

    def _sample(self, path: str) -> Response:
        number = re.fullmatch(r"/samples/(\d{1,2})\.png", path)
        if number is None or int(number[1]) >= len(self._samples):
            raise Refused(404, "there is no such sample")
        return FileResponse(self._samples[int(number[1])], headers={"cache-control": "public, max-age=3600"})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= MAX_TEXT)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _file_name(header: str) -> str:
    """As the visitor knows it, and nothing but a name."""
    name = PurePath(unquote(header).replace("\\", "/")).name
    name = "".join(letter for letter in name if letter.isprintable() and letter != "\x00").strip()
    stem, suffix = PurePath(name).stem[:100], PurePath(name).suffix[:16]
    return f"{stem}{suffix}" if stem.strip(". ") else "picture"


def _passed_on(
    scope: Scope, headers: Headers, path: str | None = None, query: str = "", body: bytes | None = None
) -> Scope:
    """The request as Gradio sees it: nothing in it that the page itself would not send."""
    passed = [(name, value) for name, value in headers.raw if name.decode("latin-1") not in _NOT_PASSED_ON]
    if body is not None:
        passed += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    new = {**scope, "headers": passed, "query_string": query.encode()}
    return new if path is None else {**new, "path": path, "raw_path": path.encode()}


async def _chunks(receive: Receive) -> Any:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request broke off")
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    async for chunk in _chunks(receive):
        body += chunk
        if len(body) > MAX_BODY:
            raise Refused(413, "the body is too long")
    return bytes(body)


def _said_once(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what comes after it."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
