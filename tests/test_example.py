"""`python -m ledits_min.example`: a whole edit by the core alone, as good as it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ledits_min import example

EXPECTED = 33.2  # dB, as its docstring says


def test_it_reconstructs_as_well_as_it_says_and_edits_what_it_was_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    psnr = example.main(output=str(tmp_path / "example.png"))
    assert abs(psnr - EXPECTED) < 0.3
    assert f"{EXPECTED} is expected" in capsys.readouterr().out and f"{EXPECTED} dB" in (example.__doc__ or "")
    pictures = (Image.open(path).convert("RGB") for path in (example.SAMPLE, tmp_path / "example.png"))
    before, after = (np.asarray(picture, float) for picture in pictures)
    change = np.abs(after - before).mean(axis=2)
    eyes, shirt = change[50:72, 40:90].mean(), change[112:].mean()
    assert eyes > 20.0 and shirt < 8.0  # 8-bit levels


def test_it_needs_neither_engine_nor_files_nor_kernels() -> None:
    code = (
        "import sys, ledits_min.example; "
        "rooms = ('ledits_min.engine', 'ledits_min.app', 'ledits_min.kernels', 'ledits_min.pipeline', 'diffusers'); "
        "sys.exit(any(name.startswith(rooms) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
