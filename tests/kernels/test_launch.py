"""kernels/_launch.py: the launch table, and how many kernels a whole edit compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

VARIANTS = 12  # compiled by the first edit; each takes about half a second


def test_a_whole_edit_compiles_few_variants() -> None:
    script = Path(__file__).with_name("specialisations.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {
        "_add_layer_norm", "_combine", "_cut", "_geglu", "_normalise", "_residuals", "_statistics", "_trajectory",
    }  # fmt: skip
    assert sum(found.values()) <= VARIANTS, found


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from ledits_min.kernels import _launch

    monkeypatch.setattr(_launch, "TABLE", tmp_path / "launch_table.json")
    _launch._tabled.cache_clear()
    yield _launch.TABLE
    _launch._tabled.cache_clear()


def test_the_table_replaces_defaults(table: Path) -> None:
    from ledits_min.kernels._launch import forced_shape, launch_shape

    cpu, defaults = torch.device("cpu"), {"warps": 4, "block": 256}
    table.write_text(json.dumps({"cpu": {"geglu": {"warps": 8}}, "another": {"geglu": {"block": 64}}}))
    assert launch_shape("geglu", defaults, cpu) == {"warps": 8, "block": 256}
    assert launch_shape("another kernel", defaults, cpu) == defaults
    with forced_shape("geglu", {"block": 512}):
        assert launch_shape("geglu", defaults, cpu) == {"warps": 4, "block": 512}
    assert launch_shape("geglu", defaults, cpu)["warps"] == 8


def test_without_a_table_there_are_defaults(table: Path) -> None:
    from ledits_min.kernels._launch import launch_shape

    assert launch_shape("geglu", {"warps": 4}, torch.device("cpu")) == {"warps": 4}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "'list'"),
        ('{"cpu": {"geglu": {"wraps": 4}}}', "no launch parameter 'wraps'; there are warps"),
        ('{"cpu": {"geglu": {"warps": 3}}}', "warps is 3; it must be a power of two"),
        ('{"cpu": {"geglu": {"warps": 4.0}}}', "warps is 4.0"),
        ('{"cpu": {"geglu": {"warps": true}}}', "warps is True"),
        ('{"cpu": {"geglu": {"warps": 131072}}}', "warps is 131072"),
        ('{"cpu": {"geglu": 4}}', "'int'"),
        ('{"cpu": 4}', "'int'"),
    ],
)
def test_a_table_that_is_none_is_refused(table: Path, text: str, reason: str) -> None:
    from ledits_min.kernels._launch import launch_shape

    table.write_text(text)
    with pytest.raises(ValueError, match="launch_table.json: geglu on cpu: .*remove the file") as refusal:
        launch_shape("geglu", {"warps": 4}, torch.device("cpu"))
    assert reason in str(refusal.value)
