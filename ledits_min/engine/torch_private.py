"""The one door to what torch keeps to itself: everything here may be gone in its next version, and says so when it is.

oneDNN's fused products are what torch.compile calls; they multiply, add and activate in one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

TORCHS_OWN = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


@cache
def has_fused_products() -> bool:
    """Whether this torch brings `linear_*` and `add_convolution`."""
    names = ("_linear_pointwise", "_convolution_pointwise")
    operations = [getattr(torch.ops.mkldnn, name, None) for name in names]
    there = all(operation is not None and "binary" in operation.overloads() for operation in operations)
    return there and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x weight^T + bias), activation "none" or "gelu" (the exact, erf one).

    Without the copy of the bias to every row that F.linear begins with.
    """
    algorithm = "none" if activation == "gelu" else ""  # "none" is what it calls the exact one
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return result


def linear_with(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, operation: str) -> Tensor:
    """x weight^T + bias, then "add" or "mul" with `other`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, operation)
    return result


def add_convolution(residual: Tensor, hidden: Tensor, layer: nn.Conv2d) -> Tensor:
    """residual + layer(hidden)."""
    result: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
        hidden, residual, layer.weight, layer.bias, layer.padding, [1, 1], [1, 1], 1, "add", 1.0, None, [], None
    )
    return result


def version(tensor: Tensor) -> int:
    """Counts the changes of a tensor in place; those through `.data` go unseen."""
    return int(tensor._version)


def is_untouched(*layers: nn.Module) -> bool:
    """Whether layers are torch's own with nothing put on them: no hook, no adapter, no quantisation.

    Where one is not, it is called as a module; what is computed with its weights directly would pass the addition by.
    """
    return all(
        type(layer) in TORCHS_OWN and not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers
    )


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's `forward` and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module)


def watch_compiler(start: Callable[..., None], end: Callable[..., None]) -> Callable[[], None]:
    """Calls `start` and `end` around every compilation by torch.compile, until what it returns is called."""
    try:
        from torch._dynamo.callback import callback_handler as handler
    except ImportError:
        return lambda: None
    handler.register_start_callback(start)
    handler.register_end_callback(end)

    def stop() -> None:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)

    return stop


def cpu_capabilities() -> dict[str, Any]:
    """What this CPU can do, by name; empty where torch (before 2.10) cannot tell."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found
