"""The recipe's stages, one command each: python -m ledits_min.weights.train_tiny STAGE --out RUNDIR"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ledits_min.weights.train_tiny import classifier, diffusion, export, portraits, text, vae

TRAINERS = {
    "classifier": (classifier.train_classifier, classifier.PLAN),
    "vae": (vae.train_vae, vae.PLAN),
    "text": (text.train_text, text.PLAN),
    "diffusion": (diffusion.train_diffusion, diffusion.PLAN),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ledits_min.weights.train_tiny", description=__doc__)
    parser.add_argument("stage", choices=("data", *TRAINERS, "export"))
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, outside the repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="train for another number of steps than the recipe's")
    parser.add_argument("--until", type=int, help="stop at this step, to go on later")
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on later with the same command")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--train-count", type=int, default=24_000, help="portraits to train on")
    parser.add_argument("--test-count", type=int, default=1_000, help="portraits held out")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw")
    parser.add_argument("--model", type=Path, default=export.TINY, help="the folder to export to")
    arguments = parser.parse_args()
    run: Path = arguments.out
    run.mkdir(parents=True, exist_ok=True)
    # The thread count is torch's own (OMP_NUM_THREADS); a stopped stage may go on with another one.
    torch.set_flush_denormal(True)
    if arguments.stage == "data":
        size = vae.CONFIG.sample_size
        for split, count in (("test", arguments.test_count), ("train", arguments.train_count)):
            portraits.render_split(run / "data", split, count, size, arguments.processes)
    elif arguments.stage == "export":
        export.export(run, arguments.seed, arguments.model)
    else:
        train, plan = TRAINERS[arguments.stage]
        plan = replace(
            plan,
            steps=arguments.steps or plan.steps,
            until=arguments.until,
            minutes=arguments.minutes,
            device=arguments.device,
        )
        train(run, arguments.seed, plan)


if __name__ == "__main__":
    main()
