"""Random inputs that tests/kernels and bench share; both load this file by its path, through a fixture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ledits_min.config import SD15_SCHEDULE
from ledits_min.engine.ops import EditSteps
from ledits_min.schedule import Level, make_schedule
from ledits_min.sega import ConceptTerm


def levels(steps: int, eta: float = 1.0) -> list[Level]:
    """Those of a whole run of `steps` steps on Stable Diffusion's schedule."""
    return make_schedule(SD15_SCHEDULE, steps).levels(eta)


def term(text: str, **changes: float | bool | None) -> ConceptTerm:
    """A concept that acts from the first step on."""
    settings = {
        "guidance_scale": 7.0, "threshold": 0.95, "warmup_steps": 0, "cooldown_steps": None, "weight": 1.0,
        "reverse": False,
    }  # fmt: skip
    return ConceptTerm(text=text, **(settings | changes))


@dataclass(frozen=True)
class Edit:
    """One edit's steps and everything the network and the inversion would have brought."""

    steps: EditSteps
    x_t: Tensor
    residuals: Tensor
    branches: list[Tensor]


def edit(
    steps: EditSteps,
    size: tuple[int, int],
    batch: int = 1,
    channels: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    channels_last: bool = False,
    seed: int = 0,
) -> Edit:
    """Predictions as a network's: every branch close to a common one, so that differences are small."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, batch, channels, *size, generator=generator)

    branches = []
    for step in range(len(steps.levels)):
        maps = (normal(1) + 0.1 * normal(len(steps.settings.texts(step)))).to(device, dtype)
        if channels_last:
            maps = maps.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, maps.shape[:2])
        branches.append(maps)
    return Edit(steps, normal().to(device), 0.1 * normal(len(steps.levels)).to(device), branches)


def norm(
    channels: int, groups: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> nn.GroupNorm:
    """A GroupNorm with weights that are no ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.GroupNorm(groups, channels, eps=1e-5)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0, generator=generator)
        layer.bias.normal_(generator=generator)
    return layer.to(device, dtype).requires_grad_(False)


def feature_map(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    offset: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """(B, C, h, w) in channels-last memory, around `offset`."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(shape, generator=generator) * 3.0 + offset
    return maps.to(device, dtype).contiguous(memory_format=torch.channels_last)
