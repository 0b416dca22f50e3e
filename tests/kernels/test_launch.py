"""kernels/_launch.py: the launch table, and how many kernels a whole edit compiles."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

VARIANTS = 12  # compiled by the first edit; each takes about half a second


def test_a_whole_edit_compiles_few_variants() -> None:
    script = Path(__file__).with_name("specialisations.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    found = told["variants"]
    assert set(found) == {
        "_add_layer_norm", "_combine", "_cut", "_geglu", "_normalise", "_residuals", "_statistics", "_trajectory",
    }  # fmt: skip
    assert sum(found.values()) <= VARIANTS, found
    assert told["behind"] == {}, "kernels/variants.py does not meet them"


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


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch, table: Path) -> ModuleType:
    """bench/tune_kernels.py, with an empty table."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return importlib.import_module("bench.tune_kernels")


def test_tuning_keeps_the_fastest_shape_that_computes_the_same(
    tuner: ModuleType, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ledits_min.kernels import _launch

    def stub(calls: list[Callable[[], object]]) -> float:
        """The widest block is the fastest, more warps are slower, and 512 is what the default takes."""
        for call in calls:
            call()
        (shape,) = _launch._forced.values()
        if shape.get("warps") == 8:
            raise RuntimeError("out of resource: threads")
        return 512.0 / shape.get("block", 512)

    found = tuner.tune_all("cpu", ["residuals"], stub, lambda moved: 1, small=True)
    assert found == {"residuals": {"block": 2048, "warps": 4}}
    assert "refused, out of resource" in capsys.readouterr().out
    unmoved = tuner.tune_all("cpu", ["trajectory"], lambda calls: 1.0, lambda moved: 1, small=True)
    assert unmoved == {"trajectory": {}}

    table.write_text(json.dumps({"another": {"geglu": {"warps": 8}}, "cpu": {"geglu": {"warps": 2}}}))
    tuner.write(found | {"geglu": {}}, "cpu", table)
    assert json.loads(table.read_text()) == {"another": {"geglu": {"warps": 8}}, "cpu": found}
    assert _launch.launch_shape("residuals", {"block": 512, "warps": 4}, torch.device("cpu"))["block"] == 2048


def test_every_candidate_is_a_launch_shape_of_its_kernel(tuner: ModuleType) -> None:
    from ledits_min.kernels import geglu, group_norm_silu, layer_norm, sega_step, trajectory
    from ledits_min.kernels._launch import checked_shape

    defaults = {
        "geglu": geglu.SHAPE, "layer_norm": layer_norm.SHAPE, "group_norm_silu": group_norm_silu.SHAPE,
        "sega_cut": sega_step.CUT, "sega_combine": sega_step.COMBINE, "trajectory": trajectory.SHAPE,
        "residuals": trajectory.SHAPE,
    }  # fmt: skip
    assert {case.kernel for case in tuner.cases("cpu", small=True)} == set(tuner.SHAPES)
    for kernel, candidates in tuner.SHAPES.items():
        for shape in candidates:
            assert checked_shape(shape, tuple(defaults[kernel.split()[0]])) == shape


def test_only_a_file_that_passed_as_a_whole_is_noted() -> None:
    path = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("ledits_min_kernel_tests", path)
    assert spec is not None and spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    ran = ["k/test_a.py::one", "k/test_a.py::two", "k/test_b.py::one", "k/test_c.py::one"]
    aside = ["k/test_a.py::test_compiles_without_spills", "k/test_c.py::two"]
    assert tests.passed_files(ran, aside, set(ran) - {"k/test_b.py::one"}) == {"test_a.py"}
    assert tests.state(path) == tests.state(path) != tests.state(Path(__file__))


def test_maps_are_copied_only_where_one_stride_cannot_walk_them() -> None:
    from ledits_min.kernels import _launch

    maps = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for walked in (maps, maps.to(memory_format=torch.channels_last), maps[:, :2], maps[..., :1], maps[:, :, :1, :3]):
        assert _launch.walkable(walked) is walked
    cropped = maps[..., :3]
    copied = _launch.walkable(cropped)
    assert torch.equal(copied, cropped) and copied.is_contiguous() and copied is not cropped
