"""kernels/group_norm_silu.py against torch in float64."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ledits_min.config import SD15_UNET, SD15_VAE
from ledits_min.engine import ops
from ledits_min.engine.fast_networks import accelerate
from ledits_min.unet import UNet
from ledits_min.vae import VAE

# Ceilings that hold under triton 3.6 and 3.7 for sm_80, sm_90 and sm_100.
REGISTERS = {"_statistics": 96, "_normalise": 80}

# (B, C, h, w), groups. The interpreter is slow, so the maps are small where the channels are many.
SHAPES = {
    "SD, first level: groups of 10": ((1, 320, 8, 8), 32),
    "SD, concatenated: groups of 30, no block is full": ((1, 960, 5, 9), 32),
    "SD, widest: a group is most of a block": ((1, 2560, 2, 2), 32),
    "VAE: all groups in one block": ((2, 128, 7, 13), 32),
    "embedded model: few narrow groups": ((2, 48, 6, 6), 8),
    "odd groups of odd width": ((2, 15, 9, 7), 5),
    "a group wider than a block of channels": ((1, 300, 3, 3), 2),
    "one position": ((2, 64, 1, 1), 8),
    "several parts, the last one short": ((1, 8, 27, 31), 4),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}  # relative; float16 has 11 bits


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


def truth(x: Tensor, norm: nn.GroupNorm, add: Tensor | None, silu: bool) -> Tensor:
    """The definition, in float64 and without GroupNorm: mean and variance of a group, then scale, shift, SiLU."""
    x = x.double() if add is None else x.double() + add.double()[:, :, None, None]
    groups = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, correction=0)
    normed = ((groups - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    normed = normed * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    return normed * torch.sigmoid(normed) if silu else normed


@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("dtype", "add", "silu"), [
    (torch.float32, False, True), (torch.float32, True, False), (torch.float16, True, True),
])  # fmt: skip
def test_it_is_the_definition(
    inputs: ModuleType, on: Callable[[str], None], device: str, shape: tuple[int, int, int, int], groups: int,
    dtype: torch.dtype, add: bool, silu: bool,
) -> None:  # fmt: skip
    x, norm = inputs.feature_map(shape, dtype, device), inputs.norm(shape[1], groups, dtype, device)
    time = torch.randn(shape[:2], generator=torch.Generator().manual_seed(1)).to(device, dtype) if add else None
    expected = truth(x, norm, time, silu)
    on("triton")
    result = ops.group_norm_silu(x, norm, time, silu)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert error(result, expected) < TOLERANCE[dtype]
    on("torch")
    assert error(ops.group_norm_silu(x, norm, time, silu), expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_large_mean_does_not_drown_the_spread(
    inputs: ModuleType, on: Callable[[str], None], device: str, offset: float
) -> None:
    """E[x^2] - E[x]^2 in float32 is off by one part in ten at 1e4; the inputs themselves allow eps(offset) / spread."""
    x, norm = inputs.feature_map((1, 12, 31, 45), device=device, offset=offset), inputs.norm(12, 4, device=device)
    on("triton")
    assert error(ops.group_norm_silu(x, norm), truth(x, norm, None, True)) < offset * 1e-7


@pytest.mark.parametrize("values", [0.0, 7.3, 1e-40, -100.1])
def test_constant_maps_give_the_bias(inputs: ModuleType, on: Callable[[str], None], device: str, values: float) -> None:
    """Nothing of the constant may be left but a few roundings, which 1 / sqrt(eps) = 316 and a weight of 2 enlarge."""
    norm = inputs.norm(16, 4, device=device)
    x = inputs.feature_map((1, 16, 5, 7), device=device).fill_(values)
    on("triton")
    result = ops.group_norm_silu(x, norm, silu=False)
    assert torch.allclose(result, norm.bias[:, None, None].expand_as(result), atol=1e-5 + 3e-4 * abs(values))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_group_and_no_other(
    inputs: ModuleType, on: Callable[[str], None], device: str, bad: float
) -> None:
    x, norm = inputs.feature_map((2, 16, 5, 7), device=device), inputs.norm(16, 4, device=device)
    x[1, 6, 2, 3] = bad
    on("triton")
    spoiled = ops.group_norm_silu(x, norm).isnan()
    assert spoiled[1, 4:8].all()
    assert spoiled.sum() == spoiled[1, 4:8].numel()


def test_every_output_is_written(
    inputs: ModuleType, on: Callable[[str], None], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    on("triton")
    result = ops.group_norm_silu(inputs.feature_map((2, 30, 13, 7), device=device), inputs.norm(30, 2, device=device))
    assert not result.isnan().any()


def test_nchw_goes_to_torch_and_says_so(inputs: ModuleType, on: Callable[[str], None], device: str) -> None:
    x, norm = inputs.feature_map((1, 8, 5, 7), device=device).contiguous(), inputs.norm(8, 4, device=device)
    on("triton")
    with pytest.warns(UserWarning, match="not channels-last"):
        result = ops.group_norm_silu(x, norm)
    on("torch")
    assert torch.equal(result, ops.group_norm_silu(x, norm))


def test_whole_networks_agree(on: Callable[[str], None], device: str) -> None:
    """Every norm of a channels-last UNet and VAE takes the kernel (a fallback would warn), and so does every GEGLU."""
    torch.manual_seed(0)
    levels: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    config = dataclasses.replace(
        SD15_UNET, num_attention_heads=(2, 2), cross_attention_dim=24, **levels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet, vae = accelerate(UNet(config).to(device)), accelerate(VAE(dataclasses.replace(SD15_VAE, **levels)).to(device))
    x_t, t, context = torch.randn(1, 4, 5, 8), torch.tensor([981]), torch.randn(1, 7, 24)
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_t = x_t.to(device).contiguous(memory_format=torch.channels_last)
    for run in (lambda: unet(x_t, t.to(device), context.to(device)), lambda: vae.decode(x_t)):
        on("torch")
        plain = run()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            on("triton")
            assert error(run(), plain.double()) < (1e-5 if device == "cpu" else 1e-3)  # convolutions in TF32
        assert not torch.equal(run(), plain)


# (channels of x, of the skip), groups, (h, w): a group may lie in both maps.
PAIRS = {
    "SD, the boundary between two groups": ((320, 320), 32, (3, 2)),
    "SD, the boundary within a group": ((1280, 640), 32, (1, 2)),
    "odd widths": ((7, 8), 5, (9, 7)),
    "several parts, the last one short": ((3, 5), 2, (19, 17)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("widths", "groups", "size"), PAIRS.values(), ids=PAIRS.keys())
def test_two_maps_are_normed_as_their_concatenation(
    inputs: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, widths: tuple[int, int],
    groups: int, size: tuple[int, int],
) -> None:  # fmt: skip
    from ledits_min.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu

    x, skip = (inputs.feature_map((2, width, *size), dtype, device, seed=i) for i, width in enumerate(widths))
    residual = inputs.feature_map((2, widths[0], *size), dtype, device, offset=5.0, seed=2)
    norm = inputs.norm(sum(widths), groups, dtype, device)
    add = torch.randn(2, widths[0], generator=torch.Generator().manual_seed(3)).to(device, dtype)
    tolerance = TOLERANCE.get(dtype, 1e-2)
    poison(monkeypatch)

    both = torch.cat([x.double() + add.double()[:, :, None, None], skip.double()], 1)
    result = group_norm_silu(x, norm, add, skip=skip)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert error(result, truth(both, norm, None, True)) < tolerance

    total, result = add_group_norm_silu(x, norm, residual, add[0], silu=False, skip=skip)
    expected = x.double() + residual.double() + add[0].double()[:, None, None]
    assert total.dtype == result.dtype == dtype
    assert error(total, expected) < tolerance
    assert error(result, truth(torch.cat([total, skip], 1), norm, None, False)) < tolerance


@pytest.mark.parametrize(("with_residual", "with_add"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("shape", "groups"), [((2, 15, 9, 7), 5), ((1, 300, 3, 3), 2), ((2, 48, 6, 6), 8)])
def test_the_sum_is_written_once_and_normed(
    inputs: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], groups: int,
    with_residual: bool, with_add: bool,
) -> None:  # fmt: skip
    """In half precision what is normed is the rounded sum, which is the residual of the layers to come."""
    from ledits_min.kernels.group_norm_silu import add_group_norm_silu, add_maps

    x, norm = inputs.feature_map(shape, torch.float16, device), inputs.norm(shape[1], groups, torch.float16, device)
    residual = inputs.feature_map(shape, torch.float16, device, seed=1) if with_residual else None
    add = torch.full((1, shape[1]), 0.3, dtype=torch.float16, device=device) if with_add else None
    before = x.clone()
    poison(monkeypatch)
    total, result = add_group_norm_silu(x, norm, residual, add)
    expected = x.float() + (0.0 if add is None else add.float()[:, :, None, None])
    expected = (expected + (0.0 if residual is None else residual.float())).half()
    assert torch.equal(total, expected)
    assert error(result, truth(total, norm, None, True)) < TOLERANCE[torch.float16]
    assert torch.equal(add_maps(x, residual, add), expected), "nor does a sum that no norm stands behind differ"
    assert torch.equal(x, before)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_sums_large_mean_does_not_drown_its_spread(inputs: ModuleType, device: str, offset: float) -> None:
    from ledits_min.kernels.group_norm_silu import add_group_norm_silu

    x, norm = inputs.feature_map((1, 12, 15, 23), device=device), inputs.norm(12, 4, device=device)
    residual = inputs.feature_map((1, 12, 15, 23), device=device, offset=offset, seed=1)
    total, result = add_group_norm_silu(x, norm, residual)
    assert error(result, truth(total, norm, None, True)) < offset * 1e-7


def test_any_layout_is_taken(inputs: ModuleType, device: str) -> None:
    from ledits_min.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu

    norm = inputs.norm(16, 4, device=device)
    x, skip = (inputs.feature_map((2, 8, 5, 7), device=device, seed=i) for i in range(2))
    plain, crossed = group_norm_silu(x, norm, skip=skip), skip.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(plain, group_norm_silu(x.contiguous(), norm, skip=crossed))
    sums = add_group_norm_silu(x, norm, x, skip=skip)
    assert all(map(torch.equal, sums, add_group_norm_silu(x, norm, x.contiguous(), skip=crossed)))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel allocates is NaN at first."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))


def test_parts_follow_the_map() -> None:
    """Few programs walk far, a large map is shared by many, and none has fewer positions than the least."""
    from ledits_min.kernels.group_norm_silu import SHAPE, rows_per_part

    assert rows_per_part(64, 40, 11, SHAPE) == 32  # 8 x 8
    assert rows_per_part(4096, 10, 3, SHAPE) == 64  # 64 x 64, one evaluation
    assert rows_per_part(4096, 30, 8 * 16, SHAPE) == 128
    assert 4096 // rows_per_part(4096, 10, 3 * 64, SHAPE) >= 16
    assert 256 <= 512 * 512 / rows_per_part(512 * 512, 4, 1, SHAPE) <= 512  # the VAE
    assert rows_per_part(1, 2, 1, SHAPE) == SHAPE["rows"]


def test_compiles_without_spills(ahead_of_time: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    from ledits_min.kernels import group_norm_silu as kernel

    variants = []
    cases = [("fp16", 8, 128), ("bf16", 8, 128), ("fp32", 8, 128), ("fp16", 8, 256), ("fp32", 1, 128)]
    for dtype, vector, block in cases:
        constants = {
            "VECTOR": vector, "ROWS": kernel.SHAPE["rows"], "BLOCK": block, "MEMBERS": kernel.MEMBERS,
            "STAGES": kernel.SHAPE["stages"],
        }  # fmt: skip
        types = dict.fromkeys(
            ("x_ptr", "skip_ptr", "residual_ptr", "add_ptr", "total_ptr", "weight_ptr", "bias_ptr", "out_ptr"),
            f"*{dtype}",
        )
        common = {
            "module": "group_norm_silu", "types": types | {"epsilon": "fp32"}, "num_warps": kernel.warps(block),
            "fuse": True, "aligned": [],
        }  # fmt: skip
        for own in ({"SUM": False}, {"SUM": True}, {"CHUNK": kernel.CHUNK}):
            name = "_normalise" if "CHUNK" in own else "_statistics"
            limit = kernel.register_limit(name, vector, block)
            variants.append({"kernel": name, "constants": constants | own, "limit": limit, **common})
    for usage in ahead_of_time(variants):
        assert usage["cubin"] > 0
        assert usage["stack"] == 0, usage
        if usage["constants"]["VECTOR"] == 8 and usage["constants"]["BLOCK"] == kernel.CHANNELS:
            assert usage["registers"] <= REGISTERS[usage["kernel"]], usage
