"""Checkpoint names and text-encoder layouts against the code that wrote the world's files: diffusers and transformers.

The LDM names are never checked by a round trip of our own table: one LDM state dict goes through diffusers' conversion
and through ours, and tensors must arrive under the same names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.clip import CLIPTextModel

from ledits_min.config import SD15_TEXT, SD15_UNET, SD15_VAE, UNetConfig, VAEConfig
from ledits_min.files.configs import config_json
from ledits_min.text import build_text_model
from ledits_min.weights.load import Checkpoint, fetch, load_checkpoint
from ledits_min.weights.read.shapes import unet_shapes, vae_shapes
from ledits_min.weights.read.survey import check_complete, survey_file

State = dict[str, Tensor]


def load_ldm(checkpoints: ModuleType, path: Path, unet: UNetConfig, vae: VAEConfig) -> Checkpoint:
    survey = survey_file(path, configs={"unet": unet, "vae": vae, "text": checkpoints.REDUCED_TEXT})
    check_complete(survey)
    return fetch(survey)


def assert_equal(found: State, wanted: State) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("attends", [(True, True, False), (True, True, True, False), (False, True)])
def test_ldm_names_as_diffusers_converts_them(
    checkpoints: ModuleType, tmp_path: Path, attends: tuple[bool, ...], layers: int
) -> None:
    levels = len(attends)
    unet = replace(
        checkpoints.REDUCED_UNET,
        block_out_channels=(16, 32, 32, 32)[:levels],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        num_attention_heads=(2,) * levels,
        layers_per_block=layers,
    )
    vae = replace(checkpoints.REDUCED_VAE, block_out_channels=(8, 16, 16, 16)[:levels], layers_per_block=layers)
    path = tmp_path / "x.safetensors"
    checkpoints.write_ldm(path, unet, vae, ema=True, buffers=True, position_ids=torch.arange(77)[None])
    ours, theirs = load_ldm(checkpoints, path, unet, vae), load_file(path)

    assert_equal(ours.unet, convert_ldm_unet_checkpoint(dict(theirs), config_json(unet)))
    assert_equal(ours.vae, convert_ldm_vae_checkpoint(dict(theirs), config_json(vae)))
    text = convert_ldm_clip_checkpoint(dict(theirs))
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items() if "position_ids" not in name}
    assert_equal(ours.text, text)


def test_a_swapped_tensor_is_noticed(checkpoints: ModuleType, tmp_path: Path) -> None:
    """The comparison above can fail: two equally shaped tensors exchanged in the file arrive exchanged."""
    path = tmp_path / "x.safetensors"
    unet, vae = checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE
    checkpoints.write_ldm(path)
    state = load_file(path)
    wanted = convert_ldm_unet_checkpoint(dict(state), config_json(unet))
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1"
    first, second = f"{block}.to_q.weight", f"{block}.to_k.weight"
    state[first], state[second] = state[second], state[first]
    save_file(state, path)
    with pytest.raises(AssertionError, match="attn1.to_[qk].weight"):
        assert_equal(load_ldm(checkpoints, path, unet, vae).unet, wanted)


def test_full_size_names_and_shapes_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config_json(SD15_UNET))
        vae = AutoencoderKL.from_config(config_json(SD15_VAE))
    assert {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()} == unet_shapes(SD15_UNET)
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == vae_shapes(SD15_VAE)


def test_full_size_ldm_names_as_diffusers_converts_them(checkpoints: ModuleType, layouts: dict[str, Any]) -> None:
    """A published listing, tensors without storage: what diffusers makes of it fits our modules by name and shape."""
    keys = layouts["sd15_ldm_pruned_with_ema"]["keys"]
    state = {name: torch.empty(shape, device="meta") for name, (_, shape) in keys.items()}
    unet = convert_ldm_unet_checkpoint(dict(state), config_json(SD15_UNET))
    vae = convert_ldm_vae_checkpoint(dict(state), config_json(SD15_VAE))
    assert {name: tuple(tensor.shape) for name, tensor in unet.items()} == unet_shapes(SD15_UNET)
    assert {name: tuple(tensor.shape) for name, tensor in vae.items()} == vae_shapes(SD15_VAE)
    listing = checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT)
    assert {name: list(shape) for name, (_, shape) in listing.items()} == {
        name: shape
        for name, (_, shape) in keys.items()
        if name.startswith(("model.diff", "first_", "cond_")) and not name.endswith("position_ids")
    }


@torch.no_grad()
def hidden_states(model: CLIPTextModel) -> Tensor:
    tokens = torch.tensor([[49406, 320, 1125, 539, 320, 2368] + [49407] * 71])
    return torch.as_tensor(model(tokens).last_hidden_state)


@torch.no_grad()
def our_states(checkpoint: Checkpoint) -> Tensor:
    with torch.device("meta"):
        model = build_text_model(checkpoint.text_config)
    model.load_state_dict(checkpoint.text, strict=True, assign=True)
    return hidden_states(model.eval())


@pytest.fixture(scope="module")
def reference(checkpoints: ModuleType) -> tuple[CLIPTextModel, Tensor]:
    """One random model as transformers builds it, and its hidden states; every layout below is written from it."""
    torch.manual_seed(0)
    model = CLIPTextModel._from_config(build_text_model(checkpoints.REDUCED_TEXT).config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, hidden_states(model)


TEXT_LAYOUTS = ["flat", "prefixed", "prefixed+ids", "ldm", "ldm without ids", "ldm ruined ids", "save_pretrained"]


def write_layout(checkpoints: ModuleType, folder: Path, model: CLIPTextModel, layout: str) -> Checkpoint:
    states = checkpoints.random_states()
    states["text"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if layout.startswith("ldm"):
        ids = {"ldm": torch.arange(77)[None], "ldm ruined ids": torch.full((1, 77), 74.9975)}.get(layout)
        checkpoints.write_ldm(folder / "x.safetensors", states=states, position_ids=ids)
        return load_ldm(checkpoints, folder / "x.safetensors", checkpoints.REDUCED_UNET, checkpoints.REDUCED_VAE)
    if layout == "save_pretrained":
        checkpoints.write_folder(folder)
        model.save_pretrained(folder / "text_encoder")
    else:
        checkpoints.write_folder(folder, states=states, text_layout=layout)
    return load_checkpoint(folder)


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_every_text_encoder_layout_gives_the_same_states(
    checkpoints: ModuleType, tmp_path: Path, reference: tuple[CLIPTextModel, Tensor], layout: str
) -> None:
    model, wanted = reference
    assert torch.equal(our_states(write_layout(checkpoints, tmp_path, model, layout)), wanted)


def test_transformers_reads_the_folder_layouts_as_we_do(
    checkpoints: ModuleType, tmp_path: Path, reference: tuple[CLIPTextModel, Tensor]
) -> None:
    model, wanted = reference
    for layout in ("flat", "prefixed", "prefixed+ids"):
        write_layout(checkpoints, tmp_path / layout, model, layout)
        theirs = CLIPTextModel.from_pretrained(tmp_path / layout / "text_encoder", local_files_only=True).eval()
        assert torch.equal(hidden_states(theirs), wanted), layout


@pytest.mark.parametrize("layout", ["flat", "prefixed+ids"])
def test_one_swapped_text_tensor_changes_the_states(
    checkpoints: ModuleType, tmp_path: Path, reference: tuple[CLIPTextModel, Tensor], layout: str
) -> None:
    model, wanted = reference
    write_layout(checkpoints, tmp_path, model, layout)
    path = tmp_path / "text_encoder/model.safetensors"
    state = load_file(path)
    first, second = sorted(
        name for name in state if name.endswith(("0.self_attn.q_proj.weight", "0.self_attn.k_proj.weight"))
    )
    state[first], state[second] = state[second].clone(), state[first].clone()
    save_file(state, path)
    assert not torch.equal(our_states(load_checkpoint(tmp_path)), wanted)


def test_diffusers_reads_our_folders(checkpoints: ModuleType, tmp_path: Path) -> None:
    """The folders the other tests write, and the configs we write into them, are real diffusers folders."""
    states = checkpoints.write_folder(tmp_path, old_vae_names=True)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", local_files_only=True)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae", local_files_only=True)
    assert_equal(dict(unet.state_dict()), states["unet"])
    assert_equal(dict(vae.state_dict()), states["vae"])
    assert json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"] == vae.config.scaling_factor
