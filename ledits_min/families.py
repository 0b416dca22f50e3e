"""The published families of Stable Diffusion: what their parts look like where a file brings no configs.

Sources: the configs published with stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ledits_min.config import (
    SD15_SCHEDULE,
    SD15_TEXT,
    SD15_UNET,
    SD15_VAE,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)

Config = UNetConfig | VAEConfig | TextConfig


@dataclass(frozen=True)
class Family:
    """Published checkpoints that share their layout; `configs` maps each of its parts to what it looks like."""

    name: str
    title: str
    configs: Mapping[str, Config]
    schedule: ScheduleConfig = SD15_SCHEDULE


# 2.0 and 2.1 have one layout. They come as 512-base, which predicts eps, and as 768, which predicts v: see SD20, SD21.
SD20_UNET = replace(
    SD15_UNET,
    num_attention_heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,
)
SD21_UNET = replace(SD20_UNET, sample_size=96)
# OpenCLIP-H without its 24th layer: Stable Diffusion 2 reads the 23rd, behind the final LayerNorm.
SD21_TEXT = TextConfig(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    max_position_embeddings=77,
    hidden_act="gelu",
    layer_norm_eps=1e-5,
    bos_token_id=49406,
    eos_token_id=49407,
    pad_token_id=0,
)
SD21_SCHEDULE = replace(SD15_SCHEDULE, prediction_type="v_prediction")

SDXL_UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    num_attention_heads=(5, 10, 20),
    cross_attention_dim=2048,
    norm_num_groups=32,
    norm_eps=1e-5,
    use_linear_projection=True,
    sample_size=128,
    transformer_layers_per_block=(1, 2, 10),
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SDXL_VAE = replace(SD15_VAE, scaling_factor=0.13025, sample_size=1024)
# OpenCLIP-bigG; the other text encoder is SD 1.x's.
SDXL_TEXT_2 = replace(
    SD21_TEXT,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
)

SD15 = Family("SD 1.x", "Stable Diffusion 1.x", {"unet": SD15_UNET, "vae": SD15_VAE, "text": SD15_TEXT})
SD20 = Family("SD 2.x", "Stable Diffusion 2.x", {"unet": SD20_UNET, "vae": SD15_VAE, "text": SD21_TEXT})
SD21 = Family(SD20.name, SD20.title, {**SD20.configs, "unet": SD21_UNET}, SD21_SCHEDULE)
SDXL = Family(
    "SDXL",
    "Stable Diffusion XL",
    {"unet": SDXL_UNET, "vae": SDXL_VAE, "text": SD15_TEXT, "text_2": SDXL_TEXT_2},
)
FAMILIES = (SD15, SD20, SD21, SDXL)


def parts_of(unet: UNetConfig) -> tuple[str, ...]:
    """The parts that a checkpoint with this UNet has: one that is told the pooled text has a second text encoder."""
    return ("unet", "vae", "text", "text_2") if unet.projection_class_embeddings_input_dim else ("unet", "vae", "text")


def family_of(unet: UNetConfig) -> Family | None:
    """The published family whose weights such a UNet has; None for another size."""
    for family in FAMILIES:
        published = family.configs["unet"]
        if isinstance(published, UNetConfig) and published == replace(
            unet, sample_size=published.sample_size, upcast_attention=published.upcast_attention
        ):
            return family
    return None
