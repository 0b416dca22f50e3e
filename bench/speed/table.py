"""What `bench/gpu.sh` left in a folder, as one table: python -m bench.speed.table DIR"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """(what, ours, the other side's, ratio) of every figure."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if path.stem == "peer":
            for name, line in found.items():
                ours, peer = (f"{sum(line[side]['seconds'].values()):.3f} s" for side in ("ours", "peer"))
                yield name, ours, peer, f"{line['ratio']:.2f}"
        elif path.stem == "unet_alone":
            yield from alone(found)
        elif "benchmarks" in found:
            for line in found["benchmarks"]:
                yield benchmark(line)
        else:
            yield path.stem, ", ".join(sorted(key for table in found.values() for key in table)) or "defaults", "", ""


def alone(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, line in found.items():
        for batch, sides in line.items():
            if batch == "conditions":
                continue
            ours = sides["ours"]["seconds"]
            for side, numbers in sides.items():
                if side != "ours":
                    both = (f"{1e3 * seconds:.2f} ms" for seconds in (ours, numbers["seconds"]))
                    yield f"UNet alone, {name}, {batch}: {side}", *both, f"{numbers['to_ours']:.2f}"


def benchmark(line: dict[str, Any]) -> tuple[str, ...]:
    """Of a kernel the device's own time beside its floor; of anything else its median."""
    extra = line.get("extra_info", {})
    times = extra.get("us", {})
    if "kernel, graph" not in times:
        return line["name"], f"{line['stats']['median']:.3f} s", "", ""
    ours, eager = times["kernel, graph"], times.get("eager, graph", times.get("eager"))
    what = f"{line['name']}, floor {extra['floor us']:.1f} us"
    return what, f"{ours:.1f} us", f"{eager:.1f} us", f"{eager / ours:.2f}"


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: python -m bench.speed.table DIR")
    lines = [("", "ours", "the other side", "ratio"), *rows(Path(sys.argv[1]))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
