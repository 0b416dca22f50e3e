"""Reading configurations: what is honoured, what is refused, and that nothing is lost on the way."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

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
    EditDefaults,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ledits_min.errors import InputError, check_number, check_whole, short
from ledits_min.files.configs import config_json, read_config
from ledits_min.files.scheduler import unused_settings
from ledits_min.weights.read.published import family_of

# The files of Stable Diffusion 1.5 as they were published.
PUBLISHED_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
# What later versions of diffusers add when they save the same network again.
RESAVED_UNET: dict[str, Any] = {
    **PUBLISHED_UNET,
    "_name_or_path": "somewhere/unet",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": [False, False, False, False],
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
PUBLISHED_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
RESAVED_VAE: dict[str, Any] = {
    **PUBLISHED_VAE,
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
PUBLISHED_TEXT: dict[str, Any] = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
PUBLISHED_SCHEDULE: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


class TestAccepted:
    @pytest.mark.parametrize("mapping", [PUBLISHED_UNET, RESAVED_UNET])
    def test_unet(self, mapping: dict[str, Any]) -> None:
        assert read_config(UNetConfig, mapping, "unet/config.json") == SD15_UNET

    @pytest.mark.parametrize("mapping", [PUBLISHED_VAE, RESAVED_VAE])
    def test_vae(self, mapping: dict[str, Any]) -> None:
        assert read_config(VAEConfig, mapping, "vae/config.json") == SD15_VAE
        assert SD15_VAE.factor == 8

    def test_unets_of_the_other_families(self) -> None:
        """As published with stable-diffusion-2-1-base, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0."""
        second = {
            **RESAVED_UNET,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "use_linear_projection": True,
            "upcast_attention": True,
        }
        assert read_config(UNetConfig, second, "unet") == SD20_UNET
        assert read_config(UNetConfig, {**second, "sample_size": 96}, "unet") == SD21_UNET
        plain = read_config(UNetConfig, {**second, "upcast_attention": False}, "unet")
        assert plain == replace(SD20_UNET, upcast_attention=False)
        for config, name in ((plain, "SD 2.x"), (SD21_UNET, "SD 2.x"), (SD15_UNET, "SD 1.x"), (SDXL_UNET, "SDXL")):
            family = family_of(config)
            assert family is not None and family.name == name
        assert family_of(SMALL_UNET) is None
        xl = {
            **RESAVED_UNET,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "only_cross_attention": False,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "upcast_attention": None,
            "use_linear_projection": True,
        }
        assert read_config(UNetConfig, xl, "unet") == SDXL_UNET

    def test_text_models_of_the_other_families(self) -> None:
        second = {
            **PUBLISHED_TEXT,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        }
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        assert read_config(TextConfig, second, "text") == replace(SD21_TEXT, **ids)
        big = {
            **second,
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        }
        assert read_config(TextConfig, big, "text") == replace(SDXL_TEXT_2, **ids)

    def test_text(self) -> None:
        found = read_config(TextConfig, PUBLISHED_TEXT, "text_encoder/config.json")
        assert found == replace(SD15_TEXT, bos_token_id=0, eos_token_id=2, pad_token_id=1)

    def test_schedule(self) -> None:
        assert read_config(ScheduleConfig, PUBLISHED_SCHEDULE, "scheduler_config.json") == SD15_SCHEDULE

    def test_heads_that_differ_by_level(self) -> None:
        config = read_config(UNetConfig, {**PUBLISHED_UNET, "attention_head_dim": [5, 10, 20, 20]}, "unet")
        assert config.num_attention_heads == (5, 10, 20, 20)

    def test_a_key_that_is_missing_or_null_means_the_default(self) -> None:
        without = {key: value for key, value in PUBLISHED_UNET.items() if key not in ("in_channels", "norm_eps")}
        assert read_config(UNetConfig, {**without, "norm_eps": None}, "unet") == SD15_UNET

    def test_edit_defaults(self) -> None:
        assert read_config(EditDefaults, {}, "ledits.json") == EditDefaults()
        found = read_config(EditDefaults, {"num_steps": 50, "threshold": 0.9, "guidance_scale": 7}, "ledits.json")
        assert found == EditDefaults(num_steps=50, threshold=0.9, guidance_scale=7.0)


SMALL_UNET = UNetConfig(
    in_channels=9,
    out_channels=4,
    block_out_channels=(24, 40),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=3,
    num_attention_heads=(2, 5),
    cross_attention_dim=7,
    norm_num_groups=8,
    norm_eps=1e-6,
    use_linear_projection=True,
    sample_size=11,
)
SMALL_VAE = VAEConfig(1, 2, 6, (16, 24), 3, 8, 0.7, False, 33)
SMALL_TEXT = TextConfig(60, 32, 48, 3, 4, 40, "gelu", 1e-6, 0, 1, 2)
SMALL_SCHEDULE = ScheduleConfig(300, 1e-4, 0.02, "linear", 0, "v_prediction")


@pytest.mark.parametrize(
    "config",
    [SD15_UNET, SMALL_UNET, SD15_VAE, SMALL_VAE, SD15_TEXT, SMALL_TEXT, SD15_SCHEDULE, SMALL_SCHEDULE]
    + [
        SD20_UNET,
        SD21_UNET,
        SD21_TEXT,
        SD21_SCHEDULE,
        SDXL_UNET,
        SDXL_VAE,
        SDXL_TEXT_2,
        replace(SDXL_VAE, force_upcast=False),
        replace(
            SDXL_UNET,
            transformer_layers_per_block=(1, (1, 2), 4),
            reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
            mid_block_type="UNetMidBlock2D",
        ),
        replace(SD21_SCHEDULE, rescale_betas_zero_snr=True),
    ],
    ids=lambda config: type(config).__name__,
)
def test_round_trip_through_a_file(config: UNetConfig | VAEConfig | TextConfig | ScheduleConfig) -> None:
    written = json.dumps(config_json(config))
    assert read_config(type(config), json.loads(written), "somewhere") == config


Read = Callable[[dict[str, Any], str], object]


def refuse(read: Read, mapping: Any, *words: str) -> None:
    """Refused with one line that names the file and every word."""
    with pytest.raises(InputError) as caught:
        read(mapping, "some/config.json")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


class TestRefused:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("class_embed_type", "timestep"),
            ("addition_embed_type", "text_time"),
            ("num_class_embeds", 10),
            ("encoder_hid_dim", 512),
            ("time_cond_proj_dim", 256),
            ("dual_cross_attention", True),
            ("only_cross_attention", True),
            ("only_cross_attention", [False, True, False, False]),
            ("upcast_attention", "yes"),
            ("act_fn", "gelu"),
            ("flip_sin_to_cos", False),
            ("freq_shift", 1),
            ("center_input_sample", True),
            ("mid_block_scale_factor", 2),
            ("mid_block_type", None),
            ("resnet_time_scale_shift", "scale_shift"),
            ("transformer_layers_per_block", [[1, 2], [2, 2], [4, "4"], [4, 4]]),
            ("addition_embed_type", "image"),
            ("reverse_transformer_layers_per_block", [[4], []]),
            ("cross_attention_dim", [768, 768]),
            ("attention_type", "gated"),
            ("conv_in_kernel", 5),
            ("dropout", 0.1),
            ("num_attention_heads", 8),
            ("never_heard_of", "anything"),
            ("odd\nname", 1),
        ],
    )
    def test_unet_settings_that_are_not_the_default(self, key: str, value: Any) -> None:
        refuse(partial(read_config, UNetConfig), {**PUBLISHED_UNET, key: value}, "some/config.json", repr(key)[1:-1])

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("use_quant_conv", False),
            ("use_post_quant_conv", 1),
            ("shift_factor", 0.1159),
            ("latents_mean", [0.0, 0.1]),
            ("act_fn", "relu"),
            ("down_block_types", ["DownEncoderBlock2D"] * 3),
            ("up_block_types", ["AttnUpDecoderBlock2D"] * 4),
            ("force_upcast", "yes"),
        ],
    )
    def test_vae_settings_that_are_not_the_default(self, key: str, value: Any) -> None:
        refuse(partial(read_config, VAEConfig), {**PUBLISHED_VAE, key: value}, "some/config.json", key)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("trained_betas", [0.1, 0.2]), ("shift", 3.0), ("flow_shift", 3.0), ("use_flow_sigmas", True)),
            *(("sigma_max", 120), ("sigma_min", 0.002), ("sigma_data", 1.0), ("sigma_schedule", "karras")),
            *(("timestep_type", "continuous"), ("snr_shift_scale", 3.0), ("variance_type", "learned_range")),
            *(("use_dynamic_shifting", True), ("rescale_betas_zero_snr", "yes"), ("never_heard_of", 1), ("eta", 0.5)),
            *(("_class_name", 3), ("_class_name", []), ("_class_name", "FlowMatchEulerDiscreteScheduler")),
            *(("_class_name", name) for name in ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "MyScheduler")),
        ],
    )
    def test_schedules_that_are_not_implemented(self, key: str, value: Any) -> None:
        named = short(value) if key == "_class_name" else key
        refuse(partial(read_config, ScheduleConfig), {**PUBLISHED_SCHEDULE, key: value}, "some/config.json", named)

    @pytest.mark.parametrize("missing", ["beta_start", "beta_end", "beta_schedule"])
    def test_betas_that_are_missing_are_not_guessed(self, missing: str) -> None:
        without = {key: value for key, value in PUBLISHED_SCHEDULE.items() if key != missing}
        for config in (without, without | {missing: None}):
            refuse(partial(read_config, ScheduleConfig), config, "some/config.json", f"{missing} is missing")

    @pytest.mark.parametrize(
        ("read", "base", "key", "value"),
        [
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "in_channels", "4"),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "in_channels", 4.0),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "in_channels", True),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "in_channels", 10**30),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "in_channels", 0),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "layers_per_block", [2, 2, 2, 2]),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "block_out_channels", 320),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "block_out_channels", []),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "block_out_channels", [320, "640"]),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "block_out_channels", [-320] * 4),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "block_out_channels", [320, 640]),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "attention_head_dim", [8, 8]),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "attention_head_dim", 0),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "attention_head_dim", 7),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "norm_num_groups", 33),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "transformer_layers_per_block", [1, 2, 10]),
            *(
                (partial(read_config, UNetConfig), PUBLISHED_UNET, key, value)
                for key, value in (
                    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
                    ("transformer_layers_per_block", [[1, 2], [2, 2], [4, 4], [4, 4]]),
                    ("transformer_layers_per_block", [0, 1, 1, 1]),
                    ("reverse_transformer_layers_per_block", [[4], [3]]),
                    ("reverse_transformer_layers_per_block", [1, [1, 2], [1, 2, 3], 1]),
                )
            ),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "addition_time_embed_dim", 256),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "projection_class_embeddings_input_dim", 2816),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "norm_eps", "small"),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "norm_eps", float("nan")),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "norm_eps", 10**400),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "norm_eps", -1.0),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "use_linear_projection", "no"),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "down_block_types", "DownBlock2D"),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "down_block_types", ["AttnDownBlock2D"] * 4),
            (partial(read_config, UNetConfig), PUBLISHED_UNET, "_class_name", "UNet2DModel"),
            (partial(read_config, VAEConfig), PUBLISHED_VAE, "scaling_factor", 0),
            (partial(read_config, VAEConfig), PUBLISHED_VAE, "scaling_factor", float("inf")),
            (partial(read_config, VAEConfig), PUBLISHED_VAE, "norm_num_groups", 48),
            (partial(read_config, VAEConfig), PUBLISHED_VAE, "_class_name", "AutoencoderTiny"),
            (partial(read_config, TextConfig), PUBLISHED_TEXT, "hidden_size", None),
            (partial(read_config, TextConfig), PUBLISHED_TEXT, "hidden_size", 770),
            (partial(read_config, TextConfig), PUBLISHED_TEXT, "hidden_act", "relu"),
            (partial(read_config, TextConfig), PUBLISHED_TEXT, "model_type", "t5"),
            (partial(read_config, TextConfig), PUBLISHED_TEXT, "pad_token_id", -1),
            (partial(read_config, ScheduleConfig), PUBLISHED_SCHEDULE, "prediction_type", "sample"),
            (partial(read_config, ScheduleConfig), PUBLISHED_SCHEDULE, "beta_schedule", "squaredcos_cap_v2"),
            (partial(read_config, ScheduleConfig), PUBLISHED_SCHEDULE, "beta_start", 0.5),
            (partial(read_config, ScheduleConfig), PUBLISHED_SCHEDULE, "beta_end", 1.0),
            (partial(read_config, ScheduleConfig), PUBLISHED_SCHEDULE, "steps_offset", 2),
            (partial(read_config, ScheduleConfig), PUBLISHED_SCHEDULE, "num_train_timesteps", 1),
            (partial(read_config, EditDefaults), {}, "num_steps", "fifty"),
            (partial(read_config, EditDefaults), {}, "stepz", 50),
        ],
    )
    def test_wrong_values_by_name(self, read: Read, base: dict[str, Any], key: str, value: Any) -> None:
        with pytest.raises(InputError) as caught:
            read({**base, key: value}, "some/config.json")
        ours = {"attention_head_dim": "heads"}
        assert "\n" not in str(caught.value)
        assert key in str(caught.value) or ours.get(key, key) in str(caught.value)

    @pytest.mark.parametrize("config", [UNetConfig, VAEConfig, TextConfig, ScheduleConfig, EditDefaults])
    @pytest.mark.parametrize("value", [[], [1], "text", 3, None, True])
    def test_a_file_that_holds_no_object(self, config: Any, value: Any) -> None:
        refuse(partial(read_config, config), value, "some/config.json", "JSON object")

    def test_an_odd_first_width(self) -> None:
        odd = {**PUBLISHED_UNET, "block_out_channels": [15, 30, 30, 30], "norm_num_groups": 5, "attention_head_dim": 5}
        refuse(partial(read_config, UNetConfig), odd, "15", "even")


def test_how_another_sampler_steps_is_harmless_and_said_once() -> None:
    """What concerns steps that are not taken here changes nothing; the file's unlike settings make one line."""
    assert unused_settings(PUBLISHED_SCHEDULE) == []
    unlike = {"thresholding": True, "clip_sample": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    alike = {"solver_order": 3, "use_karras_sigmas": True, "lower_order_final": False, "algorithm_type": "deis"}
    told = {**PUBLISHED_SCHEDULE, **unlike, **alike}
    assert read_config(ScheduleConfig, told, "x") == read_config(ScheduleConfig, PUBLISHED_SCHEDULE, "x")
    (line,) = unused_settings(told)
    assert all(f"{key} = {value!r}" in line for key, value in unlike.items()) and "solver_order" not in line


class TestRanges:
    @pytest.mark.parametrize("value", [0.0, 1, 0.5])
    def test_numbers_inside(self, value: float) -> None:
        check_number("eta", value, 0.0, 1.0)
        check_number("eta", None, 0.0, 1.0, optional=True)

    @pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "1", None, True, 10**400])
    def test_numbers_outside(self, value: Any) -> None:
        with pytest.raises(InputError, match=r"eta is .*0 \.\. 1"):
            check_number("eta", value, 0.0, 1.0)

    @pytest.mark.parametrize("value", [0, 501, 1.0, "5", None, True, 10**400])
    def test_whole_numbers_outside(self, value: Any) -> None:
        with pytest.raises(InputError, match=r"num_steps is .*1 \.\. 500"):
            check_whole("num_steps", value, 1, 500)

    def test_whole_numbers_inside(self) -> None:
        check_whole("num_steps", 500, 1, 500)
        check_whole("num_steps", None, 1, 500, optional=True)


def test_reading_a_configuration_does_not_import_torch() -> None:
    """`ledits --help` and header inspection rest on it."""
    code = "import sys, ledits_min.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
