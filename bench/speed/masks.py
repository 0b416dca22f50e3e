"""What LEDITS++'s masks cost: the steps of an edit with each kind of mask, beside the same edit with SEGA's.

    python -m bench.speed.masks [--size 512] [--steps 3] [--rounds 3] [--out FILE]

SD 1.5 at full size with random weights, and the embedded model; two concepts. Each round edits the same inversion with
every mask once, in turn, so that a busy machine is busy for all of them. Writes seconds per step (wall and processor,
median of the rounds), the ratio to `percentile`, and the evaluations of the UNet, which masks do not change.
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.speed.conditions import RESULTS, conditions
from bench.speed.sides import SAMPLE, TOKENS, build_ours, make_job
from ledits_min import Concept, LEdits
from ledits_min.config import MASKS, SD15_UNET
from ledits_min.engine.progress import Reporting
from ledits_min.engine.request import Start
from ledits_min.engine.runner import Runner
from ledits_min.weights.train_tiny.export import write_json

CONCEPTS = ("sunglasses", "beard")

Clock = tuple[float, float]  # wall and processor


class Watch:
    """Notes when each step ended: the first one is where the clock starts, since it may wait for what is made once."""

    def __init__(self) -> None:
        self.ends: list[Clock] = []

    def __call__(self, progress: object) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> Clock:
        first, last, steps = self.ends[0], self.ends[-1], len(self.ends) - 1
        return (last[0] - first[0]) / steps, (last[1] - first[1]) / steps


Edit = Callable[[str, Watch], int]  # with a mask; how many evaluations of the UNet there were


def of_stable_diffusion(size: int, steps: int) -> Edit:
    unet, vae = build_ours(False, torch.device("cpu"))
    wanted = Namespace(concepts=len(CONCEPTS), prompts=False, size=size, images=1)
    job = make_job(wanted, steps, 0, SD15_UNET.cross_attention_dim, torch.device("cpu"))
    contexts = {text: replace(context, own=(1,)) for text, context in job.contexts.items()}
    runner, generator = Runner(unet, vae, "epsilon", TOKENS), torch.Generator().manual_seed(0)
    x_T = torch.randn(1, 4, size // 8, size // 8, generator=generator)
    start = Start(x_T, 0.1 * torch.randn(steps, *x_T.shape, generator=generator), job.inversion)

    def edit(mask: str, watch: Watch) -> int:
        terms = tuple(replace(term, mask=mask, warmup_steps=0) for term in job.edit.concepts)
        runner.evaluations.clear()
        settings = replace(job.edit, concepts=terms)
        runner.edit("editing", contexts, start, settings, Reporting(progress=False, callback=watch))
        return sum(runner.evaluations.values())

    return edit


def of_the_embedded_model(steps: int) -> Edit:
    ledits = LEdits.from_pretrained("tiny", device="cpu")
    inversion = ledits.invert(SAMPLE, num_steps=steps, skip=0, progress=False)

    def edit(mask: str, watch: Watch) -> int:
        ledits.runner.evaluations.clear()
        concepts = [Concept(text, mask=mask, warmup_steps=0) for text in CONCEPTS]
        ledits.edit(inversion, concepts=concepts, progress=False, callback=watch)
        return sum(ledits.runner.evaluations.values())

    return edit


def measure(edit: Edit, rounds: int) -> dict[str, Any]:
    spent: dict[str, list[Clock]] = {mask: [] for mask in MASKS}
    evaluations: dict[str, int] = {}
    for number in range(rounds):
        for mask in sorted(MASKS, reverse=number % 2 == 1):  # none is always the first
            watch = Watch()
            evaluations[mask] = edit(mask, watch)
            spent[mask].append(watch.per_step())
    medians = {mask: [median(values) for values in zip(*times, strict=True)] for mask, times in spent.items()}
    wall_before, processor_before = medians["percentile"]
    return {
        mask: {
            "seconds_per_step": round(wall, 5),
            "processor_seconds_per_step": round(processor, 5),
            "ratio": round(wall / wall_before, 3),
            "processor_ratio": round(processor / processor_before, 3),
            "evaluations": evaluations[mask],
        }
        for mask, (wall, processor) in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "masks.json")
    args = parser.parse_args()
    found = {
        "embedded model, 10 steps": measure(of_the_embedded_model(10), 10 * args.rounds),
        f"SD 1.5, {args.size} px, {args.steps} steps": measure(of_stable_diffusion(args.size, args.steps), args.rounds),
    }
    write_json(args.out, {"masks": found, "rounds": args.rounds, "conditions": conditions()})
    print(found)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
