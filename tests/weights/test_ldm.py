"""The LDM table and the shapes: complete, one to one, and right at places that people know by heart.

tests/oracle/test_checkpoints.py holds the same table against diffusers' own conversion.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledits_min.config import SD15_TEXT, SD15_UNET, SD15_VAE, UNetConfig, VAEConfig
from ledits_min.text import build_text_model
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.names.ldm import UNET_PREFIX, VAE_PREFIX, unet_table, vae_table
from ledits_min.weights.names.legacy import flat_text_name, modern_vae_name
from ledits_min.weights.read.shapes import text_shapes, unet_shapes, vae_shapes

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

KNOWN_UNET = {
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.0.0.weight": "conv_in.weight",
    "input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.8.1.proj_in.weight": "down_blocks.2.attentions.1.proj_in.weight",
    "input_blocks.11.0.emb_layers.1.weight": "down_blocks.3.resnets.1.time_emb_proj.weight",
    "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    ),
    "middle_block.2.out_layers.3.bias": "mid_block.resnets.1.conv2.bias",
    "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
    "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.bias": (
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.bias"
    ),
    "out.0.weight": "conv_norm_out.weight",
    "out.2.bias": "conv_out.bias",
}
KNOWN_VAE = {
    "encoder.down.2.downsample.conv.weight": "encoder.down_blocks.2.downsamplers.0.conv.weight",
    "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.mid.attn_1.proj_out.weight": "encoder.mid_block.attentions.0.to_out.0.weight",
    "decoder.mid.attn_1.q.bias": "decoder.mid_block.attentions.0.to_q.bias",
    "decoder.up.3.block.0.conv1.weight": "decoder.up_blocks.0.resnets.0.conv1.weight",
    "decoder.up.1.upsample.conv.bias": "decoder.up_blocks.2.upsamplers.0.conv.bias",
    "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
    "quant_conv.weight": "quant_conv.weight",
}


def test_known_places() -> None:
    unet, vae = unet_table(SD15_UNET), vae_table(SD15_VAE)
    assert {name: unet[name] for name in KNOWN_UNET} == KNOWN_UNET
    assert {name: vae[name] for name in KNOWN_VAE} == KNOWN_VAE


def test_shapes_are_those_of_the_modules(checkpoints: ModuleType) -> None:
    """The very names and shapes that load_state_dict will want, at full and at reduced size."""
    for unet, vae, text in (
        (SD15_UNET, SD15_VAE, SD15_TEXT),
        (checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE, checkpoints.REDUCED_TEXT),
    ):
        with torch.device("meta"):
            modules = (UNet(unet), VAE(vae), build_text_model(text))
        for module, wanted in zip(modules, (unet_shapes(unet), vae_shapes(vae), text_shapes(text)), strict=True):
            assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == wanted


@st.composite
def unet_configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 4))
    attends = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(draw(st.lists(st.sampled_from([8, 16]), min_size=levels, max_size=levels))),
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        layers_per_block=draw(st.integers(1, 3)),
        num_attention_heads=(2,) * levels,
        cross_attention_dim=12,
        norm_num_groups=4,
        norm_eps=1e-5,
        use_linear_projection=draw(st.booleans()),
        sample_size=8,
    )


@st.composite
def vae_configs(draw: st.DrawFn) -> VAEConfig:
    return VAEConfig(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=tuple(draw(st.lists(st.sampled_from([8, 16]), min_size=1, max_size=4))),
        layers_per_block=draw(st.integers(1, 3)),
        norm_num_groups=4,
        scaling_factor=0.2,
        mid_block_add_attention=draw(st.booleans()),
        sample_size=32,
    )


@QUICK
@given(unet_configs())
def test_unet_table_at_any_size(checkpoints: ModuleType, config: UNetConfig) -> None:
    """One to one, complete, equal to the block numbers computed by arithmetic, and the shapes are the module's."""
    table = unet_table(config)
    assert sorted(table.values()) == sorted(unet_shapes(config))
    assert table == {checkpoints.ldm_unet_name(name, config): name for name in unet_shapes(config)}
    with torch.device("meta"):
        state = UNet(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == unet_shapes(config)


@QUICK
@given(vae_configs())
def test_vae_table_at_any_size(checkpoints: ModuleType, config: VAEConfig) -> None:
    table = vae_table(config)
    assert sorted(table.values()) == sorted(vae_shapes(config))
    assert table == {checkpoints.ldm_vae_name(name, config): name for name in vae_shapes(config)}
    with torch.device("meta"):
        state = VAE(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == vae_shapes(config)


def test_full_size_names_and_shapes_are_those_of_published_files(layouts: dict[str, Any]) -> None:
    def listing(name: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
        keys = layouts[name]["keys"].items()
        return {key[len(prefix) :]: tuple(shape) for key, (_, shape) in keys if key.startswith(prefix)}

    unet, vae = unet_shapes(SD15_UNET), vae_shapes(SD15_VAE)
    assert listing("sd15_diffusers_unet_f32") == unet
    assert listing("sdxl_diffusers_vae_new_f32") == vae
    old = listing("sd15_diffusers_vae_old_f32")
    assert {modern_vae_name(name): shape for name, shape in old.items()} == vae
    assert listing("hf_text_encoder_flat_v5_f32") == text_shapes(SD15_TEXT)
    prefixed = listing("sdxl_hf_text_encoder_f32_nopid")
    assert {flat_text_name(name): shape for name, shape in prefixed.items()} == text_shapes(SD15_TEXT)

    for name in ("sd15_ldm_emaonly", "sd15_ldm_community_fp16_merge", "sd15_ldm_pruned_with_ema"):
        found = listing(name, UNET_PREFIX)
        assert found == {theirs: unet[ours] for theirs, ours in unet_table(SD15_UNET).items()}
        found = listing(name, VAE_PREFIX)
        squeezed = {theirs: shape[:2] if ".attn_1." in theirs else shape for theirs, shape in found.items()}
        assert squeezed == {theirs: vae[ours] for theirs, ours in vae_table(SD15_VAE).items()}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("decoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("encoder.mid_block.attentions.0.proj_attn.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
        ("encoder.mid_block.attentions.0.group_norm.bias", "encoder.mid_block.attentions.0.group_norm.bias"),
        ("encoder.mid_block.attentions.0.to_k.bias", "encoder.mid_block.attentions.0.to_k.bias"),
        ("key.weight", "key.weight"),
    ],
)
def test_old_attention_names(name: str, wanted: str) -> None:
    assert modern_vae_name(name) == wanted
