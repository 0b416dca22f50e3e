"""kernels/trajectory.py: all noisy copies, and a batch of residuals, against the same in torch. Random latents."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from ledits_min.engine import ops
from ledits_min.inversion import InversionSettings, Solver

SIZES = {"512 px": (64, 64), "1024 px": (128, 128)}
STEPS = 64  # the paper's 100 steps, 36 skipped
TOGETHER = 16  # residuals of one batch over t


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_noisy_copies(gpu: ModuleType, inputs: ModuleType, benchmark: Any, size: tuple[int, int]) -> None:
    alpha_bar_t = torch.tensor([level.alpha_bar_t for level in inputs.levels(STEPS)], dtype=torch.float64)
    x_0 = torch.randn(1, 4, *size, device="cuda")
    moved = x_0.nbytes * (1 + STEPS + STEPS + 1)
    noises = [torch.randn(STEPS, 1, 4, *size, device="cuda") for _ in range(gpu.buffers(moved))]
    gpu.report_function(
        benchmark, ops.trajectory, [(x_0, noise, alpha_bar_t) for noise in noises], moved, tolerance=1e-6,
        graphs=False,  # the schedule comes from the host
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_residuals(gpu: ModuleType, inputs: ModuleType, benchmark: Any, size: tuple[int, int]) -> None:
    settings = InversionSettings(num_steps=STEPS, skip=0, source="source")
    maps = 1 * 4 * size[0] * size[1] * 4
    moved = maps * (TOGETHER + 1 + 2 * TOGETHER + TOGETHER)
    arguments = [
        (
            torch.randn(TOGETHER + 1, 1, 4, *size, device="cuda"),
            torch.randn(2, TOGETHER, 1, 4, *size, device="cuda"),
            settings,
            Solver(settings),
            range(TOGETHER),
        )
        for _ in range(gpu.buffers(moved))
    ]
    gpu.report_function(benchmark, ops.residuals, arguments, moved, tolerance=1e-5, graphs=False)
