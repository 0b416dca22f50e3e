"""What a notebook shows: results and inversions as pictures, progress as a bar; and the example, run by a kernel."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import termios
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ledits_min import Concept, Inversion, LEdits
from ledits_min.files import display
from ledits_min.files.display import figures, overlay

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = sorted((ROOT / "weights/tiny/samples").glob("*.png"))
EXAMPLE = ROOT / "ledits_min/app/example.ipynb"


class Shown(HTMLParser):
    """The pictures of a piece of HTML with their captions, row by row, and every other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[Image.Image]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            kind, _, content = (dict(attributes)["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            self.rows[-1].append(Image.open(io.BytesIO(base64.b64decode(content))))
            return
        self.open.append(tag)
        if tag == "div" and "flex" in (dict(attributes).get("style") or ""):
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


@pytest.fixture(scope="module")
def inversion(ledits: LEdits) -> Inversion:
    return ledits.invert([str(path) for path in SAMPLES[:2]], num_steps=6, skip=2, seed=[3, 4])


def test_a_result_shows_before_after_and_masks(ledits: LEdits, inversion: Inversion) -> None:
    concepts = [Concept("sunglasses"), Concept("beard", reverse=True)]
    result = ledits.edit(inversion, concepts=concepts)
    shown = Shown(result._repr_html_())
    assert shown.texts == ["before", "after", "+ sunglasses", "- beard"] * 2
    for i, (before, after, *masks) in enumerate(shown.rows):
        original = Image.open(SAMPLES[i]).convert("RGB")
        assert (before.tobytes(), after.tobytes()) == (original.tobytes(), result.images[i].tobytes())
        assert [mask.tobytes() for mask in masks] == [overlay(original, mask[i]).tobytes() for mask in result.masks]


def test_a_generated_picture_has_no_before(ledits: LEdits) -> None:
    result = ledits.generate("a portrait", num_steps=2)
    assert result.originals == []
    assert Shown(result._repr_html_()).texts == ["after"]


def test_an_inversion_shows_its_pictures_and_settings(inversion: Inversion, tmp_path: Path) -> None:
    inversion.save(tmp_path / "i.safetensors")
    for one in (inversion, Inversion.load(tmp_path / "i.safetensors")):
        shown = Shown(one._repr_html_())
        assert shown.texts == ["128 x 128", "128 x 128", "inversion of 6 steps, skip 2, eta 1, seed 3, 4"]
        assert [row[0].tobytes() for row in shown.rows] == [
            Image.open(path).convert("RGB").tobytes() for path in SAMPLES[:2]
        ]


def test_what_is_shown_stays_small_and_is_never_markup() -> None:
    large = Image.new("RGB", (2000, 1000), "red")
    shown = Shown(figures([[("<script>alert('x')</script>", large)]] * 11, 'source "<b>"'))
    assert len(shown.rows) == display.SHOWN and {picture.size for row in shown.rows for picture in row} == {(320, 160)}
    assert shown.texts == ["<script>alert('x')</script>"] * display.SHOWN + ["and 3 more", 'source "<b>"']
    assert large.size == (2000, 1000)


def test_a_mask_without_a_peak_is_grey() -> None:
    picture = Image.open(SAMPLES[0]).convert("RGB")
    colours = np.asarray(overlay(picture, torch.zeros(16, 16)))
    assert (colours.min(-1) == colours.max(-1)).all()


def test_in_a_terminal_progress_is_text() -> None:
    """The same bar as without tqdm.auto: on stderr where that is a terminal, silent elsewhere."""
    code = """
from ledits_min.engine.progress import progress_bar
with progress_bar("editing", 3, "step", wanted=True) as bar:
    for _ in range(3):
        bar.update()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    above, below = os.openpty()
    try:
        termios.tcsetwinsize(below, (24, 100))
        subprocess.run([sys.executable, "-W", "error", "-c", code], stdout=below, stderr=below, check=True)
        assert re.search(r"editing +100 % \|.+\| 3/3 steps in 00:00", os.read(above, 65536).decode())
    finally:
        os.close(above)
        os.close(below)


def test_the_example_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, by a kernel of its own; what is committed holds no outputs."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient, which runs notebooks, is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient, which runs notebooks, is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=None)
    client.execute(cwd=str(tmp_path))
    load, invert, add, hat, scales = (cell.outputs for cell in cells)
    assert not load
    (inverted,) = html_of(invert)
    assert inverted.texts[-1] == "inversion of 25 steps, skip 4, eta 1, seed 0"
    (added,) = html_of(add)
    assert added.texts == ["before", "after", "+ sunglasses", "+ smiling"]
    before, after, glasses, smile = added.rows[0]
    moved = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).mean()
    assert before.tobytes() == Image.open(SAMPLES[0]).convert("RGB").tobytes() and moved > 1.0
    assert glasses.tobytes() != smile.tobytes()
    assert html_of(hat)[0].texts == ["before", "after", "+ a red hat"]
    assert sum("image/png" in output.get("data", {}) for output in scales) == 3
    # The bar is a widget, which has its text beside it.
    for outputs, phase in ((invert, "inverting"), (add, "editing"), (hat, "editing")):
        bars = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
        assert len(bars) == 1 and bars[0]["data"]["text/plain"].strip().startswith(phase)
    assert not [output for outputs in (load, invert, add, hat) for output in outputs if output.output_type == "stream"]


def html_of(outputs: list[dict[str, dict[str, str]]]) -> list[Shown]:
    texts = [output.get("data", {}).get("text/html", "") for output in outputs]
    return [Shown(text) for text in texts if "<figure" in text]
