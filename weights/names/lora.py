"""What a layer is called in LoRA files: every spelling of every layer -> our name of its weight, by rule.

Trainers agree on the matrices of a LoRA and on nothing else: the same layer is
`lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight` (kohya, LyCORIS; SDXL's in LDM block numbers),
`diffusion_model.input_blocks.1.1.proj_in.lora_up.weight` (ComfyUI),
`unet.down_blocks.0.attentions.0.proj_in.lora_A.weight` (peft) or `...lora.down.weight` (diffusers), with old attention
processors `attn1.processor.to_q_lora.down.weight`. Here every spelling of every layer is computed from the layer's own
name, so nothing is guessed back from underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ledits_min.config import UNetConfig
from ledits_min.weights.names import ldm
from ledits_min.weights.read.shapes import Shapes

# Start of a name -> the part it speaks of; None for a wrapper, which says nothing. They may stand before one another.
_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text"),
    ("lora_te2_", "text_2"),
    ("lora_te_", "text"),
    ("lycoris_", "unet"),
    ("base_model.model.", None),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_2"),
    ("text_encoder.", "text"),
    ("text_encoders.", None),
    ("clip_l.", "text"),
    ("clip_h.", "text"),
    ("clip_g.", "text_2"),
)
_COMPILED = re.compile(r"_orig_mod[._]")  # what torch.compile puts before the name of whatever it wraps

_ADAPTER = r"(?:\.(?!weight$)(?P<adapter>[\w-]+))?"  # peft's name of the adapter, "default" or anything
# End of a name -> the tensor's role in the sum.
_ROLES = tuple(
    re.compile(ending)
    for ending in (
        r"\.lora_(?P<role>down|up|mid)\.weight$",
        rf"\.lora_(?P<role>[AB]){_ADAPTER}\.weight$",
        rf"\.lora_(?P<role>magnitude)_vector{_ADAPTER}(?:\.weight)?$",
        r"(?:\.lora|_lora|\.lora_linear_layer)\.(?P<role>down|up)\.weight$",
        r"(?:\.lora|_lora|\.lora_linear_layer)?\.(?P<role>alpha)$",
        r"\.(?P<role>dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)$",
    )
)
_ROLE_NAMES = {"A": "down", "B": "up"}

# A layer of a LoRA for another kind of network, and what it is.
OTHER_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.b?oft_(blocks|diag)|\.oft_R\b", "an OFT (it rotates weights)"),
        (r"\.on_input$|\.ia3_l", "an IA3 (it rescales activations)"),
        (r"\.[ab][12]\.weight$", "a GLoRA"),
        (r"\.lora_embedding_[AB]", "one that changes the words' embeddings"),
        (r"\.lora_[AB](\.[\w-]+)?\.bias$|\.lora_(up|down)\.bias$", "one that changes biases"),
        (r"\.diff(_b)?$|\.[wb]_norm$", "one that holds whole differences (LyCORIS full or norm)"),
    )
)
_UNETS = "input_|middle_|output_|down_|mid_|up_|time_embed|label_emb|add_embed|conv_|out"  # how its layers start
OTHER_FAMILIES = (
    (re.compile(r"(double|single)_blocks[._]|single_transformer_blocks|double_stream"), "Flux"),
    (re.compile(r"joint_blocks[._]|attn_add_[kq]_proj|attn\.add_[kq]_proj"), "SD 3"),
    (
        re.compile(rf"^transformer\.|^(base_model\.model\.)?diffusion_model\.(?!(_orig_mod\.)?({_UNETS}))"),
        "a transformer model (Flux, SD 3 or newer)",
    ),
    (re.compile(r"motion_modules"), "AnimateDiff"),
)


class Role(NamedTuple):
    """What one tensor is: the layer as the file spells it, its role in the sum, and peft's name of the adapter."""

    layer: str
    role: str
    adapter: str | None


def role_of(name: str) -> Role | None:
    """The role of a tensor by its name, None where it plays none."""
    match = next((match for role in _ROLES if (match := role.search(name))), None)
    if match is None:
        return None
    return Role(name[: match.start()], _ROLE_NAMES.get(match["role"], match["role"]), match.groupdict().get("adapter"))


def split(spelling: str) -> tuple[str, str]:
    """ "lora_unet_x" -> ("unet", "x"); wrappers around the name are dropped, however many there are."""
    inner, part = _COMPILED.sub("", spelling), None
    while found := next(((prefix, of) for prefix, of in _PREFIXES if inner.startswith(prefix)), None):
        inner, part = inner.removeprefix(found[0]), found[1] or part
    if part is None:  # diffusers' training scripts once wrote the UNet's names bare
        part = "text" if inner.startswith("text_model.") else "unet"
    elif part != "unet":
        inner = inner.removeprefix("transformer.")  # ComfyUI: clip_l.transformer.text_model...
    return part, inner.replace(".processor.", ".")


def spellings(part: str, shapes: Shapes, unet: UNetConfig) -> dict[str, str]:
    """Every way to write a layer of this part -> our name of its weight."""
    theirs = {ours: name for name, ours in ldm.unet_table(unet).items()} if part == "unet" else {}
    result = {}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) >= 2 and "embeddings." not in name:
            layers = [theirs[name]] if name in theirs else []
            for layer in [name, *layers]:
                for spelling in _variants(part, layer.removesuffix(".weight")):
                    result[spelling] = result[spelling.replace(".", "_")] = name
    return result


def _variants(part: str, layer: str) -> Iterator[str]:
    if part == "unet":
        yield layer
        if layer.endswith(".to_out.0"):
            yield layer.removesuffix(".0")
        return
    flat = layer.removeprefix("text_model.")
    for name in (flat, re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", flat)):
        yield name
        yield f"text_model.{name}"
