"""Saved inversions whose numbers promise too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ledits_min.config import ScheduleConfig
from ledits_min.errors import InputError
from ledits_min.files import inversion as archive
from ledits_min.files.inversion import Inversion
from ledits_min.inversion import InversionSettings


def inversion(picture: tuple[int, int] = (20, 24), latents: tuple[int, int] = (5, 6)) -> Inversion:
    """Of one picture (height, width); everything zero."""
    x = torch.zeros(1, 4, *latents)
    settings = InversionSettings("model", ScheduleConfig(), 2, 1, 1.0, "", 3.5, (0,))
    original = torch.zeros(1, 1, 3, dtype=torch.uint8).expand(*picture, 3)
    return Inversion(x, x[None].clone(), x.clone(), (original,), settings)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    inversion().save(tmp_path / "i.safetensors")
    assert Inversion.load(tmp_path / "i.safetensors").original_sizes == [(24, 20)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: inversion(picture=(9000, 9000)), "more than 64 megapixels"),
        (lambda: inversion(picture=(1, 100_000)), "at least 16 pixels"),
        (lambda: inversion(picture=(16, 10_000)), "longer than 8:1"),
        (lambda: inversion(latents=(4, 5000)), "its tensors do not fit its settings"),
    ],
)
def test_impossible_pictures_are_refused_by_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Inversion], says: str
) -> None:
    make().save(tmp_path / "i.safetensors")

    def nothing(*_: Any) -> bytes:
        raise AssertionError("the data were read")

    monkeypatch.setattr(archive, "read_file", nothing)
    with pytest.raises(InputError, match=says):
        Inversion.load(tmp_path / "i.safetensors")


def test_a_file_has_a_bound_in_both_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inversion().save(tmp_path / "i.safetensors")
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="more than a saved inversion may be"):
        Inversion.load(tmp_path / "i.safetensors")
    with pytest.raises(InputError, match="save fewer pictures in one file"):
        inversion().save(tmp_path / "j.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["i.safetensors"]
