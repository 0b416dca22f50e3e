"""The benchmark against the published algorithm runs, and both sides agree, before anyone believes its times."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_quick_run() -> None:
    """Five steps of which two are skipped, a source and a target prompt, two concepts; evaluations of either side."""
    command = [sys.executable, "-m", "bench.speed.peer_diffusers", "--quick", "--prompts", "--dtype", "fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["ours"]["evaluations"] == 3 * 2 + 1 + 2 * 4  # the empty prompt is not asked twice where both start
    assert found["peer"]["evaluations"] == 5 * 2 + 3 * 4
    assert found["ours"]["exact_latents_differ"] <= 1e-3
    assert found["ours"]["timed_latents_differ"] <= 0.5
    assert found["ours"]["peak_memory_GB"] > 0
