"""What a network costs, held against what torch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ledits_min.config import SD15_UNET, SD15_VAE, SD21_UNET, SDXL_UNET, UNetConfig
from ledits_min.engine.cost import unet_cost, vae_costs
from ledits_min.unet import UNet
from ledits_min.vae import VAE


@pytest.mark.parametrize(
    ("config", "latents", "gflop", "parameters"),
    [
        (SD15_UNET, 64, 803, 859_520_964),
        (SD21_UNET, 96, 2149, 865_910_724),
        (SDXL_UNET, 128, 6761, 2_567_463_684),
    ],
    ids=["1.5", "2.1", "XL"],
)
def test_the_published_sizes(config: UNetConfig, latents: int, gflop: int, parameters: int) -> None:
    cost = unet_cost(config, latents, latents)
    assert (cost.flop + cost.text) / 1e9 == pytest.approx(gflop, rel=1e-3)
    assert cost.parameters == parameters


@pytest.mark.parametrize("size", [(64, 64), (17, 40), (1, 3)])
@pytest.mark.parametrize("config", [SD15_UNET, SD21_UNET], ids=["1.5", "2.1"])
def test_operations_are_those_that_torch_counts(config: UNetConfig, size: tuple[int, int]) -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet, x_t, t = UNet(config), torch.empty(1, 4, *size), torch.zeros(1, dtype=torch.int64)
        counter.flop_counts.clear()
        unet(x_t, t, torch.empty(1, 77, config.cross_attention_dim))
    cost = unet_cost(config, *size)
    assert cost.flop + cost.text == counter.get_total_flops()
    assert cost.parameters == sum(weight.numel() for weight in unet.parameters())


def test_the_vae_likewise() -> None:
    encode, decode = vae_costs(SD15_VAE, 24, 40)
    with torch.device("meta"), torch.no_grad():
        vae = VAE(SD15_VAE)
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, 192, 320))
        with FlopCounterMode(display=False) as decoding:
            vae.decode(torch.empty(1, 4, 24, 40))
    assert (encode.flop, decode.flop) == (encoding.get_total_flops(), decoding.get_total_flops())
    assert encode.parameters + decode.parameters == sum(weight.numel() for weight in vae.parameters())
