"""Whether the parts of a checkpoint fit each other: the check between finding them and reading them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ledits_min.config import TextConfig, UNetConfig, VAEConfig
from ledits_min.errors import InputError
from ledits_min.weights.read.folder import option
from ledits_min.weights.read.published import Config, family_of, parts_of

CLIP_VOCABULARY = 49408
_SIZE_NUMBERS = 6  # height and width of the original, offset of the crop, height and width wanted


def check_parts(configs: Mapping[str, Config], source: str) -> None:
    """Every part is there and all are of one family; InputError with the way out if not."""
    unet = configs.get("unet")
    wanted = parts_of(unet) if isinstance(unet, UNetConfig) else ("unet", "vae", "text")
    missing = [part for part in wanted if part not in configs]
    if missing:
        _refuse_incomplete(missing, list(configs), source)
    unet, vae, text = configs["unet"], configs["vae"], configs["text"]
    assert isinstance(unet, UNetConfig) and isinstance(vae, VAEConfig) and isinstance(text, TextConfig)
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise InputError(
            f"{source}: the unet takes {unet.in_channels} and gives {unet.out_channels} channels, the "
            f"vae has {vae.latent_channels}; use parts of one family"
        )
    second = configs.get("text_2")
    if second is not None and "text_2" not in wanted:
        raise InputError(f"{source}: there is a second text encoder, as SDXL has, but the unet reads one; drop it")
    width, encoders = text.hidden_size, "the text encoder is"
    if isinstance(second, TextConfig):
        width, encoders = width + second.hidden_size, "the two text encoders together are"
        _check_pooled(unet, second, source)
    if width != unet.cross_attention_dim:
        raise InputError(
            f"{source}: {encoders} {width} wide, the unet wants {unet.cross_attention_dim}; use parts of one family"
        )


def check_vocabulary(configs: Mapping[str, Config], tokenizers: Mapping[str, Path | None], source: str) -> None:
    """A text encoder whose words are not CLIP's needs its own tokenizer."""
    for part, tokenizer in tokenizers.items():
        text = configs.get(part)
        if isinstance(text, TextConfig) and tokenizer is None and text.vocab_size != CLIP_VOCABULARY:
            raise InputError(
                f"{source} brings no tokenizer and its text encoder knows {text.vocab_size} tokens, not "
                f"CLIP's {CLIP_VOCABULARY}; pass tokenizer= with its folder"
            )


def check_scale(unet: Config | None, vae: Config, source: str) -> None:
    """A VAE of the same shape may speak another latent language, which only its scaling factor betrays."""
    family = family_of(unet) if isinstance(unet, UNetConfig) else None
    if family is not None:
        check_latents(family.configs["vae"], vae, source, f"use a VAE of {family.title}")


def check_latents(own: Config | None, vae: Config, source: str, way_out: str = "use a VAE of its own family") -> None:
    """A VAE in the place of `own` must make latents of the same size and scale; that it fits the UNet is not enough."""
    if not isinstance(own, VAEConfig) or not isinstance(vae, VAEConfig):
        return
    if vae.factor != own.factor:
        raise InputError(
            f"{source}: this VAE makes one latent of {vae.factor} x {vae.factor} pixels, the one that the unet was "
            f"trained with {own.factor} x {own.factor}; {way_out}"
        )
    if vae.scaling_factor != own.scaling_factor:
        raise InputError(
            f"{source}: scaling_factor {vae.scaling_factor} belongs to another family than the unet (its VAE "
            f"has {own.scaling_factor}); {way_out}"
        )


def _check_pooled(unet: UNetConfig, second: TextConfig, source: str) -> None:
    wanted = unet.projection_class_embeddings_input_dim - _SIZE_NUMBERS * unet.addition_time_embed_dim
    if second.projection_dim != wanted:
        raise InputError(
            f"{source}: the second text encoder pools a text to {second.projection_dim} numbers, the unet wants "
            f"{wanted}; use parts of one family"
        )


def _refuse_incomplete(missing: list[str], parts: list[str], source: str) -> None:
    found = " and ".join(parts) or "nothing"
    if "unet" in missing and parts:
        options = {"vae": "--vae (vae=)", "text": "--text-encoder (text_encoder=)"}
        uses = " or ".join(dict.fromkeys(options[part.removesuffix("_2")] for part in parts))
        raise InputError(
            f"{source} holds the {found} only, not a whole checkpoint: pass a checkpoint, and this file as {uses}"
        )
    supply = ", ".join(
        f"pass {option(part)} for the {part}" for part in missing if part != "text" or "text_2" not in missing
    )
    raise InputError(f"{source} holds no {' and no '.join(missing)} (found: {found}); {supply}")
