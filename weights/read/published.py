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
    SD20_UNET,
    SD21_SCHEDULE,
    SD21_TEXT,
    SD21_UNET,
    SDXL_TEXT_2,
    SDXL_UNET,
    SDXL_VAE,
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
    """The published family whose weights such a UNet has, perhaps with fewer transformer layers; None for others."""
    for family in FAMILIES:
        published = family.configs["unet"]
        if isinstance(published, UNetConfig) and published == replace(
            unet,
            sample_size=published.sample_size,
            upcast_attention=published.upcast_attention,
            transformer_layers_per_block=published.transformer_layers_per_block,
            reverse_transformer_layers_per_block=(),
            mid_block_type=published.mid_block_type,
        ):
            return family
    return None
