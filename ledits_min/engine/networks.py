"""The networks of a checkpoint on a device, around the checkpoint's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ledits_min.config import TextConfig
from ledits_min.engine.cpu import computes_in_bfloat16
from ledits_min.engine.memory import total_memory
from ledits_min.errors import InputError
from ledits_min.text import TextEncoder, TextEncoderPair, build_text_model
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.load import Checkpoint
from ledits_min.weights.tokenizer import load_tokenizer

Module = TypeVar("Module", bound=nn.Module)

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "tf32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


class Networks(NamedTuple):
    """What `LEdits` is made of."""

    unet: UNet
    vae: VAE
    text: TextEncoder | TextEncoderPair


def build_networks(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Networks:
    """Networks in `dtype` that take the checkpoint's tensors over: its state dicts are empty afterwards.

    SDXL's autoencoder overflows float16, so it is float32 unless its config says `force_upcast: false`. InputError
    where the weights alone are more than the device's memory.
    """
    second = checkpoint.text_2_config
    vae_dtype = torch.float32 if second is not None and checkpoint.vae_config.force_upcast else dtype
    check_room(checkpoint, device, dtype, vae_dtype)

    def encoder(config: TextConfig, state: dict[str, Tensor], tokenizer: Path | None) -> TextEncoder:
        model = _placed(lambda: build_text_model(config), state, device, dtype)
        words = load_tokenizer(tokenizer, config, checkpoint.words)
        return TextEncoder(words, model, second is not None, checkpoint.skipped_layers)

    text: TextEncoder | TextEncoderPair
    text = first = encoder(checkpoint.text_config, checkpoint.text, checkpoint.tokenizer)
    if second is not None:
        pooling = encoder(second, checkpoint.text_2, checkpoint.tokenizer_2)
        text = TextEncoderPair(first, pooling, checkpoint.zeros_for_empty_prompt)
    unet = _placed(lambda: UNet(checkpoint.unet_config), checkpoint.unet, device, dtype)
    vae = _placed(lambda: VAE(checkpoint.vae_config), checkpoint.vae, device, vae_dtype)
    return Networks(unet, vae, text)


def check_room(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
    """InputError where the weights cannot fit: known from their shapes, before any is read."""
    states = (checkpoint.unet, checkpoint.text, checkpoint.text_2)
    wanted = dtype.itemsize * sum(tensor.numel() for state in states for tensor in state.values())
    wanted += vae_dtype.itemsize * sum(tensor.numel() for tensor in checkpoint.vae.values())
    there = total_memory(device)
    if wanted > there:
        narrower = "--dtype bfloat16 halves it" if dtype.itemsize == 4 else "a smaller model is needed"
        raise InputError(
            f"the weights need {wanted / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{there / 1e9:.1f} GB of memory; {narrower}, or another --device"
        )


def _placed(build: Callable[[], Module], state: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Module:
    with torch.device("meta"):
        module = build()
    module.load_state_dict(state, strict=True, assign=True)
    state.clear()  # the module owns the mapped tensors now; each is dropped as its converted copy replaces it
    if isinstance(module, UNet | VAE) and fits_channels_last(module, device, dtype):
        module.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.to(device, dtype).eval().requires_grad_(False)


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto", or a device that is really there; InputError otherwise."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {str(device)!r} is not one torch knows; use auto, cpu or cuda") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= count.get(chosen.type, 0):
        raise InputError(f"device {str(device)!r} is not available on this machine; use cpu")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the networks; everything between them is float32. "tf32" is float32 with products that round."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if computes_in_bfloat16() else torch.float32
        return torch.float16
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; the choices are auto, {', '.join(DTYPES)}")
    if dtype == "tf32" and device.type != "cuda":
        raise InputError(f"dtype 'tf32' is a CUDA device's, and this is {device.type}; use float32")
    return DTYPES[dtype]


def fits_channels_last(network: UNet | VAE, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether maps are best kept with their channels together: on a GPU, and on a CPU where maps are wide.

    Not where the weights are used as they lie in the file: another layout would be a copy in memory.
    """
    weight = next(network.parameters())
    return device.type == "cuda" or (weight.dtype != dtype and network.config.block_out_channels[0] >= 128)
