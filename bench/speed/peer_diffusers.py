"""A whole edit against its peer: the published algorithm on diffusers' own UNet and VAE (`bench.speed.sides`).

Both have the same dtype, unless --peer-dtype says otherwise. They take turns, each in processes of its own, so that
each has its own peak memory. Their latents are compared before any time is printed: those of a few steps in float32,
where they must agree to rounding, and those that were timed. Where they disagree, nothing is printed but that.

    python -m bench.speed.peer_diffusers --dtype bf16 --size 512 --steps 20 --skip 7
    python -m bench.speed.peer_diffusers --peer-dtype fp32
    python -m bench.speed.peer_diffusers --prompts --compile
    python -m bench.speed.peer_diffusers --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import logging
from safetensors.torch import load_file, save_file

from bench.speed.conditions import Memory, conditions, give_back_freed_memory, kind_of
from bench.speed.sides import (
    DTYPES,
    QUICK_UNET,
    QUICK_VAE,
    SIDES,
    Job,
    Side,
    build_ours,
    build_theirs,
    make_job,
    run_ours,
    run_peer,
    synchronize,
)
from ledits_min.config import SD15_UNET, SD15_VAE
from ledits_min.engine.cost import unet_cost, vae_costs
from ledits_min.engine.precision import float32_products

RESULTS = Path(__file__).parents[1] / "results" / "peer.json"
# Relative. After a few steps only rounding may tell the sides apart. After many, masks have moved: their edge lies
# between two numbers that may be a rounding error apart (in float32 at 512 pixels two of 16,384 places swapped at the
# third step, all others agreed to 3e-6), and a random network, no denoiser, carries it on.
AGREE_EXACT = 1e-3
AGREE = {"fp32": 0.1, "bf16": 0.5, "fp16": 0.1}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--peer-dtype", choices=DTYPES, help="the peer's, if another")
    parser.add_argument("--size", type=int, default=512, help="pixels per side, a multiple of 64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, default=7)
    parser.add_argument("--concepts", type=int, default=2)
    parser.add_argument("--images", type=int, default=1, help="pictures: ours in one batch, the peer one by one")
    parser.add_argument("--prompts", action="store_true", help="give a source and a target prompt")
    parser.add_argument("--compile", action="store_true", help="both UNets through torch.compile")
    parser.add_argument("--rounds", type=int, default=1, help="edits of each side, taking turns; the best counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small networks and few steps: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a process of one side
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.size, args.steps, args.skip = 128, 5, 2
    args.peer_dtype = args.peer_dtype or args.dtype
    return args


@torch.no_grad()
def run_side(args: argparse.Namespace) -> None:
    """One side's share, left in two files: its latents, and what they took."""
    device = torch.device(args.device)
    ours = args.side == "ours"
    logging.set_verbosity_error()  # it warns of casting networks, which is meant
    networks: Any = build_ours(args.quick, device) if ours else build_theirs(args.quick, device)
    run: Callable[[Any, Job], Side] = run_ours if ours else run_peer
    width = (QUICK_UNET if args.quick else SD15_UNET).cross_attention_dim
    exact = run(networks, make_job(args, 3, 1, width, device))
    for network in networks:
        network.to(DTYPES[args.dtype if ours else args.peer_dtype])
    give_back_freed_memory()  # of the float32 weights, which are no part of an edit
    if args.compile:
        networks[0].compile(dynamic=False)
    job = make_job(args, args.steps, args.skip, width, device)
    # torch.compile and Triton compile for one shape at a time, and only the whole job meets all of them.
    meets_all = args.compile or device.type == "cuda"
    started = time.perf_counter()
    warm = run(networks, job if meets_all else make_job(args, 4, 1, width, device))
    if warm.again and meets_all:
        warm.again()
    warm_up = time.perf_counter() - started
    del warm
    with Memory(device) as memory:
        side = run(networks, job)
    seconds = dict(side.seconds)
    if side.again:
        side.timed("second edit", side.again)
    assert exact.latents is not None and side.latents is not None
    latents = {"exact": exact.latents.cpu().contiguous(), "timed": side.latents.cpu().contiguous()}
    save_file(latents, args.into / f"{args.side}.safetensors")
    whole = sum(seconds.values())
    latents_size = (args.size // 8, args.size // 8)
    config, vae_config = (QUICK_UNET, QUICK_VAE) if args.quick else (SD15_UNET, SD15_VAE)
    images = len(job.image)
    coding = sum(cost.flop for cost in vae_costs(vae_config, *latents_size))
    tera = (side.evaluations * unet_cost(config, *latents_size).flop + images * coding) / 1e12
    rate = matmul_rate(device, DTYPES[args.dtype if ours else args.peer_dtype])
    found = {
        "evaluations": side.evaluations,
        "tflop": float(f"{tera:.4g}"),
        "flop_utilisation": round(tera / whole / rate, 3),  # of the matmul rate of the same run
        "matmul_tflop_per_second": round(rate, 2),
        "seconds": rounded(seconds),
        **({"second_edit_seconds": round(side.seconds["second edit"], 3)} if ours else {}),
        **({"loop_outside_unet": round(outside(side), 4)} if ours else {}),
        **({"preparing_seconds": rounded(side.preparing)} if side.preparing else {}),
        "warm_up_seconds": round(warm_up, 1),
        "peak_memory_GB": round(memory.peak / 1e9, 2),
    }
    (args.into / f"{args.side}.json").write_text(json.dumps(found))


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def outside(side: Side) -> float:
    """The share of the loop's time that is not spent in the UNet."""
    return 1.0 - side.unet_seconds / side.seconds["invert and edit"]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP a second of a large product, the best of five: what this device can do here and now."""
    n = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronize()
        started = time.perf_counter()
        left @ right
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best / 1e12


def run_both(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each side's best round took, after its latents were held against the other's."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for side in SIDES:
                command = [sys.executable, "-m", "bench.speed.peer_diffusers", *sys.argv[1:]]
                subprocess.run([*command, "--side", side, "--into", folder], check=True, cwd=Path(__file__).parents[2])
            latents = {side: load_file(Path(folder) / f"{side}.safetensors") for side in SIDES}
            found = {side: json.loads((Path(folder) / f"{side}.json").read_text()) for side in SIDES}
        for name, dtype, allowed in (("exact", "fp32", AGREE_EXACT), ("timed", args.dtype, AGREE[args.dtype])):
            mine, theirs = latents["ours"][name], latents["peer"][name]
            off = float((mine - theirs).norm() / theirs.norm())
            print(f"{dtype}: edited latents differ by {off:.1e} ({allowed} allowed)", file=sys.stderr)
            if not off <= allowed:
                raise SystemExit("the two sides disagree: no time is printed")
            found["ours"][f"{name}_latents_differ"] = off
        for side, numbers in found.items():
            if side not in best or total(numbers) < total(best[side]):
                best[side] = numbers
    return best


def total(found: dict[str, Any]) -> float:
    return float(sum(found["seconds"].values()))


def main() -> None:
    args = options()
    if args.side:
        with float32_products(torch.device(args.device), tf32=False):  # the peer too: float32 judges both
            run_side(args)
        return
    found = run_both(args)
    names = ("dtype", "peer_dtype", "size", "steps", "skip", "concepts", "images", "prompts", "compile", "rounds")
    result = {
        "settings": {name: getattr(args, name) for name in names},
        **found,
        "ratio": round(total(found["peer"]) / total(found["ours"]), 3),
        "memory_ratio": round(found["peer"]["peak_memory_GB"] / found["ours"]["peak_memory_GB"], 3),
        "conditions": conditions(),
    }
    print(json.dumps(result, indent=2))
    if not args.quick or args.output != RESULTS:
        kept = json.loads(args.output.read_text()) if args.output.exists() else {}
        dtypes = args.dtype if args.dtype == args.peer_dtype else f"{args.dtype} against {args.peer_dtype}"
        pictures = f", {args.images} pictures" * (args.images > 1)
        more = pictures + ", prompts" * args.prompts + ", compiled" * args.compile
        kept[f"{kind_of(torch.device(args.device))} {dtypes} {args.size} px {args.steps} steps{more}"] = result
        args.output.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")


if __name__ == "__main__":
    main()
