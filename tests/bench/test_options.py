"""The study of LEDITS++'s options: rounds that are not measured twice, pairs that are pairs, tables that say so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dicebear", reason="the [train] extra is not installed")
pytest.importorskip("resvg_py", reason="the [train] extra is not installed")

from bench.report_options import options_text
from bench.study import options
from bench.study.evaluate import Scores
from bench.study.options import EDITED, METHODS, REMOVALS, REMOVED, Bench, Task, rounds

SCORES = ("success", "kept", "kept_unedited", "others", "outside_db", "gain_db", "evaluations", "seconds")


class Counted(Bench):
    """Portrait i of an edit gains i dB, and method m 10 m dB more."""

    calls: int = 0

    def _measure(self, task: Task, portraits: range) -> Scores:
        self.calls += 1
        more = 10.0 * METHODS.index(task.method) if task.method in METHODS else 0.0
        gains = more + np.array(portraits, dtype=np.float64)
        return {name: np.ones(len(portraits)) for name in SCORES} | {"gain_db": gains}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    monkeypatch.setattr(options, "BATCH", 4)
    editor: Any = SimpleNamespace(ledits=SimpleNamespace(fingerprint="tiny", dtype="torch.float32"))
    oracle: Any = None
    return Counted(editor, oracle, tmp_path)


@pytest.mark.usefixtures("bench")
def test_rounds_cover_every_portrait_once() -> None:
    assert [list(part) for part in rounds(3)] == [[0, 1, 2]]
    assert rounds(10) == [range(4), range(4, 8), range(8, 10)]


def test_a_finished_round_is_not_measured_again(bench: Counted) -> None:
    options.measure_methods(bench, rounds(4))
    done = len(METHODS) * len(EDITED)
    assert bench.calls == done
    options.measure_methods(bench, rounds(6))
    assert bench.calls == 2 * done  # the second round alone
    options.measure_removals(bench, rounds(4))
    assert bench.calls == 2 * done + len(REMOVALS) * len(REMOVED)


def test_methods_are_compared_portrait_by_portrait(bench: Counted) -> None:
    rows = options.measure_methods(bench, rounds(6))
    for number, row in enumerate(rows):
        assert row["gain_db_more"] == pytest.approx(10.0 * number)
        assert row["gain_db_more_interval"] == pytest.approx((10.0 * number, 10.0 * number))  # no spread in pairs
        assert row["gain_db_interval"][0] < row["gain_db"] < row["gain_db_interval"][1]
        assert row["count"] == 6 * len(EDITED) and row["edits"]["+ sunglasses"]["count"] == 6


def test_the_tables_show_every_row(bench: Counted) -> None:
    parts, about = rounds(2), {"portraits": 2, "command": "python", "processor": "a CPU", "dtype": "float32"}
    methods = {**about, "rows": options.measure_methods(bench, parts)}
    removals = {**about, "rows": options.measure_removals(bench, parts)}
    text = "\n".join(options_text(methods, removals))
    for name in (*(method.name for method in METHODS), *(way.name for way in REMOVALS), *REMOVED):
        assert f"| {name} |" in text, name
    assert "+10.0 [+10.0, +10.0]" in text
    assert options_text(None, None) == []
