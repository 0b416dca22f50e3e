"""bench/gpu.sh on stubs: no GPU, no git, no link; what it starts exists and takes the options it is given; it ends in
time, names what failed, and its last lines are a table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])

PYTHON = r"""#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in
  -c*) [[ -n ${NO_GPU:-} ]] && { echo "no CUDA device" >&2; exit 1; }; echo "a stub"; exit 0 ;;
  "-m bench.speed.table"*) exec "$REAL_PYTHON" "$@" ;;
esac
[[ -n ${FAIL:-} && "$*" == *"$FAIL"* ]] && exit 3
while (($#)); do
  case $1 in
    --output) file=$2 ;;
    --benchmark-json) file=$2 ;;
    --table) file=$2 ;;
  esac
  shift
done
[[ -n ${file:-} ]] && cp "$SAMPLES/$(basename "$file")" "$file" 2>/dev/null || true
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$1" >>"$LIMITS"
shift
exec "$@"
"""


class Script:
    """A copy of bench/ with stubs in front of everything it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
        stubs, samples = folder / "stubs", folder / "samples"
        for made in (stubs, samples):
            made.mkdir()
        for name, text in (("python3", PYTHON), ("timeout", TIMEOUT)):
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        times = {"ours": 0.6, "peer": 4.6}
        sides = {side: {"seconds": {"invert and edit": time, "decode": 0.5}} for side, time in times.items()}
        kernel = {"us": {"kernel, graph": 12.0, "eager, graph": 60.0}, "floor us": 7.0}
        alone = {"ours": {"seconds": 0.0078, "to_ours": 1.0}, "diffusers": {"seconds": 0.0156, "to_ours": 2.0}}
        for name, content in {
            "peer": {"cuda fp16 512 px 100 steps": {**sides, "ratio": 4.636}},
            "unet_alone": {"cuda fp16 512 px": {"batch 4": alone, "conditions": {}}},
            "launch_table": {"a stub": {"geglu": {"rows": 8}}},
            "test_geglu": {"benchmarks": [{"name": "test_geglu[4]", "stats": {"median": 1.0}, "extra_info": kernel}]},
            "test_edit": {"benchmarks": [{"name": "edit_sample", "stats": {"median": 1.25}}]},
        }.items():
            (samples / f"{name}.json").write_text(json.dumps(content))
        self.environment = {
            **{name: value for name, value in os.environ.items() if name in ("HOME", "LANG")},
            "PATH": f"{stubs}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "LIMITS": str(folder / "limits"),
            "SAMPLES": str(samples), "REAL_PYTHON": sys.executable,
        }  # fmt: skip

    def run(self, quick: bool, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "bench/gpu.sh", str(self.out), *(["--quick"] if quick else [])]
        environment = self.environment | environment
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@QUICK
def test_every_line_runs_and_a_table_is_last(quick: bool, script: Script) -> None:
    done = script.run(quick)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "all passed" in said
    table = said[said.index("all passed") + 1 :]
    assert re.fullmatch(r" +ours +the other side +ratio", table[0])
    assert any(re.fullmatch(r"cuda fp16 512 px 100 steps +1\.100 s +5\.100 s +4\.64", line) for line in table)
    assert any(re.fullmatch(r"UNet alone, .*batch 4: diffusers +7\.80 ms +15\.60 ms +2\.00", line) for line in table)
    assert any(re.fullmatch(r"test_geglu.*floor 7\.0 us +12\.0 us +60\.0 us +5\.00", line) for line in table)
    assert done.stdout.endswith((script.out / "log.txt").read_text())
    assert {"peer.json", "unet_alone.json", "test_geglu.json"} <= {file.name for file in script.out.iterdir()}
    if not quick:
        assert any(re.fullmatch(r"edit_sample +1\.250 s", line) for line in table)
        assert any(line.split() == ["launch_table", "geglu"] for line in table)


@QUICK
def test_what_it_starts_is_there_and_takes_its_options(quick: bool, script: Script) -> None:
    script.run(quick)
    calls = [call.split() for call in script.lines("calls") if not call.startswith("-c")]
    assert len(calls) > 8
    for _, module, *arguments in calls:
        if module == "pytest":
            files = [argument for argument in arguments if argument.startswith(("bench/", "tests/"))]
            assert files and all((ROOT / file).exists() for file in files), arguments
            continue
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for argument in arguments:
            assert not argument.startswith("--") or f'"{argument}"' in source, f"{module} has no {argument}"


def test_the_most_valuable_comes_first_and_all_fits_into_eight_minutes(script: Script) -> None:
    script.run(quick=False)
    limits = [int(limit) for limit in script.lines("limits")]
    assert len(limits) > 10 and max(limits) < 470
    first = next(call for call in script.lines("calls") if not call.startswith("-c"))
    assert "peer_diffusers" in first and "--steps 100 --skip 36" in first
    assert sum(limits[:5]) <= 470, "edits, the UNet, the kernels' tests and tuning always get their time"
    (script.folder / "limits").unlink()
    done = script.run(quick=False, SECONDS_IN_ALL="30")
    assert done.returncode == 0 and all(int(limit) <= 30 for limit in script.lines("limits"))
    (script.folder / "limits").unlink()
    done = script.run(quick=False, SECONDS_IN_ALL="5")
    assert done.returncode == 1 and not script.lines("limits")
    assert "FAILED: edit --steps 100 --skip 36 (no time left)" in done.stdout
    assert "the other side" in done.stdout, "what there is, is shown"


@QUICK
def test_what_fails_is_named_and_the_rest_goes_on(quick: bool, script: Script) -> None:
    done = script.run(quick, FAIL="--images")
    assert done.returncode == 1
    assert "FAILED: edit --steps 20 --skip 7 --images 8 (3)" in done.stdout.splitlines()
    assert any("test_trajectory" in call for call in script.lines("calls")), "the steps behind it"
    assert "ratio" in done.stdout


def test_without_a_gpu_it_says_so_and_ends(script: Script) -> None:
    done = script.run(quick=False, NO_GPU="1")
    assert done.returncode == 1 and "no CUDA device" in done.stderr
    assert len(script.lines("calls")) == 1
