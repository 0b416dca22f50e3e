"""`ledits web`: the page served on this machine until Ctrl-C. Only what is named here leaves or enters it."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledits_min.app.inputs import parts
from ledits_min.app.terminal import say, tell
from ledits_min.errors import InputError, check_whole

if TYPE_CHECKING:
    from ledits_min.app.web.door import Door
    from ledits_min.app.web.page import Page

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")
PORTS = range(7860, 7960)
SWEEP = 30.0  # seconds between two looks for visits that nobody is there for


def check_web(args: argparse.Namespace) -> None:
    """What can be refused before torch and Gradio are imported."""
    from ledits_min.weights.read.survey import survey_whole

    check_whole("--port", args.port, 1, 65_535, optional=True)
    try:
        found = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found or int(found.split(".")[0]) < 6:
        have = f"Gradio {found} is too old" if found else "Gradio is not installed"
        raise InputError(f"`ledits web` needs Gradio 6, and {have}; run: pip install 'ledits-min[web]'")
    args.models = args.models or ["tiny"]
    chosen = parts(args)
    if len(set(args.models)) > 1 and any(chosen.values()):
        options = ", ".join(f"--{name.replace('_', '-')}" for name, value in chosen.items() if value)
        raise InputError(f"{options} would change each of {len(set(args.models))} models; name one --model with it")
    for name in args.models:
        survey_whole(name, **chosen)


def serve(args: argparse.Namespace) -> None:
    """Load the first model, open the page, print its address, and wait."""
    with tempfile.TemporaryDirectory(prefix="ledits-web-") as folder, listening(args.host, args.port) as listener:
        place = Path(os.path.realpath(folder))
        quiet_gradio(place)
        from ledits_min.app.web.models import Models
        from ledits_min.app.web.notices import warnings_to_visitors
        from ledits_min.app.web.page import Page

        port = listener.getsockname()[1]
        models = Models(args.models, args.device, args.dtype, compile=args.compile, **parts(args))
        with warnings_to_visitors():
            page = Page(models, place)
            try:
                with running(door(page, args.host, port), listener):
                    if args.host not in LOCAL:
                        say(f"warning: --host {args.host}: whoever reaches this machine can use the page")
                    shown = f"[{args.host}]" if ":" in args.host else args.host
                    tell(f"ledits is at http://{shown}:{port}/  (Ctrl-C ends it)")
                    waiting = threading.Event()
                    while not waiting.wait(SWEEP):
                        page.sweep()
                        give_memory_back()
            finally:
                page.visits.close()
                models.close()


def give_memory_back() -> None:
    """To the system, what pictures and inversions have freed.

    glibc keeps it where something still in use lies above it, and a server's memory would grow with its visitors
    beyond what they hold. Other C libraries have no such call.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def quiet_gradio(place: Path) -> None:
    """Before Gradio is imported, which reads them then: no telemetry, and what it may store lies where ours does."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(place)


@contextmanager
def listening(host: str, port: int | None) -> Iterator[socket.socket]:
    """A socket that is bound; where no port is named, to the first free one, and to any for port 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    failed: OSError | None = None
    for each in PORTS if port is None else (port,):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, each))
            listener.listen(128)
        except OSError as error:
            failed = error
            listener.close()
            continue
        with listener:
            yield listener
        return
    where = f"{PORTS[0]} to {PORTS[-1]}" if port is None else str(port)
    raise InputError(f"{host} port {where}: {failed}; pass another --port, or another --host")


def door(page: Page, host: str, port: int) -> Door:
    """The page as an ASGI application, with Gradio behind the door."""
    import gradio as gr
    from fastapi import FastAPI

    from ledits_min.app.web.door import Door
    from ledits_min.app.web.layout import ARROWS, HEAD, SAMPLES, STYLE

    fonts = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="zinc", font=fonts, font_mono=mono)
    theme.set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_800",
        link_text_color="*primary_700", link_text_color_dark="*primary_400",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip
    settings: dict[str, Any] = {
        "show_error": False, "footer_links": [], "ssr_mode": False, "enable_monitoring": False, "pwa": False,
        "mcp_server": False, "run_history": False, "theme": theme, "css_paths": STYLE, "head": HEAD, "js": ARROWS,
    }  # fmt: skip
    page.blocks.state_session_capacity = page.visits.limits.visits
    app = gr.mount_gradio_app(FastAPI(openapi_url=None), page.blocks, "", host, port, **settings)
    events = {number: len(event.inputs) for number, event in page.blocks.fns.items()}
    return Door(app, page.visits, events, names_of(host), port, SAMPLES, page.unread)


def names_of(host: str) -> set[str]:
    """The names that a browser may know this server by; on all interfaces `door.py` allows any address as well."""
    here = {host.lower(), socket.gethostname().lower()}
    return here | set(LOCAL) if host in (*LOCAL, *EVERYWHERE) else here


@contextmanager
def running(app: Any, listener: socket.socket) -> Iterator[None]:
    """Served from a thread for as long as the block runs."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="critical", access_log=False, ws="none", server_header=False, proxy_headers=False,
        timeout_keep_alive=15, limit_concurrency=512, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.05)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
