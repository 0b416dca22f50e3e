"""kernels/geglu.py against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ledits_min.engine import ops

REGISTERS = 48

# (rows.., width). A tile of the kernel is 4 rows by 256 columns.
SHAPES = {"narrow and odd": (3, 63), "one tile and a bit": (5, 1, 257), "SD, first level": (1, 2, 1280)}


def truth(projected: Tensor) -> Tensor:
    """value * gate * Phi(gate), Phi the normal distribution function, in float64."""
    value, gate = projected.double().chunk(2, dim=-1)
    return value * gate * 0.5 * torch.special.erfc(-gate / math.sqrt(2.0))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_it_is_the_definition(
    on: Callable[[str], None], device: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    projected = (torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) * 3.0).to(device, dtype)
    expected = truth(projected)
    for side in ("triton", "torch"):
        on(side)
        result = ops.geglu(projected)
        assert result.shape == shape
        assert result.dtype == dtype
        assert (result.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_projections_bias_comes_with_it(
    device: str, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    from ledits_min.kernels.geglu import geglu

    generator = torch.Generator().manual_seed(0)
    projected, bias = (
        (torch.randn(*size, 2 * shape[-1], generator=generator) * 3.0).to(device, dtype) for size in (shape[:-1], ())
    )
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    result, expected = geglu(projected, bias), truth(projected.double() + bias.double())
    assert result.dtype == dtype
    assert (result.double() - expected).norm() < tolerance * expected.norm()
    crossed = projected.transpose(0, -1).contiguous().transpose(0, -1)  # any layout
    assert torch.equal(geglu(crossed, bias), result)


@pytest.mark.parametrize("gate", [0.0, -0.0, 1e-40, 1e30, -1e30, math.inf, math.nan])
def test_extreme_gates(on: Callable[[str], None], device: str, gate: float) -> None:
    projected = torch.tensor([[2.0, 2.0, gate, 1.0]], device=device)
    on("triton")
    assert torch.allclose(ops.geglu(projected).double(), truth(projected), rtol=1e-5, atol=1e-44, equal_nan=True)


def test_every_output_is_written(on: Callable[[str], None], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    on("triton")
    assert not ops.geglu(torch.ones(3, 2 * 1030, device=device)).isnan().any()


def test_compiles_without_spills(ahead_of_time: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    from ledits_min.kernels import geglu as kernel

    constants = {"ROWS": kernel.SHAPE["rows"], "BLOCK": kernel.SHAPE["block"]}
    variants = [
        {
            "module": "geglu", "kernel": "_geglu", "constants": constants, "aligned": ["width"],
            "types": dict.fromkeys(("projected_ptr", "bias_ptr", "out_ptr"), f"*{dtype}"),
            "num_warps": kernel.SHAPE["warps"], "fuse": True,
        }
        for dtype in ("fp16", "bf16", "fp32")
    ]  # fmt: skip
    for usage in ahead_of_time(variants):
        assert usage["cubin"] > 0
        assert usage["stack"] == 0, usage
        assert usage["registers"] <= REGISTERS, usage
