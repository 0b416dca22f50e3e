"""What the comparisons with diffusers share: well-scaled random weights, and the measure of disagreement."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Fill = Callable[[nn.Module, int], nn.Module]
Error = Callable[[Tensor, Tensor], float]


def fill_at_random(module: nn.Module, seed: int) -> nn.Module:
    """Give every weight a size that keeps activations near one, and no norm or bias its trivial value.

    Slices of one pool of normal numbers, so that 860 million weights take seconds. Works on a module built on meta.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = module.state_dict()
    largest = max(tensor.numel() for tensor in tensors.values())
    pool = torch.randn(largest + 100_003, generator=generator)
    for name, tensor in tensors.items():
        start = int(torch.randint(100_003, (), generator=generator))
        values = pool[start : start + tensor.numel()].view(tensor.shape)
        if tensor.dim() > 1:
            values = values * (tensor[0].numel() ** -0.5)
        elif name.endswith("weight"):
            values = 1.0 + 0.2 * values
        else:
            values = 0.2 * values
        tensors[name] = values
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in the 2-norm, in float64."""
    difference = found.double() - wanted.double()
    return float(difference.norm() / wanted.double().norm())


@pytest.fixture(scope="session")
def fill() -> Fill:
    return fill_at_random


@pytest.fixture(scope="session")
def error() -> Error:
    return relative_error
