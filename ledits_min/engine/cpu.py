"""What a CPU wants done differently: a layer in slices whose intermediate results stay in its caches.

Fresh memory is the dear thing there: a page that a process touches for the first time costs more than what is computed
in it. The layers' meaning is that of `ops`, which calls this file; only rounding may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledits_min.engine import torch_private, winograd
from ledits_min.engine.torch_private import add_convolution, linear, linear_with

SCORES = 2**22  # bytes of attention scores at a time, which then stay in the caches
QUERIES = 512  # of a head at a time, at least: shorter products lose more than the caches give
LARGEST_POWER = 96.0  # of 2, in attention: then neither a weight nor the sum of many over- or underflows
VECTOR = 16  # float32 numbers in a vector of AVX-512
FEW_SCORES = 2**14  # a head's; below it slicing costs more than it saves
LN_2 = math.log(2.0)
KEYS = 16  # bfloat16 numbers that torch's attention takes from a row of scores at a time; it is slow with a rest
MANY_KEYS = 1024  # with fewer, filling heads up to whole vectors costs more than it saves
FEED_FORWARD = 4096 * 320  # tokens times width at a time: fewer starve the products, more leave the caches
Make = Callable[[Tensor], Tensor]  # of a layer's weights, what they are computed with


# --- attention ------------------------------------------------------------------------------------------------------


def serves_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` here beats torch's own."""
    return q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] >= FEW_SCORES and not _is_recorded(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attention` in bfloat16, in the form that this CPU is fast in.

    With AMX that is torch's own, with heads or keys filled up to whole vectors. It keeps the scores in float32, and has
    no fast product for that on a CPU that multiplies bfloat16 in vectors but not in tiles (AMX).
    """
    if multiplies_bfloat16_in_vectors():
        return attention_in_slices(q, k, v)
    width, rest = q.shape[3], -k.shape[2] % KEYS
    if width % VECTOR and not rest and k.shape[2] >= MANY_KEYS:
        q, k, v = (F.pad(each, (0, -width % VECTOR)) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]
    if not rest:
        return F.scaled_dot_product_attention(q, k, v)
    bias = torch.zeros(k.shape[2] + rest, dtype=q.dtype)
    bias[-rest:] = -torch.inf
    k, v = F.pad(k, (0, 0, 0, rest)), F.pad(v, (0, 0, 0, rest))
    return F.scaled_dot_product_attention(q, k, v, bias.expand(len(q), 1, q.shape[2], -1))


def attention_in_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By plain products, some heads or some queries of one head at a time; scores are rounded like all between layers.

    softmax is 2^s / sum 2^s with s = q k^T / (sqrt(d) ln 2), and is formed like that, without looking for each row's
    maximum, where |q| |k| says that no s is large. The mean key is taken away before: that adds the same to all scores
    of a query, which changes no softmax, and the mean is what makes most keys long. Where values are filled up to a
    vector's width, a column of ones among that sums the weights.

    Each operand is laid out once: a product with a view of interleaved heads copies it at every call, and one whose
    result is not a multiple of a vector wide runs at two thirds of its rate.
    """
    batch, heads, queries, width = q.shape
    length = k.shape[2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1).float(), v.flatten(0, 1)
    k = (k - k.mean(dim=1, keepdim=True)).mul_(width**-0.5 / LN_2)
    powers_fit = _longest(q) * _longest(k) <= LARGEST_POWER
    v = F.pad(v, (0, -width % VECTOR), value=1.0) if width % VECTOR else v.contiguous()
    rows = max(QUERIES, SCORES // (length * q.element_size()))
    step, size = max(1, min(heads, rows // queries)), min(queries, rows)
    buffer = q.new_empty(step * size * length)  # one for the scores of every slice
    attended = q.new_empty(batch, queries, heads, width).transpose(1, 2)  # as the next layer reads it
    for image, result in enumerate(attended):
        for head in range(0, heads, step):
            some = slice(image * heads + head, image * heads + min(head + step, heads))
            fit = bool(powers_fit[some].all())
            keys, values = (k[some] * (1.0 if fit else LN_2)).to(q.dtype).transpose(1, 2), v[some]
            outs = result[head : head + step].split(size, dim=1)
            for part, out in zip(q[some].split(size, dim=1), outs, strict=True):
                weights = buffer[: len(part) * part.shape[1] * length].view(len(part), -1, length)
                torch.bmm(part, keys, out=weights)
                if fit:
                    weights.exp2_()
                else:
                    torch.softmax(weights, dim=-1, out=weights)
                sums = torch.bmm(weights, values)
                total = sums[..., -1:] if width % VECTOR else weights.sum(dim=-1, keepdim=True)
                torch.div(sums[..., :width], total, out=out)
    return attended


def _longest(vectors: Tensor) -> Tensor:
    """(heads, N, d) -> (heads,), the length of each head's longest."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32)
    return lengths.amax(dim=1)


# --- feed-forward, sums, convolutions -------------------------------------------------------------------------------


def serves_feed_forward(tokens: Tensor, *layers: nn.Module) -> bool:
    """Whether `feed_forward` here beats the layers one after the other."""
    weights = [weight for layer in layers for weight in layer.parameters()]
    if _is_recorded(tokens, *weights):
        return False
    return tokens.numel() > FEED_FORWARD or fuses(tokens, *weights)


def feed_forward(tokens: Tensor, norm: nn.LayerNorm, widen: nn.Linear, narrow: nn.Linear) -> Tensor:
    """`ops.feed_forward` in slices of tokens: what is eight times as wide as they are is never there as a whole."""
    flat = tokens.flatten(0, -2)
    result = torch.empty_like(flat)
    unit = _fused_unit if fuses(flat, narrow.weight) else _unit
    rows = max(1, FEED_FORWARD // flat.shape[1])
    for part, out in zip(flat.split(rows), result.split(rows), strict=True):
        unit(part, norm(part), widen, narrow, out)
    return result.view_as(tokens)


def _unit(tokens: Tensor, normed: Tensor, widen: nn.Linear, narrow: nn.Linear, out: Tensor) -> None:
    value, gate = widen(normed).chunk(2, dim=-1)
    torch.add(tokens, narrow(F.gelu(gate).mul_(value)), out=out)


def _fused_unit(tokens: Tensor, normed: Tensor, widen: nn.Linear, narrow: nn.Linear, out: Tensor) -> None:
    """gelu, product and sum are done to the numbers of a matrix product before they are rounded and stored."""
    (value, gate), (value_bias, gate_bias) = widen.weight.chunk(2), widen.bias.chunk(2)
    gated = linear(normed, gate, gate_bias, "gelu")
    inner = linear_with(normed, gated, value, value_bias, "mul")
    out.copy_(linear_with(inner, tokens, narrow.weight, narrow.bias, "add"))


def add_linear(residual: Tensor, tokens: Tensor, layer: nn.Linear) -> Tensor:
    """`ops.add_linear` as one operation."""
    return linear_with(tokens, residual, layer.weight, layer.bias, "add")


def add_conv(residual: Tensor, hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """`ops.add_conv` as one operation."""
    if saves_multiplications(hidden, layer):
        return winograd.convolve(hidden, _transformed(layer), layer.bias, residual)
    rows = _as_rows(hidden, layer)
    if rows is not None:
        added = residual.permute(0, 2, 3, 1).flatten(0, 2)
        return _as_map(linear_with(rows, added, _matrix(layer), layer.bias, "add"), hidden)
    return add_convolution(residual, hidden, layer)


def conv(hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """`ops.conv` in the way that suits the shape."""
    if saves_multiplications(hidden, layer):
        return winograd.convolve(hidden, _transformed(layer), layer.bias)
    rows = _as_rows(hidden, layer)
    if rows is not None:
        return _as_map(linear(rows, _matrix(layer), layer.bias), hidden)
    result: Tensor = layer(hidden)
    return result


def saves_multiplications(hidden: Tensor, layer: nn.Conv2d) -> bool:
    """Whether `winograd`, on tensors that `fuses` takes, has this layer's meaning and beats it."""
    if not transforms_weights(hidden.dtype) or not _tells_of_changes(layer):
        return False
    if (layer.kernel_size, layer.stride, layer.padding) != ((3, 3), (1, 1), (1, 1)):
        return False
    in_layout = hidden.is_contiguous(memory_format=torch.channels_last)
    return in_layout and winograd.pays(layer.in_channels, layer.out_channels, *hidden.shape[-2:])


def transforms_weights(dtype: torch.dtype) -> bool:
    """Whether networks of this dtype keep weights in `winograd`'s form, too.

    Not with AMX, which makes products five times as fast and transforms no faster (not measured there).
    """
    return dtype == torch.bfloat16 and multiplies_bfloat16_in_vectors() and has_fused_products()


def serves_upsampling(hidden: Tensor, size: Sequence[int], layer: nn.Conv2d) -> bool:
    """Whether `upsample_conv` here has the same meaning and beats the two operations one after the other."""
    height, width = hidden.shape[-2:]
    doubles = tuple(size) == (2 * height, 2 * width)
    if not doubles or not hidden.is_contiguous(memory_format=torch.channels_last):
        return False
    if _is_recorded(hidden, *layer.parameters()):
        return False
    if not _tells_of_changes(layer):
        return False
    return fuses(hidden, layer.weight) or hidden.dtype == layer.weight.dtype == torch.float32


def upsample_conv(hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """`ops.upsample_conv` to twice the size, with 4/9 of the products.

    A position of the result sees 3 x 3 neighbours of which at most 2 x 2 differ: their weights are summed beforehand.
    """
    if fuses(hidden, layer.weight) and is_mostly_weights(hidden):
        return _upsample_by_products(hidden, _quartered(layer), layer.bias)
    return F.conv_transpose2d(hidden, _stretched(layer), layer.bias, stride=2, padding=1)


def _upsample_by_products(hidden: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """weights (2, 2, O, 4 C): a position becomes 2 x 2, each of which sees another 2 x 2 neighbours."""
    batch, _, height, width = hidden.shape
    seen = _windows(hidden, 2)  # of one more row and column than the map has
    result = hidden.new_empty(batch, height, 2, width, 2, weights.shape[2])
    for down, across in product((0, 1), repeat=2):
        rows = seen[:, down : down + height, across : across + width].reshape(-1, weights.shape[3])
        result[:, :, down, :, across] = linear(rows, weights[down, across], bias).view(batch, height, width, -1)
    return result.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


# What was made of a layer's weights, by what makes it; and of which weights at which version.
_kept: WeakKeyDictionary[nn.Conv2d, tuple[dict[Make, Tensor], Tensor, int]] = WeakKeyDictionary()


def _made_once(make: Make) -> Callable[[nn.Conv2d], Tensor]:
    """What `make` makes of a layer's weights, made once for them and kept as long as the layer has them."""

    def of(layer: nn.Conv2d) -> Tensor:
        weight = layer.weight.detach()
        made, source, version = _kept.get(layer, ({}, weight, -1))
        # `source` keeps its memory, so that no other weights can lie there. Weights changed in place have another
        # version, unless it is done behind torch's back, through `.data`.
        now = torch_private.version(weight)
        if (source.data_ptr(), source.dtype, version) != (weight.data_ptr(), weight.dtype, now):
            made = {}
            _kept[layer] = made, weight, now
        if make not in made:
            made[make] = make(weight)
        return made[make]

    return of


def _tells_of_changes(layer: nn.Conv2d) -> bool:
    """Whether the layer's weights tell when they are changed in place."""
    return not layer.weight.is_inference()


def _stretch(weight: Tensor) -> Tensor:
    """The weights (O, C, 3, 3) of "double, then convolve" as those of one transposed convolution, (C, O, 4, 4)."""
    turned = _sums_of_doubling(weight).flip(1, 2)  # as a transposed convolution does
    return turned.permute(3, 0, 1, 2).contiguous(memory_format=torch.channels_last)


def _quarter(weight: Tensor) -> Tensor:
    """The same as those of `_upsample_by_products`, (2, 2, O, 4 C)."""
    outputs, inputs = weight.shape[:2]
    # Along an axis sum 2 m + n is what place n of the result takes from the neighbour m that it sees.
    sums = _sums_of_doubling(weight).view(outputs, 2, 2, 2, 2, inputs)
    return sums.permute(2, 4, 0, 1, 3, 5).reshape(2, 2, outputs, 4 * inputs)


def _sums_of_doubling(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (O, 4, 4, C): along each axis [w0, w1, w2] convolved with [1, 1], which is what doubling is."""
    outputs, inputs = weight.shape[:2]
    sums = weight.new_tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]])
    taps = torch.kron(sums, sums) @ weight.permute(0, 2, 3, 1).reshape(outputs, 9, inputs)
    return taps.view(outputs, 4, 4, inputs)


_stretched = _made_once(_stretch)
_quartered = _made_once(_quarter)
_transformed = _made_once(winograd.transform_weights)


def is_mostly_weights(hidden: Tensor) -> bool:
    """Whether a map (B, C, h, w) has fewer positions than channels; fewer than a third where products are slow.

    The layer's weights are then more than all that it computes on, and torch's convolution, which rearranges them at
    every call, takes longer for that than for its work. Products of matrices take them as they lie.
    """
    batch, channels, height, width = hidden.shape
    scarce = 3 if multiplies_bfloat16_in_vectors() else 1
    return scarce * batch * height * width < channels and hidden.is_contiguous(memory_format=torch.channels_last)


def _windows(hidden: Tensor, side: int) -> Tensor:
    """Every side x side positions of a map with a border of zeros around it: channels-last (B, C, h, w)
    -> a view (B, h + 3 - side, w + 3 - side, side, side, C).
    """
    padded = F.pad(hidden.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return padded.unfold(1, side, 1).unfold(2, side, 1).permute(0, 1, 2, 4, 5, 3)


def _as_rows(hidden: Tensor, layer: nn.Conv2d) -> Tensor | None:
    """What each position of the result sees, (B h w, C) or (B h w, 9 C), where one product of that beats the layer.

    The layer is a convolution of 1 x 1 or 3 x 3 that keeps the size.
    """
    if layer.kernel_size == (1, 1) and hidden.is_contiguous(memory_format=torch.channels_last):
        return hidden.permute(0, 2, 3, 1).flatten(0, 2)
    if layer.kernel_size == (3, 3) and is_mostly_weights(hidden):
        return _windows(hidden, 3).reshape(-1, 9 * hidden.shape[1])
    return None


def _matrix(layer: nn.Conv2d) -> Tensor:
    """The weights (O, C, 3, 3) as (O, 9 C) in the order of `_as_rows`, or (O, C, 1, 1) as (O, C).

    No copy where they are channels-last.
    """
    return layer.weight.permute(0, 2, 3, 1).flatten(1)


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """(B h w, O) -> channels-last (B, O, h, w)."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


# --- what there is --------------------------------------------------------------------------------------------------


def fuses(*tensors: Tensor) -> bool:
    """Whether oneDNN's fused products take these."""
    all_narrow = all(tensor.dtype == torch.bfloat16 for tensor in tensors)  # under autocast weights are not
    return all_narrow and not _is_recorded(*tensors) and has_fused_products()


@cache
def has_fused_products() -> bool:
    """Whether this torch brings them and this CPU computes in bfloat16."""
    return torch_private.has_fused_products() and computes_in_bfloat16()


def computes_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; False where torch (before 2.10) cannot tell."""
    return any(torch_private.cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile"))


@cache
def multiplies_bfloat16_in_vectors() -> bool:
    """Whether it does so in AVX-512's vectors and has no AMX."""
    found = torch_private.cpu_capabilities()
    return bool(found.get("avx512_bf16")) and not (found.get("amx_bf16") or found.get("amx_tile"))


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd wants the layers as they are, or torch.compile, which fuses them in its own way."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
