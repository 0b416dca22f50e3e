"""kernels/sega_step.py: one launch against the same step in torch, eager and compiled. Random predictions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from ledits_min import ops
from ledits_min.ops import EditPlan

STEPS = 500  # the kernel's own counter moves on with every call

CASES = {
    "512 px, 1 concept": ((64, 64), 1, 1),
    "512 px, 3 concepts": ((64, 64), 3, 1),
    "512 px, 3 concepts, 8 images": ((64, 64), 3, 8),
    "768 px, 3 concepts": ((96, 96), 3, 1),
    "1024 px, 3 concepts": ((128, 128), 3, 1),
}


@pytest.mark.parametrize(("size", "concepts", "batch"), CASES.values(), ids=CASES.keys())
def test_sega_step(
    gpu: ModuleType, inputs: ModuleType, benchmark: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int],
    concepts: int, batch: int,
) -> None:  # fmt: skip
    terms = [inputs.term(f"c{i}", threshold=0.95 - 0.05 * i) for i in range(concepts)]
    plan = EditPlan(inputs.levels(STEPS), terms, target="target", momentum_scale=0.3)
    case = inputs.edit(EditPlan(plan.levels[:1], terms, target="target", momentum_scale=0.3), size, batch, device="cuda")
    maps = case.x_t.nbytes
    # Every branch, x_t and the residual once; x_t, momentum and the counts are read and written.
    moved = maps * (len(case.branches[0]) + 1 + 2 + 2 + 2 * concepts)
    residuals = case.residuals.expand(STEPS, *case.x_t.shape).contiguous()
    count = gpu.buffers(moved)
    branches = [torch.randn_like(case.branches[0]) for _ in range(count)]

    def calls(step: Any) -> list[Any]:
        states = [ops.start(plan, case.x_t) for _ in range(count)]
        return [lambda s=state, b=maps: step(plan, s, b, residuals, 0) for state, b in zip(states, branches, strict=True)]

    results = {}
    for side in ("torch", "triton"):
        monkeypatch.setenv("LEDITS_KERNELS", side)
        state = ops.start(plan, case.x_t)
        ops.sega_step(plan, state, case.branches[0], residuals, 0)
        results[side] = state
    monkeypatch.setenv("LEDITS_KERNELS", "torch")
    compiled = calls(torch.compile(ops.sega_step))
    eager = calls(ops.sega_step)
    figures = gpu.compare({"eager": eager, "compiled": compiled, "eager, graph": gpu.graphed(eager)}, moved)
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    kernel = calls(ops.sega_step)
    figures = gpu.compare({"kernel": kernel, "kernel, graph": gpu.graphed(kernel)}, moved, figures)
    benchmark.extra_info |= figures | {
        "difference": gpu.difference(results["triton"].x_t, results["torch"].x_t),
        "masks equal": torch.equal(results["triton"].counts, results["torch"].counts),
    }
    assert benchmark.extra_info["difference"] < 1e-5
    benchmark.pedantic(gpu.synchronised(kernel), rounds=20)
