"""How an edit's time grows with steps, concepts, picture size and the number of pictures, ours and the peer's.

One dial is turned at a time, the others stay where BASE has them (or --size); SD 1.5 at full size with random weights,
as in `bench.speed.peer_diffusers`. The peer takes one picture after the other. It leaves
results/growth.json, and a plot of it: results/growth.png.

    python -m bench.speed.growth
    python -m bench.speed.growth --dtype fp32 --size 128
    python -m bench.speed.growth --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers import logging

from bench.speed.conditions import Memory, conditions, give_back_freed_memory
from bench.speed.sides import DTYPES, SIDES, Side, build_ours, build_theirs, make_job, run_ours, run_peer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"
BASE = {"steps": 10, "concepts": 2, "size": 256, "images": 1}
DIALS = {
    "steps": ("steps, of which 30 % are skipped", (5, 10, 20, 40)),
    "concepts": ("concepts", (0, 1, 2, 4)),
    "size": ("pixels per side", (128, 256, 384, 512)),
    "images": ("pictures", (1, 2, 4)),
}
STYLES = {"ours": ("#0072B2", "o"), "peer": ("#D55E00", "^")}  # Okabe and Ito's colours


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=BASE["size"], help="pixels per side where that is not the dial")
    parser.add_argument("--quick", action="store_true", help="small networks, the first two points: does it run?")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Of one side, for every dial: value, seconds, evaluations and peak memory."""
    device, ours = torch.device(args.device), args.side == "ours"
    logging.set_verbosity_error()
    networks: Any = (build_ours if ours else build_theirs)(args.quick, device)
    run: Callable[..., Side] = run_ours if ours else run_peer
    for network in networks:
        network.to(DTYPES[args.dtype])
    give_back_freed_memory()  # of the float32 weights, which are no part of an edit
    width = networks[0].config.cross_attention_dim

    def point(setting: dict[str, int]) -> dict[str, float]:
        wanted = argparse.Namespace(prompts=False, **setting)
        job = make_job(wanted, setting["steps"], setting["steps"] * 3 // 10, width, device)
        with Memory(device) as memory:
            side = run(networks, job)
        gigabytes = round(memory.peak / 1e9, 2)
        return {"seconds": round(sum(side.seconds.values()), 3), "evaluations": side.evaluations, "peak_GB": gigabytes}

    base = {**BASE, "size": args.size}
    point(base)  # a warm-up
    found: dict[str, list[dict[str, float]]] = {}
    for dial, (_, values) in DIALS.items():
        wanted = values[:2] if args.quick else values
        found[dial] = [{"value": value, **point({**base, dial: value})} for value in wanted]
    return found


def plot(found: dict[str, dict[str, list[dict[str, float]]]], out: Path) -> None:
    figure, axes = plt.subplots(1, len(DIALS), figsize=(3.4 * len(DIALS), 3.1))
    for axis, (dial, (label, _)) in zip(axes, DIALS.items(), strict=True):
        for side, (color, marker) in STYLES.items():
            points = found[side][dial]
            line = "ours" if side == "ours" else "the published loop on diffusers"
            x, y = [p["value"] for p in points], [p["seconds"] for p in points]
            axis.plot(x, y, marker=marker, color=color, label=line)
        axis.set(xlabel=label, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds per edit")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    args = options()
    if args.side:
        print(json.dumps(measure(args)))
        return
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "bench.speed.growth", *sys.argv[1:], "--side", side]
        done = subprocess.run(command, check=True, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=2))
    if not args.quick:
        base = {**BASE, "size": args.size}
        content = {"base": base, "dtype": args.dtype, "device": args.device, **found, "conditions": conditions()}
        (RESULTS / "growth.json").write_text(json.dumps(content, indent=2) + "\n")
        plot(found, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
