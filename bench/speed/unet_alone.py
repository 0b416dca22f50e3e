"""One evaluation of SD 1.5's UNet against diffusers' with the same weights, dtype and layout, and against OpenVINO's.

The sides take turns in one process, so that the machine's moods meet all of them; the best of the rounds counts.
Everybody's predictions are held against a float32 one before any time is printed. Ours is called as the engine calls
it: the text projected and the timestep embedded before.

    python -m bench.speed.unet_alone --batches 1,4
    python -m bench.speed.unet_alone --compile --openvino
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import logging
from torch import Tensor

from bench.speed.conditions import conditions, kind_of
from bench.speed.gpu import graphed
from bench.speed.sides import DTYPES, TOKENS, build_ours, build_theirs, synchronize
from ledits_min.engine.fast_networks import FastUNet, accelerate
from ledits_min.engine.precision import float32_products

RESULTS = Path(__file__).parents[1] / "results" / "unet_alone.json"
AGREE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}  # relative to the float32 prediction
OPENVINO = 5.0  # times that for OpenVINO, which rounds inside its norms too


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--size", type=int, default=512, help="pixels per side, a multiple of 64")
    parser.add_argument("--batches", default="1,4", help="evaluations per call, several with commas between")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="both once more through torch.compile")
    parser.add_argument("--openvino", action="store_true", help="OpenVINO too (pip install openvino; on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small networks: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds = 64, 1
    return args


def inputs(batch: int, side: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and context."""
    generator = torch.Generator().manual_seed(batch)
    x_t = torch.randn(batch, 4, side, side, generator=generator)
    context = torch.randn(batch, TOKENS, width, generator=generator)
    return x_t.to(device), torch.full((batch,), 481, device=device), context.to(device)


def in_openvino(unet: Any, example: tuple[Tensor, Tensor, Tensor], dtype: str) -> Callable[..., Tensor]:
    """diffusers' UNet, in float32, through OpenVINO, which computes in `dtype`."""
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            prediction: Tensor = self.unet(x_t, t, context, return_dict=False)[0]
            return prediction

    model = openvino.convert_model(Plain(), example_input=example)
    hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda *values: torch.from_numpy(compiled([value.numpy() for value in values])[0])


@torch.no_grad()
def main() -> None:
    args = options()
    logging.set_verbosity_error()
    device, dtype, side = torch.device(args.device), DTYPES[args.dtype], args.size // 8
    ours = cast(FastUNet, accelerate(build_ours(args.quick, device)[0]))
    theirs = build_theirs(args.quick, device)[0]
    width = ours.config.cross_attention_dim
    batches = [int(batch) for batch in args.batches.split(",")]
    jobs = {batch: inputs(batch, side, width, device) for batch in batches}
    with float32_products(device, tf32=False):
        exact = {batch: theirs(*job).sample for batch, job in jobs.items()}
    openvino = in_openvino(theirs, jobs[batches[0]], args.dtype) if args.openvino else None
    for network in (ours, theirs):
        network.to(dtype)
    gc.collect()

    found: dict[str, Any] = {}
    for batch, (x_t, t, context) in jobs.items():
        time_, keys_values = ours.embed(t), ours.project(context)
        half = x_t.to(dtype).contiguous(memory_format=torch.channels_last), t, context.to(dtype)
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: ours.forward(x_t, time_, keys_values),  # noqa: B023 - called in this turn of the loop only
            "diffusers": lambda: theirs.forward(*half).sample,  # noqa: B023
        }
        if args.compile:
            fast: list[Any] = [torch.compile(network.forward, dynamic=False) for network in (ours, theirs)]
            calls["ours, compiled"] = lambda: fast[0](x_t, time_, keys_values)  # noqa: B023
            calls["diffusers, compiled"] = lambda: fast[1](*half).sample  # noqa: B023
        if openvino is not None:
            calls["OpenVINO"] = lambda: openvino(x_t, t, context)  # noqa: B023
        if device.type == "cuda":
            calls |= {f"{name}, graph": recorded(call) for name, call in calls.items()}
        found[f"batch {batch}"] = measure(calls, exact[batch], args)
    print(json.dumps(found, indent=2))
    if not args.quick or args.output != RESULTS:
        kept = json.loads(args.output.read_text()) if args.output.exists() else {}
        more = ", compiled" * args.compile + ", OpenVINO" * args.openvino
        kept[f"{kind_of(device)} {args.dtype} {args.size} px{more}"] = {**found, "conditions": conditions()}
        args.output.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")


def recorded(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same as a CUDA graph: the device's own time."""
    results: list[Tensor] = []
    (replay,) = graphed([lambda: results.append(call())])

    def replayed() -> Tensor:
        replay()
        return results[-1]

    return replayed


def measure(calls: dict[str, Callable[[], Tensor]], exact: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each call, how far it is from float32, and every other's seconds over ours."""
    off = {name: float((call().float() - exact).norm() / exact.norm()) for name, call in calls.items()}  # and a warm-up
    if not all(far <= AGREE[args.dtype] * (OPENVINO if name == "OpenVINO" else 1.0) for name, far in off.items()):
        raise SystemExit(f"a side is too far from float32 ({off}): no time is printed")
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(args.rounds):
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {
        name: {
            "seconds": float(f"{seconds[name]:.4g}"),
            "to_ours": round(seconds[name] / seconds["ours"], 3),
            "off_float32": float(f"{off[name]:.2g}"),
        }
        for name in calls
    }


if __name__ == "__main__":
    main()
