"""kernels/trajectory.py against `inversion`, which `ops` calls on its torch side."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE
from ledits_min.edit import invert
from ledits_min.engine import ops
from ledits_min.inversion import InversionSettings, Solver
from ledits_min.schedule import make_schedule

REGISTERS = 64

# A block of the kernels is 512 positions.
SIZES = {"non-square": (7, 13), "one more than a block": (27, 19), "several blocks": (63, 63)}


def close(kernel: Tensor, plain: Tensor) -> bool:
    """Bit for bit where both ran on a CPU; a GPU's torch divides by a number as it multiplies with its inverse."""
    return torch.equal(kernel, plain) if kernel.device.type == "cpu" else torch.allclose(kernel, plain, 1e-5, 1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("steps", [1, 3])
def test_all_noisy_copies(on: Callable[[str], None], device: str, size: tuple[int, int], steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(2, 3, *size, generator=generator).to(device)
    noise = torch.randn(steps, 2, 3, *size, generator=generator).to(device)
    alpha_bar_t = make_schedule(SD15_SCHEDULE, steps).alpha_bar_t
    on("triton")
    kernel = ops.trajectory(x_0, noise, alpha_bar_t)
    on("torch")
    assert close(kernel, ops.trajectory(x_0, noise, alpha_bar_t))
    assert torch.equal(kernel[-1], x_0)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(("source", "scale"), [("", 3.5), ("a face", 1.0), ("a face", 3.5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_of_residuals(
    inputs: ModuleType, on: Callable[[str], None], device: str, size: tuple[int, int], source: str, scale: float,
    channels_last: bool,
) -> None:  # fmt: skip
    steps, batch, channels = 2, 2, 3
    count = 2 if source and scale != 1.0 else 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps + 1, batch, channels, *size, generator=generator).to(device)
    branches = torch.randn(count * steps * batch, channels, *size, generator=generator).to(device)
    if channels_last:
        branches = branches.contiguous(memory_format=torch.channels_last)
    branches = branches.unflatten(0, (count, steps, batch))
    settings = InversionSettings(num_steps=50, skip=0, eta=0.5, source=source, source_guidance_scale=scale)
    steps_done = range(20, 22)
    on("triton")
    kernel = ops.residuals(x, branches, settings, Solver(settings), steps_done)
    on("torch")
    assert close(kernel, ops.residuals(x, branches, settings, Solver(settings), steps_done))


@pytest.mark.parametrize("side", ["torch", "triton"])
def test_batches_over_t_give_the_plain_loops_inversion(
    inputs: ModuleType, on: Callable[[str], None], device: str, side: str
) -> None:
    settings = InversionSettings(num_steps=6, skip=2, source="a face")
    schedule = settings.make_schedule()
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(1, 2, 5, 7, generator=generator).to(device)
    noise = torch.randn(4, 1, 2, 5, 7, generator=generator).to(device)
    contexts = {text: torch.randn(2, 5, 7, generator=generator).to(device) for text in ("", "a face")}

    def eps_model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * context

    x_t, residuals = invert(eps_model, contexts, x_0, noise, settings)
    on(side)
    x = ops.trajectory(x_0, noise, schedule.alpha_bar_t)
    branches = torch.stack([eps_model(x[:-1], schedule.timesteps, contexts[text]) for text in ("", "a face")])
    assert close(x[0], x_t)
    assert close(ops.residuals(x, branches, settings, Solver(settings), range(len(noise))), residuals)


def test_nan_reaches_its_own_position_only(inputs: ModuleType, on: Callable[[str], None], device: str) -> None:
    x, branches = torch.zeros(2, 1, 1, 3, 5, device=device), torch.zeros(1, 1, 1, 1, 3, 5, device=device)
    branches[..., 1, 2] = math.nan
    on("triton")
    settings = InversionSettings(num_steps=1, skip=0)
    kernel = ops.residuals(x, branches, settings, Solver(settings), range(1))
    assert torch.equal(kernel.isnan(), branches[0].isnan())


def test_any_layout_is_taken(inputs: ModuleType, device: str) -> None:
    from ledits_min.kernels import trajectory as kernel

    generator = torch.Generator().manual_seed(0)
    x, branches = (torch.randn(*s, 2, 3, 5, 7, generator=generator).to(device) for s in ((3,), (2, 2)))
    levels = ops.level_table(inputs.levels(2), torch.device(device))
    plain = kernel.residuals(levels, x, branches, 3.5)
    copies = kernel.trajectory(levels, x[0], x[1:])
    for a, b in ((2, 3), (1, 4), (0, 4)):
        crossed = x.transpose(a, b).contiguous().transpose(a, b)
        moved = branches.transpose(a + 1, b + 1).contiguous().transpose(a + 1, b + 1)
        assert torch.equal(kernel.residuals(levels, crossed, moved, 3.5), plain)
        assert torch.equal(kernel.trajectory(levels, crossed[0], crossed[1:]), copies)


def test_compiles_without_spills(ahead_of_time: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    from ledits_min.kernels import trajectory as kernel

    common = {"module": "trajectory", "num_warps": kernel.SHAPE["warps"], "fuse": False}
    aligned = ["size", "positions", "sample_stride", "channel_stride"]
    block = {"BLOCK": kernel.SHAPE["block"]}
    variants: list[dict[str, Any]] = [
        {"kernel": "_trajectory", "types": {}, "constants": block, "aligned": aligned, **common}
    ]
    for dtype, layout in (("fp32", {"STRIDE": 1}), ("fp16", {"STRIDE": 4, "channel_stride": 1})):
        variants.append({
            "kernel": "_residuals", "types": {"branches_ptr": f"*{dtype}", "scale": "fp32"},
            "constants": block | layout, "aligned": aligned, **common,
        })  # fmt: skip
    for usage in ahead_of_time(variants):
        assert usage["cubin"] > 0
        assert usage["stack"] == 0, usage
        assert usage["registers"] <= REGISTERS, usage
