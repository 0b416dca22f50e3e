"""Pictures in every form people bring them, sizes, the laid-over change, and files that are whole or absent."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFilter

from ledits_min.errors import InputError, RunError
from ledits_min.files.opening import open_image, upright_size
from ledits_min.files.picture import MAX_SIDE, MIN_LATENTS, fit_size, lay_change, to_images, to_tensor
from ledits_min.files.write import save_image


def noise_picture(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def opened(path: Path, content: bytes) -> tuple[Image.Image, list[str]]:
    path.write_bytes(content)
    notices: list[str] = []
    picture = open_image(path, notices=notices)
    assert picture.mode == "RGB"
    assert picture.info == {}
    assert all("\n" not in notice for notice in notices)
    return picture, notices


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "BMP"])
def test_lossless_files_come_back_exactly(tmp_path: Path, file_format: str) -> None:
    picture = noise_picture()
    options = {"lossless": True} if file_format == "WEBP" else {}
    found, notices = opened(tmp_path / "x.bin", encoded(picture, file_format, **options))
    assert found.tobytes() == picture.tobytes()
    assert notices == []


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_upright_size_is_known_before_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.bin"
    path.write_bytes(encoded(noise_picture(), file_format, exif=exif))
    wanted = open_image(path).size
    if file_format != "TIFF":  # that is turned while it is decoded
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert upright_size(path) == wanted == ((24, 40) if orientation == 6 else (40, 24))


def test_the_size_of_a_png_whose_orientation_stands_behind_its_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    png = encoded(noise_picture(), "PNG")
    (tmp_path / "x.png").write_bytes(png[:-12] + chunk + png[-12:])
    assert upright_size(tmp_path / "x.png") == open_image(tmp_path / "x.png").size == (24, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_once(tmp_path: Path, orientation: int) -> None:
    picture = noise_picture()
    undo = [None, None, *(Image.Transpose(k) for k in (0, 3, 1, 5, 2, 6, 4))][orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = picture if undo is None else picture.transpose(undo)
    found, _ = opened(tmp_path / "x.png", encoded(lying, "PNG", exif=exif))
    assert found.tobytes() == picture.tobytes()
    assert upright_size(tmp_path / "x.png") == picture.size
    save_image(found, tmp_path / "again.jpg")
    assert Image.open(tmp_path / "again.jpg").getexif().get(0x0112) is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB-key"])
def test_transparency_shows_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (20, 20), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 10, 20))
    if mode == "RGB-key":
        content = encoded(picture.convert("RGB"), "PNG", transparency=(0, 0, 0))
        found, notices = opened(tmp_path / "x.png", content)
    elif mode in ("PA", "LA"):
        notices = []
        found = open_image(
            picture.convert("LA") if mode == "LA" else picture.quantize(8).convert("PA"), notices=notices
        )
    else:
        content = encoded(picture.quantize(8) if mode == "P" else picture, "PNG")
        found, notices = opened(tmp_path / "x.png", content)
    assert found.getpixel((2, 2)) == (255, 255, 255)
    assert found.getpixel((15, 5)) == ((200, 0, 0) if mode != "LA" else (60, 60, 60))
    assert any("white" in notice for notice in notices)


def test_opaque_alpha_is_no_news(tmp_path: Path) -> None:
    picture = noise_picture()
    found, notices = opened(tmp_path / "x.png", encoded(picture.convert("RGBA"), "PNG"))
    assert found.tobytes() == picture.tobytes()
    assert notices == []


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.arange(65_536).astype(np.uint16).reshape(256, 256)
    found, _ = opened(tmp_path / "x.png", encoded(Image.fromarray(values), "PNG"))
    assert np.array_equal(np.asarray(found)[..., 0], np.rint(values / 257.0))


@pytest.mark.parametrize(("least", "most"), [(0, 65_535), (-1, 65_535), (0, 65_536), (0, 65_535_000)])
def test_grey_of_more_bits_is_taken_where_it_fits_16(least: int, most: int) -> None:
    values = np.linspace(least, most, 16 * 16).astype(np.int32).reshape(16, 16)
    assert (values.min(), values.max()) == (least, most)
    if (least, most) == (0, 65_535):
        assert np.array_equal(np.asarray(open_image(Image.fromarray(values)))[..., 0], np.rint(values / 257.0))
        return
    with pytest.raises(InputError, match=f"holds values in {least} .. {most}; save it with 8 or 16 bits"):
        open_image(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "LAB", "HSV", "CMYK"])
def test_other_modes_keep_their_colours(mode: str) -> None:
    picture = Image.new("RGB", (20, 20), "white")
    picture.paste("black", (0, 0, 10, 20))
    source = picture if mode == "LAB" else picture.convert(mode)
    if mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        converted = ImageCms.applyTransform(picture, transform)
        assert converted is not None
        source = converted
    found = np.asarray(open_image(source)).astype(int)
    assert abs(found - np.asarray(picture).astype(int)).max() <= 2


def test_cmyk_is_told() -> None:
    notices: list[str] = []
    open_image(Image.new("CMYK", (20, 20)), notices=notices)
    assert any("CMYK" in notice for notice in notices)


def gamma_one_profile() -> bytes:
    """An ICC profile like sRGB but with linear values: mid-grey 128 is far brighter than in sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    for k in range(count):
        tag, offset, _ = struct.unpack(">4sII", profile[132 + 12 * k : 144 + 12 * k])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv" + struct.pack(">II", 0, 0)  # no entries: the identity
        if tag == b"desc":
            profile = profile.replace("sRGB".encode("utf-16-be"), "line".encode("utf-16-be"))
    return bytes(profile)


def test_an_embedded_profile_is_applied(tmp_path: Path) -> None:
    content = encoded(Image.new("RGB", (20, 20), (55, 55, 55)), "PNG", icc_profile=gamma_one_profile())
    found, notices = opened(tmp_path / "x.png", content)
    assert notices == []
    red, green, blue = found.getpixel((5, 5))  # type: ignore[misc]
    assert max(abs(value - 128) for value in (red, green, blue)) <= 3  # sRGB(55 / 255 linear) = 0.5


def test_an_srgb_profile_leaves_the_bytes_alone(tmp_path: Path) -> None:
    picture, profile = noise_picture(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found, _ = opened(tmp_path / "x.png", encoded(picture, "PNG", icc_profile=profile))
    assert found.tobytes() == picture.tobytes()


@pytest.mark.parametrize("profile", [b"rubbish", b"\0" * 200])
def test_a_broken_profile_is_told_and_ignored(tmp_path: Path, profile: bytes) -> None:
    picture = noise_picture()
    found, notices = opened(tmp_path / "x.png", encoded(picture, "PNG", icc_profile=profile))
    assert found.tobytes() == picture.tobytes()
    assert any("profile" in notice for notice in notices)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_the_first_is_used(tmp_path: Path, file_format: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    found, notices = opened(tmp_path / "x.bin", content)
    red, _, blue = found.getpixel((5, 5))  # type: ignore[misc]
    assert red > 200
    assert blue < 50
    assert any("more than one frame" in notice for notice in notices)


def png_promising(width: int, height: int) -> bytes:
    """A small PNG whose header promises another size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + encoded(noise_picture(), "PNG")[33:]


@pytest.mark.parametrize("size", [(9_500, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "x.png").write_bytes(png_promising(*size))
    with pytest.raises(InputError, match="64 megapixels"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("size", [(1, 1), (15, 40), (40, 15), (16, 129), (3, 5000)])
def test_too_small_or_too_long_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        open_image(Image.new("RGB", size))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((32, 32, 3), np.float32),
        np.zeros((32, 32, 3), np.int64),
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((1, 32, 32, 3), np.uint8),
        np.zeros((0, 32, 3), np.uint8),
    ],
)
def test_only_uint8_rgb_arrays_are_taken(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(InputError):
        open_image(array)


def test_a_plain_array_and_a_view_are_the_same_picture() -> None:
    values = np.asarray(noise_picture())
    assert np.array_equal(np.asarray(open_image(values[:, ::-1])), values[:, ::-1])


def test_the_given_picture_is_not_touched() -> None:
    picture = noise_picture()
    picture.info["exif"] = b"kept"
    found = open_image(picture)
    found.paste("red", (0, 0, 40, 24))
    assert picture.info == {"exif": b"kept"}
    assert picture.tobytes() == noise_picture().tobytes()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_damaged_file_is_a_picture_or_refused_in_one_line(tmp_path: Path, file_format: str) -> None:
    generator = random.Random(file_format)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(noise_picture(), file_format, **({"exif": exif} if file_format in ("PNG", "JPEG", "WEBP") else {}))
    for _ in range(60):
        damaged = bytearray(whole[: generator.randrange(1, len(whole) + 1)])
        for _ in range(generator.choice([0, 1, 10])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "x.bin").write_bytes(damaged)
        try:
            assert open_image(tmp_path / "x.bin").mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


sides = st.integers(16, 5000)


@given(width=sides, height=sides, factor=st.sampled_from([4, 8]), native=st.sampled_from([64, 512]))
def test_the_default_size_keeps_the_aspect(width: int, height: int, factor: int, native: int) -> None:
    if max(width, height) > 8 * min(width, height):
        width = height
    w, h = fit_size((width, height), None, native, factor)
    assert w % factor == h % factor == 0
    assert MIN_LATENTS * factor <= min(w, h)
    assert max(w, h) >= native
    assert abs(w - h * width / height) <= factor * (1.0 + width / height) / 2.0 + 1e-6
    assert fit_size((w, h), (w, h), native, factor) == (w, h)


@given(size=st.integers(1, MAX_SIDE), width=sides, height=sides)
def test_a_given_longer_side_is_met_or_refused(size: int, width: int, height: int) -> None:
    try:
        fitted = fit_size((width, height), size, 512, 8)
    except InputError:
        assert size * min(width, height) / max(width, height) < 8 * MIN_LATENTS
    else:
        assert abs(max(fitted) - size) <= 4


@pytest.mark.parametrize(
    "size", [0, -8, 29, MAX_SIDE + 8, 10**9, (64, 0), (64, 5000), (8, 64), (64,), "64", 64.0, True]
)
def test_impossible_sizes_are_refused(size: Any) -> None:
    with pytest.raises(InputError):
        fit_size((100, 100), size, 64, 4)


def test_odd_latents_are_allowed() -> None:
    assert fit_size((520, 520), 520, 512, 8) == (520, 520)


def test_picture_to_tensor_and_back_is_the_same_picture() -> None:
    picture = noise_picture()
    tensor = to_tensor([picture], picture.size)
    assert tensor.shape == (1, 3, 24, 40)
    assert tensor.dtype == torch.float32
    assert to_images(tensor)[0].tobytes() == picture.tobytes()


def test_resizing_does_not_round_to_8_bits() -> None:
    ramp = Image.fromarray(np.repeat(np.array([[100, 101]], np.uint8), 16, axis=0).repeat(8, axis=1)).convert("RGB")
    levels = (to_tensor([ramp], (64, 64)) + 1.0) * 127.5
    assert len(levels.unique()) > 4
    assert 99.0 < float(levels.min()) <= float(levels.max()) < 102.0


def test_colours_of_16_bits(tmp_path: Path) -> None:
    """Pillow keeps the high byte of a 16-bit RGB PNG: right to one level."""
    values = np.random.default_rng(0).integers(0, 65_536, (20, 20, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    found, _ = opened(tmp_path / "x.png", b"\x89PNG\r\n\x1a\n" + body)
    assert np.abs(np.asarray(found).astype(float) - values / 257.0).max() <= 1.0


def test_non_finite_pixels_are_never_written() -> None:
    for bad in (float("nan"), float("inf")):
        image = torch.zeros(2, 3, 8, 8)
        image[1, 2, 3, 4] = bad
        with pytest.raises(RunError):
            to_images(image)
        with pytest.raises(RunError):
            lay_change(noise_picture(), torch.zeros(3, 8, 8), image[1])


@pytest.mark.parametrize("size", [(40, 24), (400, 240), (33, 19)])
def test_no_change_gives_the_original_bytes(size: tuple[int, int]) -> None:
    original = noise_picture(*size)
    small = torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    assert lay_change(original, small, small).tobytes() == original.tobytes()


def test_a_local_change_stays_local() -> None:
    original = noise_picture(400, 240)
    before = torch.zeros(3, 24, 40)
    after = before.clone()
    after[:, 10:14, 10:14] = 0.5
    laid = np.asarray(lay_change(original, before, after)).astype(int)
    change = laid - np.asarray(original)
    assert not change[:, 170:].any()
    assert not change[:70].any()
    inside = np.asarray(original)[110:130, 110:130] < 180  # where nothing clips
    assert (abs(change[110:130, 110:130][inside] - 64) <= 10).all()


def textured(side: int = 128) -> Image.Image:
    """Broad stripes that a small picture shows, with a fine weave that it cannot."""
    y, x = np.mgrid[:side, :side]
    levels = 120.0 + 50.0 * np.sign(np.sin(2.0 * np.pi * x / (side / 4.0))) + 20.0 * np.where((x + y) % 2, 1.0, -1.0)
    return Image.fromarray(np.repeat(levels[..., None], 3, axis=2).astype(np.uint8))


def test_another_colour_keeps_what_the_small_picture_cannot_show() -> None:
    original = textured()
    before = to_tensor([original], (32, 32))[0]
    colour = torch.tensor([30.0, -20.0, 10.0]).view(3, 1, 1) / 127.5
    laid = np.asarray(lay_change(original, before, before + colour)).astype(int)
    assert np.abs(laid - np.asarray(original) - [30, -20, 10]).max() <= 1


@pytest.mark.parametrize("times", [1, 4])
def test_another_thing_leaves_no_outlines_of_the_old_one(times: int) -> None:
    """A disc of another grey covers the stripes; the model's copy of them is a little soft, as an autoencoder's is."""
    original = textured(64 * times)
    copy = original.resize((64, 64), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.8))
    before, after = np.asarray(copy).astype(np.float32), np.asarray(copy).astype(np.float32).copy()
    y, x = np.mgrid[:64, :64]
    after[(x - 32) ** 2 + (y - 32) ** 2 < 20**2] = 240.0
    small = [torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1.0 for picture in (before, after)]
    laid = np.asarray(lay_change(original, *small)).astype(int)
    middle = slice(20 * times, 44 * times)
    assert np.abs(laid[middle, middle] - 240).mean() < 3.0 + 10.0 * (times > 1)
    stripes = laid[middle, middle].mean(axis=(0, 2))  # what is left of them, down the columns
    assert np.ptp(stripes) < 12.0
    assert np.array_equal(laid[: 8 * times], np.asarray(original)[: 8 * times])


def test_a_tint_of_the_copy_goes_where_much_changes_and_only_there() -> None:
    original = Image.new("RGB", (64, 64), (100, 100, 100))
    before = torch.full((3, 64, 64), 112.0 / 127.5 - 1.0)  # the copy is 12 levels too bright
    after = before.clone()
    after[:, :, 32:] = 220.0 / 127.5 - 1.0
    laid = np.asarray(lay_change(original, before, after)).astype(int)
    assert (laid[:, :30] == 100).all()
    assert (laid[:, 35:] == 220).all()
