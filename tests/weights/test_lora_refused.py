"""What is no plain LoRA for this model is refused, in one line that says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ledits_min.errors import InputError
from ledits_min.weights.load import load_checkpoint

State = dict[str, Tensor]
Change = Callable[[State], State]
KEY = "lora_unet_mid_block_attentions_0_proj_in"


def without(*names: str) -> Change:
    return lambda lora: {name: tensor for name, tensor in lora.items() if name not in names}


def plus(*names: str) -> Change:
    """More tensors, of ones; a layer's name alone stands for its down and its up."""

    def changed(lora: State) -> State:
        more = {name: torch.ones(3) for name in names if "." in name}
        for name in names:
            if "." not in name:
                more |= {f"{name}.lora_down.weight": torch.ones(2, 3), f"{name}.lora_up.weight": torch.ones(3, 2)}
        return lora | more

    return changed


def only(name: str, *shape: int) -> Change:
    return lambda _: {name: torch.ones(shape)}


def at(name: str, value: Tensor) -> Change:
    return lambda lora: lora | {name: value}


DOTTED = "unet.mid_block.attentions.0.proj_in"
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
REFUSED: dict[str, tuple[Change, str]] = {
    "a layer that is not there": (
        plus("lora_unet_up_blocks_9_proj"),
        "1 of its names match nothing in this model ('lora_unet_up_blocks_9_proj')",
    ),
    "many layers that are not there": (plus(*(f"lora_unet_{i}" for i in range(9))), "9 of its names match nothing"),
    "a tensor that plays no role": (plus("thumb.nail"), "match nothing in this model ('thumb.nail')"),
    "SDXL's second text encoder": (plus("lora_te2_x"), "('lora_te2_x')"),
    "a norm": (plus("lora_unet_conv_norm_out"), "('lora_unet_conv_norm_out')"),
    "an embedding": (
        plus("lora_te_text_model_embeddings_token_embedding"),
        "('lora_te_text_model_embeddings_token_embedding')",
    ),
    "no up": (without(f"{KEY}.lora_up.weight"), "has only alpha and down"),
    "no down": (without(f"{KEY}.lora_down.weight"), "has only alpha and up"),
    "alpha alone": (at("lora_unet_conv_in.alpha", torch.ones(())), "has only alpha"),
    "ranks differ": (at(f"{KEY}.lora_up.weight", torch.ones(32, 7, 1, 1)), "which does not make the [32, 32, 1, 1]"),
    "another width": (at(f"{KEY}.lora_down.weight", torch.ones(3, 99, 1, 1)), "which does not make the [32, 32, 1, 1]"),
    "rank nought": (at(f"{KEY}.lora_down.weight", torch.ones(0, 32, 1, 1)), "which does not make"),
    "a vector": (at(f"{KEY}.lora_down.weight", torch.ones(32)), "which does not make"),
    "a mid that does not fit": (at(f"{KEY}.lora_mid.weight", torch.ones(3, 3, 3, 3)), "which does not make"),
    "many alphas": (at(f"{KEY}.alpha", torch.ones(2)), "one number is wanted"),
    "one layer, two spellings": (
        lambda lora: (
            lora | {f"{DOTTED}.lora_A.weight": torch.ones(3, 32), f"{DOTTED}.lora_B.weight": torch.ones(32, 3)}
        ),
        "changes 'mid_block.attentions.0.proj_in.weight' of the unet twice",
    ),
    "one tensor, two spellings": (
        lambda lora: lora | {f"{KEY}.lora_A.weight": torch.ones(3, 32)},
        "holds one tensor twice",
    ),
    "integers": (at(f"{KEY}.lora_up.weight", torch.ones(32, 3, 1, 1, dtype=torch.int8)), "dtype I8"),
    "NaN": (at(f"{KEY}.lora_up.weight", torch.full((32, 3, 1, 1), torch.nan)), "lora_up.weight' holds NaN or infinity"),
    "infinity": (at(f"{KEY}.lora_down.weight", torch.full((3, 32, 1, 1), torch.inf)), "holds NaN or infinity"),
    "alpha NaN": (at(f"{KEY}.alpha", torch.tensor(torch.nan)), "alpha' holds NaN or infinity"),
    "too strong": (at(f"{KEY}.alpha", torch.tensor(3e38)), "exceeds what torch.float32 can hold"),
    "DoRA of another size": (at(f"{KEY}.dora_scale", torch.ones(7, 1)), "its magnitude is [7, 1]"),
    "DoRA alone": (plus("unet.conv_in.lora_magnitude_vector"), "has only magnitude; down and up are needed"),
    "DoRA twice": (
        lambda lora: lora | {f"{KEY}.dora_scale": torch.ones(32, 1), f"{KEY}.lora_magnitude_vector": torch.ones(32)},
        "has two magnitudes",
    ),
    "DoRA of NaN": (at(f"{KEY}.dora_scale", torch.full((32, 1, 1, 1), torch.nan)), "dora_scale' holds NaN"),
    "LoHa by halves": (plus("lora_unet_conv_in.hada_w1_a"), "has only hada_w1_a; hada_w1_a, hada_w1_b"),
    "LoHa of two shapes": (
        lambda _: {
            f"{KEY}.hada_{name}": torch.ones(*shape)
            for name, shape in (("w1_a", (32, 2)), ("w1_b", (2, 32)), ("w2_a", (32, 3)), ("w2_b", (3, 31)))
        },
        "which does not make the [32, 32, 1, 1]",
    ),
    "LoKr by halves": (plus("lora_unet_conv_in.lokr_w1"), "has only lokr_w1; lokr_w1 and lokr_w2"),
    "LoKr of another size": (
        lambda _: {f"{KEY}.lokr_w1": torch.ones(4, 4), f"{KEY}.lokr_w2": torch.ones(8, 9)},
        "which does not make the [32, 32, 1, 1]",
    ),
    "LoKr of two ranks": (
        lambda _: {
            f"{KEY}.lokr_{name}": torch.ones(*shape)
            for name, shape in (("w1_a", (4, 2)), ("w1_b", (2, 4)), ("w2_a", (8, 3)), ("w2_b", (3, 8)))
        },
        "which does not make the [32, 32, 1, 1]",
    ),
    "LoRA and LoHa at once": (plus(f"{KEY}.hada_w1_a"), "are needed, so the file is damaged"),
    "two adapters": (
        plus("unet.conv_in.lora_A.style.weight", "unet.conv_in.lora_B.face.weight"),
        "holds several adapters ('face' and 'style')",
    ),
    "OFT": (plus("lora_unet_conv_in.oft_blocks"), "is an OFT"),
    "BOFT": (plus("lora_unet_conv_in.boft_blocks"), "is an OFT"),
    "IA3": (plus("lora_unet_conv_in.on_input"), "is an IA3"),
    "GLoRA": (plus("lora_unet_conv_in.a1.weight"), "is a GLoRA"),
    "whole differences": (plus("lora_unet_conv_in.diff"), "whole differences"),
    "norms": (plus("lora_unet_conv_norm_out.w_norm"), "whole differences"),
    "biases": (plus("unet.conv_in.lora_B.bias"), "changes biases"),
    "words of no known kind": (plus("bundle_emb.word.clip_x"), "is no embedding that is known here"),
    "a word too wide": (plus("bundle_emb.word.emb_params"), "the word 'word' is 3 wide, the text encoder of"),
    "a word alone": (only("emb_params", 1, 24), "is a textual inversion, a new word; pass it as --embedding"),
    "Flux": (only("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 2, 3), "is a LoRA for Flux"),
    "SD 3": (only("lora_unet_joint_blocks_0_x.lora_down.weight", 2, 3), "is a LoRA for SD 3"),
    "a transformer as ComfyUI has it": (
        only("diffusion_model.blocks.0.self_attn.q.lora_A.weight", 2, 3),
        "is a LoRA for a transformer model",
    ),
    "Flux as ComfyUI has it": (only("diffusion_model.double_blocks.0.x.lora_A.weight", 2, 3), "is a LoRA for Flux"),
    "a transformer": (only("transformer.blocks.0.attn.to_q.lora_A.weight", 2, 3), "is a LoRA for a transformer model"),
    "SDXL": (
        only("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", 2, 2048),
        "is a LoRA for SDXL: it reads texts 2048 wide, this checkpoint's are 24",
    ),
    "SD 2": (only(f"unet.{CROSS}.to_v.lora_A.weight", 2, 1024), "is a LoRA for SD 2.x"),
    "SD 1": (only(f"unet.{CROSS}.processor.to_v_lora.down.weight", 2, 768), "is a LoRA for SD 1.x"),
    "a checkpoint": (only("model.diffusion_model.out.0.weight", 3), "match nothing in this model"),
}


@pytest.fixture
def sound() -> State:
    """A small LoRA that merges."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 32, 1, 1, generator=generator), torch.randn(32, 3, 1, 1, generator=generator)
    return {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up, f"{KEY}.alpha": torch.tensor(1.5)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(pristine: Path, tmp_path: Path, sound: State, name: str) -> None:
    damage, reason = REFUSED[name]
    path = tmp_path / "x.safetensors"
    save_file(dict(sound), path)
    load_checkpoint(pristine, lora=[path])
    save_file(damage(dict(sound)), path)
    with pytest.raises(InputError) as caught:
        load_checkpoint(pristine, lora=[path])
    message = str(caught.value)
    assert reason in message and str(path) in message and message.isprintable() and len(message) < 700


def test_a_change_that_half_precision_cannot_hold(pristine: Path, tmp_path: Path, sound: State) -> None:
    path = tmp_path / "x.safetensors"
    save_file(sound | {f"{KEY}.alpha": torch.tensor(3e5)}, path)
    load_checkpoint(pristine, lora=[path])
    with pytest.raises(InputError, match="exceeds what torch.float16 can hold; use a smaller scale, or float32"):
        load_checkpoint(pristine, lora=[path], dtype=torch.float16)


@pytest.mark.parametrize(
    "settings",
    [
        *("[1]", "{", "NaN", '{"lora_alpha": "much"}', '{"lora_alpha": 1e9}', '{"lora_bias": true}'),
        '{"unet.use_dora": true}',
        *('{"unet.alpha_pattern": [1], "unet.r": 3}', '{"alpha_pattern": {"x": "y"}}', '{"alpha_pattern": {"x": NaN}}'),
        *('{"peft_type": "LOHA"}', '{"use_qalora": true}', '{"kasa_config": {"a": 1}}'),
        *(f'{{"init_lora_weights": {how}}}' for how in ('"pissa"', '"pissa_niter_16"', '"olora"', '"loftq"', "3")),
        # Expressions that could run for years, or that nobody writes.
        *(
            json.dumps({"alpha_pattern": {pattern: 1}})
            for pattern in ("(a+)+$", "(a|a)*x", ".*.*.*", "(a|b)(a|b)", "(", "a{9}", "(?i)x", r"\p", "x" * 2000 + "+")
        ),
        json.dumps({"alpha_pattern": {f"x[{i}]": 1 for i in range(99)}}),
    ],
)
def test_peft_settings_that_are_none(pristine: Path, tmp_path: Path, sound: State, settings: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file(sound, path, {"lora_adapter_metadata": settings})
    with pytest.raises(InputError, match="lora_adapter_metadata|use_dora"):
        load_checkpoint(pristine, lora=[path])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 101, -1e9, True])
def test_scales_out_of_range(pristine: Path, scale: float) -> None:
    with pytest.raises(InputError, match="scale of the LoRA"):
        load_checkpoint(pristine, lora=[("x.safetensors", scale)])


@pytest.mark.parametrize("lora", [3, [3], [None], [("a", "b")], ["a", 0.5], [["a", 0.5]]])
def test_what_is_no_path(pristine: Path, lora: Any) -> None:
    with pytest.raises(InputError):
        load_checkpoint(pristine, lora=lora)
