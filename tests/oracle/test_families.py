"""SD 2.x and SDXL against diffusers and transformers: UNets, text encoders, names in every dialect, at both sizes.

The VAE is one network in all families: see test_vae.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip import CLIPTextModel

from ledits_min.config import SDXL_UNET, TextConfig, UNetConfig, VAEConfig
from ledits_min.engine.fast_networks import FastAttention
from ledits_min.files.configs import config_json
from ledits_min.pipeline import LEdits
from ledits_min.text import TextEncoderPair, build_text_model
from ledits_min.unet import Attention, UNet, sinusoids
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary
from ledits_min.weights.load import Checkpoint, fetch, load_checkpoint
from ledits_min.weights.read.published import SD15, SD20, SDXL, Family
from ledits_min.weights.read.shapes import expected_shapes, text_shapes, unet_shapes, vae_shapes
from ledits_min.weights.read.survey import check_complete, survey_file
from ledits_min.weights.tokenizer import load_tokenizer

Fill = Callable[[nn.Module, int], nn.Module]
Error = Callable[[Tensor, Tensor], float]
State = dict[str, Tensor]

CPU = torch.device("cpu")
FAMILIES = ("SD 2.x", "SDXL")
PROMPTS = ("a photo of a cat!", "", "portrait, sunglasses " * 30)


def load_reduced(checkpoints: ModuleType, folder: Path, family: str, dialect: str, **options: Any) -> Checkpoint:
    """A reduced family, written in one dialect and read back."""
    if dialect == "folder":
        checkpoints.write_family_folder(folder / "model", family, **options)
        return load_checkpoint(folder / "model")
    checkpoints.write_family_ldm(folder / "x.safetensors", family, **options)
    survey = survey_file(folder / "x.safetensors", configs=checkpoints.REDUCED[family])
    check_complete(survey)
    return fetch(survey)


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and torch.equal(found[name], tensor), name


# --- the UNet -------------------------------------------------------------------------------------------------------


def twins(config: UNetConfig, fill: Fill) -> tuple[UNet, UNet2DConditionModel]:
    """Both networks on the same tensors; each must take the other's state dict whole."""
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel.from_config(config_json(config))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    fill(theirs, 0)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval().requires_grad_(False), theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_gives_the_same_answer(checkpoints: ModuleType, family: str, fill: Fill, error: Error) -> None:
    config = checkpoints.REDUCED[family]["unet"]
    ours, theirs = twins(config, fill)
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 4, 9, 12, generator=generator)
    context = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
    t = torch.tensor([981, 40])
    if family == "SD 2.x":
        assert error(ours(x_t, t, context), theirs(x_t, t, context).sample) <= 1e-5
        return
    pooled = torch.randn(2, 28, generator=generator)
    sizes = torch.tensor([[768, 1024, 0, 0, 96, 128], [640, 480, 16, 8, 96, 128]])

    def found(sizes: Tensor, pooled: Tensor) -> Tensor:
        result: Tensor = ours(x_t, t, context, torch.cat([pooled, sinusoids(sizes, 8).flatten(1)], dim=1))
        return result

    told = {"text_embeds": pooled, "time_ids": sizes}
    wanted = theirs(x_t, t, context, added_cond_kwargs=told).sample
    assert error(found(sizes, pooled), wanted) <= 1e-5
    # The comparison would be empty if sizes and pooled text had no part in it.
    assert error(found(sizes // 2, pooled), wanted) > 1e-3
    assert error(found(sizes, pooled.flip(0)), wanted) > 1e-3


@pytest.mark.parametrize("upcast", [True, False])
def test_attention_is_float32_where_the_config_asks(upcast: bool) -> None:
    attention, fast = (kind(8, 8, heads=2, upcast=upcast).half() for kind in (Attention, FastAttention))
    assert isinstance(fast, FastAttention)
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend([q.dtype, k.dtype, v.dtype])
        return F.scaled_dot_product_attention(q, k, v)

    tokens = torch.randn(1, 6, 8).half()
    with torch.no_grad():
        assert attention(tokens, tokens, attend).dtype == torch.float16
        assert fast.add_to(tokens, tokens, fast.project(tokens), attend).dtype == torch.float16
    assert seen == [torch.float32 if upcast else torch.float16] * 6


# --- names ----------------------------------------------------------------------------------------------------------


READ_AS = {torch.float64: torch.float32, torch.float8_e4m3fn: torch.float16, torch.float8_e5m2: torch.float16}


@pytest.mark.parametrize("family", ["SD 1.x", *FAMILIES])
@pytest.mark.parametrize("dialect", ["folder", "ldm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, *READ_AS], ids=str)
def test_every_dialect_and_dtype_is_read_whole(
    checkpoints: ModuleType, tmp_path: Path, family: str, dialect: str, dtype: torch.dtype
) -> None:
    """Every value of every part; what no layer computes in is cast to what holds it, and that is said."""
    found = load_reduced(checkpoints, tmp_path, family, dialect, dtype=dtype)
    wanted = checkpoints.family_states(family)
    assert (found.text_2_config is None) == (family != "SDXL")
    kind = READ_AS.get(dtype, dtype)
    for part, state in wanted.items():
        assert_equal(getattr(found, part), {name: tensor.to(dtype).to(kind) for name, tensor in state.items()})
    assert sum("are cast to" in note for note in found.notes) == (len(wanted) if dtype in READ_AS else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_files_as_diffusers_converts_them(checkpoints: ModuleType, tmp_path: Path, family: str) -> None:
    ours = load_reduced(checkpoints, tmp_path, family, "ldm")
    configs = checkpoints.REDUCED[family]
    theirs = checkpoints.family_ldm_state(family, configs, checkpoints.family_states(family))
    # diffusers knows SD 2's unread layer by its number 23, ours here is number 2.
    theirs = {name: tensor for name, tensor in theirs.items() if "model.model.transformer.resblocks.2." not in name}
    assert_equal(ours.unet, convert_ldm_unet_checkpoint(dict(theirs), config_json(configs["unet"])))
    assert_equal(ours.vae, convert_ldm_vae_checkpoint(dict(theirs), config_json(configs["vae"])))
    part, prefix = (
        ("text_2", "conditioner.embedders.1.model.") if family == "SDXL" else ("text", "cond_stage_model.model.")
    )
    wanted = convert_open_clip_checkpoint(build_text_model(configs[part]), theirs, prefix)
    wanted = {name.removeprefix("text_model."): tensor for name, tensor in wanted.items()}
    assert_equal(getattr(ours, "text_2" if family == "SDXL" else "text"), wanted)


@pytest.mark.parametrize("family", [SD20, SDXL], ids=lambda family: family.name)
def test_full_size_names_and_shapes_are_those_of_diffusers_and_transformers(family: Family) -> None:
    for part, config in family.configs.items():
        with torch.device("meta"):
            theirs: nn.Module
            if isinstance(config, UNetConfig):
                theirs = UNet2DConditionModel.from_config(config_json(config))
            elif isinstance(config, VAEConfig):
                theirs = AutoencoderKL.from_config(config_json(config))
            else:
                kind: Any = CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel
                theirs = kind._from_config(build_text_model(config).config)
        found = {name.removeprefix("text_model."): tuple(t.shape) for name, t in theirs.state_dict().items()}
        assert found == expected_shapes(config), part


def test_full_size_listings_of_published_files(checkpoints: ModuleType, layouts: dict[str, Any]) -> None:
    """Folders hold our very shapes; single files, whose names we write by rule, have the published names and shapes."""

    def listing(name: str) -> dict[str, tuple[int, ...]]:
        keys = layouts[name]["keys"].items()
        return {key: tuple(shape) for key, (_, shape) in keys if not key.endswith("position_ids")}

    def flat(name: str) -> dict[str, tuple[int, ...]]:
        return {key.removeprefix("text_model."): shape for key, shape in listing(name).items()}

    sd2, xl = SD20.configs, SDXL.configs
    assert listing("sd21_diffusers_unet_f32") == expected_shapes(sd2["unet"])
    assert listing("sdxl_diffusers_unet_f16") == expected_shapes(xl["unet"])
    assert listing("sdxl_diffusers_vae_new_f32") == expected_shapes(xl["vae"])
    assert flat("sd21_hf_text_encoder_f32_pid") == expected_shapes(sd2["text"])
    assert flat("sdxl_hf_text_encoder_f32_nopid") == expected_shapes(xl["text"])
    assert flat("sdxl_hf_text_encoder_2_f16") == expected_shapes(xl["text_2"])
    for name, family in (("sd21_ldm_ema_pruned", SD20), ("sdxl_base_1_0_sgm", SDXL)):
        found = {key: shape for key, shape in listing(name).items() if "." in key and not key.startswith("model_ema")}
        ours = checkpoints.family_listing(family.name, family.configs)
        wanted = {key: shape for key, (_, shape) in ours.items()}
        # OpenCLIP-H pools to as many numbers as it is wide, and its file may leave that out.
        assert {key: found.get(key, shape) for key, shape in wanted.items()} == wanted
        assert set(found) <= set(wanted)


# --- text -----------------------------------------------------------------------------------------------------------


def their_text_model(config: TextConfig, state: State) -> Any:
    """transformers' own class, through its own file of the published layout."""
    kind: Any = CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel
    model = kind._from_config(build_text_model(config).config)
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    named = {
        name if name.startswith("text_projection") else f"{prefix}{name}": tensor for name, tensor in state.items()
    }
    model.load_state_dict(named, strict=True)
    return model.eval().requires_grad_(False)


def their_tokenizer(pad: str) -> CLIPTokenizer:
    merges: Any = list(clip_merges())
    return CLIPTokenizer(vocab=clip_vocabulary(), merges=merges, model_max_length=77, pad_token=pad)  # type: ignore[arg-type]


def loaded(checkpoint: Checkpoint) -> LEdits:
    return LEdits.from_checkpoint(checkpoint, CPU, torch.float32)


@pytest.mark.parametrize("dialect", ["folder", "ldm"])
def test_text_of_sd2(checkpoints: ModuleType, tmp_path: Path, dialect: str) -> None:
    ledits = loaded(load_reduced(checkpoints, tmp_path, "SD 2.x", dialect))
    config = checkpoints.REDUCED["SD 2.x"]["text"]
    theirs = their_text_model(config, checkpoints.family_states("SD 2.x")["text"])
    for prompt in PROMPTS:
        tokens = their_tokenizer("!")(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert prompt or tokens[0, 2:].eq(0).all()
        with pytest.warns(UserWarning, match="dropped") if len(prompt) > 100 else _quiet():
            found = ledits.text.encode([prompt])
        assert torch.equal(found.tokens, theirs(tokens).last_hidden_state) and found.added is None


class _quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("dialect", ["folder", "ldm"])
@pytest.mark.parametrize("zeros", [True, False])
def test_text_of_sdxl_is_what_diffusers_pipeline_makes_of_it(
    checkpoints: ModuleType, tmp_path: Path, dialect: str, zeros: bool
) -> None:
    states, configs = checkpoints.family_states("SDXL"), checkpoints.REDUCED["SDXL"]
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(config_json(configs["unet"])), None
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=their_text_model(configs["text"], states["text"]),
        text_encoder_2=their_text_model(configs["text_2"], states["text_2"]),
        tokenizer=their_tokenizer("<|endoftext|>"),
        tokenizer_2=their_tokenizer("!"),
        unet=unet,
        scheduler=DDIMScheduler(),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    checkpoint = load_reduced(checkpoints, tmp_path, "SDXL", dialect)
    ledits = loaded(checkpoint)
    assert isinstance(ledits.text, TextEncoderPair) and ledits.text.zeros_for_empty
    ledits.text.zeros_for_empty = zeros
    for prompt in ("a photo of a cat!", "sunglasses"):
        tokens, nothing, pooled, nothing_pooled = pipeline.encode_prompt(prompt, negative_prompt=None, device=CPU)
        ours, empty = ledits.text.encode([prompt]), ledits.text.encode([""])
        for found, wanted in ((ours, (tokens, pooled)), (empty, (nothing, nothing_pooled))):
            assert found.added is not None
            torch.testing.assert_close(found.tokens, wanted[0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(found.added, wanted[1], atol=1e-6, rtol=1e-5)
        assert bool(empty.tokens.any()) != zeros


def test_padding_of_a_folders_own_tokenizer_wins(checkpoints: ModuleType, tmp_path: Path) -> None:
    """Shipped words: pad 49407 for OpenAI's CLIP, 0 for OpenCLIP. A folder that says otherwise is believed."""
    sd2, sd1 = checkpoints.REDUCED["SD 2.x"]["text"], checkpoints.REDUCED_TEXT
    assert load_tokenizer(None, sd1).pad_token_id == 49407
    assert load_tokenizer(None, sd2).pad_token_id == 0
    (tmp_path / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_merges())]))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert load_tokenizer(tmp_path, sd1).pad_token_id == 0


def test_what_the_shapes_promise_is_what_the_modules_have() -> None:
    for family in (SD15, SD20, SDXL):
        for config in family.configs.values():
            with torch.device("meta"):
                module: nn.Module
                if isinstance(config, UNetConfig):
                    module, shapes = UNet(config), unet_shapes(config)
                elif isinstance(config, TextConfig):
                    module, shapes = build_text_model(config), text_shapes(config)
                else:
                    continue
            assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == shapes
    assert sum(torch.Size(shape).numel() for shape in unet_shapes(SDXL_UNET).values()) == 2_567_463_684
    assert len(vae_shapes(SDXL.configs["vae"])) == 248  # type: ignore[arg-type]
