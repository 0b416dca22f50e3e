"""What a model works at of pictures: at which size, of which squares where it knows those alone; and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ledits_min.errors import InputError, warn
from ledits_min.files.picture import Size, fit_size, to_tensor
from ledits_min.files.region import Plane, region_of
from ledits_min.files.square import Square, find_square, over_pictures


@dataclass(frozen=True)
class Frame:
    """What is worked at of a batch of pictures.

    size     (width, height) in pixels
    squares  one per picture, where squares are worked at; empty: the whole pictures
    """

    size: tuple[int, int]
    squares: tuple[Square, ...] = ()

    @classmethod
    def of(cls, pictures: Sequence[Image.Image], size: tuple[int, int], squared: bool) -> Frame:
        """Of pictures that are worked at in `size`; `squared`: of their squares."""
        return cls(size, tuple(find_square(picture, size[0]) for picture in pictures) if squared else ())

    def cut(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What the model is given of the pictures: float32 (B, 3, H, W) in [-1, 1]."""
        if not self.squares:
            return to_tensor(pictures, self.size)
        pairs = zip(self.squares, pictures, strict=True)
        return torch.cat([square.cut(to_tensor([picture], square.whole)) for square, picture in pairs])

    def spread(self, image: Tensor) -> list[Tensor]:
        """What the model gave back, (B, 3, H, W), over each whole picture: (3, h, w) at the model's scale."""
        if not self.squares:
            return list(image)
        return [square.spread(one) for square, one in zip(self.squares, image, strict=True)]

    def spread_mask(self, mask: Tensor) -> Tensor:
        """A concept's mask (B, h, w) over the whole pictures, in as many places."""
        return over_pictures(mask, self.squares) if self.squares else mask

    def region(self, planes: Sequence[Plane], factor: int) -> Tensor:
        """The user's masks, a value per latent of `factor` pixels: float32 (1 or B, 1, h, w). InputError as in
        `region_of`."""
        width, height = self.size
        return region_of(planes, (height // factor, width // factor), self.squares)


@dataclass(frozen=True)
class Framing:
    """How a model frames pictures: what it can work at.

    native    the longer side, in pixels, that it was trained at
    factor    pixels per latent, of which every side is a multiple
    one_size  whether it knows squares of its native size alone
    """

    native: int
    factor: int
    one_size: bool

    def worked_at(self, picture: tuple[int, int], size: Size | None = None) -> tuple[tuple[int, int], bool]:
        """(width, height) for a picture of such a size, and whether a square of it is worked at.

        size  the longer side, or (width, height); None: the native size. InputError as in `fit_size`
        """
        if size is not None or not self.one_size:
            return fit_size(picture, size, self.native, self.factor), False
        return (self.native, self.native), picture[0] != picture[1]

    def frame(self, pictures: Sequence[Image.Image], size: Size | None) -> Frame:
        """What is worked at of pictures; InputError where they do not fit one batch."""
        found = [self.worked_at(picture.size, size) for picture in pictures]
        sizes = {worked_at for worked_at, _ in found}
        if len(sizes) > 1:
            listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
            raise InputError(f"the pictures would have different sizes ({listed}); pass size=(width, height)")
        return Frame.of(pictures, sizes.pop(), any(squared for _, squared in found))

    def warn_of(self, frame: Frame) -> None:
        """Say what a model of one size is given: a part of the picture, a padded one, or a size it does not know."""
        known = f"this model knows squares of {self.native} x {self.native} pixels alone"
        if any(square.padded for square in frame.squares):
            warn(f"{known}: the picture is padded to one, its edges drawn out")
        if any(not square.padded and square.whole != frame.size for square in frame.squares):
            warn(f"{known}: it works at the one around what is drawn, and the rest follows its edges")
        if self.one_size and frame.size != (self.native, self.native):
            warn(
                f"{frame.size[0]} x {frame.size[1]} is worked at, but {known} and may not do what is asked; leave the "
                "size out, and it is given such a square"
            )
