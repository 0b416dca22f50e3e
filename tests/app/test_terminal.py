"""What a person sees at a terminal of 100 columns: bars that move, lines that stand on their own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLE = Path(__file__).resolve().parents[2] / "weights/tiny/samples/portrait1.png"
FAST = ["--steps", "6", "--skip", "2"]


def shown(place: Path, *argv: str) -> list[str]:
    """Everything that stood on one line of the terminal at some time, in order, bars redrawn included."""
    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    running = subprocess.Popen(
        [sys.executable, "-m", "ledits_min.app.cli", *argv], cwd=place, stdout=below, stderr=below
    )
    os.close(below)
    seen = b""
    while True:
        try:
            more = os.read(above, 65536)
        except OSError:  # Linux's end of a terminal
            break
        if not more:
            break
        seen += more
    os.close(above)
    assert running.wait() == 0, seen.decode()
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip() for line in re.split(r"[\r\n]+", seen.decode())]
    return [line for line in lines if line]


def test_an_edit_shows_that_it_loads_and_how_far_it_is(tmp_path: Path) -> None:
    lines = shown(tmp_path, "edit", str(SAMPLE), "--add", "sunglasses", *FAST, "-o", "o.png")
    assert lines[0] == "loading 'tiny' ..."
    bar = [line for line in lines if line.startswith("inverting and editing")][-1]
    assert re.search(r"^inverting and editing 100 % \|█+\| 9/9 evaluations in \d\d:\d\d, 00:00 left$", bar)
    assert lines[-1].startswith("wrote 'o.png' in ")
    assert max(map(len, lines)) <= 100


def test_a_sweep_counts_its_cells_and_its_warnings_stand_on_their_own(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    lines = shown(tmp_path, "sweep", "noise.png", "--add", "hat", "--scale", "1,2", "--seed", "0,1", *FAST)
    bars = [line for line in lines if line.startswith("sweeping")]
    assert re.search(r"0 % \|\s*\| 0/4 cells in \d\d:\d\d, \? left", bars[0])
    assert re.search(r"100 % \|█+\| 4/4 cells in \d\d:\d\d, 00:00 left, editing 4/4$", bars[-1])
    assert next(line for line in lines if "warning" in line).startswith(
        "ledits: warning: the embedded model was trained"
    )
    assert sum("warning" in line for line in lines) == 1


def test_the_demo_counts_its_edits(tmp_path: Path) -> None:
    lines = shown(tmp_path, "demo")
    bars = [line for line in lines if line.startswith("editing")]
    assert len(bars) > 3 and re.search(r"100 % \|█+\| 17/17 edits in ", bars[-1])
