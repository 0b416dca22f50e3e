"""What a CPU wants done differently: a layer in slices whose intermediate results stay in its caches.

Fresh memory is the dear thing there: a page that a process touches for the first time costs more than what is computed
in it. The layers' meaning is that of `ops`, which calls this file; only rounding may differ.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES = 2**24  # bytes of attention scores at a time: what the last cache holds
FEW_SCORES = 2**14  # a head's; below it slicing costs more than it saves
ROWS = 1024  # tokens that go through the feed-forward at a time; fewer starve the products, more leave the cache


def slices_attention(q: Tensor, k: Tensor) -> bool:
    """Whether `attention` here beats torch's own.

    torch's fused attention keeps the scores in float32, and has no fast product for that on a CPU that multiplies
    bfloat16 in vectors but not in tiles (AMX).
    """
    if _is_recorded(q) or q.dtype != torch.bfloat16 or q.shape[2] * k.shape[2] < FEW_SCORES:
        return False
    return multiplies_bfloat16_in_vectors()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attention` in slices of queries; the scores are rounded like everything between two layers."""
    batch, heads, queries, width = q.shape
    length = k.shape[2]
    size = min(queries, max(1, SCORES // (heads * length * q.element_size())))
    buffer = q.new_empty(heads * size * length)  # one for the scores of every slice
    attended = q.new_empty(batch, queries, heads, width).transpose(1, 2)  # as the next layer reads it
    for image in range(batch):
        for part, result in zip(q[image].split(size, dim=1), attended[image].split(size, dim=1), strict=True):
            scores = buffer[: heads * part.shape[1] * length].view(heads, -1, length)
            torch.baddbmm(scores, part, k[image].transpose(1, 2), beta=0, alpha=width**-0.5, out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            result.copy_(torch.bmm(scores, v[image]))
    return attended


def slices_feed_forward(tokens: Tensor, layer: nn.Linear) -> bool:
    """Whether `feed_forward` here beats the layers one after the other."""
    return not _is_recorded(tokens, layer.weight) and tokens.shape[:-1].numel() > ROWS


def feed_forward(tokens: Tensor, norm: nn.LayerNorm, widen: nn.Linear, narrow: nn.Linear) -> Tensor:
    """`ops.feed_forward` in slices of tokens: what is eight times as wide as they are is never there as a whole."""
    flat = tokens.flatten(0, -2)
    result = torch.empty_like(flat)
    unit = _fused_unit if fuses(flat) else _unit
    for part, out in zip(flat.split(ROWS), result.split(ROWS), strict=True):
        unit(part, norm(part), widen, narrow, out)
    return result.view_as(tokens)


def _unit(tokens: Tensor, normed: Tensor, widen: nn.Linear, narrow: nn.Linear, out: Tensor) -> None:
    value, gate = widen(normed).chunk(2, dim=-1)
    torch.add(tokens, narrow(F.gelu(gate).mul_(value)), out=out)


def _fused_unit(tokens: Tensor, normed: Tensor, widen: nn.Linear, narrow: nn.Linear, out: Tensor) -> None:
    """gelu, product and sum are done to the numbers of a matrix product before they are rounded and stored."""
    linear = torch.ops.mkldnn._linear_pointwise
    (value, gate), (value_bias, gate_bias) = widen.weight.chunk(2), widen.bias.chunk(2)
    gated = linear(normed, gate, gate_bias, "gelu", [], "none")  # "none": the exact (erf) gelu
    inner = linear.binary(normed, gated, value, value_bias, "mul")
    out.copy_(linear.binary(inner, tokens, narrow.weight, narrow.bias, "add"))


def fuses(tokens: Tensor) -> bool:
    """Whether oneDNN's fused products take these: what torch.compile calls, so not promised to stay."""
    return tokens.dtype == torch.bfloat16 and has_fused_products()


@cache
def has_fused_products() -> bool:
    """Whether this torch brings them and this CPU computes in bfloat16."""
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    overloads = [] if operation is None else operation.overloads()
    return "binary" in overloads and torch.backends.mkldnn.is_available() and computes_in_bfloat16()


def computes_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; False where torch (before 2.10) cannot tell."""
    return any(_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile"))


@cache
def multiplies_bfloat16_in_vectors() -> bool:
    """Whether it does so in AVX-512's vectors and has no AMX."""
    found = _capabilities()
    return bool(found.get("avx512_bf16")) and not (found.get("amx_bf16") or found.get("amx_tile"))


def _capabilities() -> dict[str, object]:
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd wants the layers as they are, or torch.compile, which fuses them in its own way."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
