"""Tell from names and shapes alone what a safetensors file holds: its parts, their dialect, their family.

Nothing defaults to Stable Diffusion 1.x. A file is what its own tensors say, and what is not supported is
refused by name with the way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ledits_min.config import TextConfig, UNetConfig
from ledits_min.errors import InputError, quoted
from ledits_min.files.header import Header, TensorInfo
from ledits_min.weights.names import ldm, legacy, openclip
from ledits_min.weights.read.published import FAMILIES, Config

PARTS = ("unet", "vae", "text", "text_2")
SUPPORTED = "supported are Stable Diffusion 1.x, 2.x and XL checkpoints"
INSIST = "pass --insist (insist=True)"


class Stored(NamedTuple):
    """Where one tensor lies: the file, its name in it, and what the header says of it.

    It may be some rows of the one in the file, or its transpose: `info` then describes what it is to us.
    """

    path: Path
    name: str
    info: TensorInfo
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """What one file, or one part of a folder, holds.

    parts     "unet", "vae", "text", "text_2" -> {name inside the part, as the file spells it: tensor}
    dialects  the same keys -> "LDM" or "diffusers"
    ignored   why tensors are left aside -> how many
    unknown   names that belong to no part
    markers   which of the marker tensors v_pred and ztsnr are there
    refusal   completes the sentence "<file> ..." where the family is not supported
    """

    family: str
    dialects: Mapping[str, str]
    parts: Mapping[str, Mapping[str, Stored]]
    ignored: Mapping[str, int]
    unknown: tuple[str, ...]
    markers: frozenset[str]
    refusal: str | None


def stored(path: Path, header: Header) -> dict[str, Stored]:
    """The header's tensors with the file they lie in."""
    return {name: Stored(path, name, info) for name, info in header.tensors.items()}


def identify(tensors: Mapping[str, Stored], folder_part: str | None = None, insist: bool = False) -> Layout:
    """Sort the tensors of a file into parts and name the family; reads nothing.

    `folder_part` is the part that the file's folder is named after: it tells a second text encoder of unusual size.
    With `insist` a name beside a UNet gives nothing away: the UNet's own tensors say what the file is.
    """
    parts: dict[str, dict[str, Stored]] = {}
    dialects: dict[str, str] = {}
    ignored: dict[str, int] = {}
    rest: dict[str, Stored] = {}
    markers = set()
    for name, tensor in tensors.items():
        if (reason := _ignorable(name)) is not None:
            ignored[reason] = ignored.get(reason, 0) + 1
        elif name in ("v_pred", "ztsnr"):
            markers.add(name)
        elif (match := _prefixed(name)) is not None:
            part, inner = match
            parts.setdefault(part, {})[inner] = tensor
            dialects[part] = "LDM"
        else:
            rest[name] = tensor
    if not parts and (alone := _bare_part(rest)) is not None:
        part, dialect = alone
        if part == "text" and (folder_part == "text_2" or _text_width(rest) == 1280):
            part = "text_2"
        dialects[part] = dialect
        parts[part] = {name: tensor for name, tensor in rest.items() if not legacy.is_picture_half(name)}
        if beside := len(rest) - len(parts[part]):
            ignored["picture half of CLIP"] = beside
        rest = {}
    family, refusal = _family(tensors, parts, rest, insist)
    return Layout(family, dialects, parts, ignored, tuple(sorted(rest)), frozenset(markers), refusal)


def our_names(layout: Layout, part: str, config: Config, source: str) -> dict[str, Stored]:
    """The tensors of one part under the names of our modules; unknown names stay, to be reported later."""
    result: dict[str, Stored] = {}
    for spelled, ours, tensor in _renamed(layout, part, config):
        if ours in result:
            raise InputError(
                f"{source} holds the tensor {quoted(ours, 80)} twice, as {quoted(result[ours].name, 80)} and "
                f"as {quoted(spelled, 80)}; use an unmodified checkpoint"
            )
        result[ours] = tensor
    return result


_TRANSFORMER_LAYER = re.compile(r"(?P<block>.+)\.transformer_blocks\.(?P<layer>\d{1,3})\.")


def pruned(config: UNetConfig, layout: Layout) -> UNetConfig:
    """The same UNet with as many transformer layers as the names of a file tell: SDXL's relatives have fewer.

    SSD-1B and Vega [2401.02677] differ from SDXL in nothing else; the middle may have lost its transformer, too. Where
    the names tell nothing sensible, the config stays as it is, and is what they are then held against.
    """
    names, blocks = layout.parts["unet"], dict(ldm.unet_blocks(config))
    counts: dict[str, int] = {}
    for name in names:
        if match := _TRANSFORMER_LAYER.match(name):
            counts[match["block"]] = max(counts.get(match["block"], 0), int(match["layer"]) + 1)

    def spelled(block: str) -> str:
        return blocks[block] if layout.dialects["unet"] == "LDM" else block

    def counted(side: str, published: Sequence[Sequence[int]]) -> tuple[int | tuple[int, ...], ...]:
        depths = [
            tuple(counts.get(spelled(f"{side}.{level}.attentions.{layer}"), 0) for layer in range(len(layers)))
            if any(layers)
            else (1,)
            for level, layers in enumerate(published)
        ]
        return tuple(one[0] if len(set(one)) == 1 else one for one in depths)

    down, up = counted("down_blocks", config.down_depths), counted("up_blocks", config.up_depths)
    plain = down == (1,) * len(down)
    found = replace(
        config,
        transformer_layers_per_block=() if plain else down,
        reverse_transformer_layers_per_block=() if up == down[::-1] else up,
        mid_block_type=config.mid_block_type if counts.get(spelled("mid_block.attentions.0")) else "UNetMidBlock2D",
    )
    told = [depth for level in (*found.down_depths, *found.up_depths) for depth in level]
    were = [depth for level in (*config.down_depths, *config.up_depths) for depth in level]
    sound = all(0 < depth <= most for depth, most in zip(told, were, strict=True) if most)
    return found if sound and found.down_depths != config.down_depths else config


def _renamed(layout: Layout, part: str, config: Config) -> Iterator[tuple[str, str, Stored]]:
    """(name in the file, our name, tensor), without what a text encoder brings and nobody reads."""
    tensors = layout.parts[part]
    if isinstance(config, TextConfig):
        behind = legacy.layers_behind(tensors, config)
        read = {name: t for name, t in tensors.items() if name not in behind and not _is_unread(name, config)}
        if any(openclip.is_openclip(name) for name in tensors):
            for name, tensor in read.items():
                for ours, info, rows, transposed in openclip.pieces(name, tensor.info):
                    yield tensor.name, ours, Stored(tensor.path, tensor.name, info, rows, transposed)
        else:
            yield from ((tensor.name, legacy.flat_text_name(name), tensor) for name, tensor in read.items())
        return
    table: Mapping[str, str] = {}
    if layout.dialects[part] == "LDM":
        table = ldm.unet_table(config) if isinstance(config, UNetConfig) else ldm.vae_table(config)
    for name, tensor in tensors.items():
        ours = table.get(name, name)
        yield tensor.name, legacy.modern_vae_name(ours) if part == "vae" else ours, tensor


def _is_unread(name: str, config: TextConfig) -> bool:
    return openclip.is_unused(name, config) or legacy.is_unread_by_text(name, config)


def old_attention_names(layout: Layout) -> bool:
    """Whether the VAE still spells its attention query, key, value, proj_attn."""
    return any(legacy.modern_vae_name(name) != name for name in layout.parts.get("vae", {}))


def _ignorable(name: str) -> str | None:
    if legacy.is_buffer(name):
        return "training buffers"
    if name.startswith(ldm.EMA_PREFIX):
        return "EMA copy of the UNet"
    if legacy.is_position_ids(name):
        return "position_ids (recomputed)"
    if name.startswith(("loss.", f"{ldm.VAE_PREFIX}loss.", f"{ldm.VAE_PREFIX}{ldm.EMA_PREFIX}")):
        return "training loss of the VAE"
    return None


def _prefixed(name: str) -> tuple[str, str] | None:
    return next(((part, name[len(prefix) :]) for part, prefix in ldm.PREFIXES if name.startswith(prefix)), None)


def _bare_part(names: Iterable[str]) -> tuple[str, str] | None:
    """(part, dialect) of a file without prefixes, from the names only that part has."""
    names = set(names)
    for signature, part, dialect in (
        ({"input_blocks.0.0.weight", "time_embed.0.weight"}, "unet", "LDM"),
        ({"conv_in.weight", "time_embedding.linear_1.weight"}, "unet", "diffusers"),
        ({"decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"}, "vae", "LDM"),
        ({"decoder.conv_in.weight", "decoder.mid_block.resnets.0.conv1.weight"}, "vae", "diffusers"),
        ({"text_model.embeddings.token_embedding.weight"}, "text", "diffusers"),
        ({"embeddings.token_embedding.weight", "final_layer_norm.weight"}, "text", "diffusers"),
        ({"token_embedding.weight", "ln_final.weight"}, "text", "LDM"),
    ):
        if signature <= names:
            return part, dialect
    return None


_REFINER = "pass the base model, whose pictures it only polishes"
# What a name somewhere in the file gives away, in this order: (pattern, family, what to do).
_FOREIGN: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), family, advice)
    for pattern, family, advice in (
        (r"lora_|\.lora\.|hada_w|lokr_|oft_blocks|dora_scale", "LoRA",
         "it only changes another checkpoint: pass that one as --model, and this file as --lora (lora=)"),
        (r"^control_model\.|^controlnet_|^input_hint_block\.", "ControlNet",
         "it only steers another checkpoint: pass that one"),
        (r"^ip_adapter\.|^image_proj\.", "IP-Adapter", "it only steers another checkpoint: pass that one"),
        (r"^string_to_param|^emb_params$|^clip_[lg]$|^<.+>$", "textual inversion",
         "it is a word, not a model: pass a checkpoint as --model, and this file as --embedding (embedding=)"),
        (r"^residuals$", "saved inversion", "pass it where the picture goes, and a checkpoint here"),
        (r"time_stack|time_mixer|motion_modules|temporal_transformer", "video model", SUPPORTED),
        (r"(^|\.)double_blocks\.|(^|\.)single_transformer_blocks\.", "Flux", f"not supported; {SUPPORTED}"),
        (r"(^|\.)joint_blocks\.|\.attn\.add_[kq]_proj\.", "SD 3", f"not supported; {SUPPORTED}"),
        (r"(^|\.)clip_(txt_|text_)?(pooled_)?mapper\.", "Stable Cascade", f"not supported; {SUPPORTED}"),
        (r"(^|\.)(t_block\.1|adaln_single\.linear)\.weight$", "PixArt", f"not supported; {SUPPORTED}"),
        (r"(^|\.)mlp_t5\.0\.weight$", "Hunyuan-DiT", f"not supported; {SUPPORTED}"),
        (r"(^|\.)double_layers\.0\.attn\.", "AuraFlow", f"not supported; {SUPPORTED}"),
        (r"(^|\.)cap_embedder\.", "Lumina", f"not supported; {SUPPORTED}"),
        (r"(^|\.)transformer_blocks\.0\.img_mod\.", "Qwen-Image", f"not supported; {SUPPORTED}"),
        (r"(^|\.)head\.modulation$", "Wan", f"not supported; {SUPPORTED}"),
        (r"^noise_augmentor\.|^embedder\.model\.visual\.|^class_embedding\.linear_1\.", "SD 2.x unCLIP",
         f"it is told a picture, not a text; {SUPPORTED}"),
        (r"(^|\.)edm_(mean|std)$|(^|\.)edm_vpred\.", "SDXL with EDM noise levels",
         f"such as Playground 2.5 or CosXL, whose schedule is not supported; {SUPPORTED}"),
        (r"^conditioner\.embedders\.0\.model\.", "SDXL refiner", _REFINER),
    )
)  # fmt: skip

_PROVEN = {"SD 2.x unCLIP", "SDXL with EDM noise levels", "SDXL refiner"}

# Weights in 8 bits that are worth nothing without the factors stored beside them.
_SCALED = re.compile(r"(^|\.)(scaled_fp8|comfy_quant)$|\.(scale_weight|weight_scale|weight_scale_inv|scale_input)$")

_CONTEXT_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}
_TEXT_FAMILIES = {768: "SD 1.x or SDXL", 1024: "SD 2.x", 1280: "SDXL"}
_SPECIAL_INPUTS = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth-to-image", 7: "upscaler"}
ANY_VAE = "SD 1.x, SD 2.x or SDXL"


def configs_of(layout: Layout) -> Mapping[str, Config]:
    """What every part of a file without configs must look like: as in its family, or in the first that has such."""
    of_family = next((family.configs for family in FAMILIES if family.name == layout.family), {})
    found: dict[str, Config] = {}
    for configs in (of_family, *(family.configs for family in FAMILIES)):
        found = {**configs, **found}
    return found


def _family(
    tensors: Iterable[str], parts: Mapping[str, Mapping[str, Stored]], rest: Collection[str], insist: bool
) -> tuple[str, str | None]:
    """(family, refusal or None) from give-away names, then from the widths of the parts; `rest` lies in none of them.

    A name in a part is proof. One beside a UNet may be left over, unless it says how the UNet itself was trained.
    """
    names = list(tensors)
    beside = set(rest) if "unet" in parts else set()
    proof = _give_away(names, lambda name, family: name not in beside or family in _PROVEN)
    foreign = proof if proof is not None or insist else _give_away(names)
    family = foreign[1] if foreign is not None else _family_by_width(parts)
    channels = _input_channels(parts.get("unet", {}))
    if channels is not None and channels in _SPECIAL_INPUTS and family.startswith("SD"):
        kind = _SPECIAL_INPUTS[channels]
        return f"{family} {kind}", (
            f"is the {kind} variant of {family}: its UNet takes {channels} channels where editing has 4; "
            "pass the plain checkpoint it was made from"
        )
    if foreign is not None:
        left_over = next(name for name in names if foreign[0].search(name))
        way_out = f"; if {quoted(left_over, 60)} was only left in a plain checkpoint, {INSIST}" if proof is None else ""
        return family, f"is {_article(family)} {family} file: {foreign[2]}{way_out}"
    if family == "SDXL refiner":
        return family, f"is an SDXL refiner file: {_REFINER}"
    if family == "SD 3 or Flux":
        return family, f"is {_article(family)} {family} file: not supported; {SUPPORTED}"
    if (scaled := next((name for name in names if _SCALED.search(name)), None)) is not None:
        return family, (
            f"keeps its weights as scaled fp8 (see {quoted(scaled, 80)}), which is not supported; "
            "pass its float16 version"
        )
    if family == "unknown":
        shown = ", ".join(quoted(name, 60) for name in sorted(names)[:3])
        return (
            family,
            f"holds no Stable Diffusion weights that are known here (its tensors: {shown}, ...); {SUPPORTED}",
        )
    return family, None


def _give_away(
    names: Sequence[str], counts: Callable[[str, str], bool] = lambda name, family: True
) -> tuple[re.Pattern[str], str, str] | None:
    """The first rule of _FOREIGN that one of the names meets, of those that count for its family."""
    return next(
        (rule for rule in _FOREIGN if any(rule[0].search(name) and counts(name, rule[1]) for name in names)), None
    )


def _family_by_width(parts: Mapping[str, Mapping[str, Stored]]) -> str:
    if unet := parts.get("unet"):
        contexts = [t.info.shape[-1] for n, t in unet.items() if n.endswith("attn2.to_k.weight") and t.info.shape]
        return _CONTEXT_FAMILIES.get(contexts[0], "SD, another size") if contexts else "unknown"
    if text := parts.get("text_2") or parts.get("text"):
        width = _text_width(text)
        return _TEXT_FAMILIES.get(width, "SD, another size") if width else "unknown"
    if vae := parts.get("vae"):
        latents = vae.get("decoder.conv_in.weight")
        channels = latents.info.shape[1] if latents is not None and len(latents.info.shape) == 4 else 4
        return "SD 3 or Flux" if channels == 16 else ANY_VAE
    return "unknown"


def _text_width(tensors: Mapping[str, Stored]) -> int:
    widths = [t.info.shape[-1] for n, t in tensors.items() if n.endswith("token_embedding.weight") and t.info.shape]
    return widths[0] if widths else 0


def _input_channels(unet: Mapping[str, Stored]) -> int | None:
    first = unet.get("input_blocks.0.0.weight") or unet.get("conv_in.weight")
    return first.info.shape[1] if first is not None and len(first.info.shape) == 4 else None


def _article(family: str) -> str:
    return "an" if family.startswith(("SD", "IP")) else "a"
