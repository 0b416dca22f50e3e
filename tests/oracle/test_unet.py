"""Our UNet against diffusers' UNet2DConditionModel: same keys, same random weights, same answer."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ledits_min.config import SD15_UNET, UNetConfig
from ledits_min.files.configs import config_json, read_config
from ledits_min.unet import UNet

Fill = Callable[[nn.Module, int], nn.Module]
Error = Callable[[Tensor, Tensor], float]

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

# The size of the embedded model.
TINY = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 96, 128),
    down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, CROSS_UP, UP),
    layers_per_block=1,
    num_attention_heads=(4, 4, 4),
    cross_attention_dim=128,
    norm_num_groups=16,
    norm_eps=1e-5,
    use_linear_projection=False,
    sample_size=16,
)
SMALL = replace(TINY, block_out_channels=(16, 32, 32), cross_attention_dim=24, norm_num_groups=8)
TWO_LEVELS = replace(
    SMALL,
    block_out_channels=(24, 40),
    down_block_types=(CROSS_DOWN, DOWN),
    up_block_types=(UP, CROSS_UP),
    num_attention_heads=(2, 5),
)
CASES = {
    "tiny": (TINY, (2, 16, 16), 40),
    "tiny, not square, batch of 3": (TINY, (3, 7, 13), 5),
    "65 x 33 latents halve to odd sizes": (SMALL, (1, 65, 33), 7),
    "one pixel wide": (SMALL, (1, 9, 1), 7),
    "widths that are no powers of two": (replace(SMALL, block_out_channels=(24, 56, 40)), (2, 12, 8), 9),
    "heads differ by level": (replace(SMALL, num_attention_heads=(2, 8, 4)), (2, 8, 8), 9),
    "two levels, attention above": (TWO_LEVELS, (3, 10, 6), 3),
    "three layers a level": (replace(SMALL, layers_per_block=3), (1, 9, 11), 9),
    "linear projections": (replace(SMALL, use_linear_projection=True), (2, 7, 13), 9),
    "attention in the middle only": (
        replace(SMALL, down_block_types=(DOWN,) * 3, up_block_types=(UP,) * 3),
        (2, 12, 12),
        9,
    ),
    "attention at every level": (
        replace(SMALL, down_block_types=(CROSS_DOWN,) * 3, up_block_types=(CROSS_UP,) * 3),
        (2, 8, 12),
        9,
    ),
    "five channels in, three out, another norm_eps": (
        replace(SMALL, in_channels=5, out_channels=3, norm_eps=1e-3),
        (1, 8, 8),
        9,
    ),
    "one level: nothing is halved": (
        replace(
            SMALL,
            block_out_channels=(32,),
            down_block_types=(CROSS_DOWN,),
            up_block_types=(CROSS_UP,),
            num_attention_heads=(4,),
        ),
        (2, 5, 3),
        9,
    ),
    "four levels": (
        replace(
            SMALL,
            block_out_channels=(16, 32, 48, 48),
            down_block_types=SD15_UNET.down_block_types,
            up_block_types=SD15_UNET.up_block_types,
            layers_per_block=2,
            num_attention_heads=(8, 8, 8, 8),
        ),
        (1, 24, 17),
        77,
    ),
}


def twins(config: UNetConfig, fill: Fill) -> tuple[UNet, UNet2DConditionModel]:
    """Both networks on the same tensors; each must take the other's state dict whole."""
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel.from_config(config_json(config))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    fill(theirs, 0)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


def inputs(config: UNetConfig, shape: tuple[int, int, int], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, config.in_channels, height, width, generator=generator)
    context = torch.randn(batch, tokens, config.cross_attention_dim, generator=generator)
    return x_t, torch.tensor([981, 1, 440])[:batch], context


@pytest.mark.parametrize("case", CASES)
def test_same_answer(case: str, fill: Fill, error: Error) -> None:
    config, shape, tokens = CASES[case]
    ours, theirs = twins(config, fill)
    x_t, t, context = inputs(config, shape, tokens)
    found, wanted = ours(x_t, t, context), theirs(x_t, t, context).sample
    assert found.shape == wanted.shape
    assert error(found, wanted) <= 1e-5
    # The comparison would be empty if text and time had no part in it.
    assert error(ours(x_t, t, context.flip(1) * 0.5), wanted) > 1e-3
    assert error(ours(x_t, t // 2, context), wanted) > 1e-3


def test_same_answer_at_the_size_of_stable_diffusion(fill: Fill, error: Error) -> None:
    ours, theirs = twins(SD15_UNET, fill)
    assert sum(tensor.numel() for tensor in ours.state_dict().values()) == 859_520_964
    x_t, t, context = inputs(SD15_UNET, (1, 16, 24), 77)
    assert error(ours(x_t, t, context), theirs(x_t, t, context).sample) <= 1e-5


@pytest.mark.parametrize("config", [SD15_UNET, TINY, TWO_LEVELS])
def test_a_config_that_diffusers_wrote_is_read(config: UNetConfig) -> None:
    """Its every key, with the default it has there."""
    with torch.device("meta"):
        written = json.loads(UNet2DConditionModel.from_config(config_json(config)).to_json_string())
    assert len(written) > 40
    assert read_config(UNetConfig, written, "unet/config.json") == config


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_half_precision_stays_close_and_returns_float32(
    dtype: torch.dtype, bound: float, fill: Fill, error: Error
) -> None:
    ours, theirs = twins(TINY, fill)
    x_t, t, context = inputs(TINY, (2, 16, 16), 40)
    wanted = theirs(x_t, t, context).sample
    found = ours.to(dtype)(x_t, t, context)
    assert found.dtype == torch.float32
    assert error(found, wanted) <= bound
