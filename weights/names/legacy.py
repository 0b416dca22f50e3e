"""Older spellings of the same tensors (VAE attention, text-model prefix), and keys that carry no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ledits_min.config import TextConfig

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(r"(?P<block>.*\.attentions\.\d+)\.(?P<layer>query|key|value|proj_attn)\.(?P<rest>\w+)")

# What a training run leaves in a file beside the weights: the noise schedule, the state of its averages.
_BUFFERS = frozenset(
    [
        *("alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "lvlb_weights"),
        *(
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_variance",
        ),
        *("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
        *(
            "sqrt_recipm1_alphas_cumprod",
            "scale_factor",
            "global_step",
            "model_ema.decay",
            "model_ema.num_updates",
        ),
    ]
)
_LAYER = re.compile(r"(text_model\.)?encoder\.layers\.(?P<number>\d{1,4})\.")
_TENSORS_PER_LAYER = 16
_PICTURE_HALF = ("vision_model.", "visual_projection.", "visual.")


def modern_vae_name(name: str) -> str:
    """`...attentions.0.query.weight` -> `...attentions.0.to_q.weight`; other names unchanged.

    diffusers renamed these layers in version 0.13; most published VAEs still carry the old names.
    """
    match = _OLD_ATTENTION_NAME.fullmatch(name)
    return f"{match['block']}.{_OLD_ATTENTION[match['layer']]}.{match['rest']}" if match else name


def flat_text_name(name: str) -> str:
    """Drop the `text_model.` that transformers wrote before 5.6; modules in memory have no such prefix."""
    return name.removeprefix("text_model.")


def is_position_ids(name: str) -> bool:
    """0 .. 76, recomputed by the model: absent, whole or ruined by a merge, it never matters."""
    return name.endswith("position_ids")


def is_buffer(name: str) -> bool:
    """A key of a single file that describes its training, not its weights."""
    return name in _BUFFERS


def is_picture_half(name: str) -> bool:
    """The half of a full CLIP that looks at pictures, which Stable Diffusion does not use."""
    return name.startswith(_PICTURE_HALF)


def is_unread_by_text(name: str, config: TextConfig) -> bool:
    """What a text encoder may bring and nobody reads: CLIP's temperature, its projection where none is wanted."""
    return name == "logit_scale" or (name.startswith("text_projection") and not config.projection_dim)


def layers_behind(names: Iterable[str], config: TextConfig) -> set[str]:
    """Tensors of whole layers behind the last one that the config counts, which is how a folder says "clip skip"."""
    layers: dict[int, set[str]] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers.setdefault(int(match["number"]), set()).add(name)
    count = config.num_hidden_layers
    found: set[str] = set()
    while len(layers.get(count, ())) == _TENSORS_PER_LAYER:
        found |= layers[count]
        count += 1
    return found
