"""`ledits web` in a real browser: a newcomer's first edits, errors, several visitors, and how it ends."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from ledits_min.weights.read.survey import TINY

pytest.importorskip("gradio", reason="the [web] extra is not installed")
pytest.importorskip("playwright", reason="playwright, which drives the browser, is not installed")

SAMPLE, OTHER = (TINY / "samples" / f"portrait{n}.png" for n in (1, 2))
COPY = "portrait (copy).png"


@pytest.fixture(scope="module")
def web(bench_web: ModuleType) -> ModuleType:
    if bench_web.chromium() is None:
        pytest.skip(f"no browser: none of {', '.join(bench_web.BROWSERS)} is installed")
    return bench_web


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps what it must: nothing may be left there."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(web: ModuleType, temporary: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Two models: the embedded one by its name, and by its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # beside a browser, threads would wait for one another
        with web.served("--model", "tiny", "--model", str(TINY), temporary=temporary) as running:
            yield running


@pytest.fixture(scope="module")
def browser(web: ModuleType) -> Iterator[Any]:
    with web.browsing() as browser:
        yield browser


@pytest.fixture
def visit(web: ModuleType, server: tuple[str, Any], browser: Any) -> Iterator[Any]:
    """A new visitor at every call; none may see a script fail, or send a request anywhere else."""
    pages, wrong = [], []
    address = server[0]

    def come() -> Any:
        page = web.visit(browser, "about:blank", viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: wrong.extend([message.text] * (message.type == "error")))
        page.on("pageerror", lambda error: wrong.extend([str(error)]))
        page.context.on("request", lambda request: wrong.extend([request.url] * elsewhere(request.url)))
        pages.append(page)
        page.goto(address)
        page.locator("#upload").wait_for()
        return page

    def elsewhere(url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1"

    yield come
    for page in pages:
        page.context.close()
    assert wrong == []


def shown(page: Any) -> np.ndarray[Any, Any]:
    """The before and after pictures of the slider, (2, H, W, 3)."""
    page.locator("#slider img.after").wait_for()
    links = page.locator("#slider img").evaluate_all("images => images.map(image => image.src)")
    pictures = [Image.open(io.BytesIO(page.request.get(link).body())).convert("RGB") for link in links]
    before = np.asarray(Image.open(SAMPLE).convert("RGB").resize(pictures[0].size, Image.Resampling.BICUBIC))
    ordered = sorted((np.asarray(picture) for picture in pictures), key=lambda each: np.abs(each - 1.0 * before).sum())
    return np.stack(ordered).astype(np.float64)


def asked(web: ModuleType, page: Any) -> list[str]:
    return [box.input_value() for box in web.words_asked(page).all()]


def unfold(page: Any) -> None:
    """The inversion's numbers. They are made now and filled a moment later, so write into them later still."""
    page.locator("#inversion button").first.click()
    page.locator("#skip input").wait_for()


def test_a_newcomer_edits_again_goes_back_and_takes_it_home(web: ModuleType, visit: Any, tmp_path: Path) -> None:
    page = visit()
    mine = tmp_path / COPY
    mine.write_bytes(SAMPLE.read_bytes())
    web.open_picture(page, mine)
    said = web.edit(page, "sunglasses")
    assert said.startswith("+ sunglasses") and "Inverted in" in said
    before, after = shown(page)
    change, rows = np.abs(after - before).mean(axis=(1, 2)), before.shape[0]
    eyes, shirt = change[rows * 40 // 100 : rows * 60 // 100].mean(), change[rows * 85 // 100 :].mean()
    assert eyes > 10.0 and shirt < 3.0

    said = web.edit(page, "sunglasses", "a red hat")
    assert "Inverted" not in said and "the inversion was reused" in said
    assert np.abs(shown(page)[1] - after)[: rows // 5].mean() > 8.0  # where the hat is
    assert page.locator("#history button").count() == 2

    page.get_by_role("tab", name="Where it acted").click()
    page.locator("#masks img").nth(1).wait_for()
    assert page.locator("#masks img").count() == 2
    page.get_by_role("tab", name="Before and after").click()

    page.locator("#history button").nth(1).click()  # the newest is first
    page.wait_for_function("() => !document.querySelector('#status').innerText.includes('hat')")
    assert asked(web, page) == ["sunglasses"]
    assert np.array_equal(shown(page)[1], after)
    page.locator("#history button").nth(0).click()
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('hat')")
    assert asked(web, page) == ["sunglasses", "a red hat"]
    page.locator("#history button").nth(1).click()
    page.wait_for_function("() => !document.querySelector('#status').innerText.includes('hat')")

    page.locator("#copy button").first.click()
    command = page.locator("#command .cm-content").inner_text()
    assert COPY in command and "--skip 4" in command and "--add sunglasses:scale=2,threshold=0.9,warmup=1" in command
    with page.expect_download() as download:
        page.locator("#download a").click()
    download.value.save_as(tmp_path / "home.png")
    assert download.value.suggested_filename == "portrait (copy)-1.png"
    with Image.open(tmp_path / "home.png") as picture:
        settings = json.loads(picture.info["ledits"])
    assert [concept["text"] for concept in settings["concepts"]] == ["sunglasses"]


def test_what_is_wrong_is_said_in_a_line(web: ModuleType, visit: Any, tmp_path: Path) -> None:
    page = visit()
    page.bring_to_front()  # what is not drawn is not waited for
    unfold(page)
    (tmp_path / "page.png").write_bytes(b"<html>404 not found")
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "page.png")
    page.get_by_text("'page.png' is an HTML or XML page").wait_for()
    assert not page.locator("#stage").is_visible()

    web.open_picture(page, SAMPLE)
    box = web.words_asked(page).first
    box.fill("bicycle")
    box.press("Enter")
    page.get_by_text("this model does not know 'bicycle'").wait_for()
    page.locator("#run").wait_for()

    box.fill("sunglasses")
    page.locator("#skip input").fill("25")
    page.locator("#run").click()
    page.get_by_text("skip (with 25 steps) is 25; a whole number in 0 .. 24 is wanted").wait_for()
    assert "Traceback" not in page.locator("body").inner_text()


def test_what_computes_nothing_does_not_wait_and_what_computes_can_be_stopped(web: ModuleType, visit: Any) -> None:
    page = visit()
    unfold(page)
    other = visit()
    web.open_picture(page, SAMPLE)
    page.locator("#steps input").fill("500")
    web.words_asked(page).first.fill("sunglasses")
    page.locator("#run").click()
    page.locator("#stop").wait_for()

    page.locator("#more").click()
    page.locator(".concept:visible").nth(1).wait_for()
    page.locator(".concept:visible .drop").nth(0).click()
    page.wait_for_function("() => document.querySelectorAll('.concept').length == 1")
    assert asked(web, page) == [""]  # the second row moved up
    other.locator("#samples button").nth(1).click()
    other.locator("#stage").wait_for()
    assert page.locator("#stop").is_visible()  # all that while it was computing

    page.bring_to_front()  # a window behind another is not drawn, and what is not drawn is not waited for
    page.locator("#stop").click()
    page.get_by_text("Stopped; the picture is as it was.").wait_for()
    page.locator("#run").wait_for()
    assert page.locator("#history button").count() == 0


def test_two_visitors_at_once_see_their_own_pictures(web: ModuleType, visit: Any) -> None:
    one, two = visit(), visit()
    web.open_picture(one, SAMPLE)
    assert two.locator("#empty").is_visible()
    web.open_picture(two, OTHER)
    for page, text in ((one, "sunglasses"), (two, "smiling")):
        web.words_asked(page).first.fill(text)
    one.locator("#run").click()
    two.locator("#run").click()
    for page, text in ((one, "sunglasses"), (two, "smiling")):
        page.get_by_text(f"+ {text}").first.wait_for()
        said = page.locator("#status").inner_text()
        assert said.startswith(f"+ {text}") and "Inverted in" in said
        assert page.locator("#history button").count() == 1
    assert not np.array_equal(shown(one)[1], shown(two)[1])


def test_another_model_and_a_preset(web: ModuleType, visit: Any) -> None:
    page = visit()
    unfold(page)
    web.open_picture(page, SAMPLE)
    page.locator(".concept:visible .kind").first.get_by_text("big thing").click()
    page.wait_for_function("() => document.querySelector('#skip input').value == '2'")
    assert page.locator(".concept .scale input[type=number]").first.input_value() == "3"

    page.locator("#model input").click()
    page.get_by_role("option", name=re.compile("weights|tiny$")).last.click()
    page.wait_for_function("() => document.querySelector('#skip input').value == '4'")  # a folder has the same defaults
    page.locator("#more").click()
    page.locator(".concept:visible .kind").nth(1).get_by_text("style").click()  # no embedded model: other presets
    page.wait_for_function(
        "() => document.querySelectorAll('.concept .threshold input[type=number]')[1].value == '0.5'"
    )
    assert "Inverted in" in web.edit(page, "sunglasses")


def axe() -> str:
    """The script of axe-core, from the package that brings it."""
    package = pytest.importorskip("axe_core_python", reason="axe-core-python, which measures accessibility, is missing")
    return (Path(package.__file__ or next(iter(package.__path__))).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Any) -> list[str]:
    page.evaluate(axe())
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
    return [f"{each['id']}: {node['html'][:120]}" for each in found["violations"] for node in each["nodes"]]


def check_everybody_can_read(page: Any) -> None:
    """WCAG 2.1 A and AA in both colour schemes, once nothing fades or moves any more: colours are measured."""
    moving = "each.playState == 'running' && each.effect.getComputedTiming().endTime < Infinity"
    for scheme, dark in (("light", "false"), ("dark", "true")):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"() => Boolean(document.querySelector('.dark')) == {dark}")
        page.wait_for_function(f"() => !document.getAnimations().some(each => {moving})")
        assert violations(page) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_by_everybody_and_fits(web: ModuleType, visit: Any, width: int) -> None:
    """Before and after an edit, with everything unfolded."""
    axe()
    page = visit()
    page.set_viewport_size({"width": width, "height": 900})
    check_everybody_can_read(page)
    assert page.locator(".drop-box").bounding_box()["width"] <= width
    page.locator("#examples button").nth(2).click()
    page.locator("#download a").wait_for()
    page.locator("#run").wait_for()
    for part in ("#prompts", "#inversion", "#copy"):
        page.locator(f"{part} button").first.click()
    page.locator("#more").click()
    page.locator(".concept:visible").nth(1).wait_for()
    check_everybody_can_read(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert min(box.bounding_box()["width"] for box in web.words_asked(page).all()) > 150


def test_a_ready_made_edit_needs_one_press(visit: Any) -> None:
    page = visit()
    page.locator("#examples button").nth(1).click()
    page.locator("#download a").wait_for()
    assert page.locator("#status").inner_text().startswith("+ a red hat")
    assert page.locator("#skip input").count() == 0 or page.locator("#skip input").input_value() == "2"


def test_there_is_nothing_to_press_before_something_is_asked_for(web: ModuleType, visit: Any) -> None:
    page = visit()
    run = page.locator("#run")
    assert run.is_disabled() and run.inner_text() == "Take a picture first"
    web.open_picture(page, SAMPLE)
    page.get_by_text("Say what to add or remove", exact=True).wait_for()
    assert run.is_disabled()
    box = web.words_asked(page).first
    box.fill("sunglasses")
    page.wait_for_function("() => !document.querySelector('#run').disabled")
    assert run.inner_text() == "Edit"
    box.fill("   ")
    page.wait_for_function("() => document.querySelector('#run').disabled")
    page.locator(".chips button").nth(4).click()
    page.wait_for_function("() => !document.querySelector('#run').disabled")
    assert asked(web, page) == ["a red hat"]


def test_presets_say_that_they_set_skip_and_do_not_undo_each_other(web: ModuleType, visit: Any) -> None:
    page = visit()
    unfold(page)
    web.open_picture(page, SAMPLE)
    page.locator(".chips button").nth(4).click()  # a red hat: a big thing
    page.get_by_text("The preset (big thing) also set Skip, from 4 to 2.").wait_for()
    page.locator(".chips button").nth(0).click()  # sunglasses: a small one
    page.get_by_text("Skip stays 2, which the other concept's preset (big thing) needs.").wait_for()
    assert page.locator("#skip input").input_value() == "2"
    assert "+ a red hat, + sunglasses" in web.edit(page, "a red hat", "sunglasses")
    assert page.locator("#message").inner_text().strip() == ""  # went with the edit


def test_it_can_be_used_without_a_mouse(web: ModuleType, visit: Any) -> None:
    page = visit()
    web.open_picture(page, SAMPLE)
    page.get_by_label("Words of concept 1").focus()
    page.keyboard.type("sunglasses")
    page.keyboard.press("Enter")
    page.locator("#slider input").wait_for()
    page.locator("#run").wait_for()
    page.get_by_label("Where before ends").focus()
    page.keyboard.press("ArrowRight")
    assert "51%" in (page.locator(".compare").get_attribute("style") or "")
    page.get_by_role("radio", name="small thing").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.concept .scale input[type=number]').value == '3'")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.concept .scale input[type=number]').value == '2'")
    page.get_by_role("button", name="Remove concept 1").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#run').disabled")
    assert asked(web, page) == [""]


def test_the_dice_and_a_reload(web: ModuleType, visit: Any) -> None:
    page = visit()
    unfold(page)
    web.open_picture(page, SAMPLE)
    page.locator("#dice").click()
    page.wait_for_function("() => document.querySelector('#seed input').value != '0'")
    seed = page.locator("#seed input").input_value()
    web.edit(page, "sunglasses")
    page.wait_for_function("() => (localStorage.getItem('ledits.history') || '').includes('sunglasses')")
    page.reload()  # the server has the visit still
    page.locator("#history button").wait_for()
    assert page.locator("#status").inner_text().startswith("+ sunglasses")
    assert asked(web, page) == ["sunglasses"]

    page.evaluate("sessionStorage.clear()")  # what a new tab finds, or a server that was started again
    page.reload()
    page.locator("#history button").click()
    page.get_by_text("choose portrait1.png again and press Edit").wait_for()
    assert asked(web, page) == ["sunglasses"]
    unfold(page)
    assert page.locator("#seed input").input_value() == seed
    page.locator("#forget").click()
    page.locator("#history button").wait_for(state="detached")
    page.wait_for_function("() => localStorage.getItem('ledits.history') == '[]'")


def test_ctrl_c_ends_it_and_leaves_nothing(server: tuple[str, subprocess.Popen[str]], temporary: Path) -> None:
    """The last: it ends the server that the others have used."""
    process = server[1]
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and err.splitlines()[-1] == "ledits: error: interrupted"
    assert all(line.startswith("ledits: ") for line in err.splitlines()), err
    assert [path for path in temporary.rglob("*") if path.is_file()] == []  # torch makes an empty folder of its own
    assert list(temporary.glob("ledits-*")) == []
