"""What peft, diffusers and LyCORIS make of a LoRA's relatives: our merged weights are theirs.

The files are written by these libraries, and the numbers compared are what their own layers then compute.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ledits_min.errors import InputError
from ledits_min.weights.load import load_checkpoint

State = dict[str, Tensor]
TARGETS = ["to_q", "to_k", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj"]
BLOCK = "down_blocks.1.attentions.0"


@pytest.fixture
def model(checkpoints: ModuleType, tmp_path: Path) -> Path:
    checkpoints.write_folder(tmp_path / "model")
    return tmp_path / "model"


def their_unet(model: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model / "unet", local_files_only=True).eval()


@torch.no_grad()
def trained(network: nn.Module) -> nn.Module:
    """Every factor and magnitude of its adapters moved away from where training begins."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if "lora_" in name:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return network


@torch.no_grad()
def assert_same_weights(found: State, wanted: State, unchanged: State) -> None:
    """All weights equal, and far enough of them from what they were before."""
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    moved = [name for name, weight in wanted.items() if float((weight - unchanged[name]).abs().max()) > 1e-3]
    assert len(moved) > 10


def merged(network: Any) -> State:
    """peft's own merge, under the names of a network without adapters."""
    weights = network.merge_and_unload() if hasattr(network, "merge_and_unload") else network
    return {name: tensor.detach().clone() for name, tensor in weights.state_dict().items()}


CONFIGS: dict[str, dict[str, Any]] = {
    "one alpha": {"r": 4, "lora_alpha": 6},
    "no alpha said": {"r": 4},
    "ends of names": {
        "r": 4, "lora_alpha": 4, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 9, "attn1.to_q": 1}
    },
    "the first pattern counts": {"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn2.to_k": 1, "to_k": 9, "k": 30}},
    "whole names": {
        "r": 4, "lora_alpha": 4,
        "rank_pattern": {f"^{BLOCK}.transformer_blocks.0.attn1.to_q": 2},
        "alpha_pattern": {f"^{BLOCK}.transformer_blocks.0.attn1.to_q": 2, "^to_k": 30, f"^{BLOCK}.proj_in": 5},
    },
    "expressions": {
        "r": 4, "lora_alpha": 4,
        "alpha_pattern": {r"down_blocks\.\d+\..*to_q": 7, "(attn1|attn2).to_k": 2, "ff.net.[02].proj": 3, "conv.": 5},
    },
    "roots": {"r": 4, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"to_q": 9}},
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "DoRA of two ranks": {
        "r": 4, "lora_alpha": 4, "use_dora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv1": 9}
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("writer", "name"),
    [
        *(("peft", name) for name in CONFIGS),
        *(("diffusers", name) for name in ("whole names", "roots", "DoRA of two ranks")),
        *(("peft, named", "DoRA"), ("diffusers, one network", "ends of names")),
    ],
)
def test_pefts_own_merge(model: Path, tmp_path: Path, writer: str, name: str) -> None:
    """Ranks and alphas by pattern, rsLoRA and DoRA, as peft and diffusers save them."""
    config = LoraConfig(target_modules=TARGETS, init_lora_weights="gaussian", **CONFIGS[name])
    theirs, plain, out = their_unet(model), merged(their_unet(model)), tmp_path / "lora"
    if writer.startswith("peft"):
        network: Any = trained(get_peft_model(theirs, config))
        network.save_pretrained(out)
        file = out / "adapter_model.safetensors"
        if "named" in writer:  # as the state dict of a running model spells it
            state = {n: t.clone() for n, t in network.state_dict().items() if "lora_" in n}
            assert any(".lora_A.default.weight" in name for name in state)
            save_file(state, file)
    else:
        theirs.add_adapter(config)
        trained(theirs)
        if "one" in writer:
            theirs.save_lora_adapter(out)
        else:
            StableDiffusionPipeline.save_lora_weights(
                out, unet_lora_layers=get_peft_model_state_dict(theirs), **_collate_lora_metadata({"unet": theirs})
            )
        file, network = out / "pytorch_lora_weights.safetensors", theirs
        assert "lora_adapter_metadata" in metadata_of(file)
        network.fuse_lora()
        network.unload_lora()
    assert_same_weights(load_checkpoint(model, lora=file).unet, merged(network), plain)


def metadata_of(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def test_two_ranks_that_diffusers_loaded_and_saved(model: Path, tmp_path: Path) -> None:
    """A file without alphas has scale 1 everywhere. Saved again, it says so by alpha_pattern, ^ before each name."""
    theirs, plain = their_unet(model), merged(their_unet(model))
    generator = torch.Generator().manual_seed(0)
    lora: State = {}
    for index, (name, weight) in enumerate(plain.items()):
        if name.endswith(("to_q.weight", "to_k.weight")):
            rank, layer = 2 + 4 * (index % 2), name.removesuffix(".weight")
            lora[f"{layer}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            lora[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    theirs.load_lora_adapter(dict(lora), prefix=None, adapter_name="default")
    theirs.save_lora_adapter(tmp_path / "lora")
    file = tmp_path / "lora/pytorch_lora_weights.safetensors"
    settings = json.loads(metadata_of(file)["lora_adapter_metadata"])
    assert settings["rank_pattern"] and all(pattern.startswith("^") for pattern in settings["rank_pattern"])
    theirs.fuse_lora()
    theirs.unload_lora()
    assert_same_weights(load_checkpoint(model, lora=file).unet, merged(theirs), plain)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_factors_of_another_base_are_refused(model: Path, tmp_path: Path, start: str) -> None:
    """peft changes the base weights when training begins: plainly added, its factors would make another model."""
    config = LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=start)
    network: Any = get_peft_model(their_unet(model), config)
    network.save_pretrained(tmp_path / "lora")
    with pytest.raises(InputError, match=f"init_lora_weights '{start}'"):
        load_checkpoint(model, lora=tmp_path / "lora/adapter_model.safetensors")


# Kind -> (module, its settings, layers of the UNet that it changes).
LINEAR, CONV, ONE = f"{BLOCK}.transformer_blocks.0.ff.net.0.proj", "down_blocks.0.resnets.1.conv1", f"{BLOCK}.proj_in"
DOWN = "down_blocks.0.downsamplers.0.conv"
LYCORIS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoCon": (LoConModule, {}),
    "LoCon, Tucker": (LoConModule, {"use_tucker": True}),
    "LoHa": (LohaModule, {}),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}),
    "LoHa, rsLoRA": (LohaModule, {"rs_lora": True}),
    "LoKr": (LokrModule, {"factor": 4}),
    "LoKr, both": (LokrModule, {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    "LoKr, full": (LokrModule, {"factor": 4, "full_matrix": True}),
    "LoKr, Tucker": (LokrModule, {"factor": 4, "use_tucker": True, "lora_dim": 2}),
    "LoKr, Tucker, both": (LokrModule, {"factor": 4, "use_tucker": True, "decompose_both": True, "lora_dim": 1}),
    "LoKr, unbalanced": (LokrModule, {"factor": 2, "unbalanced_factorization": True, "lora_dim": 2}),
}


@pytest.mark.parametrize("decomposed", ["", "rows", "columns"])
@pytest.mark.parametrize("name", LYCORIS)
@torch.no_grad()
def test_the_layers_of_lycoris(
    model: Path, tmp_path: Path, checkpoints: ModuleType, name: str, decomposed: str
) -> None:
    """Every kind on a linear layer and on convolutions of 1 and 3 pixels: what their layer answers, ours does."""
    kind, settings = LYCORIS[name]
    plain = checkpoints.random_states()["unet"]
    generator = torch.Generator().manual_seed(0)
    tensors: State = {}
    answers: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in (LINEAR, CONV, ONE, DOWN):
        weight, bias = plain[f"{layer}.weight"], plain[f"{layer}.bias"]
        if weight.dim() == 2:
            module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
            x = torch.randn(3, weight.shape[1], generator=generator)
        else:
            module = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
            x = torch.randn(2, weight.shape[1], 6, 5, generator=generator)
        module.load_state_dict({"weight": weight, "bias": bias})
        chosen = {"lora_dim": 3, "alpha": 1.5} | settings
        lycoris = kind(layer, module, weight_decompose=bool(decomposed), wd_on_out=decomposed != "columns", **chosen)
        for parameter in lycoris.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        lycoris.apply_to()
        lycoris.eval()
        for role, tensor in lycoris.custom_state_dict().items():
            tensors[f"lora_unet_{layer.replace('.', '_')}.{role}"] = tensor.clone().contiguous()
        answers[layer] = x, lycoris(x)
    save_file(tensors, tmp_path / "x.safetensors")
    assert ("dora_scale" in str(list(tensors))) == bool(decomposed)
    checkpoint = load_checkpoint(model, lora=tmp_path / "x.safetensors")
    for layer, (x, answer) in answers.items():
        bias = plain[f"{layer}.bias"]

        def of(weight: Tensor, x: Tensor = x, bias: Tensor = bias) -> Tensor:
            return F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias, padding="same")

        ours = checkpoint.unet[f"{layer}.weight"]
        torch.testing.assert_close(of(ours), answer, rtol=1e-4, atol=1e-4, msg=layer)
        assert float((of(plain[f"{layer}.weight"]) - answer).abs().max()) > 1e-2, layer
    kinds = {"LoCon": "", "LoHa": " (LoHa", "LoKr": " (LoKr"}[name.partition(",")[0]]
    assert kinds in checkpoint.notes[-1] and ("DoRA" in checkpoint.notes[-1]) == bool(decomposed)


def test_the_comparison_with_lycoris_can_fail(model: Path, tmp_path: Path, checkpoints: ModuleType) -> None:
    """Read along the other axis, a square layer's magnitude would give another weight."""
    layer = f"{BLOCK}.transformer_blocks.0.attn1.to_q"
    weight = checkpoints.random_states()["unet"][f"{layer}.weight"]
    key = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 32), f"{key}.lora_up.weight": torch.zeros(32, 1)}
    results = []
    for shape in ((32, 1), (1, 32)):
        save_file(tensors | {f"{key}.dora_scale": torch.linspace(1, 2, 32).view(shape)}, tmp_path / "x.safetensors")
        results.append(load_checkpoint(model, lora=tmp_path / "x.safetensors").unet[f"{layer}.weight"])
    assert float((results[0] - results[1]).abs().max()) > 1e-2
    torch.testing.assert_close(results[0].norm(dim=1), torch.linspace(1, 2, 32))
    torch.testing.assert_close(results[1].norm(dim=0), torch.linspace(1, 2, 32))
    # At half the scale: half way between both weights.
    half = load_checkpoint(model, lora=(tmp_path / "x.safetensors", 0.5)).unet[f"{layer}.weight"]
    torch.testing.assert_close(half, (weight + results[1]) / 2)
    assert load_file(tmp_path / "x.safetensors")
