"""kernels/layer_norm.py against the definition, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REGISTERS = 96

# (rows.., width)
SHAPES = {"narrow and odd": (5, 63), "one more than a block": (2, 3, 513), "SD, first level": (1, 7, 320)}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def layer(width: int, dtype: torch.dtype, device: str) -> nn.LayerNorm:
    """A LayerNorm with weights that are no ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(width)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=generator)
        norm.bias.normal_(generator=generator)
    return norm.to(device, dtype).requires_grad_(False)


def truth(total: Tensor, norm: nn.LayerNorm) -> Tensor:
    x = total.double()
    off = x - x.mean(-1, keepdim=True)
    return off / (off.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel allocates is NaN at first."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("with_residual", "with_add"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", TOLERANCE.keys(), ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_the_definition(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool, with_add: bool
) -> None:
    from ledits_min.kernels.layer_norm import add_layer_norm

    generator = torch.Generator().manual_seed(0)
    x, residual = ((torch.randn(*shape, generator=generator) * 3.0 + i).to(device, dtype) for i in range(2))
    add = torch.randn(shape[-1], generator=generator).to(device, dtype)
    norm, before = layer(shape[-1], dtype, device), x.clone()
    total, normed = add_layer_norm(x, norm, residual if with_residual else None, add if with_add else None)

    expected = x.double() + (add.double() if with_add else 0.0) + (residual.double() if with_residual else 0.0)
    assert total.dtype == normed.dtype == dtype
    assert total.shape == normed.shape == shape
    assert (total.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()
    # What is normed is the rounded sum, which is the residual of the layers to come.
    assert (normed.double() - truth(total, norm)).norm() < TOLERANCE[dtype] * truth(total, norm).norm()
    assert torch.equal(x, before)


def test_half_precision_sums_are_rounded_once(device: str) -> None:
    from ledits_min.kernels.layer_norm import add_layer_norm

    x = torch.full((1, 8), 2048.0, dtype=torch.float16, device=device)
    one = torch.ones(8, dtype=torch.float16, device=device)
    total, _ = add_layer_norm(x, layer(8, torch.float16, device), one[None], one)  # apart: 2048 + 1 = 2048, twice
    assert (total == 2050.0).all()


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_large_mean_does_not_drown_the_spread(device: str, offset: float) -> None:
    from ledits_min.kernels.layer_norm import add_layer_norm

    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(0)).to(device) + offset
    norm = layer(320, torch.float32, device)
    _, normed = add_layer_norm(x, norm)
    assert (normed.double() - truth(x, norm)).norm() < offset * 2e-7 * truth(x, norm).norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_row_and_no_other(device: str, bad: float) -> None:
    from ledits_min.kernels.layer_norm import add_layer_norm

    x = torch.randn(5, 63, generator=torch.Generator().manual_seed(0)).to(device)
    x[2, 7] = bad
    _, normed = add_layer_norm(x, layer(63, torch.float32, device), x.flip(1))
    assert normed[2].isnan().all()
    assert torch.isfinite(normed[[0, 1, 3, 4]]).all()


def test_any_layout_is_taken_and_too_wide_a_row_refused(device: str) -> None:
    from ledits_min.kernels.layer_norm import MAX_WIDTH, add_layer_norm

    norm = layer(63, torch.float32, device)
    maps = torch.randn(2, 63, 3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = maps.flatten(2).transpose(1, 2)
    sums = add_layer_norm(tokens, norm, tokens)
    assert all(map(torch.equal, sums, add_layer_norm(tokens.contiguous(), norm, tokens.contiguous())))
    with pytest.raises(ValueError, match="do not fit in registers"):
        add_layer_norm(torch.zeros(1, MAX_WIDTH + 1, device=device), norm)


def test_compiles_without_spills(ahead_of_time: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    from ledits_min.kernels import layer_norm as kernel

    variants = []
    for dtype, block in [("fp16", 512), ("fp16", 1024), ("fp16", 2048), ("bf16", 512), ("fp32", 2048), ("fp32", 8192)]:
        rows = max(1, kernel.SHAPE["tile"] // block)
        pointers = ("x_ptr", "residual_ptr", "add_ptr", "weight_ptr", "bias_ptr", "total_ptr", "out_ptr")
        variants.append({
            "module": "layer_norm", "kernel": "_add_layer_norm", "constants": {"ROWS": rows, "BLOCK": block},
            "types": dict.fromkeys(pointers, f"*{dtype}") | {"epsilon": "fp32"}, "aligned": ["width"],
            "num_warps": kernel.warps(block), "fuse": True,
        })  # fmt: skip
    for usage in ahead_of_time(variants):
        assert usage["cubin"] > 0
        assert usage["stack"] == 0, usage
        assert usage["registers"] <= REGISTERS, usage
