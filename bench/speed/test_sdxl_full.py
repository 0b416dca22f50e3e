"""SDXL at its full size: a picture of 1024 x 1024 through encode, invert, edit and decode, on random weights.

A folder of all four parts in bfloat16 is written, then edited by a fresh process through the public door. Measured are
its seconds and its peak of memory, beside what the plan promised; everything it made must be finite.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from ledits_min.files.configs import config_json
from ledits_min.weights.read.folder import FOLDERS, STEMS
from ledits_min.weights.read.published import SDXL
from ledits_min.weights.read.shapes import expected_shapes

NEEDED = 12e9  # bytes: the weights take 7 GB
SIZE, STEPS, SKIP = 1024, 3, 1

EDIT = """
import json, sys, time
import numpy as np, torch
from ledits_min import Concept
from ledits_min.app.cli.explain import plan_edit, without_weights
from ledits_min.pipeline import LEdits

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

model, side, steps, skip = sys.argv[1], *map(int, sys.argv[2:])
concepts = [Concept("sunglasses", guidance_scale=5.0, threshold=0.9, warmup_steps=0)]
start = {"source": "", "source_guidance_scale": 3.5, "num_steps": steps, "skip": skip, "eta": 1.0}
edit = {"guidance_scale": 7.5, "concepts": concepts, "output_size": "model"}
shapes, device = without_weights(model, "cpu", "bfloat16")
latents = (side // shapes.vae.config.factor,) * 2
plan = plan_edit(shapes, shapes.inversion_settings(**start), latents, edit, device, apart=True)
rows, columns = np.mgrid[0:side, 0:side] / 90.0
waves = [np.sin(columns), np.cos(rows), np.sin(rows + columns)]
picture = ((np.stack(waves, axis=-1) + 1.0) * 127.5).astype(np.uint8)
before, marks = resident("VmRSS"), [time.perf_counter()]

def mark(value):
    marks.append(time.perf_counter())
    return value

ledits = mark(LEdits.from_pretrained(model, device="cpu", dtype="bfloat16"))
inversion = mark(ledits.invert(picture, progress=False, **start))
result = mark(ledits.edit(inversion, progress=False, **edit))
made = [inversion.latents, inversion.x_T, inversion.residuals, result.latents, *result.masks]
print(json.dumps({
    "finite": all(bool(tensor.isfinite().all()) for tensor in made),
    "size": result.images[0].size,
    "levels": len(np.unique(np.asarray(result.images[0]))),
    "covered": float(result.masks[0].mean()),
    "dtypes": [str(ledits.dtype), str(next(ledits.vae.parameters()).dtype)],
    "evaluations": ledits.runner.evaluations,
    "planned": {phase.name: phase.evaluations for phase in plan.phases},
    "tflop": plan.flop / 1e12,
    "planned_memory": plan.memory,
    "peak": resident("VmHWM") - before,
    "seconds": {name: round(b - a, 1) for name, a, b in zip(("load", "invert", "edit"), marks, marks[1:])},
}))
"""


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Weights that keep activations near one and predictions small, in bfloat16; one tensor at a time is in memory."""
    generator, header, position = torch.Generator().manual_seed(seed), {}, 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (position, position + size)}
        position += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator)
            scale = values[0].numel() ** -0.5 if values.dim() > 1 else 0.1
            values.mul_(0.1 * scale if name.startswith("conv_out") else scale)
            values.add_(float(values.dim() == 1 and name.endswith("weight")))
            file.write(values.bfloat16().view(torch.int16).numpy().tobytes())


def available() -> int:
    """Bytes that could be had if files that are merely cached made room."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read as Linux tells it")
    if available() < NEEDED:
        pytest.skip(f"{NEEDED / 1e9:.0f} GB of free memory are needed")
    for seed, (part, config) in enumerate(SDXL.configs.items()):
        (tmp_path / FOLDERS[part]).mkdir()
        (tmp_path / FOLDERS[part] / "config.json").write_text(json.dumps(config_json(config)))
        write_random(tmp_path / FOLDERS[part] / f"{STEMS[part]}.safetensors", dict(expected_shapes(config)), seed)
    (tmp_path / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": True}))
    yield tmp_path
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


def test_edit_at_1024(benchmark: Any, model: Path) -> None:
    found: dict[str, Any] = {}

    def edit() -> None:
        command = [sys.executable, "-c", EDIT, str(model), *map(str, (SIZE, STEPS, SKIP))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.update(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(edit, rounds=1)
    seconds = found.pop("seconds")
    gigabytes = {f"{name}_GB": round(found.pop(name) / 1e9, 2) for name in ("planned_memory", "peak")}
    benchmark.extra_info |= {**found, **gigabytes, "phases": seconds}
    print(f"\nSDXL, {SIZE} pixels: {found}, {gigabytes}, {seconds}")
    assert found["finite"] and found["size"] == [SIZE, SIZE] and found["levels"] > 2 and found["covered"] > 0
    assert found["evaluations"] == found["planned"]
    assert found["dtypes"] == ["torch.bfloat16", "torch.float32"]
