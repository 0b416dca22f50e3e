"""Our VAE against diffusers' AutoencoderKL: same keys, same random weights, same answer in both directions."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ledits_min.config import SD15_VAE, VAEConfig
from ledits_min.files.configs import config_json, read_config
from ledits_min.vae import VAE

Fill = Callable[[nn.Module, int], nn.Module]
Error = Callable[[Tensor, Tensor], float]

# The size of the embedded model.
TINY = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    norm_num_groups=16,
    scaling_factor=0.18215,
    mid_block_add_attention=False,
    sample_size=64,
)
CASES = {
    "tiny": (TINY, (2, 64, 64)),
    "with attention in the middle": (replace(TINY, mid_block_add_attention=True), (1, 32, 48)),
    "not square, odd latents, batch of 3": (replace(TINY, mid_block_add_attention=True), (3, 28, 52)),
    "four levels, two layers": (
        replace(SD15_VAE, block_out_channels=(16, 24, 40, 40), norm_num_groups=8),
        (1, 40, 24),
    ),
    "three layers, six latent channels": (
        replace(TINY, block_out_channels=(24, 48), layers_per_block=3, latent_channels=6, norm_num_groups=12),
        (1, 10, 6),
    ),
    "one level: latents as large as the picture": (replace(TINY, block_out_channels=(32,)), (1, 5, 9)),
    "grey in, another scaling factor": (
        replace(TINY, in_channels=1, out_channels=1, scaling_factor=1.7),
        (1, 16, 16),
    ),
}


def twins(config: VAEConfig, fill: Fill) -> tuple[VAE, AutoencoderKL]:
    """Both networks on the same tensors; each must take the other's state dict whole."""
    with torch.device("meta"):
        ours, theirs = VAE(config), AutoencoderKL.from_config(config_json(config))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    fill(theirs, 0)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def check_both_ways(config: VAEConfig, shape: tuple[int, int, int], fill: Fill, error: Error) -> None:
    ours, theirs = twins(config, fill)
    batch, height, width = shape
    generator = torch.Generator().manual_seed(1)
    image = 2.0 * torch.rand(batch, config.in_channels, height, width, generator=generator) - 1.0

    posterior = theirs.encode(image).latent_dist
    mean, logvar = ours.moments(image)
    assert error(mean, posterior.mean) <= 1e-5
    assert error(logvar.clamp(-30.0, 20.0), posterior.logvar) <= 1e-5
    latents = ours.encode(image)
    assert latents.shape[-2:] == (height // config.factor, width // config.factor)
    assert error(latents, posterior.mode() * config.scaling_factor) <= 1e-5

    noise = torch.randn(latents.shape, generator=generator)
    decoded = ours.decode(noise)
    assert decoded.shape == image.shape
    assert error(decoded, theirs.decode(noise / config.scaling_factor).sample) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_same_answer(case: str, fill: Fill, error: Error) -> None:
    check_both_ways(*CASES[case], fill, error)


def test_same_answer_at_the_size_of_stable_diffusion(fill: Fill, error: Error) -> None:
    check_both_ways(SD15_VAE, (1, 32, 48), fill, error)


@pytest.mark.parametrize("config", [SD15_VAE, TINY])
def test_a_config_that_diffusers_wrote_is_read(config: VAEConfig) -> None:
    """Its every key, with the default it has there."""
    with torch.device("meta"):
        written = json.loads(AutoencoderKL.from_config(config_json(config)).to_json_string())
    assert read_config(VAEConfig, written, "vae/config.json") == config


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_half_precision_stays_close_and_returns_float32(
    dtype: torch.dtype, bound: float, fill: Fill, error: Error
) -> None:
    ours, theirs = twins(replace(TINY, mid_block_add_attention=True), fill)
    generator = torch.Generator().manual_seed(1)
    image = 2.0 * torch.rand(1, 3, 32, 32, generator=generator) - 1.0
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    mode = theirs.encode(image).latent_dist.mode() * TINY.scaling_factor
    picture = theirs.decode(noise / TINY.scaling_factor).sample
    ours.to(dtype)
    for found, wanted in ((ours.encode(image), mode), (ours.decode(noise), picture)):
        assert found.dtype == torch.float32
        assert error(found, wanted) <= bound
