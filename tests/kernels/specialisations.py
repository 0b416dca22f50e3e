"""Count what a whole edit would compile, without a GPU and without compiling: JSON to stdout, {"variants": {kernel: how
many}, "behind": {kernel: those among them that `kernels/variants.py` does not meet}}.

Triton compiles a kernel anew for every new key of argument types, alignments, ones, constexprs and options. Its own
hook names each key here and forbids the compiling; tensors are on the meta device, so nothing is computed either. The
shapes are those of every norm and feed-forward of Stable Diffusion 1.5 at 512 px, read from its networks by hooks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ["LEDITS_KERNELS"] = "torch"

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from ledits_min.config import SD15_UNET, SD15_VAE
from ledits_min.kernels import variants
from ledits_min.kernels.geglu import geglu
from ledits_min.kernels.group_norm_silu import add_group_norm_silu, add_maps, group_norm_silu
from ledits_min.kernels.layer_norm import add_layer_norm
from ledits_min.kernels.sega_step import sega_step
from ledits_min.kernels.trajectory import residuals, trajectory
from ledits_min.unet import UNet
from ledits_min.vae import VAE

EVALUATIONS = (1, 3, 4)  # rows of a call of the UNet
DTYPE = torch.float16


class Driver:
    """As much of Triton's driver as is asked before a kernel is compiled: an H100 that nothing reaches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def layers() -> Iterator[tuple[nn.GroupNorm | nn.LayerNorm, Tensor]]:
    """Every norm of the UNet and the VAE, with every input it gets."""
    seen: list[tuple[nn.GroupNorm | nn.LayerNorm, Tensor]] = []
    with torch.device("meta"), torch.no_grad():
        unet, vae = UNet(SD15_UNET).to(DTYPE), VAE(SD15_VAE).to(DTYPE)
        for network in (unet, vae):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for layer in network.modules():
                if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
                    layer.register_forward_hook(lambda layer, inputs, _: seen.append((layer, inputs[0])))
        for rows in EVALUATIONS:
            unet(torch.zeros(rows, 4, 64, 64), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 77, 768))
        vae.decode(torch.zeros(1, 4, 64, 64))
        vae.encode(torch.zeros(1, 3, 512, 512))
    yield from seen


def every_launch() -> None:
    """Each layer in every form a network may use, and the steps of inversion and edit."""
    for layer, x in layers():
        width = layer.weight.numel()
        row = torch.zeros(width, dtype=DTYPE, device="meta")
        if isinstance(layer, nn.LayerNorm):
            for residual in (None, x):
                for add in (None, row):
                    add_layer_norm(x, layer, residual, add)
            for bias in (None, torch.zeros(8 * width, dtype=DTYPE, device="meta")):
                geglu(x.new_zeros(*x.shape[:-1], 8 * width), bias)
            continue
        x = x.contiguous(memory_format=torch.channels_last)
        for silu in (True, False):
            for add in (None, row, x.new_zeros(len(x), width)):
                group_norm_silu(x, layer, add, silu)
            for residual in (None, x):
                add_group_norm_silu(x, layer, residual, row, silu)
                add_maps(x, residual, row)
        left, right = (part.contiguous(memory_format=torch.channels_last) for part in x.split([width // 2] * 2, 1))
        group_norm_silu(left, layer, skip=right)
        add_group_norm_silu(left, layer, left, row[: width // 2], skip=right)

    x_t, steps = torch.zeros(1, 4, 64, 64, device="meta"), 64
    levels = torch.zeros(steps, 4, device="meta")
    noise = torch.zeros(steps, 1, 4, 64, 64, device="meta")
    trajectory(levels, x_t, noise)
    for together in (1, 16, 63, 64):
        for count in (1, 2):
            residuals(levels[:together], noise.new_zeros(together + 1, *x_t.shape), branches(count, together), 3.5)
    for concepts in range(5):
        tables = {
            "slots": torch.zeros(steps, 3 + concepts, dtype=torch.int32, device="meta"), "levels": levels,
            "guidance": torch.zeros(steps, 5, device="meta"), "terms": torch.zeros(steps, concepts, 4, device="meta"),
        }  # fmt: skip
        sega_step(
            torch.zeros(1, 4, dtype=torch.int32, device="meta"), tables, branches=branches(2 + concepts, 1)[:, 0],
            residuals=noise, x_t=x_t, carried=[x_t.clone()], shares=torch.zeros(steps, concepts, 1, 4, device="meta"),
            counts=torch.zeros(concepts, *x_t.shape, dtype=torch.int32, device="meta"),
        )  # fmt: skip


def branches(count: int, steps: int) -> Tensor:
    """(N, S, B, C, h, w), as the engine hands them on."""
    return torch.zeros(count, steps, 1, 4, 64, 64, device="meta")


if __name__ == "__main__":
    keys: dict[str, set[str]] = {}

    def note(*, repr: str, key: Any, fn: Any, **_: Any) -> bool:
        keys.setdefault(fn.name, set()).add(str(key))
        return True  # do not compile

    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = note
    for call in variants.calls(torch.device("meta"), DTYPE, SD15_UNET.block_out_channels, 32, (4, 64, 64)):
        call()
    ahead = {name: set(found) for name, found in keys.items()}
    every_launch()
    told = {
        "variants": {name: len(found) for name, found in sorted(keys.items())},
        "behind": {name: len(behind) for name, found in keys.items() if (behind := found - ahead.get(name, set()))},
    }
    json.dump(told, sys.stdout)
