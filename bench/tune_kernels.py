"""Time a handful of launch shapes per kernel on this CUDA device; the fastest go to kernels/launch_table.json.

    python -m bench.tune_kernels                      all kernels, about two minutes, most of them compiling
    python -m bench.tune_kernels --only sega geglu    those whose names begin so; the others keep their entries

A shape replaces a kernel's default where it is 2 % faster over all of the kernel's inputs together, which are those of
Stable Diffusion 1.5 at 512 px and, for the step, of XL at 1024 px. Times are the device's own: calls recorded as graphs
and replayed on buffers that no cache holds. A shape that the device refuses, or whose result is not the default's, is
reported and left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from triton.errors import TritonError

from bench.speed import gpu
from ledits_min.kernels._launch import TABLE, Shape, forced_shape
from ledits_min.kernels.geglu import geglu
from ledits_min.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu
from ledits_min.kernels.layer_norm import add_layer_norm
from ledits_min.kernels.sega_step import sega_step
from ledits_min.kernels.trajectory import residuals, trajectory

WORTH = 0.98  # of the default's time, at most
STEPS = 500  # rows of the step's tables: more than a shape's calls on one state

Result = tuple[Tensor, ...]
Timer = Callable[[Sequence[Callable[[], object]]], float]  # microseconds per call


@dataclass(frozen=True)
class Case:
    """One input of a kernel: `fresh` makes new buffers of `moved` bytes, and the call that works on them."""

    kernel: str
    name: str
    moved: int
    fresh: Callable[[], Callable[[], Result]]


def shapes(**choices: Sequence[int]) -> list[Shape]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


SHAPES: dict[str, list[Shape]] = {
    "geglu": shapes(rows=(1, 2, 4, 8), block=(256, 512), warps=(4, 8)),
    **{f"layer_norm {block}": shapes(tile=(2048, 4096), warps=(2, 4, 8)) for block in (512, 1024, 2048)},
    "group_norm_silu 128": shapes(rows=(16, 32), warps=(4, 8), stages=(1, 4), programs=(1024, 4096)),
    "sega_cut 4096": shapes(warps=(4, 8, 16), probes=(1, 2, 4, 8)),
    "sega_cut 16384": shapes(warps=(16, 32), probes=(1, 2, 4, 8)),
    "sega_combine": shapes(tile=(256, 512, 1024), warps=(2, 4)),
    "trajectory": shapes(block=(512, 1024, 2048), warps=(4, 8)),
    "residuals": shapes(block=(512, 1024, 2048), warps=(4, 8)),
}


def cases(device: str, small: bool = False) -> Iterator[Case]:
    """The inputs to tune for; `small` ones take the same entries of the table, and no time through the interpreter."""

    def half(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.float16)

    def maps(*size: int) -> Tensor:
        return half(*size).contiguous(memory_format=torch.channels_last)

    for tokens, width in [(2, 1280)] if small else [(4 * 4096, 1280), (4 * 1024, 2560), (4 * 256, 5120)]:

        def fresh_geglu(tokens: int = tokens, width: int = width) -> Callable[[], Result]:
            x, bias = half(tokens, 2 * width), half(2 * width)
            return lambda: (geglu(x, bias),)

        yield Case("geglu", f"{tokens}x{width}", 6 * tokens * width, fresh_geglu)

    for tokens, width, block in [(4 * 4096, 320, 512), (4 * 1024, 640, 1024), (4 * 256, 1280, 2048)]:
        tokens = 3 if small else tokens

        def fresh_layer_norm(tokens: int = tokens, width: int = width) -> Callable[[], Result]:
            x, residual, add = half(tokens, width), half(tokens, width), half(width)
            norm = nn.LayerNorm(width, device=device, dtype=torch.float16).requires_grad_(False)
            return lambda: add_layer_norm(x, norm, residual, add)

        yield Case(f"layer_norm {block}", f"{tokens}x{width}", 8 * tokens * width, fresh_layer_norm)

    sizes = [(4, 320, 64, 64), (4, 960, 64, 64), (16, 960, 64, 64), (4, 1280, 16, 16), (1, 128, 512, 512)]
    for batch, channels, height, width in [(1, 320, 5, 9)] if small else sizes:
        for summed in (False, True):

            def fresh_group_norm(
                size: tuple[int, ...] = (batch, channels, height, width), summed: bool = summed
            ) -> Callable[[], Result]:
                x, residual, add = maps(*size), maps(*size), half(size[1])
                norm = nn.GroupNorm(32, size[1], device=device, dtype=torch.float16).requires_grad_(False)
                return lambda: (
                    add_group_norm_silu(x, norm, residual, add) if summed else (group_norm_silu(x, norm, add),)
                )

            moved = (8 if summed else 4) * batch * channels * height * width
            name = f"{batch}x{channels}x{height}x{width}{', with its sum' if summed else ''}"
            yield Case("group_norm_silu 128", name, moved, fresh_group_norm)

    steps = 1 if small else STEPS
    for side, block in [(64, 4096), (128, 16384)]:
        channels, concepts = (1, 1) if small else (4, 3)

        def fresh_step(side: int = side, channels: int = channels, concepts: int = concepts) -> Callable[[], Result]:
            return step_call(device, steps, concepts, (1, channels, side, side))

        moved = 4 * channels * side * side * (concepts + 2 + 5 + 2 * concepts)
        for kernel in (f"sega_cut {block}", "sega_combine"):
            yield Case(kernel, f"{concepts} concepts, {side}x{side}", moved, fresh_step)

    together, latents = (2, (1, 1, 5, 7)) if small else (64, (1, 4, 64, 64))
    size = together * latents[1] * latents[2] * latents[3]

    def fresh_trajectory() -> Callable[[], Result]:
        levels, noise = torch.rand(together, 4, device=device), torch.randn(together, *latents, device=device)
        return lambda: (trajectory(levels, noise[0], noise),)

    def fresh_residuals() -> Callable[[], Result]:
        levels, x = torch.rand(together, 4, device=device), torch.randn(together + 1, *latents, device=device)
        branches = torch.randn(2, together, *latents, device=device)
        return lambda: (residuals(levels, x, branches, 3.5),)

    yield Case("trajectory", f"{together} steps", 8 * size, fresh_trajectory)
    yield Case("residuals", f"{together} steps", 16 * size, fresh_residuals)


def step_call(device: str, steps: int, concepts: int, size: tuple[int, ...]) -> Callable[[], Result]:
    """A step whose state moves on with every call: uncond, a target and the concepts, all of them acting."""
    slots = torch.arange(2 + concepts, dtype=torch.int32)
    row = torch.cat([slots[[0, 0, 1]], slots[2:]]).to(device)
    branches = torch.randn(1, *size, device=device) + 0.1 * torch.randn(2 + concepts, *size, device=device)
    tables = {
        "slots": row.expand(steps, -1).contiguous(),
        "levels": torch.tensor([0.8, 0.6, 0.81, 0.58], device=device).expand(steps, -1).contiguous(),
        "guidance": torch.tensor([3.0, 0.3, 0.6, 0.4, 1.0], device=device).expand(steps, -1).contiguous(),
        "terms": torch.tensor([7.0, 0.95, 1.0, 1.0], device=device).expand(steps, concepts, -1).contiguous(),
    }
    arguments: dict[str, Any] = {
        "step": torch.zeros(size[:2], dtype=torch.int32, device=device),
        "tables": tables,
        "branches": branches,
        "residuals": 0.1 * torch.randn(1, *size, device=device).expand(steps, *size),
        "x_t": torch.randn(size, device=device),
        "carried": [torch.zeros(size, device=device)],
        "shares": torch.zeros(steps, concepts, *size[:2], device=device),
        "counts": torch.zeros(concepts, *size, dtype=torch.int32, device=device),
    }

    def call() -> Result:
        sega_step(**arguments)
        return arguments["x_t"], arguments["carried"][0], arguments["counts"]

    return call


def result(case: Case, shape: Shape) -> Result:
    """What the first call gives under `shape`, from the same numbers every time."""
    torch.manual_seed(0)
    with forced_shape(case.kernel, shape), torch.no_grad():
        return tuple(tensor.clone() for tensor in case.fresh()())


def same(found: Result, expected: Result) -> bool:
    """Whether nothing but the order of float32 sums can lie between two results."""
    return all(
        a.dtype == b.dtype and gpu.difference(a, b) < (1e-5 if a.dtype == torch.float32 else 1e-3)
        for a, b in zip(found, expected, strict=True)
        if bool(b.count_nonzero())
    )


def time_of(case: Case, shape: Shape, timer: Timer, buffers: Callable[[int], int]) -> float:
    with forced_shape(case.kernel, shape), torch.no_grad():
        return timer([case.fresh() for _ in range(buffers(case.moved))])


def tune(group: Sequence[Case], candidates: Sequence[Shape], timer: Timer, buffers: Callable[[int], int]) -> Shape:
    """The fastest shape of one kernel over its cases, by the geometric mean; {} where the default is about as fast."""
    expected = [result(case, {}) for case in group]
    default = [time_of(case, {}, timer, buffers) for case in group]
    print(f"{group[0].kernel}: " + ", ".join(f"{c.name} {t:.1f} us" for c, t in zip(group, default, strict=True)))
    best: Shape = {}
    least = WORTH
    for shape in candidates:
        try:
            if not all(same(result(case, shape), truth) for case, truth in zip(group, expected, strict=True)):
                print(f"  {shape}: another result, left out")
                continue
            times = [time_of(case, shape, timer, buffers) for case in group]
        except (RuntimeError, TritonError) as error:
            print(f"  {shape}: refused, {str(error).splitlines()[0]}")
            continue
        ratio = exp(sum(log(t / d) for t, d in zip(times, default, strict=True)) / len(times))
        print(f"  {shape}: {ratio:.3f} of the default, " + ", ".join(f"{t:.1f}" for t in times))
        if ratio < least:
            best, least = shape, ratio
    return best


def tune_all(
    device: str, only: Sequence[str], timer: Timer, buffers: Callable[[int], int], small: bool = False
) -> dict[str, Shape]:
    """{kernel: its fastest shape} of the kernels whose names begin as `only` says."""
    every = list(cases(device, small))
    return {
        kernel: tune([case for case in every if case.kernel == kernel], candidates, timer, buffers)
        for kernel, candidates in SHAPES.items()
        if kernel.startswith(tuple(only))
    }


def write(found: dict[str, Shape], device: str, path: Path) -> None:
    """Put one device's shapes into the table; other devices, and other kernels of this one, keep theirs."""
    table = json.loads(path.read_text()) if path.exists() else {}
    kept = table.get(device, {}) | found
    table[device] = {kernel: shape for kernel, shape in sorted(kept.items()) if shape}
    half_written = path.with_suffix(".part")
    half_written.write_text(json.dumps(table, indent=2) + "\n")
    os.replace(half_written, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="kernels whose names begin so")
    parser.add_argument("--table", type=Path, default=TABLE, help="the JSON to write (default: the kernels' own)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "a kernel is tuned on a CUDA device, and there is none\n")
    found = tune_all("cuda", arguments.only, lambda calls: gpu.microseconds(gpu.graphed(calls)), gpu.buffers)
    write(found, torch.cuda.get_device_name(), arguments.table)
    print(f"{arguments.table}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
