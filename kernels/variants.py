"""Every kernel of an edit once, on the least of tensors: called side by side, they are compiled side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ledits_min.kernels.geglu import geglu
from ledits_min.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu
from ledits_min.kernels.layer_norm import add_layer_norm, fits
from ledits_min.kernels.sega_step import fits as fits_step
from ledits_min.kernels.sega_step import sega_step
from ledits_min.kernels.trajectory import residuals, trajectory


def calls(
    device: torch.device, dtype: torch.dtype, widths: Sequence[int], groups: int, latents: tuple[int, int, int]
) -> list[Callable[[], object]]:
    """Calls that meet the variants of an edit of latents (C, h, w) by a UNet of these widths, in `dtype`.

    Each can run in a thread of its own. What they give is of no use.
    """

    def norm_call(summed: bool) -> object:
        norm = nn.GroupNorm(groups, widths[0], device=device, dtype=dtype)
        x = torch.zeros(1, widths[0], 2, 2, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return add_group_norm_silu(x, norm, x) if summed else group_norm_silu(x, norm)

    def layer_norm_call(width: int) -> object:
        norm = nn.LayerNorm(width, device=device, dtype=dtype)
        return add_layer_norm(torch.zeros(1, width, device=device, dtype=dtype), norm)

    def step_call() -> None:
        x_t = torch.zeros(1, *latents, device=device)
        tables = {
            "slots": torch.tensor([[0, 0, -1, 0]], dtype=torch.int32, device=device),
            "levels": torch.ones(1, 4, device=device), "guidance": torch.zeros(1, 5, device=device),
            "terms": torch.zeros(1, 1, 4, device=device), "second_order": torch.zeros(0, device=device),
        }  # fmt: skip
        sega_step(
            torch.zeros(1, latents[0], dtype=torch.int32, device=device), tables, branches=x_t[None].clone(),
            residuals=x_t[None].clone(), x_t=x_t, carried=[x_t.clone()],
            shares=torch.zeros(1, 1, 1, latents[0], device=device),
            counts=torch.zeros(1, *x_t.shape, dtype=torch.int32, device=device),
        )  # fmt: skip

    def inversion_call() -> object:
        levels, x_0 = torch.ones(1, 4, device=device), torch.zeros(1, *latents, device=device)
        x = trajectory(levels, x_0, x_0[None].clone())
        return residuals(levels, x, x_0[None, None].clone(), 1.0)

    found: list[Callable[[], object]] = [lambda: norm_call(True), lambda: norm_call(False), inversion_call]
    if fits_step(torch.empty(1, *latents, device="meta")):
        found.append(step_call)
    for width in dict.fromkeys(widths):
        if fits(torch.empty(1, width, device="meta")):
            found.append(lambda width=width: layer_norm_call(width))  # type: ignore[misc]
    found.append(lambda: geglu(torch.zeros(1, 8 * widths[0], device=device, dtype=dtype)))
    return found
