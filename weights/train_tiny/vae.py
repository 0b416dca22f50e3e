"""The autoencoder's training: sharp first (L1 and edges), then close (squared error), always lightly Gaussian."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ledits_min.config import SD15_VAE, VAEConfig
from ledits_min.vae import VAE
from ledits_min.weights.train_tiny.loop import State, Training, ema_weights, generator_at, train
from ledits_min.weights.train_tiny.portraits import Pixels, load_split

CONFIG = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(24, 48, 96, 128),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=SD15_VAE.scaling_factor,
    mid_block_add_attention=False,
    sample_size=128,
)
CROP, CROPS = 64, 12  # early steps see crops, late ones as many pixels in whole pictures
WHOLES = CROPS * CROP**2 // CONFIG.sample_size**2
PLAN = Training(steps=8000, rate=1.5e-3, flat=0.6)


def to_image(pixels: Pixels) -> Tensor:
    """uint8 (B, H, W, 3) -> image (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.diff(dim=-1), image.diff(dim=-2)


def vae_loss(vae: VAE, image: Tensor, noise: Tensor, late: bool) -> Tensor:
    """Early: |e| + 0.5 |edges of e| + e^2 + 3e-4 KL.  Late: 0.1 (|e| + 0.5 |edges of e|) + 2 e^2 + 1e-4 KL.

    e is the error of one posterior sample decoded; every term is a mean over its elements.
    """
    with torch.autocast(image.device.type, torch.bfloat16):
        mean, logvar = vae.moments(image)
        mean, logvar = mean.float(), logvar.float().clamp(-20.0, 10.0)
        latents = mean + (0.5 * logvar).exp() * noise
        error = vae.decode(latents * vae.config.scaling_factor) - image
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    across, down = edges(error)
    sharp = error.abs().mean() + 0.25 * (across.abs().mean() + down.abs().mean())
    squared = error.square().mean()
    return 0.1 * sharp + 2.0 * squared + 1e-4 * kl if late else sharp + squared + 3e-4 * kl


def batch_at(pixels: Pixels, seed: int, step: int, size: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """A batch of pictures, each flipped with probability 1/2, their index, and the step's generator."""
    generator = generator_at(seed, step)
    index = torch.randint(len(pixels), (size,), generator=generator)
    image = to_image(pixels[index.numpy()])
    flip = torch.rand(size, generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], image.flip(-1), image), index, generator


def crop_each(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of (B, C, side, side) at a random place of each picture."""
    top, left = (torch.randint(n - side + 1, (len(image),), generator=generator).tolist() for n in image.shape[2:])
    return torch.stack([one[:, y : y + side, x : x + side] for one, y, x in zip(image, top, left, strict=True)])


def train_vae(run: Path, seed: int, plan: Training = PLAN) -> State:
    torch.manual_seed(seed)
    vae = VAE(CONFIG)
    pixels, _ = load_split(run / "data", "train")

    def loss_at(step: int) -> Tensor:
        # Crops give more variety for the same work; the last word have whole pictures, whose norms see other averages.
        late = step >= plan.steps * plan.flat
        image, _, generator = batch_at(pixels, seed, step, WHOLES if late else CROPS)
        image = image if late else crop_each(image, CROP, generator)
        side = image.shape[-1] // CONFIG.factor
        noise = torch.randn(len(image), CONFIG.latent_channels, side, side, generator=generator)
        return vae_loss(vae, image.to(plan.device), noise.to(plan.device), late)

    return train(vae, loss_at, plan, run / "vae.safetensors", run / "vae.jsonl")


def load_raw_vae(run: Path) -> VAE:
    """The averaged weights as trained, latents not yet whitened."""
    vae = VAE(CONFIG)
    vae.load_state_dict(ema_weights(run / "vae.safetensors"), strict=True)
    return vae.eval()


@torch.no_grad()
def whiten(vae: VAE, pixels: Pixels) -> None:
    """Fold per-channel whitening into the 1x1 convolutions around the latents; what the VAE decodes stays the same.

    mean' = (mean - m) / (s f),   z = s f z' + m      with m, s over the pictures and f = scaling_factor,
    so the scaled latents have mean 0 and standard deviation 1 in every channel.
    """
    means = torch.cat([vae.moments(to_image(part))[0] for part in np.array_split(pixels, max(1, len(pixels) // 100))])
    center = means.mean(dim=(0, 2, 3))
    spread = means.std(dim=(0, 2, 3)) * vae.config.scaling_factor
    channels = vae.config.latent_channels
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant.bias is not None and post.bias is not None
    quant.bias[:channels] -= center
    quant.bias[:channels] /= spread
    quant.weight[:channels] /= spread[:, None, None, None]
    quant.bias[channels:] -= 2.0 * spread.log()
    post.bias += (post.weight[:, :, 0, 0] * center).sum(dim=1)
    post.weight *= spread[None, :, None, None]


def load_vae(run: Path) -> VAE:
    """The averaged, whitened autoencoder of a run, in evaluation mode."""
    vae = load_raw_vae(run)
    whiten(vae, load_split(run / "data", "train")[0][:2000])
    return vae.requires_grad_(False)


@torch.no_grad()
def reconstruct(vae: VAE, pixels: Pixels) -> Pixels:
    """Encode and decode, uint8 in, uint8 out."""
    parts = [vae.decode(vae.encode(to_image(part))) for part in np.array_split(pixels, max(1, len(pixels) // 100))]
    return from_image(torch.cat(parts))


def from_image(image: Tensor) -> Pixels:
    """image (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    levels = image.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    pixels: Pixels = levels.permute(0, 2, 3, 1).numpy()
    return pixels


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures, the mean over pictures of each one's own."""
    squared = np.square(a.astype(np.float64) - b.astype(np.float64)).reshape(len(a), -1).mean(axis=1)
    return float((10.0 * np.log10(255.0**2 / np.maximum(squared, 1e-12))).mean())
