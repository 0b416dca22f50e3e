"""The two sides of the race that `bench.speed` times: our edit, and the published algorithm.

The peer stands on diffusers' own UNet and VAE. It inverts every step, one by one and those it will skip too, evaluates
2 + K branches at every editing step, and takes torch.quantile for the masks. Both sides have the same random weights,
contexts, picture and noise, channels-last memory and torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE, SD15_UNET, SD15_VAE, EditDefaults
from ledits_min.engine.evaluate import Network
from ledits_min.engine.plan import Phase
from ledits_min.engine.progress import Reporting
from ledits_min.engine.request import Start
from ledits_min.engine.runner import Contexts, Runner
from ledits_min.engine.steps import GraphedSteps
from ledits_min.files.configs import config_json
from ledits_min.files.opening import open_image
from ledits_min.files.picture import to_tensor
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, draw_noise
from ledits_min.schedule import Schedule, make_schedule
from ledits_min.sega import Concept
from ledits_min.text import Context
from ledits_min.unet import UNet
from ledits_min.vae import VAE

T = TypeVar("T")
SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"
SIDES = ("ours", "peer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 77
QUICK_UNET = replace(SD15_UNET, block_out_channels=(64, 64, 128, 128), norm_num_groups=16)
QUICK_VAE = replace(SD15_VAE, block_out_channels=(32, 32, 64, 64), norm_num_groups=16)


@dataclass(frozen=True)
class Job:
    """One edit; `contexts` holds those of the empty prompt, of source and target (which may be "") and of the concepts.

    schedule, noise  of all steps, those too that are skipped
    """

    schedule: Schedule
    inversion: InversionSettings
    edit: EditSettings
    image: Tensor
    noise: Tensor
    contexts: dict[str, Context]


@dataclass
class Side:
    """What one side made of it."""

    latents: Tensor | None = None
    picture: Tensor | None = None
    evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    unet_seconds: float | None = None  # of `seconds`, in the loops, where it can be told
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
    """The plain networks; the runner puts the speed on."""
    with torch.device("meta"):
        unet, vae = UNet(QUICK_UNET if quick else SD15_UNET), VAE(QUICK_VAE if quick else SD15_VAE)
    fill((unet, vae), device)
    return unet, vae


def build_theirs(quick: bool, device: torch.device) -> tuple[Any, Any]:
    unet_config, vae_config = (QUICK_UNET, QUICK_VAE) if quick else (SD15_UNET, SD15_VAE)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config_json(unet_config))
        vae = AutoencoderKL.from_config(config_json(vae_config))
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
    terms = tuple(Concept(name).resolve(EditDefaults()) for name in names)
    return Job(
        make_schedule(SD15_SCHEDULE, steps),
        InversionSettings(num_steps=steps, skip=skip, source=source),
        EditSettings(target, guidance_scale=7.5, concepts=terms),
        image, draw_noise(range(args.images), steps, latents).to(device), contexts,
    )  # fmt: skip


# --- ours -----------------------------------------------------------------------------------------------------------


class TimedRunner(Runner):
    """It keeps the time spent in the network's calls, unless whole steps are graphs, in which nobody can tell."""

    def __init__(self, *networks: Any) -> None:
        super().__init__(*networks)
        self.spans: list[Callable[[], float]] = []

    @property
    def unet_seconds(self) -> float | None:
        synchronize()
        return sum(span() for span in self.spans) or None

    def network(self, phase: Phase, contexts: Contexts, inversion: InversionSettings, device: torch.device) -> Network:
        network = super().network(phase, contexts, inversion, device)
        if isinstance(network, GraphedSteps):
            return network

        def timed(x_t: Tensor, inputs: Tensor, *call: Any) -> Tensor:
            if x_t.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                eps = network(x_t, inputs, *call)
                end.record()
                self.spans.append(lambda: start.elapsed_time(end) / 1000.0)
                return eps
            started = time.perf_counter()
            eps = network(x_t, inputs, *call)
            seconds = time.perf_counter() - started
            self.spans.append(lambda: seconds)
            return eps

        return cast(Network, timed)


def run_ours(networks: tuple[UNet, VAE], job: Job) -> Side:
    runner, side, quiet = TimedRunner(*networks, "epsilon", TOKENS), Side(), Reporting(progress=False)
    runner.compiled = networks[0]._compiled_call_impl is not None  # as `LEdits.from_pretrained(compile=True)` says it
    x_0 = side.timed("encode", lambda: runner.encode(job.image))
    x_T, residuals, edited = side.timed("invert and edit", lambda: runner.invert_and_edit(
        job.contexts, x_0, job.noise[job.inversion.skip :], job.inversion, job.edit, quiet
    ))  # fmt: skip
    side.latents = edited.latents
    side.picture = side.timed("decode", lambda: runner.decode(edited.latents))
    side.evaluations = sum(runner.evaluations.values())
    side.unet_seconds = runner.unet_seconds
    side.preparing = runner.overhead.take()
    start = Start(x_T, residuals, job.inversion)
    side.again = lambda: runner.edit("editing", job.contexts, start, job.edit, quiet)
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
    for step in range(len(schedule.timesteps)):
        eps = predict(xs[step], step, ["", job.inversion.source] if job.inversion.source else [""])
        scale = job.inversion.source_guidance_scale
        guided = eps[:1] + scale * (eps[1:] - eps[:1]) if job.inversion.source else eps
        residuals.append(xs[step + 1] - mean(schedule, step, xs[step], guided))
    return xs[job.inversion.skip], residuals


def edit_one_by_one(predict: Predict, job: Job, x_t: Tensor, residuals: list[Tensor]) -> Tensor:
    for i, step in enumerate(range(job.inversion.skip, len(job.schedule.timesteps))):
        eps = predict(x_t, step, ["", job.edit.target, *(term.text for term in job.edit.concepts)])
        guided = eps[:1] + job.edit.guidance_scale * (eps[1:2] - eps[:1])
        for term, concept in zip(job.edit.concepts, eps[2:], strict=True):
            if i >= term.warmup_steps:
                guidance = (concept - eps[:1]) * (-term.guidance_scale if term.reverse else term.guidance_scale)
                strength = guidance.abs().flatten(2)
                edge = torch.quantile(strength, term.threshold, dim=2, keepdim=True)
                guided = guided + torch.where(strength >= edge, guidance.flatten(2), 0.0).view(guidance.shape)
        x_t = mean(job.schedule, step, x_t, guided) + residuals[step]
    return x_t
