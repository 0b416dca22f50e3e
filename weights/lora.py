"""LoRA files: which weights of a checkpoint a file changes, found from its names and shapes alone.

A LoRA [2106.09685] stores for some layers two thin matrices whose product is added to the layer's weight. Its relatives
make the added matrix otherwise, and DoRA [2402.09353] rescales the sum; merge.py has the formulas. names/lora.py knows
what a layer is called; a name that fits no layer is refused.

Nothing is read but the header.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ledits_min.config import UNetConfig
from ledits_min.errors import InputError, check_number, quoted
from ledits_min.files.header import Header, read_header
from ledits_min.weights.adapter import Adapter, read_adapters
from ledits_min.weights.embedding import Embedding, bundled
from ledits_min.weights.names.lora import OTHER_FAMILIES, OTHER_KINDS, role_of, spellings, split
from ledits_min.weights.read.identify import Stored, stored
from ledits_min.weights.read.shapes import FLOAT_DTYPES, Shape, Shapes

MAX_SCALE = 100.0
LoraSource = str | Path | tuple[str | Path, float]


@dataclass(frozen=True)
class Update:
    """What is done to one weight: the factors of what is added, its strength, and the length it gets (DoRA).

    kind        "LoRA", "LoHa" or "LoKr": what the factors, role -> tensor, make together
    rank        what alpha is divided by; 0 for a LoKr of two whole matrices, which has no scale
    alpha       a number, or the tensor that holds it
    root        whether alpha is divided by the root of the rank (rsLoRA)
    magnitude   the length of every row of the weight, or of every column; None for no DoRA
    by_row      whether `magnitude` has one length per output (rows) or per input
    """

    kind: str
    factors: Mapping[str, Stored]
    rank: int
    alpha: float | Stored
    root: bool = False
    magnitude: Stored | None = None
    by_row: bool = True

    def strength(self, alpha: float) -> float:
        if not self.rank:
            return 1.0
        return alpha / math.sqrt(self.rank) if self.root else alpha / self.rank


@dataclass(frozen=True)
class Lora:
    """A file with the strength it is merged at; `updates` maps part -> {our name of a weight: what is done to it}.

    `words` are the new words that came with it (OneTrainer).
    """

    path: Path
    scale: float
    updates: Mapping[str, Mapping[str, Update]]
    words: tuple[Embedding, ...] = ()

    def __str__(self) -> str:
        """One line for people: what was merged into what."""
        updates = [update for part in self.updates.values() for update in part.values()]
        ranks = sorted({update.rank for update in updates if update.rank})
        counts = " and ".join(f"{len(names)} of the {part}'s" for part, names in self.updates.items() if names)
        rank = f", rank {ranks[0]}{f' .. {ranks[-1]}' if len(ranks) > 1 else ''}" if ranks else ""
        kinds = sorted({update.kind for update in updates})
        if any(update.magnitude is not None for update in updates):
            kinds.append("DoRA")
        kind = "" if kinds == ["LoRA"] else f" ({' and '.join(kinds)})"
        return f"lora: {quoted(self.path)}{kind} merged at scale {self.scale:g} into {counts} weights{rank}"


@dataclass
class _Module:
    """The tensors of one layer while they are gathered: role -> tensor."""

    roles: dict[str, Stored] = field(default_factory=dict)


def lora_pairs(lora: LoraSource | Sequence[LoraSource]) -> list[tuple[str | Path, float]]:
    """[(source, scale)] from what a caller passed: a path or id, a (path, scale) pair, or a list of either."""
    given: Any = lora
    alone = isinstance(given, str | Path) or _is_pair(given) or not isinstance(given, Iterable)
    items = [given] if alone else [*given]
    pairs = []
    for item in items:
        path, scale = item if _is_pair(item) else (item, 1.0)
        if not isinstance(path, str | Path):
            raise InputError(f"lora holds {quoted(item, 80)}; a path or a (path, scale) pair is wanted")
        check_number(f"scale of the LoRA {quoted(path)}", scale, -MAX_SCALE, MAX_SCALE)
        pairs.append((path, float(scale)))
    return pairs


def survey_lora(path: Path, scale: float, shapes: Mapping[str, Shapes], unet: UNetConfig) -> Lora:
    """Find the weight behind every name in the file; `shapes` maps part -> {our name: shape}.

    Raises InputError for a name that fits no weight, a shape that does not fit its weight, a file made for another
    family, and every kind of add-on that is neither LoRA, LoCon, LoHa, LoKr nor one of them with DoRA.
    """
    if path.is_dir():
        raise InputError(f"{quoted(path)} is a folder; pass the LoRA's .safetensors file in it")
    header = read_header(path)
    source = quoted(path)
    _refuse_other_kinds(header, source)
    words, tensors = bundled(stored(path, header), source)
    modules, strange = _modules(tensors, source)
    _refuse_other_families(modules, unet, source)
    adapters = read_adapters(header, path, [name for name, module in modules.items() if "alpha" not in module.roles])
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
            layer = quoted(spelling, 80)
            updates[part][name] = _update(f"{source}: {layer}", module, shapes[part][name], adapters.get(part), inner)
    if strange:
        shown = ", ".join([*(quoted(name, 80) for name in strange[:5]), *(["..."] if len(strange) > 5 else [])])
        raise InputError(
            f"{source}: {len(strange)} of its names match nothing in this model ({shown}); it was made for another "
            "model, or is no plain LoRA"
        )
    return Lora(path, scale, updates, words)


_CONTEXT_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


def _modules(tensors: Mapping[str, Stored], source: str) -> tuple[dict[str, _Module], list[str]]:
    """Layer as the file spells it -> its tensors; and the names that play no role in a LoRA."""
    modules: dict[str, _Module] = {}
    strange = []
    adapters = set()
    for name, tensor in tensors.items():
        found = role_of(name)
        if found is None:
            strange.append(name)
            continue
        adapters |= {found.adapter} - {None}
        role = found.role
        if tensor.info.dtype not in FLOAT_DTYPES and role != "alpha":
            raise InputError(f"{source}: {quoted(name, 80)} has dtype {tensor.info.dtype}; a LoRA of floats is wanted")
        roles = modules.setdefault(found.layer, _Module()).roles
        if len(adapters) > 1:
            shown = " and ".join(quoted(adapter, 40) for adapter in sorted(map(str, adapters))[:3])
            raise InputError(f"{source} holds several adapters ({shown}); save each to a file of its own")
        if role in roles:
            twice = f"{quoted(roles[role].name, 80)} and {quoted(name, 80)}"
            raise InputError(f"{source} holds one tensor twice, as {twice}; use an unmodified LoRA")
        roles[role] = tensor
    return modules, strange


# The factors of each kind: those that are always there, or one of these sets; then those that may be.
_LORA, _LOHA = {"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_FACTORS: Sequence[tuple[str, set[str], str]] = [
    ("LoRA", _LORA, "down and up"),
    ("LoRA", _LORA | {"mid"}, ""),
    ("LoHa", _LOHA, "hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b"),
    ("LoHa", _LOHA | {"hada_t1", "hada_t2"}, ""),
    *(
        ("LoKr", first | second, "lokr_w1 and lokr_w2, or each as _a and _b")
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    ),
]


def _update(layer: str, module: _Module, shape: Shape, adapter: Adapter | None, inner: str) -> Update:
    """The gathered tensors of one layer, checked against the weight they change."""
    roles = module.roles
    factors = {role: tensor for role, tensor in roles.items() if role not in ("alpha", "magnitude", "dora_scale")}
    kind = next((kind for kind, wanted, _ in _FACTORS if wanted == set(factors)), None)
    if kind is None:
        needed = next((said for _, wanted, said in _FACTORS if said and wanted & set(factors)), "down and up")
        raise InputError(f"{layer} has only {' and '.join(sorted(roles))}; {needed} are needed, so the file is damaged")
    sizes = {role: tensor.info.shape for role, tensor in factors.items()}
    if not _fits(shape, sizes):
        found = " and ".join(str(list(size)) for size in sizes.values())
        raise InputError(
            f"{layer} is {found}, which does not make the {list(shape)} of its weight; it was made for another model"
        )
    alpha = roles.get("alpha")
    if alpha is not None and alpha.info.numel != 1:
        raise InputError(f"{layer}: its alpha has shape {list(alpha.info.shape)}; one number is wanted")
    rank = _rank(sizes)
    scaling = None if adapter is None or kind != "LoRA" else adapter.scaling(inner)
    magnitude, by_row = _magnitude(layer, roles, shape)
    if adapter is not None and adapter.decomposed and magnitude is None:
        raise InputError(f"{layer}: its settings say use_dora, but it has no magnitude; the file is damaged")
    if alpha is not None or scaling is None:
        return Update(kind, factors, rank, float(rank) if alpha is None else alpha, False, magnitude, by_row)
    return Update(kind, factors, rank, scaling.alpha, scaling.root, magnitude, by_row)


def _rank(sizes: Mapping[str, Shape]) -> int:
    """What alpha is divided by: the size over which the factors are summed; 0 where no factor is thin."""
    first = next((sizes[role] for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if role in sizes), (0,))
    return first[0]


def _magnitude(layer: str, roles: Mapping[str, Stored], weight: Shape) -> tuple[Stored | None, bool]:
    """(DoRA's lengths, whether they are those of the rows).

    peft has one per output always: (out,), or (1, out, 1, 1) for a convolution. LyCORIS and OneTrainer write
    dora_scale with the weight's number of axes, (out, 1, ..) or (1, in, ..), whichever they were told to.
    """
    if "magnitude" in roles and "dora_scale" in roles:
        raise InputError(f"{layer} has two magnitudes; use an unmodified LoRA")
    outputs, inputs = weight[:2]
    if (tensor := roles.get("magnitude")) is not None:
        if tensor.info.shape in ((outputs,), (1, outputs, 1, 1), (outputs, 1), (outputs, 1, 1, 1)):
            return tensor, True
    elif (tensor := roles.get("dora_scale")) is not None:
        for by_row, lengths in ((True, (outputs, 1, 1, 1)), (False, (1, inputs, 1, 1))):
            if (*tensor.info.shape, 1, 1, 1)[:4] == lengths and len(tensor.info.shape) <= 4:
                return tensor, by_row
    else:
        return None, True
    raise InputError(
        f"{layer}: its magnitude is {list(tensor.info.shape)}, and one length per output or per input of a weight of "
        f"{list(weight)} is wanted; it was made for another model"
    )


def _fits(weight: Shape, sizes: Mapping[str, Shape]) -> bool:
    """Whether the factors make a weight of this shape; a 1x1 convolution and a linear layer are the same."""
    if not all(len(size) in (2, 4) and min(size) > 0 for size in (weight, *sizes.values())):
        return False
    made = _made(sizes)
    return made is not None and (*made, 1, 1)[:4] in ((*weight, 1, 1)[:4], (weight[0], math.prod(weight[1:]), 1, 1))


def _made(sizes: Mapping[str, Shape]) -> Shape | None:
    """The shape of what the factors make together, None where they do not fit each other."""
    if "down" in sizes:
        down, up, mid = sizes["down"], sizes["up"], sizes.get("mid")
        return _chain(up, down) if mid is None else _tucker((up[1], up[0], *up[2:]), down, mid)
    if "hada_w1_a" in sizes:
        halves = []
        for half in ("1", "2"):
            a, b, t = (sizes.get(f"hada_{name}") for name in (f"w{half}_a", f"w{half}_b", f"t{half}"))
            assert a is not None and b is not None
            halves.append(_chain(a, b) if t is None else _tucker(a, b, t))
        return halves[0] if halves[0] == halves[1] else None
    first = sizes.get("lokr_w1") or _chain(sizes["lokr_w1_a"], sizes["lokr_w1_b"])
    second = sizes.get("lokr_w2")
    if second is None:
        t = sizes.get("lokr_t2")
        made = (sizes["lokr_w2_a"], sizes["lokr_w2_b"])
        second = _chain(*made) if t is None else _tucker(*made, t)
    ranks = {sizes[role][0] for role in ("lokr_w1_b", "lokr_w2_b") if role in sizes}
    if first is None or second is None or len(first) != 2 or len(ranks) > 1:
        return None
    return first[0] * second[0], first[1] * second[1], *second[2:]


def _chain(up: Shape, down: Shape) -> Shape | None:
    """(out, r) and (r, in, ..) -> (out, in, ..)."""
    return (up[0], *down[1:]) if up[1] == down[0] and set(up[2:]) <= {1} else None


def _tucker(up: Shape, down: Shape, middle: Shape) -> Shape | None:
    """(r, out), (q, in) and (r, q, ..) -> (out, in, ..)."""
    fits = len(middle) == 4 and middle[:2] == (up[0], down[0]) and set(up[2:]) | set(down[2:]) <= {1}
    return (up[1], down[1], *middle[2:]) if fits else None


def _refuse_other_kinds(header: Header, source: str) -> None:
    for pattern, kind in OTHER_KINDS:
        name = next((name for name in header.tensors if pattern.search(name)), None)
        if name is not None:
            raise InputError(
                f"{source} is {kind}, see {quoted(name, 80)}; LoRA, LoCon, LoHa, LoKr and DoRA are what is merged"
            )
    if {"emb_params"} & set(header.tensors) or {"clip_l", "clip_g"} <= set(header.tensors):
        raise InputError(f"{source} is a textual inversion, a new word; pass it as --embedding (embedding=)")


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
