"""The UNet's training on whitened latents, the text encoder frozen: noise prediction with Min-SNR weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from ledits_min.config import ScheduleConfig, UNetConfig
from ledits_min.schedule import make_schedule
from ledits_min.unet import UNet
from ledits_min.weights.train_tiny.loop import State, Training, ema_weights, generator_at, save_atomically, train
from ledits_min.weights.train_tiny.portraits import Portrait, caption, load_split, sample_portrait, seeds
from ledits_min.weights.train_tiny.text import load_text, tokenize
from ledits_min.weights.train_tiny.vae import load_vae, to_image

CONFIG = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 96, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    num_attention_heads=(4, 4, 4),
    cross_attention_dim=128,
    norm_num_groups=16,
    norm_eps=1e-5,
    use_linear_projection=False,
    sample_size=16,
)
SCHEDULE = ScheduleConfig()
BATCH = 32
PLAN = Training(steps=10_000, rate=7e-4, flat=0.6)
SNR_LIMIT = 5.0


def encode_pictures(run: Path) -> Tensor:
    """Latents of the training pictures, float16 (N, 4, 16, 16), encoded once."""
    path = run / "latents.safetensors"
    if not path.exists():
        vae = load_vae(run)
        pixels, _ = load_split(run / "data", "train")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [vae.encode(to_image(part)).half() for part in np.array_split(pixels, max(1, len(pixels) // 200))]
        save_atomically({"latents": torch.cat(parts)}, path)
    return load_file(path)["latents"]


def noise_loss(unet: UNet, x_0: Tensor, context: Tensor, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of the predicted noise, weighted by min(SNR, 5) / SNR; t is drawn one per stratum of the batch.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) n,   SNR = alpha_bar_t / (1 - alpha_bar_t)

    [Min-SNR weighting, 2303.09556]
    """
    batch = len(x_0)
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    t = (strata * len(alphas_cumprod)).long()
    noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    t = t.to(x_0.device)
    alpha_bar_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = alpha_bar_t.sqrt() * x_0 + (1.0 - alpha_bar_t).sqrt() * noise
    with torch.autocast(x_0.device.type, torch.bfloat16):
        eps = unet(x_t, t, context)
    snr = (alpha_bar_t / (1.0 - alpha_bar_t)).flatten()
    weight = snr.clamp(max=SNR_LIMIT) / snr
    loss: Tensor = (weight * (eps.float() - noise).square().mean(dim=(1, 2, 3))).mean()
    return loss


def captions_of(portraits: list[Portrait], index: Tensor, seed: int, step: int) -> list[str]:
    return [caption(portraits[i], Random(f"{seed} {step} {place}"))[0] for place, i in enumerate(index.tolist())]


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerFast, encoder: CLIPTextModel, texts: list[str]) -> Tensor:
    """context (N, L, D), float32."""
    hidden: Tensor = encoder(input_ids=tokenize(tokenizer, texts).to(encoder.device)).last_hidden_state
    return hidden


def train_diffusion(run: Path, seed: int, plan: Training = PLAN) -> State:
    torch.manual_seed(seed)
    unet = UNet(CONFIG)
    torch.nn.init.zeros_(unet.conv_out.weight)
    tokenizer, encoder = load_text(run)
    nn.Module.to(encoder, plan.device)  # not its own `to`: transformers hides that one's types
    latents = encode_pictures(run)
    portraits = [sample_portrait(name) for name in seeds("train", len(latents))]
    alphas_cumprod = make_schedule(SCHEDULE, 1).alphas_cumprod.float().to(plan.device)

    def loss_at(step: int) -> Tensor:
        generator = generator_at(seed, step)
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        context = embed(tokenizer, encoder, captions_of(portraits, index, seed, step))
        return noise_loss(unet, latents[index].float().to(plan.device), context, alphas_cumprod, generator)

    # The plain attention kernel has the faster backward pass on CPUs.
    backend: AbstractContextManager[object] = sdpa_kernel(SDPBackend.MATH) if plan.device == "cpu" else nullcontext()
    with backend:
        return train(unet, loss_at, plan, run / "unet.safetensors", run / "unet.jsonl")


def load_unet(run: Path) -> UNet:
    unet = UNet(CONFIG)
    unet.load_state_dict(ema_weights(run / "unet.safetensors"), strict=True)
    return unet.eval().requires_grad_(False)
