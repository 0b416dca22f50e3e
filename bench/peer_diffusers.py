"""A whole edit against its peer: the published algorithm on diffusers' own UNet and VAE.

The peer inverts every step, one by one and those it will skip too, evaluates 2 + K branches at every editing step, and
takes torch.quantile for the masks. Both sides have the same random weights, contexts, picture and noise, the same
dtype (unless --peer-dtype says otherwise), channels-last memory and torch's scaled_dot_product_attention. They take
turns, each in processes of its own, so that each has its own peak memory. Their latents are compared before any time is
printed: those of a few steps in float32, where they must agree to rounding, and those that were timed. Where they
disagree, nothing is printed but that.

    python -m bench.peer_diffusers --dtype bf16 --size 512 --steps 20 --skip 7
    python -m bench.peer_diffusers --peer-dtype fp32
    python -m bench.peer_diffusers --prompts --compile
    python -m bench.peer_diffusers --quick
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, logging
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.conditions import Memory, conditions, kind_of
from ledits_min.config import SD15_SCHEDULE, SD15_UNET, SD15_VAE, EditDefaults
from ledits_min.cost import unet_cost, vae_costs
from ledits_min.edit import levels
from ledits_min.engine import Network
from ledits_min.image import open_image, to_tensor
from ledits_min.inversion import draw_noise
from ledits_min.ops import EditPlan
from ledits_min.request import Start
from ledits_min.runner import Runner
from ledits_min.schedule import Schedule, make_schedule
from ledits_min.sega import Concept, ConceptTerm
from ledits_min.text import Context
from ledits_min.unet import UNet
from ledits_min.vae import VAE

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results" / "peer.json"
SAMPLE = Path(__file__).parents[1] / "weights/tiny/samples/portrait1.png"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative. After a few steps only rounding may tell the sides apart. After many, masks have moved: their edge lies
# between two numbers that may be a rounding error apart (in float32 at 512 pixels two of 16,384 places swapped at the
# third step, all others agreed to 3e-6), and a random network, no denoiser, carries it on.
AGREE_EXACT = 1e-3
AGREE = {"fp32": 0.1, "bf16": 0.5, "fp16": 0.1}
TOKENS = 77
SIDES = ("ours", "peer")
QUICK_UNET = replace(SD15_UNET, block_out_channels=(64, 64, 128, 128), norm_num_groups=16)
QUICK_VAE = replace(SD15_VAE, block_out_channels=(32, 32, 64, 64), norm_num_groups=16)


@dataclass(frozen=True)
class Job:
    """One edit. texts[0] is the empty prompt's context, then source, target (None: empty), and the concepts'."""

    schedule: Schedule
    skip: int
    image: Tensor
    noise: Tensor
    contexts: dict[str, Context]
    source: str
    target: str
    terms: list[ConceptTerm]
    source_guidance_scale: float = 3.5
    guidance_scale: float = 7.5


@dataclass
class Side:
    """What one side made of it."""

    latents: Tensor | None = None
    picture: Tensor | None = None
    evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    unet_seconds: float = 0.0  # of `seconds`, in the loops
    preparing: dict[str, float] = field(default_factory=dict)  # of `seconds` too: compiling, recording of graphs
    again: Callable[[], object] | None = None  # edits the same inversion once more, as who tries a second concept does

    def timed(self, phase: str, run: Callable[[], T]) -> T:
        synchronize()
        started = time.perf_counter()
        result = run()
        synchronize()
        self.seconds[phase] = time.perf_counter() - started
        return result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_ours(quick: bool, device: torch.device) -> tuple[UNet, VAE]:
    with torch.device("meta"):
        unet, vae = UNet(QUICK_UNET if quick else SD15_UNET), VAE(QUICK_VAE if quick else SD15_VAE)
    fill((unet, vae), device)
    return unet, vae


def build_theirs(quick: bool, device: torch.device) -> tuple[Any, Any]:
    unet_config, vae_config = (QUICK_UNET, QUICK_VAE) if quick else (SD15_UNET, SD15_VAE)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config.to_json())
        vae = AutoencoderKL.from_config(vae_config.to_json())
    fill((unet, vae), device)
    return unet, vae


def fill(networks: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Random float32 weights that keep activations near one and predictions small; the same for the same names."""
    for seed, network in enumerate(networks):
        weights: dict[str, Tensor] = {}
        for name, tensor in network.state_dict().items():
            generator = torch.Generator().manual_seed(1000 * seed + zlib.crc32(name.encode()))
            values = torch.randn(tensor.shape, generator=generator)
            scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
            scale *= 0.1 if name.startswith("conv_out") else 1.0
            values = values * scale + (tensor.dim() == 1 and name.endswith("weight"))
            layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            weights[name] = values.to(device).contiguous(memory_format=layout)
        network.load_state_dict(weights, strict=True, assign=True)
        network.eval().requires_grad_(False)


# --- ours -----------------------------------------------------------------------------------------------------------


class TimedRunner(Runner):
    """It keeps the time spent in the network's calls, whether those are graphs or not."""

    unet_seconds = 0.0

    def run(self, loop: Callable[[Network, Any], T], *more: Any, **options: Any) -> T:
        spans: list[Callable[[], float]] = []

        def timed_loop(network: Network, advance: Any) -> T:
            def timed(x_t: Tensor, *numbers: Tensor) -> Tensor:
                if x_t.device.type == "cuda":
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    eps = network(x_t, *numbers)
                    end.record()
                    spans.append(lambda: start.elapsed_time(end) / 1000.0)
                    return eps
                started = time.perf_counter()
                eps = network(x_t, *numbers)
                seconds = time.perf_counter() - started
                spans.append(lambda: seconds)
                return eps

            return loop(timed, advance)

        result = super().run(timed_loop, *more, **options)
        synchronize()
        self.unet_seconds += sum(span() for span in spans)
        return result


def run_ours(networks: tuple[UNet, VAE], job: Job) -> Side:
    runner, side = TimedRunner(*networks, "epsilon", TOKENS), Side()
    sigmas = job.schedule.sigmas(1.0)
    table = [levels(job.schedule, sigmas, step) for step in range(job.skip, job.schedule.num_steps)]
    plan = EditPlan(table, job.terms, job.target, job.guidance_scale)
    x_0 = side.timed("encode", lambda: runner.encode(job.image))
    x_T, residuals, (side.latents, _, _) = side.timed("invert and edit", lambda: runner.invert_and_edit(
        job.contexts, plan, x_0, job.noise[job.skip :], job.schedule, job.skip, 1.0, job.source,
        job.source_guidance_scale, progress=False, trace=False,
    ))  # fmt: skip
    side.picture = side.timed("decode", lambda: runner.decode(side.latents))
    side.evaluations = sum(runner.evaluations.values())
    side.unet_seconds = runner.unet_seconds
    side.preparing = runner.preparation.take()
    start = Start(x_T, residuals, job.schedule, job.skip, 1.0)
    side.again = lambda: runner.edit("editing", job.contexts, plan, start, progress=False, trace=False)
    return side


# --- the peer -------------------------------------------------------------------------------------------------------


def run_peer(networks: tuple[Any, Any], job: Job) -> Side:
    """One picture after the other."""
    sides = []
    for i in range(len(job.image)):
        one = replace(job, image=job.image[i : i + 1], noise=job.noise[:, i : i + 1])
        sides.append(run_peer_once(networks, one))
    side = sides[0]
    for other in sides[1:]:
        assert side.latents is not None and other.latents is not None
        side.latents = torch.cat([side.latents, other.latents])
        side.evaluations += other.evaluations
        side.seconds = {phase: seconds + other.seconds[phase] for phase, seconds in side.seconds.items()}
    return side


def run_peer_once(networks: tuple[Any, Any], job: Job) -> Side:
    unet, vae = networks
    side, dtype = Side(), next(unet.parameters()).dtype
    factor = vae.config.scaling_factor

    def predict(x_t: Tensor, step: int, texts: list[str]) -> Tensor:
        """One batch of all branches: float32 (branches, 4, h, w)."""
        side.evaluations += len(texts)
        context = torch.cat([job.contexts[text].tokens for text in texts]).to(dtype)
        batch = x_t.to(dtype).expand(len(texts), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        t = job.schedule.timesteps[step].to(x_t.device)
        eps: Tensor = unet(batch, t, encoder_hidden_states=context).sample
        return eps.float()

    x_0 = side.timed("encode", lambda: vae.encode(job.image.to(dtype)).latent_dist.mode().float() * factor)
    x_T, residuals = side.timed("invert", lambda: invert_one_by_one(predict, job, x_0))
    side.latents = side.timed("edit", lambda: edit_one_by_one(predict, job, x_T, residuals))
    side.picture = side.timed("decode", lambda: vae.decode((side.latents / factor).to(dtype)).sample.float())
    return side


Predict = Callable[[Tensor, int, list[str]], Tensor]


def mean(schedule: Schedule, step: int, x_t: Tensor, eps: Tensor) -> Tensor:
    """mu_t of DDPM (eta = 1)."""
    now, before = float(schedule.alpha_bar_t[step]), float(schedule.alpha_bar_prev[step])
    variance = (1 - before) / (1 - now) * (1 - now / before)
    pred_x0 = (x_t - (1 - now) ** 0.5 * eps) / now**0.5
    return before**0.5 * pred_x0 + (1 - before - variance) ** 0.5 * eps


def invert_one_by_one(predict: Predict, job: Job, x_0: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x_T of the first step that is edited, and the residuals of all steps."""
    schedule = job.schedule
    xs = [
        float(level) ** 0.5 * x_0 + (1 - float(level)) ** 0.5 * noise
        for level, noise in zip(schedule.alpha_bar_t, job.noise, strict=True)
    ]
    xs.append(x_0)
    residuals = []
    for step in range(schedule.num_steps):
        eps = predict(xs[step], step, ["", job.source] if job.source else [""])
        guided = eps[:1] + job.source_guidance_scale * (eps[1:] - eps[:1]) if job.source else eps
        residuals.append(xs[step + 1] - mean(schedule, step, xs[step], guided))
    return xs[job.skip], residuals


def edit_one_by_one(predict: Predict, job: Job, x_t: Tensor, residuals: list[Tensor]) -> Tensor:
    for i, step in enumerate(range(job.skip, job.schedule.num_steps)):
        eps = predict(x_t, step, ["", job.target, *(term.text for term in job.terms)])
        guided = eps[:1] + job.guidance_scale * (eps[1:2] - eps[:1])
        for term, concept in zip(job.terms, eps[2:], strict=True):
            if i >= term.warmup_steps:
                guidance = (concept - eps[:1]) * (-term.guidance_scale if term.reverse else term.guidance_scale)
                strength = guidance.abs().flatten(2)
                edge = torch.quantile(strength, term.threshold, dim=2, keepdim=True)
                guided = guided + torch.where(strength >= edge, guidance.flatten(2), 0.0).view(guidance.shape)
        x_t = mean(job.schedule, step, x_t, guided) + residuals[step]
    return x_t


# --- the command ----------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--peer-dtype", choices=DTYPES, help="the peer's, if another")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, a multiple of 64")
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


def make_job(args: argparse.Namespace, steps: int, skip: int, width: int, device: torch.device) -> Job:
    generator = torch.Generator().manual_seed(5)
    names = ["hat", "beard", "smile", "sunglasses"][: args.concepts]
    source, target = ("a face", "a statue") if args.prompts else ("", "")
    texts = dict.fromkeys(["", source, target, *names])
    common = torch.randn(1, TOKENS, width, generator=generator)
    contexts = {
        text: Context((common + 0.3 * torch.randn(1, TOKENS, width, generator=generator)).to(device)) for text in texts
    }
    image = to_tensor([open_image(SAMPLE)], (args.size, args.size)).to(device).repeat(args.images, 1, 1, 1)
    latents = (4, args.size // 8, args.size // 8)
    return Job(
        make_schedule(SD15_SCHEDULE, steps), skip, image, draw_noise(range(args.images), steps, latents).to(device),
        contexts, source, target, [Concept(name).resolve(EditDefaults()) for name in names],
    )  # fmt: skip


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


def give_back_freed_memory() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


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
                command = [sys.executable, "-m", "bench.peer_diffusers", *sys.argv[1:]]
                subprocess.run([*command, "--side", side, "--into", folder], check=True, cwd=Path(__file__).parents[1])
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
    if not args.quick:
        kept = json.loads(args.output.read_text()) if args.output.exists() else {}
        dtypes = args.dtype if args.dtype == args.peer_dtype else f"{args.dtype} against {args.peer_dtype}"
        pictures = f", {args.images} pictures" * (args.images > 1)
        more = pictures + ", prompts" * args.prompts + ", compiled" * args.compile
        kept[f"{kind_of(torch.device(args.device))} {dtypes} {args.size} px {args.steps} steps{more}"] = result
        args.output.write_text(json.dumps(dict(sorted(kept.items())), indent=2) + "\n")


if __name__ == "__main__":
    main()
