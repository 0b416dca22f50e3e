"""Merge LoRAs into the weights they change: W' = W + scale * alpha / rank * up @ down, in float32."""

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
from ledits_min.weights.read.family import Stored


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
                total += lora.scale * product(update, files[lora.path]).view(weight.shape)
            state[name] = merged = total.to(dtype)
            if not bool(merged.isfinite().all()):
                raise InputError(
                    f"{quoted(changes[-1][0].path)}: merged into {quoted(name, 80)} it exceeds what {dtype} can hold; "
                    "use a smaller scale, or float32"
                )


def product(update: Update, file: Any) -> Tensor:
    """strength * up @ down, or with three factors strength * sum_pq up[o, p] mid[p, q, :, :] down[q, i]; float32."""
    alpha = update.alpha if isinstance(update.alpha, float) else float(_read(update.alpha, file))
    up, down = _read(update.up, file).flatten(1), _read(update.down, file).flatten(1)
    if update.mid is None:
        return update.strength(alpha) * (up @ down)
    return update.strength(alpha) * torch.einsum("op,pqhw,qi->oihw", up, _read(update.mid, file), down)


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
