"""Winograd's convolution is the convolution: every size, dtype and layout, and where the networks take it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ledits_min.config import SD15_UNET, SD15_VAE
from ledits_min.engine import cpu, ops, winograd
from ledits_min.engine.budget import Model
from ledits_min.engine.cost import unet_cost
from ledits_min.engine.fast_networks import FastConditioning, FastResnetBlock, accelerate
from ledits_min.unet import UNet

# Relative to the exact result. Half precision rounds inputs, weights, products and result.
BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

vectors = pytest.mark.skipif(not cpu.has_fused_products(), reason="this CPU or torch has no fused products in bfloat16")


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@given(
    batch=st.integers(1, 3), inputs=st.integers(1, 9), outputs=st.integers(1, 9), down=st.integers(1, 5),
    across=st.integers(1, 5), tiles=st.sampled_from([1, 4, 7, 256]), dtype=st.sampled_from(list(BOUNDS)),
    channels_last=st.booleans(), bias=st.booleans(), residual=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_it_is_the_convolution(
    batch: int, inputs: int, outputs: int, down: int, across: int, tiles: int, dtype: torch.dtype,
    channels_last: bool, bias: bool, residual: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    hidden = torch.randn(batch, inputs, 2 * down, 2 * across).to(dtype).contiguous(memory_format=layout)
    more = torch.randn(batch, outputs, 2 * down, 2 * across).to(dtype).contiguous(memory_format=layout)
    weights = torch.randn(outputs, inputs, 3, 3).to(dtype).contiguous(memory_format=layout)
    shift = torch.randn(outputs).to(dtype)
    exact = F.conv2d(hidden.double(), weights.double(), shift.double() if bias else None, padding=1)
    exact = exact + more.double() if residual else exact

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "TILES", tiles)
        found = winograd.convolve(
            hidden, winograd.transform_weights(weights), shift if bias else None, more if residual else None
        )
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    # Against what the terms are, not their sum: in the products they cancel.
    terms = (
        F.conv2d(hidden.double().abs(), weights.double().abs(), shift.double().abs(), padding=1) + more.double().abs()
    )
    assert float((found.double() - exact).norm() / terms.norm()) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_how_much_it_rounds(dtype: torch.dtype) -> None:
    """At a layer's size; in bfloat16 the convolution itself is off by 0.17 %."""
    torch.manual_seed(0)
    hidden, weights = torch.randn(2, 256, 16, 16).to(dtype), (torch.randn(256, 256, 3, 3) / 48.0).to(dtype)
    found = winograd.convolve(hidden, winograd.transform_weights(weights), None)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert error(found, F.conv2d(hidden.double(), weights.double(), padding=1)) < bound


def test_a_number_that_is_none_is_not_lost() -> None:
    hidden = torch.randn(1, 4, 8, 8)
    hidden[0, 2, 3, 5] = torch.nan
    weights = torch.randn(6, 4, 3, 3)
    found = winograd.convolve(hidden, winograd.transform_weights(weights), None)
    plain = F.conv2d(hidden, weights, padding=1)
    assert found.isnan()[plain.isnan()].all() and not found.isnan().all()


# --- where it is taken ----------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that were transformed, on a CPU that wants it."""
    shapes: list[tuple[int, ...]] = []

    def transform(weights: Tensor) -> Tensor:
        shapes.append(tuple(weights.shape))
        return winograd.transform_weights(weights)

    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: True)
    monkeypatch.setattr(cpu, "_transformed", cpu._made_once(transform))
    return shapes


@vectors
@pytest.mark.parametrize(("inputs", "outputs", "height", "width", "wanted"), [
    (256, 256, 16, 16, True), (256, 320, 8, 32, True),
    (255, 256, 16, 16, False), (256, 255, 16, 16, False),  # few channels
    (256, 256, 14, 16, False), (256, 256, 17, 16, False), (256, 256, 16, 17, False),  # small, odd
])  # fmt: skip
@torch.no_grad()
def test_the_layers_that_take_it(
    inputs: int, outputs: int, height: int, width: int, wanted: bool, taken: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(1)
    layer = nn.Conv2d(inputs, outputs, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    maps = (torch.randn(2, channels, height, width).bfloat16() for channels in (inputs, outputs))
    hidden, residual = (values.contiguous(memory_format=torch.channels_last) for values in maps)
    found, summed = ops.conv(hidden, layer), ops.add_conv(residual, hidden, layer)
    assert len(taken) == wanted, "transformed once, for both"
    exact = F.conv2d(hidden.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]
    assert error(found, exact) < 6e-3 and error(summed, exact + residual) < 6e-3

    layer.weight.mul_(2.0)
    exact = F.conv2d(hidden.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]
    assert error(ops.conv(hidden, layer), exact) < 6e-3, "the weights that are, not those that were"

    ops.conv(hidden.contiguous(), layer)
    ops.conv(hidden.float(), layer.float())
    layer.bfloat16()
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: False)
    ops.conv(hidden, layer)
    assert len(taken) == 2 * wanted, "another layout, another dtype, another CPU"


@vectors
def test_a_layer_that_is_trained_is_left_alone(taken: list[tuple[int, ...]]) -> None:
    layer = nn.Conv2d(256, 256, 3, padding=1).bfloat16()
    hidden = torch.randn(1, 256, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    ops.conv(hidden, layer).sum().backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None and not taken


@vectors
@torch.no_grad()
def test_a_block_is_as_near_to_its_float32_self(taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rounded more inside a layer is little beside what is rounded between layers."""
    torch.manual_seed(2)
    block = FastResnetBlock(512, 256, SD15_UNET).requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    hidden = torch.randn(2, 512, 32, 32).contiguous(memory_format=torch.channels_last)
    time = torch.randn(2, 1280)
    exact = block(hidden, FastConditioning(time, time)).double()
    block.bfloat16()
    narrow = hidden.bfloat16(), FastConditioning(time.bfloat16(), time.bfloat16())
    found = block(*narrow)
    assert len(taken) == 2
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: False)
    plain = block(*narrow)
    assert error(found, exact) < 1.5 * error(plain, exact) < 1e-2


@vectors
@torch.no_grad()
def test_a_plan_knows_what_is_kept(taken: list[tuple[int, ...]]) -> None:
    config = replace(SD15_UNET, block_out_channels=(32, 256, 256, 256))
    unet = accelerate(UNet(config)).bfloat16().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_t = torch.randn(1, 4, 32, 32).contiguous(memory_format=torch.channels_last)
    unet(x_t, torch.tensor([5]), torch.randn(1, 7, 768))
    kept = sum(16 * outputs * inputs for outputs, inputs, _, _ in taken)
    assert 0 < kept == unet_cost(config, 32, 32).transformed
    plans = [Model(config, SD15_VAE, 77, 2, 4).costs((32, 32), transforms) for transforms in (False, True)]
    assert plans[1].weights - plans[0].weights == 2 * kept
