"""Pictures of other shapes than the embedded model knows: it is given a square, and they come back whole."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ledits_min import Concept, InputError, Inversion, LEdits
from ledits_min.app.cli import main
from ledits_min.files.picture import to_tensor
from ledits_min.files.region import region_of
from ledits_min.files.square import Square, find_square

SAMPLE = Path(__file__).parents[1] / "weights/tiny/samples/portrait2.png"
DRAWN = {  # size of the drawing, and where the portrait's corner lies in it
    "4:3": ((170, 128), (21, 0)),
    "3:4, a wall above": ((128, 170), (0, 42)),
    "16:9": ((228, 128), (50, 0)),
    "16:9, the face beside": ((228, 128), (0, 0)),
    "4:3, cut above and below": ((128, 96), (0, -16)),
    "3:4, cut at the sides": ((96, 128), (-16, 0)),
    "as the model knows": ((128, 128), (0, 0)),
}
GLASSES = [Concept("sunglasses")]
QUIET: dict[str, Any] = {"progress": False}


def canvas(shape: str) -> Image.Image:
    """The portrait in a larger or smaller drawing on its own background."""
    size, corner = DRAWN[shape]
    portrait = Image.open(SAMPLE).convert("RGB")
    drawing = Image.new("RGB", size, portrait.getpixel((1, 1)))
    drawing.paste(portrait, corner)
    return drawing


def eyes(picture: Image.Image, shape: str) -> float:
    """How bright the place of the eyes is: sunglasses are dark."""
    left, top = DRAWN[shape][1]
    return float(np.asarray(picture.convert("L"), dtype=float)[top + 52 : top + 68, left + 44 : left + 84].mean())


def has_glasses(picture: Image.Image, shape: str) -> bool:
    return picture.size == DRAWN[shape][0] and eyes(picture, shape) < eyes(canvas(shape), shape) - 40


@pytest.mark.parametrize("shape", DRAWN)
def test_a_drawing_of_any_shape_gets_its_sunglasses(ledits: LEdits, shape: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        inversion, result = ledits.invert_and_edit(canvas(shape), concepts=GLASSES, **QUIET)
    assert inversion.latents.shape == (1, 4, 16, 16)
    assert inversion.settings.squared == (shape != "as the model knows")
    assert sum("knows squares of 128 x 128" in str(one.message) for one in said) == inversion.settings.squared
    assert any("is padded to one" in str(one.message) for one in said) == ("cut" in shape)
    assert has_glasses(result.images[0], shape)
    assert result.masks[0].shape == (1, 16, 16)
    again = ledits.edit(inversion, concepts=GLASSES, output_size="model", **QUIET).images[0]
    assert again.size == find_square(canvas(shape), 128).whole


def test_nothing_asked_gives_the_drawing_back_exactly(ledits: LEdits) -> None:
    for shape in DRAWN:
        inversion = ledits.invert(canvas(shape), num_steps=3, skip=0, **QUIET)
        assert ledits.edit(inversion, **QUIET).images[0].tobytes() == canvas(shape).tobytes()


def test_the_mask_lies_on_the_whole_picture(ledits: LEdits) -> None:
    """16:9 with the face at the left: so is the mask."""
    _, result = ledits.invert_and_edit(canvas("16:9, the face beside"), concepts=GLASSES, **QUIET)
    across = result.masks[0][0].sum(dim=0)
    middle = float((across * (torch.arange(16) + 0.5)).sum() / across.sum()) / 16
    assert abs(middle - 64 / 228) < 0.12


def test_the_plain_rest_follows_what_is_done_to_the_square(ledits: LEdits) -> None:
    """Another background is another background up to the edges, without a seam."""
    inversion = ledits.invert(canvas("16:9, the face beside"), skip=2, **QUIET)
    edited = ledits.edit(inversion, concepts=[Concept("blue background", 3.0, 0.8)], **QUIET).images[0]
    levels = np.asarray(edited).astype(int)
    assert levels[20, 220, 2] > levels[20, 220, 0] + 30  # blue at the far side
    assert np.abs(np.diff(levels[:100, 120:136], axis=1)).max() < 12  # and where the square ends


def test_shapes_may_share_a_batch_and_a_file(ledits: LEdits, tmp_path: Path) -> None:
    inversion = ledits.invert([canvas(shape) for shape in DRAWN], **QUIET)
    inversion.save(tmp_path / "x.safetensors")
    loaded = Inversion.load(tmp_path / "x.safetensors")
    assert loaded.settings == inversion.settings and loaded.settings.squared
    images = ledits.edit(loaded, concepts=GLASSES, **QUIET).images
    assert all(has_glasses(image, shape) for image, shape in zip(images, DRAWN, strict=True))


def test_a_size_that_the_model_does_not_know_is_worked_at_and_said(ledits: LEdits) -> None:
    with pytest.warns(UserWarning, match=r"128 x 96 is worked at, but this model knows squares of 128 x 128"):
        inversion = ledits.invert(canvas("4:3"), num_steps=2, skip=0, size=(128, 96), **QUIET)
    assert inversion.latents.shape[2:] == (12, 16)
    assert not inversion.settings.squared
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledits.invert(canvas("as the model knows"), num_steps=2, skip=0, size=128, **QUIET)


def test_a_model_of_many_sizes_is_given_the_picture_as_it_is(ledits: LEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledits.framing.worked_at((170, 128)) == ((128, 128), True)
    assert ledits.framing.worked_at((170, 128), 128) == ((128, 96), False)
    monkeypatch.setattr(ledits, "defaults", replace(ledits.defaults, one_size=False))
    assert ledits.framing.worked_at((170, 128)) == ((128, 96), False)


@pytest.mark.parametrize(
    ("shape", "square"),
    [
        ("4:3", Square(128, (170, 128), 21, 0)),
        ("16:9", Square(128, (228, 128), 50, 0)),
        ("16:9, the face beside", Square(128, (228, 128), 0, 0)),
        ("3:4, a wall above", Square(128, (128, 170), 0, 42)),
        ("4:3, cut above and below", Square(128, (128, 96), 0, -16)),
        ("3:4, cut at the sides", Square(128, (96, 128), -16, 0)),
        ("as the model knows", Square(128, (128, 128), 0, 0)),
    ],
)
@pytest.mark.parametrize("times", [1, 3])
def test_the_square_is_around_what_is_drawn(shape: str, square: Square, times: int) -> None:
    drawing = canvas(shape)
    large = drawing.resize((times * drawing.width, times * drawing.height), Image.Resampling.LANCZOS)
    found = find_square(large, 128)
    assert (found.side, found.whole) == (square.side, square.whole)
    assert abs(found.left - square.left) <= 6 and abs(found.top - square.top) <= 8


def test_a_picture_without_a_plain_wall_is_kept_whole() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 64, 3), dtype=np.uint8))
    assert find_square(noise, 128) == Square(128, (16, 128), -56, 0)
    assert find_square(noise.rotate(90, expand=True), 128) == Square(128, (128, 16), 0, -56)
    assert find_square(Image.new("RGB", (400, 100), "white"), 128).whole == (128, 32)


def test_a_square_is_cut_and_laid_back_where_it_was() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    inside = Square(32, (80, 32), 20, 0)
    cut = inside.cut(to_tensor([picture], inside.whole))
    assert torch.equal(cut, to_tensor([picture], (80, 32))[..., 20:52])
    spread = inside.spread(cut)
    assert torch.equal(spread[..., 20:52], cut)
    assert torch.equal(spread[..., :20], cut[..., :1].expand(-1, -1, -1, 20))
    padded = Square(80, (80, 32), 0, -24)
    whole = to_tensor([picture], (80, 32))
    cut = padded.cut(whole)
    assert cut.shape == (1, 3, 80, 80)
    assert torch.equal(cut[..., 0, :], cut[..., 24, :])
    assert torch.equal(padded.spread(cut), whole)


def test_a_saved_inversion_says_whether_it_is_of_squares_and_nothing_else(ledits: LEdits, tmp_path: Path) -> None:
    inversion = ledits.invert(canvas("4:3"), num_steps=2, skip=0, **QUIET)
    inversion.save(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content.count(b'\\"squared\\": true') == 1
    (tmp_path / "y.safetensors").write_bytes(content.replace(b'\\"squared\\": true', b'\\"squared\\": 3   '))
    with pytest.raises(InputError, match="squared is 3"):
        Inversion.load(tmp_path / "y.safetensors")


def test_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canvas("4:3").save(tmp_path / "p.png")
    edit = ["edit", str(tmp_path / "p.png"), "--dtype", "float32", "-o", str(tmp_path / "o.png")]
    assert main([*edit, "--add", "sunglasses"]) == 0
    assert capsys.readouterr().err.count("this model knows squares of 128 x 128 pixels alone") == 1
    assert has_glasses(Image.open(tmp_path / "o.png"), "4:3")
    assert main(["inspect", "tiny"]) == 0
    assert "trained at 128 x 128 alone; of other pictures it is given a square" in capsys.readouterr().out


def test_a_folder_of_every_shape(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index, shape in enumerate(DRAWN):
        canvas(shape).save(tmp_path / f"in/{index}.png")
    batch = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--dtype", "float32", "--add", "sunglasses"]
    assert main(batch) == 0
    for index, shape in enumerate(DRAWN):
        assert has_glasses(Image.open(tmp_path / f"out/{index}.png"), shape)


def test_a_users_mask_lies_over_the_square_as_over_the_whole_picture() -> None:
    """Each in its own picture, also where one mask is given for pictures whose squares lie in different places."""
    mask = np.zeros((300, 400), dtype=np.float32)
    mask[:, 200:] = 1.0
    left, right, padded = Square(30, (40, 30), 0, 0), Square(30, (40, 30), 10, 0), Square(40, (40, 30), 0, -5)
    regions = region_of([mask], (6, 6), [left, right, padded])
    assert regions.shape == (3, 1, 6, 6)
    for region, white in zip(regions, (2, 4, 3), strict=True):  # columns of six
        assert region.round().sum(dim=-1).unique().tolist() == [white]
    assert torch.equal(region_of([mask] * 3, (6, 6), [left, right, padded]), regions)


def test_an_edit_of_a_squared_picture_stays_in_the_users_mask(ledits: LEdits) -> None:
    picture = canvas("4:3")
    mask = np.zeros((picture.height, picture.width), dtype=bool)
    mask[: picture.height // 2] = True
    asked = {"concepts": [Concept("sunglasses", threshold=0.0)], "mask_image": mask, **QUIET}
    inversion, result = ledits.invert_and_edit(picture, num_steps=6, skip=1, **asked)
    assert inversion.settings.squared
    again = ledits.edit(inversion, **asked)
    torch.testing.assert_close(result.masks[0], again.masks[0], rtol=0.0, atol=1e-6)
    acted = result.masks[0][0]
    assert acted[: len(acted) // 2 - 1].mean() > 0.5 and float(acted[len(acted) // 2 + 1 :].max()) == 0.0
