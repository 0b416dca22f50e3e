"""Merged LoRAs against diffusers: its conversion of kohya's names, its naming of peft's, and its own networks.

diffusers would need peft to merge a file itself; its functions that rename are plain, and the sum is written here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.clip import CLIPTextModel

from ledits_min.config import SD15_TEXT, SD15_UNET, SDXL_TEXT_2, SDXL_UNET
from ledits_min.text import build_text_model
from ledits_min.unet import UNet
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.lora import survey_lora
from ledits_min.weights.read.shapes import text_shapes, unet_shapes

State = dict[str, Tensor]
Error = Callable[[Tensor, Tensor], float]
RANK, SCALE = 3, 0.7


def random_lora(shapes: dict[str, tuple[int, ...]], name_of: Callable[[str], str]) -> State:
    """A kohya file that changes every matrix and every convolution."""
    generator = torch.Generator().manual_seed(0)
    result: State = {}
    for name, (outputs, *inputs) in ((n, s) for n, s in shapes.items() if len(s) > 1 and "embeddings." not in n):
        key, ones = name_of(name.removesuffix(".weight")), [1, 1] if len(inputs) == 3 else []
        result[f"{key}.lora_down.weight"] = torch.randn(RANK, *inputs, generator=generator) / inputs[0] ** 0.5
        result[f"{key}.lora_up.weight"] = torch.randn(outputs, RANK, *ones, generator=generator)
        result[f"{key}.alpha"] = torch.tensor(0.5 + len(result) % 3)
    return result


def convert(lora: State, layers_per_block: int = 2) -> tuple[State, dict[str, float]]:
    """diffusers' own renaming to peft's names, and its alphas by layer."""
    lora = _maybe_map_sgm_blocks_to_diffusers(dict(lora), SimpleNamespace(layers_per_block=layers_per_block))
    state, alphas = _convert_non_diffusers_lora_to_diffusers(lora)
    unet = {name.removeprefix("unet."): tensor for name, tensor in state.items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in state.items() if name.startswith("text_encoder")}
    named = {f"unet.{name}": tensor for name, tensor in convert_unet_state_dict_to_peft(unet).items()}
    named |= convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD)
    spelled = convert_unet_state_dict_to_peft({k.removeprefix("unet."): k for k in alphas if k.startswith("unet.")})
    by_layer = {f"unet.{key.removesuffix('.alpha')}": alphas[old] for key, old in spelled.items()}
    for old in (key for key in alphas if key.startswith("text_encoder")):
        key = re.sub(r"\.to_(q|k|v|out)_lora", r".\1_proj", old)
        by_layer[re.sub(r"(\.lora_linear_layer)?(\.down)?\.alpha$", "", key)] = alphas[old]
    return named, by_layer


def apply(module: nn.Module, prefix: str, named: State, alphas: dict[str, float]) -> int:
    """Add scale * alpha / rank * up @ down, in float64, to the layers of a diffusers or transformers module."""
    count = 0
    layers = dict(module.named_modules())
    for name, down in named.items():
        if not name.startswith(prefix) or not name.endswith(".lora_A.weight"):
            continue
        layer, up = name.removesuffix(".lora_A.weight"), named[name.replace("lora_A", "lora_B")].double()
        weight: Any = layers[layer.removeprefix(prefix)].weight
        product = torch.einsum("or,r...->o...", up.flatten(1), down.double())
        alpha = next((value for key, value in alphas.items() if key.startswith(layer)), None)
        assert alpha is not None, layer
        weight.data = (weight.double() + SCALE * alpha / RANK * product.view(weight.shape)).float()
        count += 1
    return count


def kohya(part: str, layer: str) -> str:
    prefix = {"unet": "lora_unet_", "text": "lora_te_text_model_"}[part]
    return prefix + layer.replace(".", "_")


@torch.no_grad()
def test_unet_and_text_encoder_answer_as_diffusers_do(checkpoints: ModuleType, tmp_path: Path, error: Error) -> None:
    """A kohya LoRA on every layer of both: the same weights, and so the same outputs, far from those without it."""
    states = checkpoints.write_folder(tmp_path / "model")
    unet, text = checkpoints.REDUCED_UNET, checkpoints.REDUCED_TEXT
    attention = {n: s for n, s in unet_shapes(unet).items() if "attentions" in n or "time_embedding" in n}
    lora = random_lora(attention, lambda layer: kohya("unet", layer))
    lora |= random_lora(text_shapes(text), lambda layer: kohya("text", layer))
    save_file(lora, tmp_path / "x.safetensors")
    named, alphas = convert(lora)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "model/unet", local_files_only=True)
    their_text = CLIPTextModel.from_pretrained(tmp_path / "model/text_encoder", local_files_only=True).eval()
    x_t, t, context = torch.randn(2, 4, 16, 16), torch.tensor([5, 700]), torch.randn(2, 7, text.hidden_size)
    tokens = torch.tensor([[49406, 320, 1125] + [49407] * 74])
    before, text_before = theirs(x_t, t, context).sample, their_text(tokens).last_hidden_state
    flat = {name.replace("text_encoder.text_model.", "text_encoder."): tensor for name, tensor in named.items()}
    flat_alphas = {name.replace("text_encoder.text_model.", "text_encoder."): value for name, value in alphas.items()}
    changed = apply(theirs, "unet.", named, alphas) + apply(their_text, "text_encoder.", flat, flat_alphas)
    assert 3 * changed == len(lora)

    checkpoint = load_checkpoint(tmp_path / "model", lora=(tmp_path / "x.safetensors", SCALE))
    ours, our_text = UNet(unet), build_text_model(text)
    ours.load_state_dict(checkpoint.unet, strict=True)
    our_text.load_state_dict(checkpoint.text, strict=True)
    assert error(ours(x_t, t, context), theirs(x_t, t, context).sample) < 1e-5
    assert error(our_text(tokens).last_hidden_state, their_text(tokens).last_hidden_state) < 1e-5
    assert error(before, theirs(x_t, t, context).sample) > 0.1
    assert error(text_before, their_text(tokens).last_hidden_state) > 0.1
    assert not torch.equal(checkpoint.unet["conv_norm_out.weight"], states["unet"]["conv_in.bias"])


def found(path: Path, shapes: dict[str, dict[str, tuple[int, ...]]], unet: Any) -> dict[str, str]:
    """Layer as the file spells it -> "part.our layer"."""
    updates = survey_lora(path, 1.0, shapes, unet).updates
    return {
        update.factors["down"].name.partition(".lora_")[0]: f"{part}.{name.removesuffix('.weight')}"
        for part, names in updates.items()
        for name, update in names.items()
    }


def test_every_name_of_a_full_size_sd15_file(checkpoints: ModuleType, layouts: dict[str, Any], tmp_path: Path) -> None:
    """Published kohya listings: each layer lands where diffusers puts it."""
    shapes = {"unet": unet_shapes(SD15_UNET), "text": text_shapes(SD15_TEXT)}
    for listing in ("lora_kohya_sd1_unet_alpha", "lora_kohya_sd1_te_alpha"):
        keys = layouts[listing]["keys"]
        checkpoints.write_hollow(tmp_path / "x.safetensors", keys)
        agree(
            found(tmp_path / "x.safetensors", shapes, SD15_UNET), [key for key in keys if key.endswith("down.weight")]
        )


def test_every_name_of_an_sdxl_file(checkpoints: ModuleType, tmp_path: Path) -> None:
    """kohya spells SDXL's UNet in LDM block numbers; every attention, resnet and resampling layer of the full size."""
    shapes = {"unet": unet_shapes(SDXL_UNET), "text": text_shapes(SD15_TEXT), "text_2": text_shapes(SDXL_TEXT_2)}
    keys: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part, names in shapes.items():
        for name, (outputs, *inputs) in ((n, s) for n, s in names.items() if len(s) > 1 and "embeddings." not in n):
            layer = checkpoints.ldm_unet_name(name, SDXL_UNET) if part == "unet" else name
            if name == "text_projection.weight" or ".resnets." in name and "conv1" not in name:
                continue
            prefix = {"unet": "lora_unet_", "text": "lora_te1_text_model_", "text_2": "lora_te2_text_model_"}[part]
            key = prefix + layer.removesuffix(".weight").replace(".", "_")
            keys[f"{key}.lora_down.weight"] = ("F16", (4, *inputs))
            keys[f"{key}.lora_up.weight"] = ("F16", (outputs, 4, *([1, 1] if len(inputs) == 3 else [])))
    checkpoints.write_hollow(tmp_path / "x.safetensors", keys)
    ours = found(tmp_path / "x.safetensors", shapes, SDXL_UNET)
    assert len(ours) == len(keys) // 2 > 900
    agree(ours, [key for key in keys if key.endswith("down.weight")])


def agree(ours: dict[str, str], downs: list[str]) -> None:
    """diffusers converts each name by itself; what it makes of it is our layer."""
    assert len(ours) == len(downs)
    for key in downs:
        pair = {key: torch.zeros(1), key.replace("lora_down", "lora_up"): torch.zeros(1)}
        (layer, *_), _ = (sorted(part) for part in convert(pair))
        part, _, name = layer.removesuffix(".lora_A.weight").partition(".")
        part = {"unet": "unet", "text_encoder": "text", "text_encoder_2": "text_2"}[part]
        assert ours[key.partition(".")[0]] == f"{part}.{name.removeprefix('text_model.')}", key


def test_the_comparison_can_fail(checkpoints: ModuleType, tmp_path: Path) -> None:
    """A layer renamed by hand is noticed."""
    unet = replace(checkpoints.REDUCED_UNET)
    lora = random_lora({"mid_block.attentions.0.proj_in.weight": (32, 32, 1, 1)}, lambda layer: kohya("unet", layer))
    save_file(lora, tmp_path / "x.safetensors")
    ours = found(tmp_path / "x.safetensors", {"unet": unet_shapes(unet)}, unet)
    downs = [key for key in load_file(tmp_path / "x.safetensors") if key.endswith("down.weight")]
    agree(ours, downs)
    with pytest.raises(AssertionError):
        agree({key: layer.replace("proj_in", "proj_out") for key, layer in ours.items()}, downs)
