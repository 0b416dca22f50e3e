"""Pruned relatives of SDXL against diffusers: fewer transformer layers in each block, no transformer in the middle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ledits_min.config import SDXL_UNET, UNetConfig
from ledits_min.engine.cost import unet_cost
from ledits_min.errors import InputError
from ledits_min.files.configs import config_json, read_config
from ledits_min.unet import UNet
from ledits_min.weights.inspect import inspect
from ledits_min.weights.read.published import SDXL, family_of
from ledits_min.weights.read.shapes import unet_shapes
from ledits_min.weights.read.survey import survey_file

Fill = Callable[[nn.Module, int], nn.Module]
Error = Callable[[Tensor, Tensor], float]

# The depths of segmind's models [2401.02677, section 3], as their unet/config.json lists them.
DEPTHS: dict[str, dict[str, Any]] = {
    "SSD-1B": {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Vega": {
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "by layers": {
        "transformer_layers_per_block": [1, [2, 1], [3, 4]],
        "reverse_transformer_layers_per_block": [[4, 1, 2], [2, 1, 2], 1],
    },
}


def of(base: UNetConfig, name: str) -> tuple[UNetConfig, dict[str, Any]]:
    """(our config, diffusers' own) of a UNet like `base` with these depths."""
    theirs = config_json(base) | DEPTHS[name]
    return read_config(UNetConfig, theirs, "unet/config.json"), theirs


@pytest.mark.parametrize("name", DEPTHS)
def test_names_and_shapes_at_full_size(name: str) -> None:
    ours, theirs = of(SDXL_UNET, name)
    with torch.device("meta"):
        network: Any = UNet2DConditionModel.from_config(theirs)
    assert unet_shapes(ours) == {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert family_of(ours) == SDXL
    assert unet_cost(ours, 64, 64).flop < 0.9 * unet_cost(SDXL_UNET, 64, 64).flop


@pytest.mark.parametrize("name", DEPTHS)
@torch.no_grad()
def test_the_same_answer(checkpoints: ModuleType, name: str, fill: Fill, error: Error) -> None:
    config, theirs = of(checkpoints.REDUCED["SDXL"]["unet"], name)
    with torch.device("meta"):
        ours, network = UNet(config), UNet2DConditionModel.from_config(theirs)
    fill(network, 0)
    ours.load_state_dict(network.state_dict(), strict=True, assign=True)
    generator = torch.Generator().manual_seed(1)
    x_t, context = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 7, 44, generator=generator)
    t, added = torch.tensor([981, 40]), torch.randn(2, 28, generator=generator)
    ids = torch.tensor([[768, 1024, 0, 0, 96, 128]] * 2)
    from ledits_min.unet import sinusoids

    wanted = network(x_t, t, context, added_cond_kwargs={"text_embeds": added, "time_ids": ids}).sample
    assert error(ours(x_t, t, context, torch.cat([added, sinusoids(ids, 8).flatten(1)], dim=1)), wanted) <= 1e-5


@pytest.mark.parametrize("name", DEPTHS)
def test_a_single_file_tells_its_depths_by_names(checkpoints: ModuleType, tmp_path: Path, name: str) -> None:
    """LDM names as diffusers converts them; the config is counted from the file."""
    base = replace(checkpoints.REDUCED["SDXL"]["unet"], transformer_layers_per_block=(1, 2, 10))
    config, theirs = of(base, name)
    state = {
        f"model.diffusion_model.{checkpoints.ldm_unet_name(key, config)}": torch.full(shape, float(index % 7))
        for index, (key, shape) in enumerate(unet_shapes(config).items())
    }
    save_file(state, tmp_path / "x.safetensors")
    survey = survey_file(tmp_path / "x.safetensors", configs={"unet": base})
    assert survey.configs["unet"] == config
    assert any("unet: pruned, its transformers have" in note for note in survey.notes)
    converted = convert_ldm_unet_checkpoint(load_file(tmp_path / "x.safetensors"), theirs)
    assert set(converted) == set(survey.parts["unet"])
    for key, tensor in survey.parts["unet"].items():
        assert torch.equal(converted[key], state[tensor.name]), key


@pytest.mark.parametrize("name", ["SSD-1B", "Vega"])
def test_whole_files_of_full_size_are_inspected(checkpoints: ModuleType, tmp_path: Path, name: str) -> None:
    """One file with all parts loads as it is; one with too few layers is told what to do."""
    config, _ = of(SDXL_UNET, name)
    listing = checkpoints.family_listing("SDXL", {**SDXL.configs, "unet": config})
    checkpoints.write_hollow(tmp_path / "x.safetensors", listing)
    report = inspect(tmp_path / "x.safetensors")
    assert (report.family, report.verdict, report.reason) == ("SDXL", "loads", "")
    assert sum("unet: pruned" in note for note in report.oddities) == 1
    fewer = {key: entry for key, entry in listing.items() if ".input_blocks.5." not in key}
    checkpoints.write_hollow(tmp_path / "x.safetensors", fewer)
    assert (
        "if it was pruned or distilled (like small-sd), pass its diffusers folder"
        in inspect(tmp_path / "x.safetensors").reason
    )


def test_the_published_models_are_not_taken_for_pruned_ones(checkpoints: ModuleType, tmp_path: Path) -> None:
    checkpoints.write_hollow(tmp_path / "x.safetensors", checkpoints.family_listing("SDXL", SDXL.configs))
    survey = survey_file(tmp_path / "x.safetensors")
    assert survey.configs["unet"] == SDXL_UNET and not any("pruned" in note for note in survey.notes)
    with pytest.raises(InputError, match="transformer_layers_per_block"):
        read_config(UNetConfig, config_json(SDXL_UNET) | {"transformer_layers_per_block": [1, [2, 1], 3]}, "x")
