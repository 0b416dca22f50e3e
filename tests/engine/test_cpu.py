"""Layers in slices on a CPU: what they compute is what `ops` says, in every precision and at every remainder."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ledits_min.engine import cpu, ops, winograd

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the layer's own rounding, relative


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(2, 3, 50, 77, 40), (1, 1, 300, 300, 16), (3, 2, 1, 5, 8)])
@pytest.mark.parametrize("scores", [1, 2**12, 2**14, 2**24])
def test_attention_in_slices_is_attention(shape: tuple[int, ...], scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, queries, keys, width = shape
    q, k, v = (torch.randn(batch, n, heads, width).bfloat16().transpose(1, 2) for n in (queries, keys, keys))
    monkeypatch.setattr(cpu, "SCORES", scores)
    monkeypatch.setattr(cpu, "QUERIES", 7)
    monkeypatch.setattr(cpu, "FEW_SCORES", 0)
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: True)
    assert cpu.serves_attention(q, k, v) and not cpu.serves_attention(q.float(), k.float(), v.float())
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = ops.attention(q, k, v)
    assert found.shape == exact.shape
    assert error(found, exact) < 1e-2
    assert torch.equal(found, ops.attention(q, k, v))
    assert error(ops.attention(q.float(), k.float(), v.float()), exact) < 1e-5


@pytest.mark.parametrize("width", [40, 64])  # filled up to a vector's width, and as wide as it is
@pytest.mark.parametrize("shift", [0.0, 50.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 30.0, 1000.0])
def test_attention_by_powers_and_by_softmax(
    width: int, shift: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Powers of two are only formed where none can overflow; what all keys have in common never matters."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 130, 3, width).bfloat16().transpose(1, 2) for _ in range(3))
    k = k + shift  # rounded to bfloat16, as a layer's result would be
    q[1, 2] = (q[1, 2] * scale).bfloat16()  # one head alone
    powers = 0

    def exp2_(weights: Tensor) -> Tensor:
        nonlocal powers
        powers += 1
        result = weights.copy_(torch.exp2(weights))
        assert bool(result.isfinite().all()) and bool((result > 0).all())
        return result

    monkeypatch.setattr(Tensor, "exp2_", exp2_)
    monkeypatch.setattr(cpu, "SCORES", 1)
    monkeypatch.setattr(cpu, "QUERIES", 130)  # a head at a time
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = ops.attention(q, k, v)
    for image, head in ((0, 0), (1, 2)):
        # A score is rounded to 1/256 of itself, and large ones tell keys apart that are as good as equal.
        bound = 1e-2 if scale <= 1.0 or (image, head) == (0, 0) else 0.2
        assert error(found[image, head], exact[image, head]) < bound
    assert powers == (6 if scale <= 3.0 else 5)


def test_attention_carries_values_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: True)
    q, k, v = (torch.randn(1, 2, 130, 16).bfloat16() for _ in range(3))
    q[0, 1, 5] = torch.nan
    found = ops.attention(q, k, v)
    assert found[0, 1, 5].isnan().all() and found[0, 0].isfinite().all()


@pytest.mark.parametrize("keys", [1, 15, 16, 77, 80, 154])
def test_attention_over_any_number_of_keys(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that only fill up the row have no share, whatever the scores are."""
    monkeypatch.setattr(cpu, "FEW_SCORES", 0)
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: False)
    q, k, v = (torch.randn(2, n, 3, 40).bfloat16().transpose(1, 2) for n in (70, keys, keys))
    q = q - 3.0 * k.mean(dim=2, keepdim=True)  # most scores are far below those of a key of zeros
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(ops.attention(q, k, v), exact) < 1e-2


@pytest.mark.parametrize("keys", [48, 50])
@pytest.mark.parametrize("width", [5, 16, 40])
def test_attention_in_heads_that_are_filled_up(keys: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By zeros, which add nothing to a score; what was a head's width still divides the scores."""
    monkeypatch.setattr(cpu, "FEW_SCORES", 0)
    monkeypatch.setattr(cpu, "MANY_KEYS", 48)
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: False)
    q, k, v = (torch.randn(2, n, 3, width).bfloat16().transpose(1, 2) for n in (70, keys, keys))
    plain, widths = nn.functional.scaled_dot_product_attention, []

    def watched(q: Tensor, *more: Any, **options: Any) -> Tensor:
        widths.append(q.shape[-1])
        return plain(q, *more, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    found = ops.attention(q, k, v)
    assert widths == [-(-width // 16) * 16 if keys == 48 else width]
    exact = plain(q.double(), k.double(), v.double())
    assert found.shape == exact.shape and error(found, exact) < 5e-3


fused = pytest.mark.skipif(not cpu.has_fused_products(), reason="this CPU or torch has no fused products in bfloat16")


@fused
@pytest.mark.parametrize(("shape", "of_vectors", "of_tiles"), [
    ((1, 96, 8, 8), False, True), ((1, 96, 3, 5), True, True), ((2, 40, 3, 5), False, True),
    ((1, 16, 7, 9), False, False),
])  # fmt: skip
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_convolutions(
    shape: tuple[int, int, int, int], of_vectors: bool, of_tiles: bool, side: int, vectors: bool, channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whether there are few positions for the weights is told for each kind of CPU."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: vectors)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = nn.Conv2d(shape[1], 24, side, padding=side // 2).bfloat16()
    layer = layer.to(memory_format=layout)  # type: ignore[call-overload]
    hidden = torch.randn(shape).bfloat16().contiguous(memory_format=layout)
    residual = torch.randn(shape[0], 24, *shape[2:]).bfloat16().contiguous(memory_format=layout)
    found, summed = ops.conv(hidden, layer), ops.add_conv(residual, hidden, layer)
    exact = layer.double()(hidden.double())
    assert error(found, exact) < 5e-3 and error(summed, exact + residual) < 5e-3
    for result in (found, summed):
        assert result.dtype == torch.bfloat16 and result.is_contiguous(memory_format=layout)
    assert cpu.is_mostly_weights(hidden) == (channels_last and (of_vectors if vectors else of_tiles))


DOUBLED = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", DOUBLED)
@pytest.mark.parametrize("shape", [(1, 96, 8, 8), (3, 40, 3, 5), (2, 8, 1, 2), (1, 16, 7, 9)])
@pytest.mark.parametrize("vectors", [False, True])  # with vectors fewer maps are doubled by products
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_doubling_and_convolving(
    shape: tuple[int, ...], dtype: torch.dtype, vectors: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: vectors)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = nn.Conv2d(shape[1], 24, 3, padding=1).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    hidden = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    height, width = shape[2:]
    sizes = [(2 * height, 2 * width), (2 * height - 1, 2 * width)]  # of which only the first is served here
    found = [ops.upsample_conv(hidden, size, layer) for size in sizes]
    form = None  # that the weights were brought into
    if channels_last and (dtype == torch.float32 or (dtype == torch.bfloat16 and cpu.has_fused_products())):
        by_products = dtype == torch.bfloat16 and cpu.is_mostly_weights(hidden)
        form = cpu._quarter if by_products else cpu._stretch
    assert list(cpu._kept[layer][0] if layer in cpu._kept else ()) == ([form] if form else [])
    layer.double()
    for result, size in zip(found, sizes, strict=True):
        exact = layer(nn.functional.interpolate(hidden.double(), size=size, mode="nearest"))
        assert result.dtype == dtype and result.shape == exact.shape
        assert result.is_contiguous(memory_format=layout) and error(result, exact) < DOUBLED[dtype]


def test_doubling_follows_the_layers_weights() -> None:
    """In every way that torch knows of: what is made of them once must never be of other weights."""
    layer, hidden = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), torch.randn(1, 8, 4, 4)
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    assert cpu.serves_upsampling(hidden, (8, 8), layer)
    for change in (
        lambda: None,
        lambda: layer.weight.mul_(2.0),
        lambda: layer.load_state_dict({n: torch.randn_like(p) for n, p in layer.state_dict().items()}, assign=True),
        lambda: layer.load_state_dict({n: torch.randn_like(p) for n, p in layer.state_dict().items()}),
        lambda: layer.bfloat16().float(),
    ):
        change()
        exact = layer(nn.functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        assert error(ops.upsample_conv(hidden, (8, 8), layer), exact.double()) < 1e-6
        made = cpu._stretched(layer)
        assert made is cpu._stretched(layer), "made again"
    layer.requires_grad_(True)
    assert not cpu.serves_upsampling(hidden, (8, 8), layer)


def test_weights_that_do_not_tell_of_changes_are_taken_as_they_are() -> None:
    with torch.inference_mode():
        layer, hidden = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 4, 4)
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            exact = layer(nn.functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))
            assert error(ops.upsample_conv(hidden, (8, 8), layer), exact.double()) < 1e-6
            layer.weight.mul_(3.0)


def test_what_was_made_of_a_layer_goes_with_it() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def double(weight: torch.Tensor) -> torch.Tensor:
        made.append(weakref.ref(result := 2.0 * weight))
        return result

    doubled, negated = cpu._made_once(double), cpu._made_once(torch.neg)
    layer = nn.Conv2d(8, 8, 3).requires_grad_(False)
    assert doubled(layer) is doubled(layer) and len(made) == 1
    assert torch.equal(negated(layer), -layer.weight)
    layer.bfloat16()
    assert negated(layer).dtype == torch.bfloat16
    gc.collect()
    assert made[0]() is None, "what was made of other weights"
    doubled(layer)
    del layer
    gc.collect()
    assert made[1]() is None


@fused
@torch.no_grad()
def test_a_linear_layer_and_a_sum() -> None:
    tokens, residual = torch.randn(2, 9, 24).bfloat16(), torch.randn(2, 9, 40).bfloat16()
    layer = nn.Linear(24, 40).bfloat16()
    found = ops.add_linear(residual, tokens, layer)
    exact = residual + layer.double()(tokens.double())
    assert found.shape == exact.shape and error(found, exact) < 5e-3


def layers(width: int, dtype: torch.dtype) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear]:
    torch.manual_seed(width)
    norm, widen, narrow = nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    for layer in (norm, widen, narrow):
        layer.to(dtype).requires_grad_(False)
    return norm, widen, narrow


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [((2, 7, 24), 24), ((1, 64, 40), 40), ((3, 33, 16), 16), ((5, 1, 8), 8)])
def test_the_feed_forward_in_slices(
    tokens: tuple[int, ...], width: int, fused: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "FEED_FORWARD", 4 * width)
    if fused and not (dtype == torch.bfloat16 and cpu.has_fused_products()):
        pytest.skip("fused products are for bfloat16, on CPUs that compute in it")
    monkeypatch.setattr(cpu, "has_fused_products", lambda: fused)
    x = torch.randn(tokens).to(dtype)
    norm, widen, narrow = layers(width, dtype)
    assert cpu.serves_feed_forward(x, norm, widen, narrow)
    found = ops.feed_forward(x, norm, widen, narrow)
    for layer in (norm, widen, narrow):
        layer.double()
    value, gate = widen(norm(x.double())).chunk(2, dim=-1)
    exact = x.double() + narrow(value * nn.functional.gelu(gate))
    assert found.shape == x.shape and found.dtype == dtype
    assert error(found, exact) < BOUNDS[dtype]


def test_a_slice_knows_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEED_FORWARD", 4 * 16)
    norm, widen, narrow = layers(16, torch.float32)
    x = torch.randn(2, 6, 16)
    whole = ops.feed_forward(x, norm, widen, narrow)
    poisoned = x.clone()
    poisoned[1, 5] = torch.nan
    found = ops.feed_forward(poisoned, norm, widen, narrow)
    assert torch.equal(found.flatten(0, 1)[:11], whole.flatten(0, 1)[:11]) and found[1, 5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["tokens", "norm", "widen", "narrow"])
def test_gradients_are_not_lost(wanted: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEED_FORWARD", 2 * 8)
    named = dict(zip(("norm", "widen", "narrow"), layers(8, dtype), strict=True))
    x = torch.randn(1, 5, 8, dtype=dtype)
    leaf = x if wanted == "tokens" else named[wanted].weight
    leaf.requires_grad_(True)
    ops.feed_forward(x, **named).sum().backward()
    assert leaf.grad is not None


CONVOLUTIONS: dict[str, Callable[[Tensor, nn.Conv2d], Tensor]] = {
    "conv": ops.conv,
    "add_conv": lambda hidden, layer: ops.add_conv(hidden.detach(), hidden, layer),
    "added_conv": lambda hidden, layer: ops.add_conv(hidden, hidden.detach(), layer),
    "upsample_conv": lambda hidden, layer: ops.upsample_conv(hidden, (6, 6), layer),
}


@pytest.mark.parametrize("wanted", ["weight", "bias", "hidden"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("side", [1, 3])
def test_gradients_of_convolutions_are_not_lost(name: str, side: int, wanted: str) -> None:
    layer = nn.Conv2d(40, 40, side, padding=side // 2).bfloat16().requires_grad_(False)
    hidden = torch.randn(1, 40, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    leaf = hidden if wanted == "hidden" else getattr(layer, wanted)
    leaf.requires_grad_(True)
    CONVOLUTIONS[name](hidden, layer).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None


@pytest.mark.parametrize("wanted", ["residual", "tokens", "weight", "bias"])
def test_gradients_of_a_sum_are_not_lost(wanted: str) -> None:
    layer = nn.Linear(8, 8).bfloat16().requires_grad_(False)
    inputs = {name: torch.randn(1, 4, 8).bfloat16() for name in ("residual", "tokens")}
    leaf = inputs[wanted] if wanted in inputs else getattr(layer, wanted)
    leaf.requires_grad_(True)
    ops.add_linear(**inputs, layer=layer).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_of_attention_are_not_lost(wanted: int, vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEW_SCORES", 0)
    monkeypatch.setattr(cpu, "multiplies_bfloat16_in_vectors", lambda: vectors)
    inputs = [torch.randn(1, 2, 20, 8).bfloat16() for _ in range(3)]
    inputs[wanted].requires_grad_(True)
    ops.attention(*inputs).sum().backward()  # type: ignore[no-untyped-call]
    assert inputs[wanted].grad is not None


def test_without_torchs_fused_products_plain_ones_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.has_fused_products.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    try:
        assert not cpu.fuses(torch.zeros(1, dtype=torch.bfloat16))
    finally:
        cpu.has_fused_products.cache_clear()


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 1}, False),
        ({"kernel_size": 3}, False),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
    ],
)
def test_only_its_own_convolutions_are_given_to_winograd(
    shape: dict[str, int], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this CPU would gain by it."""
    monkeypatch.setattr(cpu, "transforms_weights", lambda dtype: True)
    monkeypatch.setattr(winograd, "pays", lambda *sizes: True)
    layer, hidden = nn.Conv2d(8, 8, **shape), torch.zeros(2, 8, 6, 5)  # type: ignore[arg-type]
    assert not cpu.saves_multiplications(hidden, layer)
    assert cpu.saves_multiplications(hidden.to(memory_format=torch.channels_last), layer) == wanted
