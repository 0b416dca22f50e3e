"""How a benchmark measures on a GPU: events, medians, cold buffers, and the ceilings of the same machine and run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROUNDS = 100

Calls = Sequence[Callable[[], object]]  # the same work on different buffers, so that none is found in the cache


@contextmanager
def kernels(side: str) -> Iterator[None]:
    """LEDITS_KERNELS for a while."""
    before = os.environ.get("LEDITS_KERNELS")
    os.environ["LEDITS_KERNELS"] = side
    yield
    if before is None:
        del os.environ["LEDITS_KERNELS"]
    else:
        os.environ["LEDITS_KERNELS"] = before


def microseconds(calls: Calls) -> float:
    """Median time of a call between two events on the device, in the order in which a program would issue them.

    Where the host is slower than the device, as in eager torch, this is the host's time: that is what a user waits for.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    marks = []
    for _, call in zip(range(ROUNDS), cycle(calls), strict=False):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return 1000.0 * median(start.elapsed_time(end) for start, end in marks)


def graphed(calls: Calls) -> Calls:
    """The same calls as captured graphs, replayed without the host's share of a launch."""
    graphs = []
    for call in calls:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call()
    return [graph.replay for graph in graphs]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape: an earlier benchmark's shapes must not make this one dynamic."""
    torch._dynamo.reset()
    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result


def synchronised(calls: Calls) -> Callable[[], None]:
    """One call that waits for the device, as pytest-benchmark's clock must see it."""
    turns = cycle(calls)

    def call() -> None:
        next(turns)()
        torch.cuda.synchronize()

    return call


def buffers(size: int) -> int:
    """How many copies of `size` bytes lie well beyond the L2 cache together: 2 to 32."""
    cache_size = torch.cuda.get_device_properties(0).L2_cache_size
    return min(32, max(2, -(-3 * cache_size // size)))


@cache
def ceilings() -> dict[str, float]:
    """What this device reaches today: a large copy in GB/s, read and written, and a large bf16 product in TFLOP/s."""
    source, target = torch.randn(2, 1 << 28, device="cuda").unbind()
    copied = microseconds([lambda: target.copy_(source)])
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(torch.bfloat16).unbind()
    multiplied = microseconds([lambda: a @ b])
    return {
        "copy GB/s": round(2 * source.nbytes / copied / 1e3, 1),
        "bf16 TFLOP/s": round(2 * 8192**3 / multiplied / 1e6, 1),
    }


def conditions() -> dict[str, str]:
    """What a figure means little without."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "commit": commit.stdout.strip() or os.environ.get("LEDITS_COMMIT", ""),
        "torch": version("torch"),
        "triton": version("triton"),
    }


def difference(kernel: Tensor, plain: Tensor) -> float:
    """||kernel - plain|| / ||plain||; NaN never passes a comparison."""
    return float((kernel.double() - plain.double()).norm() / plain.double().norm())


def report(benchmark: Any, torch_side: dict[str, Calls], kernel: Calls, moved: int, graphs: bool = True) -> None:
    """Measure all sides and write their medians, beside the floor, to the benchmark.

    torch_side  by name; "eager" is also measured as a graph where `graphs` says that the calls can be captured
    moved       bytes of one call, each read or written once: at the bandwidth of a copy they are the floor
    """
    floor = moved / ceilings()["copy GB/s"] / 1e3
    times: dict[str, float] = {}
    with kernels("torch"):
        times |= {name: microseconds(calls) for name, calls in torch_side.items()}
        if graphs:
            times["eager, graph"] = microseconds(graphed(torch_side["eager"]))
    with kernels("triton"):
        times["kernel"] = microseconds(kernel)
        if graphs:
            times["kernel, graph"] = microseconds(graphed(kernel))
        benchmark.pedantic(synchronised(kernel), rounds=20)
    benchmark.extra_info |= {
        "us": {name: round(time, 2) for name, time in times.items()},
        "times the kernel": {name: round(time / times["kernel"], 2) for name, time in times.items()},
        "times the floor": {name: round(time / floor, 2) for name, time in times.items()},
        "floor us": round(floor, 2),
        "moved bytes": moved,
        "buffers": len(kernel),
        **ceilings(),
        **conditions(),
    }
    print(f"\n{benchmark.name}: {benchmark.extra_info['us']} us, floor {floor:.2f}")


def report_function(
    benchmark: Any,
    function: Callable[..., Tensor],
    arguments: Sequence[tuple[Any, ...]],
    moved: int,
    tolerance: float,
    graphs: bool = True,
    peers: dict[str, Calls] | None = None,
) -> None:
    """`report` for a pure function of `ops` with one tuple of arguments a buffer; its two sides' results must agree."""
    fused = compiled(function)
    with torch.no_grad():
        results = []
        for side in ("triton", "torch"):
            with kernels(side):
                results.append(function(*arguments[0]))
        off = difference(*results)
        assert off < tolerance, f"the two sides differ by {off:.2g}"
        benchmark.extra_info["difference"] = off
        plain = [lambda a=a: function(*a) for a in arguments]
        both = {"eager": plain, "compiled": [lambda a=a: fused(*a) for a in arguments]}
        report(benchmark, both | (peers or {}), plain, moved, graphs)


def report_pair(
    benchmark: Any,
    plain: Callable[..., tuple[Tensor, ...]],
    fused: Callable[..., tuple[Tensor, ...]],
    arguments: Sequence[tuple[Any, ...]],
    moved: int,
    tolerance: float,
) -> None:
    """`report` for a kernel beside the torch expressions that it replaces; all their results must agree."""
    with torch.no_grad():
        off = max(map(difference, fused(*arguments[0]), plain(*arguments[0])))
        assert off < tolerance, f"the two sides differ by {off:.2g}"
        benchmark.extra_info["difference"] = off
        sides = {"eager": plain, "compiled": compiled(plain)}
        calls: dict[str, Calls] = {name: [partial(side, *a) for a in arguments] for name, side in sides.items()}
        report(benchmark, calls, [partial(fused, *a) for a in arguments], moved)
