"""THE table: names of a latent-diffusion (LDM) single file -> names of our modules, by rule from a config.

An LDM file numbers the UNet's layers in one running list a side (`input_blocks.7.1`), our modules and
diffusers by level and kind (`down_blocks.2.attentions.0`). Both are walks over the same network, so one
walk yields the table. Source of the left column: CompVis/stable-diffusion,
ldm/modules/diffusionmodules/openaimodel.py and model.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from ledits_min.config import UNetConfig, VAEConfig
from ledits_min.weights.read.shapes import unet_shapes, vae_shapes

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
OPENCLIP_PREFIX = "cond_stage_model.model."  # SD 2.x
XL_TEXT_PREFIX = "conditioner.embedders.0.transformer."
XL_TEXT_2_PREFIX = "conditioner.embedders.1.model."
EMA_PREFIX = "model_ema."
PREFIXES = (
    ("unet", UNET_PREFIX),
    ("vae", VAE_PREFIX),
    ("text", TEXT_PREFIX),
    ("text", OPENCLIP_PREFIX),
    ("text", XL_TEXT_PREFIX),
    ("text_2", XL_TEXT_2_PREFIX),
)

# Inside a block: our name -> the LDM name. What is missing here has the same name in both.
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_table(config: UNetConfig) -> dict[str, str]:
    """LDM name (without `model.diffusion_model.`) -> our name, for every tensor of the UNet."""
    return _table(unet_shapes(config), dict(unet_blocks(config)), _UNET_RESNET)


def vae_table(config: VAEConfig) -> dict[str, str]:
    """LDM name (without `first_stage_model.`) -> our name, for every tensor of the VAE."""
    return _table(vae_shapes(config), dict(_vae_blocks(config)), _VAE_RESNET)


def unet_blocks(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(our block, LDM block) along the UNet's walk: each resnet, transformer and resampling in turn."""
    yield "conv_in", "input_blocks.0.0"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    yield "add_embedding.linear_1", "label_emb.0.0"
    yield "add_embedding.linear_2", "label_emb.0.2"
    last = len(config.block_out_channels) - 1
    number = 1
    for level, kind in enumerate(config.down_block_types):
        for layer in range(config.layers_per_block):
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0"
            if kind == "CrossAttnDownBlock2D":
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    number = 0
    for level, kind in enumerate(config.up_block_types):
        for layer in range(config.layers_per_block + 1):
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0"
            if kind == "CrossAttnUpBlock2D":
                yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{number}.1"
            if layer == config.layers_per_block and level < last:
                # The upsampling shares its number with the level's last layer and stands behind it.
                place = 2 if kind == "CrossAttnUpBlock2D" else 1
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{place}.conv"
            number += 1
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _vae_blocks(config: VAEConfig) -> Iterator[tuple[str, str]]:
    """(our block, LDM block) of the VAE; the LDM decoder counts its levels from the image side."""
    levels = len(config.block_out_channels)
    for level in range(levels):
        for layer in range(config.layers_per_block):
            yield f"encoder.down_blocks.{level}.resnets.{layer}", f"encoder.down.{level}.block.{layer}"
        yield f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
        mirrored = levels - 1 - level
        for layer in range(config.layers_per_block + 1):
            yield f"decoder.up_blocks.{level}.resnets.{layer}", f"decoder.up.{mirrored}.block.{layer}"
        yield f"decoder.up_blocks.{level}.upsamplers.0.conv", f"decoder.up.{mirrored}.upsample.conv"
    for half in ("encoder", "decoder"):
        yield f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"
        yield f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"
        for ours, theirs in _VAE_ATTENTION.items():
            yield f"{half}.mid_block.attentions.0.{ours}", f"{half}.mid.attn_1.{theirs}"
        yield f"{half}.conv_norm_out", f"{half}.norm_out"


def _table(names: dict[str, tuple[int, ...]], blocks: dict[str, str], resnet: dict[str, str]) -> dict[str, str]:
    """Rename each of our names by the longest block that starts it, and the layers inside a resnet."""
    table = {}
    for name in names:
        module, parameter = name.rsplit(".", 1)
        parts = module.split(".")
        # A module outside every listed block has the same name on both sides.
        starts = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        block = next((start for start in starts if start in blocks), module)
        inner = module[len(block) + 1 :]
        if ".resnets." in block:
            inner = resnet.get(inner, inner)
        table[".".join(filter(None, (blocks.get(block, block), inner, parameter)))] = name
    return table
