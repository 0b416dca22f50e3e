"""Saved inversions whose numbers promise too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def test_the_solvers_order_is_kept_and_an_older_file_is_of_first_order(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    second = replace(inversion(), settings=replace(inversion().settings, solver_order=2))
    second.save(path)
    assert Inversion.load(path).settings == second.settings
    older = asdict(inversion().settings)
    del older["solver_order"]
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, {archive.FORMAT: json.dumps(older)})
    assert Inversion.load(path).settings == inversion().settings


@pytest.mark.parametrize(("order", "eta", "says"), [
    (3, 1.0, "solver_order is 3"), (0, 1.0, "solver_order is 0"), (2, 0.5, r"defined for eta 1 alone, and eta is 0.5"),
    ("2", 1.0, "solver_order is '2'"), (True, 1.0, "solver_order is True"),
])  # fmt: skip
def test_an_order_that_is_none_is_refused(tmp_path: Path, order: Any, eta: float, says: str) -> None:
    made = inversion()
    replace(made, settings=replace(made.settings, solver_order=order, eta=eta)).save(tmp_path / "i.safetensors")
    with pytest.raises(InputError, match=says):
        Inversion.load(tmp_path / "i.safetensors")


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
