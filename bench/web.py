"""The newcomer's path through `ledits web`, in a real browser: from the command to the first edit of one's own.

`python bench/web.py` prints the seconds; with --results it writes bench/results/web.json and the picture of the page,
web.png. `--soak 200 --results` visits it without a browser, one after the other and then 80 at once, and writes
web_soak.json: what the server holds meanwhile, who is served, and how soon.
The page's tests start it, the browser and visitors without one with what is here.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

RESULTS = Path(__file__).parent / "results"
SAMPLE = Path(__file__).parents[1] / "weights/tiny/samples/portrait1.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds that a step in the browser may take
CROWDED = 600.0  # seconds that a visitor among many may wait


def chromium() -> str | None:
    """The path of a browser that playwright can drive, if one is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def served(*options: str, temporary: Path | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`ledits web` in a process of its own on a free port: its address, as it printed it, and the process.

    temporary  the folder for its temporary files
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ledits_min.app.cli", "web", "--port", str(port), *options]
    env = os.environ | ({} if temporary is None else {"TMPDIR": str(temporary)})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert "http://" in line, process.stderr.read()
        yield line[line.index("http://") :].split()[0], process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def browsing() -> Iterator[Browser]:
    """A headless browser; its own services are told to stay at home."""
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=quiet)
        yield browser
        browser.close()


def visit(browser: Browser, address: str, **options: Any) -> Page:
    """A visitor of their own: another context is another person."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    return page


def open_picture(page: Page, path: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#stage").wait_for()


def words_asked(page: Page) -> Locator:
    """The boxes with the words of each concept."""
    return page.locator(".concept:visible .text :is(textarea, input)")


def edit(page: Page, *words: str) -> str:
    """Ask for concepts, one per row, and wait for the picture; what the page says of it."""
    for index, text in enumerate(words):
        if words_asked(page).count() <= index:
            page.locator("#more").click()
        words_asked(page).nth(index).fill(text)
    for index in range(len(words), words_asked(page).count()):
        words_asked(page).nth(index).fill("")
    before = page.locator("#status").inner_text()
    page.wait_for_function("() => !document.querySelector('#run').disabled")
    page.locator("#run").click()
    page.wait_for_function("before => document.querySelector('#status').innerText != before", arg=before)
    page.locator("#run").wait_for()
    return page.locator("#status").inner_text()


class Visitor:
    """One load of the page. `values` are those of its parts by their names, `said` what stands under the picture.

    client  `httpx.Client` or what is like it, with the page's address as its base; its cookies say who it is
    kept    what the browser's storage has of earlier visits
    before  the visit that this tab showed before it was loaded again
    """

    def __init__(self, client: Any, name: str = "", kept: str = "", before: str = "") -> None:
        self.client, self.name = client, name or secrets.token_hex(5)
        client.get("/")
        self.config = client.get("/config").json()
        self._names = self._names_of_parts()
        self.values: dict[str, Any] = {
            self._names[part["id"]]: part["props"].get("value") for part in self.config["components"]
        }
        self.values |= {"kept": kept, "visit": before}
        self.call("page", "load")

    @property
    def said(self) -> str:
        return html.unescape(re.sub(r"<[^>]*>", " ", self.values["message"] or "")).strip()

    @property
    def visit(self) -> str:
        return str(self.values["visit"])

    def events(self) -> list[dict[str, Any]]:
        """Those that the server answers."""
        return [each for each in self.config["dependencies"] if each["backend_fn"]]

    def call(self, part: str, event: str, told: Any = None) -> bool:
        """One event, and what it changes; whether there was an answer."""
        (found,) = (
            each for each in self.events()
            if [part, event] in [[self._names.get(target, "page"), name] for target, name in each["targets"]]
        )  # fmt: skip
        return self._run(found, told)

    def open(self, path: Path, name: str | None = None) -> None:
        headers = {"x-name": quote(path.name if name is None else name)}
        answer = self.client.post("/upload", content=path.read_bytes(), headers=headers)
        assert answer.status_code == 200, answer.text
        self.call("upload", "upload", {"token": answer.json()["token"]})

    def open_sample(self, index: int) -> None:
        self.call("samples", "select", {"index": index})

    def edit(self, text: str | None = None) -> str:
        """What the page says of the edit, or why there is none."""
        if text is not None:
            self.values["text"] = text
        told = next(number for number, name in self._names.items() if name == "command")
        edit = next(each for each in self.events() if told in each["outputs"] and each["queue"] and each["inputs"])
        self.values["message"] = ""
        self._run(edit, None)
        return self.said or re.sub(r"<[^>]*>", " ", self.values["status"]).strip()

    def pictures(self, part: str) -> list[str]:
        return ["/" + source for source in re.findall(r'src="([^"]*)"', self.values[part] or "")]

    def post(self, route: str, number: int, values: list[Any], told: Any = None) -> Any:
        body = {"data": values, "fn_index": number, "session_hash": self.name, "event_data": told, "trigger_id": None}
        return self.client.post(route, content=json.dumps(body).encode())

    def _run(self, event: dict[str, Any], told: Any) -> bool:
        values = [self.values[self._names[part]] for part in event["inputs"]]
        if event["queue"] is False:
            answer = self.post("/gradio_api/run/predict", event["id"], values, told)
            output = answer.json() if answer.status_code == 200 else None
        else:
            answer = self.post("/gradio_api/queue/join", event["id"], values, told)
            output = self._wait_for(answer.json()["event_id"]) if answer.status_code == 200 else None
        if output is None:
            return False
        for part, value in zip(event["outputs"], output["data"], strict=True):
            update = isinstance(value, dict) and value.get("__type__") == "update"
            if not update:
                self.values[self._names[part]] = value
            elif "value" in value:
                self.values[self._names[part]] = value["value"]
        return True

    def _wait_for(self, number: str) -> dict[str, Any] | None:
        output = None
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as answer:
            for line in answer.iter_lines():  # to its end: nothing else is awaited
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if told.get("msg") == "process_completed" and told["event_id"] == number and told["success"]:
                    output = told["output"]
        return output

    def _names_of_parts(self) -> dict[int, str]:
        """A part's `elem_id`; those of a concept go by their class, with the concept's number from the second on."""
        names: dict[int, str] = {}
        for part in self.config["components"]:
            props = part["props"]
            classes = props.get("elem_classes") or []
            name = props.get("elem_id") or (classes[0] if classes else props.get("label")) or str(part["id"])
            name = {"To step": "cooldown", "from": "warmup"}.get(name, name)
            taken = sum(other == name or other.startswith(f"{name} ") for other in names.values())
            names[part["id"]] = f"{name} {taken + 1}" if taken else name
        return names


def newcomer() -> dict[str, float]:
    """Seconds from the command to the address, to the page in the browser, and to the first edit seen."""
    started = time.perf_counter()
    with served() as (address, _):
        answered = time.perf_counter()
        with browsing() as browser:
            opened = time.perf_counter()
            page = visit(browser, address)
            page.locator("#upload").wait_for()
            loaded = time.perf_counter()
            open_picture(page, SAMPLE)
            edit(page, "sunglasses")
            edited = time.perf_counter()
    start_browser = opened - answered  # a person's is open already
    return {
        "address_printed": answered - started,
        "page_loaded": loaded - started - start_browser,
        "first_edit_seen": edited - started - start_browser,
    }


def soak(visits: int, side: int = 1500, every: int = 10) -> dict[str, Any]:
    """What the server holds while visitors without heartbeat come one after the other, each with a large picture.

    MB resident after each `every` visits, each of which opens `side` x `side` pixels; each tenth edits a portrait.
    """
    import httpx
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder, served(temporary=Path(folder)) as (address, process):
        picture = Path(folder) / "large.png"
        Image.effect_noise((side, side), 60.0).convert("RGB").save(picture, compress_level=1)
        resident, slowest = [memory_of(process.pid)], 0.0
        for number in range(visits):
            started = time.perf_counter()
            with httpx.Client(base_url=address, timeout=PATIENCE / 1000) as client:
                visitor = Visitor(client)
                visitor.open(picture)
                assert str(side) in (visitor.values["status"] or ""), visitor.said
                if number % every == every - 1:
                    visitor.open_sample(0)
                    assert "+ sunglasses" in visitor.edit("sunglasses")
                    resident.append(memory_of(process.pid))
            slowest = max(slowest, time.perf_counter() - started)
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and path != picture)
        folders = len(list(Path(folder).glob("ledits-web-*/*/visit-*")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        left = [path.name for path in Path(folder).rglob("*") if path.is_file() and path != picture]
    return {
        "visits": visits, "picture": [side, side], "resident_mb": resident, "visits_kept": folders,
        "files_mb": round(stored / 2**20, 1), "slowest_visit_s": round(slowest, 2),
        "lines_at_the_terminal": len(errors.splitlines()) - 1, "files_left": left,
    }  # fmt: skip


def crowd(clients: int, num_steps: int = 5) -> dict[str, Any]:
    """How many of so many visitors at once get their edit and how soon; the others are told why not, in a line.

    Each holds its heartbeat, as a browser does. Seconds are from the first request to the answer, for all of them. One
    more was there before, and asks for nothing that is computed: how long it waits for each picture that it opens.
    """
    with tempfile.TemporaryDirectory() as folder, served(temporary=Path(folder)) as (address, process):
        everybody, over = threading.Barrier(clients), threading.Event()
        with ThreadPoolExecutor(clients + 1) as threads:
            bystanding = threads.submit(bystander, address, over)
            answers = list(threads.map(lambda _: one_of_many(address, num_steps, everybody), range(clients)))
            over.set()
            waits = bystanding.result()
        resident = memory_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        left = [path.name for path in Path(folder).rglob("*") if path.is_file()]
    seconds = sorted(taken for said, taken in answers if said.startswith("+ sunglasses"))
    refused = Counter(said for said, _ in answers if not said.startswith("+ sunglasses"))
    return {
        "clients": clients, "steps": num_steps, "edited": len(seconds), "refused": dict(refused),
        "first_s": round(seconds[0], 2), "median_s": round(median(seconds), 2), "last_s": round(seconds[-1], 2),
        "bystander": {
            "pictures": len(waits), "median_s": round(median(waits), 2), "slowest_s": round(max(waits), 2)
        },
        "resident_mb": resident, "lines_at_the_terminal": len(errors.splitlines()) - 1, "files_left": left,
    }  # fmt: skip


def bystander(address: str, over: threading.Event, every: float = 0.5) -> list[float]:
    """Seconds of each picture that a visitor opens, one after the other, until it is over."""
    import httpx

    name, waits = secrets.token_hex(5), list[float]()
    with httpx.Client(base_url=address, timeout=CROWDED) as client:
        client.get("/")
        with client.stream("GET", f"/gradio_api/heartbeat/{name}"):
            visitor = Visitor(client, name)
            while not over.wait(every):
                started = time.perf_counter()
                visitor.open_sample(len(waits) % 2)
                waits.append(time.perf_counter() - started)
                assert "portrait" in visitor.values["status"], visitor.said
    return waits


def one_of_many(address: str, num_steps: int, everybody: threading.Barrier) -> tuple[str, float]:
    """What a visitor is told at last, and after how many seconds; the page stays open until all have been told."""
    import httpx

    everybody.wait()
    started, name = time.perf_counter(), secrets.token_hex(5)
    with httpx.Client(base_url=address, timeout=CROWDED) as client:
        client.get("/")
        with client.stream("GET", f"/gradio_api/heartbeat/{name}"):
            visitor = Visitor(client, name)
            if not visitor.said:
                visitor.open_sample(0)
                visitor.values["steps"], visitor.values["skip"] = num_steps, 1
                told = visitor.edit("sunglasses").strip()
            else:
                told = visitor.said
            taken = time.perf_counter() - started
            everybody.wait()
    return told, taken


def memory_of(process: int) -> float:
    """MB resident."""
    status = Path(f"/proc/{process}/status").read_text()
    (kilobytes,) = re.findall(r"VmRSS:\s*(\d+)", status)
    return round(int(kilobytes) / 1024, 1)


def portrait(path: Path) -> None:
    """The page after an edit, for README."""
    with served() as (address, _), browsing() as browser:
        page = visit(browser, address, viewport={"width": 1280, "height": 800})
        open_picture(page, SAMPLE)
        edit(page, "a red hat")
        edit(page, "sunglasses", "smiling")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        page.screenshot(path=path)
    few_colours(path)


def few_colours(path: Path) -> None:
    """The same picture with 256 colours: a third of the bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def beside(name: str) -> ModuleType:
    """bench/speed/conditions.py, which knows the conditions of a measurement."""
    path = Path(__file__).parent / "speed" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ledits_min_bench_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", action="store_true", help="write bench/results/web.json and web.png")
    parser.add_argument("--soak", type=int, metavar="N", help="N visits instead; with --results web_soak.json")
    parser.add_argument("--at-once", type=int, default=80, metavar="N", help="with --soak: N more at the same time")
    args = parser.parse_args()
    if args.soak:
        load = os.getloadavg()[0]
        held = {"one_after_the_other": soak(args.soak), "at_once": crowd(args.at_once)}
        print(json.dumps(held, indent=2))
        if args.results:
            held["conditions"] = {**beside("conditions").conditions(), "load_average": round(load, 1)}
            (RESULTS / "web_soak.json").write_text(json.dumps(held, indent=2) + "\n")
        return
    load = os.getloadavg()[0]  # what else the machine was doing: a browser and a server do not share well
    rounds = [newcomer() for _ in range(args.rounds)]
    picks: dict[str, Callable[[list[float]], float]] = {"min": min, "median": median, "max": max}
    seconds = {
        step: {name: round(pick([each[step] for each in rounds]), 2) for name, pick in picks.items()}
        for step in rounds[0]
    }
    print(json.dumps(seconds, indent=2))
    if args.results:
        conditions = {**beside("conditions").conditions(), "load_average": round(load, 1)}
        kept = {"seconds": seconds, "rounds": args.rounds, "conditions": conditions}
        (RESULTS / "web.json").write_text(json.dumps(kept, indent=2) + "\n")
        portrait(RESULTS / "web.png")


if __name__ == "__main__":
    main()
