"""What a layer is called in LoRA files: every spelling of every layer -> our name of its weight, by rule.

Trainers agree on the matrices of a LoRA and on nothing else: the same layer is
`lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight` (kohya; SDXL's in LDM block numbers),
`unet.down_blocks.0.attentions.0.proj_in.lora_A.weight` (peft) or `...lora.down.weight` (diffusers), with old
attention processors `attn1.processor.to_q_lora.down.weight`. Here every spelling of every layer is computed from the
layer's own name, so nothing is guessed back from underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ledits_min.config import UNetConfig
from ledits_min.weights.names import ldm
from ledits_min.weights.read.shapes import Shapes

# Prefix of a name -> the part it speaks of. The empty prefix is what diffusers' training scripts once wrote.
_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text"),
    ("lora_te2_", "text_2"),
    ("lora_te_", "text"),
    ("base_model.model.", "unet"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_2"),
    ("text_encoder.", "text"),
    ("", "unet"),
)

# End of a name -> the layer's role in the product; group 1 says which factor.
_ROLES = tuple(
    re.compile(ending)
    for ending in (
        r"\.lora_(down|up|mid)\.weight$",
        r"\.lora_([AB])(?:\.default)?\.weight$",
        r"(?:\.lora|_lora|\.lora_linear_layer)\.(down|up)\.weight$",
        r"(?:\.lora|_lora|\.lora_linear_layer)?\.(alpha)$",
    )
)
_ROLE_NAMES = {"A": "down", "B": "up"}

OTHER_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"dora_scale$|lora_magnitude_vector", "a DoRA (it rescales weights by their length)"),
        (r"\.hada_[wt]\d", "a LoHa (a product taken element by element)"),
        (r"\.lokr_[wt]\d", "a LoKr (a Kronecker product)"),
        (r"\.b?oft_(blocks|diag)|\.oft_R\b", "an OFT (it rotates weights)"),
        (r"\.on_input$|\.ia3_l", "an IA3 (it rescales activations)"),
        (r"\.[ab][12]\.weight$", "a GLoRA"),
        (r"\.lora_embedding_[AB]|(^|\.)emb_params$|^bundle_emb\.", "one that brings new words (embeddings)"),
        (r"\.lora_[AB](\.default)?\.bias$|\.lora_(up|down)\.bias$", "one that changes biases"),
        (r"\.diff(_b)?$|\.[wb]_norm$", "one that holds whole differences (LyCORIS full or norm)"),
    )
)
OTHER_FAMILIES = (
    (re.compile(r"double_blocks_|single_blocks_|single_transformer_blocks|double_stream"), "Flux"),
    (re.compile(r"joint_blocks_|attn_add_[kq]_proj|attn\.add_[kq]_proj"), "SD 3"),
    (re.compile(r"^(transformer|diffusion_model)\."), "a transformer model (Flux, SD 3 or newer)"),
    (re.compile(r"motion_modules"), "AnimateDiff"),
)


def split(spelling: str) -> tuple[str, str]:
    """ "lora_unet_x" -> ("unet", "x")."""
    prefix, part = next((prefix, part) for prefix, part in _PREFIXES if spelling.startswith(prefix))
    return part, spelling[len(prefix) :].replace(".processor.", ".")


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


def role_of(name: str) -> tuple[str, str] | None:
    """(layer as the file spells it, role of the tensor in the product), None for a name that plays none."""
    match = next((match for role in _ROLES if (match := role.search(name))), None)
    return None if match is None else (name[: match.start()], _ROLE_NAMES.get(match[1], match[1]))
