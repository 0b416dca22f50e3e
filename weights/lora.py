"""LoRA files: which weights of a checkpoint a file changes, found from its names and shapes alone.

A LoRA [2106.09685] stores for some layers two thin matrices whose product is added to the layer's weight:
W' = W + scale * alpha / rank * up @ down. names/lora.py knows what a layer is called; a name that fits no layer is
refused.

Nothing is read but the header; merge.py does the arithmetic.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ledits_min.config import UNetConfig
from ledits_min.errors import InputError, check_number, quoted
from ledits_min.files.header import Header, read_header
from ledits_min.weights.names.lora import OTHER_FAMILIES, OTHER_KINDS, role_of, spellings, split
from ledits_min.weights.read.family import Stored, stored
from ledits_min.weights.read.folder import read_json
from ledits_min.weights.read.shapes import FLOAT_DTYPES, Shape, Shapes

MAX_SCALE = 100.0
LoraSource = str | Path | tuple[str | Path, float]


class Update(NamedTuple):
    """What is added to one weight: the factors, and strength = alpha / rank (alpha / sqrt(rank) for rsLoRA).

    `alpha` is a number, or the tensor that holds it. `mid` is there where a convolution is factored in three (LoCon).
    """

    down: Stored
    up: Stored
    mid: Stored | None
    alpha: float | Stored
    root: bool

    @property
    def rank(self) -> int:
        return self.down.info.shape[0]

    def strength(self, alpha: float) -> float:
        return alpha / math.sqrt(self.rank) if self.root else alpha / self.rank


@dataclass(frozen=True)
class Lora:
    """A file with the strength it is merged at; `updates` maps part -> {our name of a weight: what is added to it}."""

    path: Path
    scale: float
    updates: Mapping[str, Mapping[str, Update]]

    def __str__(self) -> str:
        """One line for people: what was merged into what."""
        ranks = sorted({update.rank for part in self.updates.values() for update in part.values()})
        counts = " and ".join(f"{len(names)} of the {part}'s" for part, names in self.updates.items() if names)
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} .. {ranks[-1]}"
        return f"lora: {quoted(self.path)} merged at scale {self.scale:g} into {counts} weights, rank {rank}"


@dataclass
class _Module:
    """The tensors of one layer while they are gathered: role -> tensor."""

    roles: dict[str, Stored] = field(default_factory=dict)
    alpha: float | None = None
    root: bool = False


def lora_pairs(lora: LoraSource | Sequence[LoraSource]) -> list[tuple[Path, float]]:
    """[(path, scale)] from what a caller passed: a path, a (path, scale) pair, or a list of either."""
    items: list[Any] = [lora] if isinstance(lora, str | Path) or _is_pair(lora) else [*lora]
    pairs = []
    for item in items:
        path, scale = item if _is_pair(item) else (item, 1.0)
        if not isinstance(path, str | Path):
            raise InputError(f"lora holds {quoted(item, 80)}; a path or a (path, scale) pair is wanted")
        check_number(f"scale of the LoRA {quoted(path)}", scale, -MAX_SCALE, MAX_SCALE)
        pairs.append((Path(path), float(scale)))
    return pairs


def survey_lora(path: Path, scale: float, shapes: Mapping[str, Shapes], unet: UNetConfig) -> Lora:
    """Find the weight behind every name in the file; `shapes` maps part -> {our name: shape}.

    Raises InputError for a name that fits no weight, a shape that does not fit its weight, a file made for another
    family, and every kind of add-on that is not a plain product of factors.
    """
    if path.is_dir():
        raise InputError(f"{quoted(path)} is a folder; pass the LoRA's .safetensors file in it")
    header = read_header(path)
    source = quoted(path)
    _refuse_other_kinds(header, source)
    modules, strange = _modules(stored(path, header), source)
    _refuse_other_families(modules, unet, source)
    _add_peft_settings(modules, header, path)
    tables = {part: spellings(part, names, unet) for part, names in shapes.items()}
    updates: dict[str, dict[str, Update]] = {part: {} for part in shapes}
    for spelling, module in modules.items():
        part, inner = split(spelling)
        name = tables.get(part, {}).get(inner)
        if name is None:
            strange.append(spelling)
        elif name in updates[part]:
            raise InputError(f"{source} changes {quoted(name, 80)} of the {part} twice; use an unmodified LoRA")
        else:
            updates[part][name] = _update(spelling, module, shapes[part][name], source)
    if strange:
        shown = ", ".join([*(quoted(name, 80) for name in strange[:5]), *(["..."] if len(strange) > 5 else [])])
        raise InputError(
            f"{source}: {len(strange)} of its names match nothing in this model ({shown}); it was made for another "
            "model, or is no plain LoRA"
        )
    return Lora(path, scale, updates)


_CONTEXT_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


def _modules(tensors: Mapping[str, Stored], source: str) -> tuple[dict[str, _Module], list[str]]:
    """Layer as the file spells it -> its tensors; and the names that play no role in a LoRA."""
    modules: dict[str, _Module] = {}
    strange = []
    for name, tensor in tensors.items():
        found = role_of(name)
        if found is None:
            strange.append(name)
            continue
        layer, role = found
        if tensor.info.dtype not in FLOAT_DTYPES and role != "alpha":
            raise InputError(f"{source}: {quoted(name, 80)} has dtype {tensor.info.dtype}; a LoRA of floats is wanted")
        roles = modules.setdefault(layer, _Module()).roles
        if role in roles:
            twice = f"{quoted(roles[role].name, 80)} and {quoted(name, 80)}"
            raise InputError(f"{source} holds one tensor twice, as {twice}; use an unmodified LoRA")
        roles[role] = tensor
    return modules, strange


def _update(spelling: str, module: _Module, shape: Shape, source: str) -> Update:
    """The gathered tensors of one layer, checked against the weight they change."""
    down, up, mid = (module.roles.get(role) for role in ("down", "up", "mid"))
    if down is None or up is None:
        raise InputError(
            f"{source}: {quoted(spelling, 80)} has only {' and '.join(sorted(module.roles))}; down and up are needed, "
            "so the file is damaged"
        )
    if not _fits(shape, down.info.shape, up.info.shape, mid.info.shape if mid is not None else None):
        factors = " and ".join(str(list(t.info.shape)) for t in (down, mid, up) if t is not None)
        raise InputError(
            f"{source}: {quoted(spelling, 80)} is {factors}, which does not make the {list(shape)} of its weight; "
            "it was made for another model"
        )
    alpha = module.roles.get("alpha")
    if alpha is not None and alpha.info.numel != 1:
        raise InputError(f"{source}: {quoted(alpha.name, 80)} has shape {list(alpha.info.shape)}; one number is wanted")
    rank = float(down.info.shape[0])
    default = rank if module.alpha is None else module.alpha
    return Update(down, up, mid, default if alpha is None else alpha, module.root and alpha is None)


def _fits(weight: Shape, down: Shape, up: Shape, mid: Shape | None) -> bool:
    """Whether the factors make a weight of this shape; a 1x1 convolution and a linear layer are the same."""
    if not all(len(shape) in (2, 4) for shape in (weight, down, up)) or down[0] < 1:
        return False
    outputs, inputs, *kernel = (*weight, 1, 1)[:4]
    if mid is None:
        return (*down, 1, 1)[:4] == (down[0], inputs, *kernel) and (*up, 1, 1)[:4] == (outputs, down[0], 1, 1)
    return (
        (*down, 1, 1)[:4] == (down[0], inputs, 1, 1)
        and len(mid) == 4
        and mid[1:] == (down[0], *kernel)
        and (*up, 1, 1)[:4] == (outputs, mid[0], 1, 1)
    )


def _refuse_other_kinds(header: Header, source: str) -> None:
    for pattern, kind in OTHER_KINDS:
        name = next((name for name in header.tensors if pattern.search(name)), None)
        if name is not None:
            raise InputError(
                f"{source} is {kind}, see {quoted(name, 80)}; only LoRA and LoCon, products of up and down, are merged"
            )


def _refuse_other_families(modules: Mapping[str, _Module], unet: UNetConfig, source: str) -> None:
    """A LoRA for another model is told by its block names, else by how wide the text is that it reads."""
    wanted = _CONTEXT_FAMILIES.get(unet.cross_attention_dim, "this checkpoint")
    for pattern, family in OTHER_FAMILIES:
        if any(pattern.search(name) for name in modules):
            raise InputError(f"{source} is a LoRA for {family}; one made for {wanted} is wanted")
    for name, module in modules.items():
        down = module.roles.get("down")
        if re.search(r"attn2[._](processor\.)?to_[kv]$", name) and down is not None and len(down.info.shape) > 1:
            width = down.info.shape[1]
            if width != unet.cross_attention_dim:
                family = _CONTEXT_FAMILIES.get(width, "another model")
                raise InputError(
                    f"{source} is a LoRA for {family}: it reads texts {width} wide, this checkpoint's are "
                    f"{unet.cross_attention_dim}; one made for {wanted} is wanted"
                )
            return


def _add_peft_settings(modules: Mapping[str, _Module], header: Header, path: Path) -> None:
    """peft keeps alpha outside the tensors: in the file's metadata (diffusers), or in adapter_config.json beside it."""
    settings: dict[str, Any] = {}
    source = f"{quoted(path)} (lora_adapter_metadata)"
    if "lora_adapter_metadata" in header.metadata:
        try:
            settings = json.loads(header.metadata["lora_adapter_metadata"])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not JSON ({quoted(error, 80)}); download the LoRA again") from error
        if not isinstance(settings, dict):
            raise InputError(f"{source} is not a JSON object; download the LoRA again")
    elif any(name.startswith("base_model.model.") for name in modules):
        beside = path.with_name("adapter_config.json")
        source = quoted(beside)
        settings = read_json(beside)
    for spelling, module in modules.items():
        part, inner = split(spelling)
        prefix = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}[part]
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        _apply_settings(module, inner, own or settings, source)


def _apply_settings(module: _Module, inner: str, settings: Mapping[str, Any], source: str) -> None:
    """lora_alpha, alpha_pattern {end of a layer's name: alpha}, use_rslora; what else changes the sum is refused."""
    for key in ("use_dora", "lora_bias"):
        if settings.get(key):
            raise InputError(f"{source} sets {key}, which is not supported; only LoRA and LoCon are merged")
    patterns = settings.get("alpha_pattern") or {}
    alpha = settings.get("lora_alpha")
    if isinstance(patterns, dict):
        alpha = next((value for key, value in patterns.items() if f".{inner}".endswith(f".{key}")), alpha)
    if alpha is not None:
        check_number(f"{source}: lora_alpha", alpha, -1e6, 1e6)
        module.alpha, module.root = float(alpha), bool(settings.get("use_rslora"))
