"""The autoencoder: a picture at a time, then in tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ledits_min.engine import coding

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


class Blur(nn.Module):
    """Stands for a VAE whose receptive field is small: eight times larger pictures, softly."""

    class config:
        factor = 8

    def __init__(self, most: int = 10**9, error: Exception = OUT_OF_MEMORY[0]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.most, self.error = most, error
        self.sides: list[tuple[int, ...]] = []

    def fits(self, height: int, width: int) -> None:
        self.sides.append((height, width))
        if height * width > self.most:
            raise self.error

    def decode(self, latents: Tensor) -> Tensor:
        self.fits(*latents.shape[-2:])
        return nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="nearest")

    def encode(self, image: Tensor) -> Tensor:
        self.fits(*(side // 8 for side in image.shape[-2:]))
        return nn.functional.avg_pool2d(image, 8)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("size", [(32, 32), (40, 21), (17, 64)])
def test_tiles_after_memory_ran_out(size: tuple[int, int], error: Exception) -> None:
    latents = torch.randn(2, 4, *size)
    image = torch.randn(2, 3, 8 * size[0], 8 * size[1])
    whole, limited = Blur(), Blur(most=300, error=error)
    with pytest.warns(UserWarning, match="decoding: out of memory; going on in tiles"):
        found = coding.decode(limited, latents)  # type: ignore[arg-type]
    torch.testing.assert_close(found, coding.decode(whole, latents))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="encoding: out of memory; going on in tiles"):
        found = coding.encode(limited, image)  # type: ignore[arg-type]
    torch.testing.assert_close(found, coding.encode(whole, image))  # type: ignore[arg-type]


def test_a_batch_is_coded_a_picture_at_a_time() -> None:
    vae = Blur()
    assert coding.decode(vae, torch.randn(3, 4, 8, 8)).shape == (3, 3, 64, 64)  # type: ignore[arg-type]
    assert vae.sides == [(8, 8)] * 3


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_no_tile_fits(error: Exception) -> None:
    vae = Blur(most=0, error=error)
    with pytest.warns(UserWarning, match="in tiles of 64 pixels"), pytest.raises(type(error)):
        coding.decode(vae, torch.randn(1, 4, 64, 64))  # type: ignore[arg-type]
    assert vae.sides[-1] == (8, 8)


def test_half_precision_that_overflows() -> None:
    class Overflowing(Blur):
        def decode(self, latents: Tensor) -> Tensor:
            found = super().decode(latents)
            return found if self.weight.dtype == torch.float32 else found * torch.inf

    with pytest.warns(UserWarning, match="decoding: values that are not finite in float16; once more in float32"):
        assert coding.decode(Overflowing().half(), torch.randn(1, 4, 8, 8)).isfinite().all()  # type: ignore[arg-type]
