"""OpenCLIP's text models in LDM files, in the terms of transformers: other names, q, k and v in one tensor.

SD 2.x brings OpenCLIP-H, SDXL OpenCLIP-bigG as its second text encoder. Source of the left column:
mlfoundations/open_clip, transformer.py (ResidualAttentionBlock, TextTransformer).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ledits_min.config import TextConfig
from ledits_min.files.header import TensorInfo

_LAYER = re.compile(r"transformer\.resblocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_IN_PROJECTION = re.compile(r"attn\.in_proj_(?P<kind>weight|bias)")
_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class Piece(NamedTuple):
    """A tensor of ours inside one of OpenCLIP's: its rows (None: all), transposed or not, and what it is then."""

    name: str
    info: TensorInfo
    rows: tuple[int, int] | None = None
    transposed: bool = False


def is_openclip(name: str) -> bool:
    """A name that only an OpenCLIP text model has."""
    return name in ("positional_embedding", "ln_final.weight") or name.startswith("transformer.resblocks.")


def is_unused(name: str, config: TextConfig) -> bool:
    """The temperature of CLIP's training, layers behind the last one read, and the projection where nobody pools."""
    match = _LAYER.fullmatch(name)
    behind = match is not None and int(match["layer"]) == config.num_hidden_layers
    return name == "logit_scale" or behind or (name == "text_projection" and not config.projection_dim)


def pieces(name: str, info: TensorInfo) -> Iterator[Piece]:
    """What an OpenCLIP tensor is in our terms; an unknown name stays as it is, to be reported later."""
    match = _LAYER.fullmatch(name)
    if match is None:
        # OpenCLIP multiplies with its projection from the right, a linear layer from the left.
        transposed = name == "text_projection" and len(info.shape) == 2
        shape = info.shape[::-1] if transposed else info.shape
        yield Piece(_TOP.get(name, name), info._replace(shape=shape), None, transposed)
        return
    block, rest = f"encoder.layers.{match['layer']}", match["rest"]
    if (joint := _IN_PROJECTION.fullmatch(rest)) and info.shape and info.shape[0] % 3 == 0:
        rows, bytes_each = info.shape[0] // 3, (info.end - info.begin) // 3
        for i, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            begin = info.begin + i * bytes_each
            third = TensorInfo(info.dtype, (rows, *info.shape[1:]), begin, begin + bytes_each)
            yield Piece(f"{block}.self_attn.{projection}.{joint['kind']}", third, (i * rows, (i + 1) * rows))
        return
    module, _, parameter = rest.rpartition(".")
    yield Piece(f"{block}.{_INSIDE.get(module, module)}.{parameter}", info)
