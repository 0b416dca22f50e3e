"""The programs of the section "Examples", executed as they stand there."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "weights/tiny/samples"


def programs() -> list[str]:
    """The Python blocks of the section, in order."""
    text = (ROOT / "ledits_min/app/README.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## Examples\n(.*?)(?=^## )", text, re.M | re.S)
    assert len(sections) == 1
    found: list[str] = re.findall(r"^```python\n(.*?)^```$", sections[0], re.M | re.S)
    return found


def test_there_are_three_short_programs() -> None:
    found = programs()
    assert len(found) == 3
    assert all(len([line for line in program.splitlines() if line.strip()]) <= 20 for program in found)


def run(program: str, place: Path) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=place, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def change(before: Path, after: Path | io.BytesIO) -> float:
    """Mean absolute difference in levels."""
    pair = [np.asarray(Image.open(source).convert("RGB"), dtype=float) for source in (before, after)]
    assert pair[0].shape == pair[1].shape
    return float(np.abs(pair[0] - pair[1]).mean())


def test_the_script(tmp_path: Path) -> None:
    portrait = tmp_path / "portrait.png"
    shutil.copy(SAMPLES / "portrait1.png", portrait)
    told = run(programs()[0], tmp_path).stderr.splitlines()
    assert told[-1] == "editing 21/21" and told.count("editing 21/21") == 3 and told.count("inverting 21/21") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"portrait.png", "sunglasses.png", "beard.png", "smile.png"}
    assert all(change(portrait, tmp_path / f"{text}.png") > 0.5 for text in ("sunglasses", "beard", "smile"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of the endpoint, from a file as uvicorn would import it."""
    path = tmp_path_factory.mktemp("endpoint") / "readme_endpoint.py"
    path.write_text(programs()[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # annotations are looked up there
    try:
        spec.loader.exec_module(module)
        with TestClient(module.app) as client:
            yield client
    finally:
        del sys.modules[path.stem]


def test_the_endpoint_gives_an_edited_png_back(client: TestClient) -> None:
    portrait = SAMPLES / "portrait1.png"
    answer = client.post("/edit", params={"add": "sunglasses"}, files={"picture": portrait.read_bytes()})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert change(portrait, io.BytesIO(answer.content)) > 0.5


@pytest.mark.parametrize(
    ("content", "add", "says"),
    [
        (b"no picture at all", "sunglasses", "cannot identify image file"),
        ((SAMPLES / "portrait1.png").read_bytes()[:2000], "sunglasses", "damaged or cut short|truncated"),
        ((SAMPLES / "portrait1.png").read_bytes(), "zeppelin", "does not know 'zeppelin'"),
    ],
    ids=["no picture", "cut short", "unknown word"],
)
def test_the_endpoint_refuses_what_it_cannot_take(client: TestClient, content: bytes, add: str, says: str) -> None:
    answer = client.post("/edit", params={"add": add}, files={"picture": content})
    assert answer.status_code == 422
    assert re.search(says, answer.json()["detail"])


def test_the_augmentation(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    for name in ("portrait1.png", "portrait2.png"):
        shutil.copy(SAMPLES / name, tmp_path / "faces")
    for _ in range(2):  # a program that is started again replaces what it wrote
        run(programs()[2], tmp_path)
    with open(tmp_path / "augmented/labels.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        [f"portrait{i}-{text}.png", f"portrait{i}.png", text] for i in (1, 2) for text in ("sunglasses", "smile")
    ]
    assert {path.name for path in (tmp_path / "augmented").iterdir()} == {"labels.csv", *(row[0] for row in rows)}
    assert all(change(tmp_path / "faces" / source, tmp_path / "augmented" / name) > 0.5 for name, source, _ in rows)
