"""A LoRA in every spelling changes the weights it names by scale * alpha / rank * up @ down, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ledits_min.config import SD15_TEXT, SD15_UNET
from ledits_min.errors import InputError
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.lora import lora_pairs, survey_lora
from ledits_min.weights.read.shapes import text_shapes, unet_shapes

State = dict[str, Tensor]
Factors = dict[str, Tensor]  # down, up, perhaps mid and alpha

RANK, ALPHA = 3, 1.5
BLOCK = "down_blocks.1.attentions.0"
ATTENTION = [
    f"{BLOCK}.transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")
]
UNET_LAYERS = [
    *ATTENTION,
    f"{BLOCK}.proj_in",
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "up_blocks.1.resnets.2.conv_shortcut",
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.upsamplers.0.conv",
    "up_blocks.0.resnets.0.time_emb_proj",
    "time_embedding.linear_2",
    "conv_in",
    "conv_out",
]
TEXT_ATTENTION = [f"encoder.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "v", "out")]
TEXT_LAYERS = [*TEXT_ATTENTION, "encoder.layers.1.mlp.fc1", "encoder.layers.0.mlp.fc2"]
# What a LoRA of the old attention processors can hold, and what no trainer writes in LDM names.
LAYERS = {"unet": UNET_LAYERS, "text": TEXT_LAYERS}
OLD_LAYERS = {"unet": ATTENTION, "text": TEXT_ATTENTION}


def factors(shape: tuple[int, ...], seed: int, rank: int = RANK, alpha: float | None = ALPHA) -> Factors:
    """Random up and down for a weight of this shape, the way trainers shape them."""
    generator = torch.Generator().manual_seed(seed)
    outputs, *inputs = shape
    result = {
        "down": torch.randn(rank, *inputs, generator=generator),
        "up": torch.randn(outputs, rank, *([1, 1] if len(shape) == 4 else []), generator=generator),
    }
    return result if alpha is None else result | {"alpha": torch.tensor(alpha)}


def all_factors(states: Mapping[str, State], layers: Mapping[str, list[str]] = LAYERS) -> dict[str, dict[str, Factors]]:
    return {
        part: {name: factors(tuple(states[part][f"{name}.weight"].shape), index) for index, name in enumerate(names)}
        for part, names in layers.items()
    }


def change(parts: Factors, scale: float, shape: torch.Size) -> Tensor:
    """scale * alpha / rank * up @ down in float64, over the rank by an explicit sum."""
    down, up = parts["down"].double(), parts["up"].double().flatten(1)
    alpha = float(parts["alpha"]) if "alpha" in parts else len(down)
    total = torch.zeros(up.shape[0], *down.shape[1:], dtype=torch.float64)
    for index in range(len(down)):
        total += up[:, index].view(-1, *[1] * (down.dim() - 1)) * down[index]
    return scale * alpha / len(down) * total.view(shape)


def kohya(part: str, layer: str, ldm: Callable[[str], str] | None = None) -> str:
    if part == "text":
        return f"lora_te_text_model_{layer}".replace(".", "_")
    name = layer if ldm is None else ldm(f"{layer}.weight").removesuffix(".weight")
    return f"lora_unet_{name}".replace(".", "_")


def write(path: Path, style: str, lora: Mapping[str, Mapping[str, Factors]], checkpoints: ModuleType) -> None:
    """The factors in one of the spellings that exist."""
    tensors: State = {}
    for part, layers in lora.items():
        for layer, parts in layers.items():
            for role, tensor in parts.items():
                tensors[spell(style, part, layer, role, checkpoints)] = tensor.contiguous()
    save_file(tensors, path)


def spell(style: str, part: str, layer: str, role: str, checkpoints: ModuleType) -> str:
    end = "alpha" if role == "alpha" else f"lora_{role}.weight"
    if style == "kohya":
        return f"{kohya(part, layer)}.{end}"
    if style == "kohya, LDM names":
        return f"{kohya(part, layer, lambda name: checkpoints.ldm_unet_name(name, checkpoints.REDUCED_UNET))}.{end}"
    if style == "kohya, te1":
        return f"{kohya(part, layer)}.{end}".replace("lora_te_", "lora_te1_")
    letter = {"down": "lora_A", "up": "lora_B"}.get(role, role)
    prefix = "unet." if part == "unet" else "text_encoder.text_model."
    if style == "peft":
        return f"{prefix}{layer}.{letter}{'' if role == 'alpha' else '.weight'}"
    if style == "peft, named, flat text":
        prefix = prefix.removesuffix("text_model.")
        return f"{prefix}{layer}.{letter}{'' if role == 'alpha' else '.default.weight'}"
    if style == "ComfyUI":
        ldm = checkpoints.ldm_unet_name(f"{layer}.weight", checkpoints.REDUCED_UNET).removesuffix(".weight")
        clip = "text_encoders.clip_l.transformer.text_model"
        return f"diffusion_model.{ldm}.{end}" if part == "unet" else f"{clip}.{layer}.{end}"
    if style in WRAPPED:
        return f"{WRAPPED[style][part]}{layer}.{letter}{'' if role == 'alpha' else WRAPPED[style]['end']}"
    if style == "diffusers":
        linear = "lora" if part == "unet" else "lora_linear_layer"
        return f"{prefix}{layer}.{linear}.{role}{'' if role == 'alpha' else '.weight'}"
    assert style == "diffusers, old processors"
    module, _, name = layer.removesuffix(".0").rpartition(".")
    processor = f"{module}.processor.{name}" if part == "unet" else f"{module}.to_{name.removesuffix('_proj')}"
    return f"{prefix}{processor}_lora.{role}{'' if role == 'alpha' else '.weight'}"


# What wraps the same names: a network compiled, a pipeline's prefix twice, peft's model, an adapter of any name.
WRAPPED = {
    "compiled": {"unet": "unet._orig_mod.", "text": "text_encoder._orig_mod.text_model.", "end": ".weight"},
    "twice": {"unet": "unet.unet.", "text": "text_encoder.text_encoder.text_model.", "end": ".weight"},
    "wrapped by peft": {
        "unet": "unet.base_model.model.", "text": "text_encoder.base_model.model.text_model.", "end": ".weight"
    },
    "of an adapter": {"unet": "unet.", "text": "text_encoder.text_model.", "end": ".my-style_2.weight"},
    "all at once": {
        "unet": "base_model.model.unet._orig_mod.unet.",
        "text": "base_model.model.text_encoder._orig_mod.base_model.model.text_model.",
        "end": ".x.weight",
    },
    "LDM whole": {"unet": "model.diffusion_model.", "text": "clip_l.transformer.text_model.", "end": ".weight"},
}  # fmt: skip
STYLES = [
    "ComfyUI",
    *WRAPPED,
    "kohya",
    "kohya, LDM names",
    "kohya, te1",
    "peft",
    "peft, named, flat text",
    "diffusers",
    "diffusers, old processors",
]


def assert_merged(
    checkpoint: Any, states: Mapping[str, State], loras: list[tuple[dict[str, dict[str, Factors]], float]]
) -> None:
    """Every weight is the sum, to the rounding of float32, and every other tensor is untouched."""
    for part in states:
        found = getattr(checkpoint, part)
        for name, weight in states[part].items():
            layer = name.removesuffix(".weight")
            changes = [
                change(lora[part][layer], scale, weight.shape) for lora, scale in loras if layer in lora.get(part, {})
            ]
            if not changes:
                assert torch.equal(found[name], weight), name
                continue
            wanted = weight.double() + sum(changes)
            assert float((wanted - weight.double()).norm()) > 1e-3  # it is a change at all
            assert torch.allclose(found[name].double(), wanted, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_merges_the_same(checkpoints: ModuleType, pristine: Path, tmp_path: Path, style: str) -> None:
    states = checkpoints.random_states()
    lora = all_factors(states, OLD_LAYERS if "old" in style else LAYERS)
    write(tmp_path / "x.safetensors", style, lora, checkpoints)
    checkpoint = load_checkpoint(pristine, lora=(tmp_path / "x.safetensors", 0.7))
    assert_merged(checkpoint, states, [(lora, 0.7)])
    count = sum(len(layers) for layers in lora.values())
    assert (
        f"scale 0.7 into {len(lora['unet'])} of the unet's and {len(lora['text'])} of the text's"
        in checkpoint.notes[-1]
    )
    assert count > 8


XL_BLOCK = "down_blocks.2.attentions.0.transformer_blocks.1"
FAMILY_LAYERS = {
    "SD 2.x": {"unet": [*ATTENTION, f"{BLOCK}.proj_in"], "text": TEXT_LAYERS},
    "SDXL": {
        "unet": [f"{XL_BLOCK}.attn2.to_k", f"{XL_BLOCK}.ff.net.0.proj", f"{BLOCK}.proj_out", "add_embedding.linear_1"],
        "text": TEXT_LAYERS,
        "text_2": [*TEXT_LAYERS, "encoder.layers.2.mlp.fc1", "text_projection"],
    },
}
PREFIXES = {
    "kohya": {"unet": "lora_unet_", "text": "lora_te1_text_model_", "text_2": "lora_te2_text_model_"},
    "peft": {"unet": "unet.", "text": "text_encoder.text_model.", "text_2": "text_encoder_2.text_model."},
}


@pytest.mark.parametrize("family", FAMILY_LAYERS)
@pytest.mark.parametrize("style", PREFIXES)
def test_every_family(checkpoints: ModuleType, tmp_path: Path, family: str, style: str) -> None:
    """Linear projections, deeper transformers, a second text encoder; kohya spells SDXL's UNet in LDM numbers."""
    states = checkpoints.write_family_folder(tmp_path / "model", family)
    lora = all_factors(states, FAMILY_LAYERS[family])
    tensors: State = {}
    for part, layers in lora.items():
        for layer, parts in layers.items():
            name = layer
            if style == "kohya" and family == "SDXL" and part == "unet":
                unet = checkpoints.REDUCED[family]["unet"]
                name = checkpoints.ldm_unet_name(f"{layer}.weight", unet).removesuffix(".weight")
            elif style == "peft" and layer == "text_projection":
                name = "\ntext_projection"  # it stands beside text_model, not in it
            name = (PREFIXES[style][part] + name).replace("text_model.\n", "")
            name = name.replace(".", "_") if style == "kohya" else name
            for role, tensor in parts.items():
                tensors[f"{name}.alpha" if role == "alpha" else f"{name}.lora_{role}.weight"] = tensor
    save_file(tensors, tmp_path / "x.safetensors")
    assert_merged(load_checkpoint(tmp_path / "model", lora=(tmp_path / "x.safetensors", 1.3)), states, [(lora, 1.3)])


def test_names_without_a_prefix_are_the_unets(checkpoints: ModuleType, pristine: Path, tmp_path: Path) -> None:
    """What diffusers' own training script once saved: attention processors of the UNet, and no alpha."""
    states = checkpoints.random_states()
    lora = {"unet": {name: factors(tuple(states["unet"][f"{name}.weight"].shape), 1, 4, None) for name in ATTENTION}}
    named = {
        spell("diffusers, old processors", "unet", layer, role, checkpoints).removeprefix("unet."): tensor
        for layer, parts in lora["unet"].items()
        for role, tensor in parts.items()
    }
    save_file(named, tmp_path / "x.safetensors")
    assert_merged(load_checkpoint(pristine, lora=[tmp_path / "x.safetensors"]), states, [(lora, 1.0)])


@pytest.mark.parametrize("as_conv", [False, True])
def test_linear_and_1x1_convolution_are_the_same(
    checkpoints: ModuleType, pristine: Path, tmp_path: Path, as_conv: bool
) -> None:
    """proj_in is a convolution in SD 1.x and linear in SDXL; files hold either shape for either."""
    states = checkpoints.random_states()
    layers = {"unet": [f"{BLOCK}.proj_in", ATTENTION[0]]}
    lora = all_factors(states, layers)
    reshaped = {
        layer: parts
        | {r: parts[r].flatten(1)[:, :, None, None] if as_conv else parts[r].flatten(1) for r in ("down", "up")}
        for layer, parts in lora["unet"].items()
    }
    write(tmp_path / "x.safetensors", "kohya", {"unet": reshaped}, checkpoints)
    assert_merged(load_checkpoint(pristine, lora=[tmp_path / "x.safetensors"]), states, [(lora, 1.0)])


def test_a_convolution_in_three_factors(checkpoints: ModuleType, pristine: Path, tmp_path: Path) -> None:
    """LoCon's lora_mid: W'[o, i, y, x] = W + alpha / rank * sum_pq up[o, p] mid[p, q, y, x] down[q, i]."""
    states = checkpoints.random_states()
    layer = "up_blocks.1.resnets.0.conv2"
    weight = states["unet"][f"{layer}.weight"]
    down, up, mid = (
        torch.randn(2, weight.shape[1], 1, 1),
        torch.randn(weight.shape[0], 5, 1, 1),
        torch.randn(5, 2, 3, 3),
    )
    parts = {"down": down, "up": up, "mid": mid, "alpha": torch.tensor(4.0)}
    write(tmp_path / "x.safetensors", "kohya", {"unet": {layer: parts}}, checkpoints)
    merged = load_checkpoint(pristine, lora=[tmp_path / "x.safetensors"]).unet[f"{layer}.weight"]
    wanted = weight.double().clone()
    for y in range(3):
        for x in range(3):
            product = up.double().flatten(1) @ mid[:, :, y, x].double() @ down.double().flatten(1)
            wanted[:, :, y, x] += 4.0 / 2 * product
    assert torch.allclose(merged.double(), wanted, rtol=1e-5, atol=1e-5)


def test_several_are_summed_and_rounded_once(checkpoints: ModuleType, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: the sum of two small changes arrives, where rounding after each would lose both."""
    states = checkpoints.random_states()
    name = ATTENTION[0]
    states["unet"][f"{name}.weight"] = torch.ones_like(states["unet"][f"{name}.weight"])
    checkpoints.write_folder(tmp_path / "m", states=states, dtype=torch.bfloat16)
    width = len(states["unet"][f"{name}.weight"])
    small = {"down": torch.full((1, width), 1.0), "up": torch.full((width, 1), 2.0**-9 + 2.0**-12)}
    write(tmp_path / "x.safetensors", "kohya", {"unet": {name: small}}, checkpoints)
    twice = load_checkpoint(tmp_path / "m", lora=[tmp_path / "x.safetensors"] * 2, dtype=torch.bfloat16)
    once = load_checkpoint(tmp_path / "m", lora=[tmp_path / "x.safetensors"], dtype=torch.bfloat16)
    assert twice.unet[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(twice.unet[f"{name}.weight"].float(), torch.full((width, width), 1.0 + 2.0**-7))
    assert torch.equal(once.unet[f"{name}.weight"].float(), torch.ones(width, width))
    exact = load_checkpoint(tmp_path / "m", lora=[tmp_path / "x.safetensors"])
    assert float(exact.unet[f"{name}.weight"][0, 0]) == 1.0 + 2.0**-9 + 2.0**-12


def test_two_files_with_their_own_scales(checkpoints: ModuleType, pristine: Path, tmp_path: Path) -> None:
    states = checkpoints.random_states()
    first, second = all_factors(states), all_factors(states, OLD_LAYERS)
    write(tmp_path / "a.safetensors", "kohya", first, checkpoints)
    write(tmp_path / "b.safetensors", "peft", second, checkpoints)
    loras = [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", -2.0)]
    assert_merged(load_checkpoint(pristine, lora=loras), states, [(first, 0.5), (second, -2.0)])


def test_a_lora_and_its_opposite_cancel(checkpoints: ModuleType, pristine: Path, tmp_path: Path) -> None:
    states = checkpoints.random_states()
    write(tmp_path / "x.safetensors", "kohya", all_factors(states), checkpoints)
    pairs = [(tmp_path / "x.safetensors", scale) for scale in (3.0, -3.0)]
    checkpoint = load_checkpoint(pristine, lora=pairs)
    for part in ("unet", "text"):
        for name, weight in states[part].items():
            assert torch.allclose(getattr(checkpoint, part)[name], weight, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_factors_in_every_precision(
    checkpoints: ModuleType, pristine: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    states = checkpoints.random_states()
    lora = all_factors(states, {"unet": ATTENTION})
    for parts in lora["unet"].values():
        parts.update({role: tensor.to(dtype) for role, tensor in parts.items()})
    write(tmp_path / "x.safetensors", "kohya", lora, checkpoints)
    assert_merged(load_checkpoint(pristine, lora=[tmp_path / "x.safetensors"]), states, [(lora, 1.0)])


PEFT_SETTINGS: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({}, {}),
    ({"unet.lora_alpha": 6, "unet.r": 3}, dict.fromkeys(ATTENTION, 6.0)),
    ({"lora_alpha": 6}, dict.fromkeys(ATTENTION, 6.0)),
    ({"text_encoder.lora_alpha": 6}, {}),
    (
        {"unet.lora_alpha": 2, "unet.alpha_pattern": {"attn2.to_k": 9}},
        dict.fromkeys(ATTENTION, 2.0) | {ATTENTION[2]: 9.0},
    ),
    ({"unet.lora_alpha": 2, "unet.use_rslora": True}, dict.fromkeys(ATTENTION, 2.0 * 3**0.5)),
]


def merges_as(
    alphas: dict[str, float], metadata: dict[str, str] | None, checkpoints: ModuleType, pristine: Path, file: Path
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Write a LoRA whose tensors hold no alpha, and hold its merge against these; returns what it should be."""
    states = checkpoints.random_states()
    shapes = {name: tuple(states["unet"][f"{name}.weight"].shape) for name in ATTENTION}
    lora = {"unet": {name: factors(shape, 5, 3, None) for name, shape in shapes.items()}}
    tensors = {
        spell("peft", "unet", n, r, checkpoints): t for n, parts in lora["unet"].items() for r, t in parts.items()
    }
    save_file(tensors, file, metadata)
    for name, alpha in alphas.items():
        lora["unet"][name]["alpha"] = torch.tensor(alpha)
    assert_merged(load_checkpoint(pristine, lora=[file]), states, [(lora, 1.0)])
    return lora


@pytest.mark.parametrize(("found", "alphas"), PEFT_SETTINGS)
def test_alpha_from_the_metadata_of_diffusers(
    checkpoints: ModuleType, pristine: Path, tmp_path: Path, found: dict[str, Any], alphas: dict[str, float]
) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(found)} if found else None
    merges_as(alphas, metadata, checkpoints, pristine, tmp_path / "x.safetensors")


PLAIN_METADATA: list[tuple[dict[str, str], dict[str, float]]] = [
    ({"lora_alpha": "6"}, dict.fromkeys(ATTENTION, 6.0)),
    ({"alpha": "6.0", "network_alpha": "6", "rank": "3"}, dict.fromkeys(ATTENTION, 6.0)),
    ({"unet.lora_alpha": "6", "text_encoder.lora_alpha": "9"}, dict.fromkeys(ATTENTION, 6.0)),
    ({"text_encoder.lora_alpha": "9"}, {}),
    ({"lora_alpha": "2", "use_rslora": "True"}, dict.fromkeys(ATTENTION, 2.0 * 3**0.5)),
    ({"ss_network_alpha": "6", "notes": "alpha 6"}, {}),  # kohya's, which has its alphas in tensors
]


@pytest.mark.parametrize(("metadata", "alphas"), PLAIN_METADATA)
def test_alpha_from_plain_metadata(
    checkpoints: ModuleType, pristine: Path, tmp_path: Path, metadata: dict[str, str], alphas: dict[str, float]
) -> None:
    """An alpha that only the file's metadata says; where tensors say it too, they count."""
    lora = merges_as(alphas, metadata, checkpoints, pristine, tmp_path / "x.safetensors")
    states = checkpoints.random_states()
    own = {n: dict(parts, alpha=torch.tensor(5.0)) for n, parts in lora["unet"].items()}
    tensors = {spell("kohya", "unet", n, r, checkpoints): t for n, parts in own.items() for r, t in parts.items()}
    save_file(tensors, tmp_path / "y.safetensors", metadata)
    assert_merged(load_checkpoint(pristine, lora=[tmp_path / "y.safetensors"]), states, [({"unet": own}, 1.0)])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; a number is wanted"),
        ({"lora_alpha": "nan"}, "a number in"),
        ({"lora_alpha": "1e9"}, "a number in"),
        ({"alpha": "4", "lora_alpha": "8"}, "two alphas, 4 and 8|two alphas, 8 and 4"),
    ],
)
def test_an_alpha_in_metadata_that_is_none_is_refused(
    checkpoints: ModuleType, pristine: Path, tmp_path: Path, metadata: dict[str, str], reason: str
) -> None:
    shape = tuple(checkpoints.random_states()["unet"][f"{ATTENTION[0]}.weight"].shape)
    tensors = {spell("peft", "unet", ATTENTION[0], r, checkpoints): t for r, t in factors(shape, 5, 3, None).items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(InputError, match=reason) as caught:
        load_checkpoint(pristine, lora=[tmp_path / "x.safetensors"])
    assert str(caught.value).isprintable()


def test_a_peft_adapter_needs_its_config_beside_it(checkpoints: ModuleType, pristine: Path, tmp_path: Path) -> None:
    states = checkpoints.random_states()
    shapes = {name: tuple(states["unet"][f"{name}.weight"].shape) for name in ATTENTION}
    lora = {"unet": {name: factors(shape, 5, 3, None) for name, shape in shapes.items()}}
    tensors = {
        spell("peft", "unet", n, r, checkpoints): t for n, parts in lora["unet"].items() for r, t in parts.items()
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("unet.", "base_model.model."): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(InputError, match="adapter_config.json"):
        load_checkpoint(pristine, lora=[path])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": 3, "use_dora": False}))
    for parts in lora["unet"].values():
        parts["alpha"] = torch.tensor(12.0)
    assert_merged(load_checkpoint(pristine, lora=[path]), states, [(lora, 1.0)])


def test_the_fingerprint_knows_file_scale_and_order(checkpoints: ModuleType, pristine: Path, tmp_path: Path) -> None:
    states = checkpoints.random_states()
    a, b, copy = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "copy"))
    write(a, "kohya", all_factors(states, {"unet": ATTENTION}), checkpoints)
    lora = all_factors(states, {"unet": ATTENTION})
    lora["unet"][ATTENTION[0]]["up"][-1, -1] += 1e-3
    write(b, "kohya", lora, checkpoints)
    copy.write_bytes(a.read_bytes())

    def print_of(*loras: Any) -> str:
        return load_checkpoint(pristine, lora=list(loras)).fingerprint

    different = {
        print_of(),
        print_of(a),
        print_of(b),
        print_of((a, 0.5)),
        print_of(a, b),
        print_of(b, a),
        print_of(a, a),
    }
    assert len(different) == 7
    assert print_of(a) == print_of((copy, 1.0)) and all(len(print_) == 64 for print_ in different)


@given(st.lists(st.tuples(st.text(min_size=1), st.floats(-100, 100)), max_size=4))
def test_pairs_come_through_in_order(pairs: list[tuple[str, float]]) -> None:
    assert lora_pairs(pairs) == pairs
    if pairs:
        assert lora_pairs(pairs[0]) == [pairs[0]]


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 9), alpha=st.floats(-8, 8), scale=st.floats(-3, 3), seed=st.integers(0, 99))
def test_any_rank_alpha_and_scale(
    checkpoints: ModuleType,
    pristine: Path,
    tmp_path_factory: pytest.TempPathFactory,
    rank: int,
    alpha: float,
    scale: float,
    seed: int,
) -> None:
    name = "down_blocks.0.resnets.1.conv1"
    weight = checkpoints.random_states()["unet"][f"{name}.weight"]
    parts = factors(tuple(weight.shape), seed, rank, alpha)
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    write(path, "kohya", {"unet": {name: parts}}, checkpoints)
    merged = load_checkpoint(pristine, lora=(path, scale)).unet[f"{name}.weight"]
    wanted = weight.double() + change(parts, scale, weight.shape)
    assert float((merged.double() - wanted).abs().max()) <= 1e-5 * (1.0 + float(wanted.abs().max()))


def test_every_published_listing_is_understood(
    checkpoints: ModuleType, layouts: dict[str, Any], tmp_path: Path
) -> None:
    """Names and shapes of real files against SD 1.5's own: each layer is found, and each found once."""
    shapes = {"unet": unet_shapes(SD15_UNET), "text": text_shapes(SD15_TEXT)}
    listings = {name: layout for name, layout in layouts.items() if name.startswith("lora_")}
    assert listings
    for name, layout in listings.items():
        path = tmp_path / "x.safetensors"
        checkpoints.write_hollow(path, layout["keys"])
        updates = survey_lora(path, 1.0, shapes, SD15_UNET).updates
        downs = sum("lora_down" in key or ".lora.down" in key or "lora_A" in key for key in layout["keys"])
        assert sum(map(len, updates.values())) == downs > 50, name
        assert {update.rank for part in updates.values() for update in part.values()} == {4}
