"""What every launch of a kernel here has in common."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    fuse: bool,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor argument.

    fuse       whether a * b + c may become one rounding instead of two. It is always said, because Triton's own default
               differs between versions: False where a kernel must round as the torch expressions beside it do
    registers  a thread may use, where the assembler's own choice would spill; None: its own choice
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    limit = {} if registers is None else {"maxnreg": registers}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=fuse, **limit, **constants)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`: a block's shape must be one."""
    size: int = triton.next_power_of_2(max(n, least))
    return size


def map_strides(maps: Tensor) -> tuple[int, int, int, int]:
    """Strides of (..., B, C, h, w) as (leading, sample, channel, position), for both NCHW and channels-last memory.

    ValueError where h and w cannot be walked with one stride.
    """
    leading, sample, channel, row, position = maps.stride()[-5:]
    height, width = maps.shape[-2:]
    if height > 1 and width > 1 and row != width * position:
        raise ValueError(f"maps of shape {tuple(maps.shape)} and strides {maps.stride()} have gaps between their rows")
    return leading, sample, channel, position if width > 1 else row


def check_layout(**tensors: Tensor | None) -> None:
    """ValueError unless every tensor is contiguous: the kernels write through plain offsets."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} must be contiguous")
