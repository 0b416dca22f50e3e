"""What every launch of a kernel here has in common: device, rounding, memory layouts, and the launch table.

A launch shape (warps, blocks, stages) is chosen in one of two places. Every kernel has a default, which was argued for
without a GPU. `bench/tune_kernels.py` times a handful of others on a CUDA device and writes the fastest to
launch_table.json beside this file, {device name: {kernel: {parameter: value}}}; what stands there replaces the default.
No result depends on it by more than rounding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

TABLE = Path(__file__).with_name("launch_table.json")

Shape = dict[str, int]
_forced: dict[str, Shape] = {}


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


def launch_shape(kernel: str, defaults: Shape, device: torch.device) -> Shape:
    """`defaults`, or what the table or `forced_shape` says instead for this kernel on this device."""
    if kernel in _forced:
        return defaults | _forced[kernel]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return defaults | _tabled(name, kernel, tuple(defaults))


@contextlib.contextmanager
def forced_shape(kernel: str, shape: Shape) -> Iterator[None]:
    """For a while, launch `kernel` with this shape: how a tuner tries one."""
    _forced[kernel] = shape
    try:
        yield
    finally:
        del _forced[kernel]


@cache
def _tabled(device: str, kernel: str, parameters: tuple[str, ...]) -> Shape:
    """What the table says; ValueError where that is no launch shape of this kernel."""
    if not TABLE.exists():
        return {}
    try:
        table = json.loads(TABLE.read_text())
        shape = table.get(device, {}).get(kernel, {})
        return checked_shape(shape, parameters)
    except (AttributeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{TABLE}: {kernel} on {device}: {error}; remove the file, or let bench/tune_kernels.py write it again"
        ) from error


def checked_shape(shape: Mapping[str, Any], parameters: tuple[str, ...]) -> Shape:
    """`shape` itself; ValueError unless its names are among `parameters` and its values are powers of two to 65536."""
    for name, value in shape.items():
        if name not in parameters:
            raise ValueError(f"no launch parameter {name!r}; there are {', '.join(parameters)}")
        if type(value) is not int or not 1 <= value <= 65536 or value & (value - 1):
            raise ValueError(f"{name} is {value!r}; it must be a power of two from 1 to 65536")
    return dict(shape)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`: a block's shape must be one."""
    size: int = triton.next_power_of_2(max(n, least))
    return size


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)


def aligned(*sizes: int) -> int:
    """The largest of 8, 4, 2, 1 that divides all sizes: so many values always lie side by side, to be moved as one."""
    return next(width for width in (8, 4, 2, 1) if not any(size % width for size in sizes))


def walkable(maps: Tensor) -> Tensor:
    """(..., B, C, h, w) itself where h and w can be walked with one stride (NCHW, channels-last), else a copy of it."""
    height, width = maps.shape[-2:]
    row, position = maps.stride()[-2:]
    gaps = height > 1 and width > 1 and row != width * position
    return maps.contiguous() if gaps else maps


def map_strides(maps: Tensor) -> tuple[int, int, int, int]:
    """Strides of `walkable` (..., B, C, h, w) as (leading, sample, channel, position)."""
    leading, sample, channel, row, position = maps.stride()[-5:]
    return leading, sample, channel, position if maps.shape[-1] > 1 else row


def channels_last(maps: Tensor) -> Tensor:
    """(B, C, h, w) as the memory (B, h, w, C): itself where it lies so, else a copy."""
    return maps.contiguous(memory_format=torch.channels_last)


def check_state(**tensors: Tensor | None) -> None:
    """ValueError unless every tensor is contiguous: a kernel writes into it, and a copy would keep what it wrote."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} must be contiguous: it is written in place")
