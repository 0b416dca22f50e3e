"""Frozen descriptions of the networks and the noise schedule, and those of the published families.

Names and meanings of the fields are those of diffusers' and transformers' configs; files/configs.py reads and checks
them. Nothing here imports torch, so that `ledits --help` and header inspection stay instant.
Sources: the configs published with stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Depths = tuple[int | tuple[int, ...], ...]  # one number per level, or one for each of its layers


@dataclass(frozen=True)
class UNetConfig:
    """The Stable Diffusion UNet; field names and meanings are those of diffusers' `UNet2DConditionModel`.

    `num_attention_heads` is the number of heads at each level (diffusers calls the same number `attention_head_dim`).
    """

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: int
    num_attention_heads: tuple[int, ...]
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float
    use_linear_projection: bool
    sample_size: int
    transformer_layers_per_block: Depths = ()  # a level's transformers are this deep; () is 1 everywhere
    reverse_transformer_layers_per_block: Depths = ()  # the same on the way up, () the mirror of the way down
    mid_block_type: str = "UNetMidBlock2DCrossAttn"  # "UNetMidBlock2D" is one resnet alone
    upcast_attention: bool = False
    addition_time_embed_dim: int = 0  # sinusoids per size number, 0 where there is no added embedding
    projection_class_embeddings_input_dim: int = 0  # width of the added embedding's input, 0 where there is none

    @property
    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """Layers of the transformer behind each resnet on the way down, level by level; 0 where there is none."""
        depths = self.transformer_layers_per_block or (1,) * len(self.block_out_channels)
        return _spread(depths, self.down_block_types, self.layers_per_block)

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """The same on the way up, from the deepest level."""
        depths = self.transformer_layers_per_block or (1,) * len(self.block_out_channels)
        upward = self.reverse_transformer_layers_per_block or depths[::-1]
        return _spread(upward, self.up_block_types, self.layers_per_block + 1)

    @property
    def mid_depth(self) -> int:
        """Layers of the transformer in the middle, 0 where there is none."""
        if self.mid_block_type == "UNetMidBlock2D":
            return 0
        deepest = self.transformer_layers_per_block[-1] if self.transformer_layers_per_block else 1
        return deepest[0] if isinstance(deepest, tuple) else deepest


def _spread(depths: Depths, kinds: tuple[str, ...], layers: int) -> tuple[tuple[int, ...], ...]:
    levels = zip(depths, kinds, strict=True)
    return tuple(
        (0,) * layers if not kind.startswith("CrossAttn") else depth if isinstance(depth, tuple) else (depth,) * layers
        for depth, kind in levels
    )


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder; field names and meanings are those of diffusers' `AutoencoderKL`."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    mid_block_add_attention: bool
    sample_size: int
    force_upcast: bool = True  # SDXL's overflows float16; the others' configs say so too, and do not mean it

    @property
    def factor(self) -> int:
        """Pixels per latent along one side: every level but the last halves the picture."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text model; field names and meanings are those of transformers' `CLIPTextConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    projection_dim: int = 0  # width of the pooled text; 0 where the model has no projection


@dataclass(frozen=True)
class ScheduleConfig:
    """The training noise schedule; field names and meanings are those of diffusers' schedulers."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    steps_offset: int = 1
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False  # pure noise at the last timestep, see schedule.rescaled


MASKS = ("percentile", "noise", "attention", "both")  # what decides where a concept acts, see sega.concept_mask


@dataclass(frozen=True)
class EditDefaults:
    """What `None` stands for in the public interface: LEDITS Table 1, or a checkpoint's own `ledits.json`."""

    num_steps: int = 100
    skip: int = 36
    guidance_scale: float = 15.0
    source_guidance_scale: float = 3.5
    concept_guidance_scale: float = 7.0
    threshold: float = 0.95
    warmup_steps: int = 1
    solver_order: int = 1
    mask: str = "percentile"
    attention_level: int = 2  # where words' maps are read: how often the latents are halved there, and on which way
    attention_places: tuple[str, ...] = ("down", "up")
    blend_threshold: float = 0.3  # Prompt-to-Prompt's [2208.01626, section 3.2]
    one_size: bool = False  # the model knows squares of its native size alone, see files/square.py


# --- the published families -------------------------------------------------------------------------------------------

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

SD15_UNET = UNetConfig(
    in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, sample_size=64,
    down_block_types=(CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
    up_block_types=("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    num_attention_heads=(8, 8, 8, 8), cross_attention_dim=768, use_linear_projection=False,
    norm_num_groups=32, norm_eps=1e-5,
)  # fmt: skip
SD15_VAE = VAEConfig(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    norm_num_groups=32, scaling_factor=0.18215, mid_block_add_attention=True, sample_size=512,
)  # fmt: skip
SD15_TEXT = TextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
)  # fmt: skip
SD15_SCHEDULE = ScheduleConfig()

# 2.0 and 2.1 have one layout. They come as 512-base, which predicts eps, and as 768, which predicts v.
SD20_UNET = replace(
    SD15_UNET, num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True,
    upcast_attention=True,
)  # fmt: skip
SD21_UNET = replace(SD20_UNET, sample_size=96)
# OpenCLIP-H without its 24th layer: Stable Diffusion 2 reads the 23rd, behind the final LayerNorm.
SD21_TEXT = replace(
    SD15_TEXT, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act="gelu", pad_token_id=0,
)  # fmt: skip
SD21_SCHEDULE = replace(SD15_SCHEDULE, prediction_type="v_prediction")

SDXL_UNET = replace(
    SD15_UNET, block_out_channels=(320, 640, 1280), sample_size=128,
    down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D"),
    num_attention_heads=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 10), addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SDXL_VAE = replace(SD15_VAE, scaling_factor=0.13025, sample_size=1024)
# OpenCLIP-bigG; the other text encoder is SD 1.x's.
SDXL_TEXT_2 = replace(
    SD21_TEXT, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    projection_dim=1280,
)  # fmt: skip
