"""Configs as JSON: the only reader and writer of `config.json`, `scheduler_config.json` and `ledits.json`.

What a file says is honoured, known to be harmless, or refused by name. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ledits_min.config import MASKS, SD15_UNET, EditDefaults, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ledits_min.errors import InputError, check_number, check_whole, short
from ledits_min.files.reader import Reader
from ledits_min.files.scheduler import read_schedule, schedule_json

Config = TypeVar("Config")  # one of those in _READERS


def read_config(kind: type[Config], mapping: Mapping[str, Any], source: str) -> Config:
    """The config of a parsed JSON object; `source` names the file in messages. InputError for what is not supported."""
    read, check = _READERS[kind]
    config: Config = read(mapping, source)
    check(config)
    return config


def config_json(config: UNetConfig | VAEConfig | TextConfig | ScheduleConfig) -> dict[str, Any]:
    """The dictionary, in diffusers' or transformers' style, that `read_config` reads back."""
    return _WRITERS[type(config)](config)


def _read_unet(mapping: Mapping[str, Any], source: str) -> UNetConfig:
    """Read a diffusers `unet/config.json`; `source` names the file in messages. Refuses what it cannot honour."""
    read = Reader(mapping, source, "UNet2DConditionModel", _UNET_DEFAULTS)
    widths = read.wholes("block_out_channels", SD15_UNET.block_out_channels)
    heads = read.wholes("attention_head_dim", 8, repeat=len(widths))
    depths = read.depths("transformer_layers_per_block", len(widths), 1)
    upward = read.depths("reverse_transformer_layers_per_block", len(widths), ())
    config = UNetConfig(
        in_channels=read.whole("in_channels", 4),
        out_channels=read.whole("out_channels", 4),
        block_out_channels=widths,
        down_block_types=read.strings("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)),
        up_block_types=read.strings("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
        layers_per_block=read.whole("layers_per_block", 2),
        num_attention_heads=heads,
        cross_attention_dim=read.whole("cross_attention_dim", 1280),
        norm_num_groups=read.whole("norm_num_groups", 32),
        norm_eps=read.number("norm_eps", 1e-5),
        use_linear_projection=read.flag("use_linear_projection", False),
        sample_size=read.whole("sample_size", 64),
        transformer_layers_per_block=() if set(depths) == {1} and len(depths) == len(widths) else depths,
        reverse_transformer_layers_per_block=() if upward == depths[::-1] else upward,
        mid_block_type=read.string("mid_block_type", "UNetMidBlock2DCrossAttn"),
        upcast_attention=read.flag("upcast_attention", False),
        addition_time_embed_dim=read.whole("addition_time_embed_dim", 0),
        projection_class_embeddings_input_dim=read.whole("projection_class_embeddings_input_dim", 0),
    )
    if mapping.get("mid_block_type", "") is None:
        raise InputError(f"{source}: mid_block_type null, a UNet without a middle (BK-SDM-Small), is not supported")
    kind, wanted = read.string("addition_embed_type", ""), "text_time" if config.addition_time_embed_dim else ""
    if kind != wanted:
        raise InputError(
            f"{source}: addition_embed_type {short(kind)} with addition_time_embed_dim "
            f"{config.addition_time_embed_dim} is not supported; 'text_time' with a width, or neither, is"
        )
    read.refuse_the_rest()
    return config


def _check_unet(config: UNetConfig) -> None:
    levels = len(config.block_out_channels)
    depths = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")
    for name in ("down_block_types", "up_block_types", "num_attention_heads", *depths):
        entries = len(getattr(config, name))
        if entries != levels and not (name in depths and entries == 0):
            raise InputError(
                f"unet config: {name} has {entries} entries but block_out_channels has "
                f"{levels}; both must have one entry per level"
            )
    check_whole("unet config: layers_per_block", config.layers_per_block, 1, _MOST_LAYERS)
    _check_depths(config)
    blocks = sum(1 + depth for level in (*config.down_depths, *config.up_depths) for depth in level)
    if blocks > _MOST_BLOCKS:
        raise InputError(
            f"unet config: {levels} levels of {config.layers_per_block} layers with their transformers are "
            f"{blocks} blocks; at most {_MOST_BLOCKS} are believed (Stable Diffusion XL has 77)"
        )
    _check_types("down_block_types", config.down_block_types, ("CrossAttnDownBlock2D", "DownBlock2D"))
    _check_types("up_block_types", config.up_block_types, ("CrossAttnUpBlock2D", "UpBlock2D"))
    _check_types("mid_block_type", (config.mid_block_type,), ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"))
    no_added = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    _check_positive("unet", config, zero_allowed=no_added)
    if len({bool(getattr(config, name)) for name in no_added}) > 1 or config.addition_time_embed_dim % 2:
        raise InputError(
            f"unet config: addition_time_embed_dim {config.addition_time_embed_dim} must be even, and be there "
            "exactly where projection_class_embeddings_input_dim is"
        )
    if config.block_out_channels[0] % 2:
        raise InputError(
            f"unet config: the first width {config.block_out_channels[0]} must be even, since the timestep is "
            "described by pairs of a sine and a cosine"
        )
    for width, heads in zip(config.block_out_channels, config.num_attention_heads, strict=True):
        if width % config.norm_num_groups or width % heads:
            raise InputError(
                f"unet config: width {width} must be a multiple of norm_num_groups {config.norm_num_groups} "
                f"and of its {heads} attention heads"
            )


def _check_depths(config: UNetConfig) -> None:
    """Every transformer has at least one layer, and a list of a level's depths has one for each of its resnets."""
    named = {
        "transformer_layers_per_block": (config.transformer_layers_per_block, config.down_block_types, 0),
        "reverse_transformer_layers_per_block": (config.reverse_transformer_layers_per_block, config.up_block_types, 1),
    }
    for name, (depths, kinds, more) in named.items():
        for depth, kind in zip(depths, kinds, strict=bool(depths)):
            numbers = depth if isinstance(depth, tuple) else (depth,)
            for number in numbers:
                check_whole(f"unet config: {name}", number, int(kind.startswith("CrossAttn")), _MOST_LAYERS)
            if isinstance(depth, tuple) and len(depth) != config.layers_per_block + more:
                raise InputError(
                    f"unet config: {name} lists {len(depth)} depths for a level of {config.layers_per_block + more}"
                )
    lists = any(isinstance(depth, tuple) for depth in config.transformer_layers_per_block)
    if lists and not config.reverse_transformer_layers_per_block:
        raise InputError(
            "unet config: transformer_layers_per_block lists depths layer by layer, so "
            "reverse_transformer_layers_per_block is wanted too"
        )


def _read_vae(mapping: Mapping[str, Any], source: str) -> VAEConfig:
    """Read a diffusers `vae/config.json`; `source` names the file in messages. Refuses what it cannot honour."""
    read = Reader(mapping, source, "AutoencoderKL", _VAE_DEFAULTS)
    widths = read.wholes("block_out_channels", (64,))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if read.strings(key, (kind,)) != (kind,) * len(widths):
            raise InputError(f"{source}: {key} must be {kind!r} at each of the {len(widths)} levels")
    config = VAEConfig(
        in_channels=read.whole("in_channels", 3),
        out_channels=read.whole("out_channels", 3),
        latent_channels=read.whole("latent_channels", 4),
        block_out_channels=widths,
        layers_per_block=read.whole("layers_per_block", 1),
        norm_num_groups=read.whole("norm_num_groups", 32),
        scaling_factor=read.number("scaling_factor", 0.18215),
        mid_block_add_attention=read.flag("mid_block_add_attention", True),
        sample_size=read.whole("sample_size", 32),
        force_upcast=read.flag("force_upcast", True),
    )
    read.refuse_the_rest()
    return config


def _check_vae(config: VAEConfig) -> None:
    _check_positive("vae", config)
    for width in config.block_out_channels:
        if width % config.norm_num_groups:
            raise InputError(
                f"vae config: width {width} must be a multiple of norm_num_groups {config.norm_num_groups}"
            )


def _read_text(mapping: Mapping[str, Any], source: str) -> TextConfig:
    """Read a Hugging Face `text_encoder/config.json`; training-only keys (dropout, initialisers) are ignored."""
    read = Reader(mapping, source, None, {})
    kind = mapping.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise InputError(f"{source}: model_type is {short(kind)}; only a 'clip_text_model' can be the text encoder")
    # Every config names a width of the projection; only some models have one.
    projects = read.strings("architectures", ()) == ("CLIPTextModelWithProjection",)
    return TextConfig(
        vocab_size=read.whole("vocab_size", 49408),
        hidden_size=read.whole("hidden_size", 512),
        intermediate_size=read.whole("intermediate_size", 2048),
        num_hidden_layers=read.whole("num_hidden_layers", 12),
        num_attention_heads=read.whole("num_attention_heads", 8),
        max_position_embeddings=read.whole("max_position_embeddings", 77),
        hidden_act=read.string("hidden_act", "quick_gelu"),
        layer_norm_eps=read.number("layer_norm_eps", 1e-5),
        bos_token_id=read.whole("bos_token_id", 49406),
        eos_token_id=read.whole("eos_token_id", 49407),
        pad_token_id=read.whole("pad_token_id", 1),
        projection_dim=read.whole("projection_dim", 512) if projects else 0,
    )


def _check_text(config: TextConfig) -> None:
    zero_allowed = ("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim")
    _check_positive("text_encoder", config, zero_allowed)
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"text_encoder config: hidden_size {config.hidden_size} must be a multiple of its "
            f"{config.num_attention_heads} attention heads"
        )
    _check_types("hidden_act", (config.hidden_act,), ("quick_gelu", "gelu"))


def _check_schedule(config: ScheduleConfig) -> None:
    _check_types("beta_schedule", (config.beta_schedule,), ("scaled_linear", "linear"))
    _check_types("prediction_type", (config.prediction_type,), ("epsilon", "v_prediction"))
    if not 0.0 < config.beta_start <= config.beta_end < 1.0:
        raise InputError(
            f"scheduler config: beta_start {config.beta_start} and beta_end {config.beta_end} must satisfy "
            "0 < beta_start <= beta_end < 1"
        )
    if not 2 <= config.num_train_timesteps <= 100_000 or config.steps_offset not in (0, 1):
        raise InputError(
            f"scheduler config: num_train_timesteps {config.num_train_timesteps} must lie in 2 .. 100000 and "
            f"steps_offset {config.steps_offset} must be 0 or 1"
        )


def _read_edit_defaults(mapping: Mapping[str, Any], source: str) -> EditDefaults:
    """Read a `ledits.json`; every key is optional, an unknown one is refused."""
    paper, read = EditDefaults(), Reader(mapping, source, None, {})
    unknown = sorted(set(mapping) - {field.name for field in fields(EditDefaults)})
    if unknown:
        known = ", ".join(field.name for field in fields(EditDefaults))
        raise InputError(f"{source}: unknown key {short(unknown[0])}; the keys are {known}")
    return EditDefaults(
        num_steps=read.whole("num_steps", paper.num_steps),
        skip=read.whole("skip", paper.skip),
        guidance_scale=read.number("guidance_scale", paper.guidance_scale),
        source_guidance_scale=read.number("source_guidance_scale", paper.source_guidance_scale),
        concept_guidance_scale=read.number("concept_guidance_scale", paper.concept_guidance_scale),
        threshold=read.number("threshold", paper.threshold),
        warmup_steps=read.whole("warmup_steps", paper.warmup_steps),
        solver_order=read.whole("solver_order", paper.solver_order),
        mask=read.string("mask", paper.mask),
        attention_level=read.whole("attention_level", paper.attention_level),
        attention_places=read.strings("attention_places", paper.attention_places),
        blend_threshold=read.number("blend_threshold", paper.blend_threshold),
        one_size=read.flag("one_size", paper.one_size),
    )


def _check_edit_defaults(config: EditDefaults) -> None:
    check_whole("default num_steps", config.num_steps, 1, 50_000)
    check_whole("default skip", config.skip, 0, config.num_steps - 1)
    check_whole("default warmup_steps", config.warmup_steps, 0, 100_000)
    check_whole("default solver_order", config.solver_order, 1, 2)
    check_whole("default attention_level", config.attention_level, 0, 15)
    if config.mask not in MASKS:
        raise InputError(f"default mask is {short(config.mask)}; the choices are {', '.join(MASKS)}")
    if not config.attention_places or not set(config.attention_places) <= {"down", "up"}:
        places = short(list(config.attention_places))
        raise InputError(f"default attention_places is {places}; down, up or both is wanted")
    for name in ("threshold", "blend_threshold"):
        check_number(f"default {name}", getattr(config, name), 0.0, 1.0)
    for name in ("guidance_scale", "source_guidance_scale", "concept_guidance_scale"):
        check_number(f"default {name}", getattr(config, name), 0.0, 1000.0)


def _unet_json(config: UNetConfig) -> dict[str, Any]:
    """The diffusers-style dictionary that `read_config` reads back."""
    values = _as_json(config)
    values["attention_head_dim"] = values.pop("num_attention_heads")
    if not config.transformer_layers_per_block:
        values["transformer_layers_per_block"] = [1] * len(config.block_out_channels)
    # As the files are that have no such choice, and the fingerprints of their models.
    if not config.reverse_transformer_layers_per_block:
        del values["reverse_transformer_layers_per_block"]
    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        del values["mid_block_type"]
    values["addition_embed_type"] = "text_time" if config.addition_time_embed_dim else None
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        values[name] = values[name] or None
    return {"_class_name": "UNet2DConditionModel", **values}


def _vae_json(config: VAEConfig) -> dict[str, Any]:
    """The diffusers-style dictionary that `read_config` reads back."""
    levels = len(config.block_out_channels)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"_class_name": "AutoencoderKL", **_as_json(config), **kinds}


def _text_json(config: TextConfig) -> dict[str, Any]:
    """The Hugging-Face-style dictionary that `read_config` reads back."""
    values, kind = _as_json(config), "CLIPTextModel"
    if config.projection_dim:
        kind = "CLIPTextModelWithProjection"
    else:
        del values["projection_dim"]
    return {"architectures": [kind], "model_type": "clip_text_model", **values}


def _as_json(config: Any) -> dict[str, Any]:
    """The fields of a config, tuples as lists."""
    return json.loads(json.dumps(asdict(config)))  # type: ignore[no-any-return]


def _check_types(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise InputError(f"config: {name} {short(value)} is not supported; the choices are {', '.join(known)}")


_MOST_LAYERS = 256  # names and shapes are listed before a weight is looked at: a config must not promise millions
_MOST_BLOCKS = 4096  # nor by their product
_LAYERS = ("layers_per_block", "num_hidden_layers")


def _check_positive(part: str, config: Any, zero_allowed: tuple[str, ...] = ()) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _LAYERS:
            check_whole(f"{part} config: {field.name}", value, 1, _MOST_LAYERS)
        least = 0 if field.name in zero_allowed else 1
        if (type(value) is int and not least <= value <= 2**20) or (type(value) is float and not value > 0.0):
            raise InputError(f"{part} config: {field.name} = {value} is out of range; a positive number is wanted")


# What diffusers' UNet2DConditionModel means when a key is left out. A config may repeat these values, nothing else.
_UNET_DEFAULTS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "attention_type": "default",
}
_VAE_DEFAULTS: dict[str, Any] = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}

_READERS: dict[type, tuple[Callable[..., Any], Callable[..., None]]] = {
    UNetConfig: (_read_unet, _check_unet),
    VAEConfig: (_read_vae, _check_vae),
    TextConfig: (_read_text, _check_text),
    ScheduleConfig: (read_schedule, _check_schedule),
    EditDefaults: (_read_edit_defaults, _check_edit_defaults),
}
_WRITERS: dict[type, Callable[..., dict[str, Any]]] = {
    UNetConfig: _unet_json,
    VAEConfig: _vae_json,
    TextConfig: _text_json,
    ScheduleConfig: lambda config: schedule_json(config, _as_json(config)),
}
