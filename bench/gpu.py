"""How a benchmark measures on a GPU: events, medians, cold buffers, and the ceilings of the same machine in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROUNDS = 100


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of a call on the device. `calls` do the same on different buffers, so that none is found in the cache."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    times = []
    for _, call in zip(range(ROUNDS), cycle(calls), strict=False):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 1000.0 * median(start.elapsed_time(end) for start, end in times)


def graphed(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The same calls as captured graphs, which are replayed without the host's share of a launch."""
    graphs = []
    for call in calls:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    return [graph.replay for graph in graphs]


def buffers(size: int) -> int:
    """How many copies of `size` bytes lie well beyond the L2 cache together, at least 2."""
    cache_size = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, -(-3 * cache_size // size)))


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


def synchronised(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """One call that waits for the device: what pytest-benchmark's own clock sees."""
    turns = cycle(calls)

    def call() -> None:
        next(turns)()
        torch.cuda.synchronize()

    return call


def compare(sides: dict[str, Sequence[Callable[[], object]]], moved: int) -> dict[str, Any]:
    """Every side's median beside the floor: `moved` bytes, each read or written once, at the copy's bandwidth."""
    floor = moved / ceilings()["copy GB/s"] / 1e3
    times = {name: microseconds(calls) for name, calls in sides.items()}
    return {
        "moved bytes": moved,
        "floor us": round(floor, 2),
        "us": {name: round(time, 2) for name, time in times.items()},
        "times the floor": {name: round(time / floor, 2) for name, time in times.items()},
        "times the kernel": {name: round(time / times["kernel"], 2) for name, time in times.items()},
        **ceilings(),
        **conditions(),
    }


def conditions() -> dict[str, Any]:
    """What a figure means little without."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def report(
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., Tensor],
    arguments: Sequence[tuple[Any, ...]],
    moved: int,
    tolerance: float,
    graphs: bool = True,
) -> None:
    """Measure a function of `ops` on its torch side, the same compiled, and as a kernel; and compare their results.

    arguments  one tuple a buffer; `moved` bytes are read or written by one call
    graphs     whether the calls can be captured
    """
    calls = [lambda a=a: function(*a) for a in arguments]
    compiled = torch.compile(function)
    results, sides = {}, {}
    for side in ("torch", "triton"):
        with choose(monkeypatch, side):
            results[side] = calls[0]()
    sides["eager"] = on("torch", calls)
    sides["compiled"] = on("torch", [lambda a=a: compiled(*a) for a in arguments])
    sides["kernel"] = on("triton", calls)


def difference(kernel: Tensor, plain: Tensor) -> float:
    """||kernel - plain|| / ||plain||, both of the run that is reported; NaN never passes a comparison."""
    return float((kernel.double() - plain.double()).norm() / plain.double().norm())
