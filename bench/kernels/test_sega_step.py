"""kernels/sega_step.py: one launch against the same step in torch, eager and compiled. Random predictions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from ledits_min.engine import ops
from ledits_min.engine.ops import EditSteps
from ledits_min.guidance import EditSettings

STEPS = 500  # the kernel's own counter moves on with every call

CASES = {
    "512 px, 3 concepts": ((64, 64), 3, 1),
    "512 px, 3 concepts, 8 images": ((64, 64), 3, 8),
    "768 px, 3 concepts": ((96, 96), 3, 1),
    "1024 px, 3 concepts": ((128, 128), 3, 1),
}


@pytest.mark.parametrize(("size", "concepts", "batch"), CASES.values(), ids=CASES.keys())
def test_sega_step(
    gpu: ModuleType, inputs: ModuleType, benchmark: Any, size: tuple[int, int],
    concepts: int, batch: int,
) -> None:  # fmt: skip
    terms = tuple(inputs.term(f"c{i}", threshold=0.95 - 0.05 * i) for i in range(concepts))
    settings = EditSettings("target", concepts=terms, momentum_scale=0.3)
    steps = EditSteps(inputs.levels(STEPS), settings)
    case = inputs.edit(EditSteps(steps.levels[:1], settings), size, batch, device="cuda")
    maps = case.x_t.nbytes
    # Every branch, x_t and the residual once; x_t, momentum and the counts are read and written.
    moved = maps * (len(case.branches[0]) + 1 + 2 + 2 + 2 * concepts)
    residuals = case.residuals.expand(STEPS, *case.x_t.shape).contiguous()
    branches = [torch.randn_like(case.branches[0]) for _ in range(gpu.buffers(moved))]

    def calls(step: Any) -> list[Any]:
        buffers = [(steps, ops.start(steps, case.x_t), maps, residuals, 0) for maps in branches]
        return [lambda a=arguments: step(*a) for arguments in buffers]

    results = {}
    for side in ("triton", "torch"):
        with gpu.kernels(side):
            results[side] = ops.start(steps, case.x_t)
            ops.sega_step(steps, results[side], case.branches[0], residuals, 0)
    off = gpu.difference(results["triton"].x_t, results["torch"].x_t)
    assert off < 1e-5
    assert torch.equal(results["triton"].counts, results["torch"].counts)
    benchmark.extra_info["difference"] = off
    gpu.report(
        benchmark, {"eager": calls(ops.sega_step), "compiled": calls(gpu.compiled(ops.sega_step))},
        calls(ops.sega_step), moved,
    )  # fmt: skip
