"""Random checkpoints of any size in every dialect, written by rules that know nothing of weights/names/ldm.py.

Reached through the `checkpoints` fixture. Names and shapes of our modules come from weights/read/shapes.py, which the
tests hold against the modules themselves; LDM names are computed here by arithmetic on the block numbers, where
weights/names/ldm.py walks along the network with a running counter.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ledits_min.files.configs import config_json
from ledits_min.weights.read.published import Config
from ledits_min.weights.read.shapes import expected_shapes, text_shapes, unet_shapes, vae_shapes

State = dict[str, Tensor]
Listing = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)

REDUCED_UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    num_attention_heads=(2, 4, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
    norm_eps=1e-5,
    use_linear_projection=False,
    sample_size=16,
)
REDUCED_VAE = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(8, 16, 16),
    layers_per_block=2,
    norm_num_groups=4,
    scaling_factor=0.18215,
    mid_block_add_attention=True,
    sample_size=64,
)
REDUCED_TEXT = TextConfig(
    vocab_size=49408,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    bos_token_id=49406,
    eos_token_id=49407,
    pad_token_id=49407,
)

# Every family at a size that a test can run, with all that tells it from the others.
REDUCED_SD2_TEXT = replace(REDUCED_TEXT, hidden_act="gelu", pad_token_id=0)
REDUCED: dict[str, dict[str, Config]] = {
    "SD 1.x": {"unet": REDUCED_UNET, "vae": REDUCED_VAE, "text": REDUCED_TEXT},
    "SD 2.x": {
        "unet": replace(REDUCED_UNET, use_linear_projection=True, upcast_attention=True),
        "vae": REDUCED_VAE,
        "text": REDUCED_SD2_TEXT,
    },
    "SDXL": {
        "unet": replace(
            REDUCED_UNET,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=44,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 1, 2),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=28 + 6 * 8,
        ),
        "vae": replace(REDUCED_VAE, scaling_factor=0.13025),
        "text": REDUCED_TEXT,
        "text_2": replace(REDUCED_SD2_TEXT, hidden_size=20, num_hidden_layers=3, projection_dim=28),
    },
}
# Part -> (folder, stem) in a diffusers folder, and prefix in an LDM file of each family.
_FOLDERS = {
    "unet": ("unet", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "text": ("text_encoder", "model"),
    "text_2": ("text_encoder_2", "model"),
}
_TEXT_PREFIXES = {
    "SD 1.x": {"text": "cond_stage_model.transformer.text_model."},
    "SD 2.x": {"text": "cond_stage_model.model."},
    "SDXL": {"text": "conditioner.embedders.0.transformer.text_model.", "text_2": "conditioner.embedders.1.model."},
}

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_ITEM_BYTES |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8"), 1)
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_BUFFERS = ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "posterior_variance")


def random_states(
    unet: UNetConfig = REDUCED_UNET, vae: VAEConfig = REDUCED_VAE, text: TextConfig = REDUCED_TEXT, seed: int = 0
) -> dict[str, State]:
    """Random weights of a tame size under the names of our modules: {"unet": ..., "vae": ..., "text": ...}.

    The dicts are the caller's own; the tensors are shared, so replace them, never change them in place.
    """
    return {part: dict(state) for part, state in _random_states(unet, vae, text, seed).items()}


@cache
def _random_states(unet: UNetConfig, vae: VAEConfig, text: TextConfig, seed: int) -> dict[str, State]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"unet": unet_shapes(unet), "vae": vae_shapes(vae), "text": text_shapes(text)}
    return {
        part: {name: _random_tensor(name, shape, generator) for name, shape in names.items()}
        for part, names in shapes.items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return values / float(torch.tensor(shape[1:]).prod()) ** 0.5


def write_folder(
    path: Path,
    unet: UNetConfig = REDUCED_UNET,
    vae: VAEConfig = REDUCED_VAE,
    text: TextConfig = REDUCED_TEXT,
    *,
    states: Mapping[str, State] | None = None,
    schedule: ScheduleConfig = SD15_SCHEDULE,
    dtype: torch.dtype = torch.float32,
    old_vae_names: bool = False,
    text_layout: str = "flat",
    variant: str = "",
    seed: int = 0,
) -> dict[str, State]:
    """Write a diffusers folder (no tokenizer: the shipped CLIP vocabulary serves) and return its weights."""
    states = states or random_states(unet, vae, text, seed)
    dotted = f".{variant}" if variant else ""
    files = {
        "unet": (config_json(unet), states["unet"], "diffusion_pytorch_model"),
        "vae": (
            config_json(vae),
            old_vae(states["vae"]) if old_vae_names else states["vae"],
            "diffusion_pytorch_model",
        ),
        "text_encoder": (config_json(text), text_as(states["text"], text_layout), "model"),
    }
    for folder, (config, state, stem) in files.items():
        (path / folder).mkdir(parents=True, exist_ok=True)
        (path / folder / "config.json").write_text(json.dumps(config))
        save(path / folder / f"{stem}{dotted}.safetensors", state, dtype)
    (path / "scheduler").mkdir(exist_ok=True)
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(config_json(schedule)))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return {part: dict(state) for part, state in states.items()}


def write_ldm(
    path: Path,
    unet: UNetConfig = REDUCED_UNET,
    vae: VAEConfig = REDUCED_VAE,
    text: TextConfig = REDUCED_TEXT,
    *,
    states: Mapping[str, State] | None = None,
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    buffers: bool = False,
    position_ids: Tensor | None = None,
    parts: tuple[str, ...] = ("unet", "vae", "text"),
    metadata: dict[str, str] | None = None,
    seed: int = 0,
) -> dict[str, State]:
    """Write an LDM single file and return its weights under the names of our modules."""
    states = states or random_states(unet, vae, text, seed)
    result = ldm_state(states, unet, vae, parts)
    if ema:
        # EMA names lose every dot behind the first.
        for name in [name for name in result if name.startswith("model.diffusion_model.")]:
            result["model_ema." + name.removeprefix("model.").replace(".", "")] = torch.zeros_like(result[name])
    extra: State = {}
    if buffers:
        extra |= {name: torch.linspace(0.1, 0.9, 1000) for name in _BUFFERS}
        extra |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    if position_ids is not None:
        extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = position_ids
    save_file({name: t.to(dtype).contiguous() for name, t in result.items()} | extra, path, metadata)
    return {part: dict(state) for part, state in states.items()}


def ldm_state(
    states: Mapping[str, State], unet: UNetConfig, vae: VAEConfig, parts: tuple[str, ...] = ("unet", "vae", "text")
) -> State:
    """Our state dicts under LDM names; the VAE's attention becomes 1x1 convolutions as in those files."""
    result: State = {}
    if "unet" in parts:
        result |= {f"model.diffusion_model.{ldm_unet_name(name, unet)}": t for name, t in states["unet"].items()}
    if "vae" in parts:
        for name, t in states["vae"].items():
            as_conv = "attentions" in name and t.dim() == 2
            result[f"first_stage_model.{ldm_vae_name(name, vae)}"] = t[:, :, None, None] if as_conv else t
    if "text" in parts:
        result |= {f"cond_stage_model.transformer.text_model.{name}": t for name, t in states["text"].items()}
    return result


def family_states(family: str, seed: int = 0) -> dict[str, State]:
    """Random weights of a reduced family, part by part."""
    generator = torch.Generator().manual_seed(seed)
    return {
        part: {name: _random_tensor(name, shape, generator) for name, shape in expected_shapes(config).items()}
        for part, config in REDUCED[family].items()
    }


def write_family_folder(
    path: Path, family: str, schedule: ScheduleConfig = SD15_SCHEDULE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, State]:
    """A diffusers folder of a reduced family, its text encoders as transformers names them there."""
    states = family_states(family, seed)
    for part, config in REDUCED[family].items():
        folder, stem = _FOLDERS[part]
        (path / folder).mkdir(parents=True)
        (path / folder / "config.json").write_text(json.dumps(config_json(config)))
        state = text_as(states[part], "projecting" if part == "text_2" else "flat") if "text" in part else states[part]
        save(path / folder / f"{stem}.safetensors", state, dtype)
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(config_json(schedule)))
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    (path / "model_index.json").write_text(json.dumps(index if family == "SDXL" else {}))
    return states


def write_family_ldm(
    path: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    seed: int = 0,
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, State]:
    """A single file of a reduced family, its OpenCLIP text encoder as OpenCLIP names it."""
    states = family_states(family, seed)
    result = family_ldm_state(family, REDUCED[family], states) | dict(extra or {})
    save_file({name: t.to(dtype).contiguous() for name, t in result.items()}, path, metadata)
    return states


def family_ldm_state(family: str, configs: Mapping[str, Config], states: Mapping[str, State]) -> State:
    """All parts of a family under the names of a single file."""
    unet, vae = configs["unet"], configs["vae"]
    assert isinstance(unet, UNetConfig) and isinstance(vae, VAEConfig)
    result = ldm_state(states, unet, vae, ("unet", "vae"))
    for part, prefix in _TEXT_PREFIXES[family].items():
        state = states[part] if prefix.endswith("text_model.") else openclip_state(states[part])
        result |= {f"{prefix}{name}": tensor for name, tensor in state.items()}
    return result


def family_listing(family: str, configs: Mapping[str, Config], dtype: str = "F16") -> Listing:
    """Names, dtypes and shapes of a family's single file, by rule; nothing is stored."""
    states = {
        part: {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(config).items()}
        for part, config in configs.items()
    }
    state = family_ldm_state(family, configs, states)
    return {name: (dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def openclip_state(state: State) -> State:
    """A text model under OpenCLIP's names: q, k and v in one, and what nobody reads, such as SD 2's last layer."""
    result: State = {"logit_scale": torch.full_like(state["final_layer_norm.bias"][0], 4.6)}
    for name, tensor in state.items():
        if (match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)) is not None:
            joint = [state[name.replace("q_proj", projection)] for projection in ("q_proj", "k_proj", "v_proj")]
            result[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(joint)
        elif ".k_proj." not in name and ".v_proj." not in name:
            result[openclip_name(name)] = tensor.T if name == "text_projection.weight" else tensor
    if "text_projection.weight" not in state:
        bias = state["final_layer_norm.bias"]
        last = max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
        behind = {n: t for n, t in result.items() if n.startswith(f"transformer.resblocks.{last}.")}
        result |= {n.replace(f".{last}.", f".{last + 1}.", 1): torch.full_like(t, 9.0) for n, t in behind.items()}
        result["text_projection"] = bias.new_full((len(bias), len(bias)), 9.0)
    return result


def openclip_name(name: str) -> str:
    """transformers' name of a text model's tensor -> OpenCLIP's; not for q, k and v, which are one there."""
    name = re.sub(r"^embeddings\.token_embedding", "token_embedding", name)
    name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
    name = name.replace("text_projection.weight", "text_projection").replace("final_layer_norm", "ln_final")
    name = name.replace("encoder.layers.", "transformer.resblocks.").replace(".self_attn.", ".attn.")
    for ours, theirs in (("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
        name = name.replace(f".{ours}", f".{theirs}")
    return name


def ldm_unet_name(name: str, config: UNetConfig) -> str:
    """Our UNet name -> LDM name, from the level and the layer by arithmetic."""
    layers = config.layers_per_block
    name = re.sub(r"^time_embedding\.linear_([12])", lambda m: f"time_embed.{2 * int(m[1]) - 2}", name)
    name = re.sub(r"^conv_in\.", "input_blocks.0.0.", name)
    name = re.sub(r"^conv_norm_out\.", "out.0.", name)
    name = re.sub(r"^conv_out\.", "out.2.", name)
    name = re.sub(r"^add_embedding\.linear_([12])", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}", name)

    def down(match: re.Match[str]) -> str:
        level, kind, layer = int(match[1]), match[2], int(match[3])
        number = 1 + level * (layers + 1) + layer
        return f"input_blocks.{number}.{int(kind == 'attentions')}."

    def up(match: re.Match[str]) -> str:
        level, kind, layer = int(match[1]), match[2], int(match[3])
        return f"output_blocks.{level * (layers + 1) + layer}.{int(kind == 'attentions')}."

    def upsampler(match: re.Match[str]) -> str:
        level = int(match[1])
        place = 2 if config.up_block_types[level].startswith("CrossAttn") else 1
        return f"output_blocks.{level * (layers + 1) + layers}.{place}.conv."

    is_resnet = ".resnets." in name
    name = re.sub(r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", down, name)
    name = re.sub(
        r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.",
        lambda m: f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op.",
        name,
    )
    name = re.sub(r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", up, name)
    name = re.sub(r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.", upsampler, name)
    name = re.sub(r"^mid_block\.resnets\.([01])\.", lambda m: f"middle_block.{2 * int(m[1])}.", name)
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    if is_resnet:
        for ours, theirs in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ):
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def ldm_vae_name(name: str, config: VAEConfig) -> str:
    """Our VAE name -> LDM name; the LDM decoder counts its levels from the image side."""
    top = len(config.block_out_channels) - 1
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{top - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{top - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def old_vae(state: State) -> State:
    """The attention names that diffusers wrote before 0.13."""
    result = {}
    for name, tensor in state.items():
        for new, old in _OLD_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.") if ".attentions." in name else name
        result[name] = tensor
    return result


def text_as(state: State, layout: str) -> State:
    """The text model as "flat" (transformers >= 5.6), "prefixed", or "prefixed+ids" (the oldest) files spell it.

    "projecting" is prefixed but for the projection.
    """
    if layout == "flat":
        return dict(state)
    if layout == "projecting":
        return {name if name.startswith("text_proj") else f"text_model.{name}": t for name, t in state.items()}
    result = {f"text_model.{name}": tensor for name, tensor in state.items()}
    if layout == "prefixed+ids":
        length = state["embeddings.position_embedding.weight"].shape[0]
        result["text_model.embeddings.position_ids"] = torch.arange(length)[None]
    return result


def save(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Write the floats of a state dict in one dtype, integers as they are."""
    save_file({n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in state.items()}, path)


def ldm_listing(unet: UNetConfig, vae: VAEConfig, text: TextConfig, dtype: str = "F16") -> Listing:
    """Names, dtypes and shapes of an LDM file, by rule; no tensor is made."""
    result: Listing = {}
    for name, shape in unet_shapes(unet).items():
        result[f"model.diffusion_model.{ldm_unet_name(name, unet)}"] = (dtype, shape)
    for name, shape in vae_shapes(vae).items():
        as_conv = "attentions" in name and len(shape) == 2
        result[f"first_stage_model.{ldm_vae_name(name, vae)}"] = (dtype, (*shape, 1, 1) if as_conv else shape)
    for name, shape in text_shapes(text).items():
        result[f"cond_stage_model.transformer.text_model.{name}"] = (dtype, shape)
    return result


def header_bytes(
    listing: Mapping[str, Any], metadata: dict[str, str] | None = None, padding: int = 0
) -> tuple[bytes, int]:
    """(length and JSON of a safetensors file with these tensors in order, bytes of data that must follow)."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (dtype, shape) in listing.items():
        length = _ITEM_BYTES[dtype]
        for size in shape:
            length *= size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    body = json.dumps(entries).encode() + b" " * padding
    return struct.pack("<Q", len(body)) + body, position


def write_hollow(path: Path, listing: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """A file of full size whose zeros take no room on disk: enough for everything that reads headers."""
    start, length = header_bytes(listing, metadata)
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(len(start) + length)
