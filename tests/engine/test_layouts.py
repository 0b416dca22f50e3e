"""Whole edits through the kernels, of inversions that lie in memory in whatever way: what comes in at the door is put
right there, and no kernel refuses it. On a CUDA device compiled, elsewhere through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ledits_min import Concept, Inversion, LEdits, PromptToPrompt
from ledits_min.config import SD15_UNET, SD15_VAE
from ledits_min.unet import UNet
from ledits_min.vae import VAE

pytest.importorskip("triton", reason="the kernels need triton, which is published for Linux only")

# As small as networks get, and as few programs as there can be: the interpreter takes 10 ms for each.
LAUNCHES = {
    "geglu": {"rows": 256},
    "layer_norm 128": {"tile": 65536},
    "group_norm_silu 128": {"rows": 64, "least": 64},
    "sega_combine": {"tile": 64},
    "residuals": {"block": 64},
}
SMALL_UNET = replace(
    SD15_UNET, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), sample_size=8,
    up_block_types=("CrossAttnUpBlock2D",), mid_block_type="UNetMidBlock2D", norm_num_groups=4,
    layers_per_block=1, num_attention_heads=(2,), cross_attention_dim=128,
)  # fmt: skip
SMALL_VAE = replace(
    SD15_VAE, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, mid_block_add_attention=False
)  # fmt: skip
QUICK: dict[str, Any] = {"source": "short hair", "num_steps": 2, "skip": 0, "size": 16, "progress": False}
EDIT: dict[str, Any] = {
    "target": "long hair", "guidance_scale": 3.0, "concepts": [Concept("hat", warmup_steps=0, threshold=0.5)],
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def ledits() -> LEdits:
    """Random networks around the embedded model's text encoder, in the layout of a GPU's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = LEdits.from_pretrained("tiny", device=device, dtype="float32")
    torch.manual_seed(2)
    unet, vae = UNet(SMALL_UNET), VAE(SMALL_VAE)
    for network in (unet, vae):
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        network.eval().requires_grad_(False)
    return LEdits(unet, vae, tiny.text, tiny.schedule, tiny.defaults, "small")


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    from ledits_min.kernels._launch import forced_shape

    with ExitStack() as forced:
        for kernel, shape in LAUNCHES.items():
            forced.enter_context(forced_shape(kernel, shape))
        yield


def by_torch(code: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, without kernels."""

    def coded(*inputs: Any, **more: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LEDITS_KERNELS", "torch")
            return code(*inputs, **more)

    return coded


@pytest.fixture(autouse=True)
def autoencoder_by_torch(ledits: LEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maps take the interpreter too long, and nothing about an inversion reaches them."""
    for name in ("encode", "decode"):
        monkeypatch.setattr(ledits.runner, name, by_torch(getattr(ledits.runner, name)))


@pytest.fixture
def unet_by_torch(ledits: LEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    """For those tests that are about what the loops' own kernels are given."""
    monkeypatch.setattr(ledits.unet, "forward", by_torch(ledits.unet.forward))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8) for _ in range(2))
    return [Image.fromarray(picture.numpy()) for picture in drawn]


def relaid(lay: Callable[[Tensor], Tensor]) -> Callable[[Inversion, Path], Inversion]:
    """An inversion whose tensors are the same numbers in another layout."""

    def changed(inversion: Inversion, folder: Path) -> Inversion:
        latents = {name: lay(getattr(inversion, name)) for name in ("x_T", "residuals", "latents")}
        return replace(inversion, **latents)

    return changed


def saved(inversion: Inversion, folder: Path) -> Inversion:
    inversion.save(folder / "inversion.safetensors")
    return Inversion.load(folder / "inversion.safetensors")


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)


WAYS = {
    "made by torch": lambda inversion, folder: inversion,
    "saved and loaded": saved,
    "moved": relaid(lambda tensor: channels_last(tensor).to(torch.float64).to(torch.float32)),
    "channels-last": relaid(channels_last),
    "rows and columns swapped": relaid(lambda tensor: tensor.mT.contiguous().mT),
    "a part of something larger": relaid(lambda tensor: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]),
}


@pytest.mark.usefixtures("unet_by_torch")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.filterwarnings("error")
def test_an_edit_of_any_inversion_is_torchs(
    way: Callable[[Inversion, Path], Inversion],
    ledits: LEdits,
    pictures: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LEDITS_KERNELS", "torch")
    inversion = ledits.invert(pictures[0], **QUICK)
    expected = ledits.edit(inversion, **EDIT).latents
    given = way(inversion, tmp_path)
    assert torch.equal(given.residuals, inversion.residuals)
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    found = ledits.edit(given, **EDIT).latents
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("error")
def test_inversions_made_by_kernels_and_in_one_pass(
    ledits: LEdits, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pictures; what either side has made, the other edits."""
    monkeypatch.setenv("LEDITS_KERNELS", "torch")
    expected = ledits.invert(pictures, **QUICK)
    edited = ledits.edit(expected, **EDIT).latents
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    inversion, result = ledits.invert_and_edit(pictures, **{**QUICK, **EDIT})
    torch.testing.assert_close(inversion.residuals, expected.residuals, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.latents, edited, rtol=1e-3, atol=1e-3)
    monkeypatch.setenv("LEDITS_KERNELS", "torch")
    torch.testing.assert_close(ledits.edit(inversion, **EDIT).latents, edited, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("error")
def test_prompt_to_prompt(ledits: LEdits, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDITS_KERNELS", "torch")
    inversion = ledits.invert(pictures[0], **QUICK)
    edited = ledits.edit(inversion, attention=PromptToPrompt(), **EDIT).latents
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    found = ledits.edit(inversion, attention=PromptToPrompt(), **EDIT).latents
    torch.testing.assert_close(found, edited, rtol=1e-3, atol=1e-3)
    apart = ledits.edit(inversion, **EDIT).latents
    assert (apart - found).abs().max() > 1e-2, "nothing was lent"
