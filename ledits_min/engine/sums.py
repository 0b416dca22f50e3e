"""Sums that wait: a layer's output, its bias and a residual, added up by the norm that reads them next.

On a GPU a norm moves bytes and computes little, so what it reads it may as well add: no launch then only adds a bias or
a residual, and no convolution adds its own. Where `ops.defers_sums` says so, blocks pass a `Sum` on instead of a map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledits_min.engine import ops
from ledits_min.engine.torch_private import is_called_plainly, version


class Sum:
    """x + add + residual, of maps (B, C, h, w) with add (C,), or of tokens (B, N, C) without; added up once."""

    def __init__(self, x: Tensor, add: Tensor | None = None, residual: Tensor | None = None) -> None:
        self.x, self.add, self.residual = x, add, residual

    def _is(self, total: Tensor) -> None:
        self.x, self.add, self.residual = total, None, None

    @property
    def waits(self) -> bool:
        return self.add is not None or self.residual is not None

    def value(self) -> Tensor:
        if self.x.dim() == 4 and self.waits:
            self._is(ops.add_maps(self.x, self.residual, self.add))
        elif self.residual is not None:
            self._is(self.x + self.residual)
        return self.x

    def normed(self, norm: nn.GroupNorm, silu: bool = True, skip: Tensor | None = None) -> Tensor:
        """silu(norm([self, skip]))"""
        if not self.waits:
            return ops.group_norm_silu(self.x, norm, silu=silu, skip=skip)
        total, out = ops.add_group_norm_silu(self.x, norm, self.residual, self.add, silu, skip)
        self._is(total)
        return out

    def layer_normed(self, norm: nn.LayerNorm) -> Tensor:
        assert self.add is None
        total, out = ops.add_layer_norm(self.x, norm, self.residual)
        self._is(total)
        return out


Hidden = Tensor | Sum


def value(hidden: Hidden) -> Tensor:
    return hidden.value() if isinstance(hidden, Sum) else hidden


def as_sum(hidden: Hidden) -> Sum:
    return hidden if isinstance(hidden, Sum) else Sum(hidden)


def parts(hidden: Hidden) -> Tensor:
    """A tensor of the shape, dtype, device and layout that the sum has."""
    return hidden.x if isinstance(hidden, Sum) else hidden


def opened(block: nn.Module, hidden: Hidden, *more: object) -> Hidden:
    """block(hidden, *more), whose result may wait; a block that somebody has put something on is called as a module."""
    if is_called_plainly(block) and hasattr(block, "open"):
        return cast(Callable[..., Hidden], block.open)(hidden, *more)
    for values in more:
        if isinstance(values, list):
            values[:] = map(value, values)
    return cast(Tensor, block(value(hidden), *more))


# --- layers without their bias --------------------------------------------------------------------------------------


def conv_later(hidden: Tensor, layer: nn.Conv2d) -> Sum:
    """layer(hidden), its bias not added yet."""
    return Sum(bare_conv(hidden, layer), layer.bias)


def bare_conv(hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(hidden) - layer.bias"""
    return F.conv2d(hidden, layer.weight, None, layer.stride, layer.padding)


def pointwise(tokens: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer or a convolution of 1 x 1 over tokens (B, N, C), as a product of matrices, which adds the bias."""
    return F.linear(tokens, cast(Tensor, layer.weight).flatten(1), cast(Tensor, layer.bias))


def bare_pointwise(hidden: Tensor, skip: Tensor | None, layer: nn.Conv2d) -> Tensor:
    """layer([hidden, skip]) - layer.bias for a convolution of 1 x 1, of two channels-last maps, each where it lies."""
    weight, own = layer.weight.flatten(1).T, hidden.shape[1]
    result = as_rows(hidden) @ weight[:own]
    if skip is not None:
        result.addmm_(as_rows(skip), weight[own:])
    batch, _, height, width = hidden.shape
    return result.view(batch, height, width, -1).permute(0, 3, 1, 2)


def as_rows(hidden: Tensor) -> Tensor:
    """Channels-last (B, C, h, w) as its positions (B h w, C)."""
    return hidden.permute(0, 2, 3, 1).flatten(0, 2)


# --- what is made of weights, once ----------------------------------------------------------------------------------

# By the last of the layers: their biases, at which versions, and the sum.
_folded: WeakKeyDictionary[nn.Module, tuple[list[Tensor], list[int], Tensor]] = WeakKeyDictionary()


def folded_bias(*layers: nn.Linear | nn.Conv2d) -> Tensor:
    """The sum of the layers' biases, made once for these biases as they are."""
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    if any(bias.is_inference() for bias in biases):  # they do not tell when they are changed
        return torch.stack(biases).sum(0)
    versions = [version(bias) for bias in biases]
    kept = _folded.get(layers[-1])
    if kept is None or kept[1] != versions or list(map(_place, kept[0])) != list(map(_place, biases)):
        # It keeps the biases, so that no others can lie there.
        kept = _folded[layers[-1]] = biases, versions, torch.stack(biases).sum(0)
    return kept[2]


def _place(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.data_ptr(), tensor.dtype


def together(*layers: nn.Linear) -> Tensor:
    """The layers' weights (O, C) as one (n O, C).

    They are moved to lie behind one another, where they do not: a copy would take their memory again.
    """
    first, size = layers[0].weight, layers[0].weight.numel()
    start, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    lies = all(
        layer.weight.is_contiguous()
        and layer.weight.untyped_storage().data_ptr() == memory
        and layer.weight.storage_offset() == start + n * size
        for n, layer in enumerate(layers)
    )
    if not lies:
        whole = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, whole.chunk(len(layers)), strict=True):
            layer.weight.data = part
        first = layers[0].weight
    rows, columns = first.shape
    return first.detach().as_strided((len(layers) * rows, columns), (columns, 1))
