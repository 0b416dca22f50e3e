"""Merge LoRAs and their relatives into the weights they change, in float32.

    LoRA, LoCon  dW = s up @ down,  or with three factors  dW_oi.. = s sum_pq up_op mid_pq.. down_qi     [2106.09685]
    LoHa         dW = s (w1_a @ w1_b) * (w2_a @ w2_b), element by element                             [2108.06098]
    LoKr         dW = s w1 (x) w2, their Kronecker product                                             [2212.10650]
    s = alpha / rank, alpha / sqrt(rank) for rsLoRA; 1 for a LoKr of two whole matrices
    W' = W + scale dW;  with DoRA  W' = W + scale (m (W + dW) / |W + dW| - W)                           [2402.09353]

LoHa's halves and LoKr's factors may be products themselves, with a Tucker core t for a convolution. |.| is the length
of every row, or of every column, whichever m was trained for. Source of LoHa, LoKr and of the columns: LyCORIS
[2309.14859], functional/loha.py, lokr.py, general.py. At a scale of 1 all programs agree on DoRA; at others this is the
straight line between both weights, as in ComfyUI, weight_adapter/base.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ledits_min.errors import InputError, quoted
from ledits_min.weights.lora import Lora, Update
from ledits_min.weights.read.identify import Stored


def merge(states: Mapping[str, dict[str, Tensor]], loras: Sequence[Lora], dtype: torch.dtype) -> None:
    """Replace the weights that the LoRAs change, one at a time; every other tensor stays mapped.

    `states` maps part -> {our name: weight}. The sum over all LoRAs, in their order, is taken in float32 and rounded
    once to `dtype`. Raises InputError where a factor or the sum is not finite.
    """
    files = {lora.path: _open(lora.path) for lora in loras}
    for part, state in states.items():
        for name, weight in state.items():
            changes = [(lora, update) for lora in loras if (update := lora.updates.get(part, {}).get(name)) is not None]
            if not changes:
                continue
            total = weight.to(torch.float32, copy=True)
            for lora, update in changes:
                total += lora.scale * change(total, update, files[lora.path])
            state[name] = merged = total.to(dtype)
            if not bool(merged.isfinite().all()):
                raise InputError(
                    f"{quoted(changes[-1][0].path)}: merged into {quoted(name, 80)} it exceeds what {dtype} can hold; "
                    "use a smaller scale, or float32"
                )


def change(weight: Tensor, update: Update, file: Any) -> Tensor:
    """What an update adds to this weight at a scale of 1, float32 of the weight's shape."""
    added = difference(update, file).reshape(weight.shape)
    if update.magnitude is None:
        return added
    turned = weight + added
    axes = [axis for axis in range(weight.dim()) if axis != (0 if update.by_row else 1)]
    lengths = torch.linalg.vector_norm(turned, dim=axes, keepdim=True)
    magnitude = _read(update.magnitude, file).view(lengths.shape)
    result: Tensor = turned * (magnitude / (lengths + torch.finfo(torch.float32).eps)) - weight
    return result


def difference(update: Update, file: Any) -> Tensor:
    """dW: strength * what the factors make, float32; a convolution's kernel may be flat."""
    alpha = update.alpha if isinstance(update.alpha, float) else float(_read(update.alpha, file))
    factors = {role: _read(tensor, file) for role, tensor in update.factors.items()}
    if update.kind == "LoRA":
        up, down, mid = factors["up"], factors["down"], factors.get("mid")
        made = _chain(up, down) if mid is None else _tucker(up.flatten(1).T, down, mid)
    elif update.kind == "LoHa":
        first, second = (
            _pair(factors.get(f"hada_t{half}"), factors[f"hada_w{half}_a"], factors[f"hada_w{half}_b"]) for half in "12"
        )
        made = first * second
    else:
        first, second = (
            factors[f"lokr_w{half}"]
            if f"lokr_w{half}" in factors
            else _pair(factors.get(f"lokr_t{half}"), factors[f"lokr_w{half}_a"], factors[f"lokr_w{half}_b"])
            for half in "12"
        )
        made = torch.kron(first.view(*first.shape, *[1] * (second.dim() - first.dim())), second.contiguous())
    return update.strength(alpha) * made


def _pair(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return _chain(a, b) if core is None else _tucker(a, b, core)


def _chain(up: Tensor, down: Tensor) -> Tensor:
    """up (O, R), down (R, I, ..) -> (O, I, ..)."""
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def _tucker(up: Tensor, down: Tensor, core: Tensor) -> Tensor:
    """up (P, O), down (Q, I), core (P, Q, h, w) -> (O, I, h, w)."""
    return torch.einsum("po,pqhw,qi->oihw", up.flatten(1), core, down.flatten(1))


def fingerprint(base: str, loras: Sequence[Lora]) -> str:
    """The fingerprint of a checkpoint with these LoRAs merged in this order: sha256 over its own, files and scales."""
    if not loras:
        return base
    digest = hashlib.sha256(base.encode())
    for lora in loras:
        with open(lora.path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        digest.update(f"scale {lora.scale!r}".encode())
    return digest.hexdigest()


def _read(tensor: Stored, file: Any) -> Tensor:
    values: Tensor = file.get_tensor(tensor.name).float()
    if not bool(values.isfinite().all()):
        raise InputError(
            f"{quoted(tensor.path)}: tensor {quoted(tensor.name, 80)} holds NaN or infinity; the LoRA is damaged, "
            "use another"
        )
    return values


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{quoted(path)} cannot be read ({quoted(error, 100)}); download it again") from error
